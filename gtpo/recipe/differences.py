"""What differs between the recipe a checkpoint was trained with and the one that is to go on with
it.
"""

import fnmatch
from typing import Any

from pydantic import ValidationError

from gtpo.recipe.recipe import Recipe

HARMLESS = (  # none of these reaches the policy
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
MORE = ("training.max_steps", "training.num_train_epochs")  # harmless where they grow


def changes(
    earlier: dict[str, Any], recipe: Recipe, processes: tuple[int, int] = (1, 1)
) -> tuple[list[str], list[str]]:
    """`key: then -> now` for each key that differs from the `earlier` saved values: those that
    matter, and the harmless ones.
    """
    try:
        # with the defaults of keys that did not exist then
        earlier = Recipe.model_validate(earlier).saved()[0]
    except ValidationError:
        pass
    then, now = (dict(_flat(values)) for values in (earlier, recipe.saved()[0]))
    then["processes"], now["processes"] = processes
    matter, harmless = [], []
    for key in [*now, *(key for key in then if key not in now)]:
        if then.get(key) != now.get(key):
            told = f"{key}: {_shown(then.get(key))} -> {_shown(now.get(key))}"
            (harmless if _is_harmless(key, then.get(key), now.get(key)) else matter).append(told)
    return matter, harmless


def _is_harmless(key: str, then: Any, now: Any) -> bool:
    if key in MORE:
        return then is not None and now is not None and 0 < then < now
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in HARMLESS)


def _flat(values: dict[str, Any], prefix: str = ""):
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
