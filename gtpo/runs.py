"""A run's directory: whose it is, what it holds, and where its trackers write."""

import importlib.metadata
import importlib.util
import json
import logging
import logging.handlers
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import gtpo
from gtpo.cli import to_yaml
from gtpo.recipe import Recipe, RecipeError
from gtpo.safe_text import SafeFormatter

logger = logging.getLogger(__name__)

LIBRARIES = ("torch", "transformers", "trl", "peft", "datasets", "accelerate", "unsloth", "unsloth_zoo", "bitsandbytes",
             "vllm", "math-verify", "wandb")


def check_free(run_dir: Path, *, overwrite: bool) -> None:
    """Raises RecipeError if the run directory holds something that must not be lost, or cannot be made."""
    if run_dir.exists() and not run_dir.is_dir():
        raise RecipeError(f"output_root: {run_dir} is a file; choose another output_root or run_name")
    if run_dir.is_dir() and any(run_dir.iterdir()):
        if not overwrite:
            raise RecipeError(f"run_name: the run directory {run_dir} exists already; choose another with --run-name, or "
                              "replace it with --overwrite")
        if not (run_dir / "recipe.yaml").is_file():
            raise RecipeError(f"run_name: {run_dir} is no run directory of ours (it has no recipe.yaml) and will not be "
                              "overwritten; choose another with --run-name, or remove it")
    parent = next(p for p in run_dir.absolute().parents if p.exists())
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise RecipeError(f"output_root: {parent} cannot be written to ({error.strerror}); choose another output_root") from None
    if len(os.fsencode(run_dir.name)) > 255:
        raise RecipeError("run_name: the name of the run directory would be longer than 255 bytes; use a shorter one")


def create(run_dir: Path, recipe: Recipe, *, overwrite: bool, early_log: logging.handlers.MemoryHandler | None) -> None:
    """Make the run directory with the resolved recipe, the versions and the log, which begins with `early_log`."""
    if overwrite and run_dir.is_dir():
        shutil.rmtree(run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    values, secrets = recipe.saved()
    if secrets:
        logger.info("[GTPO] Not saved with the recipe: %s", ", ".join(secrets))
    try:
        with (run_dir / "recipe.yaml").open("x", encoding="utf-8") as file:  # of two runs at once, one gets it
            to_yaml(values, file)
    except FileExistsError:
        raise RecipeError(f"run_name: another run has just taken {run_dir}; choose another name with --run-name") from None
    (run_dir / "versions.json").write_text(json.dumps(versions(), indent=2) + "\n", encoding="utf-8")
    log = logging.FileHandler(run_dir / "train.log", encoding="utf-8")
    log.setFormatter(SafeFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if early_log is None:
        logging.getLogger().addHandler(log)
    else:
        early_log.setTarget(log)
        early_log.flush()
        early_log.flushLevel = logging.DEBUG  # from now on, at once


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
