"""What differs between two recipes.

A run may resume only from a checkpoint of its own recipe. This file tells which keys have other
values than when the checkpoint was saved, and which of those have no influence on the policy.
"""

import fnmatch
from typing import Any, NamedTuple

from pydantic import ValidationError

from gtpo.recipe.recipe import Recipe

# Keys that have no influence on the policy.
HARMLESS = (
    "run_name",
    "output_root",
    "env.*",
    "watch.*",
    "alarm.*",
    "wandb.*",
    "evaluation.every",
    "evaluation.batch_size",
    "model.gpu_memory_utilization",
    "training.logging_*",
    "training.log_*",
    "training.save_s*",
    "training.save_total_limit",
    "training.report_to",
    "training.disable_tqdm",
    "training.num_completions_to_print",
    "training.push_to_hub",
    "training.hub_*",
    "rewards.workers",
    "rewards.memory",
    "rewards.max_failures",
    "training.max_skipped_steps",
)
# Keys that are harmless where their values grow: the run becomes longer.
MAY_GROW = ("training.max_steps", "training.num_train_epochs")


class Difference(NamedTuple):
    """A key whose values differ; None stands for a key that is not set."""

    key: str
    earlier: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.key}: {_shown(self.earlier)} -> {_shown(self.now)}"

    @property
    def is_harmless(self) -> bool:
        """Whether the difference has no influence on the policy at the steps already done."""
        if self.key in MAY_GROW:
            return self.earlier is not None and self.now is not None and 0 < self.earlier < self.now
        return is_harmless(self.key)


def is_harmless(key: str) -> bool:
    """Whether a key has no influence on the policy, whatever its value."""
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in HARMLESS)


def recipe_differences(
    saved: dict[str, Any], recipe: Recipe, processes: tuple[int, int] = (1, 1)
) -> tuple[list[Difference], list[Difference]]:
    """The differences between a `saved` recipe and `recipe`: those that matter, and harmless ones.

    `processes` are the numbers of processes of both runs. A key that did not exist when the recipe
    was saved counts as having its default.
    """
    try:
        saved = Recipe.model_validate(saved).saved()[0]  # fills in defaults
    except ValidationError:
        pass
    earlier = {**flatten(saved), "processes": processes[0]}
    now = {**flatten(recipe.saved()[0]), "processes": processes[1]}
    differences = [
        Difference(key, earlier.get(key), now.get(key))
        for key in {**now, **earlier}
        if earlier.get(key) != now.get(key)
    ]
    harmless = [difference for difference in differences if difference.is_harmless]
    return [difference for difference in differences if not difference.is_harmless], harmless


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted key: `{"a": {"b": 1}}` becomes `{"a.b": 1}`."""
    flat = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _shown(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
