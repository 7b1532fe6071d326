"""What a person sees while a run trains: a progress bar, one readable line per logging step, and
now and then completions.
"""

import logging
import time
from pathlib import Path

from tqdm.auto import tqdm
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOTrainer

from gtpo.hooks.alarm import Alarm
from gtpo.hooks.recorder import Recorder
from gtpo.recipe import Recipe
from gtpo.system.console import LOG_FILE_ONLY
from gtpo.system.safe_text import printable

logger = logging.getLogger(LOG_FILE_ONLY)

# label, its metrics (the first that is logged), format, width, meaning; what a trainer does not log
# is left out
COLUMNS = (
    ("reward", ("reward",), "{:.2f}", 5, None),
    ("format", ("reward/format_rate",), "{:.0%}", 3, "completions in perfect format"),
    ("correct", ("reward/correct_rate",), "{:.0%}", 3, "those that are right as well"),
    (
        "entropy",
        ("gtpo/completion_entropy", "entropy"),
        "{:.3f}",
        5,
        "mean nats per token, against the threshold",
    ),
    (
        "conflict",
        ("gtpo/frac_conflict_tokens",),
        "{:.0%}",
        3,
        "tokens that good and bad completions share",
    ),
    (
        "filtered",
        ("gtpo/frac_filtered",),
        "{:.0%}",
        3,
        "completions switched off, their entropy is above the threshold",
    ),
    ("no signal", ("frac_reward_zero_std",), "{:.0%}", 3, "groups whose rewards are all equal"),
    ("length", ("completions/mean_length",), "{:.0f}", 3, "mean tokens"),
    (
        "truncated",
        ("completions/clipped_ratio",),
        "{:.0%}",
        2,
        "completions cut off before their end",
    ),
    ("s/step", ("step_time",), "{:.1f}", 3, None),
)
SHOWN_LENGTH = 240  # characters of a completion on the console


def watch(trainer: GRPOTrainer, recipe: Recipe, run_dir: Path) -> Alarm:
    """Let `trainer` show and record what it does, in place of transformers' own output; returns its
    alarm.
    """
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    section = recipe.watch
    file = run_dir / "completions.jsonl" if section.completions else None
    recorder = (
        Recorder(trainer, file, tokens_every=section.tokens_every)
        if file or section.show_every
        else None
    )
    threshold = recipe.gtpo_runtime.ent_threshold
    alarm = Alarm(
        action=recipe.alarm.action,
        window=recipe.alarm.window,
        limits=recipe.alarm.limits(threshold),
    )
    trainer.add_callback(Console(recorder, show_every=section.show_every, ent_threshold=threshold))
    if trainer.log_completions:
        _without_control_characters(trainer)
    if alarm.action != "none":
        # before the trackers, which then get its metrics too
        trainer.callback_handler.callbacks.insert(0, alarm)
    return alarm


def _without_control_characters(trainer: GRPOTrainer) -> None:
    """Let the table of `training.log_completions` show control characters of prompts and
    completions, not send them.

    trl 1.13.0 prints `_logs` with rich, which lets escape sequences through.
    """
    log = trainer.log

    def log_safely(*args, **kwargs):
        for columns, names in (
            (trainer._logs, ("prompt", "completion")),
            (trainer._logs["extra"], list(trainer._logs["extra"])),
        ):
            for name in names:
                values = columns[name]
                columns[name] = type(values)(
                    (printable(v) if isinstance(v, str) else v for v in values), values.maxlen
                )
        return log(*args, **kwargs)

    trainer.log = log_safely


class Console(ProgressCallback):
    """transformers' progress bar, with one line of the metrics that matter in place of all of them.

    Every `show_every` steps, from the first line on, it shows a good and a bad completion of what
    `recorder` saw last.
    """

    def __init__(self, recorder: Recorder | None, *, show_every: int | None, ent_threshold: float):
        super().__init__()
        self.recorder, self.show_every, self.ent_threshold = recorder, show_every, ent_threshold
        self._began: tuple[float, int] = (0.0, 0)  # when, and after how many steps
        # how many times `show_every` had passed when completions were shown; None: no line yet
        self._shown: int | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        self._began = time.monotonic(), state.global_step

    def on_log(self, args, state, control, logs=None, **kwargs):
        if (
            not state.is_world_process_zero
            or self.training_bar is None
            or "reward" not in (logs or {})
        ):
            return
        if self._shown is None:
            self._say(legend(logs))
        began, first = self._began
        per_step = (time.monotonic() - began) / max(state.global_step - first, 1)
        self._say(
            readable(
                state.global_step,
                state.max_steps,
                logs,
                self.ent_threshold,
                seconds_left=per_step * (state.max_steps - state.global_step),
            )
        )
        passed = (state.global_step - 1) // self.show_every if self.show_every else 0
        if self.show_every and passed != self._shown:
            for line in good_and_bad(self.recorder.latest):
                self._say(line)
        self._shown = passed

    def _say(self, line: str) -> None:
        self.training_bar.write(line)
        logger.info(line)  # for the log file: the console leaves this logger to the bar


def readable(
    step: int, max_steps: int, logs: dict, ent_threshold: float, seconds_left: float
) -> str:
    """`step  12/100  reward  9.40  format 71%  entropy 0.061 < 0.7 ...`: the known metrics among
    `logs`, in a fixed order.
    """
    parts = [f"step {step:>{len(str(max_steps))}}/{max_steps}"]
    for (label, _, shape, width, _), value in _known(logs):
        against = (
            f" {'>' if value > ent_threshold else '<'} {ent_threshold:g}"
            if label == "entropy"
            else ""
        )
        parts.append(f"{label} {shape.format(value):>{width}}{against}")
    return "  ".join([*parts, f"left {tqdm.format_interval(seconds_left)}"])


def legend(logs: dict) -> str:
    """What the columns of `readable` mean, those that `logs` have."""
    return "Columns: " + "; ".join(
        f"{label}: {meaning}" for (label, *_, meaning), _ in _known(logs) if meaning
    )


def good_and_bad(completions: list[dict]) -> list[str]:
    """The best and the worst completion of the group whose rewards differ most, as lines for the
    console.
    """
    judged = [line for line in completions if line["reward"] is not None]
    if not judged:
        return []
    groups = {}
    for line in judged:
        groups.setdefault((line["rollout"], line["group"]), []).append(line)
    group = max(
        (sorted(rows, key=lambda line: line["reward"]) for rows in groups.values()),
        key=lambda rows: rows[-1]["reward"] - rows[0]["reward"],
    )
    worst, best = group[0], group[-1]
    prompt = best["prompt"] if isinstance(best["prompt"], str) else best["prompt"][-1]["content"]
    if best["reward"] == worst["reward"]:  # nothing to compare in any group
        return [
            f"    prompt: {_compact(prompt)}",
            f"    all of its group alike, {_described(best)}",
        ]
    return [
        f"    prompt: {_compact(prompt)}",
        f"    good, {_described(best)}",
        f"    bad,  {_described(worst)}",
    ]


def _described(line: dict) -> str:
    entropy = "" if line["entropy"] is None else f", entropy {line['entropy']:.3f}"
    filtered = ", filtered" if line["kept"] is False else ""
    return (
        f"reward {line['reward']:g}, advantage {line['advantage']:+.3g}{entropy}{filtered}:"
        f" {_compact(line['completion'])}"
    )


def _compact(text) -> str:
    """One line of `text` without control characters; the middle of a long one left out."""
    text = str(text)
    if len(text) > SHOWN_LENGTH:
        text = f"{text[: SHOWN_LENGTH // 2]} ... {text[-SHOWN_LENGTH // 2 :]}"
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _known(logs: dict):
    """Each column whose metric is logged, with its value."""
    for column in COLUMNS:
        value = next((logs[name] for name in column[1] if logs.get(name) is not None), None)
        if value is not None:
            yield column, float(value)
