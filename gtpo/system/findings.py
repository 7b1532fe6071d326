"""What a check found: verdict, what was checked, one sentence; as lines of a table, and as JSON."""

import json
from typing import Any, Literal, NamedTuple

from gtpo.system.safe_text import printable, without_secrets

COLOURS = {"ok": "\x1b[32m", "warn": "\x1b[33m", "fail": "\x1b[31m"}
WIDTH = 13  # of the names in the table


class Finding(NamedTuple):
    verdict: Literal["ok", "warn", "fail"]
    check: str
    sentence: str
    details: dict[str, Any] = {}


def line(finding: Finding, *, colour: bool) -> str:
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


def as_json(findings: list[Finding]) -> str:
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
