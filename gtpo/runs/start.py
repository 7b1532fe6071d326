"""How a run starts: in a new directory, over an old one, or from a checkpoint.

`resolve_start` decides it before anything is written, and refuses what would lose work.
"""

import contextlib
import json
import logging
import os
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from gtpo.errors import Mistake, RecipeError
from gtpo.models.adapters import checkpoint_folders, checkpoint_step
from gtpo.recipe import Recipe
from gtpo.recipe.differences import MAY_GROW, Difference, recipe_differences
from gtpo.runs import checkpoints
from gtpo.runs.checkpoints import Checkpoint

logger = logging.getLogger(__name__)

LOCK = ".lock"  # locked while a process trains in the run directory; the file alone means nothing
# The optimizer's files as transformers, FSDP and DeepSpeed name them.
OPTIMIZER_FILES = ("optimizer.pt", "optimizer.bin", "global_step")
# Keys whose values decide what a held-out evaluation measures.
EVALUATION_KEYS = (
    "evaluation.",
    "dataset.",
    "model.",
    "training.max_prompt_length",
    "training.chat_template_kwargs",
    "training.seed",
)

GENERATION_KEY = "training.generation_kwargs"


@dataclass(frozen=True)
class Request:
    """What the command line asks for: `--resume`, `--force-resume` and `--overwrite`.

    `resume` is None without the flag, "" without a path, and else the path of a checkpoint or of a
    run directory.
    """

    resume: str | None = None
    force: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class Start:
    """How a run starts. Without a checkpoint it starts with its first step."""

    run_dir: Path
    checkpoint: Checkpoint | None = None
    overwrites: bool = False  # the contents of the run directory are deleted first
    finished_steps: int | None = None  # the steps of a run that is finished and has no more to do
    restarts: bool = False  # --resume found no checkpoint, so the run starts again
    forced_changes: tuple[Difference, ...] = ()  # differences that --force-resume accepted
    adds_steps: bool = False  # the run becomes longer than the checkpoint's recipe said

    @property
    def from_another_run(self) -> bool:
        """Whether the checkpoint is in another run's directory, which must not change."""
        return (
            self.checkpoint is not None
            and self.checkpoint.folder.parent.resolve() != self.run_dir.resolve()
        )

    @property
    def use_recipe_optimizer(self) -> bool:
        """Whether the recipe's optimizer settings and schedule replace the checkpoint's."""
        return bool(self.forced_changes) or self.adds_steps

    @property
    def turn_ends_from(self) -> Path | None:
        """The checkpoint whose ends of a turn are used; None if the recipe's are.

        A forced change of training.generation_kwargs may name other ends.
        """
        changed = any(change.key.startswith(GENERATION_KEY) for change in self.forced_changes)
        return self.checkpoint.folder if self.checkpoint and not changed else None

    @property
    def discards_evaluations(self) -> bool:
        """Whether a forced change makes earlier evaluations incomparable with later ones."""
        return any(change.key.startswith(EVALUATION_KEYS) for change in self.forced_changes)


def resolve_start(recipe: Recipe, request: Request, processes: int = 1) -> Start:
    """How the run of `recipe` starts, if it has `processes` processes. Writes nothing.

    Logs from which step a run resumes, and which keys of its recipe changed. Raises RecipeError if
    the run directory cannot be used, and if the checkpoint cannot be resumed from.
    """
    run_dir = Path(recipe.output_dir())
    if request.resume is not None and request.overwrite:
        raise RecipeError(
            "--resume", "needs the checkpoints that --overwrite would delete; give one of them"
        )
    _check_writable(run_dir)
    if request.resume is None:
        return _new_start(run_dir, request)
    if request.resume:
        start = Start(run_dir, _requested_checkpoint(Path(request.resume)))
        if start.from_another_run:
            _check_free(run_dir, request)
    else:
        start = Start(run_dir, checkpoints.last_whole(run_dir))
    if start.checkpoint is None:
        logger.info(
            "[GTPO] --resume: %s has no checkpoint yet, so the run starts from the beginning",
            run_dir,
        )
        return replace(start, restarts=True)
    return _resumed_start(start, recipe, request, processes)


def within_rollout_error(checkpoint: Checkpoint) -> RecipeError:
    """The error if other processes than those of `checkpoint` would continue its rollout."""
    processes = checkpoint.manifest["processes"]
    return RecipeError(
        "--resume",
        f"{checkpoint.folder} lies within a rollout, which is spread over {processes}"
        f" process{'' if processes == 1 else 'es'}; use as many, or a checkpoint between two"
        " rollouts",
    )


def _new_start(run_dir: Path, request: Request) -> Start:
    """A start without --resume; raises RecipeError if the run directory holds a run."""
    _check_free(run_dir, request)
    if not request.overwrite and (run_dir / "recipe.yaml").is_file():
        logger.info(
            "[GTPO] %s holds a run that stopped before its first step; it starts again", run_dir
        )
    return Start(run_dir, overwrites=request.overwrite)


def _resumed_start(start: Start, recipe: Recipe, request: Request, processes: int) -> Start:
    """`start` compared with the recipe of its checkpoint; raises RecipeError if they differ."""
    checkpoint, manifest = start.checkpoint, start.checkpoint.manifest
    if not any(name.startswith(OPTIMIZER_FILES) for name in manifest["files"]):
        raise RecipeError(
            checkpoint.folder,
            "holds the adapter alone (training.save_only_model); start a new run with "
            f"--model.adapter {checkpoint.folder}",
        )
    if manifest.get("processes", processes) != processes and manifest.get("within_rollout"):
        raise within_rollout_error(checkpoint)
    changes, harmless_changes = recipe_differences(
        manifest["recipe"], recipe, (manifest["processes"], processes)
    )
    if changes and not request.force:
        raise _changed_recipe_error(checkpoint, changes)
    adds_steps = any(change.key in MAY_GROW for change in harmless_changes)
    finished = run_state(start.run_dir).finished_steps
    is_finished = finished is not None and checkpoint.step == finished
    if is_finished and not changes and not adds_steps and not start.from_another_run:
        return replace(start, finished_steps=finished)
    logger.info(
        "[GTPO] Resuming from %s, after step %d of %d",
        checkpoint.folder,
        checkpoint.step,
        manifest["max_steps"],
    )
    for change in changes:
        logger.warning("[GTPO] Changed, and forced: %s", change)
    for change in harmless_changes:
        note = "; from now on the learning rate follows the schedule of the longer run"
        logger.info("[GTPO] Changed: %s%s", change, note if change.key in MAY_GROW else "")
    return replace(start, forced_changes=tuple(changes), adds_steps=adds_steps)


def _changed_recipe_error(checkpoint: Checkpoint, changes: list[Difference]) -> RecipeError:
    summary = Mistake(
        "--resume",
        f"the recipe is not the one that {checkpoint.folder} was trained with; undo the changes, or"
        " resume all the same with --force-resume",
    )
    return RecipeError.of([summary, *(Mistake("", str(change)) for change in changes)])


def _requested_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at the path of --resume, or the last whole one of a run directory."""
    is_run_dir = path.is_dir() and bool(checkpoint_folders(path))
    if is_run_dir and not (path / checkpoints.MANIFEST).is_file():
        return checkpoints.last_whole(path)
    try:
        return checkpoints.read(path)
    except RecipeError as error:
        raise RecipeError(
            "--resume", f"{error}; to train on its weights in a new run, give --model.adapter"
        ) from None


# ---- what a run directory holds


@dataclass(frozen=True)
class RunState:
    """How far the run in a directory has come."""

    finished_steps: int | None = None  # None unless the run is finished
    last_checkpoint_step: int | None = None
    has_trained: bool = False


def run_state(run_dir: Path) -> RunState:
    """How far a run has come, by names of files and by trainer_state.json.

    A run that is still training looks like one that stopped.
    """
    folders = checkpoint_folders(run_dir)
    try:
        # The last file that a run writes.
        state = json.loads((run_dir / "trainer_state.json").read_text(encoding="utf-8"))
        steps, max_steps = int(state["global_step"]), int(state["max_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        steps, max_steps = 0, 1
    completions = run_dir / "completions.jsonl"
    return RunState(
        finished_steps=steps if steps >= max_steps else None,
        last_checkpoint_step=checkpoint_step(folders[-1]) if folders else None,
        has_trained=bool(folders) or completions.is_file() and completions.stat().st_size > 0,
    )


def check_still_free(start: Start) -> None:
    """Raises RecipeError if another run has used the directory since `resolve_start`."""
    # TRL makes the folder beforehand; only a run has a recipe in it.
    is_run_dir = (start.run_dir / "recipe.yaml").is_file()
    needs_free = (start.checkpoint is None or start.from_another_run) and not start.restarts
    if is_run_dir and needs_free:
        _check_free(start.run_dir, Request())


def _check_free(run_dir: Path, request: Request) -> None:
    """Raises RecipeError if the run directory holds something that must not be lost."""
    if not run_dir.is_dir() or not any(path.name != LOCK for path in run_dir.iterdir()):
        return
    state = run_state(run_dir)
    has_recipe = (run_dir / "recipe.yaml").is_file()
    has_run = state.finished_steps is not None or state.has_trained
    if not has_recipe and (request.overwrite or not has_run):
        raise RecipeError(
            "run_name",
            f"{run_dir} is not a run directory (it has no recipe.yaml) and will not be "
            "overwritten; choose another with --run-name, or remove it",
        )
    if request.overwrite or not has_run:
        return
    others = "choose another with --run-name, or replace it with --overwrite"
    if state.finished_steps is not None:
        sentence = (
            f"holds a finished run of {state.finished_steps} steps; {others}, or train it further"
            " with --resume and more training.max_steps"
        )
    elif state.last_checkpoint_step is not None:
        sentence = (
            f"holds a run whose last checkpoint is that of step {state.last_checkpoint_step};"
            f" continue with --resume, {others}"
        )
    else:
        sentence = (
            "holds a run that stopped before its first checkpoint; start it again with --resume,"
            f" {others}"
        )
    raise RecipeError("run_name", f"the run directory {run_dir} {sentence}")


def _check_writable(run_dir: Path) -> None:
    """Raises RecipeError if the run directory cannot be made, or cannot be written to."""
    if run_dir.exists() and not run_dir.is_dir():
        raise RecipeError(
            "output_root", f"{run_dir} is a file; choose another output_root or run_name"
        )
    if len(os.fsencode(run_dir.name)) > 255:
        raise RecipeError(
            "run_name",
            "the name of the run directory would be longer than 255 bytes; use a shorter one",
        )
    folders = (run_dir.absolute(), *run_dir.absolute().parents)
    parent = next(folder for folder in folders if folder.exists())
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise RecipeError(
            "output_root",
            f"{parent} cannot be written to ({error.strerror}); choose another output_root",
        ) from None


@contextlib.contextmanager
def locked(run_dir: Path):
    """Inside, the run directory belongs to this process. The lock ends with the process.

    Raises RecipeError if another process trains in the directory.
    """
    try:
        import fcntl
    except ImportError:  # no POSIX
        yield
        return
    with (run_dir / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RecipeError(
                "run_name",
                f"another process trains in {run_dir} right now; wait for it, or choose another"
                " directory with --run-name",
            ) from None
        except OSError:  # a file system without locks
            logger.debug("No locks in %s", run_dir)
        yield
