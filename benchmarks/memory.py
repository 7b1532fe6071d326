"""The worst-case estimate of `--check` against what a step of training really takes, on a CPU:
`python benchmarks/memory.py`.

Trains one step of random Llamas of several shapes, with the demo's tokenizer and data and
completions that use their whole length, and prints the estimate beside the peak of the process: its
own memory, without the pages of files that it maps. `--kept` counts instead what a layer keeps for
its backward pass, in half precision with a float32 adapter, and in float32.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# name: hidden, intermediate, layers, vocabulary, completions, tokens of a sequence, gradient
# checkpointing
SHAPES = {
    "libraries alone": (32, 64, 1, 512, 8, 96, True),
    "large vocabulary": (64, 128, 2, 100_000, 8, 200, True),
    "weights": (1024, 4096, 8, 512, 8, 96, True),
    "long, checkpointed": (256, 1024, 8, 512, 8, 400, True),
    "long, all kept": (256, 1024, 8, 512, 8, 400, False),
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Hold the estimate of --check against what is used."
    )
    parser.add_argument(
        "--kept", action="store_true", help="count what a layer keeps for its backward pass"
    )
    if parser.parse_args().kept:
        return print_kept()
    print(
        f"{'shape':<20}{'estimate GiB':>13}{'used GiB':>10}{'used':>7}  what the estimate is"
        " made of"
    )
    for name, sizes in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            flags = _flags(Path(folder), *sizes)
            parts = json.loads(_python(flags, estimate=True)[0])
            _, used = _python(flags, estimate=False)
        estimate = sum(parts.values())
        made_of = ", ".join(
            f"{part} {size / 2**30:.2f}" for part, size in parts.items() if size > 2**25
        )
        print(
            f"{name:<20}{estimate / 2**30:>13.2f}{used / 2**30:>10.2f}{used / estimate:>7.0%} "
            f" {made_of}",
            flush=True,
        )
    return 0


def print_kept() -> int:
    """Numbers per token and layer that autograd saves, from three layers against two, beside
    gtpo/runs/memory.py's.
    """
    from gtpo.runs.memory import DeviceLoad, ModelSize, saved_per_token

    rows, length = 2, 128
    print(f"{'hidden':>8}{'intermediate':>14}{'keys':>8}{'bits':>6}{'kept':>9}{'estimate':>10}")
    for hidden, intermediate, heads, key_heads in (
        (256, 512, 8, 8),
        (512, 512, 8, 8),
        (256, 1024, 8, 8),
        (256, 512, 8, 2),
        (2048, 11_008, 16, 2),
    ):
        kv = hidden * key_heads // heads
        for bits in (16, 32):
            three, two = (
                _saved_bytes(hidden, intermediate, heads, key_heads, layers, rows, length, bits)
                for layers in (3, 2)
            )
            load = DeviceLoad(
                rows, rows, prompt_tokens=0, completion_tokens=length, weight_bits=bits
            )
            size = ModelSize(0, 0, 0, 1, hidden, intermediate, kv, heads, 0)
            estimate = saved_per_token(size, load)
            print(
                f"{hidden:>8}{intermediate:>14}{kv:>8}{bits:>6}{(three - two) / (rows * length * bits / 8):>9,.0f}{estimate:>10,}",
                flush=True,
            )
    return 0


def _saved_bytes(
    hidden: int,
    intermediate: int,
    heads: int,
    key_heads: int,
    layers: int,
    rows: int,
    length: int,
    bits: int,
) -> int:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from gtpo.recipe.sections import ModelSection

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
        if tensor.untyped_storage().data_ptr() not in weights:
            # kept, so that no other gets its address
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, : length // 4] = 0
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=half),
        torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
    ):
        output = model.model.model(
            input_ids=torch.randint(0, 512, (rows, length)), attention_mask=mask
        )
    assert output.last_hidden_state.requires_grad
    return sum(storage.nbytes() for storage in saved.values())


def _flags(
    folder: Path,
    hidden: int,
    intermediate: int,
    layers: int,
    vocabulary: int,
    completions: int,
    length: int,
    checkpointing: bool,
) -> list[str]:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/model")
    tokenizer.save_pretrained(folder / "model")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
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
        "--model-name",
        str(folder / "model"),
        "--dataset.path",
        str(ROOT / "demo/data/train.jsonl"),
        "--evaluation.path",
        "null",
        "--output_root",
        str(folder),
        "--training.max_steps",
        "1",
        "--training.per_device_train_batch_size",
        str(completions),
        "--training.gradient_checkpointing",
        str(checkpointing).lower(),
        "--model.max_seq_length",
        str(length),
        "--training.max_prompt_length",
        "40",
        "--watch.completions",
        "false",
        "--training.generation_kwargs",
        f"{{min_new_tokens: {length - 40}}}",
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


def _python(flags: list[str], *, estimate: bool) -> tuple[str, int]:
    """What a process printed, and the peak of its own memory in bytes, looked at every 20 ms."""
    command = [
        sys.executable,
        *(["-c", ESTIMATE] if estimate else [str(ROOT / "train_model.py")]),
        *flags,
    ]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process, used = (
            subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=out,
                stderr=errors,
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
            ),
            0,
        )
        while process.poll() is None:
            with contextlib.suppress(OSError, IndexError):
                used = max(
                    used,
                    int(
                        Path(f"/proc/{process.pid}/status")
                        .read_text()
                        .split("RssAnon:")[1]
                        .split()[0]
                    )
                    * 1024,
                )
            time.sleep(0.02)
        out.seek(0), errors.seek(0)
        if process.returncode:
            sys.exit(errors.read())
        return out.read(), used


if __name__ == "__main__":
    sys.exit(main())
