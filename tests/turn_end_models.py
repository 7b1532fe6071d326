"""Small models whose turns end otherwise than with the tokenizer's end token."""

import json
from pathlib import Path

import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = str(ROOT / "demo/model")
END, OTHER = 468, 476  # of the model below: <|end|> and <|endoftext|>


def save_model_with_two_ends(folder: Path, ends=(END, OTHER)) -> str:
    """The demo's model; its template ends a turn with <|end|>, and its tokenizer has another end.

    Phi-3.5 and Gemma-3 are so. `ends` is what generation_config names. Padding is the other end.
    """
    tokenizer, model = (
        AutoTokenizer.from_pretrained(DEMO),
        AutoModelForCausalLM.from_pretrained(DEMO),
    )
    tokenizer.add_tokens(["<|endoftext|>"], special_tokens=True)
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    head = model.get_output_embeddings().weight
    with torch.no_grad():
        head[OTHER:] = head[:OTHER].mean(0)
    tokenizer.eos_token = tokenizer.pad_token = "<|endoftext|>"
    model.generation_config.eos_token_id = list(ends)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write_recipe(folder: Path, model: str) -> str:
    """A recipe of a short run on the demo's problems; returns its path."""
    recipe = {
        "run_name": "ends",
        "output_root": str(folder / "runs"),
        "env": {"OMP_NUM_THREADS": "1"},
        "model": {
            "model_name": model,
            "backend": "transformers",
            "load_in_4bit": False,
            "max_seq_length": 96,
            "lora_rank": 4,
        },
        "dataset": {
            "name": "gsm8k",
            "path": str(ROOT / "demo/data/train.jsonl"),
            "system_instruction": "Reason, then answer.",
        },
        "training": {
            "max_prompt_length": 60,
            "max_steps": 2,
            "save_steps": 1,
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "learning_rate": 3e-3,
            "optimizer": "adamw_torch",
            "gradient_checkpointing": False,
            "report_to": "none",
        },
        "trainer": {"reward_funcs": "reward_math.final_reward"},
    }
    file = folder / "recipe.yaml"
    file.write_text(json.dumps(recipe))
    return str(file)


def remove_kept_ends(checkpoint: Path) -> None:
    """Makes a checkpoint one of an earlier version, which kept no ends of a turn."""
    from gtpo.runs import checkpoints

    config = checkpoint / "tokenizer_config.json"
    values = json.loads(config.read_text())
    del values["turn_ends"]
    config.write_text(json.dumps(values))
    manifest = checkpoint / checkpoints.MANIFEST
    kept = json.loads(manifest.read_text())
    kept["files"][config.name] = [config.stat().st_size, checkpoints._digest(config)]
    manifest.write_text(json.dumps(kept))
