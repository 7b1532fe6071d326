"""Ask math-verify whether two expressions are equal, in a child process that can be killed.

A few characters are enough to make math-verify (sympy, that is) run for ever or eat all memory, and
it wants the main thread for itself. So this file is also a program: run as a script, it reads
questions and writes verdicts, a line each. The child starts at the first question, serves all
threads in turn, and is replaced when a question kills it. It is no multiprocessing pool, for the
children of those import the caller's main module, which a script without a `__main__` guard does
not survive.
"""

import atexit
import contextlib
import functools
import json
import os
import subprocess
import sys
import threading

# for one question: a limit in processor time gives the same verdict on a busy machine
CPU_SECONDS = 3.0
MEMORY_BYTES = 2 << 30
# backstops for a machine, or a disk, that hardly moves
WALL_SECONDS, START_SECONDS = 60.0, 180.0

_lock, _child = threading.Lock(), None


@functools.lru_cache(maxsize=4096)
def equal_expressions(answer: str, reference: str) -> bool:
    r"""Whether math-verify takes two expressions (TeX, no \boxed, no $) for equal; False where they
    are too much.

    Too much is what exceeds CPU_SECONDS or MEMORY_BYTES, or crashes the child. RuntimeError if that
    does not start.
    """
    with _lock:
        if _child is None or _child.poll() is not None:
            _start()
        return _exchange(json.dumps([answer, reference]).encode() + b"\n", WALL_SECONDS) == b"1"


def _start():
    global _child
    _stop()
    _child = subprocess.Popen(
        # -P: or modules of this folder would hide others of the same name
        [sys.executable, "-P", __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        start_new_session=True,  # Ctrl-C is for the parent
    )
    if _exchange(b"", START_SECONDS) != b"ready":
        raise RuntimeError(
            f"gtpo.answers.verifier: math-verify does not start; try `{sys.executable} -c 'import"
            " math_verify'`"
        )


def _exchange(question: bytes, seconds: float) -> bytes:
    """The child's next line; b"" where it died, or was killed after so many seconds."""
    timer = threading.Timer(seconds, _child.kill)
    timer.daemon = True
    timer.start()
    reply = b""
    try:
        _child.stdin.write(question)
        reply = _child.stdout.readline().strip()
    except BrokenPipeError:
        pass
    finally:
        timer.cancel()
        # after Ctrl-C, too: the reply to this question must not be taken for that to the next
        if not reply:
            _stop()
    return reply


def _stop():
    global _child
    if _child is not None:
        _child.kill()
        _child.communicate()
        _child = None


def _forget():
    """After a fork: the child is the parent's, and the lock may be held by a thread that is not
    there any more.
    """
    global _lock, _child
    _lock, _child = threading.Lock(), None


atexit.register(_stop)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _serve():
    import signal
    from dataclasses import replace

    # sent to all of a job, whose run has a step to finish: no verdict may be lost
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, lambda *_: None)
    posix = os.name == "posix"  # elsewhere only WALL_SECONDS limits
    if posix:
        import resource

        with contextlib.suppress(ValueError, OSError):  # macOS refuses
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what a library prints is no reply

    from math_verify import LatexExtractionConfig, parse, verify

    # Not math-verify's units, which take 3c for 3; gtpo.answers has been there before.
    config = LatexExtractionConfig()
    config = [
        replace(config, normalization_config=replace(config.normalization_config, units=False))
    ]
    read = functools.lru_cache(256)(
        lambda text: parse(f"\\boxed{{{text}}}", config, parsing_timeout=None)
    )
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        answer, reference = json.loads(line)
        if posix:
            # unhandled, it ends the process, whatever that is doing
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        equal = verify(
            read(reference), read(answer), allow_set_relation_comp=True, timeout_seconds=None
        )
        if posix:
            signal.setitimer(signal.ITIMER_PROF, 0)
        print(int(equal), file=replies, flush=True)


if __name__ == "__main__":
    _serve()
