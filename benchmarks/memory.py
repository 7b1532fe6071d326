"""Compares the worst-case estimate of `--check` with what a training step really takes.

Run `python benchmarks/memory.py`, on a CPU. It trains one step of random Llamas of several shapes.
They use the demo's tokenizer and data, and their completions have the maximum length. It prints the
estimate beside the peak of the process's own memory. Pages of mapped files do not count.

`--kept` counts what a layer keeps for its backward pass instead. It does so in half precision with
a float32 adapter, and in float32.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


class Shape(NamedTuple):
    """A model and the step that it is trained with."""

    hidden: int
    intermediate: int
    layers: int
    vocabulary: int
    completions: int
    length: int  # tokens of a sequence
    checkpointing: bool  # gradient checkpointing


SHAPES = {
    "libraries alone": Shape(32, 64, 1, 512, 8, 96, True),
    "large vocabulary": Shape(64, 128, 2, 100_000, 8, 200, True),
    "weights": Shape(1024, 4096, 8, 512, 8, 96, True),
    "long, checkpointed": Shape(256, 1024, 8, 512, 8, 400, True),
    "long, all kept": Shape(256, 1024, 8, 512, 8, 400, False),
}
LAYERS = [  # hidden, intermediate, heads, heads of keys and values
    (256, 512, 8, 8),
    (512, 512, 8, 8),
    (256, 1024, 8, 8),
    (256, 512, 8, 2),
    (2048, 11_008, 16, 2),
]


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--kept", action="store_true", help="count what a layer keeps for its backward pass"
    )
    if parser.parse_args().kept:
        return print_kept()
    columns = f"{'shape':<20}{'estimate GiB':>13}{'used GiB':>10}{'used':>7}"
    print(f"{columns}  parts of the estimate")
    for name, shape in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            flags = training_flags(Path(folder), shape)
            parts = json.loads(run_python("-c", ESTIMATE, *flags)[0])
            _, used = run_python(str(ROOT / "train_model.py"), *flags)
        estimate = sum(parts.values())
        large = {part: size / 2**30 for part, size in parts.items() if size > 2**25}
        shown = ", ".join(f"{part} {gib:.2f}" for part, gib in large.items())
        sizes = f"{estimate / 2**30:>13.2f}{used / 2**30:>10.2f}{used / estimate:>7.0%}"
        print(f"{name:<20}{sizes}  {shown}", flush=True)
    return 0


def print_kept() -> int:
    """Prints how many numbers autograd saves per token and layer, beside the estimate.

    The count is the difference between models with three layers and with two. The estimate is that
    of gtpo/runs/memory.py.
    """
    from gtpo.runs.memory import DeviceLoad, ModelSize, saved_per_token

    rows, length = 2, 128
    print(f"{'hidden':>8}{'intermediate':>14}{'keys':>8}{'bits':>6}{'kept':>9}{'estimate':>10}")
    for hidden, intermediate, heads, key_heads in LAYERS:
        kv = hidden * key_heads // heads
        size = ModelSize(0, 0, 0, 1, hidden, intermediate, kv, heads, 0)
        for bits in (16, 32):
            three, two = (
                saved_bytes((hidden, intermediate, heads, key_heads), layers, rows, length, bits)
                for layers in (3, 2)
            )
            kept = (three - two) / (rows * length * bits / 8)
            load = DeviceLoad(
                rows, rows, prompt_tokens=0, completion_tokens=length, weight_bits=bits
            )
            estimate = saved_per_token(size, load)
            row = f"{hidden:>8}{intermediate:>14}{kv:>8}{bits:>6}{kept:>9,.0f}{estimate:>10,}"
            print(row, flush=True)
    return 0


def saved_bytes(layer: tuple, layers: int, rows: int, length: int, bits: int) -> int:
    """The bytes that autograd saves in a forward pass of `layers` layers of one entry of LAYERS."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from gtpo.recipe.sections import ModelSection

    hidden, intermediate, heads, key_heads = layer
    half = bits == 16
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
        )
    )
    targets = ModelSection.model_fields["target_modules"].default
    model = get_peft_model(
        model.to(torch.bfloat16 if half else torch.float32),
        LoraConfig(r=8, target_modules=targets, task_type="CAUSAL_LM"),
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    weights, saved = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def save(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            # The reference keeps the address from being used again.
            saved[storage.data_ptr()] = storage
        return tensor

    ids = torch.randint(0, 512, (rows, length))
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, : length // 4] = 0
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=half),
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
    ):
        output = model.model.model(input_ids=ids, attention_mask=mask)
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


def training_flags(folder: Path, shape: Shape) -> list[str]:
    """Saves a model of this shape, and returns the arguments of train_model.py for one step."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/model")
    tokenizer.save_pretrained(folder / "model")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=shape.vocabulary,
            hidden_size=shape.hidden,
            intermediate_size=shape.intermediate,
            num_hidden_layers=shape.layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    ).save_pretrained(folder / "model")
    return [
        str(ROOT / "recipes/demo.yaml"),
        *["--model-name", str(folder / "model"), "--output_root", str(folder)],
        *["--dataset.path", str(ROOT / "demo/data/train.jsonl"), "--evaluation.path", "null"],
        *["--training.max_steps", "1"],
        *["--training.per_device_train_batch_size", str(shape.completions)],
        *["--training.gradient_checkpointing", str(shape.checkpointing).lower()],
        *["--model.max_seq_length", str(shape.length), "--training.max_prompt_length", "40"],
        *["--training.generation_kwargs", f"{{min_new_tokens: {shape.length - 40}}}"],
        *["--watch.completions", "false"],
    ]


ESTIMATE = """
import json, sys
from gtpo.models import backends
from gtpo.recipe import command_line as cli
from gtpo.runs import memory
recipe = cli.read_recipe(sys.argv[1:])
size = memory.model_size(recipe.model, backends.lora_config(recipe.model, None))
load = memory.device_load(
    recipe, backend="transformers", processes=1, longest_prompt=31, optimizer_bytes=8, cuda=False
)
print(json.dumps(memory.peak_memory(size, load)))
"""


def run_python(*words: str) -> tuple[str, int]:
    """What a Python process printed, and the peak of its own memory in bytes.

    The memory is read every 20 ms. Exits with the process's errors if it fails.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    used = 0
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, stdout=out, stderr=errors, env=environment
        )
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            with contextlib.suppress(OSError, IndexError):
                kilobytes = int(status.read_text().split("RssAnon:")[1].split()[0])
                used = max(used, kilobytes * 1024)
            time.sleep(0.02)
        out.seek(0)
        errors.seek(0)
        if process.returncode:
            sys.exit(errors.read())
        return out.read(), used


if __name__ == "__main__":
    sys.exit(main())
