"""The worst-case estimate of `--check` against what a step of training really takes, on a CPU: `python benchmarks/memory.py`.

Trains one step of random Llamas of several shapes, with the demo's tokenizer and data and completions that use their whole
length, and prints the estimate beside the peak of the process: its own memory, without the pages of files that it maps.
"""

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

SHAPES = {  # name: hidden, intermediate, layers, vocabulary, completions, tokens of a sequence, gradient checkpointing
    "libraries alone": (32, 64, 1, 512, 8, 96, True),
    "large vocabulary": (64, 128, 2, 100_000, 8, 200, True),
    "weights": (1024, 4096, 8, 512, 8, 96, True),
    "long, checkpointed": (256, 1024, 8, 512, 8, 400, True),
    "long, all kept": (256, 1024, 8, 512, 8, 400, False),
}


def main() -> int:
    print(f"{'shape':<20}{'estimate GiB':>13}{'used GiB':>10}{'used':>7}  what the estimate is made of")
    for name, sizes in SHAPES.items():
        with tempfile.TemporaryDirectory() as folder:
            flags = _flags(Path(folder), *sizes)
            parts = json.loads(_python(flags, estimate=True)[0])
            _, used = _python(flags, estimate=False)
        estimate = sum(parts.values())
        made_of = ", ".join(f"{part} {size / 2**30:.2f}" for part, size in parts.items() if size > 2**25)
        print(f"{name:<20}{estimate / 2**30:>13.2f}{used / 2**30:>10.2f}{used / estimate:>7.0%}  {made_of}", flush=True)
    return 0


def _flags(folder: Path, hidden: int, intermediate: int, layers: int, vocabulary: int, completions: int, length: int, checkpointing: bool) -> list[str]:
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/model")
    tokenizer.save_pretrained(folder / "model")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=4096, tie_word_embeddings=False, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )).save_pretrained(folder / "model")
    return [str(ROOT / "recipes/demo.yaml"), "--model-name", str(folder / "model"), "--dataset.path", str(ROOT / "demo/data/train.jsonl"), "--evaluation.path", "null",
            "--output_root", str(folder), "--training.max_steps", "1", "--training.per_device_train_batch_size", str(completions), "--training.gradient_checkpointing",
            str(checkpointing).lower(), "--model.max_seq_length", str(length), "--training.max_prompt_length", "40", "--watch.completions", "false",
            "--training.generation_kwargs", f"{{min_new_tokens: {length - 40}}}"]


ESTIMATE = """
import json, sys
from gtpo import backends, cli, memory, room
recipe = cli.read_recipe(sys.argv[1:])
shape = memory.shape(recipe.model, backends.lora_config(recipe.model, None))
load = room._load(recipe, backend="transformers", processes=1, longest=31, optimizer=8, cuda=False)
print(json.dumps(memory.peak(shape, load)))
"""


def _python(flags: list[str], *, estimate: bool) -> tuple[str, int]:
    """What a process printed, and the peak of its own memory in bytes, looked at every 20 ms."""
    command = [sys.executable, *(["-c", ESTIMATE] if estimate else [str(ROOT / "train_model.py")]), *flags]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process, used = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=errors, env={**os.environ, "HF_HUB_OFFLINE": "1"}), 0
        while process.poll() is None:
            with contextlib.suppress(OSError, IndexError):
                used = max(used, int(Path(f"/proc/{process.pid}/status").read_text().split("RssAnon:")[1].split()[0]) * 1024)
            time.sleep(0.02)
        out.seek(0), errors.seek(0)
        if process.returncode:
            sys.exit(errors.read())
        return out.read(), used


if __name__ == "__main__":
    sys.exit(main())
