"""A run's completions file, read: averages per step, the texts that were protected, and single
groups on demand.

The file is read once, line by line, and only places are kept, so that it may be larger than memory.
Lines that are no completion (a last one cut by a crash, for instance) are left out and counted.
"""

import itertools
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError, model_validator

from gtpo.answers import format_score
from gtpo.hooks.completion_line import CompletionLine

PIECES = re.compile(r"(?:<[/|]?[\w-]+\|?>\s*)+|[^<\n]+\n*|<|\n+")  # tags in a row, else lines


class Completion(CompletionLine):
    """A line as a report uses it; lists per token that do not fit together count as not
    recorded.
    """

    @model_validator(mode="after")
    def lists_belong_together(self):
        if self.ids is None or self.tokens is None or len(self.ids) != len(self.tokens):
            self.ids = self.tokens = None
        for name in ("weights", "entropies"):
            values = getattr(self, name)
            if values is not None and (self.ids is None or len(values) != len(self.ids)):
                setattr(self, name, None)
        if self.ids is not None:
            self.prefix, self.suffix = (
                max(0, min(run, len(self.ids))) for run in (self.prefix, self.suffix)
            )
        return self

    @property
    def conflicts(self) -> int:
        """How many tokens are in the prefix run or the suffix run; needs the ids."""
        return min(len(self.ids), self.prefix + self.suffix)

    def token_weights(self, weight: float = 2.0) -> list[float]:
        """lambda per token; where the trainer has none, what GTPO's would be, with `weight` in
        better completions.
        """
        if self.weights is not None:
            return [1.0 if value is None else value for value in self.weights]
        weights, sign = [1.0] * len(self.ids), self.advantage or 0.0
        if sign:
            on_conflict = weight if sign > 0 else 0.0
            weights[: self.prefix] = [on_conflict] * self.prefix
            weights[len(weights) - self.suffix :] = [on_conflict] * self.suffix
        return weights


@dataclass
class StepTotals:
    """Sums over the completions of one step; every list is (sum, count)."""

    sums: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0]))

    def add(self, name: str, value: float | None, count: int = 1) -> None:
        if value is not None and count:
            total = self.sums[name]
            total[0], total[1] = total[0] + value, total[1] + count

    def averages(self) -> dict[str, float]:
        return {name: total / count for name, (total, count) in self.sums.items()}


@dataclass
class Group:
    """Where the lines of one group lie in the file."""

    step: int
    places: list[tuple[int, int]] = field(default_factory=list)  # offset, length
    conflicts: int = 0  # tokens in conflict
    tokens: int = 0


class CompletionLog:
    """What a completions file says; an absent file says nothing."""

    def __init__(self, file: Path):
        self.file = file
        self.totals: dict[int, StepTotals] = {}
        self.groups: list[Group] = []
        self.completions = self.unreadable = self.weighted = 0
        self.protected_tokens = self.amplified_tokens = self.protected_completions = 0
        self.worse = 0  # completions with a negative advantage whose tokens were recorded
        self.pieces: Counter[str] = Counter()  # protected text -> in how many completions
        if file.is_file():
            self._read()

    @property
    def steps(self) -> list[int]:
        return sorted(self.totals)

    def averages(self) -> dict[int, dict[str, float]]:
        """Per step, the metrics that a trainer would log, by the names it would log them under."""
        return {step: self.totals[step].averages() for step in self.steps}

    def read(self, group: Group) -> list[Completion]:
        """The completions of one group, in the order of their rows."""
        with self.file.open("rb") as file:
            lines = []
            for offset, length in group.places:
                file.seek(offset)
                lines.append(file.read(length))
        return sorted(
            (Completion.model_validate_json(line) for line in lines),
            key=lambda completion: completion.row,
        )

    def _read(self) -> None:
        groups: dict[tuple[int, int, int], Group] = {}
        part, last, offset = 0, 0, 0
        with self.file.open("rb") as file:
            for line in file:
                place, offset = (offset, len(line)), offset + len(line)
                if not line.strip():
                    continue
                try:
                    completion = Completion.model_validate_json(line)
                except ValidationError:
                    self.unreadable += 1
                    continue
                rollout = completion.step if completion.rollout is None else completion.rollout
                # the run was resumed: what it did again replaces what it did before
                if rollout < last:
                    part += 1
                    groups = {
                        key: group for key, group in groups.items() if group.step < completion.step
                    }
                    self.totals = {
                        step: totals
                        for step, totals in self.totals.items()
                        if step < completion.step
                    }
                last = rollout
                group = groups.setdefault((part, rollout, completion.group), Group(completion.step))
                group.step = min(group.step, completion.step)
                group.places.append(place)
                self._count(completion, group)
        self.groups = list(groups.values())

    def _count(self, completion: Completion, group: Group) -> None:
        totals = self.totals.setdefault(completion.step, StepTotals())
        self.completions += 1
        totals.add("reward", completion.reward)
        totals.add("reward/format_rate", float(format_score(completion.completion) == 10))
        totals.add("gtpo/completion_entropy", completion.entropy)
        totals.add(
            "gtpo/frac_filtered", None if completion.kept is None else float(not completion.kept)
        )
        totals.add("completions/clipped_ratio", float(completion.truncated))
        if completion.ids is None:
            return
        count = len(completion.ids)
        totals.add("completions/mean_length", count)
        totals.add("gtpo/frac_conflict_tokens", completion.conflicts, count)
        group.conflicts, group.tokens = group.conflicts + completion.conflicts, group.tokens + count
        self.weighted += completion.weights is not None
        self.worse += (completion.advantage or 0.0) < 0
        if completion.conflicts or completion.weights is not None:
            self._count_weights(completion)

    def _count_weights(self, completion: Completion) -> None:
        weights = completion.token_weights()
        self.amplified_tokens += sum(weight > 1 for weight in weights)
        protected = weights.count(0.0)
        if protected:
            self.protected_tokens += protected
            self.protected_completions += 1
            pieces = (
                piece[:200]
                for text in protected_texts(completion, weights)
                for piece in PIECES.findall(text)
            )
            self.pieces.update(list(dict.fromkeys(pieces)))  # each once, in their order


def protected_texts(completion: Completion, weights: list[float]) -> list[str]:
    """The texts of the unbroken stretches of tokens with weight 0."""
    stretches = itertools.groupby(
        zip(weights, completion.tokens, strict=True), key=lambda pair: pair[0] == 0
    )
    return ["".join(token for _, token in stretch) for protected, stretch in stretches if protected]
