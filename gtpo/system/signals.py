"""SIGTERM and Ctrl-C: the first lets the run finish its step and save, a second Ctrl-C stops it at
once.
"""

import contextlib
import os
import signal
import time

from gtpo.system import processes

EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}  # 128 + the signal, as a shell reports it
# seconds: signals that come closer than that are one request (a launcher's, and the terminal's own)
TOGETHER = 1.0


class Interrupted(BaseException):
    """The run ends here because somebody asked for it; no failure, so nothing that catches failures
    may catch it.
    """

    def __init__(self, signum: int, where: str):
        super().__init__(where)
        self.exit_code = EXIT_CODES[signum]


class Interruption:
    """Whether somebody has asked the run to stop. `handling_signals()` is needed to notice, and works in
    the main thread alone.
    """

    def __init__(self):
        self.signum: int | None = None
        self._when = 0.0
        self._deferred = self._over = False
        self._raised: Interrupted | None = None

    @property
    def requested(self) -> bool:
        return self.signum is not None

    @contextlib.contextmanager
    def handling_signals(self):
        """Inside, signals ask to stop: at once by `Interrupted`, unless `deferred`."""
        try:
            before = {signum: signal.signal(signum, self._ask) for signum in EXIT_CODES}
        except ValueError:  # not the main thread: nobody sends it signals
            yield self
            return
        try:
            yield self
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    @contextlib.contextmanager
    def deferred(self):
        """Inside, a request is only noted: whoever is there has something to save, and looks at
        `requested`.
        """
        self._deferred, self._raised = True, None
        try:
            yield
        # on its way to be told: a launcher that ends the others because of it must not overtake it
        except Exception:
            self.ignore_further_signals()
            raise
        finally:
            self._deferred = False

    @contextlib.contextmanager
    def unwrapped(self):
        """Inside, an `Interrupted` of which a library makes an error of its own stays what it was:
        lazy imports do that.
        """
        try:
            yield
        except Exception as error:
            if self._raised is None:
                raise
            raise self._raised from error

    def raise_if_requested(self, where: str) -> None:
        """End the run if that was asked for."""
        if self.signum is not None:
            raise Interrupted(self.signum, where)

    def ignore_further_signals(self) -> int | None:
        """From here on signals are not noticed: the process ends by itself. Returns the exit code
        that the one before asks for.
        """
        self._over = True
        return EXIT_CODES.get(self.signum)

    def _ask(self, signum, frame):
        if self._over:
            return
        if self.signum is None:
            self.signum, self._when = signum, time.monotonic()
            if not self._deferred:
                self._raised = Interrupted(signum, "nothing is lost, since no step was under way")
                raise self._raised
            _say(
                "Stopping: this step is finished and a checkpoint saved first. Ctrl-C again stops"
                " at once."
            )
        elif signum == signal.SIGINT and time.monotonic() - self._when > TOGETHER:
            _say("Stopped at once; the last checkpoint stays as it is.")
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)


def _say(line: str) -> None:
    """Past Python's own streams, which a signal may have interrupted; by one process, as all get
    the signal.
    """
    if not processes.is_first():
        return
    with contextlib.suppress(OSError):
        os.write(2, f"\n{line}\n".encode())
