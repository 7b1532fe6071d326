"""Measures how many completions rewards grade per second: `python benchmarks/rewards.py`.

Calls `reward_math.final_reward` on real GSM8K and MATH answers, as a run with `rewards.per: group`
does: in processes of its own. One and two processes take turns. Each problem has a group of 8
completions. Three have the dataset's solution, and three the answer of another problem. One has an
open tag, and one has text after the answer. GTPO_SHARED (default: ../shared) is the folder that
holds data/.
"""

import argparse
import json
import os
import random
import statistics
import time
from pathlib import Path

import psutil
from measure import ROOT, machine_line, ratio, save

from gtpo.answers import format_reference, format_score, reference_answer
from gtpo.data import gsm8k_reference, math_reference
from gtpo.rewards.pool import RewardPool

WARM_UP = 16  # problems that do not count
SETS = {
    "GSM8K": ("gsm8k/test.jsonl", "answer", gsm8k_reference),
    "MATH": ("hendrycks_math/*/test.jsonl", "solution", math_reference),
}


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--problems", type=int, default=400, help="problems from each set (default: 400)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="gradings of each set; the median counts (default: 3)",
    )
    parser.add_argument("--json", type=Path, help="save the figures to this file")
    options = parser.parse_args()
    data = Path(os.environ.get("GTPO_SHARED", ROOT.parent / "shared")) / "data"
    print(machine_line())
    sets = {}
    for name, (pattern, column, reference) in SETS.items():
        rows = [
            json.loads(line)
            for file in sorted(data.glob(pattern))
            for line in file.read_text(encoding="utf-8").splitlines()
        ]
        if not rows:
            print(f"{name}: skipped, because {data / pattern} does not exist")
            print("Set GTPO_SHARED to the folder that holds data/")
            continue
        random.Random(0).shuffle(rows)
        references = [reference(row[column]) for row in rows[: options.problems + WARM_UP]]
        sets[name] = measure_set(name, groups(references), options.rounds)
    save(options.json, {"sets": sets} if sets else {"skipped": f"no data under {data}"})
    return 0


def groups(references: list[str]) -> list[dict]:
    """The arguments of a call of the reward function, one call per problem."""
    calls = []
    for i, reference in enumerate(references):
        wrong = [
            format_reference("Let me see.", reference_answer(references[i - j])) for j in (1, 2, 3)
        ]
        malformed = [reference.replace("</reasoning>", ""), reference + " That is it."]
        completions = [reference] * 3 + wrong + malformed
        calls.append({"completions": completions, "answer": [reference] * len(completions)})
    return calls


def measure_set(name: str, calls: list[dict], rounds: int) -> dict:
    """Grades a set with one and with two processes, and prints and returns the figures."""
    warm_up, calls = calls[:WARM_UP], calls[WARM_UP:]
    count = sum(len(call["completions"]) for call in calls)
    wall, cpu, rewards = {1: [], 2: []}, {1: [], 2: []}, {}
    for _ in range(rounds):
        for workers in (1, 2):
            # New processes, because a process remembers the answers that it has compared.
            pool = RewardPool(workers, seconds=30, memory=4)
            grade(pool, warm_up)  # which also imports modules
            began, before = time.perf_counter(), cpu_seconds()
            rewards[workers] = grade(pool, calls)
            wall[workers].append(time.perf_counter() - began)
            cpu[workers].append(cpu_seconds() - before)
            pool.close()
    began = time.process_time()
    for call in calls:
        for text in call["completions"]:
            format_score(text)
    formats = count / (time.process_time() - began)
    assert rewards[1] == rewards[2], "two processes grade as one does"
    paid = statistics.mean(reward == 20.0 for group in rewards[1] for reward in group[:3])
    speedup, more_cpu = ratio(wall[1], wall[2]), ratio(cpu[2], cpu[1])
    one, two = (count / statistics.median(wall[workers]) for workers in (1, 2))
    milliseconds = statistics.median(cpu[1]) / count * 1e3
    print(
        f"{name}, {len(calls)} problems x 8: {one:,.0f} completions/s by 1 process, {two:,.0f}"
        f" completions/s by 2 processes ({speedup:.2f} times, for {more_cpu:.2f} times the"
        f" CPU-seconds, medians of {rounds} pairs); {milliseconds:.2f} CPU-ms each; the format"
        f" score alone {formats:,.0f}/CPU-s; {paid:.1%} of the datasets' solutions paid in full"
    )
    return {
        "completions": count,
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "speedup": speedup,
        "cpu_ratio": more_cpu,
        "format_scores_per_cpu_second": formats,
        "own_solutions_paid": paid,
    }


def grade(pool: RewardPool, calls: list[dict]) -> list[list[float]]:
    """The rewards of each call. Each process of the pool runs one call at a time."""

    def call_reward(call):
        return pool.call("reward_math.final_reward", call, "seed")

    return [reply["rewards"] for reply in pool.map(call_reward, calls)]


def cpu_seconds() -> float:
    """CPU-seconds so far of this process and of those that it has started."""
    this = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (this, *this.children(recursive=True)))


if __name__ == "__main__":
    raise SystemExit(main())
