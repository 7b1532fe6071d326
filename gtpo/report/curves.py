"""Curves of one or several configurations with matplotlib: a PNG, and one inline SVG per panel for
the page.

Colours are Okabe and Ito's, told apart by line style as well. In the SVGs they are CSS variables,
so that the page's light and dark themes decide them.
"""

import io
import math
import re
import statistics
import textwrap
from pathlib import Path
from typing import NamedTuple

from gtpo.report.comparison import Configuration, spread

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ((), (6, 2), (1.5, 1.5), (6, 2, 1.5, 2), (3, 1), (8, 2, 1.5, 2, 1.5, 2))
# stand-ins in the SVGs for currentColor, --grid and --mark
INK, GRID, MARK = "#a0a0f0", "#a0a0f1", "#a0a0f2"
STAND_INS = {INK: "currentColor", GRID: "var(--grid)", MARK: "var(--mark)"} | {
    f"#a0a00{i}": f"var(--series-{i})" for i in range(len(COLOURS))
}
MOST_POINTS = 3000  # of all lines of a panel together


class Panel(NamedTuple):
    """One metric: the first of `metrics` that a run has, times the factor beside it."""

    name: str
    title: str
    unit: str
    metrics: tuple[tuple[str, float], ...]
    share: bool = False  # drawn from 0 to 1
    rare: bool = False  # or to its largest value


PANELS = (
    Panel("reward", "Reward", "", (("reward", 1),)),
    Panel(
        "format",
        "Format rate",
        "share of completions",
        (("reward/format_rate", 1), ("reward/formatting_avg", 0.1)),
        True,
    ),
    Panel(
        "correct",
        "Correct rate",
        "share of completions",
        (("reward/correct_rate", 1), ("reward/correctness_avg", 0.1)),
        True,
    ),
    Panel(
        "held_out", "Held-out accuracy", "share of problems", (("evaluation/accuracy", 1),), True
    ),
    Panel("entropy", "Entropy", "nats per token", (("gtpo/completion_entropy", 1), ("entropy", 1))),
    Panel(
        "conflict",
        "Conflict tokens",
        "share of tokens",
        (("gtpo/frac_conflict_tokens", 1),),
        True,
        True,
    ),
    Panel(
        "filtered",
        "Filtered completions",
        "share, entropy above threshold",
        (("gtpo/frac_filtered", 1),),
        True,
        True,
    ),
    Panel(
        "no_signal",
        "Groups without signal",
        "share of groups",
        (("frac_reward_zero_std", 1),),
        True,
    ),
    Panel("length", "Completion length", "tokens", (("completions/mean_length", 1),)),
    Panel(
        "truncated",
        "Truncated completions",
        "share of completions",
        (("completions/clipped_ratio", 1),),
        True,
        True,
    ),
    Panel("grad_norm", "Gradient norm", "", (("grad_norm", 1),)),
    Panel("step_time", "Step time", "seconds", (("step_time", 1),)),
)


def panel_series(panel: Panel, configuration: Configuration) -> dict[int, list[float]]:
    """The panel's metric by step, one value per run."""
    for metric, factor in panel.metrics:
        if series := configuration.series(metric):
            return {step: [factor * value for value in values] for step, values in series.items()}
    return {}


def panels_with_data(configurations: list[Configuration]) -> list[Panel]:
    return [
        panel
        for panel in PANELS
        if any(panel_series(panel, configuration) for configuration in configurations)
    ]


def write_png(file: Path, configurations: list[Configuration], software: str) -> None:
    """All panels in one picture."""
    import matplotlib
    from matplotlib.figure import Figure

    panels = panels_with_data(configurations)
    rows = max(1, -(-len(panels) // 3))
    with matplotlib.rc_context(
        {"font.size": 9, "axes.prop_cycle": matplotlib.cycler(color=COLOURS)}
    ):
        figure = Figure(figsize=(13, 2.9 * rows + 0.6), layout="constrained")
        axes = list(figure.subplots(rows, 3, squeeze=False).flat)
        for axis, panel in zip(axes, panels, strict=False):
            _draw(
                axis, panel, configurations, COLOURS, ink="#222222", grid="#dddddd", mark="#555555"
            )
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        lines = [_line(i, COLOURS) for i in range(len(configurations))]
        figure.legend(
            lines,
            [textwrap.fill(configuration.label, 100) for configuration in configurations],
            loc="outside upper left",
            frameon=False,
        )
        figure.savefig(file, format="png", dpi=100, metadata={"Software": software})


def inline_svgs(configurations: list[Configuration]) -> dict[str, str]:
    """Panel name -> SVG element to put into the page."""
    import matplotlib
    from matplotlib.figure import Figure

    found = {}
    for panel in panels_with_data(configurations):
        style = {
            "font.size": 9,
            "svg.fonttype": "none",
            "svg.hashsalt": panel.name,
            "path.simplify": True,
        }
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(4.6, 2.5), layout="constrained")
            _draw(
                figure.subplots(),
                panel,
                configurations,
                list(STAND_INS)[3:],
                ink=INK,
                grid=GRID,
                mark=MARK,
            )
            file = io.StringIO()
            figure.savefig(
                file,
                format="svg",
                transparent=True,
                metadata={"Date": None, "Creator": None, "Format": None, "Type": None},
            )
        found[panel.name] = _inline(file.getvalue())
    return found


def _inline(svg: str) -> str:
    """The bare element, scaling with the page, its colours given to the page's style."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(
        r"^<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>",
        r'<svg \1 aria-hidden="true" focusable="false">',
        svg,
    )
    svg = re.sub(
        r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", svg, flags=re.DOTALL
    )
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    svg = re.sub(r"#a0a0[0f]\d", lambda match: STAND_INS[match[0]], svg)
    svg = re.sub(r"(?:font-family|font): [^;\"]*(?:; |(?=\"))", "", svg)  # the page's own
    return re.sub(r"\n\s*", "\n", svg).strip()


def _draw(
    axis,
    panel: Panel,
    configurations: list[Configuration],
    colours,
    *,
    ink: str,
    grid: str,
    mark: str,
) -> None:
    for i, configuration in enumerate(configurations):
        points = _binned(
            panel_series(panel, configuration), max(50, MOST_POINTS // len(configurations))
        )
        if points[0]:
            _draw_line(
                axis,
                panel,
                i,
                colours,
                *points,
                seeds=len(configuration.runs) > 1,
                alone=len(configurations) == 1,
            )
    unit = f"{panel.unit}{', log scale' if panel.name == 'entropy' and _draw_thresholds(axis, configurations, mark) else ''}"
    if len(configurations) == 1:
        for step in {step for run in configurations[0].runs for step, _, _ in run.alarms}:
            axis.axvline(step, color=mark, linewidth=0.8, linestyle=":")
    low, high = axis.get_ylim()
    if panel.share:
        high = min(1.0, max(0.1, high)) if panel.rare else 1.0
        axis.set_ylim(-0.03 * high, 1.03 * high)
    elif panel.name != "reward" and axis.get_yscale() == "linear":
        axis.set_ylim(min(low, 0), 1.05 * high)
    axis.set_title(panel.title, loc="left", color=ink, fontsize=10, fontweight="bold")
    axis.set_ylabel(unit, color=ink)
    axis.set_xlabel("step", color=ink)
    axis.tick_params(which="both", colors=ink, length=3)
    axis.grid(color=grid, linewidth=0.7)
    axis.set_axisbelow(True)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(grid)


def _draw_line(
    axis, panel: Panel, i: int, colours, steps, means, lows, highs, *, seeds: bool, alone: bool
) -> None:
    """One configuration: a band where it has seeds, else the single steps if it is alone; above it
    the running mean.
    """
    colour, few = colours[i % len(COLOURS)], len(steps) <= 20 or panel.name == "held_out"
    smooth, lows, highs = (
        values if few else _running_mean(values, max(1, len(values) // 30))
        for values in (means, lows, highs)
    )
    if seeds:
        low = -math.inf if panel.name == "reward" else 0  # a band ends where its metric does
        high = 1 if panel.share else math.inf
        axis.fill_between(
            steps,
            [max(low, value) for value in lows],
            [min(high, value) for value in highs],
            color=colour,
            alpha=0.18,
            linewidth=0,
        )
    elif alone and not few:
        axis.plot(steps, means, color=colour, linewidth=0.8, alpha=0.35)
    axis.plot(
        steps,
        smooth,
        color=colour,
        linewidth=1.8,
        dashes=DASHES[i % len(DASHES)] or (None, None),
        marker="os^Dv*"[i % 6] if few else None,
        markersize=4,
    )


def _draw_thresholds(axis, configurations: list[Configuration], mark: str) -> bool:
    """The thresholds beside the entropies; whether that took a log scale."""
    entropies = [value for line in axis.get_lines() for value in line.get_ydata()]
    thresholds = sorted(
        {run.number("gtpo_runtime.ent_threshold", 0.7) for c in configurations for run in c.runs}
    )
    for threshold in thresholds:
        axis.axhline(threshold, color=mark, linewidth=1, linestyle=(0, (4, 3)))
        axis.annotate(
            f"threshold {threshold:g}",
            (1, threshold),
            xycoords=("axes fraction", "data"),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            color=mark,
            fontsize=8,
        )
    lowest = min([*entropies, *thresholds])
    if lowest >= thresholds[-1] / 10:
        return False
    axis.set_yscale("log")  # falling towards zero is as bad as rising: let it be seen
    axis.set_ylim(max(lowest, 1e-4) * 0.7, max([*entropies, *thresholds]) * 1.6)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    return True


def _line(i: int, colours):
    from matplotlib.lines import Line2D

    return Line2D(
        [],
        [],
        color=colours[i % len(COLOURS)],
        linewidth=1.8,
        dashes=DASHES[i % len(DASHES)] or (None, None),
    )


def _binned(
    series: dict[int, list[float]], most: int
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps, means and means -/+ one standard deviation over runs, neighbours averaged so that at
    most `most` remain.
    """
    steps = list(series)
    width = -(-len(steps) // most) or 1
    found: tuple[list, list, list, list] = ([], [], [], [])
    for start in range(0, len(steps), width):
        chunk = steps[start : start + width]
        mean = statistics.fmean(statistics.fmean(series[step]) for step in chunk)
        deviation = statistics.fmean(spread(series[step]) for step in chunk)
        for values, value in zip(
            found, (statistics.fmean(chunk), mean, mean - deviation, mean + deviation), strict=True
        ):
            values.append(value)
    return found


def _running_mean(values: list[float], reach: int) -> list[float]:
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
