"""A run's directory: whose it is, and what it holds."""

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
from pathlib import Path

import gtpo
from gtpo.models.adapters import checkpoint_folders, checkpoint_step
from gtpo.recipe import Recipe
from gtpo.recipe.yaml_text import write_yaml
from gtpo.runs.start import Start, check_still_free, locked
from gtpo.runs.trackers import keep_identity
from gtpo.system.safe_text import SafeFormatter
from gtpo.system.whole_files import (
    move_into_place,
    remove,
    remove_leftovers,
    write_whole,
    written_aside,
)

logger = logging.getLogger(__name__)

LIBRARIES = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "datasets",
    "accelerate",
    "unsloth",
    "unsloth_zoo",
    "bitsandbytes",
    "vllm",
    "math-verify",
    "wandb",
)
ABANDONED = "abandoned"
# first what says that it is finished
AT_THE_END = ("trainer_state.json", "adapter_config.json", "adapter_model.safetensors")


@contextlib.contextmanager
def opened(start: Start, recipe: Recipe, early_log: logging.handlers.MemoryHandler | None):
    """Inside, the run directory is this process's: with the resolved recipe, the versions and the
    log, begun with `early_log`.

    Raises RecipeError if another process trains in it.
    """
    run_dir = start.run_dir
    if start.overwrites and run_dir.is_dir():
        with locked(run_dir):
            remove(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with locked(run_dir):
        check_still_free(start)
        rewind(start)
        _describe(run_dir, recipe)
        log = _Log(run_dir / "train.log", encoding="utf-8")
        log.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        if early_log is not None:
            early_log.setTarget(log)
            early_log.flush()
            early_log.flushLevel = logging.DEBUG  # from now on, at once
            yield
            return
        logging.getLogger().addHandler(log)
        try:
            yield
        finally:
            logging.getLogger().removeHandler(log)
            log.close()


class _Log(logging.FileHandler):
    """The log file; on a full disk it misses lines, and says nothing of that: what fills the disk
    has an error of its own.
    """

    def handleError(self, record: logging.LogRecord) -> None:
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


def _describe(run_dir: Path, recipe: Recipe) -> None:
    values, hidden = recipe.saved()
    if hidden:
        logger.info("[GTPO] Not saved with the recipe: %s", ", ".join(hidden))
    with written_aside(run_dir / "recipe.yaml") as aside, aside.open("w", encoding="utf-8") as file:
        write_yaml(values, file)
    write_whole(run_dir / "versions.json", json.dumps(versions(), indent=2) + "\n")
    keep_identity(run_dir)


def versions() -> dict[str, str]:
    """Our version and commit, the libraries', Python and the platform; `not installed` where a
    library is missing.
    """
    found = {"gtpo": gtpo.__version__, "commit": _commit()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "not installed"
    return {**found, "python": platform.python_version(), "platform": platform.platform()}


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


# ---- going back to a checkpoint


def rewind(start: Start) -> None:
    """Take out of the run directory what came after `start`: steps that will be repeated.

    What whole checkpoints later than that have seen is no accident: it goes to the folder
    `abandoned`. Of another run's checkpoint, its part of that run's completions and evaluations is
    copied first.
    """
    run_dir, step = start.run_dir, start.checkpoint.step if start.checkpoint else 0
    size = start.checkpoint.manifest.get("completions", 0) if start.checkpoint else 0
    remove_leftovers(run_dir)
    if start.from_another_run:
        _copy(start.checkpoint.folder.parent, run_dir, size, step)
    for name in AT_THE_END:
        remove(run_dir / name)
    later = [folder for folder in checkpoint_folders(run_dir) if checkpoint_step(folder) > step]
    keep = run_dir / ABANDONED if later else None
    for folder in later:
        logger.warning(
            "[GTPO] %s is set aside in %s: the run goes on from an earlier step", folder.name, keep
        )
        _set_aside(folder, keep)
    _cut(run_dir / "completions.jsonl", size, keep)
    for file in sorted((run_dir / "evaluation").glob("*.jsonl")):
        seen = _evaluated_step(file)
        if file.stem == "after" and seen == step and start.adds_steps:
            move_into_place(file, file.with_stem(f"step-{step}"))
        elif seen is None or seen > step or start.discards_evaluations:
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
        move_into_place(path, keep / path.name)
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
