"""What a verb says on the terminal: log messages, above a progress bar if there is one, and
mistakes as sentences.
"""

import contextlib
import logging
import logging.handlers
import sys

from gtpo.system import processes
from gtpo.system.safe_text import SafeFormatter, printable, without_secrets


def print_end(verdict: str, why: BaseException) -> None:
    """Why a verb ends, on stderr: `error: ...`, a line for each sentence."""
    with _above_the_bar(sys.stderr):
        for sentence in str(why).split("\n"):
            print(f"{verdict}: {printable(without_secrets(sentence))}", file=sys.stderr)


class _Console(logging.StreamHandler):
    """Writes to stderr, above a progress bar rather than into it."""

    def emit(self, record: logging.LogRecord) -> None:
        with _above_the_bar(self.stream):
            super().emit(record)


def _above_the_bar(stream) -> contextlib.AbstractContextManager:
    from tqdm import tqdm

    return tqdm.external_write_mode(file=stream)


@contextlib.contextmanager
def log_to_console():
    """Messages to stderr; they are kept for the log file too, which exists only once the run
    directory does.
    """
    root = logging.getLogger()
    console = _Console()
    console.setFormatter(SafeFormatter("%(message)s"))
    # one process speaks
    console.setLevel(logging.NOTSET if processes.is_first() else logging.ERROR)
    # those lines are on the screen already
    console.addFilter(lambda record: record.name != "gtpo.runs.progress")
    early = logging.handlers.MemoryHandler(
        100_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False
    )
    logging.getLogger("gtpo").setLevel(logging.INFO)
    for handler in (console, early):
        root.addHandler(handler)
    try:
        yield early
    finally:
        for handler in (console, early):
            root.removeHandler(handler)
        if early.target is not None:
            early.target.close()
