"""pass@k and maj@k against brute force, and intervals against known values."""

import random
from itertools import combinations

import numpy
import pytest

from gtpo.answers import same_answer
from gtpo.evaluation import estimators
from gtpo.evaluation.estimators import intervals, maj_at_k, pass_at_k

ANSWERS = [
    *("1/2", "0.5", r"\frac12", "3", "3.0", "03", "-2"),
    *(r"x+1", r"1+x", r"\sqrt{2}", "tomorrow", "", None),
]


def correct_answer_wins(answers, correct, k) -> bool:
    """Whether the correct answer wins the literal vote, which compares all answers."""
    ballots: list[list[int]] = []
    for place, answer in enumerate(answers[:k]):
        if answer:
            box = next((b for b in ballots if same_answer(answer, answers[b[0]])), None)
            if box is None:
                ballots.append(box := [])
            box.append(place)
    winner = max(ballots, key=lambda box: (len(box), -box[0]), default=None)
    return winner is not None and correct[winner[0]]


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_all_subsets_that_hold_a_correct_sample(n):
    for c in range(n + 1):
        row = [True] * c + [False] * (n - c)
        for k in range(1, n + 1):
            subsets = list(combinations(row, k))
            assert pass_at_k([row], k) == [pytest.approx(sum(map(any, subsets)) / len(subsets))]


def test_pass_at_k_holds_for_many_samples():
    assert pass_at_k([[True] + [False] * 4999], 2500) == [pytest.approx(0.5)]


@pytest.mark.slow
def test_the_majority_of_random_answers_is_that_of_a_literal_vote():
    chance = random.Random(0)
    for _ in range(300):
        answers = chance.choices(ANSWERS, k=8)
        reference = chance.choice(["0.5", "3", "x+1", "7"])
        correct = [same_answer(answer, reference) for answer in answers]
        for k in (1, 2, 5, 8):
            expected = [correct_answer_wins(answers, correct, k)]
            assert maj_at_k([answers], [correct], k) == expected, (answers, reference, k)


@pytest.mark.parametrize(
    "answers, grades, wins",
    [
        (["1/2", "3", "0.5"], "+-+", True),  # two equal answers outvote one
        (["3", "1/2"], "-+", False),  # the earliest answer wins a tie
        (["1/2", "3"], "+-", True),
        (["3", "7", "1/2"], "--+", False),
        ([None, "", "1/2"], "--+", True),  # no answer, no vote
        ([None, None], "--", False),
        (["073", "73", "37"], "++-", True),  # zero padding, as in AIME
    ],
)
def test_equal_answers_share_their_votes(answers, grades, wins):
    assert maj_at_k([answers], [[grade == "+" for grade in grades]], len(answers)) == [wins]


def test_only_the_first_k_samples_vote():
    answers, correct = ["1", "2", "2"], [True, False, False]
    assert [maj_at_k([answers], [correct], k) for k in (1, 2, 3)] == [[1.0], [1.0], [0.0]]


def test_the_majority_needs_few_comparisons_of_expressions(monkeypatch):
    compared = []
    monkeypatch.setattr(
        estimators, "same_answer", lambda one, other: compared.append((one, other)) or False
    )
    wrong = [rf"\sqrt{{{i}}}" for i in range(60)]
    maj_at_k([wrong], [[False] * 60], 60)  # no answer is right
    maj_at_k([["1"] * 61 + wrong], [[True] * 61 + [False] * 60], 121)  # most answers are right
    # the most frequent wrong answer has more votes
    maj_at_k([["1", *wrong, "9", "9"]], [[True] + [False] * 62], 63)
    # numbers are compared by value
    maj_at_k([[str(i) for i in range(60)]], [[i == 0 for i in range(60)]], 60)
    assert not compared


def test_an_interval_includes_the_mean_and_narrows_with_more_problems():
    values = numpy.random.default_rng(1).random((400, 1))
    few, many = intervals(values[:100])[0], intervals(values)[0]
    assert few[0] < values[:100].mean() < few[1] and many[0] < values.mean() < many[1]
    assert many[1] - many[0] < 0.6 * (few[1] - few[0])


@pytest.mark.slow
def test_an_interval_agrees_with_the_normal_approximation_and_is_reproducible():
    values = numpy.array([[1.0]] * 300 + [[0.0]] * 700)
    ((low, high),) = intervals(values)
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert low == pytest.approx(0.3 - half, abs=0.002)
    assert high == pytest.approx(0.3 + half, abs=0.002)
    assert (intervals(values) == [[low, high]]).all()


def test_a_paired_interval_shows_a_difference_that_two_separate_ones_do_not():
    base = numpy.random.default_rng(2).random((200, 1))
    better = base + 0.01
    assert intervals(better)[0][0] < intervals(base)[0][1]  # they overlap
    assert intervals(better - base)[0] == pytest.approx([0.01, 0.01])
