"""Pairs of answers and references, judged by hand.

tests/grading.json holds 788 of them. tests/grading_attack.json holds 2,144 more: attempts to be
paid for a wrong answer, and right answers in unusual forms.
"""

import json
import random
import re
from fractions import Fraction

import psutil
import pytest
from conftest import ROOT

import reward_math
from gtpo.answers import (
    GRADING_VERSION,
    CannotCompare,
    format_reference,
    same_answer,
)
from gtpo.answers.quantity import quantity
from gtpo.answers.spelling import one_spelling
from gtpo.evaluation.file import grading_version, make_header, read_evaluation
from gtpo.evaluation.scores import scores_as_text
from gtpo.models.generation import Sampling
from gtpo.system.child_process import ChildProcess

PAIRS = json.loads((ROOT / "tests/grading.json").read_text(encoding="utf-8"))
ATTACKS = json.loads((ROOT / "tests/grading_attack.json").read_text(encoding="utf-8"))
STEMS = ("before", "after")
# Right answers that are refused, and why.
REFUSED = {
    "Janet makes $18 every day": "a sentence: only the frames of `The answer is 18` are taken off",
    "She pays $12 in total": "a sentence, likewise",
}

REFUSED_IN_ATTACKS = {
    "½ of a mile": "`of` after a number may begin a calculation: `5 of ten`",
    r"\begin{array}{c}12\end{array}": "a table is no number",
    r"\mathbf{R}": "a bold letter is a letter, such as a choice",
    "2+3*I": "`I` is a variable",
    "(6)(7) = 42": "a product without a sign between its factors is not checked",
}


@pytest.mark.slow  # thousands of pairs, or seconds of work
def test_no_wrong_answer_is_paid():
    paid = [pair for pair in PAIRS if not pair["equal"] and same_answer(*_texts(pair))]
    assert paid == []


@pytest.mark.slow  # thousands of pairs, or seconds of work
def test_right_answers_are_paid_but_for_the_listed_ones():
    refused = [pair["answer"] for pair in PAIRS if pair["equal"] and not same_answer(*_texts(pair))]
    assert sorted(refused) == sorted(REFUSED)


@pytest.mark.slow  # thousands of pairs, or seconds of work
def test_no_attack_is_paid():
    paid = [pair for pair in ATTACKS if not pair["equal"] and same_answer(*_texts(pair))]
    assert paid == []


@pytest.mark.slow  # thousands of pairs, or seconds of work
def test_right_answers_in_unusual_forms_are_paid_but_for_the_listed_ones():
    right = [pair for pair in ATTACKS if pair["equal"]]
    refused = [pair["answer"] for pair in right if not same_answer(*_texts(pair))]
    assert sorted(refused) == sorted(REFUSED_IN_ATTACKS)


def _texts(pair: dict) -> tuple[str, str]:
    return pair["answer"], pair["reference"]


@pytest.mark.parametrize(
    ("phrase", "value"),
    [
        ("5 thousand", 5000), ("5 lakhs", 500_000), ("2 dozen eggs", 24), ("12 tens", 120),
        ("3 fifths", Fraction(3, 5)), ("5 thousandths", Fraction(1, 200)), ("$1.2M", 1_200_000),
        ("$5 hundred", 500), ("5k", 5000), ("5 bn", 5 * 10**9), ("12th", 12),
        ("2 3/4", Fraction(11, 4)),
        (r"0.1\overline{6}", Fraction(1, 6)), ("2¾", Fraction(11, 4)), ("1.5e3", 1500), ("١٢", 12),
    ],
)  # fmt: skip
def test_words_and_signs_that_change_a_value_change_it(phrase, value):
    assert quantity(one_spelling(phrase)).value == value


@pytest.mark.parametrize(
    "phrase",
    [
        "red balls", "tenth graders", "dollars per day", "a day", "ID cards", "left", "in total",
        "pairs of shoes", "(dollars)", "apple(s)", "days' worth", "km/h", "sq. ft.", "times a day",
    ],
)  # fmt: skip
def test_one_noun_phrase_after_a_number_is_its_unit(phrase):
    assert same_answer(f"18 {phrase}", "18")


@pytest.mark.parametrize(
    "phrase",
    [
        "or so", "or nineteen", "and a half", "point five", "less than twenty", "maybe", "at least",
        "below zero", "doubled", "squared", "times as many", "not", "dozen", "hundredths",
        "to twenty",
        "apples or six", "but maybe nineteen", "minus one", "divided by two", "over nine", "score",
    ],
)  # fmt: skip
def test_words_that_may_change_a_value_are_no_unit(phrase):
    assert not same_answer(f"18 {phrase}", "18")


def test_units_are_the_same_by_meaning_and_not_by_their_letters():
    same = [("5 cm", "5 centimetres"), ("45 km/h", "45 kilometers per hour"), ("3 lbs", "3 pounds")]
    same += [("12 cm²", "12 square cm"), ("$5", "5 dollars"), ("18 red balls", "18 balls")]
    different = [("12 mm", "12 m"), ("72°C", "72°F"), ("12 months", "12 m"), ("5 km", "5 km/h")]
    different += [("12 cm", "12 cm^2"), ("5 apples", "5 pears"), ("12 cents", "$12")]
    assert [pair for pair in same if not same_answer(*pair)] == []
    assert [pair for pair in different if same_answer(*pair)] == []


@pytest.mark.parametrize("answer", ["17 + 1", "20 - 2", "3 * 6", r"3 \cdot 6", "(17)+(1)", "2(9)"])
def test_a_calculation_that_was_not_carried_out_is_no_number(answer):
    assert not same_answer(answer, "18")


@pytest.mark.parametrize(
    "answer", ["36/2", r"2 \cdot 3^2", r"\sqrt{324}", "3 * 6 = 18", "17 + 1 = 18"]
)
def test_standard_forms_of_a_number_and_calculations_with_their_result_are_paid(answer):
    assert same_answer(answer, "18")


def test_intervals_that_end_before_they_begin_are_no_empty_set():
    for answer in ("[9,3)", "(2,1)", "[100,1]"):
        for reference in (r"\emptyset", "(8,2)", "[8,2)", r"\{\}"):
            assert not same_answer(answer, reference)
    assert not same_answer("[18,18]", "18")


def test_named_parts_answer_a_point_in_its_order_and_solutions_in_any():
    assert same_answer("y = -2, x = 3", "(3,-2)")
    assert not same_answer("x = -2, y = 3", "(3,-2)")
    assert same_answer("x = 5 or x = 2", "2, 5")
    assert not same_answer("x = 2 or x = 5", "2")


def test_tiny_differences_are_differences():
    for power in (20, 60, 200):
        assert not same_answer(rf"\frac{{1}}{{2^{{{power}}}}}", rf"\frac{{1}}{{2^{{{power + 1}}}}}")
        assert not same_answer(rf"\sqrt2+2^{{-{power}}}", r"\sqrt2")
    assert same_answer(r"\sqrt{5+2\sqrt6}", r"\sqrt2+\sqrt3")


def test_a_unit_or_a_frame_around_a_number_never_changes_which_number_it_is():
    dice = random.Random(0)
    frames = ["%d", "$%d", "The answer is %d.", "%d cm", r"\boxed{%d}", "**%d**", "x = %d", "%d%%"]
    for _ in range(500):
        one, other = dice.randrange(-50, 1000), dice.randrange(-50, 1000)
        frame = dice.choice(frames)
        assert same_answer(frame % one, str(other)) == (one == other), (frame, one, other)


def table_rows() -> list[tuple[str, str, bool]]:
    """The rows of the tables in docs/grading.md."""
    page = (ROOT / "docs/grading.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \| `([^`]+)` \| (yes|no) \|", page, re.MULTILINE)
    return [(answer, reference, equal == "yes") for answer, reference, equal in rows]


@pytest.mark.parametrize(("answer", "reference", "equal"), table_rows())
def test_the_page_on_grading_is_true(answer, reference, equal):
    assert same_answer(answer, reference) == equal


@pytest.mark.slow
def test_a_question_whose_process_is_killed_is_sent_again(monkeypatch):
    kill_before_replies(monkeypatch, times=1)
    assert same_answer("k+1", "1+k")


@pytest.mark.slow
def test_a_question_that_kills_twice_raises_an_error_and_is_not_remembered(monkeypatch):
    kill_before_replies(monkeypatch, times=2)
    with pytest.raises(CannotCompare, match="ended twice"):
        same_answer("k+2", "2+k")
    assert same_answer("k+2", "2+k")


def kill_before_replies(monkeypatch, times: int) -> None:
    """Kill the process at its next `times` questions, as a machine without memory does."""
    ask, left = ChildProcess.ask, [times]

    def killed_first(child: ChildProcess, request: bytes, seconds: float) -> bytes:
        if left[0] and request != b"null":
            left[0] -= 1
            for process in psutil.Process().children():
                if child.module in process.cmdline():
                    process.kill()
        return ask(child, request, seconds)

    monkeypatch.setattr(ChildProcess, "ask", killed_first)


@pytest.mark.slow
def test_a_question_that_takes_too_long_is_answered_with_not_equal():
    assert not same_answer(r"9^{9 \cdot 9^{9}}", "x+2")


@pytest.mark.slow
def test_a_completion_that_cannot_be_compared_gets_no_reward(monkeypatch):
    kill_before_replies(monkeypatch, times=2)
    completions = [format_reference("", "k+3"), format_reference("", "5")]
    assert reward_math.final_reward(completions, ["3+k", "5"]) == [None, 20.0]


def test_an_evaluation_keeps_the_version_of_the_rules_and_old_ones_are_version_1(unpacked):
    new = make_header({"reference": ["5"]}, ["prompt"], Sampling(0, 1, 0, 36), 1, "weights")
    assert grading_version(new) == GRADING_VERSION == 2
    (old,) = unpacked.glob("finished_*/evaluation/before.jsonl")
    assert grading_version(read_evaluation(old).header) == 1


def test_comparing_evaluations_of_two_versions_says_so(unpacked):
    before, after = (next(unpacked.glob(f"finished_*/evaluation/{n}.jsonl")) for n in STEMS)
    evaluations = {"before": read_evaluation(before), "after": read_evaluation(after)}
    assert "Graded by versions" not in scores_as_text(evaluations, None)
    evaluations["after"].header["grading"] = GRADING_VERSION
    assert "Graded by versions 1 and 2 of the rules" in scores_as_text(evaluations, None)
