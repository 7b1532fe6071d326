"""What evaluations report, as pure functions of verdicts and answers: pass@k, maj@k, and bootstrap
intervals.
"""

import math
import re
from collections import defaultdict
from collections.abc import Sequence
from fractions import Fraction

import numpy

from gtpo.answers import same_answer

RESAMPLES = 10_000
NUMERAL = re.compile(r"[+-]?\d{1,100}(\.\d{1,100})?", re.ASCII)


def pass_at_k(correct: Sequence[Sequence[bool]], k: int) -> list[float]:
    """Per problem, the probability that k of its n samples, drawn without replacement, hold a
    correct one.

    1 - C(n - c, k) / C(n, k) for c correct of n samples, the unbiased estimator (arXiv 2107.03374);
    k is at most n.
    """
    return [1 - math.comb(len(row) - sum(row), k) / math.comb(len(row), k) for row in correct]


def maj_at_k(
    answers: Sequence[Sequence[str | None]], correct: Sequence[Sequence[bool]], k: int
) -> list[float]:
    """Per problem, 1.0 where most of its first k samples give the correct answer, else 0.0.

    Answers that say the same (1/2 and 0.5) are one, so all correct ones are; of equally many votes
    the earliest answer wins; None and "" do not vote. `correct` are the verdicts on the same
    samples.
    """
    return [
        float(_correct_wins(row[:k], verdicts[:k]))
        for row, verdicts in zip(answers, correct, strict=True)
    ]


def _correct_wins(answers: Sequence[str | None], correct: Sequence[bool]) -> bool:
    """Whether the correct answer has most votes, with as few comparisons as decide it: math-verify
    takes 20 ms for one.
    """
    # places of the correct answer, and of each wrong one by its text or value
    right, wrong = [], defaultdict(list)
    for place, answer in enumerate(answers):
        if answer:
            (right if correct[place] else wrong[_value_or_text(answer)]).append(place)
    if not right:
        return False
    # wrong answers that say something else than all before
    rivals: dict[Fraction | str, list[int]] = {}
    waiting = sum(map(len, wrong.values()))
    # the strongest first: it often decides
    for answer, places in sorted(wrong.items(), key=lambda item: -len(item[1])):
        strongest = max(map(len, rivals.values()), default=0)
        if strongest > len(right) or strongest + waiting < len(right):
            break
        waiting -= len(places)
        same = next((rival for rival in rivals if _say_the_same(answer, rival)), answer)
        rivals[same] = rivals.get(same, []) + places
    return max([right, *rivals.values()], key=lambda places: (len(places), -min(places))) is right


def _value_or_text(answer: str) -> Fraction | str:
    return Fraction(answer) if NUMERAL.fullmatch(answer) else answer


def _say_the_same(one: Fraction | str, other: Fraction | str) -> bool:
    """Two distinct values never do; the rest is for `same_answer`."""
    return not (isinstance(one, Fraction) and isinstance(other, Fraction)) and same_answer(
        str(one), str(other)
    )


def intervals(values: numpy.ndarray, seed: int = 0) -> numpy.ndarray:
    """95 % bootstrap intervals (m, 2) of the means of `values` (problems, m), by resampling
    problems.

    The percentiles of RESAMPLES resampled means; all m share the resamples. For the interval of a
    difference on the same problems, hand in the differences.
    """
    problems = len(values)
    generator = numpy.random.default_rng(seed)
    chunk = max(1, 2_000_000 // problems)  # resamples at a time: 16 MB of counts
    means = [
        generator.multinomial(
            problems, [1 / problems] * problems, size=min(chunk, RESAMPLES - start)
        )
        @ values
        / problems
        for start in range(0, RESAMPLES, chunk)
    ]
    return numpy.quantile(numpy.concatenate(means), [0.025, 0.975], axis=0).T
