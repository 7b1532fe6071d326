"""Measures how the cost of a step grows, and its parts: `python benchmarks/scaling.py`.

Varies one of generations, completion length, vocabulary and prompts at a time. Uses GTPO's trainer
on plain TRL, and a random Llama with 4 layers and 128 hidden units. Completions have their maximum
length. Prints CPU-seconds of one thread, as medians of two passes over all points. With two passes,
a disturbance does not affect one axis alone.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

CENTRE = {"generations": 8, "completion length": 64, "vocabulary": 8192, "prompts": 1}
AXES = {
    "generations": (4, 8, 16, 32),
    "completion length": (32, 64, 128, 256),
    "vocabulary": (2048, 8192, 32_768, 131_072),
    "prompts": (1, 2, 4, 8),
}
WARM_UP = 1  # steps that do not count


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--steps", type=int, default=3, help="counted steps per point and pass (default: 3)"
    )
    parser.add_argument("--json", type=Path, help="save the figures to this file")
    parser.add_argument("--plot", type=Path, help="draw the curves to this file")
    options = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TQDM_DISABLE="1")
    import torch
    from measure import exponent, machine_line, save
    from shares import PARTS, columns, header, medians

    torch.set_num_threads(1)
    points = {
        tuple({**CENTRE, axis: value}.items()): []
        for axis, values in AXES.items()
        for value in values
    }
    for _ in range(2):
        for point, steps in points.items():
            steps += measured_steps(dict(point), options.steps)[WARM_UP:]

    print(machine_line())
    print(header(30))
    curves, growth = {}, {}
    for axis, values in AXES.items():
        curves[axis] = [medians(points[tuple({**CENTRE, axis: value}.items())]) for value in values]
        for value, parts in zip(values, curves[axis], strict=True):
            print(f"{axis:<18}{value:>9,}   {columns(parts)}")
        growth[axis] = exponent(values[-2:], [parts["step"] for parts in curves[axis][-2:]])
    exponents = ", ".join(f"{axis} {value:.2f}" for axis, value in growth.items())
    print(f"Growth exponent of a step between the two largest values: {exponents}")
    centre = medians(points[tuple(CENTRE.items())])
    largest = max(PARTS, key=centre.get)
    place = ", ".join(f"{axis} {value:,}" for axis, value in CENTRE.items())
    print(f"At {place}: the largest share is {largest}, {centre[largest] / centre['step']:.0%}")
    if options.plot:
        draw(options.plot, curves, growth)
    figures = {
        "centre": CENTRE,
        "axes": AXES,
        "cpu_seconds": curves,
        "growth_exponents": growth,
        "largest": largest,
    }
    save(options.json, figures)
    return 0


def measured_steps(point: dict[str, int], steps: int) -> list[dict[str, float]]:
    """The CPU-seconds of each part of each step of a new trainer."""
    import torch
    import trl
    from datasets import Dataset
    from peft import LoraConfig, get_peft_model
    from shares import Shares
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from gtpo.answers import format_reference
    from gtpo.gtpo_training import UnslothGTPOTrainer
    from gtpo.hooks.merged_generation import generate_merged
    from gtpo.hooks.streaming_head import stream_log_probs
    from reward_math import final_reward

    logging.set_verbosity_error()
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/model")
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=point["vocabulary"],
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=False,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.2,
        )
    )
    model = get_peft_model(
        model, LoraConfig(r=16, lora_alpha=16, task_type="CAUSAL_LM", target_modules="all-linear")
    )
    completions = point["generations"] * point["prompts"]
    length = point["completion length"]
    with tempfile.TemporaryDirectory() as folder:
        arguments = trl.GRPOConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            seed=0,
            loss_type="grpo",
            scale_rewards="none",
            beta=0.0,
            num_generations=point["generations"],
            per_device_train_batch_size=completions,
            gradient_accumulation_steps=1,
            max_steps=WARM_UP + steps,
            max_completion_length=length,
            generation_kwargs={"min_new_tokens": length},
            gradient_checkpointing=False,
            save_strategy="no",
            logging_steps=1,
            disable_tqdm=True,
            learning_rate=1e-5,
        )
        rows = []
        for i in range(64):
            question = f"Ann has {i} pens and buys {i + 2} more. How many pens has she?"
            prompt = [{"role": "user", "content": question}]
            rows.append({"prompt": prompt, "answer": format_reference("", str(2 * i + 2))})
        trainer = UnslothGTPOTrainer(
            model=model,
            args=arguments,
            processing_class=tokenizer,
            reward_funcs=[final_reward],
            train_dataset=Dataset.from_list(rows),
        )
        generate_merged(trainer)
        stream_log_probs(trainer)
        shares = Shares(trainer)
        trainer.log = lambda *args, **kwargs: None  # the trainer's log prints every step
        trainer.train()
    return shares.steps


def draw(file: Path, curves: dict[str, list], growth: dict[str, float]) -> None:
    """Draws the parts of a step over each axis."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from shares import PARTS

    figure, axes = pyplot.subplots(1, len(AXES), figsize=(13, 3.6), layout="constrained")
    for axis, (name, values) in zip(axes, AXES.items(), strict=True):
        layers = [[parts[part] for parts in curves[name]] for part in PARTS]
        axis.stackplot(range(len(values)), layers, labels=PARTS)
        axis.set_xticks(range(len(values)), [f"{value:,}" for value in values])
        axis.set_xlabel(f"{name} (exponent {growth[name]:.2f})")
        axis.margins(x=0)
        axis.set_ylim(0)
    axes[0].set_ylabel("CPU-seconds of a step")
    axes[0].legend(loc="upper left", frameon=False, reverse=True)
    centre = ", ".join(f"{value:,}" for value in CENTRE.values())
    figure.suptitle(f"A step against {', '.join(AXES)}; the others at {centre}")
    figure.savefig(file, dpi=110)
    print(f"Written: {file}")


if __name__ == "__main__":
    raise SystemExit(main())
