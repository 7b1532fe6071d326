"""The terminal: log messages, how a command ended, and the results of checks.

If there is a progress bar, everything is printed above it.
"""

import contextlib
import json
import logging
import logging.handlers
import sys
from typing import Any, Literal, NamedTuple

from gtpo.system import processes
from gtpo.system.safe_text import SafeFormatter, printable, without_secrets

# The logger whose messages go to the log file alone. The terminal has them already.
LOG_FILE_ONLY = "gtpo.log_file"
COLOURS = {"ok": "\x1b[32m", "warn": "\x1b[33m", "fail": "\x1b[31m"}
NAME_WIDTH = 13  # characters of a check's name in the table


def print_ending(label: str, reason: BaseException) -> None:
    """Print why a command ended to stderr, one line per sentence: `error: training.beta: ...`."""
    with _above_progress_bar(sys.stderr):
        for sentence in str(reason).split("\n"):
            print(f"{label}: {printable(without_secrets(sentence))}", file=sys.stderr)


class _Console(logging.StreamHandler):
    """Writes log messages to stderr, above a progress bar rather than into it."""

    def emit(self, record: logging.LogRecord) -> None:
        with _above_progress_bar(self.stream):
            super().emit(record)


def _above_progress_bar(stream) -> contextlib.AbstractContextManager:
    from tqdm import tqdm

    return tqdm.external_write_mode(file=stream)


@contextlib.contextmanager
def log_to_console():
    """Inside, log messages go to stderr.

    Yields a handler that also keeps them in memory. It writes them to the run's log file once the
    run directory exists and the handler has a target.
    """
    root = logging.getLogger()
    console = _Console()
    console.setFormatter(SafeFormatter("%(message)s"))
    # Only the first process prints messages. The others print errors alone.
    console.setLevel(logging.NOTSET if processes.is_first() else logging.ERROR)
    # The terminal shows the lines of this logger already.
    console.addFilter(lambda record: record.name != LOG_FILE_ONLY)
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


# ---- results of checks


class Finding(NamedTuple):
    """The result of one check: a verdict, the name of the check, and one sentence."""

    verdict: Literal["ok", "warn", "fail"]
    check: str
    sentence: str
    details: dict[str, Any] = {}


def finding_line(finding: Finding, *, colour: bool) -> str:
    """A finding as a line of the table that `--check` prints."""
    verdict = f"{finding.verdict:<4}"
    if colour:
        verdict = f"{COLOURS[finding.verdict]}{verdict}\x1b[0m"
    return f"{verdict}  {finding.check:<{NAME_WIDTH}}  {_one_safe_line(finding.sentence)}"


def conclusion(findings: list[Finding]) -> str:
    """`Ready: 12 ok, 1 warning.`, or `Not ready: ...` if a check failed."""
    counts = {
        verdict: sum(finding.verdict == verdict for finding in findings) for verdict in COLOURS
    }
    parts = [f"{counts['ok']} ok"]
    for verdict, noun in (("warn", "warning"), ("fail", "failure")):
        if counts[verdict]:
            parts.append(f"{counts[verdict]} {noun}{'' if counts[verdict] == 1 else 's'}")
    return f"{'Not ready' if counts['fail'] else 'Ready'}: {', '.join(parts)}."


def findings_as_json(findings: list[Finding]) -> str:
    """All findings as JSON: `ready`, and one entry of `checks` for each."""
    checks = [
        {**finding._asdict(), "sentence": _one_safe_line(finding.sentence)} for finding in findings
    ]
    ready = all(finding.verdict != "fail" for finding in findings)
    return json.dumps({"ready": ready, "checks": checks}, indent=2, ensure_ascii=True)


def _one_safe_line(text: str) -> str:
    return printable(without_secrets(" ".join(text.split())))
