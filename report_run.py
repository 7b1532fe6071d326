"""Show what a run did: `python report_run.py RUN [RUN ...] [--out FILE_OR_FOLDER] [--steps 1 50
100]`.

RUN is a run directory. It can also be the recipe of a run with the flags of its training, for
example `recipes/demo.yaml --output_root runs`. Writes report.html, one page for any browser that
needs no network, and curves.png. They go into the run directory, or into ./report for several runs.
Several runs are drawn together; runs that differ only in the seed are averaged.

--out     another place: a folder, or the name of the page (NAME.html, with curves in NAME.png)

--steps   steps for the conflict view, beside the first, the middle, the last and those with most
          conflicts

Exit code 2: a run cannot be reported, and nothing was written.
"""

import sys
from pathlib import Path

from gtpo.errors import RecipeError
from gtpo.recipe import command_line
from gtpo.system.console import print_ending


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if "--help" in argv or "-h" in argv:
        print(__doc__.strip())
        return 0
    try:
        runs, out, steps = parse_arguments(argv)
        page, picture = _targets(runs, out)

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


def parse_arguments(argv: list[str]) -> tuple[list[Path], Path | None, list[int]]:
    """The run directories, --out and --steps; raises RecipeError if they make no sense."""
    words, out, steps = [], None, []
    rest = _split_values(argv)
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
                raise RecipeError("--steps", "needs numbers, for example --steps 1 50 100")
        else:
            words.append(word)
    if words and _is_recipe(words[0]):
        return [Path(command_line.read_recipe(words).output_dir())], out, steps
    return _run_directories(words), out, steps


def _split_values(argv: list[str]) -> list[str]:
    """The words with `--out=VALUE` and `--steps=VALUE` as two words each."""
    words = []
    for word in argv:
        words += word.split("=", 1) if word.startswith(("--out=", "--steps=")) else [word]
    return words


def _is_recipe(word: str) -> bool:
    return Path(word).suffix in (".yaml", ".yml")


def _run_directories(words: list[str]) -> list[Path]:
    for word in words:
        if _is_recipe(word):
            raise RecipeError(
                word,
                "a recipe must come first, followed only by its flags; give several runs by their"
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
    return [Path(word) for word in words]


def _targets(runs: list[Path], out: Path | None) -> tuple[Path, Path]:
    """The paths of the page and the picture."""
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
