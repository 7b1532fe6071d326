"""A run's directory: opened for one process, described, and rewound to a checkpoint."""

import contextlib
import importlib.metadata
import json
import logging
import logging.handlers
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import gtpo
from gtpo.answers import GRADING_VERSION
from gtpo.models.adapters import checkpoint_folders, checkpoint_step
from gtpo.recipe import Recipe
from gtpo.recipe.yaml_text import write_yaml
from gtpo.runs.start import Start, check_still_free, locked
from gtpo.runs.trackers import save_run_id
from gtpo.system import processes
from gtpo.system.safe_text import SafeFormatter
from gtpo.system.whole_files import (
    move_into_place,
    remove,
    remove_leftovers,
    write_whole,
    written_aside,
)

logger = logging.getLogger(__name__)

# The packages whose versions a run writes down.
LIBRARIES = (
    "torch", "transformers", "trl", "peft", "datasets", "accelerate", "unsloth", "unsloth_zoo",
    "bitsandbytes", "vllm", "math-verify", "wandb",
)  # fmt: skip
ABANDONED = "abandoned"  # the folder for what later checkpoints had seen
# The files that only a finished run has. The first says that the run is finished.
FINAL_FILES = ("trainer_state.json", "adapter_config.json", "adapter_model.safetensors")


@contextlib.contextmanager
def opened(
    start: Start, recipe: Recipe, early_log: logging.handlers.MemoryHandler | None
) -> Iterator[None]:
    """Inside, the run directory belongs to this process, and messages go to train.log.

    The directory is emptied or rewound as `start` says, and recipe.yaml and versions.json are
    written. `early_log` holds the messages since the program began; they come first in train.log.
    If a run has several processes, only the first one does this. Raises RecipeError if another
    run trains in the directory.
    """
    if not processes.is_first():
        yield
        return
    run_dir = start.run_dir
    if start.overwrites and run_dir.is_dir():
        with locked(run_dir):
            remove(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        check_still_free(start)
        rewind(start)
        _describe(run_dir, recipe)
        log = _LogFile(run_dir / "train.log", encoding="utf-8")
        log.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        if early_log is not None:
            early_log.setTarget(log)
            early_log.flush()
            early_log.flushLevel = logging.DEBUG  # from now on every message at once
            yield
            return
        logging.getLogger().addHandler(log)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(log)
            log.close()


class _LogFile(logging.FileHandler):
    """A log file that loses lines on a full disk, without an error of its own.

    Whatever else cannot be written there raises an error that names the disk.
    """

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def _describe(run_dir: Path, recipe: Recipe) -> None:
    """Writes the recipe, the versions, and the identity of the run for trackers."""
    values, secret_keys = recipe.saved()
    if secret_keys:
        logger.info("[GTPO] Not saved with the recipe: %s", ", ".join(secret_keys))
    with written_aside(run_dir / "recipe.yaml") as aside, aside.open("w", encoding="utf-8") as file:
        write_yaml(values, file)
    write_whole(run_dir / "versions.json", json.dumps(versions(), indent=2) + "\n")
    save_run_id(run_dir)


def versions() -> dict[str, str]:
    """The versions of GTPO, its commit, the libraries, Python and the platform.

    The version of a library that is missing is "not installed".
    """
    installed = {"gtpo": gtpo.__version__, "commit": _commit(), "grading": str(GRADING_VERSION)}
    for library in LIBRARIES:
        try:
            installed[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            installed[library] = "not installed"
    return {**installed, "python": platform.python_version(), "platform": platform.platform()}


def _commit() -> str:
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return git.stdout.strip() or "unknown"


# ---- rewind to a checkpoint


def rewind(start: Start) -> None:
    """Removes from the run directory what came after the checkpoint of `start`.

    The run repeats those steps. If there are later checkpoints, nothing they had seen is deleted:
    it goes into the folder `abandoned`. So do the evaluations of the run's adapter that
    evaluate_model.py made. If the checkpoint is another run's, that run's completions
    and evaluations up to it are copied first.
    """
    run_dir, checkpoint = start.run_dir, start.checkpoint
    step = checkpoint.step if checkpoint else 0
    size = checkpoint.manifest.get("completions", 0) if checkpoint else 0
    remove_leftovers(run_dir)
    if start.from_another_run:
        _copy_records(checkpoint.folder.parent, run_dir, size, step)
    for name in FINAL_FILES:
        remove(run_dir / name)
    later = [folder for folder in checkpoint_folders(run_dir) if checkpoint_step(folder) > step]
    abandoned = run_dir / ABANDONED if later else None
    for folder in later:
        logger.warning(
            "[GTPO] %s is moved to %s: the run continues from an earlier step",
            folder.name,
            abandoned,
        )
        _move_or_remove(folder, abandoned)
    _truncate(run_dir / "completions.jsonl", size, abandoned)
    for file in sorted((run_dir / "evaluation").glob("*.jsonl")):
        evaluated_step = _evaluated_step(file)
        if evaluated_step is None:
            _put_aside(file, run_dir / ABANDONED / "evaluation")
        elif file.stem == "after" and evaluated_step == step and start.adds_steps:
            move_into_place(file, file.with_stem(f"step-{step}"))
        elif evaluated_step > step or start.discards_evaluations:
            _move_or_remove(file, abandoned and abandoned / "evaluation")


def _put_aside(file: Path, folder: Path) -> None:
    """Moves a file of evaluate_model.py into `folder`, unless it is of a model that stays.

    It was made by a command of the user, so it is never deleted. The base model stays, and so do
    the checkpoints. The run's own adapter does not: the run goes on from an earlier one.
    """
    if file.stem.startswith(("base-", "checkpoint-")):
        return
    logger.warning("[GTPO] %s is moved to %s: the run's adapter changes", file.name, folder)
    _move_or_remove(file, folder)


def _copy_records(earlier: Path, run_dir: Path, size: int, step: int) -> None:
    """Copies the first `size` bytes of a run's completions, and its evaluations up to `step`."""
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


def _truncate(file: Path, size: int, abandoned: Path | None) -> None:
    """Cuts the completions file at `size` bytes; moves the rest to `abandoned`, if there is one."""
    present = file.stat().st_size if file.is_file() else 0
    if present < size:
        logger.warning("[GTPO] %s has lost completions: it has %d of %d bytes", file, present, size)
    if present <= size:
        return
    if abandoned:
        with file.open("rb") as source, (abandoned / file.name).open("ab") as target:
            source.seek(size)
            shutil.copyfileobj(source, target)
    os.truncate(file, size)


def _move_or_remove(path: Path, folder: Path | None) -> None:
    """Moves a file or a folder into `folder`; removes it if that is None."""
    if folder:
        folder.mkdir(parents=True, exist_ok=True)
        move_into_place(path, folder / path.name)
    else:
        remove(path)


def _evaluated_step(file: Path) -> int | None:
    """The step after which an evaluation was made; None if its header does not say."""
    with (
        contextlib.suppress(OSError, ValueError, KeyError, TypeError),
        file.open(encoding="utf-8") as lines,
    ):
        return int(json.loads(lines.readline())["header"]["step"])
    return None
