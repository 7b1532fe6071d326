"""SIGTERM and Ctrl-C.

The first signal lets the run finish its step and save a checkpoint. A second Ctrl-C stops it at
once.
"""

import contextlib
import os
import signal
import time

from gtpo.system import processes

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal, as a shell reports it
# Signals that come within this many seconds count as one request. A launcher sends one after
# Ctrl-C, in addition to the terminal's.
TOGETHER = 1.0


class Interrupted(BaseException):
    """The run ends here because a signal requested it.

    This is not a failure, so it is no Exception: code that handles failures must not catch it.
    """

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.exit_code = EXIT_CODES[signum]


class Interruption:
    """Whether a signal has requested that the run stops.

    Signals are noticed only inside `handling_signals()`, and only in the main thread.
    """

    def __init__(self):
        self.signum: int | None = None  # the first signal
        self._time = 0.0  # when it came
        self._deferred = self._ignored = False
        self._raised: Interrupted | None = None

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signum is not None

    @contextlib.contextmanager
    def handling_signals(self):
        """Inside, a signal raises `Interrupted` at once, unless `deferred()` is active."""
        try:
            before = {signum: signal.signal(signum, self._handle) for signum in EXIT_CODES}
        except ValueError:  # not the main thread, which alone receives signals
            yield self
            return
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextlib.contextmanager
    def deferred(self):
        """Inside, a signal is only noted. The code there looks at `requested` and saves first."""
        self._deferred, self._raised = True, None
        try:
            yield
        except Exception:
            # A launcher may react to this error with a signal, which must not replace the error.
            self.ignore_further_signals()
            raise
        finally:
            self._deferred = False

    @contextlib.contextmanager
    def unwrapped(self):
        """Inside, an `Interrupted` that a library turned into its own error is raised as itself.

        Lazy imports do that, for example.
        """
        try:
            yield
        except Exception as error:
            if self._raised is None:
                raise
            raise self._raised from error

    def raise_if_requested(self, message: str) -> None:
        """Raises `Interrupted` with `message` if a signal has come."""
        if self.signum is not None:
            raise Interrupted(self.signum, message)

    def ignore_further_signals(self) -> int | None:
        """Ignore signals from here on, because the process is ending by itself.

        Returns the exit code of a signal that came before, or None.
        """
        self._ignored = True
        return EXIT_CODES.get(self.signum)

    def _handle(self, signum, frame):
        if self._ignored:
            return
        if self.signum is None:
            self.signum, self._time = signum, time.monotonic()
            if not self._deferred:
                self._raised = Interrupted(signum, "nothing is lost, since no step was under way")
                raise self._raised
            _print_now(
                "Stopping: this step is finished and a checkpoint saved first. Ctrl-C again stops"
                " at once."
            )
        elif signum == signal.SIGINT and time.monotonic() - self._time > TOGETHER:
            _print_now("Stopped at once; the last checkpoint stays as it is.")
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


def _print_now(line: str) -> None:
    """Print to stderr from the first process.

    It bypasses Python's own streams, because the signal may have interrupted a write to them.
    """
    if not processes.is_first():
        return
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())
