"""What a verb says on the terminal: log messages, above a progress bar if there is one, and
mistakes as sentences.
"""

import contextlib
import json
import logging
import logging.handlers
import sys
from typing import Any, Literal, NamedTuple

from gtpo.system import processes
from gtpo.system.safe_text import SafeFormatter, printable, without_secrets


def print_ending(verdict: str, why: BaseException) -> None:
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


COLOURS = {"ok": "\x1b[32m", "warn": "\x1b[33m", "fail": "\x1b[31m"}
WIDTH = 13  # of the names in the table


class Finding(NamedTuple):
    verdict: Literal["ok", "warn", "fail"]
    check: str
    sentence: str
    details: dict[str, Any] = {}


def finding_line(finding: Finding, *, colour: bool) -> str:
    """A line of the table."""
    verdict = f"{finding.verdict:<4}"
    if colour:
        verdict = f"{COLOURS[finding.verdict]}{verdict}\x1b[0m"
    return f"{verdict}  {finding.check:<{WIDTH}}  {_safe(finding.sentence)}"


def conclusion(findings: list[Finding]) -> str:
    """`Ready: 12 ok, 1 warning.`, or `Not ready: ...`."""
    counts = {
        verdict: sum(finding.verdict == verdict for finding in findings) for verdict in COLOURS
    }
    told = [f"{counts['ok']} ok"] + [
        f"{counts[verdict]} {word}{'' if counts[verdict] == 1 else 's'}"
        for verdict, word in (("warn", "warning"), ("fail", "failure"))
        if counts[verdict]
    ]
    return f"{'Not ready' if counts['fail'] else 'Ready'}: {', '.join(told)}."


def findings_as_json(findings: list[Finding]) -> str:
    return json.dumps(
        {
            "ready": all(finding.verdict != "fail" for finding in findings),
            "checks": [
                {**finding._asdict(), "sentence": _safe(finding.sentence)} for finding in findings
            ],
        },
        indent=2,
        ensure_ascii=True,
    )


def _safe(text: str) -> str:
    return printable(without_secrets(" ".join(text.split())))
