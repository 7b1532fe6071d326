"""Processes that call reward functions and can be killed, whatever these do.

No pool of a library: those of multiprocessing, and pebble's on top of them, import the caller's
main module, which a script without a `__main__` guard does not survive, and the executors of
concurrent.futures and loky break as a whole when one of their processes is killed.
"""

import contextlib
import logging
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from gtpo.rewards import worker as judge_call
from gtpo.rewards.worker import LOAD_SECONDS, receive, send

GRACE_SECONDS = 10.0  # after which we kill a process that should have ended itself
# the first call of a function may take so many times longer: it may have something to load
FIRST = 4


class CannotHandOver(Exception):
    """An argument that pickle cannot hand to another process."""


class RewardPool:
    """`workers` processes that share calls. A call may take `seconds` longer than its like have
    taken so far.

    Like this a call about many completions, which may rightly take long, does not hang for the sum
    of their limits.
    """

    def __init__(self, workers: int, *, seconds: float, memory: float | None, **more):
        """`seconds` for one completion; `memory`, and what there is `more`, as for a
        RewardProcess.
        """
        self.workers, self.seconds, self.memory, self.more = workers, seconds, memory, more
        # by function, the most seconds per completion of a call so far
        self._pace: dict[str, float] = {}
        # by function, the seconds of the first call in a process
        self._start: dict[str, float] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()  # asynchronous functions may ask at the same time

    def map(self, task: Callable, items: Iterable) -> list:
        """`task` of each item, in order, at most `workers` at a time; each may `ask`."""
        with self._lock:
            threads = self._threads or self._open()
        try:
            return list(threads.map(task, items))
        except BaseException:  # Ctrl-C, for one, should not wait for a call that hangs
            self.close()
            raise

    def _open(self) -> ThreadPoolExecutor:
        """Threads that stay, because Linux ends a process with the thread that started it."""
        self._processes = [RewardProcess(self.memory, **self.more) for _ in range(self.workers)]
        self._idle = queue.LifoQueue()  # the last one knows the function best
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(self.workers, "judge")
        return self._threads

    def call(self, function: str, arguments: dict, seed: str) -> dict:
        """What `judge_call.judge` says; within a task of `map`."""
        count = len(arguments["completions"])
        process = self._idle.get()
        try:
            reply = process.call(
                function,
                arguments,
                count=count,
                seed=seed,
                seconds=self._limit(function, count, fresh=not process.has_called(function)),
            )
        finally:
            self._idle.put(process)
        seconds = reply["seconds"] if "rewards" in reply else 0.0
        self._pace[function] = max(self._pace.get(function, 0.0), seconds / count)
        self._start.setdefault(function, seconds)
        return reply

    def _limit(self, function: str, count: int, *, fresh: bool) -> float:
        if function not in self._pace:
            return FIRST * self.seconds
        usual = min(self.seconds + count * self._pace[function], count * self.seconds)
        return usual + fresh * self._start[function]

    def close(self) -> None:
        """Kill the processes; the next `map` starts others."""
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in self._processes:
                process.stop()


class RewardProcess:
    """A process that calls reward functions, one call at a time. It starts when it is asked, and
    again after a kill.
    """

    def __init__(
        self,
        memory: float | None = None,
        *,
        load_seconds: float = LOAD_SECONDS,
        quiet: bool = False,
    ):
        """`memory` in GiB, None for no limit; `load_seconds` to import the module of a function;
        `quiet`: it prints nowhere.
        """
        self.memory, self.load_seconds, self.quiet = memory, load_seconds, quiet
        self._child: subprocess.Popen | None = None
        self._called: set[str] = set()  # the functions that this child knows

    def has_called(self, function: str) -> bool:
        return self._runs() and function in self._called

    def call(
        self, function: str, arguments: dict, *, count: int, seconds: float, seed: str
    ) -> dict:
        """What `judge_call.judge` says of a call, and its `seconds`; or the `failure` and
        `traceback` of a process that ended.

        `function` is a dotted path; it is imported before its time begins. Random generators start
        from `seed`. Raises CannotHandOver.
        """
        try:
            request = pickle.dumps((function, arguments, count, seconds, seed))
        except Exception as error:  # somebody's objects raise what they like
            raise CannotHandOver(f"{type(error).__name__}: {error}") from error
        if not self._runs():
            self._start()
        child, first = self._child, function not in self._called
        self._called.add(function)
        too_late = threading.Event()
        timer = threading.Timer(
            seconds + GRACE_SECONDS + first * self.load_seconds,
            lambda: (too_late.set(), _signal(child)),
        )
        timer.daemon = True
        timer.start()
        reply, text = None, ""
        try:
            send(child.stdin, request)
            data, text = receive(child.stdout)
            reply = None if data is None else pickle.loads(data)
        except Exception as error:  # it ended before it could read, or sent somebody's objects
            text = str(error)
        # after Ctrl-C, too: the reply to this call must not be taken for that to the next
        finally:
            timer.cancel()
            if reply is None or "spent" in reply:
                self.stop()
        if reply is not None:
            for record in reply.pop("log", ()):
                if (logger := logging.getLogger(record.name)).isEnabledFor(record.levelno):
                    logger.handle(record)
            return reply
        if text.startswith("Timeout") and " in resolve_name" in text:
            return {
                "failure": f"took longer than {self.load_seconds:.3g} s to be imported",
                "traceback": text,
            }
        if too_late.is_set() or text.startswith("Timeout"):
            return {
                "failure": f"took longer than {seconds:.3g} s (rewards.seconds)",
                "traceback": text,
            }
        return {"failure": f"ended its process ({_how_it_ended(child)})", "traceback": text}

    def stop(self) -> None:
        """Kill the process, if it runs, and what it has started."""
        child, self._child = self._child, None
        if child is not None:
            _end(child)

    def _runs(self) -> bool:
        return self._child is not None and self._child.poll() is None

    def _start(self) -> None:
        self.stop()
        self._called = set()
        self._child = subprocess.Popen(
            # -P: or modules of this folder would hide others of the same name
            [sys.executable, "-P", judge_call.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL if self.quiet else None,
            env={"PYTHONHASHSEED": "0", **os.environ},  # sets in the same order in every process
            start_new_session=True,  # Ctrl-C is for the parent; and a group, to be killed as one
        )
        weakref.finalize(self, _end, self._child)  # at the latest when Python exits
        loggers = [
            logging.root,
            *(
                found
                for found in logging.root.manager.loggerDict.values()
                if isinstance(found, logging.Logger)
            ),
        ]
        levels = {logger.name: logger.level for logger in loggers if logger.level}
        send(
            self._child.stdin,
            pickle.dumps((sys.path, os.getpid(), self.memory, levels, self.load_seconds)),
        )


def _signal(child: subprocess.Popen) -> None:
    with contextlib.suppress(OSError):
        os.killpg(child.pid, signal.SIGKILL) if os.name == "posix" else child.kill()


def _end(child: subprocess.Popen) -> None:
    if child.returncode is None:
        _signal(child)
    # one that waits for a file system that is away cannot even be killed
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_SECONDS)
    for stream in (child.stdin, child.stdout):
        with contextlib.suppress(OSError):
            stream.close()


def _how_it_ended(child: subprocess.Popen) -> str:
    code = child.returncode
    if code == -signal.SIGKILL:
        return "signal SIGKILL, as where the machine runs out of memory"
    return (
        f"signal {signal.Signals(-code).name}"
        if code is not None and code < 0
        else f"exit code {code}"
    )
