"""Where a run starts: in a new directory, in the place of an old one, or from a checkpoint; and
what stands against it.
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
from gtpo.recipe.differences import MAY_GROW, recipe_differences
from gtpo.runs import checkpoints
from gtpo.runs.checkpoints import Checkpoint

logger = logging.getLogger(__name__)


LOCK = ".lock"  # held as long as a process trains in a run directory; as a file it means nothing
# of transformers itself, FSDP and DeepSpeed
OPTIMIZER = ("optimizer.pt", "optimizer.bin", "global_step")
EVALUATED = (
    "evaluation.",
    "dataset.",
    "model.",
    "training.max_prompt_length",
    "training.chat_template_kwargs",
    "training.seed",
)


@dataclass(frozen=True)
class Start:
    """How a run begins. Without a checkpoint it begins with its first step."""

    run_dir: Path
    checkpoint: Checkpoint | None = None
    overwrites: bool = False  # what the run directory holds goes, with --overwrite
    finished_steps: int | None = None  # there is nothing left to do after that many steps
    restarts: bool = False  # resumed without a checkpoint
    forced_changes: tuple[str, ...] = ()  # what of the recipe was forced
    adds_steps: bool = False

    @property
    def from_another_run(self) -> bool:
        """Whether the checkpoint is another run's, which stays as it is."""
        return (
            self.checkpoint is not None
            and self.checkpoint.folder.parent.resolve() != self.run_dir.resolve()
        )

    @property
    def use_recipe_optimizer(self) -> bool:
        """Whether optimizer and schedule are to be the recipe's, since the checkpoint's were
        others.
        """
        return bool(self.forced_changes) or self.adds_steps

    @property
    def discards_evaluations(self) -> bool:
        """Whether earlier evaluations do not compare with those to come."""
        return any(change.startswith(EVALUATED) for change in self.forced_changes)


@dataclass(frozen=True)
class Request:
    """What the command line says of it; `resume` is "" where no checkpoint is named, None where
    nothing is resumed.
    """

    resume: str | None = None
    force: bool = False
    overwrite: bool = False


def resolve_start(recipe: Recipe, request: Request, processes: int = 1) -> Start:
    """How the run of `recipe` starts, said where it resumes; nothing is written. Raises RecipeError
    for what stands against it.
    """
    run_dir = Path(recipe.output_dir())
    if request.resume is not None and request.overwrite:
        raise RecipeError(
            "--resume", "goes on with what --overwrite would delete; give one of them"
        )
    _check_writable(run_dir)
    if request.resume:
        checkpoint = _named(Path(request.resume))
        start = Start(run_dir, checkpoint)
        if start.from_another_run:
            _check_free(run_dir, request)
    elif request.resume is None:
        _check_free(run_dir, request)
        if not request.overwrite and (run_dir / "recipe.yaml").is_file():
            logger.info(
                "[GTPO] %s holds a run that stopped before its first step; it starts again", run_dir
            )
        return Start(run_dir, overwrites=request.overwrite)
    else:
        checkpoint = checkpoints.last_whole(run_dir)
        start = Start(run_dir, checkpoint)
    if checkpoint is None:
        logger.info(
            "[GTPO] --resume: %s has no checkpoint yet, so the run starts from the beginning",
            run_dir,
        )
        return replace(start, restarts=True)
    return _resumed(start, recipe, request, processes)


def _resumed(start: Start, recipe: Recipe, request: Request, processes: int) -> Start:
    checkpoint, told = start.checkpoint, start.checkpoint.manifest
    if not any(name.startswith(OPTIMIZER) for name in told["files"]):
        raise RecipeError(
            checkpoint.folder,
            "holds the adapter alone (training.save_only_model); start a new run with "
            f"--model.adapter {checkpoint.folder}",
        )
    if told.get("processes", processes) != processes and told.get("within_rollout"):
        raise within_rollout_error(checkpoint)
    matter, harmless = recipe_differences(told["recipe"], recipe, (told["processes"], processes))
    if matter and not request.force:
        raise RecipeError.of(
            [
                Mistake(
                    "--resume",
                    f"the recipe is not the one that {checkpoint.folder} was trained with; undo the"
                    " changes, or go on all the same with --force-resume",
                ),
                *(Mistake("", str(difference)) for difference in matter),
            ]
        )
    finished = held(start.run_dir).finished
    more = any(difference.key in MAY_GROW for difference in harmless)
    if (
        finished is not None
        and not matter
        and not more
        and not start.from_another_run
        and checkpoint.step == finished
    ):
        return replace(start, finished_steps=finished)
    logger.info(
        "[GTPO] Resuming from %s: goes on after step %d of %d",
        checkpoint.folder,
        checkpoint.step,
        told["max_steps"],
    )
    for difference in matter:
        logger.warning("[GTPO] Changed, and forced: %s", difference)
    for difference in harmless:
        logger.info(
            "[GTPO] Changed: %s%s",
            difference,
            (
                "; from here on the learning rate is that of a run of so many steps"
                if difference.key in MAY_GROW
                else ""
            ),
        )
    return replace(start, forced_changes=tuple(map(str, matter)), adds_steps=more)


def within_rollout_error(checkpoint: Checkpoint) -> RecipeError:
    """The error of a checkpoint within a rollout that other processes than its own would go on
    from.
    """
    processes = checkpoint.manifest["processes"]
    return RecipeError(
        "--resume",
        f"{checkpoint.folder} lies within a rollout, which is spread over {processes}"
        f" process{'' if processes == 1 else 'es'}; go on with as many, or from a"
        " checkpoint between two rollouts",
    )


def _named(path: Path) -> Checkpoint:
    """The checkpoint that --resume PATH names: itself, or the last whole one of a run directory."""
    if not (path / checkpoints.MANIFEST).is_file() and (
        checkpoint_folders(path) if path.is_dir() else []
    ):
        return checkpoints.last_whole(path)
    try:
        return checkpoints.read(path)
    except RecipeError as error:
        raise RecipeError(
            "--resume", f"{error}; to train on its weights in a new run, give --model.adapter"
        ) from None


# ---- what a run directory holds


@dataclass(frozen=True)
class Held:
    """What a run directory holds of a run."""

    finished: int | None = None  # steps
    stopped: int | None = None  # the last checkpoint's step
    began: bool = False  # something was trained


def held(run_dir: Path) -> Held:
    """What is in a run directory, by a look at names and one file; a run that is under way looks
    like a stopped one.
    """
    saved = checkpoint_folders(run_dir)
    try:
        # written last
        state = json.loads((run_dir / "trainer_state.json").read_text(encoding="utf-8"))
        steps, of = int(state["global_step"]), int(state["max_steps"])
    except (OSError, ValueError, KeyError, TypeError):
        steps, of = 0, 1
    completions = run_dir / "completions.jsonl"
    return Held(
        steps if steps >= of else None,
        checkpoint_step(saved[-1]) if saved else None,
        bool(saved) or completions.is_file() and completions.stat().st_size > 0,
    )


def _check_free(run_dir: Path, request: Request) -> None:
    """Raises RecipeError if the run directory holds something that must not be lost."""
    if not run_dir.is_dir() or not any(path.name != LOCK for path in run_dir.iterdir()):
        return
    ours = (run_dir / "recipe.yaml").is_file()
    found = held(run_dir)
    if not ours and (request.overwrite or not (found.finished or found.began)):
        raise RecipeError(
            "run_name",
            f"{run_dir} is no run directory of ours (it has no recipe.yaml) and will not be "
            "overwritten; choose another with --run-name, or remove it",
        )
    if request.overwrite:
        return
    others = "choose another with --run-name, or replace it with --overwrite"
    if found.finished is not None:
        raise RecipeError(
            "run_name",
            f"the run directory {run_dir} holds a finished run of {found.finished} steps; {others},"
            " or let it train on with --resume and more training.max_steps",
        )
    if found.stopped is not None:
        raise RecipeError(
            "run_name",
            f"the run directory {run_dir} holds a run whose last checkpoint is that of step"
            f" {found.stopped}; go on with --resume, {others}",
        )
    if found.began:
        raise RecipeError(
            "run_name",
            f"the run directory {run_dir} holds a run that stopped before its first checkpoint;"
            f" start it again with --resume, {others}",
        )


def check_still_free(start: Start) -> None:
    """Raises RecipeError if another run has been in a directory that was free when this one
    looked.
    """
    taken = (start.run_dir / "recipe.yaml").is_file()  # what TRL makes beforehand is no run
    if taken and (start.checkpoint is None or start.from_another_run) and not start.restarts:
        _check_free(start.run_dir, Request())


def _check_writable(run_dir: Path) -> None:
    """Raises RecipeError if the run directory cannot be made, or written to."""
    if run_dir.exists() and not run_dir.is_dir():
        raise RecipeError(
            "output_root", f"{run_dir} is a file; choose another output_root or run_name"
        )
    if len(os.fsencode(run_dir.name)) > 255:
        raise RecipeError(
            "run_name",
            "the name of the run directory would be longer than 255 bytes; use a shorter one",
        )
    parent = next(
        path for path in (run_dir.absolute(), *run_dir.absolute().parents) if path.exists()
    )
    try:
        tempfile.TemporaryDirectory(dir=parent).cleanup()
    except OSError as error:
        raise RecipeError(
            "output_root",
            f"{parent} cannot be written to ({error.strerror}); choose another output_root",
        ) from None


@contextlib.contextmanager
def locked(run_dir: Path):
    """Holds the run directory for this process; raises RecipeError where another one trains in it.
    A crash lets go.
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
