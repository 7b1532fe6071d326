"""The collapse alarm: reports with evidence that a run goes wrong, and can save or stop it.

Metrics are averaged over the last `window` log lines, so noise raises no alarm. A condition is
reported once. It is reported again only after two windows in which it did not hold. A metric that
the trainer does not log raises no alarm.
"""

import logging
import math
from collections.abc import Callable
from statistics import fmean
from typing import NamedTuple

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from gtpo.hooks.turn_ends import END_INSIDE

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
    """Checks the log lines of any GRPO trainer for the conditions in CONDITIONS.

    `limits` holds a threshold for each condition; None switches a condition off. `action` is
    `warn`, `save` or `stop`. Each event becomes the metric `alarm/<condition>` of its log line.
    Trackers see it if their callbacks come later. `stopped_by` is the sentence of the alarm that
    stopped the run.
    """

    def __init__(self, *, action: str, window: int, limits: dict[str, float | None]):
        self.action, self.window, self.limits = action, window, limits
        self.lines: list[dict[str, float | None]] = []  # the last two windows
        # In nats. The mean of the first window stands in where a trainer does not measure it.
        self.initial_entropy: float | None = None
        self.best_format: float | None = None  # the format rate of the best window
        # Reported conditions, with the number of log lines since each was last true.
        self.reported: dict[str, int] = {}
        self.stopped_by: str | None = None

    def state(self) -> dict:
        """What transformers saves in each checkpoint, and sets again as attributes.

        It stands there under the name of this class, so class and attributes keep their names.
        """
        attributes = ("lines", "initial_entropy", "best_format", "told")
        return {
            "args": {"action": self.action, "window": self.window, "limits": self.limits},
            "attributes": {name: getattr(self, name) for name in attributes},
        }

    @property
    def told(self) -> dict[str, int]:
        """`reported`, by the name that it has in checkpoints."""
        return self.reported

    @told.setter
    def told(self, value: dict[str, int]) -> None:
        self.reported = value

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Checks a log line of the training, and acts on the conditions that are new in it."""
        if "reward" not in (logs or {}):  # an evaluation, or the summary at the end
            return
        for condition, evidence in self.observe(logs).items():
            sentence = f"Alarm at step {state.global_step}: {evidence}"
            logger.warning("[GTPO] %s", sentence)
            # transformers 5.17.0 keeps one copy of the line and gives callbacks another.
            for line in (logs, state.log_history[-1]):
                line[f"alarm/{condition}"] = 1.0
            if self.action in ("save", "stop"):
                control.should_save = True
            if self.action == "stop":
                control.should_training_stop = True
                self.stopped_by = self.stopped_by or sentence

    def observe(self, logs: dict[str, float]) -> dict[str, str]:
        """Takes in one log line; returns the conditions that are new in it, with their evidence."""
        entropy = logs.get("gtpo/completion_entropy", logs.get("entropy"))
        line = {"entropy": entropy, "reward": logs.get("reward")}
        line |= {name: logs.get(name) for name in METRICS}
        if END_INSIDE in logs:  # most runs do not log it
            line[END_INSIDE] = logs[END_INSIDE]
        self.lines = [*self.lines, line][-2 * self.window :]
        now = Window(self.lines[-self.window :], self.window)
        before = Window(self.lines[: -self.window], self.window)
        if self.initial_entropy is None:
            self.initial_entropy = logs.get("gtpo/initial_entropy") or now.mean("entropy")
        formats = (self.best_format, now.mean("reward/format_rate"))
        self.best_format = max((rate for rate in formats if rate is not None), default=None)
        view = View(now, before, self.initial_entropy, self.best_format)
        new = {}
        for condition, check in CONDITIONS.items():
            limit = self.limits[condition]
            evidence = None if limit is None else check(view, limit)
            if evidence and condition not in self.reported:
                new[condition] = evidence
            if evidence:
                self.reported[condition] = 0
            elif condition in self.reported:
                self.reported[condition] += 1
                if self.reported[condition] == 2 * self.window:
                    del self.reported[condition]
        return new


class Window(NamedTuple):
    """Up to `size` consecutive log lines."""

    lines: list[dict[str, float | None]]
    size: int

    def mean(self, name: str) -> float | None:
        """The mean of a metric; None before there are `size` lines with a finite value each."""
        # Lines in checkpoints of earlier versions lack some metrics.
        values = [line.get(name) for line in self.lines]
        if len(values) < self.size or not all(
            value is not None and math.isfinite(value) for value in values
        ):
            return None
        return fmean(values)


class View(NamedTuple):
    """What a condition is decided from: two windows, and what is known of earlier ones."""

    now: Window
    before: Window
    initial_entropy: float | None  # nats
    best_format: float | None


# ---- the conditions: each returns its evidence and what would help, or None


def _entropy_above(view: View, limit: float) -> str | None:
    entropy, initial = view.now.mean("entropy"), view.initial_entropy
    # A policy that began above the limit may stay there.
    if entropy is None or entropy <= limit or (initial or 0.0) > limit:
        return None
    return (
        f"the mean entropy is {entropy:.2f} nats, above {limit:g} (it began at {initial:.2f}):"
        " completions become random; lower training.learning_rate, or go back to a checkpoint"
    )


def _entropy_rising(view: View, limit: float) -> str | None:
    now, before = view.now.mean("entropy"), view.before.mean("entropy")
    if now is None or before is None or now - before <= limit:
        return None
    return (
        f"the mean entropy rises steeply, from {before:.2f} to {now:.2f} nats within"
        f" {view.now.size} log lines; lower training.learning_rate, or raise gtpo_runtime.ent_scale"
    )


def _entropy_low(view: View, limit: float) -> str | None:
    entropy, initial = view.now.mean("entropy"), view.initial_entropy
    if entropy is None or not initial or entropy >= limit * initial:
        return None
    return (
        f"the mean entropy is {entropy:.3f} nats, {entropy / initial:.0%} of the initial"
        f" {initial:.2f}: the policy hardly explores; end the run, or lower"
        " training.learning_rate or gtpo_runtime.w_raw"
    )


def _all_filtered(view: View, limit: float) -> str | None:
    share = view.now.mean("gtpo/frac_filtered")
    if share is None or share < limit:
        return None
    left = "no" if share == 1 else "hardly any"
    return (
        f"the entropy filter switches off {share:.0%} of completions: {left} gradient is left; go"
        " back to a checkpoint with a lower training.learning_rate, or raise"
        " gtpo_runtime.ent_threshold"
    )


def _format_falling(view: View, limit: float) -> str | None:
    rate, best = view.now.mean("reward/format_rate"), view.best_format
    if rate is None or best - rate <= limit:
        return None
    return (
        f"the format rate fell to {rate:.0%}, from {best:.0%} at its best; go back to a checkpoint"
        " with a lower training.learning_rate"
    )


def _no_signal(view: View, limit: float) -> str | None:
    share = view.now.mean("frac_reward_zero_std")
    if share is None or share < limit:
        return None
    rewards = [line.get("reward") for line in view.now.lines]
    if all(reward is not None and math.isnan(reward) for reward in rewards):
        return (
            "no completion has a reward, so nothing is learned; look at what the functions in"
            " trainer.reward_funcs return None for, and at reward/cannot_judge"
        )
    return (
        f"in {share:.0%} of the groups all rewards are equal, so nothing is learned from them; use"
        " problems of medium difficulty, or raise training.num_generations or training.temperature"
    )


def _truncated(view: View, limit: float) -> str | None:
    share = view.now.mean("completions/clipped_ratio")
    if share is None or share < limit:
        return None
    inside = view.now.mean(END_INSIDE)
    if inside and inside >= share / 2:
        return (
            f"{share:.0%} of the completions are cut off, and in {inside:.0%} the end of the turn"
            " stands inside: the policy ends its turn where completions go on, so longer ones do"
            " not help; train a new run, whose ends the start names, or name them in"
            " training.generation_kwargs: {eos_token_id: [...]}"
        )
    return (
        f"{share:.0%} of the completions are cut off before their end; raise model.max_seq_length,"
        " or lower training.max_prompt_length"
    )


def _non_finite(view: View, limit: float) -> str | None:
    lines = view.now.lines
    skipped = [line["gtpo/skipped_steps"] for line in (*view.before.lines[-1:], *lines)]
    if None in skipped:  # this trainer does not skip steps
        count = sum(
            not all(math.isfinite(line[name] or 0.0) for name in ("loss", "grad_norm"))
            for line in lines
        )
    else:
        count = round(skipped[-1] - skipped[0])
    if count < limit:
        return None
    return (
        f"{count} steps within {len(lines)} log lines had a loss or gradients that are not finite;"
        " lower training.learning_rate, or use bf16 instead of fp16"
    )


CONDITIONS: dict[str, Callable[[View, float], str | None]] = {
    "entropy_above": _entropy_above,
    "entropy_rising": _entropy_rising,
    "entropy_low": _entropy_low,
    "all_filtered": _all_filtered,
    "format_falling": _format_falling,
    "no_signal": _no_signal,
    "truncated": _truncated,
    "non_finite": _non_finite,
}
