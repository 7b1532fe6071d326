"""A resumed run is the run it would have been, and what happens when somebody asks to stop."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from benchmarks import resume_proof


@pytest.fixture(scope="module")
def proof() -> str:
    """What the proof says of its hardest cases, briefly: of GTPO, and of the baseline."""
    command = [sys.executable, "benchmarks/resume_proof.py", "--steps", "4", "--at", "1", "3", "--cases", *CASES]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600)
    assert "interruptions in" in done.stdout, done.stdout + done.stderr
    return done.stdout


CASES = ["steps_per_generation_iterations", "epochs_steps_per_generation", "grpo_everything"]


@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_is_the_run_it_would_have_been_to_the_last_bit(proof, case):
    (line,) = [line for line in proof.splitlines() if line.startswith(f"{case} ")]
    assert "2 interruptions  the same bits" in line, proof


def test_the_proof_sees_a_difference_of_one_bit_or_one_line():
    import torch

    one = {"a": torch.tensor([1.0]), "b": [1, {"c": b"x"}], "d": float("nan"), "e": 1}
    assert resume_proof.differences(one, {**one, "a": torch.tensor([1.0]), "d": float("nan")}) == []
    other = {"a": torch.tensor([1.0 + 2**-23]), "b": [1, {"c": b"y"}], "d": 0.0, "e": 1.0, "f": None}
    assert resume_proof.differences(one, other) == ["/a", "/b/1/c", "/d", "/e"]
    assert resume_proof.differences({"b": [1]}, {"b": [1, 2]}) == ["/b"] and resume_proof.differences({}, {"f": 1}) == ["/f"]
