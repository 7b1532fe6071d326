"""A LoRA adapter on disk: what its files say, and its weights in a model's own adapter. Safetensors
only.
"""

import json
import re
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
    """What the adapter says of itself; raises RecipeError where its files are missing, damaged, or
    no LoRA adapter's.
    """
    from safetensors import SafetensorError, safe_open

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(config, dict) or config.get("peft_type") != "LORA":
            raise RecipeError(
                folder,
                f"its {CONFIG} is no LoRA adapter's; give an adapter that GTPO or peft has saved",
            )
        # reads the header, and that the file is whole
        with safe_open(folder / WEIGHTS, framework="np"):
            return config
    except FileNotFoundError as error:
        name = CONFIG if CONFIG in str(error) else WEIGHTS
        if (folder / "adapter_model.bin").is_file():
            raise RecipeError(
                folder,
                f"there is no {WEIGHTS}, and adapter_model.bin, which could run code when it is"
                " loaded, is not taken; give an adapter in safetensors (peft's save_pretrained"
                " writes it)",
            ) from None
        raise RecipeError(
            folder, f"there is no {name}; give a folder with an adapter in safetensors"
        ) from None
    except (OSError, ValueError, SafetensorError) as error:
        raise RecipeError(
            folder,
            f"the adapter is damaged ({' '.join(str(error).split())}); use another checkpoint",
        ) from None


def lora_config(folder: Path):
    """The adapter's peft.LoraConfig, to make a fresh adapter of its shape."""
    from peft import LoraConfig

    config = LoraConfig.from_pretrained(str(folder))
    # peft fills in the model that it is laid on
    config.inference_mode, config.base_model_name_or_path = False, None
    return config


def attach(model, folder: Path, base: str):
    """`model` as a PeftModel with the adapter; raises RecipeError where it does not fit."""
    from peft import get_peft_model

    try:
        model = get_peft_model(model, lora_config(folder))
    except ValueError as error:
        raise _misfit(folder, base, str(error).splitlines()[0]) from error
    load_weights(model, folder, base)
    return model


def load_weights(model, folder: Path, base: str) -> None:
    """Put the adapter's weights into `model`, which has a fresh one; raises RecipeError unless each
    has its place.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    weights = load_file(folder / WEIGHTS)
    # peft adds them where they are adapted
    with_embeddings = any(".base_layer." in name for name in weights)
    places = get_peft_model_state_dict(model, save_embedding_layers=with_embeddings)
    for name in sorted(weights.keys() | places.keys()):
        layer = name.removeprefix("base_model.model.").split(".lora_")[0]
        if name not in places:
            raise _misfit(
                folder, base, f"the adapter has weights for {layer}, which the model does not have"
            )
        if name not in weights:
            raise _misfit(folder, base, f"the adapter has no weights for {layer}")
        found, expected = tuple(weights[name].shape), tuple(places[name].shape)
        if found != expected:
            raise _misfit(
                folder, base, f"{layer} is {found} in the adapter and {expected} in the model"
            )
    set_peft_model_state_dict(model, weights)


def _misfit(folder: Path, base: str, why: str) -> RecipeError:
    return RecipeError(
        folder,
        f"this adapter does not fit the base model {base!r}: {why}; give the model that it was "
        "trained on",
    )
