"""What the benchmarks of steps and heads share: model shapes with random weights, fixed rollouts,
seconds and peak memory.
"""

import contextlib
import fcntl
import json
import os
import sys
import time
from pathlib import Path

from figures import ROOT

sys.path.insert(0, str(ROOT))

SHAPES = {  # transformers' configuration class and its sizes, as the models on the hub have them
    "small": (
        "LlamaConfig",
        dict(
            vocab_size=8_192,
            hidden_size=256,
            intermediate_size=768,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        ),
    ),
    "qwen2.5-3b": (
        "Qwen2Config",
        dict(
            vocab_size=151_936,
            hidden_size=2048,
            intermediate_size=11_008,
            num_hidden_layers=36,
            num_attention_heads=16,
            num_key_value_heads=2,
            rope_theta=1e6,
            tie_word_embeddings=True,
        ),
    ),
    "llama-3.1-8b": (
        "LlamaConfig",
        dict(
            vocab_size=128_256,
            hidden_size=4096,
            intermediate_size=14_336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            rope_theta=5e5,
        ),
    ),
}


def make_model(shape: str, folder: Path) -> None:
    """A model of this shape with random weights (standard deviation 0.02), in bfloat16, with the
    demo's tokenizer.
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


@contextlib.contextmanager
def using_the_gpu(alone: bool):
    """Wait for the GPU where several benchmarks share it (gpu_check.py says so): alone for what is
    timed, or beside others.
    """
    if not (lock := os.environ.get("GTPO_GPU_LOCK")):
        yield
        return
    with open(lock, "w") as gpu, open(f"{lock}.queue", "w") as queue:
        # in turn, so that those who share do not keep out who wants it alone
        fcntl.flock(queue, fcntl.LOCK_EX)
        fcntl.flock(gpu, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
        fcntl.flock(queue, fcntl.LOCK_UN)
        yield


def seconds() -> float:
    """CPU-seconds of this process; with a GPU, wall-clock seconds once the GPU has done what it was
    given.
    """
    torch = sys.modules["torch"]
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(function) -> float:
    began = seconds()
    function()
    return seconds() - began


def peak_bytes(function) -> int:
    """The most memory that `function` holds beyond what was held before: of the GPU, or of torch's
    tensors on a CPU.
    """
    import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        function()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        function()
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def interleaved(functions: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each function, called in turn, `rounds` times, each round the other way round."""
    taken = {name: [] for name in functions}
    for i in range(rounds):
        for name in list(functions)[:: 1 if i % 2 == 0 else -1]:
            taken[name].append(timed(functions[name]))
    return taken


def machine() -> dict[str, str]:
    import torch

    from gtpo.runs.directory import versions

    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"CPU, {torch.get_num_threads()} threads"
    )
    return {"device": device, **versions()}


def save(figures: object, file: Path | None) -> None:
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
