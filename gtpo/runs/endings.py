"""How a run ends: the exit code of each way, and one sentence, said by one process."""

import contextlib
import errno
import logging
import re
from pathlib import Path

from gtpo.errors import Mistake, RecipeError
from gtpo.models.adapters import checkpoint_folders
from gtpo.recipe import Recipe
from gtpo.system import processes
from gtpo.system.console import print_ending
from gtpo.system.processes import ProcessLost
from gtpo.system.signals import Interrupted, Interruption

NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_WRITABLE = {*NO_ROOM, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
# safetensors and torch write in their own ways
OF_LIBRARIES = re.compile(r"os error (\d+)|PytorchStreamWriter|inline_container")
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)

LOST = re.compile(r"gloo/|Connection (closed|reset) by peer|Timed out waiting|NCCL", re.IGNORECASE)


class RunStopped(Exception):
    """An alarm or a limit stopped the run, as its recipe says; everything is saved."""


def end(error: BaseException, interruption: Interruption) -> int:
    """Say what ended the run, and return the exit code; an error that nobody foresaw is raised
    again, by one process.

    Several processes often end for the same reason, and those that did nothing wrong end because of
    the one that did.
    """
    if isinstance(error, (Interrupted, RunStopped)):
        interrupted = isinstance(error, Interrupted)
        if processes.is_first():
            # so that nobody who loses this process tells of it
            processes.is_first_to_say(str(error))
            print_ending("interrupted" if interrupted else "stopped", error)
        processes.wait_for_first()
        return error.exit_code if interrupted else 3
    # a launcher that ends the others must not cut off what is said here
    asked = interruption.ignore_further_signals()
    if isinstance(error, ProcessLost):
        # also after a SIGTERM: torchrun sends it when a process has died
        if processes.is_first_to_say(str(error), if_nobody_spoke=True):
            print_ending("error", error)
            return 2
        return asked or 2
    if isinstance(error, RecipeError):
        if processes.is_first_to_say(str(error)):
            print_ending("error", error)
        return 2
    # for the log file; the terminal gets it anyway
    logging.getLogger("gtpo.runs.progress").exception("The run failed")
    if processes.is_first_to_say(repr(error)):
        raise error
    return 1


# ---- errors that are no mistake of a recipe, as sentences


@contextlib.contextmanager
def explained(recipe: Recipe, run_dir: Path):
    """Inside, such an error becomes a RecipeError that says what would help; its traceback goes to
    the log file.
    """
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        if processes.count() > 1 and any(map(_of_another_process, _causes(error))):
            logging.getLogger("gtpo.runs.progress").exception("The run failed")
            raise ProcessLost(
                "processes: another process of this run has ended, or did not answer within"
                f" training.ddp_timeout ({' '.join(str(error).split())[:160]}). {_goes_on(run_dir)}"
            ) from error
        mistake = next(
            (told for cause in _causes(error) if (told := _told(cause, recipe, run_dir))), None
        )
        if mistake is None:
            raise
        logging.getLogger("gtpo.runs.progress").exception(
            "The run failed"
        )  # for the log file alone
        raise RecipeError.of([mistake]) from error


def _told(error: BaseException, recipe: Recipe, run_dir: Path) -> Mistake | None:
    if type(error).__module__.partition(".")[0] == "wandb":
        reason = " ".join(str(error).split()).rstrip(".")
        return Mistake(
            "wandb",
            f"{reason}; look at the network and the login, or keep the run on this machine with"
            " WANDB_MODE=offline. " + _goes_on(run_dir),
        )
    if (
        isinstance(error, MemoryError)
        or isinstance(error, RuntimeError)
        and OUT_OF_MEMORY.search(str(error))
    ):
        return Mistake("memory", _memory(error, recipe) + _goes_on(run_dir, " --force-resume"))
    reason = _not_written(error)
    if reason:
        return Mistake(
            str(getattr(error, "filename", None) or run_dir),
            f"cannot be written ({reason}); make room, or let it be written. " + _goes_on(run_dir),
        )
    return None


def _of_another_process(error: BaseException) -> bool:
    """gloo has errors of its own texts, NCCL and the store those of torch.distributed."""
    from torch.distributed import DistError

    return (
        isinstance(error, DistError)
        or isinstance(error, RuntimeError)
        and bool(LOST.search(str(error)))
    )


def _not_written(error: BaseException) -> str | None:
    if isinstance(error, OSError):
        return error.strerror if error.errno in NOT_WRITABLE else None
    found = OF_LIBRARIES.search(str(error))
    if not found or found[1] and int(found[1]) not in NOT_WRITABLE:
        return None
    return "No space left on device" if not found[1] else " ".join(str(error).split())


def _memory(error: BaseException, recipe: Recipe) -> str:
    training = recipe.training
    device = (
        "the GPU"
        if "cuda" in f"{type(error).__module__} {error}".lower()
        or "OutOfMemory" in type(error).__name__
        else "this machine"
    )
    per_device, size = training.per_device_train_batch_size, training.num_generations
    checkpointing = (
        ""
        if training.trl_options().get("gradient_checkpointing", True)
        else ", or set training.gradient_checkpointing to true"
    )
    return (
        f"{device} has too little for this recipe"
        f" ({' '.join(str(error).split())[:160] or type(error).__name__}). Lower"
        f" training.per_device_train_batch_size (now {per_device}; raise"
        " gradient_accumulation_steps by as much), model.max_seq_length (now"
        f" {recipe.model.max_seq_length}) or training.num_generations (now {size}){checkpointing}. "
    )


def _goes_on(run_dir: Path, more: str = "") -> str:
    saved = checkpoint_folders(run_dir) if run_dir.is_dir() else []
    if not saved:
        return "There is no checkpoint yet: start again with --resume"
    return f"Everything up to {saved[-1].name} is whole: go on with --resume{more}"


def _causes(error: BaseException | None):
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
