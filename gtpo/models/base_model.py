"""A base model before it is loaded: where it is, how large it is, and how long its context is."""

import os
import re

from gtpo.errors import RecipeError
from gtpo.recipe.sections import ModelSection

# formats that can hold code, which runs when a file is loaded
UNSAFE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


def check_model(name: str, key: str = "model.model_name") -> None:
    """Raises RecipeError about `key` if the model `name` is no usable folder, nor on the hub.

    It looks at names of files alone, and loads nothing.
    """
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise RecipeError(
                key, f"the folder {name!r} has no config.json; give a model saved by transformers"
            )
        _check_format(key, name, os.listdir(name))
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RecipeError(
            key,
            f"there is no folder {name!r}; give an existing one, or a hub name such as "
            "Qwen/Qwen2.5-3B-Instruct",
        )
    else:
        from gtpo.system.hub import look_up

        instead = f"a local folder (there is none called {name!r} here)"
        _check_format(key, name, look_up(key, name, kind="model", instead=instead))


def _check_format(key: str, name: str, files: list[str]) -> None:
    """Raises RecipeError if the model has weights, but not as safetensors."""
    unsafe = sorted(file for file in files if file.endswith(UNSAFE_SUFFIXES) and "model" in file)
    if unsafe and not any(file.endswith(".safetensors") for file in files):
        raise RecipeError(
            key,
            f"{name!r} has its weights in {unsafe[0]}, which could run code when it is loaded; use"
            " a model in safetensors (transformers' save_pretrained writes it)",
        )


def is_hub_name(name: str) -> bool:
    """Whether `name` can be a model on the hub: it is no folder here, and it is not a path."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name) is not None and not os.path.isdir(name)


def read_config(name: str, *, trust_remote_code: bool = False):
    """The model's transformers configuration; raises RecipeError if it cannot be read."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise RecipeError(
            name, f"its config.json cannot be used ({str(error).splitlines()[0]})"
        ) from error


def context_length(config) -> int | None:
    """The most tokens of prompt and completion that the model was made for; None if unknown."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def check_context(section: ModelSection, config) -> None:
    """Raises RecipeError if `model.max_seq_length` is more than the model's context."""
    context = context_length(config)
    if context is not None and section.max_seq_length > context:
        raise RecipeError(
            "model.max_seq_length",
            f"{section.max_seq_length} is more than the {context} tokens of context "
            f"that {section.model_name!r} was made for; use at most {context}",
        )


def count_parameters(config, *, trust_remote_code: bool = False) -> int:
    """The number of weights of a model with this configuration; nothing is loaded."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def check_free_memory(section: ModelSection, config) -> None:
    """Raises RecipeError if the weights in float32 do not fit into the free memory of a CPU."""
    import psutil

    count = count_parameters(config, trust_remote_code=section.trust_remote_code)
    needed, free = 4 * count, psutil.virtual_memory().available
    if needed > 0.9 * free:
        raise RecipeError(
            "model.model_name",
            f"{section.model_name!r} takes {needed / 2**30:.0f} GiB in float32"
            f" ({count / 1e9:.1f} billion parameters); this machine has"
            f" {free / 2**30:.0f} GiB free and no GPU; use a smaller model or a GPU",
        )


def loading_error(key: str, what: str, section: ModelSection, error: Exception) -> RecipeError:
    """The RecipeError for `error`, which came from loading a model or its tokenizer.

    It is about `key`, and its sentence begins with `what`.
    """
    # transformers 5.17.0, dynamic_module_utils.resolve_trust_remote_code
    if "custom code which must be executed" in str(error):
        return RecipeError(
            "model.trust_remote_code",
            f"{section.model_name!r} comes with Python code of its own, which runs only if "
            "this is true; set it if you trust the author",
        )
    return RecipeError(key, f"{what} ({str(error).strip().splitlines()[0]})")
