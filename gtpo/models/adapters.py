"""A LoRA adapter on disk: its configuration, and its weights put into a model.

Adapters are read as safetensors only, because other formats can hold code that runs.
"""

import json
import re
import warnings
from pathlib import Path

from gtpo.errors import RecipeError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def checkpoint_step(folder: Path) -> int | None:
    """The N of a folder that is named `checkpoint-N`; None for any other name."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.absolute().name)
    return int(match[1]) if match else None


def checkpoint_folders(run_dir: Path) -> list[Path]:
    """A run's folders `checkpoint-N` in the order of N, damaged ones too."""
    folders = [folder for folder in run_dir.glob("checkpoint-*") if folder.is_dir()]
    return sorted((f for f in folders if checkpoint_step(f) is not None), key=checkpoint_step)


def read_config(folder: Path) -> dict:
    """The adapter's configuration, as peft has written it.

    Raises RecipeError if a file of the adapter is missing or damaged, or if it is no LoRA adapter.
    """
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        # This reads the header, and checks that the file is as long as the header says.
        with safe_open(folder / WEIGHTS, framework="np"):
            pass
    except FileNotFoundError as error:
        name = CONFIG if CONFIG in str(error) else WEIGHTS
        if (folder / "adapter_model.bin").is_file():
            raise RecipeError(
                folder,
                f"there is no {WEIGHTS}; adapter_model.bin is not read, because it could run code;"
                " give an adapter in safetensors (peft's save_pretrained writes it)",
            ) from None
        raise RecipeError(
            folder, f"there is no {name}; give a folder with an adapter in safetensors"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise RecipeError(
            folder,
            f"the adapter is damaged ({' '.join(str(error).split())}); use another checkpoint",
        ) from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise RecipeError(
            folder,
            f"its {CONFIG} is not that of a LoRA adapter; give an adapter that GTPO or peft saved",
        )
    return config


def saved_lora_config(folder: Path):
    """The adapter's peft.LoraConfig, from which a fresh adapter of the same shape can be made."""
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(folder))
    # peft sets the name to that of the model to which the adapter is added.
    config.inference_mode, config.base_model_name_or_path = False, None
    return config


def peft_model(model, lora):
    """`model` as a PeftModel with a fresh adapter of the peft.LoraConfig `lora`.

    Raises ValueError or NotImplementedError if the adapter does not fit the model.
    """
    from peft import get_peft_model

    with warnings.catch_warnings():
        # peft 0.21.2 adds patterns for the experts of a mixture, and then warns of its own patterns
        warnings.filterwarnings("ignore", message=".*_pattern keys did not match")
        return get_peft_model(model, lora)


def attach(model, folder: Path, base: str):
    """The model `base` as a PeftModel with the adapter; raises RecipeError if they do not fit."""
    try:
        model = peft_model(model, saved_lora_config(folder))
    except ValueError as error:
        raise _misfit(folder, base, str(error).splitlines()[0]) from error
    load_weights(model, folder, base)
    return model


def load_weights(model, folder: Path, base: str) -> None:
    """Put the adapter's weights into `model`, a PeftModel with a fresh adapter on the model `base`.

    Raises RecipeError unless each weight has its place, and each place its weight.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(folder / WEIGHTS)
    # peft saves the embeddings with an adapter that changes them. The experts of a mixture have
    # names with `.base_layer.` too, but those are LoRA weights.
    with_embeddings = any(name.endswith(".base_layer.weight") for name in weights)
    places = get_peft_model_state_dict(model, save_embedding_layers=with_embeddings)
    for name in sorted(weights.keys() | places.keys()):
        layer = name.removeprefix("base_model.model.").split(".lora_")[0]
        if name not in places:
            raise _misfit(
                folder, base, f"the adapter has weights for {layer}, which the model does not have"
            )
        if name not in weights:
            raise _misfit(folder, base, f"the adapter has no weights for {layer}")
        given, expected = tuple(weights[name].shape), tuple(places[name].shape)
        if given != expected:
            raise _misfit(
                folder, base, f"{layer} is {given} in the adapter and {expected} in the model"
            )
    set_peft_model_state_dict(model, weights)


def _misfit(folder: Path, base: str, why: str) -> RecipeError:
    return RecipeError(
        folder,
        f"this adapter does not fit the base model {base!r}: {why}; give the model that it was "
        "trained on",
    )
