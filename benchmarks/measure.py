"""What the benchmarks share: the machine, time and memory, ratios, model shapes, a JSON file.

Importing this module imports no torch: Unsloth must be imported before it.
"""

import contextlib
import fcntl
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

SHAPES = {  # transformers' configuration class and sizes, as the models on the hub have them
    "small": (
        "LlamaConfig",
        {
            **{"vocab_size": 8_192, "hidden_size": 256, "intermediate_size": 768},
            **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2},
        },
    ),
    "qwen2.5-3b": (
        "Qwen2Config",
        {
            **{"vocab_size": 151_936, "hidden_size": 2048, "intermediate_size": 11_008},
            **{"num_hidden_layers": 36, "num_attention_heads": 16, "num_key_value_heads": 2},
            **{"rope_theta": 1e6, "tie_word_embeddings": True},
        },
    ),
    "llama-3.1-8b": (
        "LlamaConfig",
        {
            **{"vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336},
            **{"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8},
            "rope_theta": 5e5,
        },
    ),
}


# ---- the machine, and where figures are saved


def machine() -> dict[str, str]:
    """The device, and the versions of Python and the libraries."""
    from gtpo.runs.directory import versions

    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        threads = f", {torch.get_num_threads()} threads" if torch else ""
        device = f"{os.cpu_count()} cores of a {platform.machine()} CPU{threads}"
    return {"device": device, **versions()}


def machine_line() -> str:
    """The machine in one line, for the terminal."""
    values = machine()
    return f"{values['device']}, Python {values['python']}, torch {values['torch']}"


def save(file: Path | None, figures: dict) -> None:
    """Writes `figures` with the command and the machine to a JSON file, unless `file` is None."""
    if file:
        program = os.path.relpath(sys.argv[0], ROOT)
        command = " ".join(["python", program, *sys.argv[1:]])
        document = {"command": command, "machine": machine(), **figures}
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


# ---- time, memory and ratios


@contextlib.contextmanager
def using_the_gpu(alone: bool):
    """Waits for the GPU that several benchmarks share: alone for timings, else beside others.

    gpu_check.py sets the lock. Without it, nothing waits.
    """
    if not (lock := os.environ.get("GTPO_GPU_LOCK")):
        yield
        return
    with open(lock, "w") as gpu, open(f"{lock}.queue", "w") as queue:
        # A queue, so that those who share the GPU do not keep out one who wants it alone.
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(gpu, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        yield


def seconds() -> float:
    """CPU-seconds of this process. With a GPU, wall-clock seconds once the GPU has finished."""
    torch = sys.modules["torch"]
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(function) -> float:
    """The seconds that a call of `function` takes."""
    began = seconds()
    function()
    return seconds() - began


def cpu_seconds() -> float:
    """CPU-seconds of this process so far, including those of its children that have ended."""
    return sum(os.times()[:4])


def cpu_seconds_of(command: list[str], **options) -> float:
    """CPU-seconds of `command` and its children; raises CalledProcessError if it fails."""
    began = cpu_seconds()
    subprocess.run(command, check=True, cwd=ROOT, capture_output=True, text=True, **options)
    return cpu_seconds() - began


def interleaved(functions: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each function, called in turn `rounds` times, in alternating order."""
    taken = {name: [] for name in functions}
    for i in range(rounds):
        for name in list(functions)[:: 1 if i % 2 == 0 else -1]:
            taken[name].append(timed(functions[name]))
    return taken


def ratio(numerators: list[float], denominators: list[float]) -> float:
    """The median of the ratios of pairs that were measured one after the other."""
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def exponent(sizes: list[float], values: list[float]) -> float:
    """The slope of log(value) over log(size) by least squares: 1 if doubling one doubles both."""
    sizes, values = [math.log(size) for size in sizes], [math.log(value) for value in values]
    return statistics.linear_regression(sizes, values).slope


def peak_bytes(function) -> int:
    """The most bytes that `function` allocates beyond those allocated before.

    Counts the GPU's memory, or torch's tensors on a CPU.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        function()
    allocated = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            allocated += event.nbytes()
            peak = max(peak, allocated)
    return peak


# ---- models


def make_model(shape: str, folder: Path) -> None:
    """Saves a model of this shape in bfloat16, with the demo's tokenizer.

    Its weights are random, with a standard deviation of 0.02.
    """
    import torch
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(ROOT / "demo/model")
    class_name, sizes = SHAPES[shape]
    config = getattr(transformers, class_name)(
        **{
            "max_position_embeddings": 4096,
            "tie_word_embeddings": False,
            **sizes,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        }
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
