"""Trackers such as wandb and TensorBoard: where they write, and that they stop no training."""

import contextlib
import importlib.util
import json
import logging
import os
import secrets
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from gtpo.errors import RecipeError
from gtpo.hooks.seams import TRACKER_EVENTS, wrap
from gtpo.recipe import Recipe
from gtpo.runs.start import Start
from gtpo.system.whole_files import write_whole

logger = logging.getLogger(__name__)

RUN_ID_FILE = "trackers.json"  # the id under which trackers know the run of a run directory


def prepare_trackers(recipe: Recipe, run_dir: Path) -> None:
    """Lets the trackers write into the run directory, and never ask a question.

    Raises RecipeError if a tracker is not installed.
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
    # A key that the recipe sets wins over the environment. A default does not.
    for name in recipe.wandb.model_fields_set:
        if (value := getattr(recipe.wandb, name)) is not None:
            os.environ[f"WANDB_{name.upper()}"] = value
    if "WANDB_MODE" not in os.environ and not _has_wandb_login():
        os.environ["WANDB_MODE"] = "offline"
        logger.warning(
            "[GTPO] wandb: no login found, so this run is kept offline; `wandb sync` uploads it"
            " later"
        )


# ---- one run of a tracker per run directory


@contextlib.contextmanager
def tracker_run(recipe: Recipe, start: Start) -> Iterator[None]:
    """Inside, trackers continue the run of a resumed run directory, or begin a new one.

    Afterwards a wandb run that began inside is finished, and its files are complete. The
    environment is what it was before. So the next run of this process has its own tracker run.
    """
    had_wandb_run, exit_code = _has_wandb_run(), 0
    continues = start.checkpoint is not None and not start.from_another_run
    tensorboard_folders = sorted((start.run_dir / "runs").glob("*")) if continues else []
    with _environment_restored():
        if "wandb" in recipe.training.report_to:
            run_id = _saved_run_id(start.run_dir) if continues else None
            os.environ.setdefault("WANDB_RUN_ID", run_id or secrets.token_hex(4))
            os.environ.setdefault("WANDB_RESUME", "allow")
        if tensorboard_folders:
            os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(tensorboard_folders[0]))
        try:
            yield
        except BaseException as error:
            exit_code = getattr(error, "exit_code", 1)
            raise
        finally:
            if _has_wandb_run() and not had_wandb_run:
                _finish_wandb(exit_code)


def save_run_id(run_dir: Path) -> None:
    """Writes down the wandb id of this run, if wandb tracks it."""
    if run_id := os.environ.get("WANDB_RUN_ID"):
        write_whole(run_dir / RUN_ID_FILE, json.dumps({"wandb": run_id}) + "\n")


def _saved_run_id(run_dir: Path) -> str | None:
    try:
        return json.loads((run_dir / RUN_ID_FILE).read_text(encoding="utf-8"))["wandb"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


@contextlib.contextmanager
def _environment_restored() -> Iterator[None]:
    """Afterwards the environment variables of wandb and TensorBoard are what they were before."""

    def tracker_variables() -> dict[str, str]:
        prefixes = ("WANDB_", "TENSORBOARD_")
        return {name: value for name, value in os.environ.items() if name.startswith(prefixes)}

    before = tracker_variables()
    try:
        yield
    finally:
        for name in tracker_variables():
            del os.environ[name]
        os.environ.update(before)


def _has_wandb_run() -> bool:
    return getattr(sys.modules.get("wandb"), "run", None) is not None


def _finish_wandb(exit_code: int) -> None:
    """Finishes wandb's run, and lets the process that writes its files end.

    That process keeps the environment of its first run, so the next run needs another process.
    """
    import wandb

    try:
        wandb.finish(exit_code=exit_code)
        wandb.teardown(exit_code)
    except Exception as error:  # its process may have been killed
        logger.debug("wandb did not finish: %s: %s", type(error).__name__, error)


def _has_wandb_login() -> bool:
    """Whether wandb has a key, so that it would not ask for one."""
    import wandb
    from wandb.sdk.lib import wbauth  # wandb 0.31.0; its public login() asks questions

    settings = wandb.Settings()
    return bool(
        os.environ.get("WANDB_API_KEY")
        or settings.identity_token_file
        or wbauth.read_netrc_auth(host=settings.base_url)
    )


# ---- a tracker that fails while the run trains


def shield_trackers(trainer) -> None:
    """Lets training continue when a tracker fails after the run has begun.

    The failure is logged once, and the tracker is not called again.
    """
    for callback in trainer.callback_handler.callbacks:
        if type(callback).__module__.startswith("transformers.integrations"):
            _TrackerShield(callback)


class _TrackerShield:
    """Catches the errors of a tracker's callback, and of `wandb.log`, which TRL calls as well.

    An error in `on_train_begin` is not caught: the user should know before the run has trained for
    days without a tracker.
    """

    # Takes the last shield of this process away from `wandb.log`.
    unshield_wandb_log: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self, callback):
        self.name = type(callback).__name__.removesuffix("Callback").lower()
        self.failed = False
        for event in TRACKER_EVENTS:
            around = self._begin if event == "on_train_begin" else self._report
            wrap(callback, event, around)

    def _begin(self, begin: Callable, *args, **kwargs) -> None:
        begin(*args, **kwargs)
        wandb = sys.modules.get("wandb")
        if self.name == "wandb" and wandb.run is not None:
            # wandb.init replaces wandb.log, but not if the program has a run open already.
            _TrackerShield.unshield_wandb_log()
            undo = wrap(wandb, "log", self._report)
            _TrackerShield.unshield_wandb_log = staticmethod(undo)

    def _report(self, report: Callable, *args, **kwargs) -> None:
        if self.failed:
            return
        try:
            report(*args, **kwargs)
        except Exception as error:  # the tracker's code, process or network
            self.failed = True
            logger.warning(
                "[GTPO] %s fails (%s: %s); the run continues without it, and the run directory has"
                " everything",
                self.name,
                type(error).__name__,
                str(error).strip().split("\n")[0],
            )
