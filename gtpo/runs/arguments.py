"""A recipe's `training` section as `trl.GRPOConfig`. Only this module knows both vocabularies."""

import dataclasses
import importlib.util
import logging
from pathlib import Path
from typing import Any

from gtpo.errors import RecipeError
from gtpo.models.backends import precision
from gtpo.recipe import Recipe
from gtpo.recipe.batch import batch_plan, log_batch_plan
from gtpo.recipe.sections import DocumentedTraining
from gtpo.system.processes import connect_on_cpu
from gtpo.system.trl_options import grpo_options

logger = logging.getLogger(__name__)

# Parts of the names that transformers gives to optimizers of bitsandbytes.
NEEDS_GPU = ("8bit", "4bit", "paged", "bnb", "32bit")


def policy_options(recipe: Recipe) -> dict[str, Any]:
    """The keyword arguments of `backends.load_policy` for a policy that trains."""
    adapter = recipe.model.adapter
    return {
        "seed": recipe.seed,
        "precision": precision(recipe.training),
        "gradient_checkpointing": recipe.training.trl_options().get("gradient_checkpointing", True),
        "adapter": adapter and Path(adapter),
    }


def training_arguments(
    recipe: Recipe, output_dir: str, *, processes: int = 1, use_vllm: bool = False
):
    """The `trl.GRPOConfig` of a recipe, with every value stated that matters.

    If there are several processes on CPUs, they are connected first, with the recipe's timeout:
    transformers 5.17.0 does not pass it on. Raises RecipeError for what TRL refuses, and for what
    this machine lacks.
    """
    import trl

    plan = batch_plan(recipe, processes)
    log_batch_plan(recipe, plan, processes)
    options = _options(recipe, plan.per_device, output_dir, use_vllm)
    if options["use_vllm"] and importlib.util.find_spec("vllm") is None:
        raise RecipeError(
            "training.use_vllm", "the package vllm is not installed; install it, or leave this out"
        )
    connect_on_cpu(timeout=options["ddp_timeout"])
    try:
        arguments = trl.GRPOConfig(**options)
    except (ValueError, TypeError, ImportError, OSError) as error:
        raise RecipeError(
            "training", f"TRL refuses this section ({' '.join(str(error).split())})"
        ) from error
    # With several GPUs in one process torch's DataParallel would multiply the planned batch.
    if arguments.n_gpu > 1:
        logger.warning(
            "[GTPO] One of %d visible GPUs is used; start with torchrun to use them all",
            arguments.n_gpu,
        )
        arguments._n_gpu = 1
    return arguments


def _options(recipe: Recipe, per_device: int, output_dir: str, use_vllm: bool) -> dict[str, Any]:
    """The arguments of GRPOConfig by name. A later line wins over an earlier one."""
    import torch

    training = recipe.training
    documented_names = [name for name in DocumentedTraining.model_fields if name in grpo_options()]
    return {
        **_trl_defaults(),
        **{name: getattr(training, name) for name in documented_names},
        "output_dir": output_dir,
        "run_name": recipe.run_name,
        "seed": recipe.seed,
        "warmup_steps": training.warmup_ratio,  # transformers reads a value below 1 as the ratio
        "per_device_train_batch_size": per_device,
        "max_completion_length": recipe.max_completion_length,
        "use_cpu": not torch.accelerator.is_available(),
        "use_vllm": use_vllm,
        "vllm_gpu_memory_utilization": recipe.model.gpu_memory_utilization,
        "ddp_find_unused_parameters": False,  # there are none, and the search takes time
        "trust_remote_code": recipe.model.trust_remote_code,
        "project": recipe.wandb.project,
        **training.trl_options(),
        "optim": _optimizer(recipe),
        "bf16": precision(training) == "bf16",
        "fp16": precision(training) == "fp16",
    }


def _trl_defaults() -> dict[str, Any]:
    """The defaults of trl.GRPOConfig itself.

    Unsloth's generated configuration class has others, for instance 2 accumulation steps.
    """
    import trl

    own = next(c for c in trl.GRPOConfig.__mro__ if c.__module__ == "trl.trainer.grpo_config")
    return {
        f.name: f.default if f.default is not dataclasses.MISSING else f.default_factory()
        for f in dataclasses.fields(own)
        if f.init
    }


def _optimizer(recipe: Recipe) -> str:
    """The recipe's optimizer; adamw_torch if that needs a GPU and the backend is `auto`."""
    import torch

    key = "optim" if "optim" in recipe.training.model_fields_set else "optimizer"
    name = getattr(recipe.training, key)
    if torch.cuda.is_available() or not any(part in name for part in NEEDS_GPU):
        return name
    if recipe.model.backend != "auto":
        raise RecipeError(f"training.{key}", f"{name} needs an NVIDIA GPU; use adamw_torch")
    logger.warning("training.%s: %s needs an NVIDIA GPU; adamw_torch is used instead", key, name)
    return "adamw_torch"
