"""Times the parts of a step of the embedded demo: `python benchmarks/demo_step.py`.

Trains recipes/demo.yaml with train_model.py. Every other step generates without merging the
adapter, so both ways are measured in one run. Prints CPU-seconds of one thread. The processes that
run rewards are counted separately, and so is everything before the first step.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

WARM_UP = 4  # steps that do not count, because they fill caches and check the completions


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "recipe",
        nargs="?",
        default="recipes/demo.yaml",
        help="the recipe (default: recipes/demo.yaml)",
    )
    parser.add_argument("--steps", type=int, default=44, help="steps to train (default: 44)")
    parser.add_argument("--json", type=Path, help="save the figures to this file")
    options = parser.parse_args()
    os.chdir(ROOT)  # the recipe's paths start here
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    from measure import machine_line, ratio, save
    from shares import PARTS, Shares, columns, header, medians

    import train_model
    from gtpo.hooks import merged_generation as merging
    from gtpo.runs import trainers as run_trainers

    most_bytes, shares, clocks, worker_clocks = merging.MOST_BYTES, [], {}, []

    def before_step(step: int) -> None:
        merging.MOST_BYTES = most_bytes if step % 2 else -1
        clocks.setdefault("started", time.process_time())
        if step >= WARM_UP:
            worker_clocks.append(worker_seconds())

    make_trainer = run_trainers.make_trainer

    def make_counted_trainer(*args, **kwargs):
        clocks["loaded"] = time.process_time()
        shares.append(Shares(make_trainer(*args, **kwargs), before_step))
        return shares[0].trainer

    run_trainers.make_trainer = make_counted_trainer
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--output_root", folder, "--evaluation.path", "null"]
        flags += ["--training.max_steps", str(options.steps)]
        if code := train_model.main([options.recipe, *flags]):
            return code
    workers = (worker_clocks[-1] - worker_clocks[0]) / (len(worker_clocks) - 1)

    counted = shares[0].steps[WARM_UP:]
    parts = {"not merged": medians(counted[0::2]), "merged": medians(counted[1::2])}
    print(machine_line())
    print(f"Median CPU-seconds of a step, {len(counted) // 2} steps of each, in turn:")
    print(header(12))
    for name, values in parts.items():
        print(f"{name:<12}{columns(values)}")
    totals = [sum(step.values()) for step in counted]
    generation = [step["generation"] for step in counted]
    ratios = {
        "step": ratio(totals[1::2], totals[0::2]),
        "generation": ratio(generation[1::2], generation[0::2]),
    }
    shown = ", ".join(f"{part} {value:.2f}" for part, value in ratios.items())
    print(f"Merged / not merged, median of pairs: {shown}")
    print(f"In the processes that run rewards: {workers:.3f} CPU-seconds a step")
    started, loaded = clocks["started"], clocks["loaded"]
    print(f"Before the first step: {started:.1f} CPU-seconds; model and data took {loaded:.1f}")
    largest = max(PARTS, key=parts["merged"].get)
    print(f"The largest share: {largest}")
    figures = {
        "recipe": options.recipe,
        "cpu_seconds": parts,
        "ratios": ratios,
        "workers": workers,
        "clocks": clocks,
        "largest": largest,
    }
    save(options.json, figures)
    return 0


def worker_seconds() -> float:
    """CPU-seconds so far of the processes that this one has started and that still run."""
    import psutil

    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


if __name__ == "__main__":
    raise SystemExit(main())
