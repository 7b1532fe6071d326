"""The columns task: its sums, its imperfect targets, its tokenizer, and the script itself."""

import json
import random
import re
from pathlib import Path

import pytest
from conftest import load_script
from transformers import AutoTokenizer

from gtpo.answers import final_answer, format_score

DEMO = Path(__file__).parents[1] / "demo"
TASK = DEMO / "columns"


@pytest.fixture(scope="module")
def make_columns():
    return load_script(DEMO / "make_columns.py")


def rows(split: str) -> list[dict[str, str]]:
    """The shipped problems of a split."""
    text = (TASK / f"data/{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def numbers(row: dict[str, str]) -> tuple[str, ...]:
    """The first number, the sign and the second number of a question."""
    return re.fullmatch(r"\D+(\d+) ([+-]) (\d+)[?.]", row["question"]).groups()


def test_no_test_problem_is_a_training_problem_and_every_answer_is_right():
    train, test = rows("train"), rows("test")
    assert (len(train), len(test)) == (4000, 300)
    assert not {numbers(row) for row in train} & {numbers(row) for row in test}
    for row in train + test:
        a, sign, b = numbers(row)
        result = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert row["answer"] == f"{a}{sign}{b}={result}\n#### {result}"
        assert 0 <= result <= 999


@pytest.mark.slow
def test_the_script_writes_the_shipped_problems_and_tokenizer_byte_for_byte(make_columns, tmp_path):
    make_columns.make_columns(tmp_path, steps=1)
    names = "data/train.jsonl data/test.jsonl model/tokenizer.json model/chat_template.jinja"
    for name in names.split():
        assert (tmp_path / name).read_bytes() == (TASK / name).read_bytes(), name


def test_targets_are_right_and_well_formed_without_faults_and_often_not_with_them(make_columns):
    train, _ = make_columns.make_sums()
    rng = random.Random(0)
    for problem in train[:500]:
        target = make_columns.draw_target(problem, rng, faults=False)
        assert format_score(target) == 10
        assert final_answer(target) == str(problem.steps()[1])
    well_formed = right = 0
    for problem in train:
        target = make_columns.draw_target(problem, rng)
        well_formed += format_score(target) == 10
        right += final_answer(target) == str(problem.steps()[1])
    assert 0.82 < well_formed / len(train) < 0.88
    assert 0.5 < right / len(train) < 0.7


def test_every_digit_is_one_token_and_every_tag_is_several(make_columns):
    tokenizer = AutoTokenizer.from_pretrained(TASK / "model")
    assert len(tokenizer.encode("a507=")) == 5
    for tag in make_columns.TAGS:
        assert len(tokenizer.encode(tag)) > 2, tag
    train, _ = make_columns.make_sums()
    lengths = [
        len(tokenizer.encode(make_columns.draw_target(problem, random.Random(0))))
        for problem in train[:200]
    ]
    assert 70 < sum(lengths) / len(lengths) < 95
