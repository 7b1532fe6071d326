"""Compares GTPO with GRPO and with ablations of GTPO, over seeds.

Run `python benchmarks/compare.py [--hours H] [--workers N]`. It trains the runs of PLAN with
`train_model.train`, and keeps one small JSON file per run under docs/results/runs. You can
interrupt it at any time, because it skips the runs that have a file. `python benchmarks/results.py`
writes docs/results.md from those files.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import shutil
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

RUNS = ROOT / "docs/results/runs"
SAMPLES = 4  # completions per held-out problem after a run, at temperature 1
DRIFT = ["--training.max_steps", "240", "--training.learning_rate", "5e-3"]
RECIPES = {  # task: recipe and flags
    "demo": ["recipes/demo.yaml"],
    "columns": ["recipes/columns.yaml"],
    "drift": ["recipes/columns.yaml", *DRIFT],
}
TRAINER = "--trainer.class_path"
GRPO = [TRAINER, "custom_trainer.original.UnslothGRPOTrainer"]
VARIANTS = {
    "grpo": GRPO,
    "grpo_std": [*GRPO, "--training.scale_rewards", "group"],
    "gtpo": [],
    "neutral": [TRAINER, "custom_trainer.neutral.NeutralGTPOTrainer"],
    "no_lambda": [TRAINER, "benchmarks.ablations.WithoutTokenWeights"],
    "no_entropy": ["--gtpo_runtime.ent_threshold", "1e9", "--gtpo_runtime.ent_scale", "0"],
    "w_raw_1": ["--gtpo_runtime.w_raw", "1"],
    "released": [TRAINER, "custom_trainer.released.ReleasedGTPOTrainer"],
}
MAIN = ["grpo", "grpo_std", "gtpo"]
# Task, variants and seeds. All variants of a seed come before the next seed, so that an
# interruption leaves whole seeds.
PLAN = [
    ("columns", list(VARIANTS), range(1, 6)),
    ("demo", MAIN, range(1, 6)),
    ("columns", ["grpo", "gtpo", "neutral", "no_lambda"], range(6, 11)),
    ("drift", ["grpo", "gtpo"], range(1, 11)),
    ("drift", ["neutral"], range(1, 11)),
]


class Run(NamedTuple):
    """One run of the plan."""

    task: str
    variant: str
    seed: int

    @property
    def file(self) -> Path:
        """Where its result is kept."""
        return RUNS / self.task / f"{self.variant}-{self.seed}.json"

    @property
    def flags(self) -> list[str]:
        """The arguments of train_model.py that repeat this run."""
        name = f"{self.task}-{self.variant}-{self.seed}"
        seed = ["--model.random_seed", str(self.seed)]
        return [*RECIPES[self.task], *VARIANTS[self.variant], *seed, "--run-name", name]


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description="Compare GTPO with GRPO and its ablations over seeds."
    )
    parser.add_argument(
        "--hours",
        type=float,
        default=5.0,
        help="most CPU hours for all runs together (default: 5)",
    )
    parser.add_argument(
        "--workers", type=int, default=1, help="runs at a time, with one thread each (default: 1)"
    )
    options = parser.parse_args()
    if options.workers < 1:
        parser.error(f"--workers: {options.workers} is not valid; use 1 or more")
    os.chdir(ROOT)  # the recipes' paths start here
    planned = [
        Run(task, variant, seed)
        for task, variants, seeds in PLAN
        for seed in seeds
        for variant in variants
    ]
    missing = [run for run in planned if not run.file.exists()]
    spent = sum(json.loads(file.read_text())["cpu_seconds"] for file in RUNS.rglob("*.json"))
    done = f"{len(planned) - len(missing)} of {len(planned)} runs are done"
    print(f"{done}, {spent / 3600:.2f} CPU hours", flush=True)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.workers, context) as pool:
        running = set()
        while missing or running:
            while missing and len(running) < options.workers and spent < options.hours * 3600:
                running.add(pool.submit(train, missing.pop(0)))
            if not running:
                print(f"The budget of {options.hours:g} CPU hours is spent")
                print(f"{len(missing)} runs are left")
                return
            first = concurrent.futures.FIRST_COMPLETED
            ended, running = concurrent.futures.wait(running, return_when=first)
            for future in ended:
                run, cpu_seconds = future.result()
                spent += cpu_seconds
                name = f"{run.task} {run.variant} seed {run.seed}"
                print(f"{name}: {cpu_seconds:.0f} CPU-s, {len(missing)} to go", flush=True)


def train(run: Run) -> tuple[Run, float]:
    """Trains and evaluates one run and writes its file; returns the run and its CPU-seconds."""
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    import torch

    import train_model
    from gtpo.evaluation.file import read_evaluation
    from gtpo.recipe import command_line as cli
    from gtpo.runs import directory as runs
    from gtpo.runs.start import Request

    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")
    began = time.process_time()
    recipe = cli.read_recipe([*run.flags, "--output_root", "runs/compare"])
    run_dir = train_model.train(recipe, Request(overwrite=True))
    evaluations = {when: run_dir / f"evaluation/{when}.jsonl" for when in ("before", "after")}
    greedy = {when: shares(read_evaluation(file).rows) for when, file in evaluations.items()}
    sampled = shares(sample(recipe, run_dir))
    cpu_seconds = time.process_time() - began
    result = {
        **run._asdict(),
        "flags": run.flags,
        "cpu_seconds": round(cpu_seconds, 1),
        "versions": runs.versions(),
        "steps": steps(run_dir / "completions.jsonl", recipe),
        "logged": logged(run_dir / "trainer_state.json"),
        "greedy": greedy,
        "sampled": sampled,
    }
    run.file.parent.mkdir(parents=True, exist_ok=True)
    whole = run.file.with_suffix(".tmp")
    whole.write_text(json.dumps(result) + "\n", encoding="utf-8")
    whole.rename(run.file)
    shutil.rmtree(run_dir)  # it has ten megabytes, and the flags can make it again
    return run, cpu_seconds


def steps(file: Path, recipe) -> dict[str, list[float]]:
    """Figures of each step's completions: a list per figure, with an entry per step.

    All trainers are measured in the same way, from completions.jsonl.
    """
    rows = {}
    for line in file.open(encoding="utf-8"):
        row = json.loads(line)
        rows.setdefault(row["step"], []).append(row)
    is_grpo = recipe.trainer.class_path.startswith("custom_trainer.original")
    scale = 0.0 if is_grpo else recipe.gtpo_runtime.ent_scale
    figures = [of_completions(group, scale) for _, group in sorted(rows.items())]
    return {
        name: [None if step[name] is None else round(step[name], 4) for step in figures]
        for name in figures[0]
    }


def of_completions(rows: list[dict], scale: float) -> dict[str, float]:
    """Shares (0 to 1) and means over the completions of one step.

    The gradient of a token's log-prob is multiplied by delta_i (A_i - gamma <H>_i) lambda / |o_i|.
    `net_push` is the sum of this factor over conflict tokens, divided by the sum of its absolute
    values over all tokens. Above 0, conflict tokens become likelier.
    """
    push = total = conflicts = tokens = 0.0
    for row in rows:
        length = len(row["ids"])
        kept = row["kept"] is None or row["kept"]
        coefficient = kept * (row["advantage"] - scale * row["entropy"])
        for place in range(length):
            weight = coefficient * (row["weights"][place] if row["weights"] else 1.0) / length
            in_conflict = place < row["prefix"] or place >= length - row["suffix"]
            total += abs(weight)
            push += weight * in_conflict
            conflicts += in_conflict
        tokens += length
    count = len(rows)
    return {
        "correct": sum(row["reward"] == 20 for row in rows) / count,
        "format": sum(row["reward"] >= 10 for row in rows) / count,
        "entropy": sum(row["entropy"] for row in rows) / count,
        "conflict": conflicts / tokens,
        "filtered": sum(row["kept"] is False for row in rows) / count,
        "length": tokens / count,
        "truncated": sum(row["truncated"] for row in rows) / count,
        "net_push": push / total if total else None,
    }


def sample(recipe, run_dir: Path) -> list[dict]:
    """SAMPLES graded completions of each held-out problem, by the trained policy."""
    from gtpo.data import load_held_out_problems
    from gtpo.evaluation.draw import evaluate, rendered_prompts
    from gtpo.evaluation.file import EvaluationFile, make_header
    from gtpo.models.generation import Sampling, policy_sampler
    from gtpo.models.saved import find_saved, load_saved

    policy = load_saved(find_saved(str(run_dir)))
    problems = load_held_out_problems(recipe, policy.tokenizer)
    prompts = rendered_prompts(problems, policy.tokenizer, recipe.training.chat_template_kwargs)
    sampling = Sampling(1.0, 1.0, recipe.seed, recipe.max_completion_length)
    header = make_header(problems, prompts, sampling, SAMPLES, weights="trained")
    file = EvaluationFile(run_dir / "evaluation/sampled.jsonl", header)
    sampler, size = policy_sampler(policy, sampling), recipe.evaluation.batch_size
    return evaluate(file, sampler, problems, prompts, batch_size=size)


def shares(rows: list[dict]) -> dict[str, float]:
    """The shares of completions that are correct and that are well formed."""
    return {
        "correct": sum(row["correct"] for row in rows) / len(rows),
        "format": sum(row["well_formed"] for row in rows) / len(rows),
    }


LOGGED = {"reward": "reward", "grad_norm": "grad_norm", "no_signal": "frac_reward_zero_std"}


def logged(file: Path) -> dict[str, list[float]]:
    """The metrics of LOGGED at each step, read from trainer_state.json."""
    history = [row for row in json.loads(file.read_text())["log_history"] if "reward" in row]
    return {name: [round(row[key], 4) for row in history] for name, key in LOGGED.items()}


if __name__ == "__main__":
    main()
