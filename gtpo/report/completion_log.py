"""A run's completions.jsonl: averages per step, the texts that were protected, groups on demand.

The file is read once, line by line. Only the places of lines are kept, so the file may be larger
than memory. Lines that are not a completion, such as one that a crash cut off, are left out and
counted.
"""

import itertools
import re
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError, model_validator

from gtpo.answers import format_score
from gtpo.hooks.completion_line import CompletionLine

PIECES = re.compile(r"(?:<[/|]?[\w-]+\|?>\s*)+|[^<\n]+\n*|<|\n+")  # consecutive tags, or one line
MAX_PIECE = 200  # characters


class RecordedCompletion(CompletionLine):
    """A line as a report uses it. Per-token lists of different lengths count as not recorded."""

    @model_validator(mode="after")
    def _drop_lists_that_do_not_fit(self):
        if self.ids is None or self.tokens is None or len(self.ids) != len(self.tokens):
            self.ids = self.tokens = None
        for name in ("weights", "entropies"):
            values = getattr(self, name)
            if values is not None and (self.ids is None or len(values) != len(self.ids)):
                setattr(self, name, None)
        if self.ids is not None:
            self.prefix = max(0, min(self.prefix, len(self.ids)))
            self.suffix = max(0, min(self.suffix, len(self.ids)))
        return self

    @property
    def conflicts(self) -> int:
        """The number of conflict tokens, those in the prefix run or the suffix run; needs ids."""
        return min(len(self.ids), self.prefix + self.suffix)

    def token_weights(self, weight: float = 2.0) -> list[float]:
        """Returns lambda per token, as recorded.

        For a trainer without token weights it is the lambda that GTPO would have used. `weight` is
        that of conflict tokens with a positive advantage.
        """
        if self.weights is not None:
            return [1.0 if value is None else value for value in self.weights]
        weights, advantage = [1.0] * len(self.ids), self.advantage or 0.0
        if advantage:
            on_conflict = weight if advantage > 0 else 0.0
            weights[: self.prefix] = [on_conflict] * self.prefix
            weights[len(weights) - self.suffix :] = [on_conflict] * self.suffix
        return weights


@dataclass
class StepTotals:
    """The sum and the number of values of each metric, over the completions of one step."""

    totals: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0]))

    def add(self, name: str, value: float | None, count: int = 1) -> None:
        """Adds a value, or the sum of `count` values; None adds nothing."""
        if value is not None and count:
            total = self.totals[name]
            total[0], total[1] = total[0] + value, total[1] + count

    def averages(self) -> dict[str, float]:
        """Returns the mean of each metric."""
        return {name: total / count for name, (total, count) in self.totals.items()}


@dataclass
class RecordedGroup:
    """The places of a group's lines in the file, and its numbers of tokens."""

    step: int
    places: list[tuple[int, int]] = field(default_factory=list)  # offset and length, bytes
    conflicts: int = 0  # conflict tokens
    tokens: int = 0


class CompletionLog:
    """The content of a completions file; a file that does not exist has none."""

    def __init__(self, file: Path):
        self.file = file
        self.totals: dict[int, StepTotals] = {}  # by step
        self.groups: list[RecordedGroup] = []
        self.completions = 0
        self.unreadable = 0  # lines
        self.with_weights = 0  # completions with recorded token weights
        self.protected_tokens = self.amplified_tokens = self.protected_completions = 0
        self.worse = 0  # completions with tokens and a negative advantage
        self.protected_pieces: Counter[str] = Counter()  # text -> completions that have it
        if file.is_file():
            self._read_lines()

    @property
    def steps(self) -> list[int]:
        """The steps with completions, in order."""
        return sorted(self.totals)

    def averages(self) -> dict[int, dict[str, float]]:
        """Returns, by step, the metrics that a trainer would log, under the same names."""
        return {step: self.totals[step].averages() for step in self.steps}

    def read(self, group: RecordedGroup) -> list[RecordedCompletion]:
        """Returns the completions of a group in the order of their rows."""
        completions = []
        with self.file.open("rb") as file:
            for offset, length in group.places:
                file.seek(offset)
                completions.append(RecordedCompletion.model_validate_json(file.read(length)))
        return sorted(completions, key=lambda completion: completion.row)

    def _read_lines(self) -> None:
        groups: dict[tuple[int, int, int], RecordedGroup] = {}  # (part, rollout, group)
        part, last_rollout, offset = 0, 0, 0  # a resumed run writes the next part of the file
        with self.file.open("rb") as file:
            for line in file:
                place, offset = (offset, len(line)), offset + len(line)
                if not line.strip():
                    continue
                try:
                    completion = RecordedCompletion.model_validate_json(line)
                except ValidationError:
                    self.unreadable += 1
                    continue
                step = completion.step
                rollout = step if completion.rollout is None else completion.rollout
                if rollout < last_rollout:
                    # The run was resumed. What it repeats replaces what it did before.
                    part += 1
                    groups = {key: group for key, group in groups.items() if group.step < step}
                    self.totals = {
                        earlier: totals for earlier, totals in self.totals.items() if earlier < step
                    }
                last_rollout = rollout
                group = groups.setdefault((part, rollout, completion.group), RecordedGroup(step))
                group.step = min(group.step, step)
                group.places.append(place)
                self._count(completion, group)
        self.groups = list(groups.values())

    def _count(self, completion: RecordedCompletion, group: RecordedGroup) -> None:
        filtered = None if completion.kept is None else float(not completion.kept)
        totals = self.totals.setdefault(completion.step, StepTotals())
        self.completions += 1
        totals.add("reward", completion.reward)
        text = completion.prompt_opening + completion.completion
        totals.add("reward/format_rate", float(format_score(text) == 10))
        totals.add("gtpo/completion_entropy", completion.entropy)
        totals.add("gtpo/frac_filtered", filtered)
        totals.add("completions/clipped_ratio", float(completion.truncated))
        if completion.ids is None:
            return
        length = len(completion.ids)
        totals.add("completions/mean_length", length)
        totals.add("gtpo/frac_conflict_tokens", completion.conflicts, length)
        group.conflicts += completion.conflicts
        group.tokens += length
        self.with_weights += completion.weights is not None
        self.worse += (completion.advantage or 0.0) < 0
        if completion.conflicts or completion.weights is not None:
            self._count_weights(completion)

    def _count_weights(self, completion: RecordedCompletion) -> None:
        weights = completion.token_weights()
        self.amplified_tokens += sum(weight > 1 for weight in weights)
        protected = weights.count(0.0)
        if not protected:
            return
        self.protected_tokens += protected
        self.protected_completions += 1
        pieces = [
            piece[:MAX_PIECE]
            for text in _protected_texts(completion, weights)
            for piece in PIECES.findall(text)
        ]
        # Each piece counts once per completion; dict.fromkeys keeps their order.
        self.protected_pieces.update(list(dict.fromkeys(pieces)))


def _protected_texts(completion: RecordedCompletion, weights: list[float]) -> list[str]:
    """The text of each unbroken run of tokens with weight 0."""
    pairs = zip(weights, completion.tokens, strict=True)
    runs = itertools.groupby(pairs, key=lambda pair: pair[0] == 0)
    return ["".join(token for _, token in run) for protected, run in runs if protected]
