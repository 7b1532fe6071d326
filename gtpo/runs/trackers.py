"""The trackers: where they write, which of their runs this is, and that they do not stop the
training.
"""

import contextlib
import functools
import importlib.util
import json
import logging
import os
import secrets
import sys
from pathlib import Path

from gtpo.errors import RecipeError
from gtpo.recipe import Recipe
from gtpo.runs.start import Start
from gtpo.system.whole_files import write_whole

logger = logging.getLogger(__name__)

IDENTITY = "trackers.json"  # which of a tracker's runs a run directory is
# once it has begun
EVENTS = (
    "on_epoch_begin",
    "on_step_end",
    "on_log",
    "on_evaluate",
    "on_save",
    "on_epoch_end",
    "on_train_end",
)


def prepare_trackers(recipe: Recipe, run_dir: Path) -> None:
    """Let the trackers write into the run directory and never ask a question; raises RecipeError
    for a missing one.
    """
    for tracker in recipe.training.report_to:
        if tracker != "none" and importlib.util.find_spec(tracker) is None:
            raise RecipeError(
                "training.report_to",
                f"the package {tracker} is not installed; run: pip install {tracker}, or use none",
            )
    if "wandb" not in recipe.training.report_to:
        return
    os.environ.setdefault("WANDB_DIR", str(run_dir))
    os.environ.setdefault("WANDB_PROJECT", recipe.wandb.project)
    # what a recipe says beats the caller's environment, a default does not
    for name in recipe.wandb.model_fields_set:
        if (value := getattr(recipe.wandb, name)) is not None:
            os.environ[f"WANDB_{name.upper()}"] = value
    if "WANDB_MODE" not in os.environ and not _wandb_login():
        os.environ["WANDB_MODE"] = "offline"
        logger.warning(
            "[GTPO] wandb: no login found, so this run is kept offline; `wandb sync` uploads it"
            " later"
        )


@contextlib.contextmanager
def one_tracker_run(recipe: Recipe, start: Start):
    """Inside, trackers go on with the run that a resumed run directory tells of; a new run has an
    identity to be kept there.

    Afterwards a wandb run that began inside is finished and its files are whole, and the
    environment is what it was: the next run of this process is another one, in its own directory.
    """
    theirs, exit_code = _wandb_runs(), 0
    goes_on = start.checkpoint is not None and not start.from_another_run
    folders = sorted((start.run_dir / "runs").glob("*")) if goes_on else []
    with _same_environment_afterwards():
        if "wandb" in recipe.training.report_to:
            os.environ.setdefault(
                "WANDB_RUN_ID", (goes_on and _wandb_run(start.run_dir)) or secrets.token_hex(4)
            )
            os.environ.setdefault("WANDB_RESUME", "allow")
        if folders:
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(folders[0]))
        try:
            yield
        except BaseException as error:
            exit_code = getattr(error, "exit_code", 1)
            raise
        finally:
            if _wandb_runs() and not theirs:
                _end_wandb(exit_code)


@contextlib.contextmanager
def _same_environment_afterwards():
    def trackers() -> dict[str, str]:
        return {
            name: value
            for name, value in os.environ.items()
            if name.startswith(("WANDB_", "TENSORBOARD_"))
        }

    before = trackers()
    try:
        yield
    finally:
        for name in trackers():
            del os.environ[name]
        os.environ.update(before)


def _wandb_runs() -> bool:
    return getattr(sys.modules.get("wandb"), "run", None) is not None


def _end_wandb(exit_code: int) -> None:
    """Finish wandb's run and let its own process write its files to their end; it keeps the
    environment of its first run.
    """
    import wandb

    try:
        wandb.finish(exit_code=exit_code)
        wandb.teardown(exit_code)
    except Exception as error:  # its process may have been killed
        logger.debug("wandb did not finish: %s: %s", type(error).__name__, error)


def keep_identity(run_dir: Path) -> None:
    """Write down which of a tracker's runs this is."""
    if run_id := os.environ.get("WANDB_RUN_ID"):
        write_whole(run_dir / IDENTITY, json.dumps({"wandb": run_id}) + "\n")


def let_training_go_on(trainer) -> None:
    """A tracker that fails once training has begun is told once and left out from then on."""
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__module__.startswith("transformers.integrations"):
            _Shield(callback)


class _Shield:
    """Around the events of a tracker's callback, and around wandb.log, which TRL calls too.

    One that fails to begin is a mistake that somebody wants to know before days have passed: that
    error is not caught.
    """

    def __init__(self, callback):
        self.name, self.failed = type(callback).__name__.removesuffix("Callback").lower(), False
        callback.on_train_begin = functools.partial(self._begin, callback.on_train_begin)
        for event in EVENTS:
            setattr(callback, event, functools.partial(self._report, getattr(callback, event)))

    def _begin(self, begin, *args, **kwargs):
        begin(*args, **kwargs)
        wandb = sys.modules.get("wandb")
        if self.name == "wandb" and wandb.run is not None:
            wandb.log = functools.partial(self._report, wandb.log)  # until the next wandb.init

    def _report(self, report, *args, **kwargs):
        if self.failed:
            return
        try:
            report(*args, **kwargs)
        except Exception as error:  # somebody else's code, process and network
            self.failed = True
            logger.warning(
                "[GTPO] %s fails (%s: %s); the run goes on without it, and its own files have"
                " everything",
                self.name,
                type(error).__name__,
                str(error).strip().split("\n")[0],
            )


def _wandb_run(run_dir: Path) -> str | None:
    try:
        return json.loads((run_dir / IDENTITY).read_text(encoding="utf-8"))["wandb"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _wandb_login() -> bool:
    """Whether a key is at hand, so that wandb would not ask for one."""
    import wandb
    from wandb.sdk.lib import wbauth  # wandb 0.31.0; its public login() asks questions

    settings = wandb.Settings()
    return bool(
        os.environ.get("WANDB_API_KEY")
        or settings.identity_token_file
        or wbauth.read_netrc_auth(host=settings.base_url)
    )
