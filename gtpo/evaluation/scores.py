"""The scores of an evaluation: rates, pass@k and maj@k with intervals, differences, and a table.

Their estimators are functions of plain values, in estimators.py.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy

from gtpo.errors import RecipeError
from gtpo.evaluation.estimators import intervals, maj_at_k, pass_at_k
from gtpo.evaluation.file import Evaluation, grading_version

DIFFERENCE = "difference"  # title of the column with the differences of two evaluations


class Score(NamedTuple):
    """A mean over problems and its 95 % interval; the bounds are NaN if they were not computed."""

    mean: float
    low: float
    high: float


class Scores(NamedTuple):
    """Every score by its name, and the number of problems behind them: those with all samples."""

    problems: int
    by_name: dict[str, Score]

    def __str__(self) -> str:
        accuracy, format_rate = self.by_name["accuracy"].mean, self.by_name["format rate"].mean
        return f"accuracy {accuracy:.1%}, format {format_rate:.1%}"


def scores_with_intervals(
    rows: Sequence[dict[str, Any]], samples: int, ks: Sequence[int] = ()
) -> Scores:
    """Returns the scores of an evaluation's rows, with `samples` completions per problem.

    They are accuracy, pass@k and maj@k for each k of `ks`, format rate, truncated (a share) and
    mean length (tokens). A completion is correct if it is well formed and has the right answer, as
    in the reward. A completion that is not well formed has no vote in maj@k.

    Raises ValueError if no problem has all its samples, or if a k is larger than `samples`.
    """
    return _means_of_problems(_by_problem(rows, samples, ks))


def mean_scores(rows: Sequence[dict[str, Any]], samples: int) -> Scores:
    """Returns the scores without intervals, pass@k and maj@k.

    The resampling behind intervals takes seconds for thousands of problems.
    """
    return _means_of_problems(_by_problem(rows, samples, ()), with_intervals=False)


def score_differences(
    rows: Sequence[dict[str, Any]],
    base_rows: Sequence[dict[str, Any]],
    samples: int,
    ks: Sequence[int] = (),
    *,
    base_samples: int | None = None,
) -> Scores:
    """Returns the scores of `rows` minus those of `base_rows`, paired by problem.

    They cover the problems that are complete in both. `base_samples` is `samples` by default.
    """
    ours = _by_problem(rows, samples, ks)
    base = _by_problem(base_rows, base_samples or samples, ks)
    return _means_of_problems(
        {
            problem: {name: value - base[problem][name] for name, value in values.items()}
            for problem, values in ours.items()
            if problem in base
        }
    )


def _by_problem(
    rows: Sequence[dict[str, Any]], samples: int, ks: Sequence[int]
) -> dict[int, dict[str, float]]:
    """Each score of each problem that has all its samples."""
    if ks and max(ks) > samples:
        raise ValueError(f"k {max(ks)} is more than {samples} samples")
    rows_of_problem = defaultdict(list)
    for row in rows:
        rows_of_problem[row["problem"]].append(row)
    complete = {
        problem: sorted(own, key=lambda row: row["sample"])
        for problem, own in sorted(rows_of_problem.items())
        if len(own) == samples
    }

    def share(key: str) -> list[float]:
        return [sum(row[key] for row in own) / samples for own in complete.values()]

    correct = [[row["correct"] for row in own] for own in complete.values()]
    votes = [
        [row["answer"] if row["well_formed"] else None for row in own] for own in complete.values()
    ]
    columns = {
        "accuracy": share("correct"),
        **{f"pass@{k}": pass_at_k(correct, k) for k in ks},
        **{f"maj@{k}": maj_at_k(votes, correct, k) for k in ks},
        "format rate": share("well_formed"),
        "truncated": share("truncated"),
        "mean length": share("tokens"),
    }
    return {
        problem: dict(zip(columns, values, strict=True))
        for problem, *values in zip(complete, *columns.values(), strict=True)
    }


def _means_of_problems(
    by_problem: dict[int, dict[str, float]], *, with_intervals: bool = True
) -> Scores:
    if not by_problem:
        raise ValueError("no problem has all its samples")
    names = list(next(iter(by_problem.values())))
    values = numpy.array([list(row.values()) for row in by_problem.values()])  # (problems, names)
    bounds = intervals(values).tolist() if with_intervals else [(math.nan, math.nan)] * len(names)
    columns = zip(names, values.mean(axis=0).tolist(), bounds, strict=True)
    return Scores(
        len(values), {name: Score(mean, low, high) for name, mean, (low, high) in columns}
    )


def samples_and_ks(samples: int | None, ks: Sequence[int] | None) -> tuple[int, list[int]]:
    """Returns the number of samples per problem and the k of pass@k and maj@k, where None is unset.

    By default there are as many samples as the largest k, and k is 2, 4, 8, ... and all samples.
    Raises RecipeError if a k is larger than the number of samples.
    """
    samples = samples or max(ks or [1])
    if ks is None:
        powers = [2**i for i in range(1, int(math.log2(samples)) + 1)]
        ks = [*powers, samples] if samples > 1 else []
    if ks and max(ks) > samples:
        raise RecipeError(
            "--k",
            f"{max(ks)} is more than the {samples} sample{'' if samples == 1 else 's'} of each"
            f" problem; use at most {samples}, or evaluate with more --samples",
        )
    return samples, sorted(set(ks))


def scores_as_text(evaluations: Mapping[str, Evaluation], ks: Sequence[int] | None) -> str:
    """Returns the scores of one evaluation, or of two and their difference, as lines of text.

    The difference is the first evaluation minus the second. Raises RecipeError if no problem is
    complete, if a k is larger than the number of samples, or if two evaluations are of different
    problems.
    """
    headers = [evaluation.header for evaluation in evaluations.values()]
    if len({header["prompts"] for header in headers}) > 1:
        raise RecipeError(
            " and ".join(evaluations),
            "they are of different problems, so they cannot be compared; evaluate both on the same"
            " problems",
        )
    _, ks = samples_and_ks(min(header["samples"] for header in headers), ks)
    columns = {
        title: _scores_of(name, evaluation, ks)
        for title, (name, evaluation) in zip(_titles(evaluations), evaluations.items(), strict=True)
    }
    lines = []
    for (name, evaluation), column in zip(evaluations.items(), columns.values(), strict=True):
        lines += _description(name, evaluation, column.problems)
    versions = [grading_version(header) for header in headers]
    if len(set(versions)) > 1:
        lines.append(
            f"Graded by versions {versions[0]} and {versions[1]} of the rules (docs/grading.md): a"
            " part of the difference may come from that"
        )
    if len(columns) == 2:
        ours, base = evaluations.values()
        columns[DIFFERENCE] = score_differences(
            ours.rows, base.rows, headers[0]["samples"], ks, base_samples=headers[1]["samples"]
        )
    return "\n".join([*lines, table(columns), "[95 % bootstrap intervals over problems]"])


def _titles(names: Mapping[str, Any]) -> list[str]:
    """The files' stems if those differ, else the whole names."""
    stems = [Path(name).stem for name in names]
    return stems if len(set(stems)) == len(stems) else list(names)


def _scores_of(name: str, evaluation: Evaluation, ks: Sequence[int]) -> Scores:
    samples = evaluation.header["samples"]
    try:
        return scores_with_intervals(evaluation.rows, samples, ks)
    except ValueError:
        raise RecipeError(
            name, f"no problem has all its {samples} samples; evaluate again to continue"
        ) from None


def _description(name: str, evaluation: Evaluation, complete_problems: int) -> list[str]:
    header, rows = evaluation.header, evaluation.rows
    lines = [
        f"{name}: {header.get('dataset')}, {header['problems']} problems x {header['samples']},"
        f" temperature {header['temperature']:g}, seed {header['seed']}"
    ]
    total = header["problems"] * header["samples"]
    if len(rows) < total:
        lines.append(
            f"  not complete: {len(rows)} of {total} completions; the scores are those of the"
            f" {complete_problems} complete problems, which have the longest prompts"
        )
    return lines


def table(columns: dict[str, Scores]) -> str:
    """Returns one line per score with one column per entry of `columns`.

    The column DIFFERENCE shows signs.
    """
    lines = [["", *columns]]
    for name in next(iter(columns.values())).by_name:
        cells = [
            _cell(name, column.by_name[name], sign="+" if title == DIFFERENCE else "")
            for title, column in columns.items()
        ]
        lines.append([name, *cells])
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "   ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def _cell(name: str, score: Score, sign: str) -> str:
    if name == "mean length":
        return f"{score.mean:{sign}.1f} [{score.low:{sign}.1f}, {score.high:{sign}.1f}] tokens"
    mean, low, high = (100 * value for value in score)
    return f"{mean:{sign}.1f} % [{low:{sign}.1f}, {high:{sign}.1f}]"
