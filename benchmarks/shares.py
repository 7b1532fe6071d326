"""Counts the CPU-seconds of a training step by part."""

import functools
import statistics
import time

from transformers import TrainerCallback

PARTS = ("generation", "rewards", "forward", "backward", "rest")


class Shares(TrainerCallback):
    """Counts the CPU-seconds of each part of every step of `trainer`, any `trl.GRPOTrainer`.

    `steps` holds a dict of PARTS per optimizer step. "rest" is everything that no other part
    counts, such as conflict tokens, optimizer, logs and checkpoints. The processes that run rewards
    are not counted. `before_step` is called with the number of steps done so far.
    """

    def __init__(self, trainer, before_step=lambda step: None):
        self.trainer = trainer
        self.steps: list[dict[str, float]] = []
        self.before_step = before_step
        for owner, name, part in (
            (trainer, "_generate_single_turn", "generation"),
            (trainer, "_calculate_rewards", "rewards"),
            (trainer, "compute_loss", "forward"),
            (trainer.accelerator, "backward", "backward"),
        ):
            setattr(owner, name, self._counted(getattr(owner, name), part))
        trainer.add_callback(self)

    def _counted(self, function, part: str):
        @functools.wraps(function)
        def counted(*args, **kwargs):
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self._parts[part] += time.process_time() - began

        return counted

    def on_step_begin(self, args, state, control, **kwargs):
        """Ends the measurement of one step and begins that of the next."""
        self._next(state)

    def on_train_begin(self, args, state, control, **kwargs):
        """Begins without a measurement."""
        self._parts, self._began = None, 0.0

    def on_train_end(self, args, state, control, **kwargs):
        """Ends the measurement of the last step."""
        self._close()

    def _next(self, state) -> None:
        self._close()
        self.before_step(state.global_step)
        self._parts, self._began = dict.fromkeys(PARTS, 0.0), time.process_time()

    def _close(self) -> None:
        if self._parts is not None:
            whole = time.process_time() - self._began
            self.steps.append({**self._parts, "rest": whole - sum(self._parts.values())})


def medians(steps: list[dict[str, float]]) -> dict[str, float]:
    """The median CPU-seconds of each part, and of the whole step."""
    parts = {part: statistics.median(step[part] for step in steps) for part in PARTS}
    return {**parts, "step": statistics.median(sum(step.values()) for step in steps)}


def header(width: int) -> str:
    """The header of a table of medians, whose first column has this width."""
    return " " * width + "".join(f"{part:>17}" for part in (*PARTS, "step"))


def columns(parts: dict[str, float]) -> str:
    """Medians as the columns of such a table: seconds, and the share of the step."""
    return "".join(
        f"{parts[part]:>10.3f} {parts[part] / parts['step']:>5.0%} " for part in (*PARTS, "step")
    )
