"""How a run ends: the exit code of each way, and one sentence on the terminal.

Several processes often end for the same reason. One of them prints the sentence.
"""

import contextlib
import errno
import logging
import re
from collections.abc import Iterator
from pathlib import Path

from gtpo.errors import Mistake, RecipeError
from gtpo.models.adapters import checkpoint_folders
from gtpo.recipe import Recipe
from gtpo.system import processes
from gtpo.system.console import LOG_FILE_ONLY, print_ending
from gtpo.system.processes import ProcessLost
from gtpo.system.signals import Interrupted, Interruption

DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
NOT_WRITABLE = {*DISK_FULL, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE}
# safetensors and torch report a failed write with errors of their own.
LIBRARY_WRITE_ERROR = re.compile(r"os error (\d+)|PytorchStreamWriter|inline_container")
OUT_OF_MEMORY = re.compile(
    r"out of memory|can't allocate memory|not enough memory|CUBLAS_STATUS_ALLOC_FAILED",
    re.IGNORECASE,
)
# gloo and NCCL report a lost process in these words.
PROCESS_LOST = re.compile(
    r"gloo/|Connection (closed|reset) by peer|Timed out waiting|NCCL", re.IGNORECASE
)


class RunStopped(Exception):
    """An alarm or a limit of the recipe stopped the run. Everything is saved."""


def end(error: BaseException, interruption: Interruption) -> int:
    """The exit code for `error`, after one process has printed why the run ends.

    An unexpected error is raised again by one process, with its traceback.
    """
    if isinstance(error, (Interrupted, RunStopped)):
        interrupted = isinstance(error, Interrupted)
        if processes.is_first():
            # Processes that lose this one must not report that as an error.
            processes.is_first_to_say(str(error))
            print_ending("interrupted" if interrupted else "stopped", error)
        processes.wait_for_first()
        return error.exit_code if interrupted else 3
    # A launcher that ends all processes must not cut off the sentence below.
    code_of_signal = interruption.ignore_further_signals()
    if isinstance(error, ProcessLost):
        # This is reported after a SIGTERM too: torchrun sends one when a process has died.
        if processes.is_first_to_say(str(error), if_nobody_spoke=True):
            print_ending("error", error)
            return 2
        return code_of_signal or 2
    if isinstance(error, RecipeError):
        if processes.is_first_to_say(str(error)):
            print_ending("error", error)
        return 2
    _log_traceback()
    if processes.is_first_to_say(repr(error)):
        raise error
    return 1


@contextlib.contextmanager
def explained(recipe: Recipe, run_dir: Path) -> Iterator[None]:
    """Inside, errors of the machine become a RecipeError with a sentence on what would help.

    These are a full or read-only disk, too little memory, and a tracker that does not start. The
    loss of another process becomes ProcessLost. The traceback goes to the log file.
    """
    try:
        yield
    except RecipeError:
        raise
    except Exception as error:
        causes = list(_causes(error))
        if processes.count() > 1 and any(map(_is_lost_process, causes)):
            _log_traceback()
            raise ProcessLost(
                "processes: another process of this run has ended, or did not answer within"
                f" training.ddp_timeout ({_one_line(error)[:160]}). {_how_to_continue(run_dir)}"
            ) from error
        mistakes = (_machine_mistake(cause, recipe, run_dir) for cause in causes)
        mistake = next((mistake for mistake in mistakes if mistake), None)
        if mistake is None:
            raise
        _log_traceback()
        raise RecipeError.of([mistake]) from error


def _machine_mistake(error: BaseException, recipe: Recipe, run_dir: Path) -> Mistake | None:
    """What the user can do about `error`; None if it is not an error of the machine."""
    if type(error).__module__.partition(".")[0] == "wandb":
        return Mistake(
            "wandb",
            f"{_one_line(error).rstrip('.')}; check the network and the login, or keep the run on"
            f" this machine with WANDB_MODE=offline. {_how_to_continue(run_dir)}",
        )
    if _is_out_of_memory(error):
        # The keys that save memory change the recipe, so the run resumes with --force-resume.
        sentence = _memory_sentence(error, recipe)
        return Mistake("memory", f"{sentence} {_how_to_continue(run_dir, '--force-resume')}")
    if reason := _write_failure(error):
        return Mistake(
            str(getattr(error, "filename", None) or run_dir),
            f"cannot be written ({reason}); free some space, or change the permissions. "
            + _how_to_continue(run_dir),
        )
    return None


def _is_lost_process(error: BaseException) -> bool:
    """Whether another process has ended: gloo raises RuntimeError, NCCL and the store DistError."""
    from torch.distributed import DistError

    if isinstance(error, DistError):
        return True
    return isinstance(error, RuntimeError) and bool(PROCESS_LOST.search(str(error)))


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(OUT_OF_MEMORY.search(str(error)))


def _write_failure(error: BaseException) -> str | None:
    """Why a file could not be written; None if `error` is about something else."""
    if isinstance(error, OSError):
        return error.strerror if error.errno in NOT_WRITABLE else None
    match = LIBRARY_WRITE_ERROR.search(str(error))
    if not match or match[1] and int(match[1]) not in NOT_WRITABLE:
        return None
    return _one_line(error) if match[1] else "No space left on device"


def _memory_sentence(error: BaseException, recipe: Recipe) -> str:
    training = recipe.training
    text = f"{type(error).__module__} {error}".lower()
    on_gpu = "cuda" in text or "OutOfMemory" in type(error).__name__
    checkpointing = ""
    if not training.trl_options().get("gradient_checkpointing", True):
        checkpointing = ", or set training.gradient_checkpointing to true"
    return (
        f"{'the GPU' if on_gpu else 'this machine'} has too little for this recipe"
        f" ({_one_line(error)[:160] or type(error).__name__}). Lower"
        f" training.per_device_train_batch_size (now {training.per_device_train_batch_size}; raise"
        " gradient_accumulation_steps by as much), model.max_seq_length (now"
        f" {recipe.model.max_seq_length}) or training.num_generations (now"
        f" {training.num_generations}){checkpointing}."
    )


def _how_to_continue(run_dir: Path, *flags: str) -> str:
    folders = checkpoint_folders(run_dir) if run_dir.is_dir() else []
    if not folders:
        return "There is no checkpoint yet: start again with --resume"
    command = " ".join(["--resume", *flags])
    return f"Everything up to {folders[-1].name} is saved: continue with {command}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def _log_traceback() -> None:
    logging.getLogger(LOG_FILE_ONLY).exception("The run failed")
