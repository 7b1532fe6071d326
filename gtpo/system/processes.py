"""The processes of one run, as torchrun and `accelerate launch` start them: how many, and which of
them speaks.
"""

import contextlib
import functools
import hashlib
import os
import time
from datetime import timedelta

# what the others' libraries read
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1"}
# seconds in which a process that failed by itself can say so before those that lost it do
GRACE = 2.0


class ProcessLost(Exception):
    """Another process has ended, or does not answer. It says why, if it still can."""


def count() -> int:
    """How many processes the run has, on all machines."""
    return int(os.environ.get("WORLD_SIZE", 1))


def is_first() -> bool:
    """Whether this process is the one that prints, writes files and reports."""
    return count() == 1 or os.environ.get("RANK", "0") == "0"


def forget_others() -> int:
    """Forget the others, which have nothing to do, and return how many processes there were."""
    several = count()
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    return several


def connect_on_cpu(timeout: float) -> None:
    """Meet the other processes on a CPU, and wait `timeout` seconds for each answer: transformers
    5.17.0 waits longer there.
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
    """Inside, nothing is printed but by the first process; errors have stderr, and
    `is_first_to_say`.
    """
    if is_first():
        yield
        return
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def is_first_to_say(sentence: str, *, if_nobody_spoke: bool = False) -> bool:
    """Whether no other process has said the same, or with `if_nobody_spoke` anything; asked once,
    just before it is said.

    Processes ask the store that torchrun keeps for them, which outlives each of them. Another
    launcher's say it all, but for what `if_nobody_spoke` leaves to the first.
    """
    if count() == 1:
        return True
    if if_nobody_spoke:
        time.sleep(GRACE)
    if not _has_store():
        return is_first() or not if_nobody_spoke
    try:
        spoke = _store().add(_key("anything"), 1) > 1
        said = (
            _store().add(_key(hashlib.blake2b(sentence.encode(), digest_size=16).hexdigest()), 1)
            > 1
        )
    except RuntimeError:  # the agent is gone, on a machine that is
        return True
    return not (spoke if if_nobody_spoke else said)


def wait_for_first() -> None:
    """Let the first process end first: torchrun ends all once one of them has, and the first may
    have something to save.
    """
    if count() == 1 or not _has_store():
        return
    with contextlib.suppress(RuntimeError):
        if is_first():
            _store().set(_key("over"), "")
            return
        while not _store().check([_key("over")]):
            time.sleep(0.1)
        time.sleep(GRACE)


def _has_store() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _key(name: str) -> str:
    return f"gtpo/{os.environ.get('TORCHELASTIC_RUN_ID')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT')}/{name}"


@functools.cache
def _store():
    """torch 2.13.0: torchrun's agent keeps it where the processes meet. Raises a RuntimeError where
    it cannot be reached.
    """
    from torch.distributed import TCPStore

    return TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=5),
    )
