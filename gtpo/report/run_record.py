"""What a run directory tells about its run: recipe, versions, logged metrics, alarms, completions,
evaluations.

Loads no model. A run that crashed or is still going tells what it can: the newest checkpoint has
the metrics up to it, the completions file the rest.
"""

import json
import math
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from gtpo.errors import RecipeError
from gtpo.evaluation.file import read_evaluation
from gtpo.evaluation.scores import Scores, scores_with_intervals
from gtpo.models.adapters import checkpoint_folders
from gtpo.recipe import Recipe
from gtpo.recipe.yaml_text import YamlError, parse_yaml
from gtpo.report.completion_log import CompletionLog

ALARM = "alarm/"
ALARM_LINE = re.compile(r"Alarm at step (\d+): (.+)")  # as gtpo.hooks.alarm says it in train.log
STATE = "trainer_state.json"


class Evaluated(NamedTuple):
    """An evaluation file and the scores of its rows."""

    header: dict[str, Any]
    rows: list[dict[str, Any]]
    scores: Scores


@dataclass
class RunRecord:
    path: Path
    recipe: dict[str, Any]  # plain values, with the schema's defaults
    recipe_text: str
    versions: dict[str, str]
    state: dict[str, Any]  # what trainer_state.json holds; empty where there is none
    state_file: Path | None
    logged: dict[int, dict[str, float]]  # step -> metrics
    alarms: list[tuple[int, str, str]]  # step, condition, evidence; "" for what is not known
    evaluations: dict[str, Evaluated] = field(default_factory=dict)  # by the file's stem
    notes: list[str] = field(default_factory=list)  # what could not be read

    @property
    def name(self) -> str:
        return str(self.recipe.get("run_name") or self.path.resolve().name)

    @property
    def finished(self) -> bool:
        return self.state_file == self.path / STATE

    @property
    def last_step(self) -> int:
        return max([0, *self.logged, *self.completions.totals])

    @property
    def max_steps(self) -> int | None:
        steps = self.state.get("max_steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    @cached_property
    def completions(self) -> CompletionLog:
        return CompletionLog(self.path / "completions.jsonl")

    @cached_property
    def _recorded(self) -> dict[int, dict[str, float]]:
        return self.completions.averages()

    def series(self, name: str) -> dict[int, float]:
        """A metric by step: as it was logged, and from the completions what was not (or not
        yet).
        """
        logged = {step: metrics[name] for step, metrics in self.logged.items() if name in metrics}
        last = max(logged, default=0)
        return logged | {
            step: values[name]
            for step, values in self._recorded.items()
            if step > last and name in values
        }

    def value(self, key: str, default: Any = None) -> Any:
        """A recipe's value by its dotted key."""
        values: Any = self.recipe
        for part in key.split("."):
            values = values.get(part) if isinstance(values, dict) else None
        return default if values is None else values

    def number(self, key: str, default: float) -> float:
        value = self.value(key)
        return float(value) if isinstance(value, int | float) else default

    @property
    def has_token_weights(self) -> bool:
        """Whether its trainer weighs tokens; where the completions do not say, whether it logs
        conflicts.
        """
        if self.completions.totals and any(group.tokens for group in self.completions.groups):
            return self.completions.weighted > 0
        return any("gtpo/frac_conflict_tokens" in metrics for metrics in self.logged.values())


def read_run(path: Path) -> RunRecord:
    """The record of a run directory; raises RecipeError if it is none, or has nothing to tell."""
    if not path.is_dir():
        raise RecipeError(
            path, "there is no such run directory; give the one that train_model.py printed last"
        )
    if not (path / "recipe.yaml").is_file():
        inside = next(
            (parent for parent in path.resolve().parents[:2] if (parent / "recipe.yaml").is_file()),
            None,
        )
        raise RecipeError(
            path,
            "is no run directory (it has no recipe.yaml); give "
            f"{inside if inside else 'the one that train_model.py printed last'}",
        )
    text = (path / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    state_file, state = _newest_state(path)
    logged, conditions = _history(state.get("log_history", []))
    evaluations, notes = _evaluations(path / "evaluation")
    record = RunRecord(
        path=path,
        recipe=_recipe(path, text),
        recipe_text=text,
        versions=_versions(path),
        state=state,
        state_file=state_file,
        logged=logged,
        alarms=_alarms(path / "train.log", conditions),
        evaluations=evaluations,
        notes=notes,
    )
    if not (record.last_step or record.evaluations):
        raise RecipeError(
            path,
            f"there is nothing to report yet: no metrics in {STATE} or a checkpoint, no"
            " completions.jsonl and no evaluation; wait for the first steps",
        )
    return record


def _recipe(path: Path, text: str) -> dict[str, Any]:
    try:
        values = parse_yaml(text)
    except YamlError:
        values = None
    if not isinstance(values, dict):
        raise RecipeError(
            f"{path / 'recipe.yaml'}",
            "is no recipe (not a YAML mapping); restore it, or give another run",
        )
    try:
        return Recipe.model_validate(values).saved()[0]
    # saved by another version of ours: what it says is worth showing all the same
    except ValidationError:
        return values


def _versions(path: Path) -> dict[str, str]:
    values = _read_json(path / "versions.json")
    return {str(name): str(value) for name, value in values.items()}


def _newest_state(path: Path) -> tuple[Path | None, dict]:
    """The final state, else the newest checkpoint's that can be read."""
    for folder in (path, *reversed(checkpoint_folders(path))):
        file = folder / STATE
        if isinstance((state := _read_json(file)).get("log_history"), list):
            return file, state
    return None, {}


def _history(entries: list) -> tuple[dict[int, dict[str, float]], list[tuple[int, str]]]:
    """Metrics by step, and the alarms among them: step and condition."""
    logged: dict[int, dict[str, float]] = {}
    conditions = []
    for entry in entries:
        if not (isinstance(entry, dict) and isinstance(step := entry.get("step"), int)):
            continue
        for name, value in entry.items():
            if name.startswith(ALARM):
                conditions.append((step, name.removeprefix(ALARM)))
            elif (
                name != "step"
                and isinstance(value, int | float)
                and not isinstance(value, bool)
                and math.isfinite(value)
            ):
                logged.setdefault(step, {})[name] = float(value)
    return dict(sorted(logged.items())), conditions


def _alarms(log: Path, conditions: list[tuple[int, str]]) -> list[tuple[int, str, str]]:
    """The alarms of the history with their evidence from the log, and those of the log since."""
    evidence: dict[int, list[str]] = {}
    if log.is_file():
        with log.open(encoding="utf-8", errors="replace") as lines:
            for match in filter(None, map(ALARM_LINE.search, lines)):
                evidence.setdefault(int(match[1]), []).append(match[2].strip())
    alarms = [
        (step, condition, evidence[step].pop(0) if evidence.get(step) else "")
        for step, condition in conditions
    ]
    return sorted(alarms + [(step, "", text) for step, texts in evidence.items() for text in texts])


def _evaluations(folder: Path) -> tuple[dict[str, Evaluated], list[str]]:
    """Each evaluation file's scores by its stem, before and after training first, and why others
    have none.
    """
    found, notes = {}, []
    for file in sorted(folder.glob("*.jsonl"), key=_before_then_by_step_then_after):
        try:
            header, rows, cut, _ = read_evaluation(file)
            if cut:
                notes.append(f"{file}: its last line was cut, and is left out")
            ks = [k for k in (2, 4, 8, 16, 32, 64, 128) if k <= header["samples"]]
            found[file.stem] = Evaluated(
                header, rows, scores_with_intervals(rows, header["samples"], ks)
            )
        except RecipeError as error:
            notes.append(str(error))
        except ValueError as error:
            notes.append(f"{file}: {error} yet")
    return found, notes


def _before_then_by_step_then_after(file: Path) -> tuple[int, int, str]:
    step = re.fullmatch(r"step-(\d+)", file.stem)
    return (
        {"before": 0, "after": 2}.get(file.stem, 1 if step else 3),
        int(step[1]) if step else 0,
        file.stem,
    )


def _read_json(file: Path) -> dict:
    """What a JSON file holds if that is an object; {} for any other, a missing and a damaged
    one.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
