"""Whether a run has room here: its worst case against the free memory and the free disk, as a
sentence.
"""

import math
import os

from gtpo.errors import RecipeError
from gtpo.models.backends import precision
from gtpo.models.generation import unsloth_uses_vllm
from gtpo.recipe import Recipe
from gtpo.recipe.batch import batch_plan, optimizer_steps
from gtpo.runs.memory import Load, Shape, peak
from gtpo.system.trl_options import grpo_options

GIB = 2**30
TOKEN_BYTES = 25  # of completions.jsonl, with the per-token lists


def memory(
    recipe: Recipe, shape: Shape, *, backend: str, processes: int, longest: int, optimizer: float
) -> str:
    """What a run takes at worst and what is free; raises RecipeError if that is not enough, with
    the keys that help most.
    """
    import torch

    cuda = torch.cuda.is_available()
    free, place = _free(cuda)
    load = _load(
        recipe,
        backend=backend,
        processes=processes,
        longest=longest,
        optimizer=optimizer,
        cuda=cuda,
    )
    parts = peak(shape, load)
    needed = sum(parts.values())
    told = ", ".join(
        f"{name} {_gib(size)}"
        for name, size in sorted(parts.items(), key=lambda part: -part[1])
        if size
    )
    sentence = f"at worst {_gib(needed)} GiB ({told}), and {place} has {_gib(free)} GiB free"
    if needed > free:
        raise RecipeError("memory", f"{sentence}; lower {', '.join(_keys_that_help(parts, load))}")
    return sentence


def disk(recipe: Recipe, checkpoint: int, *, free: int, problems: int, processes: int) -> str:
    """What checkpoints and records take at most and what is free; raises RecipeError if that is not
    enough.
    """
    total = optimizer_steps(recipe, problems, processes).count
    interval = (
        recipe.training.save_steps
        if recipe.training.save_steps >= 1
        else math.ceil(recipe.training.save_steps * total)
    )
    made = max(1, math.ceil(total / interval))
    # the run's own adapter at the end is smaller than one
    kept = min(made, recipe.training.save_total_limit or made) + 1
    completions = (
        total * batch_plan(recipe, processes).prompts_per_step * recipe.training.num_generations
    )
    tokens = completions * recipe.max_completion_length if recipe.watch.completions else 0
    records = int(tokens * TOKEN_BYTES / recipe.watch.tokens_every)
    needed = checkpoint * kept + records
    sentence = (
        f"at most {_gib(needed)} GiB ({kept} checkpoints of {checkpoint / 2**20:,.0f} MiB,"
        f" completions.jsonl {_gib(records)}), and the disk has {_gib(free)} GiB free"
    )
    if needed > free:
        raise RecipeError(
            "disk",
            f"{sentence}; set training.save_total_limit, raise training.save_steps or"
            " watch.tokens_every, or use another output_root",
        )
    return sentence


def _load(
    recipe: Recipe, *, backend: str, processes: int, longest: int, optimizer: float, cuda: bool
) -> Load:
    plan, unsloth, options = (
        batch_plan(recipe, processes),
        backend == "unsloth",
        recipe.training.trl_options(),
    )
    share = (
        recipe.model.gpu_memory_utilization if unsloth and unsloth_uses_vllm(recipe.model) else 0
    )
    if (
        options.get("use_vllm")
        and options.get("vllm_mode", grpo_options()["vllm_mode"].default) != "server"
    ):
        share = options.get("vllm_gpu_memory_utilization", recipe.model.gpu_memory_utilization)
    bits = (
        32
        if not cuda or precision(recipe.training) == "float32"
        else 4
        if recipe.model.load_in_4bit
        else 16
    )
    return Load(
        completions=plan.per_device,
        rollout=plan.per_device * plan.steps_per_generation,
        prompt=longest,
        completion=recipe.max_completion_length,
        bits=bits,
        unsloth=unsloth,
        optimizer=optimizer,
        sharded=any(
            os.environ.get(f"ACCELERATE_USE_{engine}") == "true" for engine in ("FSDP", "DEEPSPEED")
        ),
        checkpointing=options.get("gradient_checkpointing", True),
        vllm=int(share * _total_gpu()) if cuda and share else 0,
    )


def _free(cuda: bool) -> tuple[int, str]:
    import psutil
    import torch

    if cuda:
        return torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    return (
        psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1)),
        "this machine",
    )


def _total_gpu() -> int:
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def _keys_that_help(parts: dict[str, int], load: Load) -> list[str]:
    """Three keys, those first that act on what takes most."""
    helps = {
        "weights": [
            (
                "model.model_name to a smaller model"
                if load.bits == 4
                else "the weights with model.load_in_4bit true"
            )
        ],
        "vLLM": ["model.gpu_memory_utilization"],
        "adapter and optimizer": ["model.lora_rank"],
        "activations": ["training.per_device_train_batch_size", "training.max_prompt_length"],
        "logits": ["training.per_device_train_batch_size", "model.max_seq_length"],
        "sampling": [
            "training.gradient_accumulation_steps",
            "training.num_generations",
            "model.max_seq_length",
        ],
        "libraries": [],
    }
    wanted = [
        key for name, _ in sorted(parts.items(), key=lambda part: -part[1]) for key in helps[name]
    ]
    more = [
        "training.per_device_train_batch_size",
        "model.max_seq_length",
        "training.num_generations",
    ]
    return list(dict.fromkeys([*wanted, *more]))[:3]


def _gib(size: float) -> str:
    return f"{size / GIB:.1f}" if size >= GIB / 20 else f"{size / GIB:.3f}"
