"""Datasets as problems: references, prompts, the length filter, and local files."""

import json
import logging

import pytest
import tiny
from conftest import ROOT

from gtpo import data
from gtpo.answers import final_answer, format_score
from gtpo.data import Source, check_source, count_rows, gsm8k_reference, math_reference
from gtpo.errors import RecipeError
from gtpo.recipe import sections
from gtpo.recipe.sections import DatasetSection


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer()


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def gsm8k_rows(count: int) -> list[dict]:
    """Rows in GSM8K's schema, each with a longer question than the one before."""
    return [
        {"question": f"What is {i} + 1?" + " x" * i, "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"}
        for i in range(count)
    ]


def load(section: dict, tokenizer, length=10_000, **options):
    """The problems of a dataset section with these keys."""
    return data.load_problems(DatasetSection(**section), tokenizer, length, 0, **options)


def answer_of(problem) -> str:
    assert problem["answer"] == final_answer(problem["reference"])
    return problem["answer"]


# ---- problems


def test_a_gsm8k_row_becomes_system_and_user_message_and_a_formatted_reference(tmp_path, tokenizer):
    path = write_rows(tmp_path / "train.jsonl", gsm8k_rows(1))
    section = {"name": "gsm8k", "path": path, "system_instruction": "Think."}
    assert load(section, tokenizer)[0] == {
        "prompt": [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": "What is 0 + 1?"},
        ],
        "answer": "1",
        "reference": "<reasoning>\n0 + 1 = 1\n</reasoning>\n<answer>1</answer>",
        "question": "What is 0 + 1?",
    }


def test_a_math_reference_has_the_whole_solution_and_its_last_box():
    solution = "So \\boxed{1}, no: $\\boxed{\\frac{1}{2}}$."
    assert (
        math_reference(solution)
        == f"<reasoning>\n{solution}\n</reasoning>\n<answer>\\frac{{1}}{{2}}</answer>"
    )


def test_prompts_are_measured_after_the_chat_template_and_the_log_says_how_many_are_dropped(
    tmp_path, tokenizer, caplog
):
    path = write_rows(tmp_path / "train.jsonl", gsm8k_rows(10))
    section = {"name": "gsm8k", "path": path, "system_instruction": None}
    lengths = [
        len(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["question"]}],
                add_generation_prompt=True,
                return_dict=False,
            )
        )
        for row in gsm8k_rows(10)
    ]
    with caplog.at_level(logging.INFO):
        assert len(load(section, tokenizer, sorted(lengths)[6])) == 7
        assert "7 problems; 3 of 10 dropped because their prompts are longer than" in caplog.text
        load({"name": "gsm8k", "path": path}, tokenizer)
    assert "10 problems; 0 of 10 dropped" in caplog.text


def test_the_order_depends_on_the_seed_alone(tmp_path, tokenizer):
    section = DatasetSection(
        name="gsm8k", path=write_rows(tmp_path / "train.jsonl", gsm8k_rows(30))
    )
    first, again, other = [
        [problem["answer"] for problem in data.load_problems(section, tokenizer, 10_000, seed)]
        for seed in (0, 0, 1)
    ]
    assert first == again != other and sorted(first) == sorted(other)


def test_a_limit_that_drops_every_prompt_is_refused_with_the_shortest_length(tmp_path, tokenizer):
    path = write_rows(tmp_path / "train.jsonl", gsm8k_rows(3))
    expected = "training.max_prompt_length: 5 drops all 3 prompts; the shortest has 2[0-9]+ tokens"
    with pytest.raises(RecipeError, match=expected):
        load({"name": "gsm8k", "path": path}, tokenizer, 5)


def test_a_missing_column_is_refused_with_the_columns_that_exist(tmp_path, tokenizer):
    path = write_rows(tmp_path / "train.jsonl", [{"q": "1?", "a": "1"}])
    with pytest.raises(
        RecipeError, match="no column 'question' or 'answer'; this dataset has q, a"
    ):
        load({"name": "gsm8k", "path": path}, tokenizer)
    section = {"path": path, "question_column": "q", "answer_column": "a"}
    assert answer_of(load(section, tokenizer)[0]) == "1"


@pytest.mark.parametrize(
    "answer, expected", [("work\n#### 7", "7"), ("so \\boxed{8}", "8"), ("nine", "nine")]
)
def test_your_own_file_may_write_its_answers_in_three_ways(tmp_path, tokenizer, answer, expected):
    path = write_rows(tmp_path / "mine.jsonl", [{"question": "?", "answer": answer}])
    assert answer_of(load({"path": path}, tokenizer)[0]) == expected


def test_a_column_of_lists_is_refused_and_empty_texts_are_left_out(tmp_path, tokenizer):
    path = write_rows(tmp_path / "train.jsonl", [{"question": ["a"], "answer": "1"}])
    expected = "the column 'question' holds values that are neither text nor numbers"
    with pytest.raises(RecipeError, match=expected):
        load({"name": "gsm8k", "path": path}, tokenizer)
    rows = [{"question": " ", "answer": "1"}, {"question": "1?", "answer": "1"}]
    path = write_rows(tmp_path / "more.jsonl", rows)
    assert len(load({"name": "gsm8k", "path": path}, tokenizer)) == 1


def test_rows_without_question_or_answer_are_left_out_with_a_warning(tmp_path, tokenizer, caplog):
    rows = [*gsm8k_rows(2), {"question": None, "answer": "#### 1"}]
    path = write_rows(tmp_path / "train.jsonl", rows)
    assert len(load({"name": "gsm8k", "path": path}, tokenizer)) == 2
    assert "1 rows without question or answer left out" in caplog.text


# ---- where the rows come from


def test_a_dataset_that_is_added_to_the_tables_is_loaded_by_its_name(
    tmp_path, tokenizer, monkeypatch
):
    def capital_reference(text: str) -> str:
        return f"<reasoning>\n{text}\n</reasoning>\n<answer>{text.split()[-1]}</answer>"

    source = Source("some/capitals", ["europe", "asia"], "land", "capital", capital_reference)
    monkeypatch.setitem(data.DATASETS, "capitals", source)
    monkeypatch.setitem(sections.DATASET_ALIASES, "capitals", "capitals")
    for subset, land, capital in (("asia", "Japan", "Tokyo"), ("europe", "Italy", "Rome")):
        write_rows(
            tmp_path / subset / "train.jsonl", [{"land": land, "capital": f"It is {capital}"}]
        )
    section = {"name": "capitals", "path": str(tmp_path)}
    problems = load(section, tokenizer, shuffle=False)
    assert [answer_of(problem) for problem in problems] == ["Rome", "Tokyo"]
    assert answer_of(load({**section, "subsets": ["asia"]}, tokenizer)[0]) == "Tokyo"
    expected = "dataset.subsets: africa is not known; use some of europe, asia"
    with pytest.raises(RecipeError, match=expected):
        load({**section, "subsets": ["africa"]}, tokenizer)


def test_a_single_file_has_no_other_split(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", gsm8k_rows(2))
    expected = "dataset.split: 'test' does not exist in the single file"
    with pytest.raises(RecipeError, match=expected):
        check_source(DatasetSection(name="gsm8k", path=path, split="test"))


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_folder_in_the_hubs_layout_is_read_split_by_split(tmp_path, tokenizer, suffix):
    import datasets

    for split, count in (("train", 4), ("test", 2)):
        file = tmp_path / "main" / f"{split}-00000-of-00001.{suffix}"
        file.parent.mkdir(exist_ok=True)
        rows = datasets.Dataset.from_list(gsm8k_rows(count))
        rows.to_parquet(str(file)) if suffix == "parquet" else rows.to_json(str(file))
    section = {"name": "gsm8k", "path": str(tmp_path)}
    for split, count in (("train", 4), ("test", 2), ("train[:3]", 3)):
        assert len(load({**section, "split": split}, tokenizer)) == count
    assert count_rows(DatasetSection(**section)) == 4
    with pytest.raises(RecipeError, match="there is no 'validation' in .*; it has test, train"):
        load({**section, "split": "validation"}, tokenizer)


def test_math_has_all_its_subsets_in_the_documented_order_or_those_that_are_named(
    tmp_path, tokenizer
):
    names = (
        "algebra geometry counting_and_probability number_theory intermediate_algebra prealgebra"
        " precalculus"
    ).split()
    for name in reversed(names):
        row = {"problem": name, "solution": f"\\boxed{{{len(name)}}}"}
        write_rows(tmp_path / name / "train.jsonl", [row])

    def questions(**keys) -> list[str]:
        section = {"name": "math", "path": str(tmp_path), **keys}
        return [p["prompt"][-1]["content"] for p in load(section, tokenizer, shuffle=False)]

    assert questions() == names
    assert questions(subsets=["geometry"]) == ["geometry"]
    expected = "dataset.subsets: algebr is not known; use some of algebra, geometry"
    with pytest.raises(RecipeError, match=expected):
        questions(subsets=["algebr"])
    (tmp_path / "algebra").rename(tmp_path / "other")
    with pytest.raises(RecipeError, match="has no folder algebra; it has counting_and_probability"):
        questions()


@pytest.mark.parametrize(
    "section, sentence",
    [
        (
            {"name": "gsm8k", "path": "nowhere.jsonl"},
            "dataset.path: there is no file or folder 'nowhere.jsonl'",
        ),
        (
            {"name": "gsm8k", "path": str(ROOT / "README.md")},
            "is not one of .jsonl, .json, .parquet",
        ),
        (
            {"name": "gsm8k"},
            "'openai/gsm8k' is not in the local cache and HF_HUB_OFFLINE is set; use local files"
            " through dataset.path",
        ),
    ],
)
def test_data_that_is_missing_is_refused_before_anything_is_loaded(section, sentence):
    with pytest.raises(RecipeError) as caught:
        check_source(DatasetSection(**section))
    assert sentence in str(caught.value)


def test_a_damaged_file_and_an_empty_one_are_refused(tmp_path, tokenizer):
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": \n')
    with pytest.raises(RecipeError, match="cannot be read"):
        load({"name": "gsm8k", "path": str(tmp_path / "train.jsonl")}, tokenizer)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RecipeError, match="is empty; give a file with at least one row"):
        load({"name": "gsm8k", "path": str(tmp_path / "empty.jsonl")}, tokenizer)


def test_your_own_function_returns_rows(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "my_rows.py").write_text(
        "def load():\n"
        "    return [{'question': '2+2?', 'answer': '4'}]\n"
        "\n"
        "def number():\n"
        "    return 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert answer_of(load({"name": "my_rows.load"}, tokenizer)[0]) == "4"
    expected = "gave no rows .TypeError.*return a datasets.Dataset, or a list of dicts"
    with pytest.raises(RecipeError, match=expected):
        load({"name": "my_rows.number"}, tokenizer)


# ---- the real datasets


def shared_rows(shared_data, pattern):
    for file in sorted(shared_data.glob(pattern)):
        with file.open() as lines:
            for line in lines:
                yield json.loads(line)


def test_every_real_gsm8k_row_becomes_a_well_formed_reference_with_its_answer(shared_data):
    count = 0
    for row in shared_rows(shared_data, "gsm8k/*.jsonl"):
        reference = gsm8k_reference(row["answer"])
        assert format_score(reference) == 10
        assert final_answer(reference) == row["answer"].split("#### ")[1].strip()
        count += 1
    assert count == 8792


@pytest.mark.slow  # seconds of work
def test_every_real_math_row_becomes_a_well_formed_reference(shared_data):
    empty = count = 0
    for row in shared_rows(shared_data, "hendrycks_math/*/*.jsonl"):
        reference = math_reference(row["solution"])
        assert format_score(reference) == 10
        empty += not final_answer(reference)
        count += 1
    assert (count, empty) == (12500, 2)  # two rows have an empty box
