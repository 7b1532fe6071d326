"""Write run directories as one self-contained page and a PNG of curves.

The page needs no network. Nothing but records is read; no model is loaded.
"""

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from gtpo.errors import RecipeError
from gtpo.evaluation.scores import Score
from gtpo.report import conflict_view, curves, summary
from gtpo.report.comparison import Configuration, configurations, differing_keys, windows
from gtpo.report.run_record import RunRecord, read_run
from gtpo.system.whole_files import written_aside

GENERATOR = "GTPO report_run.py"  # is in every file we write; other files are not replaced
TEMPLATES = Path(__file__).parent / "templates"
MAX_PAGE = 4_900_000  # bytes
CONFLICT_VIEW = 2_500_000  # characters of the conflict view's data, to begin with


def write_report(
    run_dirs: list[Path], page: Path, picture: Path, *, steps: Sequence[int] = ()
) -> None:
    """Writes `page` and `picture` for the runs together.

    `steps` are shown in the conflict view beside the chosen ones. Raises RecipeError, and leaves
    both files as they were, if a run cannot be reported or a file must not be replaced.
    """
    for file in (page, picture):
        _check_replaceable(file)
    distinct = {path.resolve(): path for path in run_dirs}
    runs = [read_run(path) for path in distinct.values()]
    html = render(runs, steps)
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        picture.parent.mkdir(parents=True, exist_ok=True)
        with written_aside(page) as html_aside, written_aside(picture) as picture_aside:
            curves.write_png(picture_aside, configurations(runs), GENERATOR)
            html_aside.write_bytes(html)
    except OSError as error:
        raise RecipeError(
            page.parent, f"cannot be written to ({error.strerror}); choose another place with --out"
        ) from None


def render(runs: list[RunRecord], steps: Sequence[int]) -> bytes:
    """Returns the page in UTF-8. The conflict view is made small enough for MAX_PAGE bytes."""
    grouped = configurations(runs)
    script, style = _template("report.js"), _template("report.css")
    values = {
        "generator": GENERATOR,
        "runs": runs,
        "configurations": grouped,
        "score_names": _score_names(runs),
        "answers": [summary.answers(configuration) for configuration in grouped],
        "svgs": curves.inline_svgs(grouped),
        "first_and_last": _first_and_last_values(grouped),
        "differing_keys": differing_keys(runs) if len(runs) > 1 else {},
        "dashes": curves.DASHES,
        "colours": len(curves.COLOURS),
        "style": style,
        "script": script,
        "script_hash": base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    }
    template = _environment().get_template("report.html.j2")
    size = CONFLICT_VIEW
    while True:
        view = conflict_view.conflict_view(grouped, list(steps), size=size)
        html = template.render(**values, view=view, view_json=_embedded_json(view))
        page = html.encode("utf-8", "replace")  # half of a surrogate pair is not UTF-8
        if len(page) < MAX_PAGE or size < 1000:
            return page
        size //= 2


def _environment():
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"score": _score_as_text, "visible": visible}
    return environment


def _template(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def visible(text: str) -> str:
    """Returns `text` with a sign for each space, tab and line break."""
    return (
        text.replace("\n", "\N{RETURN SYMBOL}")
        .replace("\t", "\N{RIGHTWARDS ARROW TO BAR}")
        .replace(" ", "\N{MIDDLE DOT}")
    )


def _embedded_json(values: object) -> str:
    """JSON for a script element: nothing in it can end the element or begin another."""
    text = json.dumps(values, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _first_and_last_values(
    grouped: list[Configuration],
) -> list[tuple[curves.Panel, list[tuple[str, str]]]]:
    """For each panel, the mean of the first and of the last window of each configuration.

    They stand in for the curves where those cannot be seen.
    """
    table = []
    for panel in curves.panels_with_data(grouped):
        cells = []
        for configuration in grouped:
            if series := curves.panel_series(panel, configuration):
                first, last = windows(series)
                cells.append((_as_text(panel, first.mean), _as_text(panel, last.mean)))
            else:
                cells.append(("-", "-"))
        table.append((panel, cells))
    return table


def _as_text(panel: curves.Panel, mean: float) -> str:
    return f"{mean:.1%}" if panel.share else f"{mean:.4g}"


def _score_names(runs: list[RunRecord]) -> list[str]:
    """The names of all scores of the runs' evaluations, each once."""
    evaluations = [evaluation for run in runs for evaluation in run.evaluations.values()]
    return list(dict.fromkeys(name for own in evaluations for name in own.scores.by_name))


def _score_as_text(score: Score | None, name: str) -> str:
    if score is None:
        return "-"
    factor, unit = (1, "") if name == "mean length" else (100, " %")
    mean, low, high = (factor * value for value in score)
    return f"{mean:.1f}{unit} [{low:.1f}, {high:.1f}]"


def _check_replaceable(file: Path) -> None:
    """Raises RecipeError if `file` exists and is not a report of ours."""
    if file.is_dir():
        raise RecipeError(file, "is a folder; choose another name with --out")
    if not file.exists():
        return
    with file.open("rb") as existing:
        beginning = existing.read(2000)
    if GENERATOR.encode() not in beginning:
        raise RecipeError(
            file,
            "exists and is not a report, so it is not replaced; move it away, or choose another"
            " place with --out",
        )
