"""Where a step of the embedded demo goes, with the adapter merged while it generates and without:
`python benchmarks/demo_step.py`.

Trains recipes/demo.yaml with `train_model.py`'s own main; every other step generates without
merging, so both are measured side by side. CPU-seconds of one thread. The processes that grade are
counted apart; what happens before the first step as well.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

# steps that do not count: the first ones fill caches, and check what completions look like
WARM_UP = 4


def main() -> int:
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
    os.chdir(ROOT)  # the recipe names its files from here
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    from figures import machine, ratio, save
    from shares import PARTS, Shares, medians

    import train_model
    from gtpo.hooks import merged_generation as merging
    from gtpo.runs import trainers as run_trainers

    most, trainers, clocks, graded = merging.MOST_BYTES, [], {}, []

    def before_step(step: int) -> None:
        merging.MOST_BYTES = most if step % 2 else -1
        clocks.setdefault("started", time.process_time())
        if step >= WARM_UP:
            graded.append(worker_seconds())

    make_trainer = run_trainers.make_trainer

    def make_watched(*args, **kwargs):
        clocks["loaded"] = time.process_time()
        trainers.append(Shares(make_trainer(*args, **kwargs), before_step))
        return trainers[0].trainer

    run_trainers.make_trainer = make_watched
    with tempfile.TemporaryDirectory() as folder:
        flags = [
            "--output_root",
            folder,
            "--training.max_steps",
            str(options.steps),
            "--evaluation.path",
            "null",
        ]
        if code := train_model.main([options.recipe, *flags]):
            return code
    workers = (graded[-1] - graded[0]) / (len(graded) - 1)

    counted = trainers[0].steps[WARM_UP:]
    found = {"not merged": medians(counted[0::2]), "merged": medians(counted[1::2])}
    print(machine())
    print(f"Median CPU-seconds of a step, {len(counted) // 2} steps of each, in turn:")
    print(f"{'':<12}" + "".join(f"{part:>17}" for part in (*PARTS, "step")))
    for name, parts in found.items():
        print(
            f"{name:<12}"
            + "".join(
                f"{parts[part]:>10.3f} {parts[part] / parts['step']:>5.0%} "
                for part in (*PARTS, "step")
            )
        )
    totals = [sum(step.values()) for step in counted]
    merged = {
        "step": ratio(totals[1::2], totals[0::2]),
        "generation": ratio(
            [s["generation"] for s in counted[1::2]], [s["generation"] for s in counted[0::2]]
        ),
    }
    print(
        "Merged / not merged, median of pairs: "
        + ", ".join(f"{what} {value:.2f}" for what, value in merged.items())
    )
    print(f"Beside it, in the processes that grade: {workers:.3f} CPU-seconds a step")
    print(
        f"Before the first step: {clocks['started']:.1f} CPU-seconds, of which"
        f" {clocks['loaded']:.1f} until model and data are loaded"
    )
    largest = max(PARTS, key=found["merged"].get)
    print(f"The largest share: {largest}")
    save(
        options.json,
        {
            "recipe": options.recipe,
            "cpu_seconds": found,
            "ratios": merged,
            "workers": workers,
            "clocks": clocks,
            "largest": largest,
        },
    )
    return 0


def worker_seconds() -> float:
    """CPU-seconds so far of the processes that this one has started and that still run."""
    import psutil

    return sum(sum(child.cpu_times()[:2]) for child in psutil.Process().children(recursive=True))


if __name__ == "__main__":
    raise SystemExit(main())
