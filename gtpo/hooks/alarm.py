"""The collapse alarm: says with its evidence that a run goes wrong, and by recipe saves a
checkpoint or stops the run.

Metrics are averaged over the last `window` log lines, so that noise raises no alarm. A condition is
told once, and again only after two windows without it. Metrics that a trainer does not log raise no
alarm.
"""

import logging
import math
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

logger = logging.getLogger(__name__)

METRICS = (
    "loss",
    "grad_norm",
    "gtpo/skipped_steps",
    "gtpo/initial_entropy",
    "gtpo/frac_filtered",
    "reward/format_rate",
    "frac_reward_zero_std",
    "completions/clipped_ratio",
)


class Alarm(TrainerCallback, ExportableState):
    """Watches the logs of any GRPO trainer; `limits` are the thresholds of the recipe's section
    `alarm`, None for never.

    Each event becomes the metric `alarm/<condition>` of its log line, also for trackers whose
    callback comes later. `stopped_by` is the sentence of the first alarm that stopped the run.
    """

    def __init__(self, *, action: str, window: int, limits: dict[str, float | None]):
        self.action, self.window, self.limits = action, window, limits
        self.lines: list[dict[str, float | None]] = []  # the last two windows
        # nats; of a trainer that does not measure it, the first window's
        self.initial_entropy: float | None = None
        self.best_format: float | None = None  # the best window's format rate
        # conditions that were reported -> log lines since they last held
        self.reported: dict[str, int] = {}
        self.stopped_by: str | None = None

    def state(self) -> dict:
        """What transformers saves in trainer_state.json, under the name of this class.

        Checkpoints hold that name and these keys, so both stay as they are.
        """
        return {
            "args": {"action": self.action, "window": self.window, "limits": self.limits},
            "attributes": {
                "lines": self.lines,
                "initial_entropy": self.initial_entropy,
                "best_format": self.best_format,
                "told": self.reported,
            },
        }

    @classmethod
    def from_state(cls, state: dict) -> "Alarm":
        """The alarm that transformers 5.17.0 makes from what `state` returned."""
        alarm = cls(**state["args"])
        alarm.restore(state["attributes"])
        return alarm

    def restore(self, attributes: dict) -> None:
        """Takes over the attributes that `state` returned."""
        self.lines = attributes["lines"]
        self.initial_entropy = attributes["initial_entropy"]
        self.best_format = attributes["best_format"]
        self.reported = attributes["told"]

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" not in (logs or {}):  # an evaluation, or the summary at the end
            return
        for condition, evidence in self.see(logs).items():
            sentence = f"Alarm at step {state.global_step}: {evidence}"
            logger.warning("[GTPO] %s", sentence)
            # the trackers' copy, and the one that is kept
            for record in (logs, state.log_history[-1]):
                record[f"alarm/{condition}"] = 1.0
            if self.action in ("save", "stop"):
                control.should_save = True
            if self.action == "stop":
                control.should_training_stop = True
                self.stopped_by = self.stopped_by or sentence

    def see(self, logs: dict[str, float]) -> dict[str, str]:
        """Take in one log line; returns the conditions that are new in it, each with its
        evidence.
        """
        entropy = logs.get("gtpo/completion_entropy", logs.get("entropy"))
        self.lines = [
            *self.lines,
            {"entropy": entropy, **{name: logs.get(name) for name in METRICS}},
        ][-2 * self.window :]
        seen = Seen(
            Lines(self.lines[-self.window :], self.window),
            Lines(self.lines[: -self.window], self.window),
            self,
        )
        if self.initial_entropy is None:
            self.initial_entropy = logs.get("gtpo/initial_entropy") or seen.now.mean("entropy")
        self.best_format = max(
            (
                rate
                for rate in (self.best_format, seen.now.mean("reward/format_rate"))
                if rate is not None
            ),
            default=None,
        )
        new = {}
        for condition, check in CONDITIONS.items():
            limit = self.limits[condition]
            evidence = None if limit is None else check(seen, limit)
            if evidence and condition not in self.reported:
                new[condition] = evidence
            if evidence:
                self.reported[condition] = 0
            elif condition in self.reported:
                self.reported[condition] += 1
                if self.reported[condition] == 2 * self.window:
                    del self.reported[condition]
        return new


class Lines(NamedTuple):
    """Up to `size` log lines after each other."""

    lines: list[dict[str, float | None]]
    size: int

    def mean(self, name: str) -> float | None:
        """None until there are `size` lines, and where one of them has no finite `name`."""
        values = [line[name] for line in self.lines]
        known = len(values) == self.size and all(
            value is not None and math.isfinite(value) for value in values
        )
        return fmean(values) if known else None


class Seen(NamedTuple):
    """What the conditions look at: the last window, the one before it, and what the alarm remembers
    of earlier ones.
    """

    now: Lines
    before: Lines
    alarm: Alarm


# ---- the conditions: each returns its evidence and what would help, or None


def _entropy_above(seen: Seen, limit: float) -> str | None:
    entropy, initial = seen.now.mean("entropy"), seen.alarm.initial_entropy
    # what began above may stay there
    if entropy is None or entropy <= limit or (initial or 0.0) > limit:
        return None
    return (
        f"the mean entropy is {entropy:.2f} nats, above {limit:g} (it began at {initial:.2f}):"
        " completions become random; lower training.learning_rate, or go back to a checkpoint"
    )


def _entropy_rising(seen: Seen, limit: float) -> str | None:
    now, before = seen.now.mean("entropy"), seen.before.mean("entropy")
    if now is None or before is None or now - before <= limit:
        return None
    return (
        f"the mean entropy rises steeply, from {before:.2f} to {now:.2f} nats within"
        f" {seen.now.size} log lines; lower training.learning_rate, or raise gtpo_runtime.ent_scale"
    )


def _entropy_low(seen: Seen, limit: float) -> str | None:
    entropy, initial = seen.now.mean("entropy"), seen.alarm.initial_entropy
    if entropy is None or not initial or entropy >= limit * initial:
        return None
    return (
        f"the mean entropy is {entropy:.3f} nats, {entropy / initial:.0%} of the initial"
        f" {initial:.2f}: the policy is nearly deterministic and explores no more; end the run if"
        " it is good, else lower training.learning_rate or gtpo_runtime.w_raw"
    )


def _all_filtered(seen: Seen, limit: float) -> str | None:
    share = seen.now.mean("gtpo/frac_filtered")
    if share is None or share < limit:
        return None
    left = "no" if share == 1 else "hardly any"
    return (
        f"the entropy filter switches off {share:.0%} of the completions: {left} gradient is left,"
        " and the policy stays where it is; go back to a checkpoint with a lower"
        " training.learning_rate, or raise gtpo_runtime.ent_threshold"
    )


def _format_falling(seen: Seen, limit: float) -> str | None:
    rate, best = seen.now.mean("reward/format_rate"), seen.alarm.best_format
    if rate is None or best - rate <= limit:
        return None
    return (
        f"the format rate fell to {rate:.0%}, from {best:.0%} at its best; go back to a checkpoint"
        " with a lower training.learning_rate"
    )


def _no_signal(seen: Seen, limit: float) -> str | None:
    share = seen.now.mean("frac_reward_zero_std")
    if share is None or share < limit:
        return None
    return (
        f"in {share:.0%} of the groups all rewards are equal, and nothing is learnt from them; take"
        " problems neither too hard nor too easy, or raise training.num_generations or"
        " training.temperature"
    )


def _truncated(seen: Seen, limit: float) -> str | None:
    share = seen.now.mean("completions/clipped_ratio")
    if share is None or share < limit:
        return None
    return (
        f"{share:.0%} of the completions are cut off before their end; raise model.max_seq_length,"
        " or lower training.max_prompt_length"
    )


def _non_finite(seen: Seen, limit: float) -> str | None:
    lines = seen.now.lines
    skipped = [line["gtpo/skipped_steps"] for line in (*seen.before.lines[-1:], *lines)]
    if None in skipped:  # a trainer that skips nothing
        bad = sum(
            not all(math.isfinite(line[name] or 0.0) for name in ("loss", "grad_norm"))
            for line in lines
        )
    else:
        bad = round(skipped[-1] - skipped[0])
    if bad < limit:
        return None
    return (
        f"{bad} steps within {len(lines)} log lines had a loss or gradients that are not finite;"
        " lower training.learning_rate, or use bf16 instead of fp16"
    )


CONDITIONS: dict[str, Callable[[Seen, float], str | None]] = {
    "entropy_above": _entropy_above,
    "entropy_rising": _entropy_rising,
    "entropy_low": _entropy_low,
    "all_filtered": _all_filtered,
    "format_falling": _format_falling,
    "no_signal": _no_signal,
    "truncated": _truncated,
    "non_finite": _non_finite,
}
