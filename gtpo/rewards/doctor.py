"""The reward doctor: what the rewards pay for the right answer, and for what is wrong and looks
like it.

Every reward function is tried on a few problems of the data, called as a run calls it: in a process
that can be killed, with the recipe's limits. A wrong answer that is paid like a right one is what
training will learn.
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
from gtpo.rewards.failures import Verdict, accept
from gtpo.rewards.pool import CannotHandOver, RewardPool
from gtpo.rewards.worker import call_reward
from gtpo.system.console import Finding

PROBLEMS = 8
IMPORT_SECONDS = 60.0  # for the module of a reward function
TRAINER_STATE = SimpleNamespace(global_step=0, max_steps=1, epoch=0.0, log_history=[])
PROBES = ("reference", "empty", "truncated", "wrong but containing", "another row's")


class Trial(NamedTuple):
    """What one reward function did: for each probe the rewards of the problems, None where it could
    not judge.
    """

    path: str
    paid: dict[str, list[float | None]]
    milliseconds: float  # per completion
    problem: str | None = None


def diagnose(
    rewards: list[str],
    weights: list[float] | None,
    problems: list[dict],
    tokenizer,
    section: RewardsSection,
    import_seconds: float = IMPORT_SECONDS,
) -> list[Finding]:
    """A finding per reward function and, where there are several, one on their weighted sum."""
    probes = probe_completions(problems)
    trials = [_try(path, problems, probes, tokenizer, section, import_seconds) for path in rewards]
    broken = any(trial.problem for trial in trials)
    together = None if broken else _together(trials, weights or [1.0] * len(rewards))
    findings = [
        _finding(trial, others=len(trials) > 1 and not broken and not _overpaid(together))
        for trial in trials
    ]
    if together and len(trials) > 1:
        findings.append(_finding(together))
    return findings


def probe_completions(problems: list[dict]) -> dict[str, list[str | None]]:
    """For each probe a completion per problem; None where the data has none that is surely
    wrong.
    """
    references = [problem["answer"] for problem in problems]
    finals = [reference_answer(reference) for reference in references]
    made: dict[str, list[str | None]] = {name: [] for name in PROBES}
    for i, (reference, final) in enumerate(zip(references, finals)):
        other = next(
            (j for j in range(len(finals)) if not same_answer(finals[j], final) and finals[j]), None
        )
        reasoning = reference.partition("<reasoning>\n")[2].rpartition("\n</reasoning>")[0]
        candidates = (
            [f"1{final}", f"{final}1"]
            if other is None
            else [f"1{final}", f"{final} or {finals[other]}", f"{final}1"]
        )
        containing = next(
            (wrong for wrong in candidates if final and not same_answer(wrong, final)), None
        )
        made["reference"].append(reference)
        made["empty"].append("")
        made["truncated"].append(reference.rpartition("<answer>")[0] + "<answer>")
        made["wrong but containing"].append(containing and format_reference(reasoning, containing))
        made["another row's"].append(None if other is None else references[other])
    return made


def _try(
    path: str,
    problems: list[dict],
    probes: dict[str, list[str | None]],
    tokenizer,
    section: RewardsSection,
    import_seconds: float,
) -> Trial:
    pool = RewardPool(
        1, seconds=section.seconds, memory=section.memory, load_seconds=import_seconds, quiet=True
    )
    paid, seconds, count = {}, 0.0, 0
    try:
        for name, completions in probes.items():
            rows = [i for i, completion in enumerate(completions) if completion is not None]
            if not rows:
                continue
            reply = _ask(
                pool,
                path,
                section.isolated,
                {
                    "prompts": [problems[i]["prompt"] for i in rows],
                    "completions": [
                        [{"role": "assistant", "content": completions[i]}] for i in rows
                    ],
                    "completion_ids": [
                        tokenizer(completions[i], add_special_tokens=False)["input_ids"]
                        for i in rows
                    ],
                    **{
                        column: [problems[i][column] for i in rows]
                        for column in problems[0]
                        if column != "prompt"
                    },
                },
            )
            verdict = Verdict(len(rows))
            if "rewards" in reply:
                accept(verdict, range(len(rows)), reply)
            if problem := _what_is_wrong(reply, verdict):
                # before any call
                return Trial(
                    path,
                    paid,
                    0.0,
                    problem if "import" in problem else f"{problem}, on {_on(name)}",
                )
            paid[name] = [None] * len(problems)
            for row, reward in zip(rows, verdict.rewards):
                paid[name][row] = reward
            seconds, count = seconds + reply["seconds"], count + len(rows)
    finally:
        pool.close()
    return Trial(path, paid, 1000 * seconds / max(count, 1))


def _ask(pool: RewardPool, path: str, isolated: bool, arguments: dict) -> dict:
    """What `judge_call.judge` says of a call, and its `seconds`."""
    arguments["trainer_state"] = TRAINER_STATE
    try:
        (reply,) = pool.map(lambda call: pool.call(path, call, seed="check"), [arguments])
    except CannotHandOver as error:
        if isolated:
            return {
                "failure": (
                    "cannot be called in a process of its own, the dataset has a column that"
                    f" cannot be handed over ({error}); set rewards.isolated to false"
                ),
                "traceback": "",
            }
        began = time.perf_counter()
        reply = call_reward(load_object(path), arguments, len(arguments["completions"])) | {
            "seconds": time.perf_counter() - began
        }
    return reply


def _what_is_wrong(reply: dict, verdict: Verdict) -> str | None:
    """A clause on what a run would call a failure, or a bug."""
    if "bug" in reply:
        return f"{reply['bug']}; return a list with a number or None for each completion"
    failed = reply if "failure" in reply else next(iter(verdict.failures.values()), None)
    if failed is None:
        return None
    frames = re.findall(r'File "([^"<]+)", line (\d+), in', failed["traceback"])
    theirs = [
        f", {os.path.basename(file)} line {line}"
        for file, line in frames
        if os.path.basename(file) != "judge_call.py"
    ]
    return failed["failure"] + (theirs[-1] if theirs else "")


def _on(name: str) -> str:
    return {
        "reference": "the reference answer",
        "empty": "an empty completion",
        "truncated": "a truncated completion",
        "wrong but containing": "a wrong answer that contains the right one",
        "another row's": "another row's answer",
    }[name]


def _together(trials: list[Trial], weights: list[float]) -> Trial:
    """The weighted sum; a completion that one reward cannot judge is left out, as TRL leaves it."""
    paid = {}
    for name in trials[0].paid:
        rows = zip(*(trial.paid[name] for trial in trials))
        paid[name] = [
            None if None in row else math.fsum(w * r for w, r in zip(weights, row)) for row in rows
        ]
    return Trial("all rewards", paid, sum(trial.milliseconds for trial in trials))


def _overpaid(trial: Trial) -> dict[str, tuple[int, int]]:
    """The wrong probes that were paid like the reference, or better: in how many of how many
    problems.
    """
    found = {}
    for name, rewards in trial.paid.items():
        pairs = [pair for pair in zip(rewards, trial.paid["reference"]) if None not in pair]
        count = sum(wrong >= right - 1e-9 for wrong, right in pairs)
        if name != "reference" and count:
            found[name] = count, len(pairs)
    return found


def _finding(trial: Trial, others: bool = False) -> Finding:
    """`others`: the rewards together tell right from wrong, so one that looks at the format alone
    is fine.
    """
    details = {
        "reward": trial.path,
        "paid": trial.paid,
        "milliseconds": round(trial.milliseconds, 3),
    }
    if trial.problem:
        return Finding("fail", "reward", f"{trial.path} {trial.problem}", details)
    pays = (
        ", ".join(f"{name} {_summary(rewards)}" for name, rewards in trial.paid.items())
        + f"; {trial.milliseconds:.1f} ms each"
    )
    if all(reward is None for reward in trial.paid["reference"]):
        return Finding(
            "warn", "reward", f"{trial.path} cannot judge the reference answers: {pays}", details
        )
    overpaid = _overpaid(trial)
    if others and _looks_at_the_format_alone(trial):
        return Finding(
            "ok",
            "reward",
            f"{trial.path} pays for the format alone, and the others for the answer: {pays}",
            details,
        )
    if overpaid:
        told = "; ".join(
            f"{_on(name)} in {count} of {total} problems"
            for name, (count, total) in overpaid.items()
        )
        return Finding(
            "warn",
            "reward",
            f"{trial.path} pays what is wrong like the right answer ({told}): {pays}",
            details,
        )
    return Finding("ok", "reward", f"{trial.path} pays: {pays}", details)


def _looks_at_the_format_alone(trial: Trial) -> bool:
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
