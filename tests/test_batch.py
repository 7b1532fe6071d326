"""The numbers that follow from a recipe: batches that hold whole groups, and optimizer steps."""

import logging

import pytest
from test_recipe import MINIMAL

from gtpo.errors import RecipeError
from gtpo.recipe import command_line as cli
from gtpo.recipe.batch import (
    OptimizerSteps,
    batch_plan,
    check_enough_problems,
    log_batch_plan,
    optimizer_steps,
)


@pytest.fixture
def recipe(tmp_path):
    """Makes a recipe with the given keys of its section `training`."""

    def make(**training: int):
        (tmp_path / "r.yaml").write_text(MINIMAL)
        flags = [f"--training.{name}={value}" for name, value in training.items()]
        return cli.read_recipe([str(tmp_path / "r.yaml"), *flags])

    return make


@pytest.mark.parametrize(
    "per_device, accumulation, generations, processes, expected",
    [
        (1, 1, 8, 1, 8),  # the documented recipe: one prompt per step
        (2, 4, 8, 1, 2),  # right as it is
        (8, 1, 8, 1, 8),
        (9, 1, 8, 1, 16),
        (3, 2, 8, 1, 4),
        (1, 1, 8, 2, 4),
        (1, 4, 8, 2, 1),
        (5, 1, 12, 3, 8),
        (6, 1, 4, 1, 8),
    ],
)
def test_a_batch_is_raised_to_the_next_size_that_holds_whole_groups(
    recipe, per_device, accumulation, generations, processes, expected
):
    flags = {
        "per_device_train_batch_size": per_device,
        "gradient_accumulation_steps": accumulation,
        "num_generations": generations,
    }
    plan = batch_plan(recipe(**flags), processes)
    assert plan.per_device == expected and plan.per_device >= per_device
    assert plan.per_device * processes * accumulation % generations == 0
    smaller = range(per_device, plan.per_device)
    assert not any(size * processes * accumulation % generations == 0 for size in smaller)
    assert plan.prompts_per_step == expected * processes * accumulation / generations


def test_a_raised_batch_is_reported_in_one_line_and_only_then(recipe, caplog):
    raised = recipe()
    log_batch_plan(raised, batch_plan(raised))
    assert caplog.messages == [
        "training.per_device_train_batch_size raised from 1 to 8 completions: a group of 8"
        " generations must fit, so one step trains on 1 prompt x 8 generations"
    ]
    caplog.clear()
    right = recipe(per_device_train_batch_size=2, gradient_accumulation_steps=4)
    log_batch_plan(right, batch_plan(right))
    assert caplog.messages == []


def test_processes_that_share_a_prompt_are_reported_with_the_batch_that_avoids_it(recipe, caplog):
    shared, own = recipe(), recipe(per_device_train_batch_size=8)
    with caplog.at_level(logging.INFO):
        log_batch_plan(shared, batch_plan(shared, 8), 8)
        log_batch_plan(own, batch_plan(own, 8), 8)
    assert caplog.messages == [
        "8 processes share 1 prompt per step; training.per_device_train_batch_size 8 would give"
        " each one of its own"
    ]


def test_steps_per_generation_counts_instead_of_accumulation(recipe):
    plan = batch_plan(recipe(per_device_train_batch_size=2, steps_per_generation=4))
    assert (plan.per_device, plan.steps_per_generation, plan.prompts_per_step) == (2, 4, 0.25)


def test_a_generation_batch_that_cannot_hold_groups_is_refused(recipe):
    not_a_multiple = "generation_batch_size: 12 must be a multiple of num_generations"
    with pytest.raises(RecipeError, match=not_a_multiple):
        batch_plan(recipe(generation_batch_size=12))
    with pytest.raises(RecipeError, match="given together with training.steps_per_generation"):
        batch_plan(recipe(generation_batch_size=16, steps_per_generation=2))
    plan = batch_plan(recipe(generation_batch_size=16, per_device_train_batch_size=4))
    assert plan.steps_per_generation == 4


def test_max_steps_is_the_number_of_steps(recipe):
    steps = optimizer_steps(recipe(max_steps=7), None)
    assert steps == OptimizerSteps(7, note="")


def test_steps_are_estimated_from_the_number_of_problems(recipe):
    two_epochs = recipe(num_train_epochs=2)
    steps = optimizer_steps(two_epochs, 100)  # 1 prompt per step
    assert steps == OptimizerSteps(200, note="estimated from 100 problems")
    eight_prompts = recipe(num_train_epochs=2, per_device_train_batch_size=64)
    assert optimizer_steps(eight_prompts, 2000).count == 500
    assert optimizer_steps(eight_prompts, 2000, processes=2).count == 250
    assert optimizer_steps(eight_prompts, 9).count == 2  # the incomplete rollout is left out


def test_steps_are_unknown_before_the_problems_are_counted(recipe):
    assert optimizer_steps(recipe(), None) is None


def test_problems_that_do_not_fill_a_rollout_are_refused(recipe):
    eight_prompts = recipe(per_device_train_batch_size=64)
    check_enough_problems(eight_prompts, 8, processes=1)
    with pytest.raises(RecipeError, match="7 problems are left, and one rollout takes 8; lower"):
        check_enough_problems(eight_prompts, 7, processes=1)
    with pytest.raises(RecipeError, match="8 problems are left, and one rollout takes 16; lower"):
        check_enough_problems(eight_prompts, 8, processes=2)
