r"""Text from models, data, exceptions and command lines, made fit for a terminal, a log and a file
that others read.

No control character reaches a terminal: one that could move the cursor, recolour a line or hide
text is shown instead of sent. No secret is kept: what looks like a token, and what the environment
holds under a name like HF_TOKEN, is replaced.
"""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

SECRET_NAME = re.compile(
    r"(^|_)(API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$|\d)", re.IGNORECASE
)
SECRET_VALUE = re.compile(
    r"\b(?:(?:hf_|gh[pousr]_|AKIA)[A-Za-z0-9]{16,}|(?:wandb_v\d_|github_pat_|glpat-|xox[abp]-|sk-(?=[\w-]*\d))[\w-]{16,})"
)
SHORTEST = 8  # characters of a secret that is looked for by its value
HIDDEN = "[secret]"

# C0 and C1 but for tab and line feed, what turns the direction of writing, and line ends that only
# some readers know.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""`text` with each control character as its escape, `\x1b` for instance; line feeds and tabs
    stay.
    """
    return _CONTROL.sub(
        lambda match: match[0].encode("unicode_escape", "surrogatepass").decode("ascii"), text
    )


def without_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` with what looks like a token, and the secrets that `environment` holds, replaced by
    [secret].
    """
    for secret in sorted(secrets(environment.items()), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return SECRET_VALUE.sub(HIDDEN, text)


def secrets(pairs: Iterable[tuple[str, str]]) -> set[str]:
    """The values of the variables with secret names that are long enough to be secrets."""
    return {
        value
        for name, value in pairs
        if SECRET_NAME.search(name) and len(value) >= SHORTEST and not value.isdecimal()
    }


def is_secret(name: str, value: str) -> bool:
    return bool(SECRET_NAME.search(name) or SECRET_VALUE.search(value))


def hide(values: Any, found: list[str], path: str = "") -> Any:
    """Plain `values` with [secret] for what looks like a token; the paths of those are appended to
    `found`.
    """
    if isinstance(values, dict):
        return {
            name: hide(value, found, f"{path}.{name}".lstrip(".")) for name, value in values.items()
        }
    if isinstance(values, list):
        return [hide(value, found, path) for value in values]
    if isinstance(values, str) and SECRET_VALUE.search(values):
        found.append(path)
        return SECRET_VALUE.sub(HIDDEN, values)
    return values


class SafeFormatter(logging.Formatter):
    """A log line, its traceback included, without control characters and secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(without_secrets(super().format(record)))
