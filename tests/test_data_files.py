"""Data files as rows: every format and layout, and one sentence for each that cannot be read."""

import gzip
import json
import subprocess
import sys

import pytest
from conftest import ROOT

from gtpo.data import check_source, count_rows
from gtpo.errors import RecipeError
from gtpo.recipe.sections import DatasetSection
from gtpo.system import data_files

ROW = '{"question": "1+1?", "answer": "2"}\n'


@pytest.fixture
def write(tmp_path):
    """Writes a file in an empty folder, and returns its path."""

    def writing(name: str, content: str | bytes):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return writing


def rows(path, split: str = "train") -> list[dict]:
    return list(data_files.load_rows([path], split))


# ---- formats


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.jsonl", ROW * 3),
        ("bom.jsonl", b"\xef\xbb\xbf" + ROW.encode() * 3),
        ("gaps.jsonl", f"\n{ROW}\n\n{ROW}{ROW}   \n"),
        ("windows.jsonl", (ROW * 3).replace("\n", "\r\n")),
        ("list_in.jsonl", json.dumps([json.loads(ROW)] * 3)),
        ("one_after_another.jsonl", json.dumps(json.loads(ROW), indent=2) * 3),
        ("lines.json", ROW * 3),
        ("list.json", json.dumps([json.loads(ROW)] * 3, indent=2)),
        ("columns.json", json.dumps({"question": ["1+1?"] * 3, "answer": ["2"] * 3})),
        ("wrapped.json", json.dumps({"version": 1, "data": [json.loads(ROW)] * 3})),
        ("b.jsonl.gz", gzip.compress(ROW.encode() * 3)),
        ("b.json.gz", gzip.compress(json.dumps([json.loads(ROW)] * 3).encode())),
        ("not_compressed.jsonl.gz", ROW * 3),
        ("CAPITALS.JSONL", ROW * 3),
    ],
)
def test_json_is_read_in_every_layout(write, name, content):
    assert rows(write(name, content)) == [{"question": "1+1?", "answer": "2"}] * 3


@pytest.mark.parametrize(
    "name, content",
    [
        ("a.csv", 'question,answer\n"1,5 + 1?",2\n\nx,"say ""y"""\n'),
        ("semicolons.csv", 'question;answer\n1,5 + 1?;2\nx;"say ""y"""\n'),
        ("a.tsv", 'question\tanswer\n1,5 + 1?\t2\nx\t"say ""y"""\n'),
        ("with_index.csv", ',question,answer\n0,"1,5 + 1?",2\n1,x,"say ""y"""\n'),
        ("a.csv.gz", gzip.compress(b'question,answer\n"1,5 + 1?",2\nx,"say ""y"""\n')),
    ],
)
def test_csv_is_read_with_commas_semicolons_and_tabs(write, name, content):
    read = rows(write(name, content))
    assert read == [
        {"question": "1,5 + 1?", "answer": "2"},
        {"question": "x", "answer": 'say "y"'},
    ]


def test_a_column_of_csv_becomes_numbers_only_if_no_value_changes(write):
    path = write("a.csv", "whole,real,zero,exp,text,empty\n1,0.5,007,1e5,NA,\n-2,4,1,2,None,3\n")
    assert rows(path) == [
        {"whole": 1, "real": 0.5, "zero": "007", "exp": "1e5", "text": "NA", "empty": None},
        {"whole": -2, "real": 4.0, "zero": "1", "exp": "2", "text": "None", "empty": 3},
    ]


@pytest.mark.parametrize("name", ["a.parquet", "a.parquet.gz"])
def test_parquet_is_read(tmp_path, write, name):
    import datasets

    plain = tmp_path / "plain.parquet"
    expected = [{"question": "a", "extra": {"b": [1, 2]}}, {"question": "c", "extra": {"b": []}}]
    datasets.Dataset.from_list(expected).to_parquet(str(plain))
    content = plain.read_bytes()
    path = write(name, gzip.compress(content) if name.endswith(".gz") else content)
    assert rows(path) == expected


def test_values_of_mixed_types_arrive_as_they_are(write):
    values = [4, "x", "4", "null", 2.5, None, {"a": [1, "b"]}, [1, "b"], True]
    path = write("a.jsonl", "".join(json.dumps({"value": value}) + "\n" for value in values))
    assert [row["value"] for row in rows(path)] == values


def test_rows_may_lack_columns(write):
    assert rows(write("a.jsonl", '{"a": 1}\n{"b": "x"}\n')) == [
        {"a": 1, "b": None},
        {"a": None, "b": "x"},
    ]


@pytest.mark.parametrize("name", ["d[1].jsonl", "a*b?.jsonl", "{x,y}.jsonl", "x=1/a.jsonl"])
def test_a_name_is_a_name_and_never_a_pattern(write, name):
    path = write(name, ROW)
    write("d1.jsonl", ROW * 5)
    assert len(rows(path)) == 1
    assert count_rows(DatasetSection(path=str(path))) == 1


def test_a_name_of_a_folder_is_no_column_of_its_parquet_files(tmp_path):
    import datasets

    path = tmp_path / "level=3" / "train.parquet"
    path.parent.mkdir()
    datasets.Dataset.from_list([{"question": "a"}]).to_parquet(str(path))
    assert rows(path) == [{"question": "a"}]


def test_the_splits_of_a_folder_are_found_in_the_layouts_of_the_hub(write, tmp_path):
    for name in ("data/train-00000-of-00002.jsonl", "data/train-00001-of-00002.csv"):
        content = ROW if name.endswith("jsonl") else "question,answer\n2+2?,4\n"
        write(f"hub/{name}", content)
    files = data_files.files_of_split(tmp_path / "hub", "train[:1]")
    assert [row["question"] for row in data_files.load_rows(files, "train")] == ["1+1?", "2+2?"]
    write("folders/train/0.jsonl.gz", gzip.compress(ROW.encode()))
    assert len(data_files.files_of_split(tmp_path / "folders", "train")) == 1
    with pytest.raises(RecipeError, match="there is no 'dev' in .*; it has train"):
        data_files.files_of_split(tmp_path / "folders", "dev")


@pytest.mark.parametrize(
    "split, count", [("train", 10), ("train[:3]", 3), ("train[-2:]", 2), ("train[50%:]", 5)]
)
def test_a_slice_of_a_split_is_cut(write, split, count):
    assert len(rows(write("a.jsonl", ROW * 10), split)) == count


def test_rows_are_counted_without_being_read(write):
    for name, content, count in (
        ("a.jsonl", f"{ROW}\n{ROW}", 2),
        ("a.csv", 'question,answer\n"one\ntwo",3\nx,4\n', 2),
        ("a.json", f"[{ROW}]", None),
        ("a.jsonl.gz", gzip.compress(ROW.encode()), None),
    ):
        assert count_rows(DatasetSection(path=str(write(name, content)))) == count


# ---- what cannot be read


DEEP = '{"question": "a", "answer": ' + "[" * 20_000 + "]" * 20_000 + "}\n"
DEEP_ENOUGH = ROW + '{"question": "a", "z": ' + "[" * 900 + "]" * 900 + "}\n"
LATIN = ROW + '{"question": "é", "answer": "1"}\n'
DAMAGED = [
    ("deep.jsonl", ROW * 3 + DEEP, "row 4 cannot be read: it is nested 20001 deep; use at most 64"),
    ("deep_first.jsonl", DEEP, "row 1 cannot be read: it is nested 20001 deep"),
    ("deep.json", f"[{ROW},{DEEP}]", "row 2 cannot be read: it is nested 20001 deep"),
    ("half_deep.jsonl", DEEP_ENOUGH, "row 2 cannot be read: it is nested 901 deep"),
    ("latin.jsonl", LATIN.encode("latin-1"), "row 2 cannot be read: this is not UTF-8 (byte 0xe9)"),
    (
        "latin.csv",
        "question,answer\na,1\né,2\n".encode("latin-1"),
        "row 2 (line 3) cannot be read: this is not UTF-8 (byte 0xe9)",
    ),
    (
        "latin.json",
        f"[\n{ROW},\n{LATIN[len(ROW) :]}]".encode("latin-1"),
        "line 4 cannot be read: this is not UTF-8",
    ),
    ("wide.jsonl", ROW.encode("utf-16"), "row 1 cannot be read: this is UTF-16 and not UTF-8"),
    ("cut.jsonl", ROW * 2 + '{"question": "x", "ans', "row 3 cannot be read: this is not JSON"),
    ("commas.jsonl", ROW + "{'question': 'x'}\n", "row 2 cannot be read: this is not JSON"),
    ("gap.jsonl", ROW + "\n\n" + "oops\n", "row 2 (line 4) cannot be read: this is not JSON"),
    ("cut.json", f"[{ROW},{ROW},", "row 2 (line 3) cannot be read: the list of rows breaks off"),
    ("open.json", f"[{ROW},{ROW}", "row 2 (line 3) cannot be read: the list of rows breaks off"),
    ("more.json", f"[{ROW}] x", "row 1 (line 2) cannot be read: more follows after the list"),
    ("list.jsonl", ROW + "[1]\n", "row 2 cannot be read: a row is an object such as"),
    ("text.jsonl", ROW + '"x"\n', "and not a text"),
    (
        "half.jsonl",
        ROW + r'{"question": "\ud83d", "answer": "1"}',
        "row 2 cannot be read: it has half of a surrogate pair",
    ),
    ("digits.jsonl", ROW + '{"answer": ' + "9" * 5000 + "}", "row 2 cannot be read: this is not"),
    (
        "wide.csv",
        "question,answer\n1,2\n1,2,3\n",
        "row 2 (line 3) cannot be read: it has 3 values, and the header has 2",
    ),
    ("open.csv", 'question,answer\n1,2\n"1,2\n', "cannot be read: this is not CSV"),
    ("twice.csv", "question,question\n1,2\n", "its header names question twice"),
    ("cut.jsonl.gz", gzip.compress(ROW.encode() * 300)[:40], "the compressed file is damaged here"),
    ("cut.parquet", b"PAR1 and no end", "cannot be read: it is no complete Parquet file"),
    ("empty.jsonl", "", "is empty; give a file with at least one row"),
    ("blank.jsonl", "\n  \n", "is empty; give a file with at least one row"),
    ("empty.json", "[]", "is empty; give a file with at least one row"),
    ("empty.csv", "question,answer\n", "is empty; give a file with at least one row"),
    ("empty.jsonl.gz", gzip.compress(b""), "is empty; give a file with at least one row"),
]


@pytest.mark.parametrize("name, content, sentence", DAMAGED, ids=lambda value: str(value)[:20])
def test_what_cannot_be_read_is_one_sentence_with_file_and_row(write, name, content, sentence):
    path = write(name, content)
    with pytest.raises(RecipeError) as caught:
        rows(path)
    text = str(caught.value)
    assert text.startswith("dataset.path: ") and name in text and sentence in text
    assert "\n" not in text


def test_parquet_files_without_rows_are_refused(tmp_path):
    import datasets

    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"question": [], "answer": []}).to_parquet(str(path))
    with pytest.raises(RecipeError, match="is empty; give a file with at least one row"):
        check_source(DatasetSection(path=str(path)))


def test_a_slice_that_is_none_is_refused(write):
    with pytest.raises(RecipeError, match="'train.:x.' is no slice .*; write one as train"):
        rows(write("a.jsonl", ROW), "train[:x]")


# ---- before anything heavy is imported


EARLY = """
import sys
import train_model
code = train_model.main(sys.argv[1:])
heavy = {"torch", "transformers", "trl"} & sys.modules.keys()
print(code, sorted(heavy), file=sys.stderr)
"""


def run_early(tmp_path, *flags: str):
    recipe = str(ROOT / "recipes/demo.yaml")
    words = [recipe, "--model-name", str(ROOT / "demo/model"), "--output-root", str(tmp_path)]
    return subprocess.run(
        [sys.executable, "-c", EARLY, *words, *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.slow
@pytest.mark.parametrize("switch", [(), ("--dry-run",)])
@pytest.mark.parametrize(
    "name, content, flags, sentence",
    [
        ("a.csv", "q,a\n1,2\n", (), "no column 'question' or 'answer'; this dataset has q, a"),
        ("a.jsonl", '{"question": "1", "b": {"c": 1}}\n', ("--dataset.answer_column", "b.d"),
         "no column 'b.d'; this dataset has question, b, b.c"),
        ("a.jsonl", ROW, ("--dataset.split", "dev"), "'dev' does not exist in the single file"),
        ("main/train.jsonl", ROW, ("--dataset.split", "dev"), "there is no 'dev' in"),
        ("a.jsonl", "", (), "is empty; give a file with at least one row"),
        ("a.json", "[]", (), "is empty; give a file with at least one row"),
        ("a.jsonl", DEEP, (), "is nested 20001 deep"),
        ("a.jsonl", LATIN[len(ROW):].encode("latin-1"), (), "this is not UTF-8"),
    ],
)  # fmt: skip
def test_wrong_data_is_refused_before_torch_is_imported_and_a_recipe_printed(
    write, tmp_path, switch, name, content, flags, sentence
):
    path = write(name, content)
    folder = path.parent.parent if "/" in name else path
    for key in ("dataset", "evaluation"):
        if key == "evaluation":
            flags = [flag.replace("dataset.", "evaluation.") for flag in flags]
        result = run_early(tmp_path, f"--{key}.path", str(folder), *flags, *switch)
        assert result.stdout == ""
        assert result.stderr.splitlines()[-1] == "2 []", result.stderr
        assert "error: " in result.stderr and sentence in result.stderr
        assert key in result.stderr and "Traceback" not in result.stderr
