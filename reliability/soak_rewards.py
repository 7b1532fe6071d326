"""Trains the demo with a reward that misbehaves in ten ways, and counts what is lost.

Run `python reliability/soak_rewards.py`. It trains twice: with one process and a call for each
rollout, then with two processes and a call for each completion. Counted as lost are a wrong reward,
a run that fails, and a process that is left behind. A reward is wrong if it differs from what an
honest function pays, or is not None where the function misbehaves. In the end it prints what a
process costs well-behaved rewards, in CPU time for the 64 completions of a step of the demo.
"""

import argparse
import collections
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import psutil

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from gtpo.answers import format_reference, format_score
from gtpo.rewards.pool import RewardPool
from gtpo.rewards.worker import call_reward
from reliability.hostile_reward import WAYS, way_of
from reward_math import final_reward

MARK = "GTPO_SOAK_REWARDS"  # an environment variable of every process that a run starts
SETTINGS = {
    "1 process, a call per rollout": [],
    "2 processes, a call per completion": ["--rewards.workers", "2", "--rewards.per", "completion"],
}
HEADER = "| rewards | completions | it misbehaved on | lost | seconds | processes left |"


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="steps of each run (default: 100)")
    options = parser.parse_args()
    lost, adapters = 0, []
    print(f"{HEADER}\n|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, MARK: folder}
        for number, (name, flags) in enumerate(SETTINGS.items()):
            began = time.monotonic()
            run_dir, code = train(Path(folder, str(number)), options.steps, flags, environment)
            seconds = time.monotonic() - began
            left = sum(
                (process.info["environ"] or {}).get(MARK) == folder
                for process in psutil.process_iter(["environ"])
            )
            total, ways, wrong = count(run_dir)
            adapters.append((run_dir / "adapter_model.safetensors").read_bytes())
            lost += wrong + (code != 0) + left
            misbehaved = sum(ways.values())
            print(f"| {name} | {total} | {misbehaved} | {wrong} | {seconds:.0f} | {left} |")
            sys.stdout.flush()
    numbers = ", ".join(f"{way.__name__} ({ways[way.__name__]})" for way in WAYS)
    print(f"\nIt {numbers}.".replace("_", " "))
    same = adapters[0] == adapters[1]
    print("The adapters are the same to the last bit." if same else "The adapters differ.")
    print_costs()
    return int(lost > 0 or not same)


def train(
    output_root: Path, steps: int, flags: list[str], environment: dict[str, str]
) -> tuple[Path, int]:
    """The run directory and the exit code of a run with the hostile reward."""
    command = [
        *[sys.executable, str(ROOT / "train_model.py"), str(ROOT / "recipes/demo.yaml")],
        *["--model-name", str(ROOT / "demo/model")],
        *["--dataset.path", str(ROOT / "demo/data/train.jsonl")],
        *["--evaluation.path", "null", "--output_root", str(output_root)],
        *["--trainer.reward_funcs", "reliability.hostile_reward.pay"],
        *["--training.max_steps", str(steps)],
        *["--rewards.seconds", "1", "--rewards.memory", "0.5"],
        *flags,
    ]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode:
        print(run.stderr[-2000:], file=sys.stderr)
    (run_dir,) = output_root.iterdir()
    return run_dir, run.returncode


def count(run_dir: Path) -> tuple[int, collections.Counter, int]:
    """The number of completions, of each way of misbehaving, and of wrong records in the run.

    Wrong are rewards in completions.jsonl, and the totals in reward_failures.jsonl and in the log.
    """
    lines = [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]
    ways, wrong = collections.Counter(), 0
    for line in lines:
        way = way_of(line["prompt"], line["completion"])
        ways.update([way.__name__] if way else [])
        wrong += line["reward"] != (None if way else format_score(line["completion"]))
    file = run_dir / "reward_failures.jsonl"  # absent where nothing failed
    text = file.read_text() if file.is_file() else ""
    failures = [json.loads(line) for line in text.splitlines()]
    history = json.loads((run_dir / "trainer_state.json").read_text())["log_history"]
    metric = "reward/cannot_judge"
    logged = next(row[metric] for row in reversed(history) if metric in row)
    misbehaved = sum(ways.values())
    wrong += abs(misbehaved - int(logged))
    wrong += abs(misbehaved - sum(not line["retried"] for line in failures))
    return len(lines), ways, wrong


def print_costs(calls: int = 300) -> None:
    """Prints the CPU milliseconds of `final_reward` for a rollout, in this process and in its own.

    The rollout is one step of the demo: 8 problems with 8 completions each.
    """
    lines = (ROOT / "demo/data/train.jsonl").read_text().splitlines()[:8]
    problems = [json.loads(line) for line in lines for _ in range(8)]
    answers = [
        format_reference("", problem["answer"].rpartition("#### ")[2]) for problem in problems
    ]
    log_history = [{f"metric {i}": i / 7 for i in range(35)} for _ in range(100)]
    rollout = {
        "prompts": [[{"role": "user", "content": problem["question"]}] for problem in problems],
        "answer": answers,
        "completion_ids": [list(range(14))] * 64,
        "completions": [[{"role": "assistant", "content": answer}] for answer in answers],
        "trainer_state": SimpleNamespace(log_history=log_history),
    }
    pool = RewardPool(1, seconds=30, memory=4)

    def call_in_pool(_=None):
        return pool.call("reward_math.final_reward", rollout, "seed")

    pool.map(call_in_pool, [0])  # starts the process
    for name, call in (
        ("in our process", lambda: call_reward(final_reward, rollout, 64)),
        ("in its own", lambda: pool.map(call_in_pool, [0])),
    ):
        before, began = cpu_seconds(), time.perf_counter()
        for _ in range(calls):
            call()
        wall = (time.perf_counter() - began) / calls * 1000
        cpu = (cpu_seconds() - before) / calls * 1000
        print(f"{name}: {cpu:.1f} ms of CPU for a rollout of 64 completions ({wall:.1f} ms)")
    pool.close()


def cpu_seconds() -> float:
    """CPU-seconds of this process and its children."""
    this = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (this, *this.children()))


if __name__ == "__main__":
    sys.exit(main())
