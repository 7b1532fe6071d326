"""Runs grouped by what differs between their recipes, and windows of their metrics."""

import math
import statistics
from dataclasses import dataclass
from typing import Any, NamedTuple

from gtpo.recipe.differences import flatten, is_harmless
from gtpo.report.run_record import RunRecord

SEEDS = ("model.random_seed", "training.data_seed", "training.seed")
MIN_WINDOW, MAX_WINDOW = 5, 50  # steps; the mean of fewer than 5 is too uncertain


@dataclass(frozen=True)
class Configuration:
    """Runs that train the same, seeds aside."""

    label: str
    runs: list[RunRecord]

    def series(self, name: str) -> dict[int, list[float]]:
        """Returns a metric by step: one value for each run that has one."""
        values: dict[int, list[float]] = {}
        for run in self.runs:
            for step, value in run.series(name).items():
                values.setdefault(step, []).append(value)
        return dict(sorted(values.items()))


def configurations(runs: list[RunRecord]) -> list[Configuration]:
    """Returns the runs grouped by recipe, in the order given.

    Runs are one configuration if their recipes differ only in seeds and in keys without influence
    on the policy. A label names the keys that differ, or the first run if none does.
    """
    differing = {
        key: values
        for key, values in sorted(differing_keys(runs).items())
        if _makes_a_configuration(key)
    }
    places: dict[tuple[str, ...], list[int]] = {}  # values of those keys -> places in `runs`
    for place in range(len(runs)):
        identity = tuple(repr(values[place]) for values in differing.values())
        places.setdefault(identity, []).append(place)
    grouped = []
    for first, *others in places.values():
        members = [runs[place] for place in (first, *others)]
        parts = [_label_part(key, values[first], values) for key, values in differing.items()]
        label = ", ".join(parts) or members[0].name
        grouped.append(Configuration(label + _how_many(members), members))
    return grouped


def differing_keys(runs: list[RunRecord]) -> dict[str, list[Any]]:
    """Returns each recipe key whose values differ, with one value per run; None if it is not set.

    Seeds and names are included.
    """
    recipes = [flatten(run.recipe) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe)
    columns = {key: [recipe.get(key) for recipe in recipes] for key in keys}
    return {key: values for key, values in columns.items() if len(set(map(repr, values))) > 1}


def _makes_a_configuration(key: str) -> bool:
    # How rewards are called has no influence on what they return, failures aside.
    return not (key in SEEDS or is_harmless(key) or key.startswith("rewards."))


def _label_part(key: str, value: Any, values: list[Any]) -> str:
    """`learning_rate 0.003`. Of a dotted path only its last name, if the last names all differ."""
    paths = set(map(str, values))
    if key.endswith("class_path") and len({_last_name(path) for path in paths}) == len(paths):
        return _last_name(str(value))
    return f"{_last_name(key)} {'default' if value is None else value}"


def _last_name(dotted: str) -> str:
    return dotted.rpartition(".")[2]


def _how_many(members: list[RunRecord]) -> str:
    """` (3 seeds)`, or ` (3 runs)` if some have the same seeds; nothing for one run."""
    if len(members) == 1:
        return ""
    recipes = [flatten(run.recipe) for run in members]
    seeds = {repr([recipe.get(key) for key in SEEDS]) for recipe in recipes}
    return f" ({len(members)} {'seeds' if len(seeds) == len(members) else 'runs'})"


class StepWindow(NamedTuple):
    """Consecutive steps of a series: all values, and the steps as text."""

    values: list[float]
    steps: str

    @property
    def mean(self) -> float:
        """The mean of all values."""
        return statistics.fmean(self.values)

    @property
    def error(self) -> float:
        """The standard error of the mean."""
        return standard_deviation(self.values) / math.sqrt(len(self.values))


def windows(series: dict[int, list[float]]) -> tuple[StepWindow, StepWindow]:
    """Returns the first and the last tenth of the steps that have values.

    A window has 5 to 50 steps, but at most half of them.
    """
    steps = list(series)
    width = _width(steps)
    return _window(series, steps[:width]), _window(series, steps[-width:])


def best_window(series: dict[int, list[float]]) -> StepWindow:
    """Returns the window with the highest mean, of those that follow one another from the start."""
    steps = list(series)
    width = _width(steps)
    starts = range(0, len(steps) - width + 1, width)
    candidates = [_window(series, steps[start : start + width]) for start in starts]
    return max(candidates, key=lambda window: window.mean)


def _width(steps: list[int]) -> int:
    tenth = max(MIN_WINDOW, len(steps) // 10)
    return max(1, min(MAX_WINDOW, tenth, len(steps) // 2))


def _window(series: dict[int, list[float]], steps: list[int]) -> StepWindow:
    text = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
    return StepWindow([value for step in steps for value in series[step]], text)


def standard_deviation(values: list[float]) -> float:
    """Returns the sample standard deviation; 0 for a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
