r"""Text from models, data, exceptions and command lines, made safe for terminals, logs and files.

No control character reaches a terminal. A character that could move the cursor, change a colour
or hide text is shown as its escape instead. No secret is kept. What looks like a token is replaced,
and so is the value of any environment variable with a name like HF_TOKEN.
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
    r"\b(?:(?:hf_|gh[pousr]_|AKIA)[A-Za-z0-9]{16,}"
    r"|(?:wandb_v\d_|github_pat_|glpat-|xox[abp]-|sk-(?=[\w-]*\d))[\w-]{16,})"
)
SHORTEST = 8  # characters; a shorter value of a secret variable may be an ordinary word
HIDDEN = "[secret]"

# The control characters C0 and C1 without tab and line feed, those that change the direction of
# writing, and lone surrogates. Those that only some readers treat as line ends are here too.
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ufeff"
    "\ud800-\udfff]"
)


def printable(text: str) -> str:
    r"""`text` with each control character as its escape, for example `\x1b`.

    Line feeds and tabs stay.
    """
    return _CONTROL.sub(_escaped, text)


def _escaped(match: re.Match) -> str:
    return match[0].encode("unicode_escape", "surrogatepass").decode("ascii")


def without_secrets(text: str, environment: Mapping[str, str] = os.environ) -> str:
    """`text` with [secret] in place of everything that looks like a token, and of the secrets in
    `environment`.
    """
    for secret in sorted(secrets(environment.items()), key=len, reverse=True):
        text = text.replace(secret, HIDDEN)
    return SECRET_VALUE.sub(HIDDEN, text)


def secrets(variables: Iterable[tuple[str, str]]) -> set[str]:
    """The values of the variables with secret names that are long enough to be secrets."""
    return {
        value
        for name, value in variables
        if SECRET_NAME.search(name) and len(value) >= SHORTEST and not value.isdecimal()
    }


def is_secret(name: str, value: str) -> bool:
    """Whether a variable has the name of a secret, or a value that looks like a token."""
    return bool(SECRET_NAME.search(name) or SECRET_VALUE.search(value))


def hide(values: Any) -> tuple[Any, list[str]]:
    """Plain `values` with [secret] in place of tokens, and the dotted paths of those tokens."""
    paths: list[str] = []

    def hidden(value: Any, path: str) -> Any:
        if isinstance(value, dict):
            return {key: hidden(part, f"{path}.{key}".lstrip(".")) for key, part in value.items()}
        if isinstance(value, list):
            return [hidden(part, path) for part in value]
        if isinstance(value, str) and SECRET_VALUE.search(value):
            paths.append(path)
            return SECRET_VALUE.sub(HIDDEN, value)
        return value

    return hidden(values, ""), paths


class SafeFormatter(logging.Formatter):
    """Formats a log line and its traceback without control characters and secrets."""

    def format(self, record: logging.LogRecord) -> str:
        """The log line of `record`, with its traceback."""
        return printable(without_secrets(super().format(record)))
