"""What a reward function says of a rollout, where some of its completions make it fail.

A call that fails is made again for smaller parts: for each group, and in a group that fails for
each completion by itself, to find those it fails on. The others of the group are then judged
together, so that a function that compares the completions of a group gives the rewards that it
would give without the offenders. A function that fails on every completion by itself, but not on
whole groups, loses the failing group alone.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

LARGEST = 1e16  # float32 still holds the squares of these, summed over a rollout

Rows = Sequence[int]  # places in the rollout


class ContractBroken(Exception):
    """A clause that says what a function returned in place of one number or None per completion."""


@dataclass
class Verdict:
    """Of `count` completions: their rewards, None where it cannot judge; and why, where that is
    because it failed.
    """

    count: int
    rewards: list[float | None] = field(init=False)
    failures: dict[int, dict] = field(default_factory=dict)  # by row
    # calls that failed and were made again in parts
    retried: list[tuple[Rows, dict]] = field(default_factory=list)
    calls: list[tuple[Rows, dict]] = field(default_factory=list)  # those that did not fail
    abandoned: bool = False  # there were too many failures to go on

    def __post_init__(self):
        self.rewards = [None] * self.count

    @property
    def nothing_judged(self) -> bool:
        """Whether it failed on everything it was asked about."""
        return not self.calls or len(self.failures) == self.count

    def metrics(self) -> dict[str, float]:
        """What it logged, averaged over completions; NaN counts as nothing, and is what is left of
        nothing.
        """
        values: dict[str, list[tuple[float, int]]] = {}
        for rows, reply in self.calls:
            for name, value in reply["metrics"]:
                values.setdefault(name, []).append((value, len(rows)))
        return {
            name: _mean([pair for pair in pairs if not math.isnan(pair[0])])
            for name, pairs in values.items()
        }

    def columns(self) -> dict[str, list]:
        """The extra columns it logged, with None for completions of which it said nothing."""
        columns: dict[str, list] = {}
        for rows, reply in self.calls:
            for name, values in reply["columns"]:
                column = columns.setdefault(name, [None] * self.count)
                for row, value in zip(rows, values):
                    column[row] = value
        return columns


def _mean(pairs: list[tuple[float, int]]) -> float:
    if len(pairs) < 2:
        return pairs[0][0] if pairs else math.nan
    return math.fsum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


class Settling:
    """Makes the calls that a verdict takes.

    `ask` is one call, about some rows; `map` makes several, in order. `give_up` says of a number of
    failures whether it is too many to go on.
    """

    def __init__(
        self,
        groups: list[Rows],
        ask: Callable[[Rows], dict],
        map: Callable[[Callable, Iterable], list],
        give_up: Callable[[int], bool],
    ):
        self.groups, self._ask, self.map, self.give_up = groups, ask, map, give_up
        self.lost = 0  # completions that it failed on so far, also those of calls under way

    def verdict(self, per: str) -> Verdict:
        """Of the rollout, called `per` rollout, group or completion. Raises ContractBroken."""
        rows = [row for group in self.groups for row in group]
        pieces = {"rollout": [rows], "group": self.groups, "completion": [[row] for row in rows]}[
            per
        ]
        verdict = Verdict(len(rows))
        for piece, reply in zip(pieces, self.ask(pieces), strict=True):
            if "bug" in reply:
                raise ContractBroken(reply["bug"])
            self.take(verdict, piece, reply)
        if self.give_up(len(verdict.failures)):
            verdict.abandoned, verdict.rewards = True, [None] * len(rows)
        return verdict

    def take(self, verdict: Verdict, rows: Rows, reply: dict) -> None:
        if "rewards" in reply:
            accept(verdict, rows, reply)
        elif "unasked" in reply:
            return
        elif len(rows) == 1:
            verdict.failures[rows[0]] = reply
        else:
            verdict.retried.append((rows, reply))
            parts = [
                part for group in self.groups if (part := [row for row in group if row in rows])
            ]
            if len(parts) > 1:
                for part, reply in zip(parts, self.ask(parts), strict=True):
                    self.take(verdict, part, reply)
            else:
                self.without_offenders(verdict, rows)

    def without_offenders(self, verdict: Verdict, rows: Rows) -> None:
        alone = dict(zip(rows, self.ask([[row] for row in rows]), strict=True))
        offenders = {row: reply for row, reply in alone.items() if "failure" in reply}
        verdict.failures |= offenders
        if rest := [row for row in rows if row not in offenders]:
            (reply,) = self.ask([rest])
            if "rewards" in reply:
                accept(verdict, rest, reply)
            elif "failure" in reply:
                verdict.failures |= dict.fromkeys(rest, reply)

    def ask(self, pieces: list[Rows]) -> list[dict]:
        return self.map(self.ask_one, pieces)

    def ask_one(self, rows: Rows) -> dict:
        if self.give_up(self.lost):
            return {"unasked": True}  # its rollout will be abandoned
        reply = self._ask(rows)
        reply = {**reply, "failure": reply["bug"], "traceback": ""} if "bug" in reply else reply
        self.lost += len(rows) == 1 and "failure" in reply
        return reply


def accept(verdict: Verdict, rows: Rows, reply: dict) -> None:
    verdict.calls.append((rows, reply))
    for row, reward in zip(rows, reply["rewards"], strict=True):
        if reward is None or abs(reward) <= LARGEST:
            verdict.rewards[row] = reward
        else:  # NaN, too
            verdict.failures[row] = {"failure": f"returned {reward}", "traceback": ""}
