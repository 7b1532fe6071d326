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

TOO_LONG = "signal SIGPROF"  # how the child ends that exceeds CPU_SECONDS

_child = ChildProcess("gtpo.answers.verifier", limits={"RLIMIT_AS": MEMORY_BYTES}, quiet=True)
_lock = threading.Lock()  # the child takes one question at a time


class CannotCompare(RuntimeError):
    """math-verify's process ended twice before it answered, for another reason than its limit."""


@functools.lru_cache(maxsize=4096)
def equal_expressions(answer: str, reference: str) -> bool:
    r"""Whether two expressions are equal. They are TeX without \boxed and without $.

    False where the question exceeds CPU_SECONDS. Raises CannotCompare where the child ends twice in
    another way: it may have been killed for want of memory. Raises RuntimeError where math-verify
    does not start.
    """
    return _ask("equal", answer, reference)


@functools.lru_cache(maxsize=4096)
def nearly_equal(expression: str, value: str, tolerance: str) -> bool:
    """Whether an expression differs from `value` by at most `tolerance`, both as fractions.

    Raises what `equal_expressions` raises.
    """
    return _ask("near", expression, value, tolerance)


def _ask(*question: str) -> bool:
    with _lock:
        try:
            return _reply(question)
        except ChildEnded as error:
            if error.how == TOO_LONG:
                return False
        try:
            return _reply(question)
        except ChildEnded as error:
            if error.how == TOO_LONG:
                return False
            raise CannotCompare(f"math-verify ended twice at one question ({error.how})") from None


def _reply(question: tuple[str, ...]) -> bool:
    if not _child.running:
        _start()
    return json.loads(_child.ask(json.dumps(question).encode(), WALL_SECONDS))


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

    A question is a JSON list: "equal" and two expressions, or "near", an expression, a fraction and
    a tolerance. Its reply is true or false.
    """
    from dataclasses import replace

    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Rational

    from gtpo.answers import exact

    # without math-verify's units, which take 3c for 3; gtpo.answers.quantity compares the units
    config = LatexExtractionConfig()
    normalization = replace(config.normalization_config, units=False)
    config = [replace(config, normalization_config=normalization)]

    @functools.lru_cache(256)
    def parsed(text: str):
        return parse(f"\\boxed{{{text}}}", config, parsing_timeout=None)

    def equal(answer: str, reference: str) -> bool:
        one, other = parsed(answer), parsed(reference)
        same = verify(other, one, allow_set_relation_comp=True, timeout_seconds=None)
        if not one or not other:
            return bool(same)
        try:
            if same:
                return not exact.certainly_different(one[0], other[0])
            return exact.one_equation_scaled(one[0], other[0])
        except Exception:  # sympy has no number for it: math-verify's decision stands
            return bool(same)

    def near(expression: str, value: str, tolerance: str) -> bool:
        one = parsed(expression)
        try:
            return bool(one) and exact.near(one[0], Rational(value), Rational(tolerance))
        except Exception:  # it has no value
            return False

    def answer(question: bytes) -> bytes:
        texts = json.loads(question)
        if texts is None:  # the parent asks whether this process has started
            return b"null"
        _limit_cpu(CPU_SECONDS)
        reply = {"equal": equal, "near": near}[texts[0]](*texts[1:])
        _limit_cpu(0)
        return json.dumps(reply).encode()

    return answer


def _limit_cpu(seconds: float) -> None:
    """End this process, whatever it is doing, after so many seconds of processor time; 0: never."""
    if os.name == "posix":  # elsewhere there is only WALL_SECONDS
        signal.setitimer(signal.ITIMER_PROF, seconds)
