"""Merge a trained adapter into its base model: `python export_model.py RUN OUT [--dtype bfloat16]`.

RUN is a run directory, a checkpoint or an adapter folder. OUT gets the whole model with tokenizer,
generation configuration and model card, for transformers, vLLM or llama.cpp. The model is loaded
again, and its logits are compared with those of base model and adapter. If they differ by more than
rounding, nothing is kept. Exit code 2 means that the export was refused or failed.
"""

import argparse
import logging
import sys
from pathlib import Path

from gtpo.errors import RecipeError
from gtpo.system.console import print_ending
from gtpo.system.environment import set_environment
from gtpo.system.safe_text import SafeFormatter


def parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    command_line = argparse.ArgumentParser(
        prog="export_model.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command_line.add_argument(
        "run", metavar="RUN", help="run directory, checkpoint or adapter folder"
    )
    command_line.add_argument("out", metavar="OUT", type=Path, help="new folder; it must not exist")
    command_line.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        default="bfloat16",
        help=(
            "type of the merged weights (default: %(default)s); small updates survive only in"
            " float16 and float32"
        ),
    )
    command_line.add_argument(
        "--model-name",
        metavar="BASE",
        help="base model to merge into, instead of the one that RUN names",
    )
    command_line.add_argument(
        "--push",
        metavar="HUB_REPO",
        help="also upload OUT to this hub repository (a new one is private)",
    )
    return command_line


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(SafeFormatter("%(message)s"))
    logging.getLogger("gtpo").setLevel(logging.INFO)
    try:
        _run(options)
    except RecipeError as error:
        print_ending("error", error)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0


def _run(options: argparse.Namespace) -> None:
    from gtpo.models.export import check_free, export
    from gtpo.models.fidelity import Fidelity
    from gtpo.models.saved import find_saved
    from gtpo.report import model_card
    from gtpo.system import hub

    check_free(options.out)
    saved = find_saved(options.run, base=options.model_name)
    # This comes before torch is imported, so that it reads CUDA_VISIBLE_DEVICES.
    set_environment(saved.recipe.env if saved.recipe else {})
    if options.push:
        hub.check_push(options.push)

    def write_card(folder: Path, comparison: Fidelity) -> None:
        model_card.write(folder, model_card.merged_card(saved, options.dtype, str(comparison)))

    comparison = export(saved, options.out, dtype=options.dtype, write_card=write_card)
    print(f"Compared: {comparison}")
    print(f"Merged model: {options.out}")
    if options.push:
        print(f"Pushed to: {hub.push(options.out, options.push)}")


if __name__ == "__main__":
    sys.exit(main())
