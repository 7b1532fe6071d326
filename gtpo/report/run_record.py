"""The record of a run, read from its directory: recipe, metrics, alarms, completions, evaluations.

No model is loaded. A run that crashed or is still training has a record too: metrics come from its
newest checkpoint, and from the completions file after that.
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

ALARM_METRIC = "alarm/"  # prefix of an alarm's metric, followed by its condition
ALARM_LINE = re.compile(r"Alarm at step (\d+): (.+)")  # gtpo.hooks.alarm writes it to train.log
STATE_FILE = "trainer_state.json"
KS = (2, 4, 8, 16, 32, 64, 128)  # of pass@k and maj@k


class AlarmEvent(NamedTuple):
    """An alarm of the run; condition and evidence are "" if they are not known."""

    step: int
    condition: str
    evidence: str


class ScoredEvaluation(NamedTuple):
    """The content of an evaluation file, and the scores of its rows."""

    header: dict[str, Any]
    rows: list[dict[str, Any]]
    scores: Scores


@dataclass
class RunRecord:
    """What is known about a run from the files in its directory `path`."""

    path: Path
    recipe: dict[str, Any]  # plain values, with the schema's defaults
    recipe_text: str
    versions: dict[str, str]
    state: dict[str, Any]  # content of trainer_state.json; empty without one
    state_file: Path | None
    logged: dict[int, dict[str, float]]  # step -> metric -> value
    alarms: list[AlarmEvent]
    evaluations: dict[str, ScoredEvaluation] = field(default_factory=dict)  # by the file's stem
    notes: list[str] = field(default_factory=list)  # what could not be read, as sentences

    @property
    def name(self) -> str:
        """The run's name in its recipe, else that of its directory."""
        return str(self.recipe.get("run_name") or self.path.resolve().name)

    @property
    def finished(self) -> bool:
        """Whether the run has written its final state."""
        return self.state_file == self.path / STATE_FILE

    @property
    def last_step(self) -> int:
        """The last step with a logged metric or a recorded completion; 0 if there is none."""
        return max([0, *self.logged, *self.completions.totals])

    @property
    def max_steps(self) -> int | None:
        """The steps that the run was to take; None if that is not known."""
        steps = self.state.get("max_steps")
        return steps if isinstance(steps, int) and steps > 0 else None

    @cached_property
    def completions(self) -> CompletionLog:
        """The recorded completions, read at the first use."""
        return CompletionLog(self.path / "completions.jsonl")

    @cached_property
    def _metrics_of_completions(self) -> dict[int, dict[str, float]]:
        return self.completions.averages()

    def series(self, name: str) -> dict[int, float]:
        """Returns a metric by step. Steps after the last logged one come from the completions."""
        logged = {step: metrics[name] for step, metrics in self.logged.items() if name in metrics}
        last = max(logged, default=0)
        return logged | {
            step: values[name]
            for step, values in self._metrics_of_completions.items()
            if step > last and name in values
        }

    def value(self, key: str, default: Any = None) -> Any:
        """Returns a recipe's value by its dotted key."""
        values: Any = self.recipe
        for part in key.split("."):
            values = values.get(part) if isinstance(values, dict) else None
        return default if values is None else values

    def number(self, key: str, default: float) -> float:
        """Returns a recipe's number by its dotted key; `default` for any other value."""
        value = self.value(key)
        return float(value) if isinstance(value, int | float) else default

    @property
    def has_token_weights(self) -> bool:
        """Whether the trainer weighs tokens.

        The completions show it. Without their tokens, a trainer that logs conflict tokens counts as
        one that weighs them.
        """
        if any(group.tokens for group in self.completions.groups):
            return self.completions.with_weights > 0
        return any("gtpo/frac_conflict_tokens" in metrics for metrics in self.logged.values())


def read_run(path: Path) -> RunRecord:
    """Returns the record of a run directory.

    Raises RecipeError if `path` is not a run directory, or has nothing to report yet.
    """
    _check_run_directory(path)
    text = (path / "recipe.yaml").read_text(encoding="utf-8", errors="replace")
    state_file, state = newest_state(path)
    logged, alarm_conditions = _history(state.get("log_history", []))
    evaluations, notes = _scored_evaluations(path)
    record = RunRecord(
        path=path,
        recipe=_recipe_values(path / "recipe.yaml", text),
        recipe_text=text,
        versions=read_versions(path),
        state=state,
        state_file=state_file,
        logged=logged,
        alarms=_alarms(path / "train.log", alarm_conditions),
        evaluations=evaluations,
        notes=notes,
    )
    if not (record.last_step or record.evaluations):
        raise RecipeError(
            path,
            f"there is nothing to report yet: no metrics in {STATE_FILE} or a checkpoint, no"
            " completions.jsonl and no evaluation; wait for the first steps",
        )
    return record


def read_versions(path: Path) -> dict[str, str]:
    """Returns the versions of libraries, by name, that the run in `path` was trained with."""
    values = _read_json(path / "versions.json")
    return {str(name): str(value) for name, value in values.items()}


def newest_state(path: Path) -> tuple[Path | None, dict[str, Any]]:
    """Returns the trainer's final state, else that of the newest checkpoint with a readable one.

    The file comes with it. Without any it is (None, {}).
    """
    for folder in (path, *reversed(checkpoint_folders(path))):
        if state := read_state(folder):
            return folder / STATE_FILE, state
    return None, {}


def read_state(folder: Path) -> dict[str, Any]:
    """Returns the trainer's state that is saved in `folder`; {} if there is none to read."""
    state = _read_json(folder / STATE_FILE)
    return state if isinstance(state.get("log_history"), list) else {}


def evaluation_files(path: Path) -> list[Path]:
    """Returns the evaluation files of the run in `path`: before training, during it, after it, and
    then the others.
    """
    return sorted((path / "evaluation").glob("*.jsonl"), key=_time_of_evaluation)


def _time_of_evaluation(file: Path) -> tuple[int, int, str]:
    """A key to sort by; evaluations during training are sorted by step, others by name."""
    step = re.fullmatch(r"step-(\d+)", file.stem)
    period = {"before": 0, "after": 2}.get(file.stem, 1 if step else 3)
    return period, int(step[1]) if step else 0, file.stem


def _scored_evaluations(path: Path) -> tuple[dict[str, ScoredEvaluation], list[str]]:
    """The evaluations by their files' stems, and notes on what is left out."""
    scored, notes = {}, []
    for file in evaluation_files(path):
        try:
            header, rows, cut, _ = read_evaluation(file)
            if cut:
                notes.append(f"{file}: the last line is incomplete and is left out")
            samples = header["samples"]
            scores = scores_with_intervals(rows, samples, [k for k in KS if k <= samples])
            scored[file.stem] = ScoredEvaluation(header, rows, scores)
        except RecipeError as error:
            notes.append(str(error))
        except ValueError as error:
            notes.append(f"{file}: {error} yet")
    return scored, notes


def _check_run_directory(path: Path) -> None:
    """Raises RecipeError if `path` is not a run directory."""
    if not path.is_dir():
        raise RecipeError(
            path, "there is no such run directory; give the one that train_model.py printed last"
        )
    if (path / "recipe.yaml").is_file():
        return
    parents = path.resolve().parents[:2]
    run_dir = next((parent for parent in parents if (parent / "recipe.yaml").is_file()), None)
    raise RecipeError(
        path,
        "is not a run directory (it has no recipe.yaml); give "
        f"{run_dir if run_dir else 'the one that train_model.py printed last'}",
    )


def _recipe_values(file: Path, text: str) -> dict[str, Any]:
    try:
        values = parse_yaml(text)
    except YamlError:
        values = None
    if not isinstance(values, dict):
        raise RecipeError(
            str(file), "is not a recipe (not a YAML mapping); restore it, or give another run"
        )
    try:
        return Recipe.model_validate(values).saved()[0]
    except ValidationError:  # another version saved it; the report shows it as it is
        return values


def _history(entries: list) -> tuple[dict[int, dict[str, float]], list[tuple[int, str]]]:
    """The logged metrics by step, and the step and condition of each alarm."""
    logged: dict[int, dict[str, float]] = {}
    conditions = []
    for entry in entries:
        if not (isinstance(entry, dict) and isinstance(step := entry.get("step"), int)):
            continue
        for name, value in entry.items():
            if name.startswith(ALARM_METRIC):
                conditions.append((step, name.removeprefix(ALARM_METRIC)))
            elif name != "step" and _is_finite_number(value):
                logged.setdefault(step, {})[name] = float(value)
    return dict(sorted(logged.items())), conditions


def _is_finite_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _alarms(log: Path, conditions: list[tuple[int, str]]) -> list[AlarmEvent]:
    """The alarms of the history with their evidence from the log, then those of the log alone."""
    evidence: dict[int, list[str]] = {}  # by step
    if log.is_file():
        with log.open(encoding="utf-8", errors="replace") as lines:
            for match in filter(None, map(ALARM_LINE.search, lines)):
                evidence.setdefault(int(match[1]), []).append(match[2].strip())
    alarms = [
        AlarmEvent(step, condition, evidence[step].pop(0) if evidence.get(step) else "")
        for step, condition in conditions
    ]
    of_the_log = [AlarmEvent(step, "", text) for step, texts in evidence.items() for text in texts]
    return sorted(alarms + of_the_log)


def _read_json(file: Path) -> dict:
    """The JSON object in a file; {} if the file is missing, damaged or has another value."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}
