"""An evaluation on disk: a header with its settings, then one line per completion.

Completions are appended as they are drawn. An interrupted evaluation continues from its file, and
scores are computed from it without a model.
"""

import hashlib
import json
import logging
import os
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

from gtpo.answers import GRADING_VERSION
from gtpo.errors import RecipeError
from gtpo.hooks.turn_ends import turn_ends
from gtpo.models.generation import Sampling
from gtpo.system.whole_files import write_whole

logger = logging.getLogger(__name__)


class Setting(NamedTuple):
    """A key that every header has: its type, and how an error describes another value of it.

    An evaluation continues only in a file whose header has the same value. `difference` is None
    for a key that differs only if another one does.
    """

    type: type | UnionType
    difference: str | None = None


SETTINGS = {
    "problems": Setting(int),  # `prompts` differs too if their number does
    "weights": Setting(str, "other weights"),
    "prompts": Setting(str, "other problems, prompts or references"),
    "samples": Setting(int, "samples {}"),
    "temperature": Setting(int | float, "temperature {}"),
    "top_p": Setting(int | float, "top_p {}"),
    "seed": Setting(int, "seed {}"),
    "max_completion_length": Setting(int, "max_completion_length {}"),
}
ROW = {  # the keys of a completion's line, and their types
    "problem": int,  # from 0
    "sample": int,  # from 0
    "prompt": list,  # messages
    "reference": str,
    "completion": str,  # decoded without special tokens
    "answer": str | None,
    "correct": bool,
    "well_formed": bool,
    "truncated": bool,
    "tokens": int,
}


class Evaluation(NamedTuple):
    """The content of an evaluation file."""

    header: dict[str, Any]
    rows: list[dict[str, Any]]  # one per completion, with the keys of ROW
    cut: bool = False  # the last line is incomplete after a crash or a full disk; `rows` lacks it
    complete_bytes: int = 0  # size of the header and `rows` in the file


def make_header(
    problems,
    prompts: list[str],
    sampling: Sampling,
    samples: int,
    weights: str,
    prompt_opening: str = "",
    **notes: Any,
) -> dict[str, Any]:
    """Returns a file's header: the values of SETTINGS, and `notes` for people who read the file.

    It has what the prompts have already written of the answer, if that is anything.
    """
    if prompt_opening:
        notes["prompt_opening"] = prompt_opening
    content = repr((prompts, list(problems["reference"])))
    return {
        **notes,
        "grading": GRADING_VERSION,
        "problems": len(prompts),
        "samples": samples,
        **sampling._asdict(),
        "weights": weights,
        "prompts": hashlib.blake2b(content.encode(), digest_size=8).hexdigest(),
    }


def turn_ends_note(tokenizer) -> dict[str, list[int]]:
    """A header's note of the ids that end a turn; empty where it is the tokenizer's end alone."""
    ends = turn_ends(tokenizer)
    return {} if set(ends) <= {tokenizer.eos_token_id} else {"turn_ends": list(ends)}


def grading_version(header: dict[str, Any]) -> int:
    """The version of the rules by which an evaluation was graded; 1 where its header has none."""
    version = header.get("grading", 1)
    return version if isinstance(version, int) else 1


def _opening(header: dict[str, Any]) -> str:
    """What the prompts have already written of the answer; headers without the key have none."""
    return header.get("prompt_opening", "")


def read_evaluation(path: Path) -> Evaluation:
    """Returns the evaluation in `path`, without an incomplete last line.

    Raises RecipeError if the file cannot be read, is not an evaluation or is damaged.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise RecipeError(
            path,
            f"cannot be read ({error.strerror}); give an evaluation file such as"
            " RUN/evaluation/after.jsonl",
        ) from None
    values = [_parsed(line) for line in lines]
    cut = len(values) > 1 and values[-1] is None
    if cut:
        lines, values = lines[:-1], values[:-1]
    header = values[0].get("header") if values and isinstance(values[0], dict) else None
    if not _is_header(header):
        problem = (
            "the first line is not the header of an evaluation" if values else "the file is empty"
        )
        raise RecipeError(
            path, f"{problem}; give a file that evaluate_model.py or train_model.py wrote"
        )
    rows, seen = values[1:], set()
    for number, row in enumerate(rows, 2):
        if damage := _damage(row, header, seen):
            raise RecipeError(
                f"{path}, line {number}",
                f"{damage}; the file is damaged: restore it, or move it away and evaluate again",
            )
        seen.add((row["problem"], row["sample"]))
    return Evaluation(header, rows, cut, sum(map(len, lines)))


def _parsed(line: bytes) -> Any:
    """The JSON value of a line; None if it is not JSON or is nested too deeply."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def _is_header(header: Any) -> bool:
    return isinstance(header, dict) and all(
        isinstance(header.get(name), setting.type) for name, setting in SETTINGS.items()
    )


def _damage(row: Any, header: dict, seen: set[tuple[int, int]]) -> str | None:
    """What is wrong with a row; None if nothing is. `seen` holds (problem, sample) of the rows
    before it.
    """
    if not isinstance(row, dict):
        return "this is not a completion"
    for name, kind in ROW.items():
        value = row.get(name)
        bool_for_int = kind is int and isinstance(value, bool)  # bool is a subclass of int
        if name not in row or not isinstance(value, kind) or bool_for_int:
            return f"{name!r} is missing or has the wrong type"
    problem, sample = row["problem"], row["sample"]
    place = f"problem {problem}, sample {sample}"
    if not (0 <= problem < header["problems"] and 0 <= sample < header["samples"]):
        return f"{place} is beyond the {header['problems']} x {header['samples']} of the header"
    return f"{place} appears twice" if (problem, sample) in seen else None


def begins_as_evaluation(path: Path) -> bool:
    """Whether the file's first line is a header, whatever its values."""
    with path.open("rb") as lines:
        first = _parsed(next(lines, b""))
    return isinstance(first, dict) and isinstance(first.get("header"), dict)


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


class EvaluationFile:
    """An evaluation to append completions to: `with file: file.append(row)`.

    Takes up the completions that `path` already has, if its header has the same SETTINGS. With
    `overwrite`, an evaluation in `path` is replaced as soon as the file is opened; a file that is
    not an evaluation never is.

    Raises RecipeError if `path` has an evaluation with other settings, is damaged, is not an
    evaluation or cannot be written. The file stays as it is then.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, overwrite: bool = False):
        self.path, self.header = path, header
        self.rows: list[dict[str, Any]] = []
        self.cut = False  # the last line was incomplete: its completion is missing
        self._complete_bytes = 0  # of the lines to keep; 0 for a file to begin
        self._known_size = 0  # bytes; another size means that another program writes to the file
        if not path.exists():
            _check_writable(path)
            return
        self._known_size = path.stat().st_size
        if overwrite and begins_as_evaluation(path):
            return
        existing = read_evaluation(path)
        _check_settings(path, existing.header, header)
        self.rows, self.cut = existing.rows, existing.cut
        if self.missing and _opening(existing.header) != _opening(header):
            logger.warning(
                "[GTPO] %s was begun with completions graded after %r; the rest is graded after %r,"
                " with which the prompts end",
                path,
                _opening(existing.header),
                _opening(header),
            )
        if self.missing and grading_version(existing.header) != grading_version(header):
            logger.warning(
                "[GTPO] %s was begun with version %d of the grading rules; the rest is graded with"
                " version %d (docs/grading.md)",
                path,
                grading_version(existing.header),
                grading_version(header),
            )
        self._complete_bytes = existing.complete_bytes

    @property
    def missing(self) -> list[tuple[int, int]]:
        """(problem, sample) of the completions that are not drawn yet."""
        present = {(row["problem"], row["sample"]) for row in self.rows}
        return [
            pair
            for problem in range(self.header["problems"])
            for sample in range(self.header["samples"])
            if (pair := (problem, sample)) not in present
        ]

    def __enter__(self):
        self._check_alone()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._complete_bytes:
                write_whole(self.path, _line({"header": self.header}))
                self._complete_bytes = self.path.stat().st_size
            self._file = self.path.open("a+b")
        except OSError as error:
            raise RecipeError(
                self.path, f"cannot be written ({error.strerror}); name another file with --to"
            ) from None
        self._file.truncate(self._complete_bytes)
        self._known_size = self._complete_bytes
        if not self.path.read_bytes().endswith(b"\n"):
            self._write(b"\n")
        return self

    def __exit__(self, *_):
        self._file.close()

    def append(self, row: dict[str, Any]) -> None:
        """Writes a completion to the file; raises RecipeError if the disk is full or another
        program has written to it.
        """
        self._check_alone()
        self._write(_line(row).encode())
        self.rows.append(row)

    def _write(self, content: bytes) -> None:
        try:
            self._known_size += self._file.write(content)
            self._file.flush()
        except OSError as error:
            raise RecipeError(
                self.path,
                f"cannot be written ({error.strerror}); free some space, then evaluate again to"
                " continue",
            ) from None

    def _check_alone(self) -> None:
        # With two writers, completions would be drawn and counted twice.
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._known_size:
            raise RecipeError(
                self.path, "another evaluation writes to it at the same time; wait until it is done"
            )


def _check_settings(path: Path, existing: dict[str, Any], header: dict[str, Any]) -> None:
    """Raises RecipeError if the header in `path` has other settings than `header`."""
    differences = [
        setting.difference.format(existing[name])
        for name, setting in SETTINGS.items()
        if setting.difference and existing[name] != header[name]
    ]
    if _noted_ends(existing) != _noted_ends(header):
        differences.append("other ends of a turn")
    if differences:
        raise RecipeError(
            path,
            f"holds an evaluation with {', '.join(differences)}; name another file with --to, or"
            " replace this one with --overwrite",
        )


def _noted_ends(header: dict[str, Any]) -> set[int]:
    ends = header.get("turn_ends")
    return {end for end in ends if isinstance(end, int)} if isinstance(ends, list) else set()


def _check_writable(path: Path) -> None:
    """Raises RecipeError if the folder that would get `path` cannot be written to."""
    folder = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(folder, os.W_OK):
        raise RecipeError(
            path, "cannot be written (Permission denied); name another file with --to"
        )
