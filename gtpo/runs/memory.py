"""Worst-case memory and disk of a run, by arithmetic from the model's configuration.

Nothing is loaded. docs/small_cards.md explains each line. The estimate is an upper bound for one
process. It gives no credit for kernels that keep less, and it does not divide memory that several
processes share (FSDP, ZeRO).
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

GIB = 2**30
# Bytes per weight: 4 bits, an 8-bit scale per 64 weights, a float32 scale per 256 of those scales.
NF4 = 0.5 + 1 / 64 + 4 / (64 * 256)
# Bytes per logit where all logits are kept. trl 1.13.0 keeps them, their quotient by the
# temperature and their gradient in float32, and makes copies.
WHOLE_LOGIT = 18
# Bytes per logit of a chunk in unsloth_zoo 2026.10.7, which takes a quarter of the tokens at most.
UNSLOTH_LOGIT = 14
# The same for gtpo/hooks/streaming_head.py. First bytes per logit and logits per chunk, by the bits
# of a weight: 16 on a GPU, 32 on a CPU. Then the fewest tokens per chunk.
OWN_LOGIT, OWN_CHUNK, OWN_ROWS = {16: 8, 32: 12}, {16: 2**27, 32: 2**22}, 128
# Keys of a model's configuration that change the logits after the head.
LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
# Bytes of the CUDA context, workspaces and fragments; on a CPU of torch and transformers.
LIBRARIES = 2**30
TOKEN_BYTES = 25  # per token in completions.jsonl, if its line has the lists per token


class ModelSize(NamedTuple):
    """The size of a model and its adapter."""

    parameters: int  # of the base model
    quantizable: int  # of these, those in linear layers other than the head
    adapter: int  # parameters that train
    layers: int
    hidden: int
    intermediate: int
    kv: int  # number of key heads x their width
    heads: int
    vocabulary: int
    plain_head: bool = True  # logits are one matrix product, so they can be streamed


class DeviceLoad(NamedTuple):
    """What one device holds and computes at a time."""

    completions: int  # of a micro-batch
    rollout: int  # completions that are sampled at a time
    prompt_tokens: int  # of the longest prompt
    completion_tokens: int
    weight_bits: int = 16  # of the base model: 4, 16 or 32
    unsloth: bool = False
    sharded: bool = False  # by FSDP or DeepSpeed, where logits cannot be streamed
    checkpointing: bool = True  # of gradients: each layer's activations are computed again
    optimizer_bytes: float = 8  # per parameter that trains
    # vLLM's share of the device. It has a copy of the weights in it. With Unsloth the policy trains
    # on that copy, with TRL the policy has its own.
    vllm_bytes: int = 0

    @property
    def number_bytes(self) -> int:
        """Bytes of one number in an activation."""
        return 4 if self.weight_bits == 32 else 2

    @property
    def sequence_tokens(self) -> int:
        """Tokens of one prompt with its completion."""
        return self.prompt_tokens + self.completion_tokens


# ---- the estimate


def peak_memory(size: ModelSize, load: DeviceLoad) -> dict[str, int]:
    """Bytes at the worst moment, by what takes them.

    Sampling and training take turns, so the smaller one of the two counts as 0.
    """
    training = {"activations": _activations(size, load), "logits": _logits(size, load)}
    sampling = 0 if load.vllm_bytes else _sampling(size, load)
    if sum(training.values()) >= sampling:
        sampling = 0
    else:
        training = dict.fromkeys(training, 0)
    weights, trains_on_vllm = _weights(size, load), load.vllm_bytes and load.unsloth
    return {
        "vLLM": max(load.vllm_bytes, weights) if trains_on_vllm else load.vllm_bytes,
        "weights": 0 if trains_on_vllm else weights,
        # float32 weights and gradients, and the optimizer's state
        "adapter and optimizer": int(size.adapter * (4 + 4 + load.optimizer_bytes)),
        **{name: int(count) for name, count in training.items()},
        "sampling": sampling,
        "libraries": LIBRARIES,
    }


def _weights(size: ModelSize, load: DeviceLoad) -> int:
    if load.weight_bits != 4:
        return size.parameters * load.weight_bits // 8
    # peft's prepare_model_for_kbit_training casts to float32 what is not quantized.
    other_bytes = 2 if load.unsloth else 4
    return int(size.quantizable * NF4 + (size.parameters - size.quantizable) * other_bytes)


def _activations(size: ModelSize, load: DeviceLoad) -> int:
    tokens = load.completions * load.sequence_tokens
    layer = tokens * saved_per_token(size, load) * load.number_bytes
    if not load.checkpointing:
        return layer * (size.layers + 1)
    layer_inputs = tokens * size.hidden * load.number_bytes * size.layers
    return layer_inputs + 2 * layer


def saved_per_token(size: ModelSize, load: DeviceLoad) -> int:
    """Numbers that a layer keeps per token for its backward pass."""
    if load.unsloth or load.weight_bits == 32:
        return 8 * size.hidden + 2 * size.kv + 4 * size.intermediate
    # A float32 adapter on half-precision weights keeps copies of its inputs. On an H200 something
    # more was kept for each pair of tokens and each head.
    pairs = size.heads * load.sequence_tokens
    return 16 * size.hidden + 2 * size.kv + 4 * size.intermediate + pairs


def _logits(size: ModelSize, load: DeviceLoad) -> float:
    tokens = load.completions * load.completion_tokens
    if load.unsloth:
        chunks = max(4, load.sequence_tokens // 4096)
        return tokens * size.vocabulary * UNSLOTH_LOGIT / chunks
    if load.sharded or not size.plain_head:
        return tokens * size.vocabulary * WHOLE_LOGIT
    bits = max(load.weight_bits, 16)
    rows = min(tokens, max(OWN_ROWS, OWN_CHUNK[bits] // size.vocabulary))
    hidden_states = tokens * size.hidden * load.number_bytes
    return rows * size.vocabulary * OWN_LOGIT[bits] + hidden_states


def _sampling(size: ModelSize, load: DeviceLoad) -> int:
    number = load.number_bytes
    tokens, prompt_tokens = (
        load.rollout * load.sequence_tokens,
        load.rollout * load.prompt_tokens,
    )
    cache = tokens * size.layers * 2 * size.kv * number
    prefill = prompt_tokens * (4 * size.hidden + 2 * size.intermediate) * number
    next_logits = load.rollout * size.vocabulary * 12  # float32, and copies of logits processors
    # gtpo/hooks/merged_generation.py keeps a second copy of float32 weights, unless it is large.
    merged = 4 * size.quantizable if load.weight_bits == 32 and not load.unsloth else 0
    return cache + prefill + next_logits + (merged if merged <= MOST_BYTES else 0)


def checkpoint_bytes(size: ModelSize, optimizer_bytes: float, tokenizer_bytes: int) -> int:
    """Bytes of a checkpoint: float32 adapter, optimizer, tokenizer, a megabyte of small files."""
    return int(size.adapter * (4 + optimizer_bytes)) + tokenizer_bytes + 2**20


def optimizer_bytes(name: str) -> float:
    """Bytes that an optimizer keeps per parameter; exact for Adam, an upper bound for others.

    Adam keeps two moments, in float32 or in 8 bits with scales.
    """
    return 2.1 if "8bit" in name else 8


def model_size(section: ModelSection, lora) -> ModelSize:
    """The size of a section's model with an adapter of the peft.LoraConfig `lora`.

    The model is built without memory for its weights. Raises RecipeError if the adapter does not
    fit the model.
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
        linear = [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head]
        quantizable = sum(m.weight.numel() for m in linear)
        model = add_lora(model, lora)
    text = config.get_text_config()
    heads = text.num_attention_heads
    head_width = getattr(text, "head_dim", None) or text.hidden_size // heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    changes = [name for name in LOGIT_CHANGES if getattr(text, name, None) not in (None, 1)]
    return ModelSize(
        parameters=parameters,
        quantizable=quantizable,
        adapter=sum(p.numel() for p in model.parameters() if p.requires_grad),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        kv=key_heads * head_width,
        heads=heads,
        vocabulary=text.vocab_size,
        plain_head=type(head) is torch.nn.Linear and head.bias is None and not changes,
    )


def device_load(
    recipe: Recipe,
    *,
    backend: str,
    processes: int,
    longest_prompt: int,
    optimizer_bytes: float,
    cuda: bool,
) -> DeviceLoad:
    """What one device holds and computes in a run of `recipe`; `longest_prompt` is in tokens."""
    plan, options = batch_plan(recipe, processes), recipe.training.trl_options()
    unsloth, vllm_share = backend == "unsloth", 0.0
    if unsloth and unsloth_uses_vllm(recipe.model):
        vllm_share = recipe.model.gpu_memory_utilization
    vllm_mode = options.get("vllm_mode", grpo_options()["vllm_mode"].default)
    if options.get("use_vllm") and vllm_mode != "server":
        vllm_share = options.get("vllm_gpu_memory_utilization", recipe.model.gpu_memory_utilization)
    if not cuda or precision(recipe.training) == "float32":
        weight_bits = 32
    else:
        weight_bits = 4 if recipe.model.load_in_4bit else 16
    engines = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return DeviceLoad(
        completions=plan.per_device,
        rollout=plan.per_device * plan.steps_per_generation,
        prompt_tokens=longest_prompt,
        completion_tokens=recipe.max_completion_length,
        weight_bits=weight_bits,
        unsloth=unsloth,
        sharded=any(os.environ.get(engine) == "true" for engine in engines),
        checkpointing=options.get("gradient_checkpointing", True),
        optimizer_bytes=optimizer_bytes,
        vllm_bytes=int(vllm_share * gpu_bytes()) if cuda and vllm_share else 0,
    )


# ---- the estimate against what is free


def check_memory(
    recipe: Recipe,
    size: ModelSize,
    *,
    backend: str,
    processes: int,
    longest_prompt: int,
    optimizer_bytes: float,
) -> str:
    """A sentence with the memory that a run needs at worst, and the memory that is free.

    Raises RecipeError if it is not enough, with the keys that save most.
    """
    import torch

    cuda = torch.cuda.is_available()
    free, device = free_memory(cuda)
    load = device_load(
        recipe,
        backend=backend,
        processes=processes,
        longest_prompt=longest_prompt,
        optimizer_bytes=optimizer_bytes,
        cuda=cuda,
    )
    parts = peak_memory(size, load)
    needed = sum(parts.values())
    by_size = sorted(parts.items(), key=lambda part: -part[1])
    details = ", ".join(f"{name} {_gib(count)}" for name, count in by_size if count)
    sentence = f"at worst {_gib(needed)} GiB ({details}), and {device} has {_gib(free)} GiB free"
    if needed > free:
        raise RecipeError("memory", f"{sentence}; lower {', '.join(keys_that_save(parts, load))}")
    return sentence


def check_disk(recipe: Recipe, checkpoint: int, *, free: int, problems: int, processes: int) -> str:
    """A sentence with the disk space that a run needs at most, and the space that is free.

    `checkpoint` and `free` are in bytes. Raises RecipeError if it is not enough.
    """
    training, steps = recipe.training, optimizer_steps(recipe, problems, processes).count
    interval = training.save_steps  # below 1 it is a share of all steps
    if interval < 1:
        interval = math.ceil(interval * steps)
    saved = max(1, math.ceil(steps / interval))
    # One more for the adapter of the run itself, which is smaller than a checkpoint.
    kept = min(saved, training.save_total_limit or saved) + 1
    completions_per_step = batch_plan(recipe, processes).prompts_per_step * training.num_generations
    records = 0
    if recipe.watch.completions:
        tokens = steps * completions_per_step * recipe.max_completion_length
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


def free_memory(cuda: bool) -> tuple[int, str]:
    """Bytes that are free for one process, and the name of the device."""
    import psutil
    import torch

    if cuda:
        return torch.cuda.mem_get_info()[0], torch.cuda.get_device_name()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return psutil.virtual_memory().available // processes, "this machine"


def gpu_bytes() -> int:
    """All memory of the first GPU."""
    import torch

    return torch.cuda.get_device_properties(0).total_memory


def keys_that_save(parts: dict[str, int], load: DeviceLoad) -> list[str]:
    """Three keys to lower. Those that act on the largest part come first."""
    if load.weight_bits == 4:
        for_weights = "model.model_name to a smaller model"
    else:
        for_weights = "the weights with model.load_in_4bit true"
    batch, length = "training.per_device_train_batch_size", "model.max_seq_length"
    group = "training.num_generations"
    keys = {
        "vLLM": ["model.gpu_memory_utilization"],
        "weights": [for_weights],
        "adapter and optimizer": ["model.lora_rank"],
        "activations": [batch, "training.max_prompt_length"],
        "logits": [batch, length],
        "sampling": ["training.gradient_accumulation_steps", group, length],
        "libraries": [],
    }
    by_size = sorted(parts, key=lambda name: -parts[name])
    chosen = [key for name in by_size for key in keys[name]]
    return list(dict.fromkeys([*chosen, batch, length, group]))[:3]


def _gib(count: float) -> str:
    return f"{count / GIB:.1f}" if count >= GIB / 20 else f"{count / GIB:.3f}"
