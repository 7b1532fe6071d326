"""The estimators of evaluations, as pure functions of values: pass@k, maj@k, bootstrap intervals.

They stand apart from scores.py, which takes the values from an evaluation's rows.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

import numpy

from gtpo.answers import CannotCompare, same_answer

RESAMPLES = 10_000
NUMERAL = re.compile(r"[+-]?\d{1,100}(\.\d{1,100})?", re.ASCII)


def pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> list[float]:
    """Returns, per problem, the probability that k of its n samples include a correct one.

    The k samples are drawn without replacement. With c correct samples of n this is
    1 - C(n - c, k) / C(n, k), the unbiased estimator of arXiv 2107.03374. k is at most n.
    """
    return [1 - math.comb(len(row) - sum(row), k) / math.comb(len(row), k) for row in correct]


def maj_at_k(
    answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]], k: int
) -> list[float]:
    """Returns, per problem, 1.0 if the answer with most votes of the first k samples is correct.

    Otherwise it is 0.0. `correct` says of each sample whether its answer is correct. Equal answers
    (1/2 and 0.5) are one answer, so all correct ones are. Of several answers with equally many
    votes the earliest wins. None and "" do not vote.
    """
    return [
        float(_correct_answer_wins(row[:k], correct_row[:k]))
        for row, correct_row in zip(answers, correct, strict=True)
    ]


def _correct_answer_wins(answers: Sequence[str | None], correct: Sequence[bool]) -> bool:
    """Whether the correct answer has most votes.

    Compares as few answers as decide it: math-verify takes 20 ms for one comparison.
    """
    # The places of the correct answer, and of each wrong answer by its value or its text.
    right, wrong = [], defaultdict(list)
    for place, answer in enumerate(answers):
        if answer:
            (right if correct[place] else wrong[_value_or_text(answer)]).append(place)
    if not right:
        return False
    # The places of wrong answers that differ from each other.
    rivals: dict[Fraction | str, list[int]] = {}
    uncounted = sum(map(len, wrong.values()))
    # The most frequent answers first: they often decide.
    for answer, places in sorted(wrong.items(), key=lambda item: -len(item[1])):
        most_votes = max(map(len, rivals.values()), default=0)
        if most_votes > len(right) or most_votes + uncounted < len(right):
            break
        uncounted -= len(places)
        same = next((rival for rival in rivals if _are_equal(answer, rival)), answer)
        rivals[same] = rivals.get(same, []) + places
    return max([right, *rivals.values()], key=lambda places: (len(places), -min(places))) is right


def _value_or_text(answer: str) -> Fraction | str:
    return Fraction(answer) if NUMERAL.fullmatch(answer) else answer


def _are_equal(one: Fraction | str, other: Fraction | str) -> bool:
    """Whether two different keys are the same answer; two different values never are."""
    both_are_values = isinstance(one, Fraction) and isinstance(other, Fraction)
    try:
        return not both_are_values and same_answer(str(one), str(other))
    except CannotCompare:  # two votes, as for any answers that are not known to be equal
        return False


def intervals(values: numpy.ndarray, seed: int = 0) -> numpy.ndarray:
    """Returns 95 % bootstrap intervals, (m, 2), of the means of `values`, (problems, m).

    They are percentiles of the means of RESAMPLES samples of the problems, drawn with replacement.
    All m columns share the samples. For the interval of a difference on the same problems, give the
    differences.
    """
    problems = len(values)
    generator = numpy.random.default_rng(seed)
    chunk = max(1, 2_000_000 // problems)  # samples at a time: 16 MB of counts
    means = []
    for start in range(0, RESAMPLES, chunk):
        size = min(chunk, RESAMPLES - start)
        counts = generator.multinomial(problems, [1 / problems] * problems, size=size)
        means.append(counts @ values / problems)
    return numpy.quantile(numpy.concatenate(means), [0.025, 0.975], axis=0).T
