"""What a person sees while a run trains: a progress bar, and one readable line per logging step."""

import logging
from pathlib import Path

from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl import GRPOTrainer

from gtpo.recorder import Recorder
from gtpo.watch_sections import WatchSection

logger = logging.getLogger(__name__)

COLUMNS = (  # metric, label, format; a metric that a trainer does not log leaves its column out
    ("reward", "reward", "{:.2f}"),
    ("reward/formatting_avg", "format", "{:.2f}"),
    ("reward/correctness_avg", "correct", "{:.2f}"),
    ("gtpo/completion_entropy", "entropy", "{:.3f}"),
    ("gtpo/frac_conflict_tokens", "conflict", "{:.0%}"),
    ("gtpo/frac_filtered", "filtered", "{:.0%}"),
    ("frac_reward_zero_std", "no signal", "{:.0%}"),
    ("completions/mean_length", "length", "{:.0f}"),
    ("completions/clipped_ratio", "truncated", "{:.0%}"),
    ("step_time", "s/step", "{:.1f}"),
)


def watch(trainer: GRPOTrainer, section: WatchSection, run_dir: Path) -> None:
    """Let `trainer` show and record what it does, in place of transformers' own output."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(ConsoleLine())
    if section.completions:
        Recorder(trainer, run_dir / "completions.jsonl", tokens_every=section.tokens_every)


class ConsoleLine(ProgressCallback):
    """transformers' progress bar, with one line of the metrics that matter in place of all of them."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and self.training_bar is not None and "reward" in (logs or {}):
            line = readable(state.global_step, logs)
            self.training_bar.write(line)
            logger.info(line)  # for the log file: the console leaves this logger to the bar


def readable(step: int, logs: dict) -> str:
    """`step 12  reward 9.40  format 7.10 ...`: the known metrics among `logs`, in a fixed order."""
    return "  ".join([f"step {step:>4}", *(
        f"{label} {shape.format(float(logs[name]))}" for name, label, shape in COLUMNS if logs.get(name) is not None)])
