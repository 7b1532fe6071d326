"""`model.adapter`: a new run that goes on training an earlier adapter's weights."""

import logging
import os
from pathlib import Path

from gtpo.errors import RecipeError
from gtpo.models import adapters
from gtpo.models.saved import check_vocabulary, find_saved
from gtpo.recipe import Recipe
from gtpo.recipe.sections import ModelSection

logger = logging.getLogger(__name__)


def continued(recipe: Recipe) -> Recipe:
    """`recipe` with `model.adapter` as a folder, and that adapter's rank, alpha and layers;
    unchanged where it names none.

    Raises RecipeError where there is no adapter, where the recipe asks for other LoRA settings, and
    where training would overwrite what it starts from.
    """
    section = recipe.model
    if section.adapter is None:
        return recipe
    if not Path(section.adapter).expanduser().is_dir():
        raise RecipeError(
            "model.adapter",
            f"there is no folder {section.adapter!r}; give a run, a checkpoint or an adapter",
        )
    try:
        saved = find_saved(section.adapter, base=section.model_name)
    except RecipeError as error:
        raise error.with_key("model.adapter") from None
    if saved.adapter is None:
        raise RecipeError(
            "model.adapter",
            f"{section.adapter} is a base model; set model.model_name to it, or give an adapter",
        )
    run_dir = Path(recipe.output_dir()).resolve()
    if saved.adapter.resolve().is_relative_to(run_dir):
        raise RecipeError(
            "model.adapter",
            f"{section.adapter} is in the run directory that this run would write, {run_dir.name}; "
            "choose another with --run-name",
        )
    config = adapters.read_config(saved.adapter)
    earlier = (
        saved.recipe.model.model_name if saved.recipe else config.get("base_model_name_or_path")
    )
    if earlier and not _same_model(earlier, section.model_name):
        logger.warning(
            "[GTPO] model.adapter was trained on %s, and goes on with %s",
            earlier,
            section.model_name,
        )
    settings = {**_lora_settings(section, config), "adapter": str(saved.adapter)}
    return recipe.model_copy(update={"model": section.model_copy(update=settings)})


def training_tokenizer(section: ModelSection, backend: str):
    """The tokenizer that `model.adapter` was trained with, where one is saved and no chat template
    is given; else the base model's.

    Raises RecipeError where the adapter's numbers ordinary tokens differently from the base
    model's.
    """
    from gtpo.models.tokenizer import load_tokenizer

    if section.adapter is None or not os.path.isfile(
        os.path.join(section.adapter, "tokenizer_config.json")
    ):
        return load_tokenizer(section, backend)
    own = load_tokenizer(section.model_copy(update={"model_name": section.adapter}), backend)
    try:
        check_vocabulary(find_saved(section.adapter, base=section.model_name), section, own)
    except RecipeError as error:
        raise error.with_key("model.adapter") from None
    return own if section.chat_template is None else load_tokenizer(section, backend)


def _lora_settings(section: ModelSection, config: dict) -> dict:
    """The adapter's rank, alpha and layers by the recipe's names; raises RecipeError where the
    recipe gives others.
    """
    targets = config["target_modules"]
    targets = [targets] if isinstance(targets, str) else sorted(targets)
    # so that recipes differ in nothing else
    in_order = section.target_modules if sorted(section.target_modules) == targets else targets
    settings = {
        "lora_rank": config["r"],
        "lora_alpha": config["lora_alpha"],
        "target_modules": in_order,
    }
    for name in settings.keys() & section.model_fields_set:
        given, theirs = getattr(section, name), settings[name]
        if given != theirs:
            raise RecipeError(
                f"model.{name}",
                f"{given} is not what the adapter {section.adapter} has; leave it out, or set "
                f"{theirs}",
            )
        settings[name] = given
    return settings


def _same_model(one: str, other: str) -> bool:
    """Whether two names mean one base model: a folder by two paths, or a hub name and Unsloth's
    4-bit copy of it.
    """
    if os.path.isdir(one) and os.path.isdir(other):
        return os.path.samefile(one, other)
    one, other = (name.rstrip("/").rpartition("/")[2].lower() for name in (one, other))
    return one.removesuffix("-bnb-4bit").removesuffix("-unsloth") == other.removesuffix(
        "-bnb-4bit"
    ).removesuffix("-unsloth")
