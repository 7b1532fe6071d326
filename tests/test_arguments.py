"""The training section as TRL's arguments: names, defaults, precision and optimizers."""

import logging

import pytest
import torch
from conftest import split_flags
from test_recipe import MINIMAL

from gtpo.errors import RecipeError
from gtpo.models.backends import precision
from gtpo.recipe import command_line as cli
from gtpo.runs.arguments import training_arguments


@pytest.fixture
def recipe(tmp_path):
    """A function that makes a recipe from flags."""
    (tmp_path / "r.yaml").write_text(MINIMAL)
    return lambda *flags: cli.read_recipe([str(tmp_path / "r.yaml"), *split_flags(*flags)])


NO_TRACKER = "--training.report_to none"


def test_documented_keys_become_trls(recipe, tmp_path):
    flags = (
        "--training.warmup_ratio 0.1 --model.random_seed 11 --run-name r"
        " --training.temperature 0.5 --model.max_seq_length 300 --training.max_prompt_length 100"
    )
    arguments = training_arguments(recipe(NO_TRACKER, flags), str(tmp_path))
    expected = {
        "warmup_steps": 0.1,
        "seed": 11,
        "run_name": "r",
        "temperature": 0.5,
        "max_completion_length": 200,
        "output_dir": str(tmp_path),
        "loss_type": "grpo",
        "scale_rewards": "none",
        "beta": 0.0,
        "learning_rate": 1e-6,
        "adam_beta1": 0.999999,
        "max_grad_norm": 0.1,
        "per_device_train_batch_size": 8,
        "num_generations": 8,
    }
    assert {name: getattr(arguments, name) for name in expected} == expected


def test_what_a_recipe_leaves_out_has_trls_own_default(recipe, tmp_path):
    import trl

    plain = trl.GRPOConfig(
        output_dir="x", bf16=False, use_cpu=True, report_to="none", per_device_train_batch_size=8
    )
    ours = training_arguments(recipe(NO_TRACKER), str(tmp_path))
    names = (
        "temperature", "top_p", "epsilon", "delta", "gradient_checkpointing", "num_iterations",
        "save_strategy", "vllm_importance_sampling_correction", "shuffle_dataset",
        "mask_truncated_completions", "adam_epsilon",
    )  # fmt: skip
    for name in names:
        assert getattr(ours, name) == getattr(plain, name), name


def test_on_a_cpu_the_precision_is_float32_and_an_8_bit_optimizer_is_replaced_with_a_warning(
    recipe, tmp_path, caplog
):
    with caplog.at_level(logging.WARNING):
        arguments = training_arguments(recipe(NO_TRACKER), str(tmp_path))
    assert not arguments.bf16 and not arguments.fp16 and arguments.optim == "adamw_torch"
    assert (
        "training.optimizer: paged_adamw_8bit needs an NVIDIA GPU; adamw_torch is used instead"
        in caplog.text
    )


@pytest.mark.parametrize(
    "has_bf16, flags, expected",
    [
        (True, "", "bf16"),
        (False, "", "fp16"),
        (True, "--training.fp16 true", "fp16"),
        (False, "--training.bf16 true", "bf16"),
        (True, "--training.bf16 false", "fp16"),
        (True, "--training.fp16 false", "bf16"),
        (True, "--training.bf16 false --training.fp16 false", "float32"),
    ],
)
def test_a_gpu_trains_in_its_best_precision_unless_the_recipe_decides(
    recipe, monkeypatch, has_bf16, flags, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has_bf16)
    assert precision(recipe(*flags.split()).training) == expected


def test_without_auto_an_8_bit_optimizer_on_a_cpu_is_refused(recipe, tmp_path):
    with pytest.raises(
        RecipeError,
        match="training.optimizer: paged_adamw_8bit needs an NVIDIA GPU; use adamw_torch",
    ):
        training_arguments(recipe("--model.backend transformers"), str(tmp_path))


def test_an_option_that_trl_refuses_is_one_sentence(recipe, tmp_path):
    with pytest.raises(RecipeError, match="training: TRL refuses this section"):
        training_arguments(
            recipe(NO_TRACKER, "--training.auto_find_batch_size true"), str(tmp_path)
        )
