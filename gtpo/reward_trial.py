"""Call one reward function in a process of its own, which can be killed: it may raise, hang, print or crash.

This file is also the program of that process. It gets the reward's dotted path and the calls to make as JSON on its
standard input, and answers each with a line of JSON.
"""

import json
import os
import subprocess
import sys
import threading
import time
from typing import Any, NamedTuple

IMPORT_SECONDS, CALL_SECONDS = 60.0, 20.0


class Reply(NamedTuple):
    """What a call came to: `rewards` and the seconds it took, or `problem`, a clause that says why there are none."""

    rewards: Any = None
    seconds: float = 0.0
    problem: str | None = None


def try_reward(
    dotted: str, calls: list[dict[str, Any]], *, import_seconds: float = IMPORT_SECONDS, call_seconds: float = CALL_SECONDS,
) -> list[Reply]:
    """The replies of the reward at `dotted` to `calls`, keyword arguments each; they end with the first problem."""
    child = subprocess.Popen(
        [sys.executable, "-P", __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        start_new_session=True)
    try:
        replies = []
        question = json.dumps({"path": dotted, "sys_path": sys.path}).encode()
        reply = _exchange(child, question, import_seconds, " from its import")
        if reply.problem:
            return [reply]
        for call in calls:
            replies.append(_exchange(child, json.dumps(call).encode(), call_seconds))
            if replies[-1].problem:
                break
        return replies
    finally:
        _kill(child)
        child.communicate()


def _exchange(child: subprocess.Popen, question: bytes, seconds: float, whence: str = "") -> Reply:
    timer = threading.Timer(seconds, _kill, [child])
    timer.start()
    start = time.monotonic()
    try:
        child.stdin.write(question + b"\n")
        child.stdin.flush()
        line = child.stdout.readline()
    except BrokenPipeError:
        line = b""
    finally:
        timer.cancel()
    if line:
        return Reply(**json.loads(line))
    code = child.wait(10)
    return Reply(problem=f"does not come back{whence} within {seconds:g} seconds" if time.monotonic() - start >= seconds else
                 f"ends the whole process (exit code {code}) instead of coming back{whence}")


def _kill(child: subprocess.Popen) -> None:
    """The child and the processes that it has started."""
    import signal

    try:
        os.killpg(child.pid, signal.SIGKILL) if os.name == "posix" else child.kill()
    except ProcessLookupError:
        pass


# ---- in the child


def _serve() -> None:
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a reward prints is no reply

    def reply(**values: Any) -> None:
        print(json.dumps(values), file=replies, flush=True)

    order = json.loads(sys.stdin.readline())
    sys.path[:] = order["sys_path"]
    try:
        reward = _load(order["path"])
        reply()
    except BaseException as error:  # somebody's code: whatever it raises is what is asked for
        reply(problem=f"cannot be imported ({_told(error)})")
        return
    for line in sys.stdin:
        reply(**_called(reward, json.loads(line)))


def _load(dotted: str):
    from gtpo.cli import load_object

    found = load_object(dotted)
    if not callable(found):
        raise TypeError(f"it is {type(found).__name__}, which cannot be called")
    return found


def _called(reward, call: dict[str, Any]) -> dict[str, Any]:
    import asyncio
    import inspect
    from types import SimpleNamespace

    extras = {"trainer_state": SimpleNamespace(global_step=0, max_steps=1, epoch=0.0, log_history=[]),
              "log_extra": lambda column, values: None, "log_metric": lambda name, value: None}
    start = time.perf_counter()
    try:
        rewards = reward(**call, **extras)
        if inspect.iscoroutine(rewards):
            rewards = asyncio.run(rewards)
        seconds = time.perf_counter() - start
        return {"rewards": [_number(value) for value in rewards], "seconds": seconds}
    except BaseException as error:
        return {"problem": f"raises {_told(error)}"}


def _number(value: Any) -> float | str | None:
    """A reward as JSON has it; a text that says what is wrong with one that is no number."""
    if value is None:
        return None
    if isinstance(value, str):
        return f"the text {value[:40]!r}"
    try:
        number = float(value)  # numpy's and torch's numbers, too
    except (TypeError, ValueError):
        return f"a {type(value).__name__}"
    return number if number - number == 0 else str(number)


def _told(error: BaseException) -> str:
    import traceback

    frames = traceback.extract_tb(error.__traceback__)
    theirs = [frame for frame in frames if frame.filename != __file__ and not frame.filename.startswith("<frozen importlib")]
    where = f", {os.path.basename(theirs[-1].filename)} line {theirs[-1].lineno}" if theirs else ""
    return " ".join(f"{type(error).__name__}: {error}{where}".split())[:300]


if __name__ == "__main__":
    _serve()
