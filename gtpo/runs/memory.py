"""What a run takes of memory and disk at worst, by arithmetic from the model's configuration;
nothing is loaded.

docs/small_cards.md explains each line. It is an estimate from above for one process: kernels that
keep less are not credited, and memory that several processes share (FSDP, ZeRO) is not divided.
"""

import math
import os
from typing import NamedTuple

from gtpo.errors import RecipeError
from gtpo.hooks.merged_generation import MOST_BYTES
from gtpo.models.backends import add_lora, precision
from gtpo.models.generation import unsloth_uses_vllm
from gtpo.recipe import Recipe
from gtpo.recipe.batch import batch_plan, optimizer_steps
from gtpo.recipe.sections import ModelSection
from gtpo.system.trl_options import grpo_options

# bytes of a weight: 4 bits, an 8-bit scale per 64 weights, a float32 per 256 scales
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# bytes: trl 1.13.0 keeps logits, those by temperature and their gradient in float32, and copies
# while it works
PLAIN_LOGIT = 18
# bytes, of a chunk: unsloth_zoo 2026.10.7 takes a quarter of the tokens at a time, or less; GTPO's
# own head keeps less there
STREAMED_LOGIT = 14
OWN_LOGIT = {16: 8, 32: 12}  # bytes, of a chunk of gtpo/hooks/streaming_head.py
# logits at a time and the fewest tokens there, on a GPU and on a CPU
OWN_CHUNK, OWN_ROWS = {16: 2**27, 32: 2**22}, 128
# what a configuration calls a change of logits after the head
SCALED = ("final_logit_softcapping", "logit_scale", "logits_scaling")
# bytes: CUDA context and workspaces, fragments; or torch and transformers themselves on a CPU
LIBRARIES = 2**30
GIB = 2**30
TOKEN_BYTES = 25  # of completions.jsonl, with the per-token lists


class Shape(NamedTuple):
    """A model's size."""

    parameters: int
    quantizable: int  # those of them in linear layers, the head aside
    adapter: int  # parameters that are trained
    layers: int
    hidden: int
    intermediate: int
    kv: int  # key heads x their width
    heads: int
    vocabulary: int
    # logits are a matrix product and nothing else, so that they can be streamed
    plain_head: bool = True


class Load(NamedTuple):
    """How it trains, per device."""

    completions: int  # of a micro-batch
    rollout: int  # completions sampled at a time
    prompt: int  # tokens of the longest
    completion: int
    bits: int = 16  # of the base model's weights: 4, 16 or 32
    unsloth: bool = False
    sharded: bool = False  # by FSDP or DeepSpeed, where logits are not streamed
    checkpointing: bool = True
    optimizer: float = 8  # bytes per trained parameter
    # bytes that vLLM takes, its copy of the weights included; Unsloth trains on that, TRL has
    # another
    vllm: int = 0


def peak(shape: Shape, load: Load) -> dict[str, int]:
    """Bytes at the worst moment, by what takes them; sampling and training take turns, so the
    smaller of the two is 0.
    """
    number = 4 if load.bits == 32 else 2  # bytes of an activation
    sequence = load.completions * (load.prompt + load.completion)  # tokens of a micro-batch
    layer = sequence * _kept(shape, load) * number
    checkpoints = sequence * shape.hidden * number * shape.layers  # what enters each layer
    activations = checkpoints + 2 * layer if load.checkpointing else layer * (shape.layers + 1)
    logits = _logits(shape, load, number)
    sampling = 0
    if not load.vllm:
        cache = (
            load.rollout * (load.prompt + load.completion) * shape.layers * 2 * shape.kv * number
        )
        prefill = load.rollout * load.prompt * (4 * shape.hidden + 2 * shape.intermediate) * number
        # float32 logits of one place, and what warpers copy
        sampling = cache + prefill + load.rollout * shape.vocabulary * 12
        merged = 4 * shape.quantizable if load.bits == 32 and not load.unsloth else 0
        sampling += merged if merged <= MOST_BYTES else 0
    training = activations + logits
    weights, shared = _weights(shape, load), load.vllm and load.unsloth
    return {
        "vLLM": max(load.vllm, weights) if shared else load.vllm,
        "weights": 0 if shared else weights,
        # float32 weights and gradients
        "adapter and optimizer": int(shape.adapter * (4 + 4 + load.optimizer)),
        "activations": int(activations) if training >= sampling else 0,
        "logits": int(logits) if training >= sampling else 0,
        "sampling": sampling if sampling > training else 0,
        "libraries": LIBRARIES,
    }


def _kept(shape: Shape, load: Load) -> int:
    """Numbers that a layer keeps per token for its backward pass."""
    if load.unsloth or load.bits == 32:
        return 8 * shape.hidden + 2 * shape.kv + 4 * shape.intermediate
    # a float32 adapter on half precision keeps copies of what enters it; an H200 kept something per
    # pair of tokens and head
    pairs = shape.heads * (load.prompt + load.completion)
    return 16 * shape.hidden + 2 * shape.kv + 4 * shape.intermediate + pairs


def _logits(shape: Shape, load: Load, number: int) -> float:
    tokens = load.completions * load.completion
    if load.unsloth:
        return (
            tokens
            * shape.vocabulary
            * STREAMED_LOGIT
            / max(4, (load.prompt + load.completion) // 4096)
        )
    if load.sharded or not shape.plain_head:
        return tokens * shape.vocabulary * PLAIN_LOGIT
    bits = max(load.bits, 16)
    rows = min(tokens, max(OWN_ROWS, OWN_CHUNK[bits] // shape.vocabulary))
    return rows * shape.vocabulary * OWN_LOGIT[bits] + tokens * shape.hidden * number


def _weights(shape: Shape, load: Load) -> int:
    # peft's prepare_model_for_kbit_training casts what is not quantised to float32
    if load.bits == 4:
        return int(
            shape.quantizable * NF4
            + (shape.parameters - shape.quantizable) * (2 if load.unsloth else 4)
        )
    return shape.parameters * load.bits // 8


def checkpoint(shape: Shape, optimizer: float, tokenizer: int) -> int:
    """Bytes of a checkpoint: float32 adapter, optimizer, tokenizer, and a megabyte of small
    files.
    """
    return int(shape.adapter * (4 + optimizer)) + tokenizer + 2**20


def optimizer_bytes(name: str) -> float:
    """What an optimizer keeps per trained parameter."""
    # Adam's two moments, in bytes with their scales or in float32; at most, for the others
    return 2.1 if "8bit" in name else 8


def shape(section: ModelSection, lora) -> Shape:
    """The size of `section`'s model with an adapter of the peft.LoraConfig `lora`; raises
    RecipeError if they do not go together.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(
        section.model_name, trust_remote_code=section.trust_remote_code
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, trust_remote_code=section.trust_remote_code
        )
        parameters = sum(p.numel() for p in model.parameters())
        head = model.get_output_embeddings()
        quantizable = sum(
            m.weight.numel()
            for m in model.modules()
            if isinstance(m, torch.nn.Linear) and m is not head
        )
        model = add_lora(model, lora)
    text = config.get_text_config()
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        parameters,
        quantizable,
        sum(p.numel() for p in model.parameters() if p.requires_grad),
        text.num_hidden_layers,
        text.hidden_size,
        getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        (getattr(text, "num_key_value_heads", None) or heads) * width,
        heads,
        text.vocab_size,
        type(head) is torch.nn.Linear
        and head.bias is None
        and all(getattr(text, name, None) in (None, 1) for name in SCALED),
    )


# ---- a recipe's memory and disk against what is free


def check_memory(
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


def check_disk(recipe: Recipe, checkpoint: int, *, free: int, problems: int, processes: int) -> str:
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
