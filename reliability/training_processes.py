"""Training runs in processes that can be killed.

Each is forked from a process that has already imported everything a run needs.
"""

import atexit
import contextlib
import os
import signal
import sys
import time
import traceback
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]


def prepare() -> None:
    """Imports what a run imports, once, with one thread.

    One thread keeps forks safe and sums in the same order.
    """
    # They also name the address at which another process's wandb listens.
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        del os.environ[name]
    os.environ.update(
        OMP_NUM_THREADS="1",
        HF_HUB_OFFLINE="1",
        TQDM_DISABLE="1",
        WANDB_MODE="offline",
        TOKENIZERS_PARALLELISM="false",
    )
    import torch

    torch.set_num_threads(1)
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import trl  # noqa: F401

    import gtpo.evaluation.held_out
    import gtpo.gtpo_training
    import gtpo.runs.exact_resume
    import gtpo.runs.progress  # noqa: F401
    import train_model  # noqa: F401


ALIVE: list["TrainingProcess"] = []  # killed when this process ends


class TrainingProcess:
    """A forked process that runs `python train_model.py ARGV`, with its output in the file `log`.

    The new process calls `before` first.
    """

    def __init__(self, argv: list[str], log: Path, before=None):
        self.log = log
        log.touch()
        self.pid = os.fork()
        if self.pid:
            ALIVE.append(self)
            return
        code = 70
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with log.open("ab") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            sys.stdout, sys.stderr = (open(i, "w", buffering=1, closefd=False) for i in (1, 2))
            import train_model

            if before:
                before()
            code = train_model.main(argv)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait(self, seconds: float = 600) -> int:
        """The exit code, or minus the number of the signal that ended the process.

        Kills the process after `seconds` and raises TimeoutError.
        """
        for _ in range(int(seconds / 0.01)):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                ALIVE.remove(self)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        self.kill(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"no end after {seconds} s: {self.output[-2000:]}")

    def kill(self, signum: int) -> None:
        """Sends a signal to the process, if it still runs."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    @property
    def output(self) -> str:
        """What the process has printed so far."""
        return self.log.read_text()


@atexit.register
def _end() -> None:
    for process in ALIVE:
        process.kill(signal.SIGKILL)


def run(argv: list[str], log: Path, before=None) -> int:
    """The exit code of a TrainingProcess that has ended."""
    return TrainingProcess(argv, log, before).wait()
