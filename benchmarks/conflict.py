"""Time and peak memory of lambda, the conflict weights of one group, over G x G x T: `python
benchmarks/conflict.py`.

Each case runs in a forked process of its own, on one thread: median CPU time of several calls, and
the peak of its resident memory above what the process had before (Linux). The worst of three inputs
counts: random rows, equal rows, rows that share a tenth.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

import torch
from figures import exponent, machine, ratio, save

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gtpo import shaping  # noqa: E402

BOUNDS = {(8, 1500): (5e-3, None), (64, 8192): (1.0, 1e9)}  # (G, T): CPU-seconds, bytes
SIZES, LENGTHS = (4, 8, 16, 32, 64), (512, 1024, 2048, 4096, 8192)
FIXED_SIZE, FIXED_LENGTH = 16, 2048
KINDS = ("random rows", "equal rows", "a tenth shared")
VOCABULARY = 128_256


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--calls",
        type=int,
        default=15,
        help="calls per case, of which the median counts (default: 15)",
    )
    parser.add_argument("--json", type=Path, help="save the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw the growth curves to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)  # forks are safe, and a core is a core
    print(machine())
    print(f"{'G':>4}{'T':>7}  {'input':<16}{'CPU ms':>9}{'peak MB':>9}")

    cases = {}
    for size, length in sorted(
        {*BOUNDS, *((g, FIXED_LENGTH) for g in SIZES), *((FIXED_SIZE, t) for t in LENGTHS)}
    ):
        for kind in KINDS if (size, length) in BOUNDS else KINDS[:1]:
            seconds, peak = cases[size, length, kind] = measured(
                size, length, kind, VOCABULARY, options.calls
            )
            print(
                f"{size:>4}{length:>7}  {kind:<16}{seconds * 1e3:>9.2f}{peak / 1e6:>9.1f}",
                flush=True,
            )

    met = True
    for (size, length), (seconds, peak) in BOUNDS.items():
        worst = [max(column) for column in zip(*(cases[size, length, kind] for kind in KINDS))]
        ok = worst[0] < seconds and (peak is None or worst[1] < peak)
        met &= ok
        bound = f"{seconds * 1e3:g} ms" + (f" and {peak / 1e6:g} MB" if peak else "")
        print(
            f"G {size} x T {length}: {worst[0] * 1e3:.2f} ms and {worst[1] / 1e6:.1f} MB at worst;"
            f" bound {bound}: {'met' if ok else 'NOT MET'}"
        )

    over_size = [cases[g, FIXED_LENGTH, KINDS[0]] for g in SIZES]
    over_length = [cases[FIXED_SIZE, t, KINDS[0]] for t in LENGTHS]
    # the smallest is overhead
    growth = {
        f"{what} over {axis}": exponent(sizes[1:], [values[i] for values in curve][1:])
        for axis, sizes, curve in (("G", SIZES, over_size), ("T", LENGTHS, over_length))
        for i, what in enumerate(("time", "memory"))
    }
    print(
        "Growth exponents, the smallest size left out: "
        + ", ".join(f"{name} {value:.2f}" for name, value in growth.items())
    )
    small, large = zip(
        *(
            [
                measured(8, 1500, KINDS[0], vocabulary, options.calls)[0]
                for vocabulary in (32_000, 256_000)
            ]
            for _ in range(9)
        )
    )
    by_vocabulary = ratio(large, small)
    print(f"Vocabulary 256 k against 32 k, G 8 x T 1500: {by_vocabulary:.2f} of the time")

    if options.plot:
        draw(options.plot, over_size, over_length, growth)
    save(
        options.json,
        {
            "cases": [
                {"G": g, "T": t, "input": kind, "cpu_seconds": values[0], "peak_bytes": values[1]}
                for (g, t, kind), values in cases.items()
            ],
            "growth_exponents": growth,
            "vocabulary_ratio": by_vocabulary,
            "bounds_met": met,
        },
    )
    return 0 if met else 1


def rows(
    size: int, length: int, kind: str, vocabulary: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, mask (G, T) and advantages (G,) of a group with completions on both sides."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (size, length), generator=generator)
    shared = {"random rows": 0, "equal rows": length, "a tenth shared": length // 10}[kind]
    ids[:, :shared] = ids[0, :shared]
    advantages = torch.tensor([1.0, -1.0]).repeat(size)[:size]
    return ids, torch.ones_like(ids), advantages


def measured(size: int, length: int, kind: str, vocabulary: int, calls: int) -> tuple[float, int]:
    """Median CPU-seconds of a call, and the bytes that the process grew by at most, in a fork that
    has done nothing else.
    """
    reader, writer = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            group = rows(size, length, kind, vocabulary)
            weights(*rows(2, 8, kind, vocabulary))  # what a first call loads
            before = resident("VmRSS", reset_peak=True)
            taken = []
            for _ in range(calls):
                began = time.process_time()
                weights(*group)
                taken.append(time.process_time() - began)
            os.write(
                writer, json.dumps([statistics.median(taken), resident("VmHWM") - before]).encode()
            )
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as said:
        figures = json.loads(said.read())
    os.waitpid(pid, 0)
    return tuple(figures)


def weights(ids, mask, advantages) -> torch.Tensor:
    return shaping.token_weights(shaping.conflict_tokens(ids, mask, advantages), advantages, 2.0)


def resident(field: str, reset_peak: bool = False) -> int:
    """This process's resident memory in bytes: VmRSS now, VmHWM at its peak since the last
    reset.
    """
    if reset_peak:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith(field)
    )
    return int(line.split()[1]) * 1024


def draw(file: Path, over_size: list, over_length: list, growth: dict) -> None:
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
            side.loglog(
                sizes,
                [values[i] / unit for values in curve],
                "o-",
                color=color,
                label=f"{what}, exponent {growth[f'{what} over {name}']:.2f}",
            )
            side.set_ylabel(
                {"time": "CPU time, ms", "memory": "peak memory, MB"}[what], color=color
            )
        axis.set_xticks(sizes, sizes)
        axis.minorticks_off()
        axis.set_xlabel(f"{name} ({fixed})")
        axis.legend(handles=axis.lines + other.lines, loc="upper left", frameon=False)
    figure.suptitle("Conflict weights of one group")
    figure.savefig(file, dpi=110)
    print(f"Written: {file}")


if __name__ == "__main__":
    raise SystemExit(main())
