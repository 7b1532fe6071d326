"""A run's directory: whose it is, and what it holds."""

import contextlib
import importlib.metadata
import json
import logging
import logging.handlers
import platform
import subprocess
import sys
from pathlib import Path

import gtpo
from gtpo.recipe import Recipe
from gtpo.recipe.command_line import to_yaml
from gtpo.runs.rewinding import rewind
from gtpo.runs.start import Start, check_still, only_run_in
from gtpo.runs.trackers import keep_identity
from gtpo.system.safe_text import SafeFormatter
from gtpo.system.whole_files import remove, write_whole, written_aside

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


@contextlib.contextmanager
def opened(start: Start, recipe: Recipe, early_log: logging.handlers.MemoryHandler | None):
    """Inside, the run directory is this process's: with the resolved recipe, the versions and the
    log, begun with `early_log`.

    Raises RecipeError if another process trains in it.
    """
    run_dir = start.run_dir
    if start.replaces and run_dir.is_dir():
        with only_run_in(run_dir):
            remove(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    with only_run_in(run_dir):
        check_still(start)
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
        to_yaml(values, file)
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
