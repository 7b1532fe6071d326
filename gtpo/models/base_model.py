"""A base model before it is loaded: where it is, and whether it fits this machine."""

import os
import re

from gtpo.errors import RecipeError
from gtpo.recipe.sections import ModelSection


def check_model(name: str, key: str = "model.model_name") -> None:
    """A short look at where the model `name` is; raises RecipeError, beginning with `key`, with
    what to do.
    """
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise RecipeError(
                key, f"the folder {name!r} has no config.json; give a model saved by transformers"
            )
        _check_files(key, name, os.listdir(name))
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RecipeError(
            key,
            f"there is no folder {name!r}; give an existing one, or a hub name such as "
            "Qwen/Qwen2.5-3B-Instruct",
        )
    else:
        from gtpo.system.hub import look_up

        _check_files(
            key,
            name,
            look_up(
                key,
                name,
                kind="model",
                instead=f"a local folder (there is none called {name!r} here)",
            ),
        )


def _check_files(key: str, name: str, files: list[str]) -> None:
    """Raises RecipeError where the weights are there, but not as safetensors: other formats can
    hold code that runs.
    """
    pickled = sorted(
        file
        for file in files
        if file.endswith((".bin", ".pt", ".pth", ".ckpt")) and "model" in file
    )
    if pickled and not any(file.endswith(".safetensors") for file in files):
        raise RecipeError(
            key,
            f"{name!r} has its weights in {pickled[0]}, which could run code when it is loaded; use"
            " a model in safetensors (transformers' save_pretrained writes it)",
        )


def loading_error(key: str, what: str, section: ModelSection, error: Exception) -> RecipeError:
    """`error`, from loading a model or its tokenizer, as a sentence."""
    # transformers 5.17.0, dynamic_module_utils.resolve_trust_remote_code
    if "custom code which must be executed" in str(error):
        return RecipeError(
            "model.trust_remote_code",
            f"{section.model_name!r} comes with Python code of its own, which runs only if "
            "this is true; set it if you trust the author",
        )
    return RecipeError(key, f"{what} ({str(error).strip().splitlines()[0]})")


def check_context(section: ModelSection, config) -> None:
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and section.max_seq_length > context:
        raise RecipeError(
            "model.max_seq_length",
            f"{section.max_seq_length} is more than the {context} tokens of context "
            f"that {section.model_name!r} was made for; use at most {context}",
        )


def check_memory(section: ModelSection, config) -> None:
    """Raises RecipeError if the weights alone, in float32, do not fit what this machine has
    free.
    """
    import psutil

    count = parameters(config, trust_remote_code=section.trust_remote_code)
    needed, free = 4 * count, psutil.virtual_memory().available
    if needed > 0.9 * free:
        raise RecipeError(
            "model.model_name",
            f"{section.model_name!r} has {count / 1e9:.1f} billion parameters, {needed / 2**30:.0f}"
            f" GiB in float32, and this machine without a GPU has {free / 2**30:.0f} GiB free; use"
            " a smaller model, or a machine with an NVIDIA GPU",
        )


def parameters(config, *, trust_remote_code: bool = False) -> int:
    """How many weights a model of this configuration has; nothing is loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(
            p.numel()
            for p in AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code
            ).parameters()
        )


def is_hub_name(name: str) -> bool:
    """Whether the model `name` is on the hub, as far as its look goes: no folder here, and no
    path.
    """
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not os.path.isdir(name)
