"""An evaluation on disk: a header with its settings, then one line per completion, appended as they
come.

Whoever evaluates again goes on where the file stops, and whoever only wants the numbers needs no
model.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

from gtpo.errors import RecipeError
from gtpo.models.generation import Sampling
from gtpo.system.whole_files import write_whole

ROW = {  # of every completion
    "problem": int,
    "sample": int,
    "prompt": list,
    "reference": str,
    "completion": str,
    "answer": str | None,
    "correct": bool,
    "well_formed": bool,
    "truncated": bool,
    "tokens": int,
}
# of the header: those that must be the same to go on with a file, and how they are told
SETTINGS = {
    "weights": "other weights",
    "prompts": "other problems, prompts or references",
    "samples": "samples {}",
    "temperature": "temperature {}",
    "top_p": "top_p {}",
    "seed": "seed {}",
    "max_completion_length": "max_completion_length {}",
}
HEADER = {
    "problems": int,
    "samples": int,
    "weights": str,
    "prompts": str,
    "temperature": int | float,
    "top_p": int | float,
    "seed": int,
    "max_completion_length": int,
}


def make_header(
    problems, prompts: list[str], sampling: Sampling, samples: int, weights: str, **told: Any
) -> dict[str, Any]:
    """A file's header: what must be the same to go on with it, and `told`, which only tells."""
    asked = hashlib.blake2b(
        repr((prompts, list(problems["answer"]))).encode(), digest_size=8
    ).hexdigest()
    return {
        **told,
        "problems": len(prompts),
        "samples": samples,
        **sampling._asdict(),
        "weights": weights,
        "prompts": asked,
    }


class Evaluation(NamedTuple):
    """What a file holds."""

    header: dict[str, Any]
    rows: list[dict[str, Any]]
    cut: bool  # its last line was cut, by a crash or a full disk, and is left out
    whole: int  # bytes up to there


def read_evaluation(path: Path) -> Evaluation:
    """The evaluation in `path`; raises RecipeError for what is no evaluation, or a damaged one. A
    cut last line is left out.
    """
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise RecipeError(
            path,
            f"cannot be read ({error.strerror}); give an evaluation file such as "
            "RUN/evaluation/after.jsonl",
        ) from None
    found = [_parsed(line) for line in lines]
    cut = len(found) > 1 and found[-1] is None
    if cut:
        lines, found = lines[:-1], found[:-1]
    header = found[0].get("header") if found and isinstance(found[0], dict) else None
    if not isinstance(header, dict) or not all(
        isinstance(header.get(name), kind) for name, kind in HEADER.items()
    ):
        raise RecipeError(
            path,
            f"{'the first line is no header of an evaluation' if found else 'the file is empty'};"
            " give a file that evaluate_model.py or train_model.py wrote",
        )
    seen = set()
    for number, row in enumerate(found[1:], 2):
        if problem := _what_is_wrong(row, header, seen):
            raise RecipeError(
                f"{path}, line {number}",
                f"{problem}; the file is damaged: restore it, or move it away and evaluate again",
            )
        seen.add((row["problem"], row["sample"]))
    return Evaluation(header, found[1:], cut, sum(map(len, lines)))


def _parsed(line: bytes) -> Any:
    """What a line says; None where it is no JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):  # no JSON, or nested without end
        return None


def _what_is_wrong(row: Any, header: dict, seen: set) -> str | None:
    if not isinstance(row, dict):
        return "this is no completion"
    for name, kind in ROW.items():
        if (
            name not in row
            or not isinstance(row[name], kind)
            or kind is int
            and isinstance(row[name], bool)
        ):
            return f"{name!r} is missing, or not what it should be"
    place = f"problem {row['problem']}, sample {row['sample']}"
    if not (0 <= row["problem"] < header["problems"] and 0 <= row["sample"] < header["samples"]):
        return f"{place} is beyond the {header['problems']} x {header['samples']} of the header"
    return f"{place} is there twice" if (row["problem"], row["sample"]) in seen else None


def begins_as_evaluation(path: Path) -> bool:
    with path.open("rb") as lines:
        first = _parsed(next(lines, b""))
    return isinstance(first, dict) and isinstance(first.get("header"), dict)


def _line(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


class EvaluationFile:
    """The one place of an evaluation with the settings of `header`; entered, it is open to append
    to.

    Raises RecipeError where `path` holds an evaluation with other settings, or a damaged one: it
    stays as it is, unless it is to be replaced with `overwrite`, which takes evaluations alone.
    """

    def __init__(self, path: Path, header: dict[str, Any], *, overwrite: bool = False):
        self.path, self.header, self.rows, self.cut, self._whole, self._size = (
            path,
            header,
            [],
            False,
            0,
            0,
        )
        if path.exists():
            self._size = path.stat().st_size
            if overwrite and begins_as_evaluation(path):
                return
            _, self.rows, self.cut, self._whole = held = read_evaluation(path)
            if other := [
                text.format(held.header[name])
                for name, text in SETTINGS.items()
                if held.header[name] != header[name]
            ]:
                raise RecipeError(
                    path,
                    f"holds an evaluation with {', '.join(other)}; name another file with --to, or "
                    "replace this one with --overwrite",
                )
        elif not os.access(
            next(folder for folder in path.absolute().parents if folder.exists()), os.W_OK
        ):
            raise RecipeError(
                path, "cannot be written (Permission denied); name another file with --to"
            )

    @property
    def missing(self) -> list[tuple[int, int]]:
        """(problem, sample) of the completions still to be drawn."""
        there = {(row["problem"], row["sample"]) for row in self.rows}
        return [
            pair
            for problem in range(self.header["problems"])
            for sample in range(self.header["samples"])
            if (pair := (problem, sample)) not in there
        ]

    def __enter__(self):
        self._check_alone()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not self._whole:  # a new file, or one to be replaced
                write_whole(self.path, _line({"header": self.header}))
                self._size = self._whole = self.path.stat().st_size
            self._file = self.path.open("a+b")
        except OSError as error:
            raise RecipeError(
                self.path, f"cannot be written ({error.strerror}); name another file with --to"
            ) from None
        self._file.truncate(self._whole)
        self._size = self._whole
        if not self.path.read_bytes().endswith(b"\n"):
            self._write_bytes(b"\n")
        return self

    def __exit__(self, *_):
        self._file.close()

    def append(self, row: dict[str, Any]) -> None:
        self._write(row)
        self.rows.append(row)

    def _write(self, line: dict) -> None:
        self._check_alone()
        self._write_bytes(_line(line).encode())

    def _write_bytes(self, content: bytes) -> None:
        try:
            self._size += self._file.write(content)
            self._file.flush()
        except OSError as error:  # a full disk
            raise RecipeError(
                self.path,
                f"cannot be written ({error.strerror}); make room, and evaluate again to go on",
            ) from None

    def _check_alone(self) -> None:
        size = self.path.stat().st_size if self.path.exists() else 0
        if size != self._size:  # or completions would be drawn, and counted, twice
            raise RecipeError(
                self.path,
                "another evaluation writes to it at the same time; wait until that is done",
            )
