"""The same rollouts give the same update: with one, two and four processes, at once and in
micro-batches.
"""

import subprocess
import sys

import injected
import pytest
import torch
from conftest import ROOT
from gradients import relative_error

pytestmark = pytest.mark.slow  # starts several processes


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What one, two and four gloo processes made of the same rollouts, by the number of processes
    and the case; and of a run that is passed on.
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
def test_several_processes_make_the_update_of_one(found, case, processes):
    one, several = found[1][case], found[processes][case]
    assert several["processes"] == processes and len(one["lora"]) == len(several["lora"]) >= 3
    distances = injected.distances(one, several)
    assert distances.pop("lambda") == 0 and max(distances.values()) < 1e-6, distances


@pytest.mark.parametrize("case", ["adamw", "filtered"])
def test_a_model_spread_over_two_processes_gets_that_update_too_and_is_saved_whole(found, case):
    one, spread = found[1][case], found["fsdp"][case]
    distances = injected.distances(one, spread)
    assert distances.pop("lambda") == 0 and max(distances.values()) < 1e-6, distances
    assert {name: spread["saved"][name] for name in spread["lora"][-1]}.keys() == one["lora"][
        -1
    ].keys() and one["saved"] is None
    assert (
        injected.largest_difference(
            {name: spread["saved"][name] for name in one["lora"][-1]}, spread["lora"][-1]
        )
        == 0
    )


def test_the_rollouts_are_hard_cases(found):
    one, two, four = (found[count]["adamw"] for count in (1, 2, 4))
    assert (
        set(one["widths"]) == {7}
        and set(two["widths"]) == {6, 7}
        and set(four["widths"]) == {3, 4, 6, 7}
    )
    assert {-1.0, 1.0} <= set(one["signs"][0]) and len(set(one["lengths"][0])) > 4
    weights = [weight for rollout in one["token_weights"] for row in rollout for weight in row]
    assert {0.0, 1.0, 2.0} == set(weights)
    assert 0 < min(found[1]["filtered"]["filtered"]) and max(found[1]["filtered"]["filtered"]) < 1
    assert all(
        torch.cat([g.flatten() for g in step.values()]).norm() > 1e-3
        for case in found[1].values()
        for step in case["gradients"]
    )


def test_a_run_passed_on_from_one_process_to_two_to_four_and_back_is_that_of_one(found):
    straight, passed_on = found["straight"], found["passed_on"]
    # kept, and not measured again
    assert straight["initial_entropy"] == passed_on["initial_entropy"]
    assert injected.largest_difference(straight["lora"], passed_on["lora"]) < 1e-6
    # something was learnt since
    assert injected.largest_difference(found[1]["adamw"]["lora"][0], straight["lora"]) > 1e-3


def test_a_difference_would_be_seen(found):
    one, two = found[1], found[2]
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
