"""What the benchmarks share that need no model: the machine they ran on, CPU-seconds, ratios of
pairs, a JSON file.
"""

import json
import math
import os
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def machine() -> str:
    """The machine in a line: cores, processor family, Python and torch."""
    return (
        f"{os.cpu_count()} cores of a {platform.machine()} CPU, Python {platform.python_version()},"
        f" torch {version('torch')}"
    )


def cpu_seconds() -> float:
    """CPU-seconds of this process so far, those of its ended children included."""
    return sum(os.times()[:4])


def cpu_seconds_of(command: list[str], **options) -> float:
    """CPU-seconds of `command`, its children included; raises CalledProcessError, with what it
    said, where it fails.
    """
    began = cpu_seconds()
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True, **options)
    return cpu_seconds() - began


def ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median of the ratios of pairs that were measured after each other."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def exponent(sizes: list[float], values: list[float]) -> float:
    """The slope of log(value) over log(size), by least squares: 1 where doubling the size doubles
    the value.
    """
    return statistics.linear_regression(
        [math.log(x) for x in sizes], [math.log(y) for y in values]
    ).slope


def save(file: Path | None, figures: dict) -> None:
    """Write `figures` with the command and the machine to `file`, if one was asked for."""
    if file:
        whole = {
            "command": " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]]),
            "machine": machine(),
            **figures,
        }
        file.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
        print(f"Written: {file}")
