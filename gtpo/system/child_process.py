"""Child processes that answer requests and can be killed.

Reward functions and math-verify may hang, crash or use up all memory, so they run in a child
process. `ChildProcess` is the parent's side. It starts a child, sends it one request at a time, and
kills it when a reply takes too long.

This file is also the program that the child runs. Its argument names a module of gtpo. That module
has a function `start(settings, replies)`, which returns the function that answers a request.

A message is a mark, a length and that many bytes. The parent's first message is the settings as
JSON. After it there is one reply for each request. Text on the pipe without the mark is not a
message. It is the traceback of a child that is ending.

No pool of a library is suitable. Those of multiprocessing, and pebble's on top of them, import the
caller's main module, and a script without a `__main__` guard does not survive that. The executors
of concurrent.futures and loky break as a whole when one of their processes is killed.
"""

import contextlib
import importlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

GRACE_SECONDS = 10.0  # to wait for a child that was killed

HEAD = struct.Struct("!cQ")  # the mark, and the length of what follows
MARK = b"\x80"  # no traceback begins with it


class ChildEnded(Exception):
    """The child ended before it replied.

    `late` is true where it was killed because it took too long. `how` is a clause such as
    "exit code 1". `left` is the text that the child left, a traceback or nothing.
    """

    def __init__(self, how: str, left: str, late: bool):
        super().__init__(how)
        self.how, self.left, self.late = how, left, late


class ChildProcess:
    """A child that runs `module` and answers one request at a time. A fork starts its own.

    `limits` are resource limits by name, such as {"RLIMIT_AS": bytes}. `environment` holds
    variables for the child, used where the parent's environment does not have them. With
    `ends_with_parent`, the child is killed when the thread that started it ends, also where the
    parent is killed (Linux). A `quiet` child prints nowhere, others print to stderr.
    """

    def __init__(
        self,
        module: str,
        *,
        limits: dict[str, int] | None = None,
        environment: dict[str, str] | None = None,
        ends_with_parent: bool = False,
        quiet: bool = False,
    ):
        self.module, self.limits, self.environment = module, limits or {}, environment or {}
        self.ends_with_parent, self.quiet = ends_with_parent, quiet
        self._process: subprocess.Popen | None = None
        self._started_by: int | None = None  # the process id of the parent
        self._finalizer: weakref.finalize | None = None

    @property
    def running(self) -> bool:
        """Whether the child can take a request."""
        mine = self._process is not None and self._started_by == os.getpid()
        return mine and self._process.poll() is None

    def start(self, settings: dict[str, Any]) -> None:
        """Start a new child in place of the one before; `settings` are for `module`, as JSON."""
        self.stop()
        self._started_by = os.getpid()
        self._process = process = subprocess.Popen(
            # -P keeps this folder off the path. Its modules would hide others of the same name.
            [sys.executable, "-P", __file__, self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if self.quiet else None,
            bufsize=0,  # a fork must not get a copy of half a request
            env={**self.environment, **os.environ},
            # Ctrl-C reaches the parent alone, and the child's own children can be killed with it.
            start_new_session=True,
        )
        self._finalizer = weakref.finalize(self, _end, process, self._started_by)  # at exit, too
        settings = {
            "module": settings,
            "limits": self.limits,
            "parent": os.getpid() if self.ends_with_parent else None,
        }
        with contextlib.suppress(OSError):  # it ended at once; the first request reports that
            send(process.stdin, json.dumps(settings).encode())

    def ask(self, request: bytes, seconds: float) -> bytes:
        """The child's reply. A child that needs longer than `seconds` is killed.

        Raises ChildEnded where there is no reply.
        """
        process, late = self._process, threading.Event()
        timer = threading.Timer(seconds, lambda: (late.set(), _kill(process)))
        timer.daemon = True
        timer.start()
        reply, left = None, ""
        try:
            send(process.stdin, request)
            reply, left = receive(process.stdout)
        except Exception as error:  # it ended before it read, or sent an impossible length
            left = str(error)
        finally:
            timer.cancel()
            # Also after Ctrl-C: a late reply must not be read as the reply to the next request.
            if reply is None:
                self.stop()
        if reply is None:
            raise ChildEnded(_how_it_ended(process), left, late.is_set())
        return reply

    def stop(self) -> None:
        """Kill the child, if it runs, and what it has started."""
        if self._finalizer is not None:
            self._finalizer()
        self._process = self._finalizer = None


def _end(process: subprocess.Popen, started_by: int) -> None:
    if started_by != os.getpid():  # this is a fork, and the child is its parent's
        return
    if process.returncode is None:
        _kill(process)
    # A process that waits for a missing file system cannot be killed.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE_SECONDS)
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):
            stream.close()


def _kill(process: subprocess.Popen) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()


def _how_it_ended(process: subprocess.Popen) -> str:
    code = process.returncode
    if code == -signal.SIGKILL:
        return "signal SIGKILL, as where the machine runs out of memory"
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:  # most real-time signals have no name
        return f"signal {-code}"


# ---- the pipe


def send(stream: BinaryIO, data: bytes) -> None:
    """Write one message to an unbuffered stream."""
    rest = memoryview(HEAD.pack(MARK, len(data)) + data)
    while rest:
        rest = rest[stream.write(rest) :]


def receive(stream: BinaryIO) -> tuple[bytes | None, str]:
    """The next message of an unbuffered stream, and "".

    Otherwise None and the text that came instead, which is "" if the stream has ended.
    """
    head = _read(stream, HEAD.size)
    if len(head) < HEAD.size or head[:1] != MARK:
        return None, (head + stream.read()).decode("utf-8", "replace")
    size = HEAD.unpack(head)[1]
    data = _read(stream, size)
    return (data, "") if len(data) == size else (None, "")


def _read(stream: BinaryIO, size: int) -> bytes:
    """`size` bytes, or fewer if the stream ends."""
    data = stream.read(size)
    while len(data) < size and (more := stream.read(size - len(data))):
        data += more
    return data


# ---- the program


def serve(module: ModuleType) -> None:
    """Answer the parent's requests until it closes the pipe, then end this process."""
    requests, replies = os.fdopen(os.dup(0), "rb", 0), os.fdopen(os.dup(1), "wb", 0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what a library prints is neither a reply nor a result of the run
    sys.stdout.reconfigure(line_buffering=True)
    if hasattr(os, "register_at_fork"):
        # Otherwise the parent would also wait for the forks of this process.
        os.register_at_fork(after_in_child=replies.close)
    # These signals go to all processes of a job. The run still has a step to finish, so no reply
    # may be lost. A handler does not reach programs that are started from here.
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: None)
    settings, _ = receive(requests)
    if settings is not None:
        settings = json.loads(settings)
        _end_with(settings["parent"])
        _set_limits(settings["limits"])
        answer = module.start(settings["module"], replies)
        while (request := receive(requests)[0]) is not None:
            send(replies, answer(request))
    os._exit(0)  # without waiting for threads that a reward function has left


def _end_with(parent: int | None) -> None:
    """End this process with its parent, even if the parent is killed.

    This works on Linux. Elsewhere this process ends at the next request.
    """
    if parent is not None and sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:
            os._exit(1)


def _set_limits(limits: dict[str, int]) -> None:
    if limits and os.name == "posix":
        import resource

        for name, limit in limits.items():
            with contextlib.suppress(ValueError, OSError):  # macOS refuses some limits
                resource.setrlimit(getattr(resource, name), (limit, limit))


if __name__ == "__main__":
    # With -P a script finds no package beside it. This one must, and its modules after it.
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from gtpo.system import child_process  # the module itself; this is a copy, called __main__

    child_module = importlib.import_module(sys.argv[1])
    del sys.path[0]
    child_process.serve(child_module)
