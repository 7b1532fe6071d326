"""Processes that make reward calls and can be killed, whatever a reward function does."""

import json
import logging
import pickle
import queue
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

from gtpo.rewards.worker import LOAD_SECONDS
from gtpo.system.child_process import GRACE_SECONDS, ChildEnded, ChildProcess

# The first call of a function may take so many times longer, as it may have something to load.
FIRST_CALL = 4


class CannotHandOver(Exception):
    """An argument of a reward call that pickle cannot hand to another process."""


class RewardPool:
    """`workers` processes that share reward calls.

    A call on n completions may take `seconds` + n times the slowest pace of its function so far,
    and at most n times `seconds`. So a call on many completions may take long where it has to. One
    that hangs is stopped earlier than n times `seconds`.
    """

    def __init__(self, workers: int, *, seconds: float, memory: float | None, **options):
        """`seconds` limits one completion; `memory` and `options` are those of RewardProcess."""
        self.workers, self.seconds, self.memory, self.options = workers, seconds, memory, options
        # by function: the most seconds per completion of a call so far
        self._pace: dict[str, float] = {}
        # by function: the seconds of its first call in a process
        self._first_seconds: dict[str, float] = {}
        self._threads: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()  # asynchronous functions may be called at the same time

    def map(self, task: Callable, items: Iterable) -> list:
        """`task` of each item, in order, at most `workers` at a time; a task may `call`."""
        with self._lock:
            threads = self._threads or self._open()
        try:
            return list(threads.map(task, items))
        except BaseException:  # Ctrl-C, for one, should not wait for a call that hangs
            self.close()
            raise

    def _open(self) -> ThreadPoolExecutor:
        """Threads that stay, because Linux ends a process with the thread that started it."""
        self._processes = [RewardProcess(self.memory, **self.options) for _ in range(self.workers)]
        self._idle = queue.LifoQueue()  # the last one most likely knows the function
        for process in self._processes:
            self._idle.put(process)
        self._threads = ThreadPoolExecutor(self.workers, "reward")
        return self._threads

    def call(self, function: str, arguments: dict, seed: str) -> dict:
        """The reply of one reward call, as of `RewardProcess.call`. Within a task of `map`."""
        count = len(arguments["completions"])
        process = self._idle.get()
        try:
            reply = process.call(
                function,
                arguments,
                count=count,
                seed=seed,
                seconds=self._limit(function, count, first=not process.has_called(function)),
            )
        finally:
            self._idle.put(process)
        seconds = reply["seconds"] if "rewards" in reply else 0.0
        self._pace[function] = max(self._pace.get(function, 0.0), seconds / count)
        self._first_seconds.setdefault(function, seconds)
        return reply

    def _limit(self, function: str, count: int, *, first: bool) -> float:
        """The seconds that a call on `count` completions may take; `first` in its process."""
        if function not in self._pace:
            return FIRST_CALL * self.seconds
        usual = min(self.seconds + count * self._pace[function], count * self.seconds)
        return usual + first * self._first_seconds[function]

    def close(self) -> None:
        """Kill the processes; the next `map` starts others."""
        threads, self._threads = self._threads, None
        if threads is not None:
            threads.shutdown(wait=False, cancel_futures=True)
            for process in self._processes:
                process.stop()


class RewardProcess:
    """A process that makes one reward call at a time. It starts at the first call, and again at the
    next call after a kill.
    """

    def __init__(
        self,
        memory: float | None = None,
        *,
        load_seconds: float = LOAD_SECONDS,
        quiet: bool = False,
    ):
        """`memory` is in GiB, None for no limit. `load_seconds` is the time to import the module of
        a function. With `quiet`, what a function prints is dropped.
        """
        self.load_seconds = load_seconds
        self._child = ChildProcess(
            "gtpo.rewards.worker",
            limits={} if memory is None else {"RLIMIT_DATA": int(memory * 2**30)},
            environment={"PYTHONHASHSEED": "0"},  # sets in the same order in every process
            ends_with_parent=True,
            quiet=quiet,
        )
        self._called: set[str] = set()  # the functions that the process has imported

    def has_called(self, function: str) -> bool:
        """Whether the process that runs now has imported `function`."""
        return self._child.running and function in self._called

    def call(
        self, function: str, arguments: dict, *, count: int, seconds: float, seed: str
    ) -> dict:
        """The reply of `worker.call_reward` with its `seconds`, or a `failure` and its `traceback`.

        `function` is a dotted path. It is imported before its time begins. Random generators start
        from `seed`. Raises CannotHandOver.
        """
        try:
            request = pickle.dumps((function, arguments, count, seconds, seed))
        except Exception as error:  # the methods of an object may raise anything
            raise CannotHandOver(f"{type(error).__name__}: {error}") from error
        if not self._child.running:
            self._called = set()
            self._child.start(self._settings())
        first = function not in self._called
        self._called.add(function)
        at_most = seconds + GRACE_SECONDS + first * self.load_seconds
        try:
            reply = json.loads(self._child.ask(request, at_most))
        except ChildEnded as ended:
            return self._failure(ended, seconds)
        except ValueError as error:  # the function wrote to the pipe
            self.stop()
            return {"failure": "disturbed the replies of its process", "traceback": str(error)}
        if "spent" in reply:
            self.stop()
        for record in map(logging.makeLogRecord, reply.pop("log", ())):
            if (logger := logging.getLogger(record.name)).isEnabledFor(record.levelno):
                logger.handle(record)
        return reply

    def _settings(self) -> dict:
        """What `worker.start` needs to know of this process."""
        loggers = [logging.root, *logging.root.manager.loggerDict.values()]
        levels = {
            logger.name: logger.level
            for logger in loggers
            if isinstance(logger, logging.Logger) and logger.level
        }
        return {
            "sys_path": [entry for entry in sys.path if isinstance(entry, str)],
            "log_levels": levels,
            "load_seconds": self.load_seconds,
        }

    def _failure(self, ended: ChildEnded, seconds: float) -> dict:
        """The reply in place of a process that ended; faulthandler's "Timeout" begins its text."""
        timeout = ended.left.startswith("Timeout")
        if timeout and " in resolve_name" in ended.left:
            failure = f"took longer than {self.load_seconds:.3g} s to be imported"
        elif timeout or ended.late:
            failure = f"took longer than {seconds:.3g} s (rewards.seconds)"
        else:
            failure = f"ended its process ({ended.how})"
        return {"failure": failure, "traceback": ended.left}

    def stop(self) -> None:
        """Kill the process, if it runs, and what it has started."""
        self._child.stop()
