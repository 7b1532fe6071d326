"""Training runs in processes of their own that can be killed: forked from one that has imported
everything already.
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
    """Import what a run imports, once; one thread each, so that forks stay safe and sums keep their
    order.
    """
    # also where another process's wandb listens
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


ALIVE: list["Worker"] = []  # none outlives whoever started it


class Worker:
    """`python train_model.py ARGV` in a forked process; what it prints goes to `output`. `before`
    is called in it first.
    """

    def __init__(self, argv: list[str], output: Path, before=None):
        self.output = output
        output.touch()
        self.pid = os.fork()
        if self.pid:
            ALIVE.append(self)
            return
        code = 70
        try:
            os.setsid()
            signal.signal(signal.SIGINT, signal.default_int_handler)
            with output.open("ab") as file:
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
        """The exit code; minus the signal's number where one ended the process."""
        for _ in range(int(seconds / 0.01)):
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                ALIVE.remove(self)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        self.kill(signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise TimeoutError(f"no end after {seconds} s: {self.output.read_text()[-2000:]}")

    def kill(self, signum: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signum)

    @property
    def said(self) -> str:
        return self.output.read_text()


@atexit.register
def _end() -> None:
    for worker in ALIVE:
        worker.kill(signal.SIGKILL)


def run(argv: list[str], output: Path, before=None) -> int:
    return Worker(argv, output, before).wait()
