"""The data of the conflict view: a few groups of chosen steps, token by token, small enough for one
page.

A token is an index into one table of (id, text) for the whole page, so that two tokens are the same
when their indices are. Of completions too long to show, both ends are kept: the prefix run and the
suffix run are there.
"""

import json
from typing import Any

from gtpo.errors import RecipeError
from gtpo.report.comparison import Configuration
from gtpo.report.completion_log import Completion, Group
from gtpo.report.run_record import RunRecord

GROUPS_PER_STEP = 8
MOST_RUNS = 6
GROUP_TOKENS = 24_000  # of one group, at both ends of its completions together
TEXT = 4_000  # characters of a prompt or a reference, or of a completion without tokens


class TokenTable:
    def __init__(self):
        self.texts: list[str] = []
        self._index: dict[tuple[int, str], int] = {}

    def __call__(self, token_id: int, text: str) -> int:
        if (token_id, text) not in self._index:
            self._index[token_id, text] = len(self.texts)
            self.texts.append(text)
        return self._index[token_id, text]


def conflict_view(
    configurations: list[Configuration], steps: list[int], *, size: int
) -> dict[str, Any]:
    """At most about `size` characters of JSON; `steps` beside the chosen ones. {} where no
    completions were recorded.
    """
    chosen = [
        (configuration, run)
        for configuration in configurations
        for run in configuration.runs[:1]
        if run.completions.groups
    ][:MOST_RUNS]
    table = TokenTable()
    runs = [
        _run_view(run, configuration.label, steps, table, size // len(chosen))
        for configuration, run in chosen
    ]
    return {"runs": runs, "tokens": table.texts} if runs else {}


def choose_steps(run: RunRecord, wanted: list[int]) -> dict[int, str]:
    """Steps to show, and why: first, middle, last, with most conflicts, at the first alarm, the
    wanted; raises RecipeError.
    """
    log = run.completions
    shares: dict[int, list[int]] = {}
    for group in log.groups:
        total = shares.setdefault(group.step, [0, 0])
        total[0], total[1] = total[0] + group.conflicts, total[1] + group.tokens
    with_tokens = sorted(step for step, (_, tokens) in shares.items() if tokens) or sorted(shares)
    for step in wanted:
        if step not in shares:
            raise RecipeError(
                "--steps",
                f"{step} is not in {log.file}, which has steps {min(shares)} to {max(shares)}",
            )
    middle = with_tokens[len(with_tokens) // 2]
    reasons = {with_tokens[0]: "first", middle: "middle", with_tokens[-1]: "last"}
    if len(with_tokens) == 1:
        reasons = {middle: "the only one"}
    most = sorted(with_tokens, key=lambda step: -shares[step][0] / max(1, shares[step][1]))
    for step in most[:2]:
        reasons[step] = f"{reasons[step]}, many conflicts" if step in reasons else "many conflicts"
    if run.alarms and (before := [step for step in with_tokens if step <= run.alarms[0][0]]):
        reasons.setdefault(before[-1], "first alarm")
    for step in wanted:
        reasons.setdefault(step, "asked for")
    return {step: f"{reasons[step]}{_percent(*shares[step])}" for step in sorted(reasons)}


def _percent(conflicts: int, tokens: int) -> str:
    return f", {conflicts / tokens:.0%} in conflict" if tokens else ""


def _run_view(
    run: RunRecord, label: str, wanted: list[int], table: TokenTable, size: int
) -> dict[str, Any]:
    """The wanted and the chosen steps, their most telling groups first, as many as fit."""
    reasons = choose_steps(run, wanted)
    by_step = {step: _most_telling_first(run, step) for step in reasons}
    shown: dict[int, list[dict]] = {step: [] for step in reasons}
    weight = run.number("gtpo_runtime.w_raw", 2.0)
    for place in range(GROUPS_PER_STEP):  # each step's best first, so that none is left without
        for step, groups in by_step.items():
            if place < len(groups):
                group = _group_view(run.completions.read(groups[place]), table, weight)
                size -= len(json.dumps(group))
                if size > 0 or not any(shown.values()):
                    shown[step].append(group)
    return {
        "name": run.name,
        "label": label,
        "wouldBe": not run.has_token_weights,
        "weight": weight,
        "steps": [
            {"step": step, "why": why, "groups": shown[step], "of": len(by_step[step])}
            for step, why in reasons.items()
            if shown[step]
        ],
    }


def _most_telling_first(run: RunRecord, step: int) -> list[Group]:
    """Groups that show best where a run ends: those with many tokens in conflict, and many that are
    not.
    """
    groups = [group for group in run.completions.groups if group.step == step]
    return sorted(
        groups,
        key=lambda group: (
            -group.conflicts * (group.tokens - group.conflicts) / max(1, group.tokens) ** 2
        ),
    )


def _group_view(completions: list[Completion], table: TokenTable, weight: float) -> dict[str, Any]:
    first = completions[0]
    reach = max(30, GROUP_TOKENS // (2 * len(completions)))
    return {
        "group": first.group,
        "prompt": _prompt(first.prompt),
        "reference": None if first.answer is None else _cut(str(first.answer)),
        "rows": [_row_view(completion, table, weight, reach) for completion in completions],
    }


def _row_view(
    completion: Completion, table: TokenTable, weight: float, reach: int
) -> dict[str, Any]:
    """Entropies in thousandths of a nat; weights as [weight, how many], over all tokens; `left`
    before, the rest after a gap.
    """
    row: dict[str, Any] = {
        "row": completion.row,
        "advantage": completion.advantage,
        "reward": completion.reward,
        "entropy": completion.entropy,
        "kept": completion.kept,
        "truncated": completion.truncated,
        "prefix": completion.prefix,
        "suffix": completion.suffix,
        "rewards": completion.rewards if len(completion.rewards) > 1 else {},
    }
    if completion.ids is None:
        return row | {"text": _cut(completion.completion)}
    length = len(completion.ids)
    left = reach if length > 2 * reach else length
    shown = [*range(left), *range(max(left, length - reach), length)]
    entropies = completion.entropies
    return row | {
        "length": length,
        "left": left,
        "tokens": [table(completion.ids[i], completion.tokens[i]) for i in shown],
        "weights": _run_lengths(completion.token_weights(weight)),
        "entropies": (
            entropies
            and [None if entropies[i] is None else round(1000 * entropies[i]) for i in shown]
        ),
    }


def _run_lengths(values: list[float]) -> list[list[float]]:
    lengths: list[list[float]] = []
    for value in (round(value, 4) for value in values):
        if lengths and lengths[-1][0] == value:
            lengths[-1][1] += 1
        else:
            lengths.append([value, 1])
    return lengths


def _prompt(prompt: Any) -> list[list[str]]:
    """[role, text] per message."""
    if isinstance(prompt, list):
        messages = [message for message in prompt if isinstance(message, dict)]
        return [
            [str(message.get("role", "")), _cut(_text(message.get("content")))]
            for message in messages
        ]
    return [] if prompt is None else [["prompt", _cut(str(prompt))]]


def _text(content: Any) -> str:
    return (
        content
        if isinstance(content, str)
        else ""
        if content is None
        else json.dumps(content, ensure_ascii=False)
    )


def _cut(text: str) -> str:
    if len(text) <= TEXT:
        return text
    return (
        f"{text[: TEXT // 2]}\n... {len(text) - TEXT:,} characters left out"
        f" ...\n{text[-TEXT // 2 :]}"
    )
