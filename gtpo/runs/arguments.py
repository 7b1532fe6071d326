"""Translate a recipe's `training` section into `trl.GRPOConfig`; nobody else knows both
vocabularies.
"""

import dataclasses
import importlib.util
import logging
import math
from typing import NamedTuple

from gtpo.errors import RecipeError
from gtpo.recipe import Recipe
from gtpo.recipe.sections import DocumentedTraining
from gtpo.system.trl_options import grpo_options

logger = logging.getLogger(__name__)

# how transformers names bitsandbytes' optimizers
NEEDS_GPU = ("8bit", "4bit", "paged", "bnb", "32bit")


class BatchPlan(NamedTuple):
    """How many completions and prompts one optimizer step sees."""

    per_device: int  # completions per device and micro-batch, after raising
    requested: int
    steps_per_generation: int
    prompts_per_step: float  # over all devices and accumulation steps
    prompts_per_rollout: int  # over all devices; what is sampled at once


def batch_plan(recipe: Recipe, processes: int = 1) -> BatchPlan:
    """The batch that holds whole groups: completions per device x processes x steps per generation,
    a multiple of G.

    The per-device batch is raised to the next value for which that holds, never lowered. Raises
    RecipeError where training.generation_batch_size fixes the product at one that does not fit.
    """
    training, size = recipe.training, recipe.training.num_generations
    requested, given = training.per_device_train_batch_size, training.trl_options()
    rollout = given.get("generation_batch_size")
    if rollout is not None:
        if given.get("steps_per_generation") is not None:
            raise RecipeError(
                "training.generation_batch_size",
                "given together with training.steps_per_generation, "
                "which follows from it; keep one",
            )
        if rollout % (requested * processes) or rollout % size:
            raise RecipeError(
                "training.generation_batch_size",
                f"{rollout} must be a multiple of num_generations ({size}) "
                f"and of the completions of all devices ({requested * processes})",
            )
        steps, per_device = rollout // (requested * processes), requested
    else:
        steps = given.get("steps_per_generation") or training.gradient_accumulation_steps
        multiple = size // math.gcd(size, processes * steps)
        per_device = -(-requested // multiple) * multiple  # rounded up
    completions = per_device * processes * training.gradient_accumulation_steps
    return BatchPlan(
        per_device, requested, steps, completions / size, per_device * processes * steps // size
    )


def steps(recipe: Recipe, plan: BatchPlan, rows: int | None) -> str | None:
    """How many optimizer steps a run takes, as far as it can be known: from max_steps, or from the
    rows of a local file.
    """
    training = recipe.training
    if (training.trl_options().get("max_steps") or -1) > 0:
        return str(training.max_steps)
    if rows is None:
        return None
    micro_batches = (
        rows // plan.prompts_per_rollout * plan.steps_per_generation * training.num_iterations
    )
    per_epoch = micro_batches / training.gradient_accumulation_steps
    return (
        f"about {per_epoch * training.num_train_epochs:.0f} ({rows} rows, before the length filter)"
    )


def say_batch_plan(recipe: Recipe, plan: BatchPlan, processes: int = 1) -> None:
    """One line if the batch was raised: from what to what, and what it means in prompts; and one if
    processes share a prompt.
    """
    size = recipe.training.num_generations
    if plan.per_device != plan.requested:
        logger.warning(
            "training.per_device_train_batch_size raised from %d to %d completions: a group of %d"
            " generations must fit, so one step trains on %g prompt%s x %d generations",
            plan.requested,
            plan.per_device,
            size,
            plan.prompts_per_step,
            "" if plan.prompts_per_step == 1 else "s",
            size,
        )
    if plan.prompts_per_step < processes:
        logger.info(
            "%d processes share %g prompt%s per step; training.per_device_train_batch_size %d would"
            " give each one of its own",
            processes,
            plan.prompts_per_step,
            "" if plan.prompts_per_step == 1 else "s",
            size,
        )


def training_arguments(
    recipe: Recipe, output_dir: str, *, processes: int = 1, use_vllm: bool = False
):
    """TRL's arguments for `recipe`, every value that matters stated; raises RecipeError for what
    this machine lacks.
    """
    import torch
    import trl

    training, plan = recipe.training, batch_plan(recipe, processes)
    say_batch_plan(recipe, plan, processes)
    documented = {
        name: getattr(training, name)
        for name in DocumentedTraining.model_fields
        if name in grpo_options()
    }
    options = {
        **_trl_defaults(),
        **documented,
        "output_dir": output_dir,
        "run_name": recipe.run_name,
        "seed": recipe.seed,
        "warmup_steps": training.warmup_ratio,  # below 1 it is read as the ratio
        "per_device_train_batch_size": plan.per_device,
        "max_completion_length": recipe.max_completion_length,
        "use_cpu": not torch.accelerator.is_available(),
        "use_vllm": use_vllm,
        "vllm_gpu_memory_utilization": recipe.model.gpu_memory_utilization,
        "ddp_find_unused_parameters": False,  # there are none, and looking for them costs
        "trust_remote_code": recipe.model.trust_remote_code,
        "project": recipe.wandb.project,
        **training.trl_options(),
        "optim": _optimizer(recipe),
        "bf16": precision(training) == "bf16",
        "fp16": precision(training) == "fp16",
    }
    if options["use_vllm"] and importlib.util.find_spec("vllm") is None:
        raise RecipeError(
            "training.use_vllm", "the package vllm is not installed; install it, or leave this out"
        )
    try:
        arguments = trl.GRPOConfig(**options)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise RecipeError(
            "training", f"TRL refuses this section ({' '.join(str(error).split())})"
        ) from error
    # torch's DataParallel would multiply the batch behind the plan above
    if arguments.n_gpu > 1:
        logger.warning(
            "[GTPO] One of %d visible GPUs is used; start with torchrun to use them all",
            arguments.n_gpu,
        )
        arguments._n_gpu = 1
    return arguments


def _trl_defaults() -> dict:
    """TRL's own defaults: Unsloth's generated configuration class has others (2 accumulation steps,
    for one).
    """
    import trl

    own = next(c for c in trl.GRPOConfig.__mro__ if c.__module__ == "trl.trainer.grpo_config")
    return {
        f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(own)
        if f.init
    }


def answer_timeout(recipe: Recipe) -> float:
    """How long a process waits for the others, in seconds."""
    return recipe.training.trl_options().get(
        "ddp_timeout", int(grpo_options()["ddp_timeout"].default)
    )


def precision(training: DocumentedTraining) -> str:
    """bf16, fp16 or float32: the best this device has, unless training.bf16 or training.fp16
    decides.

    A true asks for that precision, a false rules it out. On a CPU it is float32 unless asked
    otherwise.
    """
    import torch

    given = training.trl_options()
    for name in ("bf16", "fp16"):
        if given.get(name):
            return name
    if not torch.cuda.is_available():
        return "float32"
    has = {"bf16": torch.cuda.is_bf16_supported(including_emulation=False), "fp16": True}
    return next(
        (name for name in ("bf16", "fp16") if has[name] and given.get(name) is not False), "float32"
    )


def _optimizer(recipe: Recipe) -> str:
    import torch

    key = "optim" if "optim" in recipe.training.model_fields_set else "optimizer"
    name = getattr(recipe.training, key)
    if torch.cuda.is_available() or not any(part in name for part in NEEDS_GPU):
        return name
    if recipe.model.backend != "auto":
        raise RecipeError(f"training.{key}", f"{name} needs an NVIDIA GPU; use adamw_torch")
    logger.warning("training.%s: %s needs an NVIDIA GPU; adamw_torch is used instead", key, name)
    return "adamw_torch"
