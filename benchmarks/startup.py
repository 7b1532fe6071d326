"""Times how long commands take to start: `python benchmarks/startup.py`.

Measures the CPU time of `train_model.py --help` and `--dry-run` above a Python process that imports
only pydantic. The commands run in turn, so a disturbance affects all of them, and medians count. It
also prints the heavy libraries that each command imports, and the modules that cost most.

`--libraries` measures the imports of a run instead, with Python's garbage collector on and off.
train_model.py turns it off.
"""

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path

from measure import ROOT, cpu_seconds_of, machine_line, ratio, save

HEAVY = {
    *("torch", "transformers", "trl", "unsloth", "peft", "datasets"),
    *("accelerate", "wandb", "matplotlib", "math_verify", "sympy", "numpy"),
}
COMMANDS = {  # name: command, and a bound in CPU-seconds above the bare start
    "bare": (["-c", "import pydantic; pydantic.BaseModel"], None),
    "--help": (["train_model.py", "--help"], 0.5),
    "--dry-run, config.yaml": (["train_model.py", "config.yaml", "--dry-run"], 1.0),
    "--dry-run, demo": (["train_model.py", "recipes/demo.yaml", "--dry-run"], 1.0),
}


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="starts of each command (default: 9)")
    parser.add_argument(
        "--libraries",
        action="store_true",
        help="measure the import of torch, transformers and TRL instead",
    )
    parser.add_argument("--json", type=Path, help="save the figures to this file")
    options = parser.parse_args()
    print(machine_line())
    if options.libraries:
        return libraries(options)
    taken = {name: [] for name in COMMANDS}
    for name in COMMANDS:
        cpu_seconds_of([sys.executable, *COMMANDS[name][0]])  # brings the files into memory
    for _ in range(options.rounds):
        for name, (words, _) in COMMANDS.items():
            taken[name].append(cpu_seconds_of([sys.executable, *words]))

    met, figures = True, {}
    print(f"{'command':<24}{'CPU-s':>7}{'above bare':>12}{'bound':>7}  heavy imports")
    for name, (words, bound) in COMMANDS.items():
        seconds = statistics.median(taken[name])
        pairs = zip(taken[name], taken["bare"], strict=True)
        above = statistics.median(seconds - bare for seconds, bare in pairs)
        imported, costly = imports(words)
        heavy = sorted(imported & HEAVY)
        met &= bound is None or (above < bound and not heavy)
        figures[name] = {
            "cpu_seconds": seconds,
            "above_bare": above,
            "bound": bound,
            "heavy_imports": heavy,
            "most_costly": costly,
        }
        names = ", ".join(heavy) or "none"
        print(f"{name:<24}{seconds:>7.2f}{above:>12.2f}{bound or '':>7}  {names}")
    for name in list(COMMANDS)[1:]:
        costs = ", ".join(f"{module} {ms:.0f}" for module, ms in figures[name]["most_costly"])
        print(f"Most costly modules of {name}, ms of their own: {costs}")
    print("All bounds met" if met else "NOT MET")
    save(options.json, {"commands": figures, "bounds_met": met})
    return 0 if met else 1


IMPORTS = """
import contextlib
from gtpo.system.environment import garbage_collection_off
with {}():
    import torch, peft, datasets, trl
    from trl import GRPOTrainer
"""


def libraries(options) -> int:
    """Measures the imports of a run, with the garbage collector on and off."""
    contexts = {"on": "contextlib.nullcontext", "off": "garbage_collection_off"}
    taken = {name: [] for name in contexts}
    for _ in range(options.rounds):
        for name, context in contexts.items():
            command = [sys.executable, "-c", IMPORTS.format(context)]
            taken[name].append(cpu_seconds_of(command))
    on, off = (statistics.median(taken[name]) for name in ("on", "off"))
    off_to_on = ratio(taken["off"], taken["on"])
    print("Importing torch, transformers, peft, datasets and TRL:")
    print(f"{on:.2f} CPU-s with the collector on, {off:.2f} with it off")
    print(f"Ratio, median of {options.rounds} pairs: {off_to_on:.2f}")
    save(options.json, {"collector_on": on, "collector_off": off, "ratio": off_to_on})
    return 0


def imports(words: list[str], most: int = 6) -> tuple[set[str], list[tuple[str, float]]]:
    """The top-level packages that a command imports, and the modules that take longest.

    A module's time is in wall-clock milliseconds, without what it imports itself.
    """
    command = [sys.executable, "-X", "importtime", *words]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    lines = re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", run.stderr, re.MULTILINE)
    costly = sorted(((name, int(own) / 1e3) for own, name in lines), key=lambda pair: -pair[1])
    return {name.split(".")[0] for _, name in lines}, costly[:most]


if __name__ == "__main__":
    raise SystemExit(main())
