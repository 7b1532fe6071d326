"""Find and load what has been trained: a run, a checkpoint, an adapter, or a base model.

The last part is for `model.adapter`: a new run that goes on training an earlier adapter.
"""

import logging
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gtpo.errors import RecipeError
from gtpo.hooks.turn_ends import turn_ends
from gtpo.models import adapters, base_model
from gtpo.models.tokenizer import (
    agree_on_turn_ends,
    load_tokenizer,
    restore_end,
    tokenizer_source,
)
from gtpo.recipe import Recipe
from gtpo.recipe.sections import ModelSection, TrainingSection

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Saved:
    """A model on disk or on the hub, which is not loaded yet."""

    kind: Literal["run", "checkpoint", "adapter", "base"]
    base: str  # the base model: a folder or a hub name
    adapter: Path | None = None  # the folder of the adapter that was trained on it
    recipe: Recipe | None = None  # that of its run
    run_dir: Path | None = None

    @property
    def section(self) -> ModelSection:
        """The model section with which to load it: its run's, or else one without quantisation."""
        if self.recipe is None:
            return ModelSection(model_name=self.base, load_in_4bit=False)
        # A run that was trained with Unsloth can be used on a machine without a GPU.
        backend = "auto" if self.recipe.model.backend == "unsloth" else self.recipe.model.backend
        return self.recipe.model.model_copy(update={"model_name": self.base, "backend": backend})

    def section_with(self, **keys) -> ModelSection:
        """`section` with other values for some of its keys."""
        return ModelSection.model_validate({**self.section.model_dump(), **keys})


# ---- find


def find_saved(target: str, *, base: str | None = None) -> Saved:
    """The model that `target` names: a folder, or a base model's hub name. Nothing is loaded.

    `base` replaces the base model that an adapter's files name. Raises RecipeError if `target` does
    not exist or holds no model, and if its base model does not exist.
    """
    folder = Path(target).expanduser()
    if (folder / "recipe.yaml").is_file():
        saved = _saved_run(folder)
    elif (folder / adapters.CONFIG).is_file():
        saved = _saved_adapter(folder)
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


def _saved_run(folder: Path) -> Saved:
    """A run's merged model, its adapter, or the newest whole checkpoint of an unfinished run."""
    from gtpo.recipe.command_line import read_saved

    recipe = read_saved(folder / "recipe.yaml")
    base = recipe.model.model_name
    if (folder / "config.json").is_file():  # a merged model
        section = recipe.model.model_copy(update={"load_in_4bit": False, "chat_template": None})
        return Saved("base", str(folder), recipe=recipe.model_copy(update={"model": section}))
    if (folder / adapters.CONFIG).is_file() and _is_whole(folder):
        return Saved("run", base, adapter=folder, recipe=recipe, run_dir=folder)
    for checkpoint in reversed(adapters.checkpoint_folders(folder)):
        if _is_whole(checkpoint):
            logger.warning(
                "[GTPO] %s did not finish: its newest checkpoint, %s, is used",
                folder,
                checkpoint.name,
            )
            return Saved("run", base, adapter=checkpoint, recipe=recipe, run_dir=folder)
    raise RecipeError(
        folder,
        "this run has no adapter, neither of its own nor in a checkpoint; let it reach "
        "training.save_steps or its end, or give another run",
    )


def _is_whole(folder: Path) -> bool:
    """Whether the adapter in `folder` can be read; a warning says why if not."""
    try:
        adapters.read_config(folder)
    except RecipeError as error:
        logger.warning("[GTPO] %s", error)
        return False
    return True


def _saved_adapter(folder: Path) -> Saved:
    """A checkpoint with the recipe of its run, or an adapter that belongs to no run."""
    from gtpo.recipe.command_line import read_saved

    config = adapters.read_config(folder)
    run_dir = Path(os.path.normpath(folder / ".."))
    if adapters.checkpoint_step(folder) is not None and (run_dir / "recipe.yaml").is_file():
        recipe = read_saved(run_dir / "recipe.yaml")
        base = recipe.model.model_name
        return Saved("checkpoint", base, adapter=folder, recipe=recipe, run_dir=run_dir)
    return Saved("adapter", config.get("base_model_name_or_path") or "", adapter=folder)


# ---- load


def load_saved(
    saved: Saved,
    *,
    adapter: bool = True,
    trainable: bool = False,
    precision: str | None = None,
    backend_and_tokenizer: tuple[str, Any] | None = None,
    **keys,
):
    """The backends.Policy of `saved`, in inference mode, or in training mode if `trainable`.

    `adapter=False` loads its base model alone. `precision` is bf16, fp16 or float32, by default
    that of the training. `backend_and_tokenizer` are those that the caller has already. `keys`
    replace keys of `saved.section`: backend, load_in_4bit, max_seq_length, chat_template and so on.
    Raises RecipeError for what cannot be loaded, and for a base model that does not fit the
    adapter.
    """
    # Not above: verbs import this module before the environment is set, and backends imports hooks.
    from gtpo.models import backends

    section = saved.section_with(**keys)
    if backend_and_tokenizer is None:
        backend = backends.choose_backend(section)
        tokenizer = saved_tokenizer(saved, section, backend, keys.get("chat_template"))
    else:
        backend, tokenizer = backend_and_tokenizer
    if saved.recipe is None and "max_seq_length" not in keys:
        section = _within_context(section)
    training = saved.recipe.training if saved.recipe else TrainingSection()
    policy = backends.load_policy(
        section,
        tokenizer,
        backend,
        seed=section.random_seed,
        gradient_checkpointing=trainable,
        adapter=saved.adapter,
        precision=precision or backends.precision(training),
        lora=adapter and saved.adapter is not None,
    )
    policy.model.train(trainable)
    return policy


def saved_tokenizer(
    saved: Saved, section: ModelSection, backend: str, chat_template: str | None = None
):
    """The adapter's own tokenizer, or the base model's if none was saved with the adapter.

    The adapter's own keeps its chat template unless `chat_template` gives another one. Raises
    RecipeError if its vocabulary is not that of the base model.
    """
    source = tokenizer_source(section.model_name, saved.adapter)
    if source == section.model_name:
        tokenizer = load_tokenizer(section, backend)
    else:
        own = section.model_copy(update={"model_name": source, "chat_template": chat_template})
        tokenizer = load_tokenizer(own, backend)
        check_vocabulary(tokenizer, section, saved.adapter)
    use_turn_ends(saved, tokenizer, section, backend)
    return tokenizer


def use_turn_ends(saved: Saved, tokenizer, section: ModelSection, backend: str | None) -> None:
    """Lets `tokenizer` end turns as in the training of `saved`; else as the sources say.

    A run of GTPO 0.1.0 has kept no ends. Its completions ended with the tokenizer's end token.
    """
    is_run = saved.adapter is not None and saved.recipe is not None
    kept = turn_ends(tokenizer) if is_run else None
    training = saved.recipe.training if saved.recipe else None
    agree_on_turn_ends(tokenizer, section, training, backend=backend, kept=kept, keeper="this run")


def check_vocabulary(tokenizer, section: ModelSection, adapter: Path) -> None:
    """Raises RecipeError if `tokenizer` numbers tokens otherwise than the base model of `section`.

    Only ordinary tokens are compared, because training may add and rename special ones. `adapter`
    is the folder with which `tokenizer` was saved.
    """
    from transformers import AutoTokenizer

    base = section.model_name
    if os.path.isdir(base) and not os.path.isfile(os.path.join(base, "tokenizer_config.json")):
        return
    base_tokenizer = AutoTokenizer.from_pretrained(
        base, trust_remote_code=section.trust_remote_code
    )
    if _ordinary_tokens(tokenizer) != _ordinary_tokens(base_tokenizer):
        raise RecipeError(
            adapter,
            f"this adapter does not fit the base model {base!r}: its tokenizer has another "
            "vocabulary; give the model that it was trained on",
        )


def _ordinary_tokens(tokenizer) -> dict[str, int]:
    added = tokenizer.get_added_vocab()
    return {token: i for token, i in tokenizer.get_vocab().items() if token not in added}


def _within_context(section: ModelSection) -> ModelSection:
    """`section` with a sequence length of at most the model's context.

    It is for a model without a recipe. There, the length is a default that may be too long.
    """
    config = base_model.read_config(section.model_name, trust_remote_code=section.trust_remote_code)
    context = base_model.context_length(config) or section.max_seq_length
    length = min(section.max_seq_length, context)
    return section.model_copy(update={"max_seq_length": length, "max_prompt_length": length})


# ---- model.adapter: a new run that goes on training an earlier adapter


def resolve_adapter(recipe: Recipe) -> Recipe:
    """`recipe` with `model.adapter` as a folder, and with that adapter's rank, alpha and layers.

    A recipe without `model.adapter` is returned as it is. Raises RecipeError if there is no such
    adapter, if the recipe gives other LoRA settings, and if the new run would overwrite the
    adapter.
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
    earlier_base = config.get("base_model_name_or_path")
    if saved.recipe:
        earlier_base = saved.recipe.model.model_name
    if earlier_base and not _same_model(earlier_base, section.model_name):
        logger.warning(
            "[GTPO] model.adapter was trained on %s; its training goes on with %s",
            earlier_base,
            section.model_name,
        )
    settings = {**_lora_settings(section, config), "adapter": str(saved.adapter)}
    return recipe.model_copy(update={"model": section.model_copy(update=settings)})


def training_tokenizer(
    section: ModelSection,
    backend: str,
    training: TrainingSection | None = None,
    *,
    checkpoint: Path | None = None,
):
    """The tokenizer to train with, with the ends of a turn.

    It is that of `model.adapter` if one was saved with it. It is the base model's if there is no
    such tokenizer, and if `model.chat_template` is given. The ends of a turn are those of
    `checkpoint`, from which a run resumes; else all sources agree on them. Raises RecipeError if
    the adapter's vocabulary is not that of the base model.
    """
    tokenizer = _training_tokenizer(section, backend)
    kept = restore_end(tokenizer, checkpoint) if checkpoint else None
    agree_on_turn_ends(
        tokenizer, section, training, backend=backend, kept=kept, keeper="the checkpoint"
    )
    return tokenizer


def _training_tokenizer(section: ModelSection, backend: str):
    adapter = Path(section.adapter) if section.adapter else None
    source = tokenizer_source(section.model_name, adapter)
    if source == section.model_name:
        return load_tokenizer(section, backend)
    own = load_tokenizer(section.model_copy(update={"model_name": source}), backend)
    try:
        check_vocabulary(own, section, adapter)
    except RecipeError as error:
        raise error.with_key("model.adapter") from None
    return own if section.chat_template is None else load_tokenizer(section, backend)


def _lora_settings(section: ModelSection, config: dict) -> dict:
    """The adapter's LoRA settings by the recipe's names.

    Raises RecipeError if the recipe gives others.
    """
    layers = config["target_modules"] or []
    layers = [layers] if isinstance(layers, str) else sorted(layers)
    # peft 0.21.2 has taken the layers of experts out: they are parameters of their own.
    given = set(section.target_modules)
    same_layers = given >= set(layers) if config.get("target_parameters") else given == set(layers)
    settings = {
        "lora_rank": config["r"],
        "lora_alpha": config["lora_alpha"],
        # The recipe's order is kept, so that recipes differ in nothing else.
        "target_modules": section.target_modules if same_layers else layers,
        "lora_dropout": config.get("lora_dropout") or 0.0,
        "use_rslora": bool(config.get("use_rslora")),
        "use_dora": bool(config.get("use_dora")),
        "modules_to_save": config.get("modules_to_save"),
    }
    for name in settings.keys() & section.model_fields_set:
        value, earlier = getattr(section, name), settings[name]
        if value != earlier:
            raise RecipeError(
                f"model.{name}",
                f"{value} is not what the adapter {section.adapter} has; leave it out, or set "
                f"{earlier}",
            )
        settings[name] = value
    return settings


def _same_model(one: str, other: str) -> bool:
    """Whether two names mean the same base model.

    They may be two paths of a folder, or a hub name and that of Unsloth's 4-bit copy.
    """
    if os.path.isdir(one) and os.path.isdir(other):
        return os.path.samefile(one, other)
    return _plain_name(one) == _plain_name(other)


def _plain_name(name: str) -> str:
    """The last part of a model's name, without Unsloth's suffixes for 4-bit copies."""
    last = name.rstrip("/").rpartition("/")[2].lower()
    return last.removesuffix("-bnb-4bit").removesuffix("-unsloth")
