"""Let a run directory hold again what it held when a checkpoint was saved, before the run goes on
from there.
"""

import contextlib
import json
import logging
import os
import shutil
from pathlib import Path

from gtpo.runs import checkpoints
from gtpo.runs.start import Start
from gtpo.system.whole_files import put, remove, remove_leftovers, written_aside

logger = logging.getLogger(__name__)

ABANDONED = "abandoned"
# first what says that it is finished
AT_THE_END = ("trainer_state.json", "adapter_config.json", "adapter_model.safetensors")


def rewind(start: Start) -> None:
    """Take out of the run directory what came after `start`: steps that will be repeated.

    What whole checkpoints later than that have seen is no accident: it goes to the folder
    `abandoned`. Of another run's checkpoint, its part of that run's completions and evaluations is
    copied first.
    """
    run_dir, step = start.run_dir, start.checkpoint.step if start.checkpoint else 0
    size = start.checkpoint.told.get("completions", 0) if start.checkpoint else 0
    remove_leftovers(run_dir)
    if start.copies:
        _copy(start.checkpoint.folder.parent, run_dir, size, step)
    for name in AT_THE_END:
        remove(run_dir / name)
    later = [
        folder for folder in checkpoints.folders(run_dir) if checkpoints.step_of(folder) > step
    ]
    keep = run_dir / ABANDONED if later else None
    for folder in later:
        logger.warning(
            "[GTPO] %s is set aside in %s: the run goes on from an earlier step", folder.name, keep
        )
        _set_aside(folder, keep)
    _cut(run_dir / "completions.jsonl", size, keep)
    for file in sorted((run_dir / "evaluation").glob("*.jsonl")):
        seen = _evaluated_step(file)
        if file.stem == "after" and seen == step and start.more_steps:
            put(file, file.with_stem(f"step-{step}"))
        elif seen is None or seen > step or start.evaluates_anew:
            _set_aside(file, keep and keep / "evaluation")


def _copy(earlier: Path, run_dir: Path, size: int, step: int) -> None:
    completions = earlier / "completions.jsonl"
    if completions.is_file():
        with (
            written_aside(run_dir / completions.name) as aside,
            completions.open("rb") as source,
            aside.open("wb") as target,
        ):
            shutil.copyfileobj(source, target)
            target.truncate(min(size, target.tell()))
    for file in (earlier / "evaluation").glob("*.jsonl"):
        if (_evaluated_step(file) or 0) <= step and file.stem != "after":
            (run_dir / "evaluation").mkdir(exist_ok=True)
            with written_aside(run_dir / "evaluation" / file.name) as aside:
                shutil.copyfile(file, aside)


def _cut(file: Path, size: int, keep: Path | None) -> None:
    """Shorten the completions file to `size` bytes; the rest goes to the folder `keep`, if there is
    one.
    """
    there = file.stat().st_size if file.is_file() else 0
    if there < size:
        logger.warning(
            "[GTPO] %s has lost completions: %d bytes of %d are there", file, there, size
        )
    if there <= size:
        return
    if keep:
        with file.open("rb") as source, (keep / file.name).open("ab") as target:
            source.seek(size)
            shutil.copyfileobj(source, target)
    os.truncate(file, size)


def _set_aside(path: Path, keep: Path | None) -> None:
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        put(path, keep / path.name)
    else:
        remove(path)


def _evaluated_step(file: Path) -> int | None:
    """The step at which the policy was evaluated; None where the file does not say."""
    with (
        contextlib.suppress(OSError, ValueError, KeyError, TypeError),
        file.open(encoding="utf-8") as lines,
    ):
        return int(json.loads(lines.readline())["header"]["step"])
    return None
