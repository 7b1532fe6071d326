"""Groups spread over two processes give the weights of the whole group."""

import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.fixture(scope="module")
def figures(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("processes")
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node",
            "2",
            str(ROOT / "tests/two_processes.py"),
        ],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads((folder / f"figures-{rank}.json").read_text()) for rank in range(2)]


def test_weights_are_those_of_the_whole_group_also_with_unequal_lengths(figures):
    # the processes did hold different widths
    assert len({f["shaping"]["width"] for f in figures}) == 2
    assert all(f["shaping"]["equal"] and f["shaping"]["conflicts"] > 0 for f in figures)


def test_a_real_step_decides_lambda_from_both_halves_of_its_group(figures):
    for found in figures:
        assert found["training"]["lambda"] and found["training"]["group"] == 8
        assert {-1.0, 1.0} <= set(found["training"]["signs"])


def test_both_processes_measure_one_initial_entropy_and_stay_in_step(figures):
    for found in figures:
        first, second = found["training"]["initial_entropies"]
        assert first == second and found["training"]["in_step"]


def test_both_processes_completions_are_in_one_file_in_the_order_of_their_groups(figures):
    lines = figures[0]["recorded"]["lines"]
    assert [(line["step"], line["group"], line["row"]) for line in lines] == [
        (step, group, row) for step in (1, 2) for group in range(2) for row in range(8)
    ]
    # each process has half of each rollout
    halves = [found["recorded"]["ids"] for found in figures]
    assert [line["ids"] for line in lines] == halves[0][:8] + halves[1][:8] + halves[0][
        8:
    ] + halves[1][8:]
    assert figures[0]["recorded"]["entropy_error"] < 6e-4


def test_a_function_that_fails_in_one_process_stops_both_after_the_same_step(figures):
    first, second = (found["judged"] for found in figures)
    assert first["steps"] == second["steps"] == 4 and first["failures"] == second["failures"] == 11
    assert (
        first["judged"] == [[True] * 4] * 4 and second["judged"] == [[True] * 4] + [[False] * 4] * 3
    )
    assert first["stopped_by"] == second["stopped_by"] and first["stopped_by"].startswith(
        "Step 4: reward functions failed on 11 of the last"
    )
    # the fourth was not asked any more
    assert [logs["reward/cannot_judge"] for logs in first["logs"]] == [0, 4, 8, 11]
    # one process had none to log
    assert first["logs"][0]["judged/here"] == 4 and first["logs"][1]["judged/here"] is None


def test_a_resumed_run_is_the_run_it_would_have_been_on_both(figures):
    assert [found["resumed"] for found in figures] == [[], []]
