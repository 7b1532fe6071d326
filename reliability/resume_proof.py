"""Proves that a resumed run equals a run that was never interrupted.

Run `python reliability/resume_proof.py [--steps 6] [--cases NAME ...]`. Each case trains the model
of the embedded demo without interruption, and then once for every step k. There a SIGTERM arrives
within step k, the run saves and exits, and --resume continues it. These must be equal bit for bit:
adapter, optimizer, schedule, random generators, the rollout under way, sampled completions,
evaluations and logged metrics except times.
"""

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from reliability import training_processes

BASELINE = ["--trainer.class_path", "custom_trainer.original.UnslothGRPOTrainer"]
# An epoch has 2 steps. The number of epochs follows.
EPOCHS = "--dataset.split train[:4] --training.max_steps -1 --training.num_train_epochs".split()
# The number of steps between evaluations follows.
EVERY = [
    *["--evaluation.path", str(ROOT / "demo/data/test.jsonl")],
    *["--evaluation.limit", "4", "--evaluation.every"],
]
ITERATIONS = ["--training.num_iterations", "2"]
SPLIT_IN_3 = ["--training.steps_per_generation", "3"]  # a rollout ends in the middle of a step
SPLIT_IN_4 = ["--training.steps_per_generation", "4"]
LOG_EVERY = "--training.logging_steps"
SAVE_EVERY = "--training.save_steps"
CASES = {
    "default": [],
    "grpo": BASELINE,
    "num_iterations": ITERATIONS,
    "steps_per_generation": SPLIT_IN_3,
    "steps_per_generation_iterations": [*SPLIT_IN_4, *ITERATIONS],
    "grpo_steps_per_generation": [*BASELINE, *SPLIT_IN_3],
    "epochs": [*EPOCHS, "3"],
    "epochs_steps_per_generation": [*EPOCHS, "3", *SPLIT_IN_3],
    "logging_steps": [LOG_EVERY, "4", "--training.log_completions", "true"],
    "evaluation": [*EVERY, "2", "--evaluation.samples", "2", "--evaluation.temperature", "1"],
    # The signal arrives within an evaluation.
    "within_evaluation": [*EVERY, "1", "--evaluation.batch_size", "2", LOG_EVERY, "2"],
    "saved_and_evaluated_apart": [*EVERY, "2", SAVE_EVERY, "3", LOG_EVERY, "4"],
    # Two epochs. A rollout has three micro-batches and is trained on twice. A step has two.
    "everything": [
        *[*EPOCHS, "2", *SPLIT_IN_3, *ITERATIONS],
        *[*EVERY, "2", SAVE_EVERY, "3", LOG_EVERY, "4"],
    ],
    "grpo_everything": [*BASELINE, *EPOCHS, "2", LOG_EVERY, "3", *ITERATIONS, *EVERY, "1"],
}
SMALL = [  # two micro-batches of one group of four in each step
    *["--dataset.split", "train[:40]"],
    *["--training.num_generations", "4", "--training.per_device_train_batch_size", "4"],
    *["--training.gradient_accumulation_steps", "2"],
]


def flags(output_root: Path, steps: int, case: list[str]) -> list[str]:
    """Command-line arguments of a small demo run, which saves a checkpoint only at its end."""
    return [
        str(ROOT / "recipes/demo.yaml"),
        *["--model-name", str(ROOT / "demo/model")],
        *["--dataset.path", str(ROOT / "demo/data/train.jsonl")],
        *["--evaluation.path", "null", "--output_root", str(output_root)],
        *["--training.max_steps", str(steps), SAVE_EVERY, "1000"],
        *SMALL,
        *case,
    ]


def interrupt_at(step: int, case: str = "", total: int = 0) -> None:
    """Changes this process so that a SIGTERM arrives within `step` of the run that it will train.

    In the case "within_evaluation" the signal arrives within the evaluation after `step`. `total`
    is the run's number of steps.
    """
    from transformers import TrainerCallback

    from gtpo.evaluation import held_out
    from gtpo.runs import exact_resume

    if case == "within_evaluation":
        evaluation = {0: "before", total: "after"}.get(step, f"step-{step}")
        evaluate = held_out.HeldOut.evaluate

        def evaluate_and_interrupt(self, name):
            make_sampler = held_out.policy_sampler

            def policy_sampler(*args):
                sample = make_sampler(*args)

                def interrupted_sampler(*prompts):
                    if name == evaluation:
                        os.kill(os.getpid(), signal.SIGTERM)
                    return sample(*prompts)

                return interrupted_sampler

            held_out.policy_sampler = policy_sampler
            return evaluate(self, name)

        held_out.HeldOut.evaluate = evaluate_and_interrupt
        return

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step + 1 == step:
                os.kill(os.getpid(), signal.SIGTERM)

    resume_exactly = exact_resume.resume_exactly

    def resume_and_interrupt(trainer, *args):
        trainer.add_callback(Interrupt())
        return resume_exactly(trainer, *args)

    exact_resume.resume_exactly = resume_and_interrupt


def outcome(output_root: Path) -> dict:
    """Everything that must be equal, by name: tensors, bytes of files, and metrics without times.

    `output_root` holds one run directory.
    """
    import torch
    from safetensors.torch import load_file
    from transformers.trainer_pt_utils import safe_globals

    (run_dir,) = (path for path in output_root.iterdir() if path.is_dir())
    last = max(run_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    parts = {
        "adapter": load_file(run_dir / "adapter_model.safetensors"),
        "checkpoint's adapter": load_file(last / "adapter_model.safetensors"),
    }
    for name in ("optimizer.pt", "scheduler.pt", "resume_state_0.pt"):
        parts[name] = torch.load(last / name, weights_only=True)
    del parts["resume_state_0.pt"]["step_time"]
    for metrics in parts["resume_state_0.pt"]["metrics"].values():
        drop_times(metrics)
    with safe_globals():
        parts["rng_state.pth"] = torch.load(last / "rng_state.pth", weights_only=True)
    parts["gtpo_state"] = [file.read_text() for file in last.glob("gtpo_state.json")]
    state = json.loads((run_dir / "trainer_state.json").read_text())
    parts["metrics"] = [drop_times(line) for line in state.pop("log_history")]
    parts["state"] = state
    for file in sorted([run_dir / "completions.jsonl", *(run_dir / "evaluation").glob("*.jsonl")]):
        parts[str(file.relative_to(run_dir))] = file.read_bytes()
    for file in sorted((run_dir / "completions").glob("*.parquet")):
        import pandas

        parts[file.name] = pandas.read_parquet(file).to_dict("list")
    return parts


def drop_times(metrics: dict) -> dict:
    """Removes the metrics that measure time from `metrics`, and returns it."""
    for name in [name for name in metrics if "time" in name or "per_second" in name]:
        del metrics[name]
    return metrics


def differences(one, other, name: str = "") -> list[str]:
    """The paths at which two outcomes differ, compared bit by bit; NaN equals NaN."""
    import numpy
    import torch

    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        pairs = [(key, one.get(key), other.get(key)) for key in keys]
    elif isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [name]
        pairs = [(i, *pair) for i, pair in enumerate(zip(one, other, strict=True))]
    elif isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [name]
    elif isinstance(one, numpy.ndarray):
        return [] if numpy.array_equal(one, other) else [name]
    else:
        equal = type(one) is type(other) and (one == other or (one != one and other != other))
        return [] if equal else [name]
    return [
        path for key, first, second in pairs for path in differences(first, second, f"{name}/{key}")
    ]


def prove(name: str, steps: int, at: list[int] | None, scratch: Path) -> tuple[int, list[str]]:
    """The number of interruptions tried in a case, and where a resumed run differed."""
    case, problems = CASES[name], []
    whole, log = scratch / "straight", scratch / "straight.txt"
    if code := training_processes.run(flags(whole, steps, case), log):
        output = log.read_text()[-3000:]
        raise SystemExit(f"{name}: the uninterrupted run ended with {code}: {output}")
    expected = outcome(whole)
    total = expected["state"]["global_step"]
    # One evaluation comes before the first step.
    interrupted = at or range(name != "within_evaluation", total + 1)
    for step in interrupted:
        argv, log = flags(scratch / f"at{step}", steps, case), scratch / f"at{step}.txt"
        codes = (
            training_processes.run(argv, log, lambda step=step: interrupt_at(step, name, total)),
            training_processes.run([*argv, "--resume"], log),
        )
        if codes != (143, 0):
            problems.append(f"{name}, step {step}: exit codes {codes}: {log.read_text()[-3000:]}")
            continue
        resumed = outcome(scratch / f"at{step}")
        problems += [f"{name}, step {step}: {path}" for path in differences(expected, resumed)]
    return len(interrupted), problems


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6, help="steps of each run (default: 6)")
    parser.add_argument(
        "--at", type=int, nargs="*", help="the steps to interrupt (default: every step)"
    )
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    training_processes.prepare()
    tried, problems = 0, []
    for name in options.cases:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            count, differing = prove(name, options.steps, options.at, Path(scratch))
        tried, problems = tried + count, problems + differing
        result = f"{len(differing)} DIFFERENCES" if differing else "the same bits"
        seconds = time.monotonic() - began
        print(f"{name:34} {count:3} interruptions  {result}  ({seconds:.0f} s)", flush=True)
        for problem in differing[:20]:
            print("   ", problem)
    print(f"{tried} interruptions in {len(options.cases)} cases, {len(problems)} differences")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
