"""Times lambda, the conflict weights of one group: `python benchmarks/conflict.py`.

Each case runs in a forked process, on one thread. It takes the median CPU time of several calls,
and the peak of resident memory above the memory before (Linux). The worst of three inputs counts:
random rows, equal rows, and rows that share a tenth.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch
from measure import exponent, machine_line, ratio, save

from gtpo import shaping

BOUNDS = {(8, 1500): (5e-3, None), (64, 8192): (1.0, 1e9)}  # (G, T): CPU-seconds, bytes
SIZES, LENGTHS = (4, 8, 16, 32, 64), (512, 1024, 2048, 4096, 8192)
FIXED_SIZE, FIXED_LENGTH = 16, 2048
INPUTS = ("random rows", "equal rows", "a tenth shared")
VOCABULARY = 128_256


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--calls",
        type=int,
        default=15,
        help="calls per case; the median counts (default: 15)",
    )
    parser.add_argument("--json", type=Path, help="save the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw the growth curves to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)  # makes forks safe, and timings those of one core
    print(machine_line())
    print(f"{'G':>4}{'T':>7}  {'input':<16}{'CPU ms':>9}{'peak MB':>9}")

    cases = {}
    axes = {*((size, FIXED_LENGTH) for size in SIZES), *((FIXED_SIZE, t) for t in LENGTHS)}
    for size, length in sorted({*BOUNDS, *axes}):
        for kind in INPUTS if (size, length) in BOUNDS else INPUTS[:1]:
            seconds, peak = measured(size, length, kind, VOCABULARY, options.calls)
            cases[size, length, kind] = seconds, peak
            row = f"{size:>4}{length:>7}  {kind:<16}{seconds * 1e3:>9.2f}{peak / 1e6:>9.1f}"
            print(row, flush=True)

    met = True
    for (size, length), (seconds, peak) in BOUNDS.items():
        most_seconds = max(cases[size, length, kind][0] for kind in INPUTS)
        most_bytes = max(cases[size, length, kind][1] for kind in INPUTS)
        ok = most_seconds < seconds and (peak is None or most_bytes < peak)
        met &= ok
        worst = f"{most_seconds * 1e3:.2f} ms and {most_bytes / 1e6:.1f} MB at worst"
        bound = f"{seconds * 1e3:g} ms" + (f" and {peak / 1e6:g} MB" if peak else "")
        print(f"G {size} x T {length}: {worst}; bound {bound}: {'met' if ok else 'NOT MET'}")

    over_size = [cases[g, FIXED_LENGTH, INPUTS[0]] for g in SIZES]
    over_length = [cases[FIXED_SIZE, t, INPUTS[0]] for t in LENGTHS]
    # The smallest size is left out, because there the overhead dominates.
    growth = {
        f"{what} over {axis}": exponent(sizes[1:], [values[i] for values in curve][1:])
        for axis, sizes, curve in (("G", SIZES, over_size), ("T", LENGTHS, over_length))
        for i, what in enumerate(("time", "memory"))
    }
    exponents = ", ".join(f"{name} {value:.2f}" for name, value in growth.items())
    print(f"Growth exponents, the smallest size left out: {exponents}")
    small, large = [], []
    for _ in range(9):
        for vocabulary, seconds in ((32_000, small), (256_000, large)):
            seconds.append(measured(8, 1500, INPUTS[0], vocabulary, options.calls)[0])
    by_vocabulary = ratio(large, small)
    print(f"Vocabulary 256 k against 32 k, G 8 x T 1500: {by_vocabulary:.2f} of the time")

    if options.plot:
        draw(options.plot, over_size, over_length, growth)
    figures = {
        "cases": [
            {"G": g, "T": t, "input": kind, "cpu_seconds": seconds, "peak_bytes": peak}
            for (g, t, kind), (seconds, peak) in cases.items()
        ],
        "growth_exponents": growth,
        "vocabulary_ratio": by_vocabulary,
        "bounds_met": met,
    }
    save(options.json, figures)
    return 0 if met else 1


def rows(
    size: int, length: int, kind: str, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids and mask (G, T) and advantages (G,) of a group with advantages of both signs."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (size, length), generator=generator)
    shared = {"random rows": 0, "equal rows": length, "a tenth shared": length // 10}[kind]
    ids[:, :shared] = ids[0, :shared]
    advantages = torch.tensor([1.0, -1.0]).repeat(size)[:size]
    return ids, torch.ones_like(ids), advantages


def measured(size: int, length: int, kind: str, vocabulary: int, calls: int) -> tuple[float, int]:
    """Median CPU-seconds of a call, and the most bytes by which the process grew.

    A fork that does nothing else runs the calls.
    """
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            group = rows(size, length, kind, vocabulary)
            weights(*rows(2, 8, kind, vocabulary))  # the first call loads code
            before = resident("VmRSS", reset_peak=True)
            taken = []
            for _ in range(calls):
                began = time.process_time()
                weights(*group)
                taken.append(time.process_time() - began)
            growth = resident("VmHWM") - before
            os.write(writer, json.dumps([statistics.median(taken), growth]).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        seconds, peak = json.loads(pipe.read())
    os.waitpid(pid, 0)
    return seconds, peak


def weights(ids, mask, advantages) -> torch.Tensor:
    """lambda of a group, (G, T)."""
    return shaping.token_weights(shaping.conflict_tokens(ids, mask, advantages), advantages, 2.0)


def resident(field: str, reset_peak: bool = False) -> int:
    """This process's resident memory in bytes: VmRSS now, VmHWM the peak since the last reset."""
    if reset_peak:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    line = next(line for line in lines if line.startswith(field))
    return int(line.split()[1]) * 1024


def draw(file: Path, over_size: list, over_length: list, growth: dict) -> None:
    """Draws time and memory over G and over T."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for axis, name, sizes, curve, fixed in (
        (axes[0], "G", SIZES, over_size, f"T = {FIXED_LENGTH}"),
        (axes[1], "T", LENGTHS, over_length, f"G = {FIXED_SIZE}"),
    ):
        other = axis.twinx()
        for side, i, what, unit, color in (
            (axis, 0, "time", 1e-3, "tab:blue"),
            (other, 1, "memory", 1e6, "tab:orange"),
        ):
            label = f"{what}, exponent {growth[f'{what} over {name}']:.2f}"
            values = [values[i] / unit for values in curve]
            side.loglog(sizes, values, "o-", color=color, label=label)
            ylabel = {"time": "CPU time, ms", "memory": "peak memory, MB"}[what]
            side.set_ylabel(ylabel, color=color)
        axis.set_xticks(sizes, sizes)
        axis.minorticks_off()
        axis.set_xlabel(f"{name} ({fixed})")
        axis.legend(handles=axis.lines + other.lines, loc="upper left", frameon=False)
    figure.suptitle("Conflict weights of one group")
    figure.savefig(file, dpi=110)
    print(f"Written: {file}")


if __name__ == "__main__":
    raise SystemExit(main())
