"""What a verb says on the terminal: log messages, above a progress bar if there is one, and mistakes as sentences."""

import contextlib
import logging
import logging.handlers
import os
import sys

from gtpo.safe_text import SafeFormatter, printable, without_secrets


def print_error(error: Exception) -> None:
    """Each sentence of a RecipeError on a line of stderr."""
    for sentence in str(error).split("\n"):
        print(f"error: {printable(without_secrets(sentence))}", file=sys.stderr)


class _Console(logging.StreamHandler):
    """Writes to stderr, above a progress bar rather than into it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


@contextlib.contextmanager
def log_to_console():
    """Messages to stderr; they are kept for the log file too, which exists only once the run directory does."""
    root = logging.getLogger()
    console = _Console()
    console.setFormatter(SafeFormatter("%(message)s"))
    console.setLevel(logging.NOTSET if os.environ.get("RANK", "0") == "0" else logging.ERROR)  # one process speaks
    console.addFilter(lambda record: record.name != "gtpo.watch")  # those lines are on the screen already
    early = logging.handlers.MemoryHandler(100_000, flushLevel=logging.CRITICAL + 1, flushOnClose=False)
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
