"""One reward call, and the process that makes reward calls for a run.

`call_reward` calls a function and checks what it returns and logs. The rest of this file runs in a
child process (gtpo.system.child_process). There it imports functions by their dotted paths and
makes the calls that the parent asks for. A call comes as a pickle; its reply goes back as JSON, so
the parent never unpickles what a reward function made.

A call that takes too long ends the process, from a thread of faulthandler that needs no GIL. So a
loop in C is stopped as well, and the traceback is what the process leaves.
"""

import collections
import contextlib
import datetime
import faulthandler
import functools
import inspect
import itertools
import json
import logging
import math
import pickle
import pkgutil
import random
import sys
import time
import traceback
from collections.abc import Awaitable, Callable, Iterable, Mapping, Set
from pathlib import Path
from typing import BinaryIO

LOAD_SECONDS = 600.0  # to import the module of a function
OPENING = "prompt_opening"  # what the prompt has already written of the answer, a text
RETURN_NUMBERS = "return a list with a number or None for each completion"


class ContractBroken(Exception):
    """A function returned or logged something that TRL's contract does not allow.

    The message is a clause that says what it was, and what would work.
    """


class Logged:
    """What a reward function logs, as plain data: a checkpoint and the log keep it.

    `metrics` are pairs of a name and a float, `columns` are pairs of a name and a list. `broken` is
    a clause on the first thing that cannot be kept, None if there is none. Nothing is raised, since
    a function may catch it.
    """

    def __init__(self):
        self.metrics: list[tuple[str, float]] = []
        self.columns: list[tuple[str, list]] = []
        self.broken: str | None = None

    def log_metric(self, name: str, value: object) -> None:
        """Stands in for TRL's `log_metric`."""
        try:
            self.metrics.append((_name(name), _number(value)))
        except ContractBroken as error:
            self._break(f"logged {error} as the metric {_shown(name)}; log a number")

    def log_extra(self, column: str, values: Iterable) -> None:
        """Stands in for TRL's `log_extra`."""
        try:
            if isinstance(values, str | bytes | Mapping | Set) or not isinstance(values, Iterable):
                raise ContractBroken(f"{_described(values)} instead of a list")
            self.columns.append((_name(column), [_plain(value) for value in values]))
        except ContractBroken as error:
            self._break(
                f"logged {error} in the column {_shown(column)}, which a checkpoint cannot keep;"
                " log a list with numbers, texts or None, for instance str(value)"
            )

    def _break(self, clause: str) -> None:
        self.broken = self.broken or clause


def _name(name: object) -> str:
    if isinstance(name, str):
        return name
    raise ContractBroken(f"under {_described(name)} instead of a name")


def _shown(name: object) -> str:
    return repr(name[:60]) if isinstance(name, str) else _described(name)


def _number(value: object) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf
    except Exception:  # what is no number may raise anything
        raise ContractBroken(_described(value)) from None


def _plain(value: object) -> object:
    """Numbers, texts, None, and lists and mappings of them, for those of numpy and torch as well.

    A date becomes its text. Raises ContractBroken for anything else.
    """
    try:
        if hasattr(value, "tolist"):
            value = value.tolist()
        if value is None or isinstance(value, bool):
            return value
        if isinstance(value, str):
            return "".join(value)  # a plain one, also of a subclass
        if isinstance(value, int | float):
            return float(value) if isinstance(value, float) else int(value)
        if isinstance(value, list | tuple):
            return [_plain(inner) for inner in value]
        if isinstance(value, dict):
            return {str(_plain(name)): _plain(inner) for name, inner in value.items()}
        if isinstance(value, datetime.date | datetime.time):
            return str(value)
    except RecursionError:
        raise ContractBroken("a list that is nested too deeply") from None
    raise ContractBroken(_described(value))


def call_reward(function: Callable, arguments: dict, count: int) -> dict:
    """The reply of one reward call on `count` completions: `rewards`, `metrics` and `columns`.

    `rewards` are `count` floats or Nones. `metrics` are pairs of a name and a float, `columns` are
    pairs of a name and a list: what the function logged.

    The argument `prompt_opening`, a text, is handed only to a function that names it.

    Where the function raises, the reply is its `failure`, a clause, and the `traceback`. Where it
    breaks TRL's contract, the reply is the `bug`, a clause on that and on what would work.
    """
    logged = Logged()
    if isinstance(arguments.get(OPENING), str) and not names(function, OPENING):
        arguments = {name: value for name, value in arguments.items() if name != OPENING}
    try:
        returned = function(**arguments, log_metric=logged.log_metric, log_extra=logged.log_extra)
        if isinstance(returned, Awaitable):
            returned = _event_loop().run_until_complete(returned)
        rewards = _rewards(returned, count)
        if logged.broken:
            raise ContractBroken(logged.broken)
        return {"rewards": rewards, "metrics": logged.metrics, "columns": logged.columns}
    except ContractBroken as error:
        return {"bug": str(error)}
    except (Exception, SystemExit) as error:
        return _failure("raised ", error)


def names(function: Callable, parameter: str) -> bool:
    """Whether `function` has a parameter of that name."""
    try:
        return parameter in inspect.signature(function).parameters
    except (TypeError, ValueError):  # some functions in C have no signature
        return False


def _failure(what: str, error: BaseException) -> dict:
    message = " ".join("".join(traceback.format_exception_only(error)).split())[:500]
    trace = "".join(traceback.format_exception(error))[-20_000:]
    if isinstance(error, MemoryError):
        # The process is not used again: the next call would lack the memory that is still in use.
        return {"failure": f"{what}{message} (rewards.memory)", "traceback": trace, "spent": True}
    return {"failure": what + message, "traceback": trace}


def _rewards(returned: object, count: int) -> list[float | None]:
    if isinstance(returned, str | bytes | Mapping | Set) or not isinstance(returned, Iterable):
        raise ContractBroken(
            f"returned {_described(returned)}, not a list with one reward per completion;"
            f" {RETURN_NUMBERS}"
        )
    # no more than one too many, as an iterator may never end
    rewards = [_reward(value) for value in itertools.islice(returned, count + 1)]
    if len(rewards) == count:
        return rewards
    if hasattr(returned, "__len__"):
        number = len(returned)
    else:
        number = "more" if len(rewards) > count else len(rewards)
    raise ContractBroken(
        f"returned {number} rewards for {count} completions, not one for each; {RETURN_NUMBERS}"
    )


def _reward(value: object) -> float | None:
    try:
        if isinstance(value, str | bytes):
            raise TypeError
        return None if value is None else float(value)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        raise ContractBroken(
            f"returned {_described(value)} as a reward, not a number or None; {RETURN_NUMBERS}"
        ) from None


def _described(value: object) -> str:
    if value is None:
        return "None"
    if isinstance(value, str | bytes):
        return f"the {type(value).__name__} {value[:60]!r}"
    return f"a {type(value).__name__}"


@functools.cache
def _event_loop():
    """One loop for all calls of this process: the clients of an asynchronous function need it."""
    import asyncio

    return asyncio.new_event_loop()


# ---- the child process


def start(settings: dict, replies: BinaryIO) -> Callable[[bytes], bytes]:
    """Prepare this process for reward calls. Returns the function that makes one.

    `settings` are the parent's `sys_path`, its `log_levels` by logger, and `load_seconds`, the time
    to import a function. Tracebacks of a crash go to `replies`.
    """
    # Linux: where the machine runs out of memory all the same, this process is killed first.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    sys.path[:] = settings["sys_path"]
    log = _Log()
    logging.getLogger().addHandler(log)
    for name, level in settings["log_levels"].items():
        logging.getLogger(name).setLevel(level)
    faulthandler.enable(replies)  # a crash leaves its traceback

    def reply(request: bytes) -> bytes:
        faulthandler.dump_traceback_later(settings["load_seconds"], exit=True, file=replies)
        try:
            return _reply(request, replies, log)
        finally:
            faulthandler.cancel_dump_traceback_later()

    return reply


class _Log(logging.Handler):
    """Collects what a function logs, as plain data for the log of the run."""

    def __init__(self):
        super().__init__()
        self.records: collections.deque[dict] = collections.deque(maxlen=1000)

    def emit(self, record: logging.LogRecord) -> None:
        try:
            # The message contains its arguments and the traceback, which need not cross as well.
            message = {"msg": self.format(record), "args": None}
            traces = dict.fromkeys(("exc_info", "exc_text", "stack_info"))
            self.records.append(vars(record) | message | traces)
        except Exception:
            self.handleError(record)


def _reply(request: bytes, replies: BinaryIO, log: _Log) -> bytes:
    try:
        path, arguments, count, seconds, seed = pickle.loads(request)
        function = pkgutil.resolve_name(path)
    except (Exception, SystemExit) as error:
        return _encoded(_failure("cannot be imported in its own process: ", error))
    _seed(seed)
    faulthandler.dump_traceback_later(seconds, exit=True, file=replies)
    began = time.perf_counter()
    reply = call_reward(function, arguments, count)
    reply |= {"seconds": time.perf_counter() - began, "log": list(log.records)}
    log.records.clear()
    try:
        return _encoded(reply)
    except Exception as error:  # anything that the methods of logged objects raise
        return _encoded(_failure("logged what cannot be handed to another process: ", error))


def _encoded(reply: dict) -> bytes:
    """A reply as JSON. Python's JSON keeps every bit of a float, and NaN and infinity."""
    return json.dumps(reply, default=_as_data).encode()


def _as_data(value: object) -> object:
    """Python's numbers and lists for those of numpy and torch, a text for any other object."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _seed(seed: str) -> None:
    """The same random numbers for the same call, in whichever process it is made."""
    random.seed(seed)
    number = random.Random(seed).getrandbits(32)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(number)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(number)
