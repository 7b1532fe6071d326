"""Completions graded per second, on real GSM8K and MATH answers, by one process and by two: `python
benchmarks/rewards.py`.

`reward_math.final_reward`, format score included, as a run calls it: in processes of their own
(`rewards.workers`, with `rewards.per: group`), a group of 8 completions per problem: 3 with the
dataset's own solution, 3 with the answer of another problem, 1 with an open tag, 1 with text after
the answer. One and two processes take turns. The data is found as in the tests: GTPO_SHARED
(default ../shared) is the folder that holds data/.
"""

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path

import psutil
from figures import ROOT, machine, ratio, save

sys.path[:0] = [str(ROOT)]

from gtpo.answers import format_reference, format_score, reference_answer  # noqa: E402
from gtpo.data import gsm8k_reference, math_reference  # noqa: E402
from gtpo.rewards.pool import RewardPool  # noqa: E402

WARM_UP = 16  # problems that do not count
SETS = {
    "GSM8K": ("gsm8k/test.jsonl", "answer", gsm8k_reference),
    "MATH": ("hendrycks_math/*/test.jsonl", "solution", math_reference),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--problems", type=int, default=400, help="drawn from each set (default: 400)"
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=3,
        help="how often each is graded, of which the median counts (default: 3)",
    )
    parser.add_argument("--json", type=Path, help="save the figures to this file")
    options = parser.parse_args()
    data = Path(os.environ.get("GTPO_SHARED", ROOT.parent / "shared")) / "data"
    print(machine())
    found = {}
    for name, (pattern, column, reference) in SETS.items():
        rows = [
            json.loads(line)
            for file in sorted(data.glob(pattern))
            for line in file.read_text(encoding="utf-8").splitlines()
        ]
        if not rows:
            print(
                f"{name}: skipped, there is no {data / pattern}; set GTPO_SHARED to the folder that"
                " holds data/"
            )
            continue
        random.Random(0).shuffle(rows)
        found[name] = graded(
            name,
            groups([reference(row[column]) for row in rows[: options.problems + WARM_UP]]),
            options.rounds,
        )
    save(options.json, {"sets": found} if found else {"skipped": f"no data under {data}"})
    return 0


def groups(references: list[str]) -> list[dict]:
    """What a call of the reward gets, one per problem."""
    calls = []
    for i, reference in enumerate(references):
        wrong = [
            format_reference("Let me see.", reference_answer(references[i - j])) for j in (1, 2, 3)
        ]
        completions = (
            [reference] * 3
            + wrong
            + [reference.replace("</reasoning>", ""), reference + " That is it."]
        )
        calls.append({"completions": completions, "answer": [reference] * len(completions)})
    return calls


def graded(name: str, calls: list[dict], rounds: int) -> dict:
    started, calls = calls[:WARM_UP], calls[WARM_UP:]
    count = sum(len(call["completions"]) for call in calls)
    wall, cpu, rewards = {1: [], 2: []}, {1: [], 2: []}, {}
    for _ in range(rounds):
        for workers in (1, 2):
            # new ones: a process remembers what it has compared
            pool = RewardPool(workers, seconds=30, memory=4)
            grade(pool, started)  # and imports what it needs
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
    print(
        f"{name}, {len(calls)} problems x 8: "
        + ", ".join(
            f"{count / statistics.median(wall[w]):,.0f} completions/s by {w}"
            f" process{'es'[: 2 * w - 2]}"
            for w in (1, 2)
        )
        + f" ({speedup:.2f} times, for {more_cpu:.2f} times the CPU-seconds, medians of {rounds}"
        f" pairs); {statistics.median(cpu[1]) / count * 1e3:.2f} CPU-ms each; the format score"
        f" alone {formats:,.0f}/CPU-s; {paid:.1%} of the datasets' own solutions paid in full"
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
    """The rewards of each call, at most as many calls at a time as the pool has processes."""
    return [
        reply["rewards"]
        for reply in pool.map(
            lambda call: pool.call("reward_math.final_reward", call, "seed"), calls
        )
    ]


def cpu_seconds() -> float:
    """CPU-seconds so far of this process and of those it has started."""
    me = psutil.Process()
    return sum(sum(process.cpu_times()[:2]) for process in (me, *me.children(recursive=True)))


if __name__ == "__main__":
    raise SystemExit(main())
