"""The reward doctor: what the rewards pay for right answers, and for wrong ones that look right.

Every reward function is tried on a few problems of the data. It is called as a run calls it: in a
process that can be killed, with the recipe's limits. Where a wrong answer is paid like a right one,
training will learn the wrong answer.
"""

import math
import os
import re
import time
from types import SimpleNamespace
from typing import NamedTuple

from gtpo.answers import format_reference, reference_answer, same_answer
from gtpo.recipe.dotted_paths import load_object
from gtpo.recipe.sections import RewardsSection
from gtpo.rewards import worker
from gtpo.rewards.failures import RolloutRewards
from gtpo.rewards.pool import CannotHandOver, RewardPool
from gtpo.system.console import Finding

PROBLEMS = 8
ALL = "all rewards"  # the name of their weighted sum
SHOWN_ANSWER = 60  # characters
IMPORT_SECONDS = 60.0  # for the module of a reward function
TRAINER_STATE = SimpleNamespace(global_step=0, max_steps=1, epoch=0.0, log_history=[])

# Each probe is a completion for every problem. The names are those of --check --json.
PROBES = {
    "reference": "the reference answer",
    "empty": "an empty completion",
    "truncated": "a truncated completion",
    "wrong but containing": "a wrong answer that contains the right one",
    "another row's": "another row's answer",
}


class Trial(NamedTuple):
    """What one reward function paid: by probe a reward per problem, None where not scored."""

    path: str
    paid: dict[str, list[float | None]]
    milliseconds: float  # per completion
    problem: str | None = None  # why the trial ended early


def diagnose(
    rewards: list[str],
    weights: list[float] | None,
    problems: list[dict],
    tokenizer,
    section: RewardsSection,
    import_seconds: float = IMPORT_SECONDS,
    prompt_opening: str = "",
    needs_all: bool = True,
) -> list[Finding]:
    """A finding per reward function and, where there are several, one on their weighted sum.

    `prompt_opening` is what the prompt has already written of the answer. The probes begin after
    it, as completions do. With `needs_all`, as in GTPO, a completion that one function does not
    score has no sum. Without it, as in TRL's GRPO, the other functions count.
    """
    probes = probe_completions(problems, prompt_opening)

    def trial(path: str) -> Trial:
        return _try(path, problems, probes, tokenizer, section, import_seconds, prompt_opening)

    trials = [trial(path) for path in rewards]
    broken = any(trial.problem for trial in trials)
    weights = weights or [1.0] * len(rewards)
    together = None if broken else _together(trials, weights, needs_all)
    # Where the rewards together tell right from wrong, one of them may look at the format alone.
    format_suffices = len(trials) > 1 and not broken and not _overpaid(together)
    findings = [_finding(trial, format_suffices) for trial in trials]
    if together and len(trials) > 1:
        findings.append(_finding(together))
    return findings


def check_sum(
    findings: list[Finding],
    weights: list[float] | None,
    problems: list[dict],
    needs_all: bool = True,
) -> list[Finding]:
    """The `findings` of `diagnose`, with a failure where the weighted sum cannot teach anything.

    Such a sum pays the reference no more than an empty completion.
    """
    each = [finding for finding in findings if finding.details["reward"] != ALL]
    tried = [finding.details for finding in each]
    if any(not {"reference", "empty"} <= details["paid"].keys() for details in tried):
        return findings  # a function that fails has a finding of its own
    trials = [Trial(details["reward"], details["paid"], 0.0) for details in tried]
    together = _together(trials, weights or [1.0] * len(trials), needs_all)
    clause = _teaches_nothing(together)
    if clause is None:
        return findings
    sentence = f"the weighted sum of {ALL} {clause}: {_summaries(together)}. {_advice(problems)}"
    details = {"reward": ALL, "paid": together.paid, "milliseconds": 0.0}
    return [*each, Finding("fail", "reward", sentence, details)]


def _teaches_nothing(together: Trial) -> str | None:
    """A clause where the weighted sum pays the reference no more than an empty completion."""
    references, empties = together.paid["reference"], together.paid["empty"]
    if all(reward is None for reward in references):
        return "does not score the reference answers"
    pairs = [pair for pair in zip(references, empties, strict=True) if None not in pair]
    if pairs and sum(right for right, _ in pairs) <= sum(empty for _, empty in pairs) + 1e-9:
        return "pays the reference answers no more than an empty completion"
    return None


def _advice(problems: list[dict]) -> str:
    """What to look at, with the first answer as the rewards get it."""
    answer = str(problems[0]["answer"])
    shown = repr(answer if len(answer) <= SHOWN_ANSWER else f"{answer[:SHOWN_ANSWER]}...")
    return (
        f"Look at the answer column (dataset.answer_column; the first answer is {shown}), at the"
        " tags (references are written in <reasoning> and <answer>), and at the reward functions"
        " with their weights (trainer.reward_funcs, training.reward_weights)"
    )


def probe_completions(
    problems: list[dict], prompt_opening: str = ""
) -> dict[str, list[str | None]]:
    """By probe, a completion per problem; None where the data has none that is surely wrong.

    They go on where the prompt ends: where it opens the reasoning, they do not.
    """
    references = [problem.get("reference", problem["answer"]) for problem in problems]
    finals = [reference_answer(reference) for reference in references]
    probes: dict[str, list[str | None]] = {name: [] for name in PROBES}
    for reference, final in zip(references, finals, strict=True):
        others = (text for text in finals if text and not same_answer(text, final))
        other = next(others, None)
        reasoning = reference.partition("<reasoning>\n")[2].rpartition("\n</reasoning>")[0]
        candidates = [f"1{final}", f"{final}1"]
        if other is not None:
            candidates.insert(1, f"{final} or {other}")
        wrong = (text for text in candidates if final and not same_answer(text, final))
        containing = next(wrong, None)
        probes["reference"].append(reference)
        probes["empty"].append("")
        probes["truncated"].append(reference.rpartition("<answer>")[0] + "<answer>")
        probes["wrong but containing"].append(
            containing and format_reference(reasoning, containing)
        )
        probes["another row's"].append(other and references[finals.index(other)])
    return {
        name: [text and _after(prompt_opening, text) for text in texts]
        for name, texts in probes.items()
    }


def _after(prompt_opening: str, text: str) -> str:
    """What a model writes of `text` after a prompt that has begun it."""
    answer = text.rpartition("<answer>")[2]
    if "<answer>" in prompt_opening:
        return answer
    if "</reasoning>" in prompt_opening:
        return f"<answer>{answer}"
    return text.removeprefix("<reasoning>").lstrip() if "<reasoning>" in prompt_opening else text


def _try(
    path: str,
    problems: list[dict],
    probes: dict[str, list[str | None]],
    tokenizer,
    section: RewardsSection,
    import_seconds: float,
    prompt_opening: str,
) -> Trial:
    """Call one reward function with each probe; the first that goes wrong ends the trial."""
    pool = RewardPool(
        1, seconds=section.seconds, memory=section.memory, load_seconds=import_seconds, quiet=True
    )
    paid, seconds, count = {}, 0.0, 0
    try:
        for name, completions in probes.items():
            rows = [i for i, completion in enumerate(completions) if completion is not None]
            if not rows:
                continue
            arguments = _arguments([problems[i] for i in rows], [completions[i] for i in rows])
            arguments = {worker.OPENING: prompt_opening} | arguments
            arguments["completion_ids"] = [
                tokenizer(completions[i], add_special_tokens=False)["input_ids"] for i in rows
            ]
            reply = _call(pool, path, section.isolated, arguments)
            scored = RolloutRewards(len(rows))
            if "rewards" in reply:
                scored.accept(range(len(rows)), reply)
            if problem := _what_is_wrong(reply, scored):
                if "import" not in problem:  # a failed import came before any probe
                    problem = f"{problem}, on {PROBES[name]}"
                return Trial(path, paid, 0.0, problem)
            paid[name] = [None] * len(problems)
            for row, reward in zip(rows, scored.rewards, strict=True):
                paid[name][row] = reward
            seconds, count = seconds + reply["seconds"], count + len(rows)
    finally:
        pool.close()
    return Trial(path, paid, 1000 * seconds / max(count, 1))


def _arguments(problems: list[dict], completions: list[str]) -> dict:
    """What TRL hands to a reward function for one completion of each problem."""
    columns = [column for column in problems[0] if column != "prompt"]
    return {
        "prompts": [problem["prompt"] for problem in problems],
        "completions": [[{"role": "assistant", "content": text}] for text in completions],
        "trainer_state": TRAINER_STATE,
        **{column: [problem[column] for problem in problems] for column in columns},
    }


def _call(pool: RewardPool, path: str, isolated: bool, arguments: dict) -> dict:
    """The reply of one reward call, with its `seconds`."""
    try:
        (reply,) = pool.map(lambda call: pool.call(path, call, seed="check"), [arguments])
    except CannotHandOver as error:
        if isolated:
            failure = (
                "cannot be called in a process of its own, the dataset has a column that"
                f" cannot be handed over ({error}); set rewards.isolated to false"
            )
            return {"failure": failure, "traceback": ""}
        began = time.perf_counter()
        function, count = load_object(path), len(arguments["completions"])
        reply = worker.call_reward(function, arguments, count)
        reply["seconds"] = time.perf_counter() - began
    return reply


def _what_is_wrong(reply: dict, scored: RolloutRewards) -> str | None:
    """A clause on what a run would call a failure or a broken contract, None if there is none."""
    if "bug" in reply:
        return reply["bug"]
    failed = reply if "failure" in reply else next(iter(scored.failures.values()), None)
    if failed is None:
        return None
    frames = re.findall(r'File "([^"<]+)", line (\d+), in', failed["traceback"])
    theirs = [
        f", {os.path.basename(file)} line {line}"
        for file, line in frames
        if file != worker.__file__
    ]
    return failed["failure"] + (theirs[-1] if theirs else "")


def _together(trials: list[Trial], weights: list[float], needs_all: bool) -> Trial:
    """The weighted sum; None for a completion that one function, or none at all, scores."""
    paid, left_out = {}, any if needs_all else all
    for name in trials[0].paid:
        rows = zip(*(trial.paid[name] for trial in trials), strict=True)
        paid[name] = [
            None if left_out(reward is None for reward in row) else _weighted_sum(weights, row)
            for row in rows
        ]
    return Trial(ALL, paid, sum(trial.milliseconds for trial in trials))


def _weighted_sum(weights: list[float], rewards: tuple[float | None, ...]) -> float:
    pairs = zip(weights, rewards, strict=False)
    return math.fsum(weight * reward for weight, reward in pairs if reward is not None)


def _overpaid(trial: Trial) -> dict[str, tuple[int, int]]:
    """The wrong probes that were paid like the reference or better: (in how many problems, of how
    many).
    """
    overpaid = {}
    for name, rewards in trial.paid.items():
        pairs = zip(rewards, trial.paid["reference"], strict=True)
        pairs = [pair for pair in pairs if None not in pair]
        count = sum(wrong >= right - 1e-9 for wrong, right in pairs)
        if name != "reference" and count:
            overpaid[name] = count, len(pairs)
    return overpaid


def _finding(trial: Trial, format_suffices: bool = False) -> Finding:
    """The finding of a trial. `format_suffices`: it is fine to pay for the format alone."""
    details = {
        "reward": trial.path,
        "paid": trial.paid,
        "milliseconds": round(trial.milliseconds, 3),
    }

    def finding(verdict: str, clause: str) -> Finding:
        return Finding(verdict, "reward", f"{trial.path} {clause}", details)

    if trial.problem:
        return finding("fail", trial.problem)
    pays = f"{_summaries(trial)}; {trial.milliseconds:.1f} ms each"
    if all(reward is None for reward in trial.paid["reference"]):
        return finding("warn", f"does not score the reference answers: {pays}")
    overpaid = _overpaid(trial)
    if format_suffices and _looks_at_the_format_alone(trial) and "empty" not in overpaid:
        return finding("ok", f"pays for the format alone, and the others for the answer: {pays}")
    if overpaid:
        probes = "; ".join(
            f"{PROBES[name]} in {count} of {total} problems"
            for name, (count, total) in overpaid.items()
        )
        return finding("warn", f"pays what is wrong like the right answer ({probes}): {pays}")
    return finding("ok", f"pays: {pays}")


def _summaries(trial: Trial) -> str:
    """`reference 20, empty 0, ...`: what was paid for each probe."""
    return ", ".join(f"{name} {_summary(rewards)}" for name, rewards in trial.paid.items())


def _looks_at_the_format_alone(trial: Trial) -> bool:
    """Whether every wrong answer in the right format was paid like the reference."""
    wrong = [name for name in ("wrong but containing", "another row's") if name in trial.paid]
    return all(
        trial.paid[name][i] in (None, right)
        for name in wrong
        for i, right in enumerate(trial.paid["reference"])
    )


def _summary(rewards: list[float | None]) -> str:
    """The rewards of one probe: one number where they agree, else the smallest and the largest."""
    known = sorted({reward for reward in rewards if reward is not None})
    if not known:
        return "None"
    return f"{known[0]:g}" if len(known) == 1 else f"{known[0]:g} to {known[-1]:g}"
