"""What somebody names to use a trained model: a run, a checkpoint, an adapter or a base model;
found and loaded.
"""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gtpo.errors import RecipeError
from gtpo.models import adapters, base_model
from gtpo.recipe import Recipe
from gtpo.recipe.sections import ModelSection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A model on disk or on the hub: its base model and, unless it is one itself, the adapter
    trained on it.
    """

    kind: Literal["run", "checkpoint", "adapter", "base"]
    base: str
    adapter: Path | None = None
    recipe: Recipe | None = None
    run_dir: Path | None = None

    @property
    def section(self) -> ModelSection:
        """How to load it: as its run did; without a recipe, unquantised."""
        if self.recipe is None:
            return ModelSection(model_name=self.base, load_in_4bit=False)
        # here may be no GPU
        backend = "auto" if self.recipe.model.backend == "unsloth" else self.recipe.model.backend
        return self.recipe.model.model_copy(update={"model_name": self.base, "backend": backend})

    def section_with(self, **keys) -> ModelSection:
        return ModelSection.model_validate({**self.section.model_dump(), **keys})


def find_saved(target: str, *, base: str | None = None) -> Saved:
    """What `target` names, looked up without loading anything; `base` replaces the base model that
    its files name.

    Raises RecipeError for a folder that is not there or holds no model, and for an adapter whose
    base model is not there.
    """
    folder = Path(target).expanduser()
    if (folder / "recipe.yaml").is_file():
        saved = _run(folder)
    elif (folder / adapters.CONFIG).is_file():
        saved = _adapter(folder)
    elif folder.is_dir() and not (folder / "config.json").is_file():
        raise RecipeError(
            target,
            f"the folder holds no recipe.yaml, {adapters.CONFIG} or config.json; give a run"
            " directory, a checkpoint, an adapter or a base model",
        )
    elif folder.is_file():
        raise RecipeError(
            target,
            "it is a file; give the folder of a run, a checkpoint, an adapter or a base model",
        )
    else:
        base_model.check_model(target, key=target)
        return Saved("base", str(folder) if folder.is_dir() else target)
    saved = replace(saved, base=base or saved.base)
    if not saved.base:
        raise RecipeError(
            target, f"its {adapters.CONFIG} names no base model; set base_model_name_or_path there"
        )
    try:
        base_model.check_model(saved.base, key="base model")
    except RecipeError as error:
        raise RecipeError(
            target, f"{error}; a relative folder counts from the directory where it was trained"
        ) from None
    return saved


def load_saved(
    saved: Saved,
    *,
    adapter: bool = True,
    trainable: bool = False,
    precision: str | None = None,
    ready: tuple[str, Any] | None = None,
    **keys,
):
    """The backends.Policy of `saved`, ready to generate or, if `trainable`, to train on;
    `adapter=False`: its base model alone.

    `keys` replace those of `saved.section` (backend, load_in_4bit, max_seq_length, chat_template,
    ...). `precision` (bf16, fp16, float32) is the training's by default. `ready` is a backend and a
    `saved_tokenizer`, where they are there already. Raises RecipeError for what cannot be loaded,
    and for a base model that does not fit the adapter.
    """
    from gtpo.models import backends
    from gtpo.recipe.sections import TrainingSection

    section = saved.section_with(**keys)
    backend, tokenizer = ready or (backends.choose_backend(section), None)
    tokenizer = tokenizer or saved_tokenizer(saved, section, backend, keys.get("chat_template"))
    if saved.recipe is None and "max_seq_length" not in keys:
        section = _fit_context(section)
    policy = backends.load_policy(
        section,
        tokenizer,
        backend,
        seed=section.random_seed,
        gradient_checkpointing=trainable,
        adapter=saved.adapter,
        precision=precision
        or backends.precision(saved.recipe.training if saved.recipe else TrainingSection()),
        lora=adapter and saved.adapter is not None,
    )
    policy.model.train(trainable)
    return policy


def saved_tokenizer(
    saved: Saved, section: ModelSection, backend: str, chat_template: str | None = None
):
    """The adapter's own tokenizer, with its chat template unless another is given; else the base
    model's.
    """
    from gtpo.models.tokenizer import load_tokenizer

    if saved.adapter is None or not (saved.adapter / "tokenizer_config.json").is_file():
        return load_tokenizer(section, backend)
    own = section.model_copy(
        update={"model_name": str(saved.adapter), "chat_template": chat_template}
    )
    tokenizer = load_tokenizer(own, backend)
    check_vocabulary(saved, section, tokenizer)
    return tokenizer


def _run(folder: Path) -> Saved:
    """A run with its adapter or, where it did not finish, its newest checkpoint that is whole; or a
    run's merged model.
    """
    from gtpo.recipe.command_line import read_saved

    recipe = read_saved(folder / "recipe.yaml")
    if (folder / "config.json").is_file():  # a merged model
        recipe = recipe.model_copy(
            update={
                "model": recipe.model.model_copy(
                    update={"load_in_4bit": False, "chat_template": None}
                )
            }
        )
        return Saved("base", str(folder), recipe=recipe)
    if (folder / adapters.CONFIG).is_file():
        try:
            adapters.read_config(folder)
            return Saved("run", recipe.model.model_name, folder, recipe, folder)
        except RecipeError as error:
            logger.warning("[GTPO] %s", error)
    for checkpoint in reversed(adapters.checkpoint_folders(folder)):
        try:
            adapters.read_config(checkpoint)
        except RecipeError as error:
            logger.warning("[GTPO] %s", error)
            continue
        logger.warning(
            "[GTPO] %s did not finish: its newest checkpoint, %s, is used", folder, checkpoint.name
        )
        return Saved("run", recipe.model.model_name, checkpoint, recipe, folder)
    raise RecipeError(
        folder,
        "this run has no adapter, neither of its own nor in a checkpoint; let it reach "
        "training.save_steps or its end, or give another run",
    )


def _adapter(folder: Path) -> Saved:
    from gtpo.recipe.command_line import read_saved

    config = adapters.read_config(folder)
    run_dir = Path(os.path.normpath(folder / ".."))
    if adapters.checkpoint_step(folder) is not None and (run_dir / "recipe.yaml").is_file():
        recipe = read_saved(run_dir / "recipe.yaml")
        return Saved("checkpoint", recipe.model.model_name, folder, recipe, run_dir)
    return Saved("adapter", config.get("base_model_name_or_path") or "", folder)


def _fit_context(section: ModelSection) -> ModelSection:
    """`section` with a sequence length that nobody chose: the default, or the model's context where
    that is shorter.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(
            section.model_name, trust_remote_code=section.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise RecipeError(
            section.model_name, f"its config.json cannot be used ({str(error).splitlines()[0]})"
        ) from error
    context = (
        getattr(config.get_text_config(), "max_position_embeddings", None) or section.max_seq_length
    )
    length = min(section.max_seq_length, context)
    return section.model_copy(update={"max_seq_length": length, "max_prompt_length": length})


def check_vocabulary(saved: Saved, section: ModelSection, tokenizer) -> None:
    """Raises RecipeError if the base model numbers ordinary tokens differently; special ones get
    added and renamed.
    """
    from transformers import AutoTokenizer

    if os.path.isdir(section.model_name) and not os.path.isfile(
        os.path.join(section.model_name, "tokenizer_config.json")
    ):
        return
    theirs = AutoTokenizer.from_pretrained(
        section.model_name, trust_remote_code=section.trust_remote_code
    )
    if _ordinary_tokens(tokenizer) != _ordinary_tokens(theirs):
        raise RecipeError(
            saved.adapter,
            f"this adapter does not fit the base model {saved.base!r}: its tokenizer has another "
            "vocabulary; give the model that it was trained on",
        )


def _ordinary_tokens(tokenizer) -> dict[str, int]:
    added = tokenizer.get_added_vocab()
    return {token: i for token, i in tokenizer.get_vocab().items() if token not in added}


# ---- model.adapter: a new run that goes on training an earlier adapter's weights


def resolve_adapter(recipe: Recipe) -> Recipe:
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
