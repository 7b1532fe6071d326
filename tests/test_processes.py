"""A group that is spread over two processes gets the weights of the whole group."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.slow  # starts several processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> list[dict]:
    """What each of the two processes measured."""
    folder = tmp_path_factory.mktemp("processes")
    run = subprocess.run(
        [*TORCHRUN, str(ROOT / "tests/two_processes.py")],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads((folder / f"figures-{rank}.json").read_text()) for rank in range(2)]


def test_conflicts_are_those_of_the_whole_group_also_with_unequal_lengths(figures):
    shaping = [of_process["shaping"] for of_process in figures]
    assert len({of_process["width"] for of_process in shaping}) == 2  # lengths do differ
    assert all(of_process["equal"] and of_process["conflicts"] > 0 for of_process in shaping)


def test_a_real_step_decides_lambda_from_both_halves_of_its_group(figures):
    for of_process in figures:
        training = of_process["training"]
        assert training["lambda"] and training["group"] == 8
        assert {-1.0, 1.0} <= set(training["signs"])


def test_both_processes_measure_one_initial_entropy_and_have_the_same_adapter(figures):
    for of_process in figures:
        first, second = of_process["training"]["initial_entropies"]
        assert first == second and of_process["training"]["in_step"]


def test_completions_of_both_processes_are_in_one_file_in_the_order_of_their_groups(figures):
    lines = figures[0]["recorded"]["lines"]
    assert [(line["step"], line["group"], line["row"]) for line in lines] == [
        (step, group, row) for step in (1, 2) for group in range(2) for row in range(8)
    ]
    # Each process has half of each rollout, and there are two rollouts of 16 completions.
    first, second = (of_process["recorded"]["ids"] for of_process in figures)
    expected = first[:8] + second[:8] + first[8:] + second[8:]
    assert [line["ids"] for line in lines] == expected
    assert figures[0]["recorded"]["entropy_error"] < 6e-4


def test_a_function_that_fails_in_one_process_stops_both_after_the_same_step(figures):
    first, second = (of_process["rewards"] for of_process in figures)
    assert first["steps"] == second["steps"] == 4
    assert first["failures"] == second["failures"] == 11
    assert first["scored"] == [[True] * 4] * 4
    assert second["scored"] == [[True] * 4] + [[False] * 4] * 3
    assert first["stopped_by"] == second["stopped_by"]
    assert first["stopped_by"].startswith("Step 4: reward functions failed on 11 of the last")
    # After the eleventh failure the function is not called any more.
    assert [logs["reward/cannot_judge"] for logs in first["logs"]] == [0, 4, 8, 11]
    # From the second step on, the second process has no value to log.
    assert first["logs"][0]["scored/here"] == 4 and first["logs"][1]["scored/here"] is None


def test_a_resumed_run_is_the_run_it_would_have_been_in_both_processes(figures):
    assert [of_process["resumed"] for of_process in figures] == [[], []]
