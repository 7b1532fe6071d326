"""The numbers of evaluations, from their rows: rates, pass@k and maj@k with intervals, differences,
and their table.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from gtpo.errors import RecipeError
from gtpo.evaluation.estimators import intervals, maj_at_k, pass_at_k
from gtpo.evaluation.file import Evaluation


class Score(NamedTuple):
    """A mean over problems and its 95 % interval, NaN where nobody asked for it."""

    mean: float
    low: float
    high: float


class Scores(NamedTuple):
    """Every score by its name, and how many problems they come from: those with all their
    samples.
    """

    problems: int
    scores: dict[str, Score]

    def __str__(self) -> str:
        return (
            f"accuracy {self.scores['accuracy'].mean:.1%}, format"
            f" {self.scores['format rate'].mean:.1%}"
        )


def scores(rows: Sequence[dict[str, Any]], samples: int, ks: Sequence[int] = ()) -> Scores:
    """accuracy, pass@k and maj@k for `ks`, format rate, truncation rate, mean length (tokens) of an
    evaluation's rows.

    A completion counts as correct as in the reward: well formed, and with the right answer. What is
    not well formed has no vote in maj@k. ValueError where no problem has all its samples, or a k is
    more than `samples`.
    """
    return _summary(_per_problem(rows, samples, ks))


def means(rows: Sequence[dict[str, Any]], samples: int) -> Scores:
    """`scores` without intervals, whose resampling takes seconds where there are thousands of
    problems.
    """
    return _summary(_per_problem(rows, samples, ()), with_intervals=False)


def differences(
    rows: Sequence[dict[str, Any]],
    base: Sequence[dict[str, Any]],
    samples: int,
    ks: Sequence[int] = (),
    *,
    base_samples: int | None = None,
) -> Scores:
    """The scores of `rows` less those of `base`, problem by problem, over the problems that both
    have whole.
    """
    ours, theirs = _per_problem(rows, samples, ks), _per_problem(base, base_samples or samples, ks)
    shared = [problem for problem in ours if problem in theirs]
    return _summary(
        {p: {name: value - theirs[p][name] for name, value in ours[p].items()} for p in shared}
    )


def _per_problem(rows, samples: int, ks: Sequence[int]) -> dict[int, dict[str, float]]:
    if ks and max(ks) > samples:
        raise ValueError(f"k {max(ks)} is more than {samples} samples")
    by_problem = defaultdict(list)
    for row in rows:
        by_problem[row["problem"]].append(row)
    whole = {
        p: sorted(own, key=lambda row: row["sample"])
        for p, own in sorted(by_problem.items())
        if len(own) == samples
    }
    correct = [[row["correct"] for row in own] for own in whole.values()]
    votes = [
        [row["answer"] if row["well_formed"] else None for row in own] for own in whole.values()
    ]
    columns = {"accuracy": [sum(row) / samples for row in correct]}
    columns |= {f"pass@{k}": pass_at_k(correct, k) for k in ks} | {
        f"maj@{k}": maj_at_k(votes, correct, k) for k in ks
    }
    for name, key in (
        ("format rate", "well_formed"),
        ("truncated", "truncated"),
        ("mean length", "tokens"),
    ):
        columns[name] = [sum(row[key] for row in own) / samples for own in whole.values()]
    return {
        p: dict(zip(columns, values, strict=True))
        for p, *values in zip(whole, *columns.values(), strict=True)
    }


def _summary(per_problem: dict[int, dict[str, float]], *, with_intervals: bool = True) -> Scores:
    if not per_problem:
        raise ValueError("no problem has all its samples")
    names = list(next(iter(per_problem.values())))
    # (problems, names)
    values = numpy.array([list(row.values()) for row in per_problem.values()])
    bounds = intervals(values).tolist() if with_intervals else [(math.nan, math.nan)] * len(names)
    columns = zip(names, values.mean(axis=0).tolist(), bounds, strict=True)
    return Scores(
        len(values), {name: Score(mean, low, high) for name, mean, (low, high) in columns}
    )


def samples_and_ks(samples: int | None, ks: Sequence[int] | None) -> tuple[int, list[int]]:
    """How many samples per problem, and which k to report: by default as many as the largest k, and
    2, 4, 8, ... and all.
    """
    samples = samples or max(ks or [1])
    if ks is None:
        ks = (
            {2**i for i in range(1, int(math.log2(samples)) + 1)} | {samples} if samples > 1 else []
        )
    if ks and max(ks) > samples:
        raise RecipeError(
            "--k",
            f"{max(ks)} is more than the {samples} sample{'' if samples == 1 else 's'} of each"
            f" problem; use at most {samples}, or evaluate with more --samples",
        )
    return samples, sorted(set(ks))


def report(evaluations: dict[str, Evaluation], ks: Sequence[int] | None) -> str:
    """What evaluations say, as text: of one its scores; of two also the difference, the first less
    the second.

    Raises RecipeError where no problem is whole, where a k is more than the samples, and for two of
    different problems.
    """
    headers = [evaluation.header for evaluation in evaluations.values()]
    if len({header["prompts"] for header in headers}) > 1:
        raise RecipeError(
            f"{' and '.join(evaluations)}",
            "they are of different problems, so nothing can be compared; evaluate both on the same",
        )
    _, ks = samples_and_ks(min(header["samples"] for header in headers), ks)
    columns, lines = {}, []
    titles = {name: Path(name).stem for name in evaluations}
    titles = (
        titles if len(set(titles.values())) == len(titles) else {name: name for name in evaluations}
    )
    for name, (header, rows, *_) in evaluations.items():
        try:
            own = columns[titles[name]] = scores(rows, header["samples"], ks)
        except ValueError:
            raise RecipeError(
                name, f"no problem has all its {header['samples']} samples; evaluate again to go on"
            ) from None
        total = header["problems"] * header["samples"]
        lines.append(
            f"{name}: {header.get('dataset')}, {header['problems']} problems x {header['samples']},"
            f" temperature {header['temperature']:g}, seed {header['seed']}"
        )
        if len(rows) < total:
            lines.append(
                f"  not complete: {len(rows)} of {total} completions; the numbers are those of the"
                f" {own.problems} whole problems, which have the longest prompts"
            )
    if len(columns) == 2:
        ours, theirs = evaluations.values()
        columns["difference"] = differences(
            ours.rows,
            theirs.rows,
            ours.header["samples"],
            ks,
            base_samples=theirs.header["samples"],
        )
    return "\n".join([*lines, table(columns), "[95 % bootstrap intervals over problems]"])


def table(columns: dict[str, Scores]) -> str:
    """One line per score, one column per entry of `columns`; one called "difference" shows
    signs.
    """
    lines = [["", *columns]]
    signs = ["+" if title == "difference" else "" for title in columns]
    for name in next(iter(columns.values())).scores:
        lines.append(
            [
                name,
                *(
                    _cell(name, own.scores[name], sign)
                    for own, sign in zip(columns.values(), signs, strict=True)
                ),
            ]
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(name: str, score: Score, sign: str) -> str:
    if name == "mean length":
        return f"{score.mean:{sign}.1f} [{score.low:{sign}.1f}, {score.high:{sign}.1f}] tokens"
    return (
        f"{100 * score.mean:{sign}.1f} % [{100 * score.low:{sign}.1f},"
        f" {100 * score.high:{sign}.1f}]"
    )
