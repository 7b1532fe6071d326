"""One call of a reward function, and what it says of its completions.

This file is also a program: run as a script, it imports reward functions by their dotted paths and
answers calls, one pickle each way. A call that takes too long ends the process, from a thread that
needs no GIL, so that a loop in C is no refuge; its traceback is what the process leaves.
"""

import collections
import contextlib
import faulthandler
import functools
import inspect
import itertools
import logging
import logging.handlers
import math
import os
import pickle
import pkgutil
import random
import signal
import struct
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Set
from pathlib import Path

LOAD_SECONDS = 600.0  # to import the module of a function
# a mark that no traceback begins with, and the length of what follows
HEAD = struct.Struct("!cQ")
MARK = b"\x80"


class Bug(Exception):
    """A clause that says how a function breaks TRL's contract: one number or None per
    completion.
    """


def call_reward(function: Callable, arguments: dict, count: int) -> dict:
    """What one call says: its `rewards`, `count` floats or Nones, and the `metrics` and `columns`
    that it logged.

    Otherwise its `failure` and `traceback` if it raises, or its `bug`, a clause.
    """
    metrics: list[tuple[str, float]] = []
    columns: list[tuple[str, list]] = []
    try:
        returned = function(
            **arguments,
            log_metric=lambda name, value: metrics.append((name, float(value))),
            log_extra=lambda column, values: columns.append((column, list(values))),
        )
        if inspect.isawaitable(returned):
            returned = _event_loop().run_until_complete(returned)
        return {"rewards": _rewards(returned, count), "metrics": metrics, "columns": columns}
    except Bug as bug:
        return {"bug": str(bug)}
    except (Exception, SystemExit) as error:
        return failure("raised ", error)


def failure(what: str, error: BaseException) -> dict:
    said = " ".join("".join(traceback.format_exception_only(error)).split())[:500]
    trace = "".join(traceback.format_exception(error))[-20_000:]
    if isinstance(error, MemoryError):  # what it still holds would be missing in the next call
        return {"failure": f"{what}{said} (rewards.memory)", "traceback": trace, "spent": True}
    return {"failure": what + said, "traceback": trace}


def _rewards(returned: object, count: int) -> list[float | None]:
    if isinstance(returned, str | bytes | Mapping | Set) or not isinstance(returned, Iterable):
        raise Bug(f"returned {_described(returned)}, not a list with one reward per completion")
    # it may never end
    rewards = [_reward(value) for value in itertools.islice(returned, count + 1)]
    if len(rewards) != count:
        many = (
            len(returned)
            if hasattr(returned, "__len__")
            else "more"
            if len(rewards) > count
            else len(rewards)
        )
        raise Bug(f"returned {many} rewards for {count} completions, not one for each")
    return rewards


def _reward(value: object) -> float | None:
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return None if value is None else float(value)
    except OverflowError:
        return math.inf
    # the last is what a tensor of several numbers raises
    except (TypeError, ValueError, RuntimeError):
        raise Bug(f"returned {_described(value)} as a reward, not a number or None") from None


def _described(value: object) -> str:
    if value is None:
        return "None"
    return (
        f"the {type(value).__name__} {value[:60]!r}"
        if isinstance(value, str | bytes)
        else f"a {type(value).__name__}"
    )


@functools.cache
def _event_loop():
    """One for all calls of this process: clients of an asynchronous function are bound to it."""
    import asyncio

    return asyncio.new_event_loop()


# ---- the pipe


def send(stream, data: bytes) -> None:
    stream.write(HEAD.pack(MARK, len(data)) + data)
    stream.flush()


def receive(stream) -> tuple[bytes | None, str]:
    """What was sent; or None, and the text in its place: a traceback, or nothing where the stream
    has ended.
    """
    head = stream.read(HEAD.size)
    if len(head) < HEAD.size or head[:1] != MARK:
        return None, (head + stream.read()).decode("utf-8", "replace")
    size = HEAD.unpack(head)[1]
    data = stream.read(size)
    return (data, "") if len(data) == size else (None, "")


# ---- the program


def _serve() -> None:
    calls, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if hasattr(os, "register_at_fork"):
        # or the parent would wait for these children too
        os.register_at_fork(after_in_child=replies.close)
    os.dup2(2, 1)  # what a function prints is neither a reply nor a result of the run
    sys.stdout.reconfigure(line_buffering=True)
    path, parent, memory, levels, load_seconds = pickle.loads(receive(calls)[0])
    # sent to all of a job: the run has a step to finish; handlers end with exec
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: None)
    _bind_to(parent)
    _limit_memory(memory)
    sys.path[:] = path
    log = _Log(collections.deque(maxlen=1000))
    logging.getLogger().addHandler(log)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)
    faulthandler.enable(replies)  # a crash leaves its traceback
    while (request := receive(calls)[0]) is not None:
        faulthandler.dump_traceback_later(load_seconds, exit=True, file=replies)
        reply = _answer(request, replies, log)
        faulthandler.cancel_dump_traceback_later()
        send(replies, reply)
    os._exit(0)  # without waiting for threads that a function has left


class _Log(logging.handlers.QueueHandler):
    """Keeps what is logged, so that it gets into the run's log."""

    def enqueue(self, record: logging.LogRecord) -> None:
        self.queue.append(record)


def _answer(request: bytes, replies, log: _Log) -> bytes:
    try:
        name, arguments, count, seconds, seed = pickle.loads(request)
        function = pkgutil.resolve_name(name)
    except (Exception, SystemExit) as error:
        return pickle.dumps(failure("cannot be imported in its own process: ", error))
    _seed(seed)
    faulthandler.dump_traceback_later(seconds, exit=True, file=replies)
    began = time.perf_counter()
    reply = call_reward(function, arguments, count) | {
        "seconds": time.perf_counter() - began,
        "log": list(log.queue),
    }
    log.queue.clear()
    try:
        return pickle.dumps(reply)
    except Exception as error:  # of somebody's objects
        return pickle.dumps(failure("logged what cannot be handed to another process: ", error))


def _seed(seed: str) -> None:
    """The same random numbers for the same call, in whichever process it is made."""
    random.seed(seed)
    number = random.Random(seed).getrandbits(32)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(number)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(number)


def _bind_to(parent: int) -> None:
    """End with the parent even if that is killed, and whatever we are doing then (Linux; elsewhere
    at the next call).
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _limit_memory(gib: float | None) -> None:
    # Linux: where memory runs out all the same, this process goes first
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    if gib is not None and os.name == "posix":
        import resource

        with contextlib.suppress(ValueError, OSError):  # macOS refuses
            resource.setrlimit(resource.RLIMIT_DATA, (int(gib * 2**30),) * 2)


if __name__ == "__main__":
    _serve()
