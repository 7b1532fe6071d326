"""`--check`: everything that can fail early fails here, in under a minute and without loading the
model's weights.

What a check says and what it warns of become findings; a check whose ground another one has pulled
away is told as not checked. The checks themselves are in gtpo/checks.py.
"""

import contextlib
import logging
import sys
from collections.abc import Iterator

from gtpo.checks import STEPS, Facts
from gtpo.errors import RecipeError
from gtpo.recipe import command_line as cli
from gtpo.runs.start import Request
from gtpo.system.findings import Finding, as_json, conclusion, line


def check(command: cli.CommandLine, request: Request, processes: int) -> int:
    """Print what was found, a line each as it is found or all as JSON; returns the exit code."""
    out, found = sys.stdout, []
    asked = "json" in command.switches
    # what somebody's module prints belongs to no table
    with contextlib.redirect_stdout(sys.stderr):
        for finding in findings(Facts(command, request, processes)):
            found.append(finding)
            if not asked:
                print(line(finding, colour=out.isatty()), file=out, flush=True)
    print(as_json(found) if asked else conclusion(found), file=out)
    return 2 if any(finding.verdict == "fail" for finding in found) else 0


def findings(facts: Facts) -> Iterator[Finding]:
    for name, needed, step in STEPS:
        if any(getattr(facts, fact) is None for fact in needed):
            if facts.recipe is not None:
                yield Finding("warn", name, "not checked, since what it needs has failed above")
            continue
        with _warnings() as warned:
            try:
                said = step(facts)
                made = said if isinstance(said, list) else [Finding("ok", name, said)]
            except RecipeError as error:
                made = [Finding("fail", name, sentence) for sentence in str(error).split("\n")]
            # somebody's code, or a library's: what it raises is what was to be found
            except (Exception, SystemExit) as error:
                made = [Finding("fail", name, f"{type(error).__name__}: {error}")]
        yield from (Finding("warn", name, text.removeprefix("[GTPO] ")) for text in warned)
        yield from made


@contextlib.contextmanager
def _warnings():
    """The warnings that our modules log inside, as a list; nothing they log reaches the
    terminal.
    """
    texts: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    ours, keep = logging.getLogger("gtpo"), Keep(logging.WARNING)
    ours.addHandler(keep)
    propagate, ours.propagate = ours.propagate, False
    try:
        yield texts
    finally:
        ours.removeHandler(keep)
        ours.propagate = propagate
