"""Datasets as problems: references, prompts, the length filter, local files in every layout, and
what is missing.
"""

import json
import logging

import pytest
import tiny
from conftest import ROOT

from gtpo.answers import final_answer, format_score
from gtpo.data import check_source, count_rows, gsm8k_reference, load_problems, math_reference
from gtpo.errors import RecipeError
from gtpo.recipe.sections import DatasetSection


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer()


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows(count: int) -> list[dict]:
    return [
        {"question": f"What is {i} + 1?" + " x" * i, "answer": f"{i} + 1 = {i + 1}\n#### {i + 1}"}
        for i in range(count)
    ]


def load(section, tokenizer, length=10_000, **options):
    return load_problems(DatasetSection(**section), tokenizer, length, 0, **options)


def test_a_gsm8k_row_becomes_system_and_user_message_and_a_formatted_reference(tmp_path, tokenizer):
    path = write_rows(tmp_path / "train.jsonl", rows(1))
    problem = load({"name": "gsm8k", "path": str(path), "system_instruction": "Think."}, tokenizer)[
        0
    ]
    assert problem == {
        "prompt": [
            {"role": "system", "content": "Think."},
            {"role": "user", "content": "What is 0 + 1?"},
        ],
        "answer": "<reasoning>\n0 + 1 = 1\n</reasoning>\n<answer>1</answer>",
    }


def test_a_math_solution_keeps_its_text_and_its_last_box():
    assert (
        math_reference("So \\boxed{1}, no: $\\boxed{\\frac{1}{2}}$.")
        == "<reasoning>\nSo \\boxed{1}, no:"
        " $\\boxed{\\frac{1}{2}}$.\n</reasoning>\n<answer>\\frac{1}{2}</answer>"
    )


def test_prompts_are_counted_after_the_chat_template_and_the_dropped_ones_are_said(
    tmp_path, tokenizer, caplog
):
    path = write_rows(tmp_path / "train.jsonl", rows(10))
    lengths = [
        len(
            tokenizer.apply_chat_template(
                [{"role": "user", "content": row["question"]}],
                add_generation_prompt=True,
                return_dict=False,
            )
        )
        for row in rows(10)
    ]
    with caplog.at_level(logging.INFO):
        problems = load(
            {"name": "gsm8k", "path": str(path), "system_instruction": None},
            tokenizer,
            sorted(lengths)[6],
        )
    assert len(problems) == 7
    assert "7 problems; 3 of 10 dropped because their prompts are longer than" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO):
        load({"name": "gsm8k", "path": str(path)}, tokenizer)
    assert "0 of 10 dropped" in caplog.text  # always said


def test_the_order_depends_on_the_seed_alone(tmp_path, tokenizer):
    path = write_rows(tmp_path / "train.jsonl", rows(30))
    section = DatasetSection(name="gsm8k", path=str(path))
    orders = [
        [p["answer"] for p in load_problems(section, tokenizer, 10_000, seed)] for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(orders[2])


def test_nothing_left_after_the_filter_says_how_long_the_shortest_prompt_is(tmp_path, tokenizer):
    path = write_rows(tmp_path / "train.jsonl", rows(3))
    with pytest.raises(
        RecipeError,
        match="training.max_prompt_length: 5 drops all 3 prompts; the shortest has 2[0-9]+ tokens",
    ):
        load({"name": "gsm8k", "path": str(path)}, tokenizer, 5)


def test_a_missing_column_names_those_there_are(tmp_path, tokenizer):
    path = write_rows(tmp_path / "train.jsonl", [{"q": "1?", "a": "1"}])
    with pytest.raises(
        RecipeError, match="no column 'question' or 'answer'; this dataset has q, a"
    ):
        load({"name": "gsm8k", "path": str(path)}, tokenizer)
    assert load({"path": str(path), "question_column": "q", "answer_column": "a"}, tokenizer)[0][
        "answer"
    ].endswith("<answer>1</answer>")


@pytest.mark.parametrize(
    "answer, found", [("work\n#### 7", "7"), ("so \\boxed{8}", "8"), ("nine", "nine")]
)
def test_ones_own_file_may_write_its_answers_in_three_ways(tmp_path, tokenizer, answer, found):
    path = write_rows(tmp_path / "mine.jsonl", [{"question": "?", "answer": answer}])
    assert final_answer(load({"path": str(path)}, tokenizer)[0]["answer"]) == found


def test_a_column_of_lists_is_refused_and_empty_texts_are_left_out(tmp_path, tokenizer):
    path = write_rows(tmp_path / "train.jsonl", [{"question": ["a"], "answer": "1"}])
    with pytest.raises(
        RecipeError, match="the column 'question' holds values that are neither text nor numbers"
    ):
        load({"name": "gsm8k", "path": str(path)}, tokenizer)
    path = write_rows(
        tmp_path / "more.jsonl",
        [{"question": " ", "answer": "1"}, {"question": "1?", "answer": "1"}],
    )
    assert len(load({"name": "gsm8k", "path": str(path)}, tokenizer)) == 1


def test_a_single_file_has_no_other_split(tmp_path):
    path = write_rows(tmp_path / "train.jsonl", rows(2))
    with pytest.raises(
        RecipeError, match="dataset.split: 'test' does not exist in the single file"
    ):
        check_source(DatasetSection(name="gsm8k", path=str(path), split="test"))


def test_rows_without_question_or_answer_are_left_out_and_said(tmp_path, tokenizer, caplog):
    path = write_rows(tmp_path / "train.jsonl", [*rows(2), {"question": None, "answer": "#### 1"}])
    with caplog.at_level(logging.WARNING):
        assert len(load({"name": "gsm8k", "path": str(path)}, tokenizer)) == 2
    assert "1 rows without question or answer left out" in caplog.text


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_folder_in_the_hubs_layout_is_read_split_by_split(tmp_path, tokenizer, suffix):
    import datasets

    for split, count in (("train", 4), ("test", 2)):
        file = tmp_path / "main" / f"{split}-00000-of-00001.{suffix}"
        file.parent.mkdir(exist_ok=True)
        data = datasets.Dataset.from_list(rows(count))
        data.to_parquet(str(file)) if suffix == "parquet" else data.to_json(str(file))
    for split, count in (("train", 4), ("test", 2), ("train[:3]", 3)):
        assert (
            len(load({"name": "gsm8k", "path": str(tmp_path), "split": split}, tokenizer)) == count
        )
    assert count_rows(DatasetSection(name="gsm8k", path=str(tmp_path))) == 4
    with pytest.raises(RecipeError, match="there is no 'validation' in .*; it has test, train"):
        load({"name": "gsm8k", "path": str(tmp_path), "split": "validation"}, tokenizer)


def test_math_takes_all_its_subsets_in_the_documented_order_or_the_named_ones(tmp_path, tokenizer):
    names = [
        "algebra",
        "geometry",
        "counting_and_probability",
        "number_theory",
        "intermediate_algebra",
        "prealgebra",
        "precalculus",
    ]
    for name in reversed(names):
        write_rows(
            tmp_path / name / "train.jsonl",
            [{"problem": name, "solution": f"\\boxed{{{len(name)}}}"}],
        )
    problems = load({"name": "math", "path": str(tmp_path)}, tokenizer, shuffle=False)
    assert [p["prompt"][-1]["content"] for p in problems] == names
    some = load({"name": "math", "path": str(tmp_path), "subsets": ["geometry"]}, tokenizer)
    assert [p["prompt"][-1]["content"] for p in some] == ["geometry"]
    with pytest.raises(
        RecipeError, match="dataset.subsets: algebr is not known; use some of algebra, geometry"
    ):
        load({"name": "math", "path": str(tmp_path), "subsets": ["algebr"]}, tokenizer)


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
            (
                "'openai/gsm8k' is not in the local cache and HF_HUB_OFFLINE is set; use local"
                " files through dataset.path"
            ),
        ),
    ],
)
def test_where_the_data_is_not_is_known_before_anything_is_loaded(section, sentence):
    with pytest.raises(RecipeError) as caught:
        check_source(DatasetSection(**section))
    assert sentence in str(caught.value)


def test_a_damaged_file_is_one_sentence(tmp_path, tokenizer):
    (tmp_path / "train.jsonl").write_text('{"question": "a", "answer": \n')
    with pytest.raises(RecipeError, match="cannot be read"):
        load({"name": "gsm8k", "path": str(tmp_path / "train.jsonl")}, tokenizer)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(RecipeError, match="is empty; give a file with at least one row"):
        load({"name": "gsm8k", "path": str(tmp_path / "empty.jsonl")}, tokenizer)


def test_a_function_of_ones_own_gives_rows(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "my_rows.py").write_text(
        "def load():\n    return [{'question': '2+2?', 'answer': '4'}]\n\ndef nothing():\n   "
        " return 5\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    assert final_answer(load({"name": "my_rows.load"}, tokenizer)[0]["answer"]) == "4"
    with pytest.raises(
        RecipeError, match="gave no rows .TypeError.*return a datasets.Dataset, or a list of dicts"
    ):
        load({"name": "my_rows.nothing"}, tokenizer)


def shared_rows(shared_data, pattern):
    for file in sorted(shared_data.glob(pattern)):
        with file.open() as lines:
            for line in lines:
                yield json.loads(line)


def test_every_real_gsm8k_row_becomes_a_well_formed_reference_with_its_answer(shared_data):
    count = 0
    for row in shared_rows(shared_data, "gsm8k/*.jsonl"):
        reference = gsm8k_reference(row["answer"])
        assert (
            format_score(reference) == 10
            and final_answer(reference) == row["answer"].split("#### ")[1].strip()
        )
        count += 1
    assert count == 8792


def test_every_real_math_row_becomes_a_well_formed_reference(shared_data):
    empty = count = 0
    for row in shared_rows(shared_data, "hendrycks_math/*/*.jsonl"):
        reference = math_reference(row["solution"])
        assert format_score(reference) == 10
        empty += not final_answer(reference)
        count += 1
    assert (count, empty) == (12500, 2)  # two rows have an empty box
