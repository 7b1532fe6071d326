"""Train the demo with a reward that misbehaves in ten ways, and count what was lost: `python
reliability/soak_rewards.py`.

Twice: one process and one call for each rollout, then two processes and a call for each completion.
Lost is a completion whose reward is not what an honest reward pays, or None where it misbehaves; a
run that does not end well; a process that is left. Then it tells what a process of their own costs
well-behaved rewards, in CPU time for the 64 completions of a step of the demo.
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

from gtpo.answers import format_reference, format_score  # noqa: E402
from gtpo.rewards.pool import RewardPool  # noqa: E402
from gtpo.rewards.worker import call_reward  # noqa: E402
from reliability.hostile_reward import WAYS, way_of  # noqa: E402
from reward_math import final_reward  # noqa: E402

MARK = "GTPO_SOAK_REWARDS"  # in the environment of whatever the runs start
WAYS_TO_CALL = {
    "1 process, a call per rollout": [],
    "2 processes, a call per completion": ["--rewards.workers", "2", "--rewards.per", "completion"],
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    lost, adapters = 0, []
    print(
        "| rewards | completions | it misbehaved on | lost | seconds | processes left"
        " |\n|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, flags) in enumerate(WAYS_TO_CALL.items()):
            began = time.monotonic()
            run_dir, code = train(
                Path(folder, str(number)), arguments.steps, flags, {**os.environ, MARK: folder}
            )
            seconds = time.monotonic() - began
            left = sum(
                (process.info["environ"] or {}).get(MARK) == folder
                for process in psutil.process_iter(["environ"])
            )
            total, ways, wrong = judged(run_dir)
            adapters.append((run_dir / "adapter_model.safetensors").read_bytes())
            lost += wrong + (code != 0) + left
            print(
                f"| {name} | {total} | {sum(ways.values())} | {wrong} | {seconds:.0f} | {left} |",
                flush=True,
            )
    print(
        f"\nIt {', '.join(f'{way.__name__} ({ways[way.__name__]})' for way in WAYS)}.".replace(
            "_", " "
        )
    )
    print(
        "The adapters are the same to the last bit."
        if adapters[0] == adapters[1]
        else "The adapters differ."
    )
    print_costs()
    return int(lost > 0 or adapters[0] != adapters[1])


def train(
    folder: Path, steps: int, flags: list[str], environment: dict[str, str]
) -> tuple[Path, int]:
    run = subprocess.run(
        [
            sys.executable,
            str(ROOT / "train_model.py"),
            str(ROOT / "recipes/demo.yaml"),
            "--model-name",
            str(ROOT / "demo/model"),
            "--dataset.path",
            str(ROOT / "demo/data/train.jsonl"),
            "--evaluation.path",
            "null",
            "--output_root",
            str(folder),
            "--trainer.reward_funcs",
            "reliability.hostile_reward.pay",
            "--training.max_steps",
            str(steps),
            "--rewards.seconds",
            "1",
            "--rewards.memory",
            "0.5",
            *flags,
        ],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    if run.returncode:
        print(run.stderr[-2000:], file=sys.stderr)
    (run_dir,) = folder.iterdir()
    return run_dir, run.returncode


def judged(run_dir: Path) -> tuple[int, collections.Counter, int]:
    """How many completions there were, in how many ways it misbehaved, and how often the run says
    something else.
    """
    lines = [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]
    ways, wrong = collections.Counter(), 0
    for line in lines:
        way = way_of(line["prompt"], line["completion"])
        ways.update([way.__name__] if way else [])
        wrong += line["reward"] != (None if way else format_score(line["completion"]))
    failures = [
        json.loads(line) for line in (run_dir / "reward_failures.jsonl").read_text().splitlines()
    ]
    history = json.loads((run_dir / "trainer_state.json").read_text())["log_history"]
    counted = next(
        row["reward/cannot_judge"] for row in reversed(history) if "reward/cannot_judge" in row
    )
    wrong += abs(sum(ways.values()) - int(counted)) + abs(
        sum(ways.values()) - sum(not line["retried"] for line in failures)
    )
    return len(lines), ways, wrong


def print_costs(calls: int = 300) -> None:
    """CPU milliseconds of `final_reward` for a rollout of the demo, in our process and in one of
    its own.
    """
    problems = [
        json.loads(line) for line in (ROOT / "demo/data/train.jsonl").read_text().splitlines()[:8]
    ]
    answers = [
        format_reference("", problem["answer"].rpartition("#### ")[2])
        for problem in problems
        for _ in range(8)
    ]
    prompts = [
        [{"role": "user", "content": problem["question"]}] for problem in problems for _ in range(8)
    ]
    rollout = {
        "prompts": prompts,
        "answer": answers,
        "completion_ids": [list(range(14))] * 64,
        "completions": [[{"role": "assistant", "content": answer}] for answer in answers],
        "trainer_state": SimpleNamespace(
            log_history=[{f"metric {i}": i / 7 for i in range(35)} for _ in range(100)]
        ),
    }
    pool = RewardPool(1, seconds=30, memory=4)

    def ask(_=None):
        return pool.call("reward_math.final_reward", rollout, "seed")

    pool.map(ask, [0])  # it starts
    for name, call in (
        ("in our process", lambda: call_reward(final_reward, rollout, 64)),
        ("in its own", lambda: pool.map(ask, [0])),
    ):
        before, began = cpu_seconds(), time.perf_counter()
        for _ in range(calls):
            call()
        wall = (time.perf_counter() - began) / calls * 1000
        print(
            f"{name}: {(cpu_seconds() - before) / calls * 1000:.1f} ms of CPU for a rollout of 64"
            f" completions ({wall:.1f} ms)"
        )
    pool.close()


def cpu_seconds() -> float:
    """Of this process and its children."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children()))


if __name__ == "__main__":
    sys.exit(main())
