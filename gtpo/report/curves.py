"""Curves of configurations, drawn with matplotlib: one PNG, and one inline SVG per panel.

The colours are those of Okabe and Ito. Line styles differ too, for readers who cannot tell colours
apart. In the SVGs colours are CSS variables, which the page sets for its light and dark themes.
"""

import io
import math
import re
import statistics
import textwrap
from pathlib import Path
from typing import NamedTuple

from gtpo.report.comparison import Configuration, standard_deviation

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ((), (6, 2), (1.5, 1.5), (6, 2, 1.5, 2), (3, 1), (8, 2, 1.5, 2, 1.5, 2))
MARKERS = "os^Dv*"
# Colours of the SVGs before they are replaced by CSS: one for each role and each configuration.
INK, GRID, MARK = "#a0a0f0", "#a0a0f1", "#a0a0f2"
SERIES = [f"#a0a00{i}" for i in range(len(COLOURS))]
CSS_COLOURS = {INK: "currentColor", GRID: "var(--grid)", MARK: "var(--mark)"} | {
    colour: f"var(--series-{i})" for i, colour in enumerate(SERIES)
}
MAX_POINTS = 3000  # of all lines of a panel together
FEW_STEPS = 20  # up to so many, steps are drawn as points instead of a running mean


class Panel(NamedTuple):
    """A panel: it draws the first of `metrics` that a run has, times the factor beside it."""

    name: str
    title: str
    unit: str
    metrics: tuple[tuple[str, float], ...]
    share: bool = False  # drawn from 0 to 1
    rare: bool = False  # a share that is drawn from 0 to its largest value


# fmt: off
PANELS = (
    Panel("reward", "Reward", "", (("reward", 1),)),
    Panel("format", "Format rate", "share of completions",
          (("reward/format_rate", 1), ("reward/formatting_avg", 0.1)), share=True),
    Panel("correct", "Correct rate", "share of completions",
          (("reward/correct_rate", 1), ("reward/correctness_avg", 0.1)), share=True),
    Panel("held_out", "Held-out accuracy", "share of problems",
          (("evaluation/accuracy", 1),), share=True),
    Panel("entropy", "Entropy", "nats per token",
          (("gtpo/completion_entropy", 1), ("entropy", 1))),
    Panel("conflict", "Conflict tokens", "share of tokens",
          (("gtpo/frac_conflict_tokens", 1),), share=True, rare=True),
    Panel("filtered", "Filtered completions", "share of completions",
          (("gtpo/frac_filtered", 1),), share=True, rare=True),
    Panel("no_signal", "Groups without signal", "share of groups",
          (("frac_reward_zero_std", 1),), share=True),
    Panel("length", "Completion length", "tokens", (("completions/mean_length", 1),)),
    Panel("truncated", "Truncated completions", "share of completions",
          (("completions/clipped_ratio", 1),), share=True, rare=True),
    Panel("grad_norm", "Gradient norm", "", (("grad_norm", 1),)),
    Panel("step_time", "Step time", "seconds", (("step_time", 1),)),
)
# fmt: on


class Palette(NamedTuple):
    """The colours of a drawing."""

    series: tuple[str, ...]  # of the configurations, repeated if there are more
    ink: str  # text
    grid: str
    mark: str  # thresholds and alarms


PNG_PALETTE = Palette(COLOURS, ink="#222222", grid="#dddddd", mark="#555555")
SVG_PALETTE = Palette(tuple(SERIES), INK, GRID, MARK)


def panel_series(panel: Panel, configuration: Configuration) -> dict[int, list[float]]:
    """Returns the panel's metric by step, one value per run; {} if no run has it."""
    for metric, factor in panel.metrics:
        if series := configuration.series(metric):
            return {step: [factor * value for value in values] for step, values in series.items()}
    return {}


def panels_with_data(configurations: list[Configuration]) -> list[Panel]:
    """Returns the panels for which a configuration has values."""
    return [
        panel
        for panel in PANELS
        if any(panel_series(panel, configuration) for configuration in configurations)
    ]


def write_png(file: Path, configurations: list[Configuration], software: str) -> None:
    """Writes all panels as one picture; `software` goes into its metadata."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    panels = panels_with_data(configurations)
    rows = max(1, math.ceil(len(panels) / 3))
    style = {"font.size": 9, "axes.prop_cycle": matplotlib.cycler(color=COLOURS)}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(13, 2.9 * rows + 0.6), layout="constrained")
        axes = list(figure.subplots(rows, 3, squeeze=False).flat)
        for axis, panel in zip(axes, panels, strict=False):
            _draw(axis, panel, configurations, PNG_PALETTE)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        lines = [Line2D([], [], **_line_style(i, COLOURS)) for i in range(len(configurations))]
        labels = [textwrap.fill(configuration.label, 100) for configuration in configurations]
        figure.legend(lines, labels, loc="outside upper left", frameon=False)
        figure.savefig(file, format="png", dpi=100, metadata={"Software": software})


def inline_svgs(configurations: list[Configuration]) -> dict[str, str]:
    """Returns an SVG element for each panel with data, by the panel's name."""
    import matplotlib
    from matplotlib.figure import Figure

    svgs = {}
    for panel in panels_with_data(configurations):
        style = {
            "font.size": 9,
            "svg.fonttype": "none",
            "svg.hashsalt": panel.name,
            "path.simplify": True,
        }
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        with matplotlib.rc_context(style):
            figure = Figure(figsize=(4.6, 2.5), layout="constrained")
            _draw(figure.subplots(), panel, configurations, SVG_PALETTE)
            file = io.StringIO()
            figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
        svgs[panel.name] = _inline(file.getvalue())
    return svgs


def _inline(svg: str) -> str:
    """The bare SVG element. It scales with the page and takes fonts and colours from its style."""
    svg = svg[svg.index("<svg") :]
    view_box = r"^<svg [^>]*?(viewBox=\"[^\"]*\")[^>]*>"
    svg = re.sub(view_box, r'<svg \1 aria-hidden="true" focusable="false">', svg)
    for part in (r"<metadata>.*?</metadata>", r"<style[^>]*>.*?</style>", r"<!--.*?-->"):
        svg = re.sub(part, "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg).replace("xlink:href", "href")
    svg = re.sub(r"#a0a0[0f]\d", lambda colour: CSS_COLOURS[colour[0]], svg)
    svg = re.sub(r"(?:font-family|font): [^;\"]*(?:; |(?=\"))", "", svg)
    return re.sub(r"\n\s*", "\n", svg).strip()


def _draw(axis, panel: Panel, configurations: list[Configuration], palette: Palette) -> None:
    alone = len(configurations) == 1
    for i, configuration in enumerate(configurations):
        max_points = max(50, MAX_POINTS // len(configurations))
        points = line_points(panel_series(panel, configuration), max_points)
        if points.steps:
            has_seeds = len(configuration.runs) > 1
            _draw_line(axis, panel, i, palette, points, has_seeds=has_seeds, alone=alone)
    unit = panel.unit
    if panel.name == "entropy" and _draw_thresholds(axis, configurations, palette.mark):
        unit += ", log scale"
    if alone:
        for step in {alarm.step for run in configurations[0].runs for alarm in run.alarms}:
            axis.axvline(step, color=palette.mark, linewidth=0.8, linestyle=":")
    _set_limits(axis, panel)
    axis.set_title(panel.title, loc="left", color=palette.ink, fontsize=10, fontweight="bold")
    axis.set_ylabel(unit, color=palette.ink)
    axis.set_xlabel("step", color=palette.ink)
    axis.tick_params(which="both", colors=palette.ink, length=3)
    axis.grid(color=palette.grid, linewidth=0.7)
    axis.set_axisbelow(True)
    for side, spine in axis.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(palette.grid)


def _set_limits(axis, panel: Panel) -> None:
    low, high = axis.get_ylim()
    if panel.share:
        high = min(1.0, max(0.1, high)) if panel.rare else 1.0
        axis.set_ylim(-0.03 * high, 1.03 * high)
    elif panel.name != "reward" and axis.get_yscale() == "linear":
        axis.set_ylim(min(low, 0), 1.05 * high)


class Points(NamedTuple):
    """A line's points: steps, means over runs, and means -/+ one standard deviation."""

    steps: list[float]
    means: list[float]
    lows: list[float]
    highs: list[float]


def _draw_line(
    axis, panel: Panel, i: int, palette: Palette, points: Points, *, has_seeds: bool, alone: bool
) -> None:
    """Draws the running mean of the i-th configuration.

    Below it lies a band if the configuration has seeds, else the single steps if it is `alone`.
    """
    few = len(points.steps) <= FEW_STEPS or panel.name == "held_out"
    reach = 0 if few else max(1, len(points.steps) // 30)
    means, lows, highs = (_running_mean(values, reach) for values in points[1:])
    style = _line_style(i, palette.series)
    if has_seeds:
        # A band does not leave the range of its metric.
        lowest = -math.inf if panel.name == "reward" else 0
        highest = 1 if panel.share else math.inf
        axis.fill_between(
            points.steps,
            [max(lowest, value) for value in lows],
            [min(highest, value) for value in highs],
            color=style["color"],
            alpha=0.18,
            linewidth=0,
        )
    elif alone and not few:
        axis.plot(points.steps, points.means, color=style["color"], linewidth=0.8, alpha=0.35)
    marker = MARKERS[i % len(MARKERS)] if few else None
    axis.plot(points.steps, means, **style, marker=marker, markersize=4)


def _line_style(i: int, colours: tuple[str, ...]) -> dict:
    return {
        "color": colours[i % len(colours)],
        "linewidth": 1.8,
        "dashes": DASHES[i % len(DASHES)] or (None, None),
    }


def _draw_thresholds(axis, configurations: list[Configuration], mark: str) -> bool:
    """Draws the entropy thresholds; returns whether the axis got a log scale to show them."""
    entropies = [value for line in axis.get_lines() for value in line.get_ydata()]
    runs = [run for configuration in configurations for run in configuration.runs]
    thresholds = sorted({run.number("gtpo_runtime.ent_threshold", 0.7) for run in runs})
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
    lowest, highest = min([*entropies, *thresholds]), max([*entropies, *thresholds])
    if lowest >= thresholds[-1] / 10:
        return False
    # An entropy that falls towards zero is as bad as one that rises; a linear axis would hide it.
    axis.set_yscale("log")
    axis.set_ylim(max(lowest, 1e-4) * 0.7, highest * 1.6)
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")
    return True


def line_points(series: dict[int, list[float]], max_points: int) -> Points:
    """The points of a series. Neighbouring steps are averaged if there are over `max_points`."""
    steps = list(series)
    width = math.ceil(len(steps) / max_points) or 1
    points = Points([], [], [], [])
    for start in range(0, len(steps), width):
        chunk = steps[start : start + width]
        mean = statistics.fmean(statistics.fmean(series[step]) for step in chunk)
        deviation = statistics.fmean(standard_deviation(series[step]) for step in chunk)
        values = (statistics.fmean(chunk), mean, mean - deviation, mean + deviation)
        for column, value in zip(points, values, strict=True):
            column.append(value)
    return points


def _running_mean(values: list[float], reach: int) -> list[float]:
    """Each value's mean with its `reach` neighbours on either side."""
    return [statistics.fmean(values[max(0, i - reach) : i + reach + 1]) for i in range(len(values))]
