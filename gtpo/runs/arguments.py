"""Translate a recipe's `training` section into `trl.GRPOConfig`; nobody else knows both
vocabularies.
"""

import dataclasses
import importlib.util
import logging

from gtpo.errors import RecipeError
from gtpo.models.backends import precision
from gtpo.recipe import Recipe
from gtpo.recipe.batch import batch_plan, log_batch_plan
from gtpo.recipe.sections import DocumentedTraining
from gtpo.system.trl_options import grpo_options

logger = logging.getLogger(__name__)

# how transformers names bitsandbytes' optimizers
NEEDS_GPU = ("8bit", "4bit", "paged", "bnb", "32bit")


def training_arguments(
    recipe: Recipe, output_dir: str, *, processes: int = 1, use_vllm: bool = False
):
    """TRL's arguments for `recipe`, every value that matters stated; raises RecipeError for what
    this machine lacks.
    """
    import torch
    import trl

    training, plan = recipe.training, batch_plan(recipe, processes)
    log_batch_plan(recipe, plan, processes)
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
