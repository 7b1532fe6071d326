"""What happens where a reward function fails: calls are made again, failures are kept and counted.

A reward call that fails is made again for smaller parts: for each group, and in a group that fails
for each completion by itself. This finds the completions that the function fails on. The others of
the group are then scored together. So a function that compares the completions of a group gives the
rewards that it would give without the failing ones. Where a function fails on every completion by
itself, but not on whole groups, only the failing group is not scored.
"""

import json
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from gtpo.rewards.worker import ContractBroken
from gtpo.system.safe_text import without_secrets

logger = logging.getLogger(__name__)

LARGEST = 1e16  # float32 still holds the squares of such rewards, summed over a rollout
WINDOW = 100  # completions over which failures are counted; a larger rollout is one window

Rows = Sequence[int]  # places in the rollout


@dataclass
class RolloutRewards:
    """What one reward function returned for the `count` completions of a rollout."""

    count: int
    rewards: list[float | None] = field(init=False)  # None where a completion is not scored
    failures: dict[int, dict] = field(default_factory=dict)  # by row: the reply with the failure
    # calls that failed and were made again in parts
    retried: list[tuple[Rows, dict]] = field(default_factory=list)
    calls: list[tuple[Rows, dict]] = field(default_factory=list)  # calls that did not fail
    abandoned: bool = False  # there were too many failures to go on

    def __post_init__(self):
        self.rewards = [None] * self.count

    def accept(self, rows: Rows, reply: dict) -> None:
        """Take the rewards of a call on `rows`. NaN, infinity and huge ones are failures."""
        self.calls.append((rows, reply))
        for row, reward in zip(rows, reply["rewards"], strict=True):
            if reward is None or abs(reward) <= LARGEST:
                self.rewards[row] = reward
            else:  # NaN, too
                self.failures[row] = {"failure": f"returned {reward}", "traceback": ""}

    @property
    def failed_on_everything(self) -> bool:
        """Whether the function failed on every completion that it was called on."""
        return not self.calls or len(self.failures) == self.count

    def metrics(self) -> dict[str, float]:
        """The metrics that the function logged, averaged over completions.

        NaN is left out of an average. A metric of which nothing else is left is NaN.
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
        """The columns that the function logged, with None for completions without a value."""
        columns: dict[str, list] = {}
        for rows, reply in self.calls:
            for name, values in reply["columns"]:
                column = columns.setdefault(name, [None] * self.count)
                for row, value in zip(rows, values, strict=False):
                    column[row] = value
        return columns


def _mean(pairs: list[tuple[float, int]]) -> float:
    if len(pairs) < 2:
        return pairs[0][0] if pairs else math.nan
    return math.fsum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


class RewardCalls:
    """Makes the calls of one reward function that a rollout takes.

    `groups` are the rows of each group. `call` makes one reward call on some rows; `map` makes
    several calls, in order. `too_many` says whether a number of failures is too many to go on.
    """

    def __init__(
        self,
        groups: list[Rows],
        call: Callable[[Rows], dict],
        map: Callable[[Callable, Iterable], list],
        too_many: Callable[[int], bool],
    ):
        self.groups, self._call, self._map, self.too_many = groups, call, map, too_many
        self.failed = 0  # completions that it failed on so far, also in calls under way

    def score(self, per: str) -> RolloutRewards:
        """The rewards of the rollout, with a call per rollout, group or completion.

        Raises ContractBroken.
        """
        rows = [row for group in self.groups for row in group]
        parts = {"rollout": [rows], "group": self.groups, "completion": [[row] for row in rows]}
        scored = RolloutRewards(len(rows))
        for part, reply in zip(parts[per], self._call_each(parts[per]), strict=True):
            if "bug" in reply:
                raise ContractBroken(reply["bug"])
            self._take(scored, part, reply)
        if self.too_many(len(scored.failures)):
            scored.abandoned, scored.rewards = True, [None] * len(rows)
        return scored

    def _take(self, scored: RolloutRewards, rows: Rows, reply: dict) -> None:
        """Put a reply on `rows` into `scored`, after more calls where it is a failure."""
        if "rewards" in reply:
            scored.accept(rows, reply)
        elif "not_called" in reply:
            return
        elif len(rows) == 1:
            scored.failures[rows[0]] = reply
        else:
            scored.retried.append((rows, reply))
            parts = [[row for row in group if row in rows] for group in self.groups]
            parts = [part for part in parts if part]
            if len(parts) == 1:
                self._score_without_failing(scored, rows)
                return
            for part, reply in zip(parts, self._call_each(parts), strict=True):
                self._take(scored, part, reply)

    def _score_without_failing(self, scored: RolloutRewards, rows: Rows) -> None:
        """Find the rows of a group that the function fails on, and score the others together."""
        alone = dict(zip(rows, self._call_each([[row] for row in rows]), strict=True))
        failing = {row: reply for row, reply in alone.items() if "failure" in reply}
        scored.failures |= failing
        if rest := [row for row in rows if row not in failing]:
            (reply,) = self._call_each([rest])
            if "rewards" in reply:
                scored.accept(rest, reply)
            elif "failure" in reply:
                scored.failures |= dict.fromkeys(rest, reply)

    def _call_each(self, parts: list[Rows]) -> list[dict]:
        return self._map(self._call_one, parts)

    def _call_one(self, rows: Rows) -> dict:
        if self.too_many(self.failed):
            return {"not_called": True}  # nothing of this rollout will count
        reply = self._call(rows)
        if "bug" in reply:
            reply = {**reply, "failure": reply["bug"], "traceback": ""}
        self.failed += len(rows) == 1 and "failure" in reply
        return reply


class Failures:
    """Keeps the failures of a run in `file` and counts them.

    `too_many` says when more than `share` of the last WINDOW completions had a failure. `total`
    counts completions of all processes. The file has a line for each of them, and a line for each
    call that failed and was made again in parts.
    """

    def __init__(self, file: Path, share: float):
        self.file, self.share = file, share
        self.total = 0
        # [failures, completions] of the last rollouts, of all processes
        self.recent: list[list[int]] = []
        self.last = ""

    def keep(self, function: str, scored: RolloutRewards, arguments: dict, step: int) -> None:
        """Append and log what `function` failed on, with the `arguments` of these completions."""
        columns = {
            name: values
            for name, values in arguments.items()
            if name != "completion_ids" and isinstance(values, list) and len(values) == scored.count
        }

        def entry(rows: Rows, reply: dict, retried: bool) -> dict:
            return {
                "step": step,
                "function": function,
                "failure": reply["failure"],
                "retried": retried,
                "rows": list(rows),
                "traceback": reply["traceback"],
            }

        lines = [entry(rows, reply, True) for rows, reply in scored.retried]
        for row, reply in sorted(scored.failures.items()):
            line = entry([row], reply, False)
            for name, column in columns.items():
                line[f"column_{name}" if name in line else name] = column[row]
            lines.append(line)
        if lines:
            with self.file.open("a", encoding="utf-8") as file:
                for line in lines:
                    text = json.dumps(line, ensure_ascii=False, default=repr)
                    file.write(without_secrets(text) + "\n")
        if scored.failures:
            self.last = f"{function} {lines[-1]['failure']}"
            logger.warning(
                "[GTPO] Step %d: %d of %d completions are not scored, %s (%s)",
                step,
                len(scored.failures),
                scored.count,
                self.last,
                self.file.name,
            )

    def count(self, failures: int, completions: int) -> None:
        """Take a rollout of all processes into account."""
        self.total += failures
        self.recent = [*self.recent, [failures, completions]][-WINDOW:]

    def state(self) -> dict:
        """What a checkpoint keeps for `restore`."""
        return {
            "total": self.total,
            "recent": self.recent,
            "bytes": self.file.stat().st_size if self.file.is_file() else 0,
        }

    def restore(self, state: dict, *, cut: bool) -> None:
        """Go on from an earlier `state`; `cut` removes from the file what was written after it."""
        self.total, self.recent = state["total"], state["recent"]
        if cut and self.file.is_file() and self.file.stat().st_size > state["bytes"]:
            os.truncate(self.file, state["bytes"])

    def too_many(self, failures: int = 0, completions: int = 0) -> bool:
        """Whether there are too many failures, with those of a rollout under way.

        At the start of a run, completions that are still missing from the window count as scored.
        """
        failures, completions = self.window(failures, completions)
        return failures > self.share * max(WINDOW, completions)

    def window(self, failures: int = 0, completions: int = 0) -> tuple[int, int]:
        """Failures and completions of the last rollouts that make a WINDOW, as far as there are."""
        for before in reversed(self.recent):
            if completions >= WINDOW:
                break
            failures, completions = failures + before[0], completions + before[1]
        return failures, completions
