"""Show what a run did: `python report_run.py RUN [RUN ...] [--out FILE_OR_FOLDER] [--steps 1 50
100]`.

RUN is a run directory, or the recipe of one with the flags it was trained with (`recipes/demo.yaml
--output_root runs`). Writes report.html, one page that opens in any browser without a network, and
curves.png: into the run directory, or for several runs into ./report. Several runs are overlaid,
and runs that differ in the seed alone averaged.

--out     where to: a folder, or the page's name (NAME.html, with the curves in NAME.png)
--steps   steps that the conflict view should show beside the first, the middle, the last and those
with most conflicts

Exit code 2: a run is none or has nothing to tell, and nothing was written.
"""

import sys
from pathlib import Path

from gtpo.errors import RecipeError
from gtpo.recipe import command_line as cli
from gtpo.system.console import print_ending


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip())
        return 0
    try:
        runs, out, steps = _parse(argv)
        page, picture = _files(runs, out)

        from gtpo.report.page import write_report

        write_report(runs, page, picture, steps=steps)
    except RecipeError as error:
        print_ending("error", error)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    print(f"Curves: {picture}\nReport: {page} (open it in a browser)")
    return 0


def _parse(argv: list[str]) -> tuple[list[Path], Path | None, list[int]]:
    """The run directories, --out and --steps; raises RecipeError."""
    words, out, steps = [], None, []
    rest = [
        part
        for word in argv
        for part in (word.split("=", 1) if word.startswith(("--out=", "--steps=")) else [word])
    ]
    while rest:
        word = rest.pop(0)
        if word == "--out":
            if not rest or rest[0].startswith("--"):
                raise RecipeError(
                    "--out", "needs a value; give a folder, or a name that ends in .html"
                )
            out = Path(rest.pop(0))
        elif word == "--steps":
            while rest and rest[0].isdecimal():
                steps.append(int(rest.pop(0)))
            if not steps:
                raise RecipeError("--steps", "needs numbers; give for instance --steps 1 50 100")
        else:
            words.append(word)
    if words and Path(words[0]).suffix in (".yaml", ".yml"):
        return [Path(cli.read_recipe(words).output_dir())], out, steps
    for word in words:
        if Path(word).suffix in (".yaml", ".yml"):
            raise RecipeError(
                word,
                "a recipe comes first, with its flags and no other run; give several runs by their"
                " directories",
            )
        if word.startswith("--"):
            raise RecipeError(
                word,
                "unknown flag; use --out and --steps, or give the recipe first and then its flags",
            )
    if not words:
        raise RecipeError(
            "RUN",
            "missing; use: python report_run.py RUN [RUN ...], with the directory that"
            " train_model.py printed last",
        )
    return [Path(word) for word in words], out, steps


def _files(runs: list[Path], out: Path | None) -> tuple[Path, Path]:
    """Where the page and the picture go."""
    if out is not None and out.suffix == ".html":
        return out, out.with_suffix(".png")
    folder = out or (runs[0] if len(runs) == 1 else Path("report"))
    if folder.is_file():
        raise RecipeError(
            "--out", f"{folder} is a file; give a folder, or a name that ends in .html"
        )
    return folder / "report.html", folder / "curves.png"


if __name__ == "__main__":
    sys.exit(main())
