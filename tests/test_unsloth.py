"""The trainer that Unsloth generates, on a CPU, with the same tiny policy and objective."""

import importlib.util
import json
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("unsloth") is None,
        reason="unsloth is not installed; make test installs it from requirements-unsloth-cpu.txt",
    ),
]

CASES = {
    "several groups, accumulation": {},
    "the gate on, a peaked policy": {"peaked": 4.0, "threshold": 0.5},
    "padding is the end token": {"pad": "^"},
    "one group, one micro-batch": {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
    },
    "groups spread over micro-batches": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
    },
    "two optimizer steps share a rollout": {
        "steps_per_generation": 4,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-12,
    },
    "another token ends a turn, and one end is padding": {
        "pad": "^",
        "generation_kwargs": {"eos_token_id": [2, 1], "suppress_tokens": [0]},
    },
    "the padding token is sampled within completions": {"generation_kwargs": {}},
}


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> dict:
    """What tests/gradients.py prints.

    It runs in a process of its own, because importing Unsloth replaces TRL's trainers.
    """
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests/gradients.py"), json.dumps(list(CASES.values()))],
        cwd=tmp_path_factory.mktemp("unsloth"),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    line = next(line for line in run.stdout.splitlines() if line.startswith("FIGURES "))
    return json.loads(line.removeprefix("FIGURES "))


@pytest.mark.parametrize("case", range(len(CASES)), ids=list(CASES))
def test_gradients_agree_with_the_float64_objective(figures, case):
    of_case = figures["cases"][case]
    assert "UnslothGRPOTrainer" in of_case["class"]
    assert of_case["gradient_error"] < 1e-5
    assert of_case["initial_entropy"] == pytest.approx(of_case["initial_entropy_float64"], rel=1e-5)
    # The head streams in the pass for the initial entropy, and in the loss.
    assert of_case["conflicts"] > 0 and of_case["streamed"] > 1


def test_the_streaming_head_replaces_unsloths_where_it_computes_the_same(figures):
    heads = figures["heads"]
    replaced = [case["options"] for case in heads if case["ours"]]
    assert replaced == [[], ["temperature"]] and len(heads) == 9
    assert all(case["error"] < (1e-5 if case["ours"] else 1e-12) for case in heads)


def test_the_cases_exercise_unequal_prompts_several_groups_and_the_gate(figures):
    several, gated, _, one, *_ = figures["cases"]
    assert len(several["prompt_lengths"]) > 1 and len(several["lengths"]) > 1
    assert several["groups"] == 4 and one["groups"] == 1
    assert gated["filtered"] > 0


def test_without_lambda_gate_and_penalty_a_step_is_grpos(figures):
    assert figures["distance_from_grpo"] < 1e-6


def test_failed_rewards_and_non_finite_gradients_leave_finite_weights(figures):
    for class_path, of_class in figures["failures"].items():
        first, second, third = of_class["cannot_judge"]
        assert 0 < first < 8 and second == third == first + 16, class_path
        some, none, all_ = of_class["advantages"]
        assert none == 0 < some < all_ == 16, class_path
        assert of_class["largest"][0] > 0 == of_class["largest"][1], class_path
        assert of_class["skipped"] == 1 and of_class["finite"], class_path


def test_completions_are_recorded_with_the_entropies_of_their_own_tokens(figures):
    """Unsloth's loss has other columns than the completion, and takes padding ids for padding.

    The end token is recorded like every other token, also where it is the padding token.
    """
    expected = [(step, group, row) for step in (1, 2) for group in range(4) for row in range(4)]
    for run in figures["recorded"][:2]:
        lines = run["lines"]
        assert [(line["step"], line["group"], line["row"]) for line in lines] == expected
        assert len({len(line["ids"]) for line in lines}) > 1
        assert len({line["prompt"] for line in lines}) > 1
        assert run["entropy_error"] < 6e-4
        for line in lines:
            assert len(line["weights"]) == len(line["entropies"]) == len(line["ids"])
            assert None not in line["entropies"]
        assert any(line["tokens"][-1] == "^" for line in run["lines"])


def test_unsloths_own_grpo_is_recorded_without_entropies(figures):
    for line in figures["recorded"][2]["lines"]:
        assert line["ids"] and line["weights"] is None
        assert line["entropy"] is None and line["entropies"] is None
        assert isinstance(line["reward"], float) and isinstance(line["prefix"], int)


def test_the_recipes_compile_options_reach_the_generated_trainer(figures):
    assert figures["compile_options"] == {
        "shape_padding": False,
        "trace.enabled": True,
        "max_autotune": False,
    }


def test_unsloth_still_takes_the_arguments_that_the_backend_gives_it(figures):
    """FastLanguageModel needs a GPU, but its signature can be read without one."""
    load = "model_name max_seq_length load_in_4bit fast_inference max_lora_rank"
    load += " gpu_memory_utilization trust_remote_code random_state"
    lora = "r lora_alpha target_modules lora_dropout bias use_rslora modules_to_save kwargs"
    lora += " use_gradient_checkpointing random_state"
    assert set(load.split()) <= set(figures["from_pretrained"])
    assert set(lora.split()) <= set(figures["get_peft_model"])


def test_a_resumed_run_is_the_run_it_would_have_been(figures):
    assert figures["resumed"] == []
