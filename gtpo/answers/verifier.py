"""Asks math-verify whether two expressions are equal, in a child process that can be killed.

A few characters are enough to make sympy, and so math-verify, run for ever or use up all memory.
math-verify also wants the main thread for itself. So it runs in a child. The child starts at the
first question, serves all threads in turn, and is replaced when a question kills it.
"""

import functools
import json
import os
import signal
import sys
import threading
from collections.abc import Callable

from gtpo.system.child_process import ChildEnded, ChildProcess

# Limits for one question. A limit in processor time gives the same result on a busy machine.
CPU_SECONDS = 3.0
MEMORY_BYTES = 2 << 30
# Limits of the clock, for a machine or a disk that hardly moves.
WALL_SECONDS, START_SECONDS = 60.0, 180.0

_child = ChildProcess("gtpo.answers.verifier", limits={"RLIMIT_AS": MEMORY_BYTES}, quiet=True)
_lock = threading.Lock()  # the child takes one question at a time


@functools.lru_cache(maxsize=4096)
def equal_expressions(answer: str, reference: str) -> bool:
    r"""Whether math-verify finds two expressions equal. They are TeX without \boxed and without $.

    False where the question exceeds CPU_SECONDS or MEMORY_BYTES, or crashes the child. Raises
    RuntimeError where math-verify does not start.
    """
    with _lock:
        if not _child.running:
            _start()
        try:
            reply = _child.ask(json.dumps([answer, reference]).encode(), WALL_SECONDS)
        except ChildEnded:
            return False
        return json.loads(reply)


def _start() -> None:
    _child.start({})
    try:
        _child.ask(b"null", START_SECONDS)
    except ChildEnded:
        raise RuntimeError(
            "gtpo.answers.verifier: math-verify does not start; "
            f"try `{sys.executable} -c 'import math_verify'`"
        ) from None


def _renew_lock() -> None:
    """After a fork: the lock may belong to a thread that the fork does not have."""
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


# ---- the child


def start(settings: dict, replies) -> Callable[[bytes], bytes]:
    """Import math-verify. Returns the function that answers a question in the child.

    A question is a JSON list of answer and reference. Its reply is true or false.
    """
    from dataclasses import replace

    from math_verify import LatexExtractionConfig, parse, verify

    # without math-verify's units, which take 3c for 3; gtpo.answers.same has compared the units
    config = LatexExtractionConfig()
    normalization = replace(config.normalization_config, units=False)
    config = [replace(config, normalization_config=normalization)]

    @functools.lru_cache(256)
    def parsed(text: str):
        return parse(f"\\boxed{{{text}}}", config, parsing_timeout=None)

    def answer(question: bytes) -> bytes:
        texts = json.loads(question)
        if texts is None:  # the parent asks whether this process has started
            return b"null"
        answer, reference = texts
        _limit_cpu(CPU_SECONDS)
        equal = verify(
            parsed(reference), parsed(answer), allow_set_relation_comp=True, timeout_seconds=None
        )
        _limit_cpu(0)
        return json.dumps(bool(equal)).encode()

    return answer


def _limit_cpu(seconds: float) -> None:
    """End this process, whatever it is doing, after so many seconds of processor time; 0: never."""
    if os.name == "posix":  # elsewhere there is only WALL_SECONDS
        signal.setitimer(signal.ITIMER_PROF, seconds)
