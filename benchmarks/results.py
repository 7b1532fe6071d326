"""Writes the tables and figures of docs/results.md: `python benchmarks/results.py`.

Reads the files that compare.py wrote. Replaces the text between the marks of docs/results.md, and
docs/results/*.png. People write the other sentences of the page, and must read them again when the
numbers change.
"""

import json
import re
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parent.parent
RUNS, PAGE = ROOT / "docs/results/runs", ROOT / "docs/results.md"
LAST = 0.1  # "at the end" means the last tenth of the steps
CLAIM = 10  # a difference is claimed only with at least this many seeds
NAMES = {
    "grpo": "GRPO",
    "grpo_std": "GRPO, divided by the standard deviation",
    "gtpo": "GTPO",
    "neutral": "GTPO, neutral (ours)",
    "no_lambda": "GTPO without lambda",
    "no_entropy": "GTPO without gate and penalty",
    "w_raw_1": "GTPO, w_raw 1",
    "released": "GTPO as released",
}
# Okabe and Ito's colours. Line styles differ too, so that nobody needs colours to tell lines apart.
STYLES = {
    "grpo": ("#000000", "-"),
    "grpo_std": ("#E69F00", "--"),
    "gtpo": ("#0072B2", "-"),
    "neutral": ("#009E73", "-."),
    "no_lambda": ("#D55E00", ":"),
    "no_entropy": ("#56B4E9", "--"),
    "w_raw_1": ("#CC79A7", "-."),
    "released": ("#999999", ":"),
}
COLUMNS = {  # title: figure of a run, with shares in percent
    "greedy accuracy, %": lambda run: 100 * run["greedy"]["after"]["correct"],
    "sampled accuracy, %": lambda run: 100 * run["sampled"]["correct"],
    "format, %": lambda run: 100 * run["sampled"]["format"],
    "entropy, nats": lambda run: at_the_end(run, "entropy"),
    "length, tokens": lambda run: at_the_end(run, "length"),
    "conflict tokens, %": lambda run: 100 * at_the_end(run, "conflict"),
    "filtered, %": lambda run: 100 * at_the_end(run, "filtered"),
    "net push on conflict tokens, %": lambda run: 100 * throughout(run, "net_push"),
}
CURVES = {
    "correct": "correct (sampled, training prompts)",
    "entropy": "mean token entropy, nats",
    "format": "well formed",
    "conflict": "conflict tokens, share",
    "net_push": "net push on conflict tokens, share",
    "filtered": "filtered completions, share",
}


def main() -> None:
    """Runs the command line."""
    runs = {}
    for file in sorted(RUNS.rglob("*.json")):
        run = json.loads(file.read_text(encoding="utf-8"))
        runs.setdefault(run["task"], {}).setdefault(run["variant"], {})[run["seed"]] = run
    text = PAGE.read_text(encoding="utf-8")
    for task, variants in runs.items():
        variants = {name: variants[name] for name in NAMES if name in variants}
        draw(task, variants)
        text = between(text, task, f"{table(variants)}\n\n{paired(variants)}")
    PAGE.write_text(between(text, "machine", cost(runs)), encoding="utf-8")
    print(f"Wrote {PAGE.relative_to(ROOT)}")


def between(text: str, mark: str, content: str) -> str:
    """`text` with `content` between `<!-- mark -->` and `<!-- /mark -->`, if it has these marks."""
    pattern = rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{content}\n{m[2]}", text, flags=re.DOTALL)


def at_the_end(run: dict, name: str) -> float:
    """The mean of a figure over the last tenth of the steps."""
    values = known(run, name)
    return float(numpy.mean(values[-max(1, round(LAST * len(values))) :]))


def throughout(run: dict, name: str) -> float:
    """The mean of a figure over all steps."""
    return float(numpy.mean(known(run, name)))


def known(run: dict, name: str) -> list[float]:
    """A figure at the steps that have one."""
    return [value for value in run["steps"][name] if value is not None]


def table(variants: dict[str, dict]) -> str:
    """Mean and standard deviation over seeds, with a row per variant."""
    lines = [["", "seeds", *COLUMNS]]
    for name, runs in variants.items():
        rows = [[figure(run) for figure in COLUMNS.values()] for run in runs.values()]
        figures = numpy.array(rows)  # (seeds, columns)
        spread = figures.std(axis=0, ddof=1) if len(figures) > 1 else figures[0] * 0
        cells = [
            f"{mean:.{digits(title)}f} ± {deviation:.{digits(title)}f}"
            for title, mean, deviation in zip(COLUMNS, figures.mean(axis=0), spread, strict=True)
        ]
        lines.append([NAMES[name], str(len(figures)), *cells])
    return markdown(lines)


def paired(variants: dict[str, dict]) -> str:
    """The mean difference from GRPO with the same seed, with its 95 % interval (Student's t).

    A difference is bold if its interval excludes 0 and there are enough seeds for a claim.
    """
    lines = [["difference from GRPO", "seeds", *COLUMNS]]
    for name, runs in variants.items():
        seeds = sorted(runs.keys() & variants["grpo"].keys())
        if name == "grpo" or len(seeds) < 2:
            continue
        cells = []
        for title, figure in COLUMNS.items():
            values = [figure(runs[seed]) - figure(variants["grpo"][seed]) for seed in seeds]
            cells.append(difference(values, digits(title)))
        lines.append([NAMES[name], str(len(seeds)), *cells])
    return markdown(lines)


def difference(values: list[float], places: int) -> str:
    """The mean of `values` and its interval, with this many decimal places."""
    from scipy import stats

    mean, error = numpy.mean(values), stats.sem(values)
    if error == 0:
        return f"{mean:+.{places}f}"
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error)
    cell = f"{mean:+.{places}f} [{low:+.{places}f}, {high:+.{places}f}]"
    return f"**{cell}**" if (low > 0 or high < 0) and len(values) >= CLAIM else cell


def digits(title: str) -> int:
    """The decimal places of a column."""
    return 3 if "nats" in title else 1


def markdown(lines: list[list[str]]) -> str:
    """A table whose first line is the header."""
    head, *rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, f"|{'---|' * len(lines[0])}", *rows])


def cost(runs: dict) -> str:
    """The number of runs, their CPU hours, and the versions they ran with."""
    seeds = [seeds for variants in runs.values() for seeds in variants.values()]
    every = [run for by_seed in seeds for run in by_seed.values()]
    hours = sum(run["cpu_seconds"] for run in every) / 3600
    versions = every[0]["versions"]
    commits = {re.sub("(?<=^.{10})[0-9a-f]+", "", run["versions"]["commit"]) for run in every}
    libraries = [f"{name} {versions[name]}" for name in ("torch", "transformers", "trl", "peft")]
    return (
        f"{len(every)} runs, {hours:.1f} CPU hours in all (training and evaluation, one thread"
        f" each). {', '.join(libraries)}, Python {versions['python']}; commits"
        f" {', '.join(sorted(commits))}."
    )


def draw(task: str, variants: dict[str, dict]) -> None:
    """Draws docs/results/TASK.png: the mean over seeds, and a band of one standard deviation.

    Curves are smoothed over a tenth of the steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    for axis, (name, title) in zip(axes.flat, CURVES.items(), strict=True):
        for variant, runs in variants.items():
            length = min(len(run["steps"][name]) for run in runs.values())
            values = [run["steps"][name][:length] for run in runs.values()]
            curves = numpy.array(values, dtype=float)  # (seeds, steps)
            curves = numpy.stack([smooth(curve, max(1, length // 10)) for curve in curves])
            mean, spread = numpy.nanmean(curves, axis=0), numpy.nanstd(curves, axis=0)
            steps, (colour, style) = range(1, length + 1), STYLES[variant]
            axis.plot(steps, mean, style, color=colour, label=NAMES[variant])
            band = {"color": colour, "alpha": 0.1, "linewidth": 0}
            axis.fill_between(steps, mean - spread, mean + spread, **band)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    figure.legend(
        *axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9
    )
    figure.savefig(ROOT / f"docs/results/{task}.png", dpi=80)
    pyplot.close(figure)


def smooth(values: numpy.ndarray, width: int) -> numpy.ndarray:
    """At each step, the mean of the values known among the last `width`; NaN if there is none."""
    windows = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return numpy.array(
        [numpy.nan if numpy.isnan(window).all() else numpy.nanmean(window) for window in windows]
    )


if __name__ == "__main__":
    main()
