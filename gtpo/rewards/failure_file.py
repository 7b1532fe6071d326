"""The completions that reward functions failed on: kept in a file, and counted, so that a run ends
once they are too many.
"""

import json
import logging
import os
from pathlib import Path

from gtpo.rewards.failures import Verdict
from gtpo.system.safe_text import without_secrets

logger = logging.getLogger(__name__)

WINDOW = 100  # completions over which failures are counted; a larger rollout is one window


class Failures:
    """Appends failures to `file`; says when more than `share` of the last WINDOW completions had
    one.

    `total` counts completions of all processes. The file has a line for each of them, and one for
    each call that failed and was made again in parts.
    """

    def __init__(self, file: Path, share: float):
        self.file, self.share = file, share
        self.total = 0
        # [failures, completions] of the last rollouts, of all processes
        self.recent: list[list[int]] = []
        self.last = ""

    def keep(self, function: str, verdict: Verdict, handed: dict, step: int) -> None:
        """Append what `function` failed on, with what it was `handed`, and say so."""
        columns = {
            name: values
            for name, values in handed.items()
            if name != "completion_ids"
            and isinstance(values, list)
            and len(values) == verdict.count
        }
        lines = [
            {
                "step": step,
                "function": function,
                "failure": reply["failure"],
                "retried": True,
                "rows": list(rows),
                "traceback": reply["traceback"],
            }
            for rows, reply in verdict.retried
        ]
        lines += [
            {
                "step": step,
                "function": function,
                "failure": reply["failure"],
                "retried": False,
                "rows": [row],
                "traceback": reply["traceback"],
                **{name: values[row] for name, values in columns.items()},
            }
            for row, reply in sorted(verdict.failures.items())
        ]
        if lines:
            with self.file.open("a", encoding="utf-8") as file:
                for line in lines:
                    file.write(
                        without_secrets(json.dumps(line, ensure_ascii=False, default=repr)) + "\n"
                    )
        if verdict.failures:
            self.last = f"{function} {lines[-1]['failure']}"
            logger.warning(
                "[GTPO] Step %d: %d of %d completions cannot be judged, %s (%s)",
                step,
                len(verdict.failures),
                verdict.count,
                self.last,
                self.file.name,
            )

    def count(self, failures: int, completions: int) -> None:
        """Take a rollout of all processes into account."""
        self.total += failures
        self.recent = [*self.recent, [failures, completions]][-WINDOW:]

    def state(self) -> dict:
        return {
            "total": self.total,
            "recent": self.recent,
            "bytes": self.file.stat().st_size if self.file.is_file() else 0,
        }

    def restore(self, state: dict, *, cut: bool) -> None:
        """Go on from an earlier `state`, at the step that had it; `cut` takes out of the file what
        came after.
        """
        self.total, self.recent = state["total"], state["recent"]
        if cut and self.file.is_file() and self.file.stat().st_size > state["bytes"]:
            os.truncate(self.file, state["bytes"])

    def too_many(self, failures: int = 0, completions: int = 0) -> bool:
        """Whether they are, with those of a rollout under way. Completions that there were not yet
        count as judged.
        """
        failures, completions = self.window(failures, completions)
        return failures > self.share * max(WINDOW, completions)

    def window(self, failures: int = 0, completions: int = 0) -> tuple[int, int]:
        """Failures among the last completions, at least WINDOW of them as far as there are."""
        for before in reversed(self.recent):
            if completions >= WINDOW:
                break
            failures, completions = failures + before[0], completions + before[1]
        return failures, completions
