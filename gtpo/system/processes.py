"""The processes of one run, as torchrun and `accelerate launch` start them.

The first process prints, writes files and reports. All processes agree on which of them reports an
error, through the store that torchrun keeps.
"""

import contextlib
import functools
import hashlib
import os
import time
from datetime import timedelta

# Environment variables that silence the libraries of all processes but the first.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
# Seconds in which a process that failed can report it, before the others report that it is lost.
GRACE = 2.0


class ProcessLost(Exception):
    """Another process has ended or does not answer. It reports the cause itself, if it can."""


def count() -> int:
    """The number of processes of the run, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this process is the one that prints, writes files and reports."""
    return count() == 1 or os.environ.get("RANK", "0") == "0"


def forget_others() -> int:
    """Make this process a run of one process; returns how many processes there were.

    The other processes have nothing to do, and end by themselves.
    """
    number = count()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    return number


def connect_on_cpu(timeout: float) -> None:
    """Connect the processes of a run without accelerators; each waits `timeout` seconds at most.

    transformers 5.17.0 would connect them itself, but with a longer timeout there.
    """
    import torch

    if (
        count() > 1
        and not torch.accelerator.is_available()
        and not torch.distributed.is_initialized()
    ):
        torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=timeout))


@contextlib.contextmanager
def only_first_prints():
    """Inside, only the first process writes to stdout. Errors go to stderr in every process."""
    if is_first():
        yield
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def is_first_to_say(sentence: str, *, if_nobody_spoke: bool = False) -> bool:
    """Whether this process should print `sentence`: no other process has claimed it before.

    With `if_nobody_spoke`, no other process may have claimed any sentence. A call claims the
    sentence, so call it once, just before printing.

    The claims lie in the store of torchrun's agent, which outlives each process. Other launchers
    have no such store. There every process prints, except that `if_nobody_spoke` leaves it to the
    first.
    """
    if count() == 1:
        return True
    if if_nobody_spoke:
        time.sleep(GRACE)
    if not _has_store():
        return is_first() or not if_nobody_spoke
    digest = hashlib.blake2b(sentence.encode(), digest_size=16).hexdigest()
    try:
        anything_said = agent_store().add(_key("anything"), 1) > 1
        sentence_said = agent_store().add(_key(digest), 1) > 1
    except RuntimeError:  # the agent has ended, or its machine is lost
        return True
    return not (anything_said if if_nobody_spoke else sentence_said)


def wait_for_first() -> None:
    """Let the first process end first, if torchrun started them: it says so, and the others wait.

    torchrun ends all processes once one has ended, and the first may still have something to save.
    """
    if count() == 1 or not _has_store():
        return
    with contextlib.suppress(RuntimeError):
        if is_first():
            agent_store().set(_key("over"), "")
            return
        while not agent_store().check([_key("over")]):
            time.sleep(0.1)
        time.sleep(GRACE)


def _has_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _key(name: str) -> str:
    run, attempt = (os.environ.get(f"TORCHELASTIC_{n}") for n in ("RUN_ID", "RESTART_COUNT"))
    return f"gtpo/{run}/{attempt}/{name}"


@functools.cache
def agent_store():
    """The store of torchrun's agent, at the address where the processes connect (torch 2.13.0).

    Raises RuntimeError if it cannot be reached.
    """
    from torch.distributed import TCPStore

    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=5),
    )
