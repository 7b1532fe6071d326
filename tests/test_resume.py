"""A resumed run gives the same bits as a run that was never interrupted."""

import os
import subprocess
import sys

import pytest
import resumes
from conftest import ROOT

from gtpo.runs import checkpoints
from reliability import resume_proof

BASELINE = "custom_trainer.original.UnslothGRPOTrainer"
# The hardest cases of the proof, with GTPO and with the baseline.
CASES = ["everything", "grpo_everything"]


@pytest.fixture(scope="module")
def proof() -> str:
    """What the resume proof prints for CASES, with interruptions at two steps."""
    flags = ["--steps", "4", "--at", "1", "3", "--cases", *CASES]
    done = subprocess.run(
        [sys.executable, "reliability/resume_proof.py", *flags],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert "interruptions in" in done.stdout, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(proof, case):
    (line,) = [line for line in proof.splitlines() if line.startswith(f"{case} ")]
    assert "2 interruptions  the same bits" in line, proof


def test_the_proof_notices_a_difference_of_one_bit_or_one_line():
    import torch

    one = {"a": torch.tensor([1.0]), "b": [1, {"c": b"x"}], "d": float("nan"), "e": 1}
    same = {**one, "a": torch.tensor([1.0]), "d": float("nan")}
    assert resume_proof.differences(one, same) == []
    next_number = torch.tensor([1.0 + 2**-23])
    other = {"a": next_number, "b": [1, {"c": b"y"}], "d": 0.0, "e": 1.0, "f": None}
    assert resume_proof.differences(one, other) == ["/a", "/b/1/c", "/d", "/e"]
    assert resume_proof.differences({"b": [1]}, {"b": [1, 2]}) == ["/b"]
    assert resume_proof.differences({}, {"f": 1}) == ["/f"]


@pytest.mark.slow
def test_a_trainer_without_a_recipe_resumes_exactly(tmp_path):
    released = "custom_trainer.released.ReleasedGTPOTrainer"
    assert resumes.where_resumed_runs_differ(released, tmp_path, steps=[1, 3]) == []


@pytest.mark.slow
def test_a_resumed_run_does_not_repeat_an_alarm(tmp_path):
    from gtpo.hooks.alarm import CONDITIONS, Alarm

    class FirstStepAlarm(Alarm):
        def __init__(self):
            limits = {**dict.fromkeys(CONDITIONS), "no_signal": 0.0}  # holds at every step
            super().__init__(action="warn", window=1, limits=limits)

    options = {"callback": FirstStepAlarm, "logging_steps": 1, "max_steps": 3}
    straight = resumes.train(BASELINE, tmp_path / "straight", **options)
    alarms = [line["step"] for line in straight["metrics"] if "alarm/no_signal" in line]
    checkpoint = checkpoints.read(tmp_path / "straight/checkpoint-1")
    resumed = resumes.train(BASELINE, tmp_path / "resumed", checkpoint=checkpoint, **options)
    assert alarms == [1]
    assert resume_proof.differences(straight, resumed) == []


@pytest.mark.slow
def test_without_exact_resume_the_runs_differ(tmp_path, monkeypatch):
    from gtpo.runs.exact_resume import ExactResume

    monkeypatch.setattr(ExactResume, "on_train_begin", lambda *args, **kwargs: None)
    differences = resumes.where_resumed_runs_differ(BASELINE, tmp_path, steps=[1])
    assert any("weights" in place for place in differences) and "1/completions" in differences


@pytest.mark.slow
def test_with_more_steps_or_another_optimizer_the_learning_rate_follows_the_new_schedule(tmp_path):
    from transformers import TrainerCallback

    rates = {}

    class Rates(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
            rates.setdefault(args.output_dir, []).append(
                [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
            )

    options = {
        "lr_scheduler_type": "linear",
        "learning_rate": 1e-2,
        "callback": Rates(),
        "steps_per_generation": 2,
        "num_iterations": 1,
    }
    resumes.train(BASELINE, tmp_path / "first", **options, max_steps=2)
    other = {**options, "learning_rate": 4e-3, "weight_decay": 0.5, "max_steps": 4}
    resumes.train(BASELINE, tmp_path / "straight", **other)
    checkpoint = checkpoints.read(tmp_path / "first/checkpoint-2")
    resumes.train(
        BASELINE, tmp_path / "resumed", **other, use_recipe_optimizer=True, checkpoint=checkpoint
    )
    assert rates[str(tmp_path / "resumed")] == rates[str(tmp_path / "straight")][2:]
    assert rates[str(tmp_path / "resumed")][0][0] == (pytest.approx(2e-3), 0.5)


@pytest.mark.slow
def test_a_rollout_that_cannot_be_saved_is_reported_and_the_checkpoint_is_whole_without_it(
    tmp_path, monkeypatch, caplog
):
    from custom_trainer.original import UnslothGRPOTrainer

    generate = UnslothGRPOTrainer._generate_and_score_completions

    def generate_with_an_object_in_each_row(self, inputs):
        return {**generate(self, inputs), "notes": [object() for _ in inputs]}

    monkeypatch.setattr(
        UnslothGRPOTrainer, "_generate_and_score_completions", generate_with_an_object_in_each_row
    )
    resumes.train(BASELINE, tmp_path / "run", max_steps=1)
    assert (
        "A run resumed from step 1 will not continue exactly: a object cannot be saved in a"
        " checkpoint" in caplog.text
    )
    assert checkpoints.read(tmp_path / "run/checkpoint-1").step == 1
