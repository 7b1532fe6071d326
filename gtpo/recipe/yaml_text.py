"""YAML from anywhere, read as plain values of bounded size, and written so that it reads back
unchanged.
"""

import datetime
import json
import re
import warnings
from itertools import accumulate
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError

LARGEST = 128 * 1024  # characters; the longest recipe of ours has 4,300
MOST_VALUES = 20_000  # with each alias counted as what it stands for
DEEPEST = 40  # levels
MOST_OPEN = 200  # brackets at a time, those in texts included

# YAML 1.2: 1e-6 is a number, `no` is text, a repeated key is an error
_reader = YAML(typ="safe", pure=True)


# which ruamel.yaml 0.19.1 writes as they are and reads as others
_FOLDED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


class YamlError(ValueError):
    """Text that is no YAML of plain values; `line` is where, from 1, or None where that is not
    known.
    """

    def __init__(self, message: str, line: int | None = None):
        super().__init__(message)
        self.line = line


def read_yaml_file(path: Path) -> str:
    """The text of a file, without reading more of it than could be YAML of ours; raises OSError, or
    YamlError.
    """
    with path.open(encoding="utf-8") as file:
        text = file.read(LARGEST + 1)
    if len(text) > LARGEST:
        raise YamlError(f"it has more than {LARGEST // 1024} KiB; a recipe is a short text")
    return text


def parse_yaml(text: str) -> Any:
    """The values in `text`: numbers, texts, lists, mappings, true, false, null and nothing else;
    raises YamlError.
    """
    if len(text) > LARGEST:
        raise YamlError(f"it has more than {LARGEST // 1024} KiB; a recipe is a short text")
    if (
        max(
            accumulate((sign in "[{") - (sign in "]}") for sign in re.findall(r"[][{}]", text)),
            default=0,
        )
        > MOST_OPEN
    ):
        # which the reader would find out only after seconds
        raise YamlError("it is nested too deeply")
    try:
        # a repeated anchor, which is fine, and shown with its text
        with warnings.catch_warnings(action="ignore"):
            values = _reader.load(text)
    except RecursionError:
        raise YamlError("it is nested too deeply") from None
    except MarkedYAMLError as error:
        mark = error.problem_mark
        what = " ".join(str(part) for part in (error.context, error.problem) if part)
        # of a repeated key, which may be a token
        what = re.sub(r" with value .*", "", what, flags=re.DOTALL)
        raise YamlError(" ".join(what.split()), mark and mark.line + 1) from None
    # ruamel.yaml 0.19.1 lets ValueError, KeyError and others through, as of `!!int x` or
    # `2001-99-99`
    except Exception as error:
        raise YamlError(" ".join(f"{error}".split())) from None
    check_plain(values)
    return values


def check_plain(values: Any) -> None:
    """Raises YamlError for what is no plain value, nested too deeply, or too much once aliases are
    written out.
    """
    left, pending = MOST_VALUES, [(values, 0)]
    while pending:
        value, depth = pending.pop()
        left -= 1
        if left < 0:
            raise YamlError(
                f"it has more than {MOST_VALUES} values once its aliases are written out"
            )
        if depth > DEEPEST:
            raise YamlError("it is nested too deeply")
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
                f"it holds a {type(value).__name__}; use texts, numbers, lists and mappings"
            )


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise YamlError(f"{text[:40]!r} is no text that UTF-8 can hold") from None


def write_yaml(values: dict[str, Any], stream) -> None:
    """Write plain values as YAML that `parse_yaml` reads back unchanged."""
    writer = YAML(typ="safe", pure=True)
    writer.default_flow_style = False
    writer.sort_base_mapping_type_on_output = False
    writer.width = 100
    writer.allow_unicode = not _FOLDED.search(json.dumps(values, ensure_ascii=False))
    writer.dump(values, stream)
