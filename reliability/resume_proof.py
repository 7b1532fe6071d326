"""Prove that a resumed run is the run it would have been: `python reliability/resume_proof.py
[--steps 6] [--cases NAME ...]`.

Each case trains the embedded demo's model straight, and then once for every step k: a SIGTERM
arrives within step k, the run saves and exits, and --resume goes on with it. Adapter, optimizer,
schedule, random generators, rollout under way, sampled completions, evaluations and logged metrics
must be the same to the last bit, times apart.
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

from reliability import training_processes  # noqa: E402

BASELINE = ["--trainer.class_path", "custom_trainer.original.UnslothGRPOTrainer"]
# of 2 steps
EPOCHS = [
    "--dataset.split",
    "train[:4]",
    "--training.max_steps",
    "-1",
    "--training.num_train_epochs",
]
EVERY = [
    "--evaluation.path",
    str(ROOT / "demo/data/test.jsonl"),
    "--evaluation.limit",
    "4",
    "--evaluation.every",
]
CASES = {
    "default": [],
    "grpo": BASELINE,
    "num_iterations": ["--training.num_iterations", "2"],
    # a rollout ends in the middle of a step
    "steps_per_generation": ["--training.steps_per_generation", "3"],
    "steps_per_generation_iterations": [
        "--training.steps_per_generation",
        "4",
        "--training.num_iterations",
        "2",
    ],
    "grpo_steps_per_generation": [*BASELINE, "--training.steps_per_generation", "3"],
    "epochs": [*EPOCHS, "3"],
    "epochs_steps_per_generation": [*EPOCHS, "3", "--training.steps_per_generation", "3"],
    "logging_steps": ["--training.logging_steps", "4", "--training.log_completions", "true"],
    "evaluation": [*EVERY, "2", "--evaluation.samples", "2", "--evaluation.temperature", "1"],
    # where the signal arrives
    "within_evaluation": [
        *EVERY,
        "1",
        "--evaluation.batch_size",
        "2",
        "--training.logging_steps",
        "2",
    ],
    "saved_and_evaluated_apart": [
        *EVERY,
        "2",
        "--training.save_steps",
        "3",
        "--training.logging_steps",
        "4",
    ],
    # two epochs, rollouts of three micro-batches that are trained on twice, in steps of two
    "everything": [
        *EPOCHS,
        "2",
        "--training.steps_per_generation",
        "3",
        "--training.num_iterations",
        "2",
        *EVERY,
        "2",
        "--training.save_steps",
        "3",
        "--training.logging_steps",
        "4",
    ],
    "grpo_everything": [
        *BASELINE,
        *EPOCHS,
        "2",
        "--training.logging_steps",
        "3",
        "--training.num_iterations",
        "2",
        *EVERY,
        "1",
    ],
}


def flags(folder: Path, steps: int, case: list[str]) -> list[str]:
    """The demo, smaller: two micro-batches of one group of four per step, a checkpoint at the end
    alone.
    """
    return [
        str(ROOT / "recipes/demo.yaml"),
        "--model-name",
        str(ROOT / "demo/model"),
        "--dataset.path",
        str(ROOT / "demo/data/train.jsonl"),
        "--evaluation.path",
        "null",
        "--output_root",
        str(folder),
        "--training.max_steps",
        str(steps),
        "--training.save_steps",
        "1000",
        "--training.num_generations",
        "4",
        "--training.per_device_train_batch_size",
        "4",
        "--training.gradient_accumulation_steps",
        "2",
        "--dataset.split",
        "train[:40]",
        *case,
    ]


def interrupt_at(step: int, case: str = "", total: int = 0) -> None:
    """Lets a SIGTERM arrive within that step of the run that is about to begin in this process."""
    from transformers import TrainerCallback

    from gtpo.evaluation import held_out
    from gtpo.runs import exact_resume

    if case == "within_evaluation":
        evaluate, where = (
            held_out.HeldOut.evaluate,
            {0: "before", total: "after"}.get(step, f"step-{step}"),
        )

        def evaluate_and_interrupt(self, name):
            drawn = held_out.policy_sampler

            def policy_sampler(*args):
                draw = drawn(*args)
                return lambda *prompts: (
                    name == where and os.kill(os.getpid(), signal.SIGTERM),
                    draw(*prompts),
                )[1]

            held_out.policy_sampler = policy_sampler
            return evaluate(self, name)

        held_out.HeldOut.evaluate = evaluate_and_interrupt
        return

    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step + 1 == step:
                os.kill(os.getpid(), signal.SIGTERM)

    attach = exact_resume.resume_exactly
    exact_resume.resume_exactly = lambda trainer, *args: (
        trainer.add_callback(Interrupt()),
        attach(trainer, *args),
    )


def outcome(folder: Path) -> dict:
    """All that has to be the same, by name: tensors, bytes of files, and metrics without times."""
    import torch
    from safetensors.torch import load_file

    (run_dir,) = (path for path in folder.iterdir() if path.is_dir())
    last = max(run_dir.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    found = {
        "adapter": load_file(run_dir / "adapter_model.safetensors"),
        "checkpoint's adapter": load_file(last / "adapter_model.safetensors"),
    }
    for name in ("optimizer.pt", "scheduler.pt", "resume_state_0.pt"):
        found[name] = torch.load(last / name, weights_only=True)
    del found["resume_state_0.pt"]["step_time"]
    for metrics in found["resume_state_0.pt"]["metrics"].values():
        _drop_times(metrics)
    from transformers.trainer_pt_utils import safe_globals

    with safe_globals():
        found["rng_state.pth"] = torch.load(last / "rng_state.pth", weights_only=True)
    found["gtpo_state"] = [file.read_text() for file in last.glob("gtpo_state.json")]
    state = json.loads((run_dir / "trainer_state.json").read_text())
    found["metrics"] = [_drop_times(line) for line in state.pop("log_history")]
    found["state"] = state
    for file in sorted([run_dir / "completions.jsonl", *(run_dir / "evaluation").glob("*.jsonl")]):
        found[str(file.relative_to(run_dir))] = file.read_bytes()
    for file in sorted((run_dir / "completions").glob("*.parquet")):
        import pandas

        found[file.name] = pandas.read_parquet(file).to_dict("list")
    return found


def _drop_times(metrics: dict) -> dict:
    for name in [name for name in metrics if "time" in name or "per_second" in name]:
        del metrics[name]
    return metrics


def differences(one, other, name: str = "") -> list[str]:
    """Where two outcomes differ, compared bit by bit."""
    import numpy
    import torch

    if isinstance(one, dict) and isinstance(other, dict):
        keys = [*one, *(key for key in other if key not in one)]
        return [
            found
            for key in keys
            for found in differences(one.get(key), other.get(key), f"{name}/{key}")
        ]
    if (
        isinstance(one, (list, tuple))
        and isinstance(other, (list, tuple))
        and len(one) == len(other)
    ):
        return [
            found
            for i, pair in enumerate(zip(one, other, strict=True))
            for found in differences(*pair, f"{name}/{i}")
        ]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if one.dtype == other.dtype and torch.equal(one, other) else [name]
    if isinstance(one, numpy.ndarray):
        return [] if numpy.array_equal(one, other) else [name]
    return (
        []
        if type(one) is type(other) and (one == other or one != one and other != other)
        else [name]
    )


def prove(name: str, steps: int, at: list[int] | None, scratch: Path) -> tuple[int, list[str]]:
    """How many interruptions of a case were tried, and where any of the resumed runs differed."""
    case, problems = CASES[name], []
    if (
        code := training_processes.run(
            flags(scratch / "straight", steps, case), scratch / "straight.txt"
        )
    ) != 0:
        raise SystemExit(
            f"{name}: the straight run ended with {code}:"
            f" {(scratch / 'straight.txt').read_text()[-3000:]}"
        )
    expected = outcome(scratch / "straight")
    total = expected["state"]["global_step"]
    # an evaluation comes before the first step, too
    interrupted = at or range(name != "within_evaluation", total + 1)
    for k in interrupted:
        argv, said = flags(scratch / f"at{k}", steps, case), scratch / f"at{k}.txt"
        codes = (
            training_processes.run(argv, said, lambda k=k: interrupt_at(k, name, total)),
            training_processes.run([*argv, "--resume"], said),
        )
        if codes != (143, 0):
            problems.append(f"{name}, step {k}: exit codes {codes}: {said.read_text()[-3000:]}")
            continue
        problems += [
            f"{name}, step {k}: {place}"
            for place in differences(expected, outcome(scratch / f"at{k}"))
        ]
    return len(interrupted), problems


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument(
        "--at", type=int, nargs="*", help="the steps to interrupt; by default every one"
    )
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES))
    options = parser.parse_args()
    training_processes.prepare()
    tried, problems = 0, []
    for name in options.cases:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as scratch:
            count, found = prove(name, options.steps, options.at, Path(scratch))
        tried, problems = tried + count, problems + found
        print(
            f"{name:34} {count:3} interruptions "
            f" {'the same bits' if not found else f'{len(found)} DIFFERENCES'} "
            f" ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
        for problem in found[:20]:
            print("   ", problem)
    print(f"{tried} interruptions in {len(options.cases)} cases, {len(problems)} differences")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
