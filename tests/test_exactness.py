"""The same rollouts give the same update: with one, two or four processes, and in micro-batches."""

import subprocess
import sys

import injected
import pytest
import torch
from conftest import ROOT
from gradients import relative_error

pytestmark = pytest.mark.slow  # starts several processes


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict:
    """The results of tests/injected.py, by number of processes and case.

    "fsdp" has those of two processes with FSDP. "straight" and "passed_on" have those of a run that
    other numbers of processes continue.
    """
    folder = tmp_path_factory.mktemp("exactness")
    run = subprocess.run(
        [sys.executable, str(ROOT / "tests/injected.py"), str(folder), "2", "4"],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "FSDP, 2 processes" in run.stdout, run.stderr[-4000:]
    return {
        **{count: torch.load(folder / f"{count}.pt") for count in (1, 2, 4, "fsdp")},
        **{name: torch.load(folder / f"passed/{name}.pt") for name in ("straight", "passed_on")},
    }


@pytest.mark.parametrize("processes", [2, 4])
@pytest.mark.parametrize("case", injected.CASES)
def test_several_processes_make_the_update_of_one(results, case, processes):
    one, several = results[1][case], results[processes][case]
    assert several["processes"] == processes and len(one["lora"]) == len(several["lora"]) >= 3
    distances = injected.distances(one, several)
    assert distances.pop("lambda") == 0 and max(distances.values()) < 1e-6, distances


@pytest.mark.parametrize("case", ["adamw", "filtered"])
def test_a_model_sharded_over_two_processes_gets_the_same_update_and_is_saved_whole(results, case):
    one, sharded = results[1][case], results["fsdp"][case]
    distances = injected.distances(one, sharded)
    assert distances.pop("lambda") == 0 and max(distances.values()) < 1e-6, distances
    adapter = sharded["lora"][-1]
    assert one["saved"] is None and adapter.keys() == one["lora"][-1].keys()
    saved = {name: sharded["saved"][name] for name in adapter}
    assert injected.largest_difference(saved, adapter) == 0


def test_the_rollouts_contain_the_hard_cases(results):
    one, two, four = (results[count]["adamw"] for count in (1, 2, 4))
    widths = [set(result["widths"]) for result in (one, two, four)]
    assert widths == [{7}, {6, 7}, {3, 4, 6, 7}]
    assert {-1.0, 1.0} <= set(one["signs"][0]) and len(set(one["lengths"][0])) > 4
    weights = [weight for rollout in one["token_weights"] for row in rollout for weight in row]
    assert {0.0, 1.0, 2.0} == set(weights)
    filtered = results[1]["filtered"]["filtered"]
    assert 0 < min(filtered) and max(filtered) < 1
    for case in results[1].values():
        for step in case["gradients"]:
            assert torch.cat([g.flatten() for g in step.values()]).norm() > 1e-3


def test_a_run_that_one_then_two_then_four_processes_continue_is_that_of_one_process(results):
    straight, passed_on = results["straight"], results["passed_on"]
    # It was restored, not measured again.
    assert straight["initial_entropy"] == passed_on["initial_entropy"]
    assert injected.largest_difference(straight["lora"], passed_on["lora"]) < 1e-6
    # The weights have moved since the first step.
    assert injected.largest_difference(results[1]["adamw"]["lora"][0], straight["lora"]) > 1e-3


def test_a_difference_would_be_noticed(results):
    one, two = results[1], results[2]
    assert injected.distances(one["adamw"], two["filtered"])["LoRA"] > 1e-3
    assert (
        injected.distances(
            {**one["adamw"], "token_weights": one["adamw"]["token_weights"][::-1]}, two["adamw"]
        )["lambda"]
        == 1
    )


@pytest.mark.parametrize("parts", [2, 4])
def test_prompts_in_micro_batches_give_the_gradient_of_all_at_once(parts):
    """8 prompts of 8 completions: as 2 x 4 prompts and as 4 x 2."""
    options = {"rows": 64, "max_steps": 1, "optim": "sgd"}
    at_once = injected.train(injected.GTPO, **options)
    in_parts = injected.train(injected.GTPO, gradient_accumulation_steps=parts, **options)
    assert (
        at_once["token_weights"] == in_parts["token_weights"]
        and at_once["prompts"] == in_parts["prompts"]
    )
    assert at_once["initial_entropy"] == pytest.approx(in_parts["initial_entropy"], abs=1e-6)
    assert relative_error(in_parts["gradients"][0], at_once["gradients"][0]) < 1e-6
