"""CPU time of `train_model.py --help` and `--dry-run` above a bare Python start with pydantic:
`python benchmarks/startup.py`.

The commands run in turn, so that whatever disturbs one disturbs the others; medians count. Then
each is asked which of the heavy libraries it imported, and which modules cost most. `--libraries`
measures instead what a run imports, with Python's garbage collector off meanwhile, as
train_model.py has it, and on.
"""

import argparse
import re
import statistics
import subprocess
import sys
from pathlib import Path

from figures import ROOT, cpu_seconds_of, machine, ratio, save

HEAVY = {
    "torch",
    "transformers",
    "trl",
    "unsloth",
    "peft",
    "datasets",
    "accelerate",
    "wandb",
    "matplotlib",
    "math_verify",
    "sympy",
    "numpy",
}
COMMANDS = {  # name: command, bound in CPU-seconds above the bare start
    "bare": (["-c", "import pydantic; pydantic.BaseModel"], None),
    "--help": (["train_model.py", "--help"], 0.5),
    "--dry-run, config.yaml": (["train_model.py", "config.yaml", "--dry-run"], 1.0),
    "--dry-run, demo": (["train_model.py", "recipes/demo.yaml", "--dry-run"], 1.0),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rounds", type=int, default=9, help="how often each command is started (default: 9)"
    )
    parser.add_argument(
        "--libraries",
        action="store_true",
        help="measure the import of torch, transformers and TRL instead",
    )
    parser.add_argument("--json", type=Path, help="save the figures to this file")
    options = parser.parse_args()
    print(machine())
    if options.libraries:
        return libraries(options)
    taken = {name: [] for name in COMMANDS}
    for name in COMMANDS:
        cpu_seconds_of([sys.executable, *COMMANDS[name][0]])  # reads the files once
    for _ in range(options.rounds):
        for name, (words, _) in COMMANDS.items():
            taken[name].append(cpu_seconds_of([sys.executable, *words]))

    met, figures = True, {}
    print(f"{'command':<24}{'CPU-s':>7}{'above bare':>12}{'bound':>7}  heavy imports")
    for name, (words, bound) in COMMANDS.items():
        seconds = statistics.median(taken[name])
        above = statistics.median(a - b for a, b in zip(taken[name], taken["bare"]))
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
        print(
            f"{name:<24}{seconds:>7.2f}{above:>12.2f}{bound or '':>7}  {', '.join(heavy) or 'none'}"
        )
    for name in list(COMMANDS)[1:]:
        print(
            f"Most costly modules of {name}, ms of their own: "
            + ", ".join(f"{module} {ms:.0f}" for module, ms in figures[name]["most_costly"])
        )
    print("All bounds met" if met else "NOT MET")
    save(options.json, {"commands": figures, "bounds_met": met})
    return 0 if met else 1


def libraries(options) -> int:
    code = (
        "import contextlib\nfrom gtpo.system.environment import garbage_collection_off\nwith {}():\n import torch,"
        " peft, datasets, trl\n from trl import GRPOTrainer\n"
    )
    taken = {name: [] for name in ("on", "off")}
    for _ in range(options.rounds):
        for name, around in (("on", "contextlib.nullcontext"), ("off", "garbage_collection_off")):
            taken[name].append(cpu_seconds_of([sys.executable, "-c", code.format(around)]))
    on, off = (statistics.median(taken[name]) for name in ("on", "off"))
    found = {"collector_on": on, "collector_off": off, "ratio": ratio(taken["off"], taken["on"])}
    print(
        f"Importing torch, transformers, peft, datasets and TRL: {on:.2f} CPU-s with the collector"
        f" on, {off:.2f} with it off; ratio, median of {options.rounds} pairs: {found['ratio']:.2f}"
    )
    save(options.json, found)
    return 0


def imports(words: list[str], most: int = 6) -> tuple[set[str], list[tuple[str, float]]]:
    """The top-level packages that a command imports, and the modules that take longest to execute,
    in wall milliseconds.
    """
    said = subprocess.run(
        [sys.executable, "-X", "importtime", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stderr
    lines = re.findall(r"^import time: +(\d+) \| +\d+ \| +(\S+)$", said, re.MULTILINE)
    costly = sorted(((name, int(own) / 1e3) for own, name in lines), key=lambda pair: -pair[1])
    return {name.split(".")[0] for _, name in lines}, costly[:most]


if __name__ == "__main__":
    raise SystemExit(main())
