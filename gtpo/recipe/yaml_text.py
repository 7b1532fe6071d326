"""YAML, read as plain values of limited size, and written so that it reads back unchanged."""

import datetime
import json
import re
import warnings
from itertools import accumulate
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

LARGEST = 128 * 1024  # characters; our longest recipe has 4,300
MOST_VALUES = 20_000  # each alias counts as the values that it stands for
DEEPEST = 40  # levels
MOST_OPEN = 200  # open brackets at a time, including those in texts

TOO_LONG = f"it has more than {LARGEST // 1024} KiB; a recipe is a short text"
TOO_DEEP = "it is nested too deeply"

# ruamel.yaml reads YAML 1.2: 1e-6 is a number, `no` is text, and a repeated key is an error.
_reader = YAML(typ="safe", pure=True)
# Characters that ruamel.yaml 0.19.1 writes as they are but reads back as others.
_CHANGED_WHEN_READ = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


class YamlError(ValueError):
    """Text that is not YAML of plain values. `line` counts from 1, and is None if not known."""

    def __init__(self, message: str, line: int | None = None):
        super().__init__(message)
        self.line = line


def read_yaml_file(path: Path) -> str:
    """The text of a file that is not too long for a recipe.

    Raises OSError if it cannot be read, ValueError if it is not UTF-8, and YamlError if it is too
    long. No more than the permitted length is read.
    """
    with path.open(encoding="utf-8") as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise YamlError(TOO_LONG)
    return text


def parse_yaml(text: str) -> Any:
    """The values in `text`: numbers, texts, lists, mappings, true, false and null.

    Raises YamlError for anything else, and for text that is too long or nested too deeply.
    """
    if len(text) > LARGEST:
        raise YamlError(TOO_LONG)
    if _most_open_brackets(text) > MOST_OPEN:  # the reader would need seconds to find out
        raise YamlError(TOO_DEEP)
    try:
        # A repeated anchor is permitted. The warning about it would show its text.
        with warnings.catch_warnings(action="ignore"):
            values = _reader.load(text)
    except RecursionError:
        raise YamlError(TOO_DEEP) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        message = " ".join(str(part) for part in (error.context, error.problem) if part)
        # The value of a repeated key is not shown, because it may be a token.
        message = re.sub(r" with value .*", "", message, flags=re.DOTALL)
        raise YamlError(" ".join(message.split()), mark and mark.line + 1) from None
    # ruamel.yaml 0.19.1 raises ValueError, KeyError and others for `!!int x` or `2001-99-99`.
    except Exception as error:
        raise YamlError(" ".join(f"{error}".split())) from None
    check_plain(values)
    return values


def check_plain(values: Any) -> None:
    """Raises YamlError if `values` are not plain, nested too deeply, or too many with aliases."""
    left, pending = MOST_VALUES, [(values, 0)]
    while pending:
        value, depth = pending.pop()
        left -= 1
        if left < 0:
            raise YamlError(
                f"it has more than {MOST_VALUES} values once its aliases are written out"
            )
        if depth > DEEPEST:
            raise YamlError(TOO_DEEP)
        if isinstance(value, dict):
            pending += [(part, depth + 1) for pair in value.items() for part in pair]
        elif isinstance(value, list):
            pending += [(part, depth + 1) for part in value]
        elif isinstance(value, datetime.date):
            raise YamlError(f"{value} is read as a date, which no key takes; put it in quotes")
        elif isinstance(value, str):
            _check_text(value)
        elif not isinstance(value, int | float | None):
            raise YamlError(
                f"it contains a {type(value).__name__}; use texts, numbers, lists and mappings"
            )


def write_yaml(values: dict[str, Any], stream) -> None:
    """Write plain values to `stream` as YAML that `parse_yaml` reads back unchanged."""
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False
    writer.width = 100
    writer.allow_unicode = not _CHANGED_WHEN_READ.search(json.dumps(values, ensure_ascii=False))
    writer.dump(values, stream)


def _most_open_brackets(text: str) -> int:
    steps = ((sign in "[{") - (sign in "]}") for sign in re.findall(r"[][{}]", text))
    return max(accumulate(steps), default=0)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise YamlError(f"{text[:40]!r} is not text that UTF-8 can hold") from None
