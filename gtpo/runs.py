"""A run's directory: whose it is, what it holds, and where its trackers write."""

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import logging.handlers
import os
import platform
import secrets
import subprocess
from pathlib import Path

import gtpo
from gtpo.cli import to_yaml
from gtpo.recipe import Recipe, RecipeError
from gtpo.rewinding import rewind
from gtpo.safe_text import SafeFormatter
from gtpo.starts import Start, check_still, only_run_in
from gtpo.whole_files import remove, write_whole, written_aside

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "unsloth", "unsloth_zoo", "bitsandbytes",
             "vllm", "math-verify", "wandb")
TRACKERS = "trackers.json"  # which of a tracker's runs this one is


@contextlib.contextmanager
def opened(start: Start, recipe: Recipe, early_log: logging.handlers.MemoryHandler | None):
    """Inside, the run directory is this process's: with the resolved recipe, the versions and the log, begun with `early_log`.

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
        log = logging.FileHandler(run_dir / "train.log", encoding="utf-8")
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


def _describe(run_dir: Path, recipe: Recipe) -> None:
    values, hidden = recipe.saved()
    if hidden:
        logger.info("[GTPO] Not saved with the recipe: %s", ", ".join(hidden))
    with written_aside(run_dir / "recipe.yaml") as aside, aside.open("w", encoding="utf-8") as file:
        to_yaml(values, file)
    write_whole(run_dir / "versions.json", json.dumps(versions(), indent=2) + "\n")
    if run_id := os.environ.get("WANDB_RUN_ID"):
        write_whole(run_dir / TRACKERS, json.dumps({"wandb": run_id}) + "\n")


def versions() -> dict[str, str]:
    """Our version and commit, the libraries', Python and the platform; `not installed` where a library is missing."""
    found = {"gtpo": gtpo.__version__, "commit": _commit()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            found[library] = "not installed"
    return {**found, "python": platform.python_version(), "platform": platform.platform()}


def prepare_trackers(recipe: Recipe, run_dir: Path) -> None:
    """Let the trackers write into the run directory and never ask a question; raises RecipeError for a missing one."""
    for tracker in recipe.training.report_to:
        if tracker in ("wandb", "tensorboard", "trackio") and importlib.util.find_spec(tracker) is None:
            raise RecipeError(f"training.report_to: the package {tracker} is not installed; run: pip install {tracker}, or "
                              "use none")
    if "wandb" not in recipe.training.report_to:
        return
    os.environ.setdefault("WANDB_DIR", str(run_dir))
    os.environ.setdefault("WANDB_PROJECT", recipe.wandb.project)
    for name in recipe.wandb.model_fields_set:  # what a recipe says beats the caller's environment, a default does not
        if (value := getattr(recipe.wandb, name)) is not None:
            os.environ[f"WANDB_{name.upper()}"] = value
    if "WANDB_MODE" not in os.environ and not _wandb_login():
        os.environ["WANDB_MODE"] = "offline"
        logger.warning("[GTPO] wandb: no login found, so this run is kept offline; `wandb sync` uploads it later")


@contextlib.contextmanager
def one_tracker_run(recipe: Recipe, start: Start):
    """Inside, trackers go on with the run that a resumed run directory tells of; a new run has an identity to be kept there."""
    names = ("WANDB_RUN_ID", "WANDB_RESUME", "TENSORBOARD_LOGGING_DIR")
    before = {name: os.environ.get(name) for name in names}
    goes_on = start.checkpoint is not None and not start.copies
    if "wandb" in recipe.training.report_to:
        os.environ.setdefault("WANDB_RUN_ID", (goes_on and _wandb_run(start.run_dir)) or secrets.token_hex(4))
        os.environ.setdefault("WANDB_RESUME", "allow")
    folders = sorted((start.run_dir / "runs").glob("*")) if goes_on else []
    if folders:
        os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folders[0]))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _wandb_run(run_dir: Path) -> str | None:
    try:
        return json.loads((run_dir / TRACKERS).read_text(encoding="utf-8"))["wandb"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _wandb_login() -> bool:
    """Whether a key is at hand, so that wandb would not ask for one."""
    import wandb
    from wandb.sdk.lib import wbauth  # wandb 0.31.0; its public login() asks questions

    settings = wandb.Settings()
    return bool(os.environ.get("WANDB_API_KEY") or settings.identity_token_file
                or wbauth.read_netrc_auth(host=settings.base_url))


def _commit() -> str:
    try:
        git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=Path(__file__).parent,
                             capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return git.stdout.strip() or "unknown"
