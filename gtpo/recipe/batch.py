"""What follows from a recipe's numbers: completions, prompts and optimizer steps.

G is `training.num_generations`, the number of completions in a group.
"""

import logging
import math
from typing import NamedTuple

from gtpo.errors import RecipeError
from gtpo.recipe.recipe import Recipe

logger = logging.getLogger(__name__)


class BatchPlan(NamedTuple):
    """How many completions and prompts one optimizer step sees."""

    per_device: int  # completions per device and micro-batch, after raising
    requested: int  # the same, as the recipe has it
    steps_per_generation: int  # micro-batches that one rollout is split into
    prompts_per_step: float  # per optimizer step, over all devices and accumulation steps
    prompts_per_rollout: int  # sampled at once, over all devices


class OptimizerSteps(NamedTuple):
    """The number of optimizer steps of a run, and a note on where it comes from."""

    count: int
    note: str  # empty where the recipe itself sets the number


def batch_plan(recipe: Recipe, processes: int = 1) -> BatchPlan:
    """The batch that holds whole groups.

    Completions per device x processes x steps per generation must be a multiple of G. The
    per-device batch is raised to the next value for which that holds. It is never lowered. Raises
    RecipeError if training.generation_batch_size fixes the product at a value that does not fit.
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
        per_device=per_device,
        requested=requested,
        steps_per_generation=steps,
        prompts_per_step=completions / size,
        prompts_per_rollout=per_device * processes * steps // size,
    )


def log_batch_plan(recipe: Recipe, plan: BatchPlan, processes: int = 1) -> None:
    """Log one line if the batch was raised, and one if several processes share a prompt."""
    size = recipe.training.num_generations
    prompts = f"{plan.prompts_per_step:g} prompt{'' if plan.prompts_per_step == 1 else 's'}"
    if plan.per_device != plan.requested:
        logger.warning(
            "training.per_device_train_batch_size raised from %d to %d completions: a group of %d"
            " generations must fit, so one step trains on %s x %d generations",
            plan.requested,
            plan.per_device,
            size,
            prompts,
            size,
        )
    if plan.prompts_per_step < processes:
        logger.info(
            "%d processes share %s per step; training.per_device_train_batch_size %d would give"
            " each one of its own",
            processes,
            prompts,
            size,
        )


def optimizer_steps(
    recipe: Recipe, problems: int | None, processes: int = 1
) -> OptimizerSteps | None:
    """The optimizer steps of a run: training.max_steps, or an estimate from the number of problems.

    None if the recipe has no max_steps and the number of problems is not known yet (None).
    """
    training = recipe.training
    max_steps = training.trl_options().get("max_steps") or -1
    if max_steps > 0:
        return OptimizerSteps(max_steps, note="")
    if problems is None:
        return None
    plan = batch_plan(recipe, processes)
    rollouts = problems // plan.prompts_per_rollout
    micro_batches = rollouts * plan.steps_per_generation * training.num_iterations
    steps_per_epoch = micro_batches / training.gradient_accumulation_steps
    count = max(1, round(steps_per_epoch * training.num_train_epochs))
    return OptimizerSteps(count, note=f"estimated from {problems} problems")


def check_enough_problems(recipe: Recipe, problems: int, processes: int) -> None:
    """Raises RecipeError if the problems do not fill one rollout.

    TRL leaves incomplete rollouts out, so such a run would train on nothing.
    """
    needed = batch_plan(recipe, processes).prompts_per_rollout
    if problems < needed:
        raise RecipeError(
            "dataset",
            f"{problems} problems are left, and one rollout takes {needed}; lower "
            "training.per_device_train_batch_size or gradient_accumulation_steps",
        )
