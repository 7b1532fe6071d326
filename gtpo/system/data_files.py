"""Data files as rows: JSON, JSON lines, CSV and Parquet, each also compressed with gzip.

A name is a name here, never a pattern. What cannot be read becomes one sentence with the file and
the row. This module reads files itself, because libraries are not safe enough. They end the process
on deeply nested rows, guess at types, and do not say where a file is damaged.
"""

import csv
import gzip
import io
import itertools
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from gtpo.errors import RecipeError

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv", ".tsv")  # each also with .gz
WRAPPERS = ("data", "rows", "examples", "train", "test", "validation")  # keys around a list of rows
DEEPEST = 64  # levels of lists and objects in a row
LARGEST = 2**31 - 1  # characters in a cell of a CSV file
UTF_16 = (b"\xff\xfe", b"\xfe\xff")  # how such a file begins
STRING = re.compile(r'"(?:[^"\\]|\\.)*"')

Row = dict[str, Any]


# ---- which files


def suffix(file: Path) -> str | None:
    """The suffix of a data file without .gz, for example .jsonl; None if it is no data file."""
    name = file.name.lower().removesuffix(".gz")
    return next((known for known in SUFFIXES if name.endswith(known)), None)


def split_name(split: str) -> str:
    """The name of a split without its slice: `train` for `train[:100]`."""
    return split.split("[")[0]


def check_single_file(file: Path, split: str) -> None:
    """Raises RecipeError if `file` is no data file, is empty, or cannot have this split."""
    if suffix(file) is None:
        raise RecipeError(
            "dataset.path", f"{str(file)!r} is not one of {', '.join(SUFFIXES)} (or .gz of these)"
        )
    if split_name(split) != "train":
        raise RecipeError(
            "dataset.split",
            f"{split_name(split)!r} does not exist in the single file {str(file)!r}; leave it out,"
            " or give a folder with one file per split",
        )
    if not file.stat().st_size:
        _refuse_empty(file)


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The files of a split in `folder`, sorted by name.

    They are `train.jsonl`, `train-00000-of-00002.parquet` and so on, in the folder itself or in its
    folder `data`; or all files of the folder `train`. Raises RecipeError if there are none, with
    the splits that exist.
    """
    split = split_name(split)
    by_split: dict[str, list[Path]] = {}
    places = [place for place in (folder, folder / "data") if place.is_dir()]
    for file in (file for place in places for file in _data_files(place)):
        by_split.setdefault(re.split("[-.]", file.name)[0], []).append(file)
    if not by_split:
        inner = (folder for place in places for folder in place.iterdir() if folder.is_dir())
        by_split = {folder.name: files for folder in inner if (files := _data_files(folder))}
    if split not in by_split:
        existing = ", ".join(sorted(by_split)) or f"no {', '.join(SUFFIXES)} files"
        raise RecipeError(
            "dataset.split", f"there is no {split!r} in {str(folder)!r}; it has {existing}"
        )
    return by_split[split]


def _data_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if suffix(file) and file.is_file())


# ---- their rows


def load_rows(files: list[Path], split: str):
    """The rows of a split's files as one datasets.Dataset, cut to the slice of `split`.

    Raises RecipeError with the file and the row where a file is damaged.
    """
    import datasets

    tables = [file for file in files if suffix(file) == ".parquet"]
    parts = [_table(file) for file in tables]
    if texts := [file for file in files if file not in tables]:
        parts.append(_rows_of_texts(texts))
    try:
        rows = datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    except Exception as error:  # pyarrow's errors have no common class
        _refuse(files[-1], f"it has other types of columns than {files[0].name} ({_first(error)})")
    if "[" not in split:
        return rows
    try:
        whole = {split_name(split): len(rows)}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(whole)
    except (ValueError, AssertionError) as error:
        raise RecipeError(
            "dataset.split", f"{split!r} is no slice ({_first(error)}); write one as train[:100]"
        ) from None
    return rows.select([i for part in parts for i in range(part.from_, part.to)])


def first_rows(file: Path) -> Iterator[Row]:
    """The rows of a file one by one, of a Parquet file only the first.

    Raises RecipeError where it comes to something that cannot be read, and if there are no rows.
    """
    count = 0
    with _opened(file) as content:
        if suffix(file) == ".parquet":
            first = _parquet(file, content, lambda parquet: next(parquet.iter_batches(1)))
            rows = iter(first.to_pylist())
        elif suffix(file) in (".csv", ".tsv"):
            rows = _csv_rows(file, content)
        else:
            rows = _json_rows(file, content)
        try:
            for row in rows:
                count += 1
                yield row
        except _NotText as error:
            _refuse(file, str(error), count + 1, error.line)
    if not count:
        _refuse_empty(file)


def count_rows(files: list[Path]) -> int | None:
    """The number of rows; None if only reading whole files would tell."""
    count = 0
    for file in files:
        if suffix(file) == ".json" or file.suffix == ".gz":
            return None
        with _opened(file) as content:
            if suffix(file) == ".parquet":
                count += _parquet(file, content, lambda parquet: parquet.metadata.num_rows)
            elif suffix(file) == ".jsonl":
                count += sum(1 for line in content if line.strip())
            else:
                count += sum(1 for _ in _csv_rows(file, content))
    return count


def _table(file: Path):
    """A Parquet file as a datasets.Dataset."""
    import datasets

    with _opened(file) as content:
        table = _parquet(file, content, lambda parquet: parquet.read())
    try:
        return datasets.Dataset(datasets.table.InMemoryTable(table))
    except Exception as error:  # pyarrow's errors have no common class
        _refuse(file, f"its columns cannot be used ({_first(error)})")


def _rows_of_texts(files: list[Path]):
    """The rows of JSON and CSV files as a datasets.Dataset."""
    rows: list[Row] = []
    for file in files:
        before = len(rows)
        rows += first_rows(file)
        if suffix(file) in (".csv", ".tsv"):
            for name in rows[before]:
                values = _as_numbers([row[name] for row in rows[before:]])
                for row, value in zip(rows[before:], values, strict=True):
                    row[name] = value
    if not any(rows):
        _refuse(files[0], "its rows have no columns")
    return as_dataset(rows)


def as_dataset(rows: list[Row]):
    """Rows as a datasets.Dataset; a value that a row lacks is None. There must be a column."""
    import datasets

    names = dict.fromkeys(name for row in rows for name in row)
    parts = [_column(name, [row.get(name) for row in rows]) for name in names]
    return datasets.concatenate_datasets(parts, axis=1) if len(parts) > 1 else parts[0]


def _column(name: str, values: list):
    """A column as a datasets.Dataset; one of mixed types as JSON, which gives the same values."""
    from datasets import Dataset, Features, Json

    kinds = {type(value) for value in values} - {type(None)}
    if len(kinds) < 2 or kinds <= {int, float}:
        try:
            return Dataset.from_dict({name: values})
        except Exception:  # pyarrow: values inside lists and objects have mixed types
            pass
    texts = [None if value is None else json.dumps(value) for value in values]
    return Dataset.from_dict({name: texts}, features=Features({name: Json()}))


def _opened(file: Path) -> io.BufferedIOBase:
    """The content of `file`, uncompressed."""
    try:
        content = file.open("rb")
        if content.peek(2)[:2] == b"\x1f\x8b":
            return gzip.GzipFile(fileobj=content)
        return content
    except OSError as error:
        _refuse(file, f"{error.strerror}")


def _parquet(file: Path, content: io.BufferedIOBase, read):
    from pyarrow.parquet import ParquetFile

    try:
        if isinstance(content, gzip.GzipFile):
            content = io.BytesIO(content.read())
        table = ParquetFile(content)
        if not table.metadata.num_rows:
            _refuse_empty(file)
        return read(table)
    except RecipeError:
        raise
    except Exception as error:  # pyarrow's errors have no common class
        _refuse(file, f"it is no complete Parquet file ({_first(error)})")


# ---- JSON, and JSON lines


def _json_rows(file: Path, content: io.BufferedIOBase) -> Iterator[Row]:
    """The rows of JSON lines, or of one JSON value; the suffix or the first line tells which."""
    lines = (line for line in enumerate(_lines(file, content), 1) if line[1].strip())
    if suffix(file) == ".json":
        yield from _rows_of_text(file, _whole_text(file, lines), 1)
        return
    number, line = next(lines, (1, ""))
    if line.lstrip().startswith("[") or not _is_value(line):
        yield from _rows_of_text(file, line + _whole_text(file, lines, number), number)
        return
    for row, (place, text) in enumerate(itertools.chain([(number, line)], lines), 1):
        yield _json_row(file, text, row, place)


def _whole_text(file: Path, lines: Iterator[tuple[int, str]], last: int = 0) -> str:
    """The text of numbered lines after the line `last`, with the empty lines between them."""
    parts = []
    try:
        for number, line in lines:
            parts.append("\n" * (number - last - 1) + line)
            last = number
    except _NotText as error:
        _refuse(file, str(error), line=error.line)
    return "".join(parts)


def _is_value(line: str) -> bool:
    """Whether a line is a row by itself, or a damaged one, and not only the start of one."""
    try:
        json.loads(line)
    except json.JSONDecodeError as error:
        return error.pos < len(line.rstrip())
    except (RecursionError, ValueError):
        pass
    return True


def _json_row(file: Path, text: str, row: int, line: int) -> Row:
    _check_depth(file, text, row, line)
    try:
        value = json.loads(text)
    except RecursionError:
        _refuse(file, "its lists or objects are nested too deeply", row, line)
    except ValueError as error:
        message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        _refuse(file, f"this is not JSON ({message})", row, line)
    return _checked_row(file, value, _has_escapes(text), row, line)


def _has_escapes(text: str) -> bool:
    """Whether a text in JSON may have half of a surrogate pair."""
    return "\\ud" in text or "\\uD" in text


def _checked_row(file: Path, value: Any, escapes: bool, row: int, line: int) -> Row:
    if not isinstance(value, dict):
        _refuse(
            file,
            f'a row is an object such as {{"question": ..., "answer": ...}}, and not'
            f" {_kind(value)}",
            row,
            line,
        )
    if escapes:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            _refuse(file, "it has half of a surrogate pair (\\ud...), which is no text", row, line)
    return value


def _check_depth(file: Path, text: str, row: int, line: int | None) -> None:
    """Raises RecipeError if lists and objects are nested deeper than DEEPEST."""
    if text.count("[") + text.count("{") <= DEEPEST:
        return
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", STRING.sub("", text)):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    if deepest > DEEPEST:
        _refuse(file, f"it is nested {deepest} deep; use at most {DEEPEST} levels", row, line)


def _rows_of_text(file: Path, text: str, first_line: int) -> Iterator[Row]:
    """The rows of a text: a list of objects, an object of columns, or objects one after another."""
    decoder, spaces, row, in_list = json.JSONDecoder(), re.compile(r"\s*"), 0, False
    line, counted = first_line, 0

    def line_of(position: int) -> int:  # positions only grow, so no text is counted twice
        nonlocal line, counted
        line, counted = line + text.count("\n", counted, position), position
        return line

    def skip_spaces(position: int) -> int:
        return spaces.match(text, position).end()

    place = skip_spaces(0)
    if text[place : place + 1] == "[":
        in_list, place = True, skip_spaces(place + 1)
        if text[place : place + 1] == "]":
            return
    while place < len(text):
        row += 1
        try:
            value, end = decoder.raw_decode(text, place)
        except RecursionError:
            _check_depth(file, text[place:], row, line_of(place))
            _refuse(file, "its lists or objects are nested too deeply", row, line_of(place))
        except ValueError as error:
            message = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            position = getattr(error, "pos", place)
            _refuse(file, f"this is not JSON ({message})", row, line_of(position))
        piece = text[place:end]
        _check_depth(file, piece, row, line_of(place))
        escapes, place = _has_escapes(piece), skip_spaces(end)
        alone = row == 1 and not in_list and place >= len(text)
        if alone and isinstance(value, dict) and suffix(file) == ".json":
            for row, inner in enumerate(_rows_of_object(value), 1):
                yield _checked_row(file, inner, escapes, row, line)
            return
        yield _checked_row(file, value, escapes, row, line)
        if in_list:
            following = text[place : place + 1]
            if following == "]":
                if skip_spaces(place + 1) < len(text):
                    _refuse(file, "more follows after the list of rows", row, line_of(place))
                return
            if following != ",":
                _refuse(file, "the list of rows breaks off here", row, line_of(place))
            place = skip_spaces(place + 1)
    if in_list:
        _refuse(file, "the list of rows breaks off here", row, line_of(len(text)))


def _rows_of_object(value: dict) -> list:
    """The rows in the only object of a file: a list under a known key, columns, or one row."""
    for key in WRAPPERS:
        if isinstance(inner := value.get(key), list) and all(isinstance(x, dict) for x in inner):
            return inner
    columns = list(value.values())
    if len(columns) > 1 and all(isinstance(column, list) for column in columns):
        if len({len(column) for column in columns}) == 1:
            return [dict(zip(value, row, strict=True)) for row in zip(*columns, strict=True)]
    return [value]


# ---- CSV


def _csv_rows(file: Path, content: io.BufferedIOBase) -> Iterator[Row]:
    """The rows of a CSV file as texts; an empty cell is None."""
    lines = _lines(file, content)
    row = 0
    try:
        first = next((line for line in lines if line.strip()), "")
        lines = itertools.chain([first], lines)
        limit = csv.field_size_limit(LARGEST)
        try:
            reader = csv.reader(lines, delimiter=_delimiter(file, first), strict=True)
            header = [name.strip() for name in next(reader, [])]
            if again := {name for name in header if name and header.count(name) > 1}:
                _refuse(file, f"its header names {', '.join(sorted(again))} twice")
            for values in reader:
                if not values:
                    continue
                row += 1
                if len(values) != len(header):
                    _refuse(
                        file,
                        f"it has {len(values)} values, and the header has {len(header)}",
                        row,
                        reader.line_num,
                    )
                yield {
                    name: value if value != "" else None
                    for name, value in zip(header, values, strict=True)
                    if name  # a column without a name is the index that pandas writes
                }
        finally:
            csv.field_size_limit(limit)
    except csv.Error as error:
        _refuse(file, f"this is not CSV ({error})", row + 1, reader.line_num)


def _delimiter(file: Path, header: str) -> str:
    """The character between the names of a header: a comma, a semicolon or a tab."""
    if suffix(file) == ".tsv":
        return "\t"
    return max(",;\t", key=lambda character: STRING.sub("", header).count(character))


def _as_numbers(texts: list[str | None]) -> list:
    """The values of a column as numbers if all of them read back as they are written."""
    values = [None if text is None else _number(text) for text in texts]
    pairs = zip(texts, values, strict=True)
    return texts if any(text is not None and value is None for text, value in pairs) else values


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if repr(value) == text and abs(value) < 2**53:
            return value
    return None


# ---- text, and what is wrong with it


class _NotText(Exception):
    """A line is not UTF-8. The message is a clause; `line` counts from 1."""

    def __init__(self, clause: str, line: int):
        super().__init__(clause)
        self.line = line


def _lines(file: Path, content: io.BufferedIOBase) -> Iterator[str]:
    """The lines of a file in UTF-8, with or without a byte order mark. Raises _NotText."""
    number = 0
    try:
        for number, line in enumerate(content, 1):
            if number == 1:
                if line.startswith(UTF_16):
                    raise _NotText("this is UTF-16 and not UTF-8; save the file as UTF-8", 1)
                line = line.removeprefix(b"\xef\xbb\xbf")
            try:
                yield line.decode()
            except UnicodeDecodeError as error:
                raise _NotText(
                    f"this is not UTF-8 (byte 0x{line[error.start]:02x}); save the file as UTF-8,"
                    f" for example with: iconv -f latin1 -t utf-8 {file.name}",
                    number,
                ) from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise _NotText(f"the compressed file is damaged here ({error})", number + 1) from None


def _refuse(file: Path, clause: str, row: int | None = None, line: int | None = None) -> NoReturn:
    """Raises RecipeError about a row of a file; the line is named where it is another number."""
    place = [] if row is None else [f"row {row}"]
    if line is not None and line != row:
        place = [f"{place[0]} (line {line})"] if place else [f"line {line}"]
    raise RecipeError(
        "dataset.path", f"{', '.join([repr(str(file)), *place])} cannot be read: {clause}"
    )


def _refuse_empty(file: Path) -> NoReturn:
    raise RecipeError("dataset.path", f"{str(file)!r} is empty; give a file with at least one row")


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a text", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")


def _first(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
