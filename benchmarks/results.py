"""Tables and figures of docs/results.md, from the files that compare.py left: `python
benchmarks/results.py`.

Replaces what stands between the marks of docs/results.md, and docs/results/*.png. The sentences
around it are written by hand and have to be read again when the numbers change. Needs no model.
"""

import json
import re
from pathlib import Path

import numpy

ROOT = Path(__file__).resolve().parent.parent
RUNS, PAGE = ROOT / "docs/results/runs", ROOT / "docs/results.md"
LAST = 0.1  # "at the end" means over the last tenth of the steps
CLAIM = 10  # seeds from which on a difference is claimed
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
# Okabe and Ito's colours, and a line style each, so that colour is not needed to tell them apart.
STYLES = dict(
    zip(
        NAMES,
        [
            ("#000000", "-"),
            ("#E69F00", "--"),
            ("#0072B2", "-"),
            ("#009E73", "-."),
            ("#D55E00", ":"),
            ("#56B4E9", "--"),
            ("#CC79A7", "-."),
            ("#999999", ":"),
        ],
        strict=True,
    )
)
COLUMNS = {  # title -> figure of a run, in percent where it is a share
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
    """`text` with what stands between `<!-- mark -->` and `<!-- /mark -->` replaced; unchanged
    without the marks.
    """
    return re.sub(
        rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)",
        lambda m: f"{m[1]}{content}\n{m[2]}",
        text,
        flags=re.DOTALL,
    )


def at_the_end(run: dict, name: str) -> float:
    values = known(run, name)
    return float(numpy.mean(values[-max(1, round(LAST * len(values))) :]))


def throughout(run: dict, name: str) -> float:
    return float(numpy.mean(known(run, name)))


def known(run: dict, name: str) -> list[float]:
    return [value for value in run["steps"][name] if value is not None]


def table(variants: dict[str, dict]) -> str:
    """Mean and standard deviation over seeds, a row per variant."""
    lines = [["", "seeds", *COLUMNS]]
    for name, runs in variants.items():
        figures = numpy.array(
            [[figure(run) for figure in COLUMNS.values()] for run in runs.values()]
        )
        spread = figures.std(axis=0, ddof=1) if len(figures) > 1 else figures[0] * 0
        cells = zip(COLUMNS, figures.mean(axis=0), spread)
        lines.append(
            [
                NAMES[name],
                str(len(figures)),
                *(
                    f"{mean:.{digits(title)}f} ± {sd:.{digits(title)}f}"
                    for title, mean, sd in cells
                ),
            ]
        )
    return markdown(lines)


def paired(variants: dict[str, dict]) -> str:
    """Differences from GRPO, seed by seed: the mean with its 95 % interval (Student's t).

    Bold where it leaves out 0 and the seeds are enough to claim something.
    """
    lines = [["difference from GRPO", "seeds", *COLUMNS]]
    for name, runs in variants.items():
        seeds = sorted(runs.keys() & variants["grpo"].keys())
        if name == "grpo" or len(seeds) < 2:
            continue
        cells = [
            difference(
                [figure(runs[seed]) - figure(variants["grpo"][seed]) for seed in seeds],
                digits(title),
            )
            for title, figure in COLUMNS.items()
        ]
        lines.append([NAMES[name], str(len(seeds)), *cells])
    return markdown(lines)


def difference(values: list[float], places: int) -> str:
    from scipy import stats

    mean, error = numpy.mean(values), stats.sem(values)
    if error == 0:
        return f"{mean:+.{places}f}"
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=error)
    cell = f"{mean:+.{places}f} [{low:+.{places}f}, {high:+.{places}f}]"
    return f"**{cell}**" if (low > 0 or high < 0) and len(values) >= CLAIM else cell


def digits(title: str) -> int:
    return 3 if "nats" in title else 1


def markdown(lines: list[list[str]]) -> str:
    head, *rows = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, f"|{'---|' * len(lines[0])}", *rows])


def cost(runs: dict) -> str:
    every = [
        run for variants in runs.values() for seeds in variants.values() for run in seeds.values()
    ]
    hours = sum(run["cpu_seconds"] for run in every) / 3600
    one = every[0]["versions"]
    commits = ", ".join(
        sorted({re.sub("(?<=^.{10})[0-9a-f]+", "", run["versions"]["commit"]) for run in every})
    )
    return (
        f"{len(every)} runs, {hours:.1f} CPU hours in all (training and evaluation, one thread"
        f" each). torch {one['torch']}, transformers {one['transformers']}, trl {one['trl']}, peft"
        f" {one['peft']}, Python {one['python']}; commits {commits}."
    )


def draw(task: str, variants: dict[str, dict]) -> None:
    """docs/results/TASK.png: mean over seeds and a band of one standard deviation, smoothed over a
    tenth of the steps.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7), constrained_layout=True)
    for axis, (name, title) in zip(axes.flat, CURVES.items()):
        for variant, runs in variants.items():
            length = min(len(run["steps"][name]) for run in runs.values())
            # (seeds, steps)
            curves = numpy.array(
                [run["steps"][name][:length] for run in runs.values()], dtype=float
            )
            curves = numpy.stack([smooth(curve, max(1, length // 10)) for curve in curves])
            mean, spread = numpy.nanmean(curves, axis=0), numpy.nanstd(curves, axis=0)
            colour, style = STYLES[variant]
            axis.plot(range(1, length + 1), mean, style, color=colour, label=NAMES[variant])
            axis.fill_between(
                range(1, length + 1),
                mean - spread,
                mean + spread,
                color=colour,
                alpha=0.1,
                linewidth=0,
            )
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=9)
        axis.grid(alpha=0.3)
    figure.legend(
        *axes.flat[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9
    )
    figure.savefig(ROOT / f"docs/results/{task}.png", dpi=80)
    pyplot.close(figure)


def smooth(values: numpy.ndarray, width: int) -> numpy.ndarray:
    """The mean of the last `width` known values at each step."""
    return numpy.array(
        [
            (
                numpy.nanmean(values[max(0, i + 1 - width) : i + 1])
                if not numpy.isnan(values[max(0, i + 1 - width) : i + 1]).all()
                else numpy.nan
            )
            for i in range(len(values))
        ]
    )


if __name__ == "__main__":
    main()
