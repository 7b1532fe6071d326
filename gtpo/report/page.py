"""Render run directories as one self-contained page and a PNG of curves. Reads records; loads no
model.
"""

import base64
import hashlib
import json
from pathlib import Path

from gtpo.errors import RecipeError
from gtpo.evaluation.scores import Score
from gtpo.report import conflict_view, curves, summary
from gtpo.report.comparison import Configuration, configurations, differences, windows
from gtpo.report.run_record import RunRecord, read_run
from gtpo.system.whole_files import written_aside

MAKER = "GTPO report_run.py"  # in every file we write; a file without it is not ours to replace
TEMPLATES = Path(__file__).parent / "templates"
LARGEST = 4_900_000  # bytes of a page
CONFLICT_VIEW = 2_500_000  # characters of its data


def write_report(run_dirs: list[Path], page: Path, picture: Path, *, steps: list[int] = []) -> None:
    """Write `page` and `picture` for the runs together; raises RecipeError, and then leaves both as
    they were.
    """
    for file in (page, picture):
        _check_ours(file)
    # one named twice is one
    runs = [read_run(path) for path in {path.resolve(): path for path in run_dirs}.values()]
    html = render(runs, steps)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        picture.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(page) as html_aside, written_aside(picture) as picture_aside:
            curves.write_png(picture_aside, configurations(runs), MAKER)
            html_aside.write_bytes(html)
    except OSError as error:
        raise RecipeError(
            page.parent, f"cannot be written to ({error.strerror}); choose another place with --out"
        ) from None


def render(runs: list[RunRecord], steps: list[int]) -> bytes:
    """The page: UTF-8, everything inside it, smaller than LARGEST."""
    import jinja2

    found = configurations(runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"interval": _interval, "visible": visible}
    script = (TEMPLATES / "report.js").read_text(encoding="utf-8")
    values = {
        "maker": MAKER,
        "runs": runs,
        "configurations": found,
        "score_names": _score_names(runs),
        "answers": [summary.answers(configuration) for configuration in found],
        "svgs": curves.inline_svgs(found),
        "numbers": _numbers(found),
        "differences": differences(runs) if len(runs) > 1 else {},
        "dashes": curves.DASHES,
        "colours": len(curves.COLOURS),
        "style": (TEMPLATES / "report.css").read_text(encoding="utf-8"),
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    size = CONFLICT_VIEW
    while True:
        view = conflict_view.conflict_view(found, steps, size=size)
        html = environment.get_template("report.html.j2").render(
            **values, view=view, view_json=_embedded(view)
        )
        page = html.encode("utf-8", "replace")  # half of a surrogate pair is no UTF-8
        if len(page) < LARGEST or size < 1000:
            return page
        size //= 2


def visible(text: str) -> str:
    """White space that can be seen."""
    return (
        text.replace("\n", "\N{RETURN SYMBOL}")
        .replace("\t", "\N{RIGHTWARDS ARROW TO BAR}")
        .replace(" ", "\N{MIDDLE DOT}")
    )


def _embedded(values: object) -> str:
    """JSON that may stand inside a script element: nothing in it can end the element or open
    another.
    """
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _numbers(found: list[Configuration]) -> list[tuple[curves.Panel, list[tuple[str, str]]]]:
    """Each panel's first and last values per configuration, for those who cannot see or would not
    trust a curve.
    """
    table = []
    for panel in curves.panels_with_data(found):
        cells = []
        for configuration in found:
            series = curves.panel_series(panel, configuration)
            cells.append(
                tuple(_number(panel, window.mean) for window in windows(series))
                if series
                else ("-", "-")
            )
        table.append((panel, cells))
    return table


def _score_names(runs: list[RunRecord]) -> list[str]:
    return list(
        dict.fromkeys(
            name
            for run in runs
            for found in run.evaluations.values()
            for name in found.scores.by_name
        )
    )


def _number(panel: curves.Panel, mean: float) -> str:
    return f"{mean:.1%}" if panel.share else f"{mean:.4g}"


def _interval(score: Score | None, name: str) -> str:
    if score is None:
        return "-"
    factor, unit = (1, "") if name == "mean length" else (100, " %")
    return f"{factor * score.mean:.1f}{unit} [{factor * score.low:.1f}, {factor * score.high:.1f}]"


def _check_ours(file: Path) -> None:
    """Raises RecipeError where replacing `file` would lose something that is not a report of
    ours.
    """
    if file.is_dir():
        raise RecipeError(file, "is a folder; choose another name with --out")
    if file.exists():
        with file.open("rb") as existing:
            if MAKER.encode() not in existing.read(2000):
                raise RecipeError(
                    file,
                    "exists and is no report of ours, so it stays; move it away, or choose another"
                    " place with --out",
                )
