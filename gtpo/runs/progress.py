"""What the terminal shows while a run trains: a progress bar, a line per logging step, completions.

`training.logging_steps` decides how often a line comes, `watch.show_every` how often completions.
"""

import logging
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from tqdm.auto import tqdm
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOTrainer

from gtpo.hooks.recorder import Recorder
from gtpo.hooks.seams import wrap
from gtpo.system.console import LOG_FILE_ONLY
from gtpo.system.safe_text import printable

logger = logging.getLogger(LOG_FILE_ONLY)

SHOWN_LENGTH = 240  # characters of a completion on the terminal


class Column(NamedTuple):
    """One column of the line: the first of `metrics` that is logged, as `shape` formats it."""

    label: str
    metrics: tuple[str, ...]
    shape: str
    width: int
    meaning: str | None = None  # for the legend


# fmt: off
COLUMNS = (
    Column("reward", ("reward",), "{:.2f}", 5),
    Column("format", ("reward/format_rate",), "{:.0%}", 3,
           "completions in perfect format"),
    Column("correct", ("reward/correct_rate",), "{:.0%}", 3,
           "those that are right as well"),
    Column("entropy", ("gtpo/completion_entropy", "entropy"), "{:.3f}", 5,
           "mean nats per token, against the threshold"),
    Column("conflict", ("gtpo/frac_conflict_tokens",), "{:.0%}", 3,
           "tokens that good and bad completions share"),
    Column("filtered", ("gtpo/frac_filtered",), "{:.0%}", 3,
           "completions without a gradient, their entropy is above the threshold"),
    Column("no signal", ("frac_reward_zero_std",), "{:.0%}", 3,
           "groups whose rewards are all equal or missing"),
    Column("length", ("completions/mean_length",), "{:.0f}", 3,
           "mean tokens"),
    Column("truncated", ("completions/clipped_ratio",), "{:.0%}", 2,
           "completions cut off before their end"),
    Column("s/step", ("step_time",), "{:.1f}", 3),
)
# fmt: on


class Console(ProgressCallback):
    """transformers' progress bar, with one line of the important metrics in place of all of them.

    Every `show_every` steps, from the first line on, it shows the best and the worst completion of
    a group. `recorder` has the completions of the last rollout.
    """

    def __init__(self, recorder: Recorder | None, *, show_every: int | None, ent_threshold: float):
        super().__init__()
        self.recorder, self.show_every, self.ent_threshold = recorder, show_every, ent_threshold
        self._started_at, self._first_step = 0.0, 0
        # How many times `show_every` steps had passed at the last line; None before the first line.
        self._intervals_shown: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        """Shows the progress bar, and notes the time."""
        super().on_train_begin(args, state, control, **kwargs)
        self._started_at, self._first_step = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Prints the line of a logging step, and completions if it is time for them."""
        is_training_line = "reward" in (logs or {})
        if not state.is_world_process_zero or self.training_bar is None or not is_training_line:
            return
        if self._intervals_shown is None:
            self._print(legend(logs))
        seconds = time.monotonic() - self._started_at
        per_step = seconds / max(state.global_step - self._first_step, 1)
        steps_left = state.max_steps - state.global_step
        self._print(
            progress_line(
                state.global_step,
                state.max_steps,
                logs,
                self.ent_threshold,
                seconds_left=per_step * steps_left,
            )
        )
        intervals = (state.global_step - 1) // self.show_every if self.show_every else 0
        if self.show_every and intervals != self._intervals_shown:
            for line in good_and_bad(self.recorder.latest):
                self._print(line)
        self._intervals_shown = intervals

    def _print(self, line: str) -> None:
        self.training_bar.write(line)
        logger.info(line)


def replace_console(
    trainer: GRPOTrainer, recorder: Recorder | None, *, show_every: int | None, ent_threshold: float
) -> None:
    """Lets `Console` print in place of transformers' own callbacks."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(Console(recorder, show_every=show_every, ent_threshold=ent_threshold))


def escape_completions_table(trainer: GRPOTrainer) -> None:
    """Shows control characters in the table of `training.log_completions` as escapes.

    trl 1.13.0 prints the texts in `_logs` with rich, which sends escape sequences to the terminal.
    """

    def log_escaped(log: Callable, *args, **kwargs):
        extra = trainer._logs["extra"]
        for columns, names in ((trainer._logs, ("prompt", "completion")), (extra, list(extra))):
            for name in names:
                values = columns[name]
                escaped = (printable(v) if isinstance(v, str) else v for v in values)
                columns[name] = type(values)(escaped, values.maxlen)
        return log(*args, **kwargs)

    wrap(trainer, "log", log_escaped)


def progress_line(
    step: int, max_steps: int, logs: dict, ent_threshold: float, seconds_left: float
) -> str:
    """The metrics of `logs` that have a column, in a fixed order.

    For instance `step  12/100  reward  9.40  format 71%  entropy 0.061 < 0.7  left 02:10`.
    """
    parts = [f"step {step:>{len(str(max_steps))}}/{max_steps}"]
    for column, value in _logged_columns(logs):
        part = f"{column.label} {column.shape.format(value):>{column.width}}"
        if column.label == "entropy":
            part += f" {'>' if value > ent_threshold else '<'} {ent_threshold:g}"
        parts.append(part)
    return "  ".join([*parts, f"left {tqdm.format_interval(seconds_left)}"])


def legend(logs: dict) -> str:
    """What the columns of `progress_line` mean, for those whose metric is in `logs`."""
    columns = [column for column, _ in _logged_columns(logs) if column.meaning]
    return "Columns: " + "; ".join(f"{column.label}: {column.meaning}" for column in columns)


def good_and_bad(completions: list[dict]) -> list[str]:
    """Lines with the best and the worst completion of the group whose rewards differ most.

    `completions` are lines of completions.jsonl. Empty if none of them has a reward.
    """
    groups: dict[tuple[int, int], list[dict]] = {}
    for line in completions:
        if line["reward"] is not None:
            groups.setdefault((line["rollout"], line["group"]), []).append(line)
    if not groups:
        return []
    by_reward = [sorted(lines, key=lambda line: line["reward"]) for lines in groups.values()]
    group = max(by_reward, key=lambda lines: lines[-1]["reward"] - lines[0]["reward"])
    worst, best = group[0], group[-1]
    prompt = best["prompt"] if isinstance(best["prompt"], str) else best["prompt"][-1]["content"]
    shown_prompt = f"    prompt: {_compact(prompt)}"
    if best["reward"] == worst["reward"]:
        return [shown_prompt, f"    all of its group alike, {_described(best)}"]
    return [shown_prompt, f"    good, {_described(best)}", f"    bad,  {_described(worst)}"]


def _described(line: dict) -> str:
    entropy = "" if line["entropy"] is None else f", entropy {line['entropy']:.3f}"
    filtered = ", filtered" if line["kept"] is False else ""
    return (
        f"reward {line['reward']:g}, advantage {line['advantage']:+.3g}{entropy}{filtered}:"
        f" {_compact(line['completion'])}"
    )


def _compact(text) -> str:
    """`text` on one line, without control characters and without the middle of a long text."""
    text = str(text)
    if len(text) > SHOWN_LENGTH:
        text = f"{text[: SHOWN_LENGTH // 2]} ... {text[-SHOWN_LENGTH // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _logged_columns(logs: dict) -> Iterator[tuple[Column, float]]:
    """Each column whose metric is in `logs`, with its value."""
    for column in COLUMNS:
        values = (logs[name] for name in column.metrics if logs.get(name) is not None)
        value = next(values, None)
        if value is not None:
            yield column, float(value)
