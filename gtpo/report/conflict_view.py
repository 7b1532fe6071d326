"""The data of the conflict view: groups of chosen steps, token by token, small enough for a page.

A token is an index into one table of (id, text) for the whole page, so two tokens are the same if
their indices are. Of a completion that is too long, both ends are kept, because the prefix run and
the suffix run are there.
"""

import json
from typing import Any

from gtpo.errors import RecipeError
from gtpo.report.comparison import Configuration
from gtpo.report.completion_log import RecordedCompletion, RecordedGroup
from gtpo.report.run_record import RunRecord

MAX_GROUPS = 8  # per step
MAX_RUNS = 6
MAX_GROUP_TOKENS = 24_000  # of all completions of a group together
MIN_END = 30  # tokens at either end of a completion that are always shown
MAX_TEXT = 4_000  # characters of a prompt, a reference, or a completion without tokens


class TokenTable:
    """Numbers tokens by id and text: `index = table(token_id, text)`."""

    def __init__(self):
        self.texts: list[str] = []  # by index
        self._index: dict[tuple[int, str], int] = {}

    def __call__(self, token_id: int, text: str) -> int:
        if (token_id, text) not in self._index:
            self._index[token_id, text] = len(self.texts)
            self.texts.append(text)
        return self._index[token_id, text]


def conflict_view(
    configurations: list[Configuration], steps: list[int], *, size: int
) -> dict[str, Any]:
    """Returns the data for one run of each configuration; {} if no completions were recorded.

    `steps` are shown beside the chosen ones. `size` is roughly the number of characters that the
    data may have as JSON.
    """
    shown = [
        (configuration.runs[0], configuration.label)
        for configuration in configurations
        if configuration.runs[0].completions.groups
    ][:MAX_RUNS]
    if not shown:
        return {}
    table = TokenTable()
    runs = [_run_view(run, label, steps, table, size // len(shown)) for run, label in shown]
    return {"runs": runs, "tokens": table.texts}


def choose_steps(run: RunRecord, wanted: list[int]) -> dict[int, str]:
    """Returns the steps to show, in order, each with the reason as text.

    They are the first, the middle and the last step, the two with most conflict tokens, that of the
    first alarm, and the `wanted` ones. Raises RecipeError if a wanted step was not recorded.
    """
    log = run.completions
    tokens: dict[int, int] = {}
    conflicts: dict[int, int] = {}
    for group in log.groups:
        tokens[group.step] = tokens.get(group.step, 0) + group.tokens
        conflicts[group.step] = conflicts.get(group.step, 0) + group.conflicts
    for step in wanted:
        if step not in tokens:
            raise RecipeError(
                "--steps",
                f"{step} is not in {log.file}, which has steps {min(tokens)} to {max(tokens)}",
            )
    share = {step: conflicts[step] / tokens[step] if tokens[step] else 0.0 for step in tokens}
    with_tokens = sorted(step for step in tokens if tokens[step]) or sorted(tokens)
    first, middle, last = with_tokens[0], with_tokens[len(with_tokens) // 2], with_tokens[-1]
    if len(with_tokens) == 1:
        reasons = {first: "the only one"}
    else:
        reasons = {first: "first", middle: "middle", last: "last"}
    for step in sorted(with_tokens, key=lambda step: -share[step])[:2]:
        reasons[step] = f"{reasons[step]}, many conflicts" if step in reasons else "many conflicts"
    if run.alarms:
        until_alarm = [step for step in with_tokens if step <= run.alarms[0].step]
        if until_alarm:
            reasons.setdefault(until_alarm[-1], "first alarm")
    for step in wanted:
        reasons.setdefault(step, "requested")
    return {
        step: f"{reasons[step]}, {share[step]:.0%} in conflict" if tokens[step] else reasons[step]
        for step in sorted(reasons)
    }


def _run_view(
    run: RunRecord, label: str, wanted: list[int], table: TokenTable, size: int
) -> dict[str, Any]:
    """The chosen steps with as many groups as fit, the most instructive ones first."""
    reasons = choose_steps(run, wanted)
    groups_of_step = {step: _most_instructive_first(run, step) for step in reasons}
    shown: dict[int, list[dict]] = {step: [] for step in reasons}
    weight = run.number("gtpo_runtime.w_raw", 2.0)
    # The first group of every step comes before the second of any, so that no step is left empty.
    for place in range(MAX_GROUPS):
        for step, groups in groups_of_step.items():
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
            {"step": step, "why": why, "groups": shown[step], "of": len(groups_of_step[step])}
            for step, why in reasons.items()
            if shown[step]
        ],
    }


def _most_instructive_first(run: RunRecord, step: int) -> list[RecordedGroup]:
    """The groups of a step, first those with many conflict tokens and many other tokens.

    They show best where a run of conflict tokens ends.
    """

    def share_of_both(group: RecordedGroup) -> float:
        others = group.tokens - group.conflicts
        return group.conflicts * others / max(1, group.tokens) ** 2

    groups = [group for group in run.completions.groups if group.step == step]
    return sorted(groups, key=lambda group: -share_of_both(group))


def _group_view(
    completions: list[RecordedCompletion], table: TokenTable, weight: float
) -> dict[str, Any]:
    first = completions[0]
    end = max(MIN_END, MAX_GROUP_TOKENS // (2 * len(completions)))
    return {
        "group": first.group,
        "prompt": _messages(first.prompt),
        "reference": None if first.answer is None else _shortened(str(first.answer)),
        "rows": [_row_view(completion, table, weight, end) for completion in completions],
    }


def _row_view(
    completion: RecordedCompletion, table: TokenTable, weight: float, end: int
) -> dict[str, Any]:
    """A completion with at most `end` tokens at either end.

    `head` is the number of shown tokens before the gap. `weights` are [weight, count] over all
    tokens. Entropies are in thousandths of a nat.
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
        return row | {"text": _shortened(completion.completion)}
    length = len(completion.ids)
    head = end if length > 2 * end else length
    shown = [*range(head), *range(max(head, length - end), length)]
    entropies = completion.entropies
    return row | {
        "length": length,
        "head": head,
        "tokens": [table(completion.ids[i], completion.tokens[i]) for i in shown],
        "weights": _run_lengths(completion.token_weights(weight)),
        "entropies": entropies and [_thousandths(entropies[i]) for i in shown],
    }


def _thousandths(value: float | None) -> int | None:
    return None if value is None else round(1000 * value)


def _run_lengths(values: list[float]) -> list[list[float]]:
    """Runs of equal values as [value, count]."""
    lengths: list[list[float]] = []
    for value in (round(value, 4) for value in values):
        if lengths and lengths[-1][0] == value:
            lengths[-1][1] += 1
        else:
            lengths.append([value, 1])
    return lengths


def _messages(prompt: Any) -> list[list[str]]:
    """The prompt as [role, text] per message; a prompt without messages has the role "prompt"."""
    if prompt is None:
        return []
    if not isinstance(prompt, list):
        return [["prompt", _shortened(str(prompt))]]
    messages = [message for message in prompt if isinstance(message, dict)]
    return [
        [str(message.get("role", "")), _shortened(_text(message.get("content")))]
        for message in messages
    ]


def _text(content: Any) -> str:
    if content is None:
        return ""
    return content if isinstance(content, str) else json.dumps(content, ensure_ascii=False)


def _shortened(text: str) -> str:
    if len(text) <= MAX_TEXT:
        return text
    start, end = text[: MAX_TEXT // 2], text[-MAX_TEXT // 2 :]
    return f"{start}\n... {len(text) - MAX_TEXT:,} characters not shown ...\n{end}"
