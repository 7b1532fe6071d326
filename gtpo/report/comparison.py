"""Runs sorted by what differs between their recipes: runs that differ in the seed alone are one
configuration.
"""

import math
import statistics
from dataclasses import dataclass
from typing import Any, NamedTuple

from gtpo.recipe.differences import flatten
from gtpo.report.run_record import RunRecord

SEEDS = {"model.random_seed", "training.seed", "training.data_seed"}
SAYS_NOTHING = (  # of what is trained
    "run_name",
    "output_root",
    "env",
    "wandb",
    "watch",
    "alarm",
    "rewards",
    "evaluation.batch_size",
    "training.report_to",
    "training.logging_steps",
    "training.save_steps",
    "training.save_total_limit",
    "training.max_skipped_steps",
)
SHORTEST = 5  # steps of a window: of fewer, nobody knows how far their mean may be off


@dataclass(frozen=True)
class Configuration:
    label: str
    runs: list[RunRecord]

    def series(self, name: str) -> dict[int, list[float]]:
        """A metric by step: one value per run that has one there."""
        values: dict[int, list[float]] = {}
        for run in self.runs:
            for step, value in run.series(name).items():
                values.setdefault(step, []).append(value)
        return dict(sorted(values.items()))


def configurations(runs: list[RunRecord]) -> list[Configuration]:
    """The runs by recipe, in the order given; labels name the keys that differ, or the run where
    none does.
    """
    flat = [flatten(run.recipe) for run in runs]
    keys = sorted({key for recipe in flat for key in recipe if _tells(key)})
    differing = [key for key in keys if len({repr(recipe.get(key)) for recipe in flat}) > 1]
    groups: dict[tuple, list[RunRecord]] = {}
    for run, recipe in zip(runs, flat, strict=True):
        groups.setdefault(tuple(repr(recipe.get(key)) for key in differing), []).append(run)
    found = []
    for members in groups.values():
        recipe = flatten(members[0].recipe)
        parts = [
            _part(key, recipe.get(key), [other.get(key) for other in flat]) for key in differing
        ]
        label = ", ".join(parts) or members[0].name
        seeds = {repr([flatten(run.recipe).get(key) for key in sorted(SEEDS)]) for run in members}
        noun = "seeds" if len(seeds) == len(members) else "runs"
        found.append(
            Configuration(
                label + (f" ({len(members)} {noun})" if len(members) > 1 else ""), members
            )
        )
    return found


def differences(runs: list[RunRecord]) -> dict[str, list[Any]]:
    """Every recipe key whose values differ, seeds and names included, with each run's value."""
    flat = [flatten(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in flat for key in recipe)
    return {
        key: [recipe.get(key) for recipe in flat]
        for key in keys
        if len({repr(recipe.get(key)) for recipe in flat}) > 1
    }


class Window(NamedTuple):
    """A stretch of a series: its values, and its steps as a person says them."""

    values: list[float]
    steps: str

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return spread(self.values) / math.sqrt(len(self.values))


def windows(series: dict[int, list[float]]) -> tuple[Window, Window]:
    """The first and the last tenth of the steps that have values, but 5 to 50 of them, and no more
    than half.
    """
    steps = list(series)
    width = _width(steps)
    return _window(series, steps[:width]), _window(series, steps[-width:])


def best_window(series: dict[int, list[float]]) -> Window:
    """The stretch of that length with the highest mean, among those that follow one another."""
    steps = list(series)
    width = _width(steps)
    starts = range(0, len(steps) - width + 1, width)
    return max(
        (_window(series, steps[start : start + width]) for start in starts),
        key=lambda window: window.mean,
    )


def _width(steps: list[int]) -> int:
    return max(1, min(50, max(SHORTEST, len(steps) // 10), len(steps) // 2))


def _window(series: dict[int, list[float]], steps: list[int]) -> Window:
    return Window(
        [value for step in steps for value in series[step]],
        f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}",
    )


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _tells(key: str) -> bool:
    return key not in SEEDS and not any(
        key == name or key.startswith(f"{name}.") for name in SAYS_NOTHING
    )


def _part(key: str, value: Any, others: list[Any]) -> str:
    """`learning_rate 0.003`; of a dotted path its last name, where that tells the runs apart."""
    short = {str(other).rpartition(".")[2] for other in others}
    if key.endswith("class_path") and len(short) == len({str(other) for other in others}):
        return str(value).rpartition(".")[2]
    return f"{key.rpartition('.')[2]} {'default' if value is None else value}"
