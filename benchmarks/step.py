"""Times a training step of GTPO against a step of GRPO: `python benchmarks/step.py`.

Both train one model on one fixed rollout, in turn. A step is everything except sampling: rewards,
conflict tokens, forward, backward, clipping and optimizer.

By default the trainer is TRL's, once with TRL's log-probs and once with the streaming head that
GTPO uses there. `--backend unsloth` takes the trainer that Unsloth generates, without and with its
shared-prefix trick, and GTPO on Unsloth's own head. On a CPU, Unsloth's code is not compiled, and
transformers loads the model.
"""

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
import unittest.mock
from pathlib import Path

import measure

SEED, RANK = 3407, 16
STOCK, UNSLOTHS_HEAD = "GRPO, as Unsloth comes", "GTPO, Unsloth's head"
PATCHES = {  # on Unsloth: the name that is patched during the step, and its value
    # Unsloth uses its shared-prefix trick only where no entropies are needed, so GTPO never does.
    "GRPO": ("unsloth.utils.prefix_grouper._ENABLED", False),
    UNSLOTHS_HEAD: ("gtpo.gtpo_training.streaming_in_unsloths_loss", contextlib.nullcontext),
}


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Time a step of GTPO against a step of GRPO.")
    parser.add_argument("--backend", choices=["transformers", "unsloth"], default="transformers")
    parser.add_argument("--shape", choices=measure.SHAPES, default="small")
    parser.add_argument(
        "--model",
        type=Path,
        help="folder of a model of that shape (default: makes one)",
    )
    parser.add_argument("--bits", type=int, choices=[4, 16], default=16)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=48, help="tokens of the prompt")
    parser.add_argument(
        "--completion",
        type=int,
        default=128,
        help="tokens of the longest completion; the shortest has half as many",
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # Unsloth writes a cache into the current folder
        figures = compare(options, Path(folder))
    print_table(figures)
    measure.save(options.json, figures)
    return 0


def compare(options: argparse.Namespace, folder: Path) -> dict:
    """Seconds and peak memory of each trainer's step, with the ratios of GTPO to the others."""
    policy = load(options, folder)
    import torch
    import trl

    from gtpo.gtpo_training import UnslothGTPOTrainer

    on_unsloth = options.backend == "unsloth"
    classes = {"GRPO": trl.GRPOTrainer}
    if on_unsloth:
        classes |= {STOCK: trl.GRPOTrainer, UNSLOTHS_HEAD: UnslothGTPOTrainer}
    else:
        classes |= {"GRPO, streaming head": trl.GRPOTrainer}
    classes["GTPO"] = UnslothGTPOTrainer
    steps, first = {}, None
    if not torch.cuda.is_available():
        # With two threads, the CPU-seconds would include their waiting for each other.
        torch.set_num_threads(1)
    elif options.backend == "transformers":  # Trainer.train() begins with this call
        policy.model.gradient_checkpointing_enable()
    for name, trainer_class in classes.items():
        trainer = make_trainer(trainer_class, policy, options, folder)
        if name == "GRPO, streaming head":
            from gtpo.hooks.streaming_head import StreamingHead

            StreamingHead(trainer)
        first = first or trainer
        trainer.optimizer = first.optimizer or first.create_optimizer()
        steps[name] = Step(trainer, options, PATCHES.get(name) if on_unsloth else None)
    with measure.using_the_gpu(alone=False):
        for step in steps.values():
            step()  # compiles, and GTPO measures its initial entropy
            step()
    with measure.using_the_gpu(alone=True):
        peaks = {name: measure.peak_bytes(step) for name, step in steps.items()}
        taken = measure.interleaved(steps, options.rounds)
    weights = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    others = [name for name in steps if name != "GTPO"]
    metrics = steps["GTPO"].trainer._metrics["train"]
    return {
        "options": {k: str(v) for k, v in vars(options).items() if k not in ("json", "model")},
        "seconds": taken,
        "median": {name: statistics.median(values) for name, values in taken.items()},
        "ratio": {name: measure.ratio(taken["GTPO"], taken[name]) for name in others},
        "peak_bytes": peaks,
        "weights_bytes": weights,
        "memory_ratio": {
            name: (weights + peaks["GTPO"]) / (weights + peaks[name]) for name in others
        },
        "conflict_tokens": metrics["gtpo/frac_conflict_tokens"][-1],
    }


def load(options: argparse.Namespace, folder: Path):
    """A policy with random weights, loaded as train_model.py loads it."""
    import torch

    from gtpo.models import backends
    from gtpo.recipe.sections import ModelSection

    cuda = torch.cuda.is_available()
    model = options.model or folder / "model"
    section = ModelSection(
        model_name=str(model),
        backend=options.backend,
        max_seq_length=options.prompt + options.completion,
        lora_rank=RANK,
        lora_alpha=RANK,
        load_in_4bit=options.bits == 4,
        fast_inference=False,
    )
    # This comes before any import of TRL.
    if options.backend == "unsloth" and not cuda:
        backend = unsloth_on_a_cpu()
    else:
        backend = backends.prepare_backend(section, {})
    from gtpo.models.tokenizer import load_tokenizer

    if not options.model:
        measure.make_model(options.shape, model)
    policy = backends.load_policy(
        section,
        load_tokenizer(section, backend),
        backend,
        seed=SEED,
        precision="bf16" if cuda else "float32",
        gradient_checkpointing=cuda,
    )
    if backend != options.backend:
        # Unsloth's trainer calls these methods of Unsloth's models.
        policy.model.for_training = policy.model.for_inference = lambda *args, **kwargs: None
    return policy


def unsloth_on_a_cpu() -> str:
    """Lets Unsloth generate its trainer without a GPU, and returns the backend for the model."""
    os.environ.update(UNSLOTH_ALLOW_CPU="1", UNSLOTH_COMPILE_DISABLE="1", UNSLOTH_FORCE_FLOAT32="1")
    import unsloth

    del os.environ["UNSLOTH_ALLOW_CPU"]
    unsloth.PatchFastRL("GRPO", unsloth.FastLanguageModel)
    return "transformers"


def make_trainer(trainer_class, policy, options: argparse.Namespace, folder: Path):
    """A trainer whose generation returns one fixed rollout.

    The completions share their first 6 and last 4 tokens. Their lengths run from half of
    `--completion` to all of it.
    """
    import datasets
    import torch
    import trl

    cuda = torch.cuda.is_available()
    arguments = trl.GRPOConfig(
        output_dir=str(folder / "run"),
        seed=SEED,
        max_steps=1000,
        num_generations=options.generations,
        beta=0.0,
        loss_type="grpo",
        scale_rewards="none",
        per_device_train_batch_size=options.generations,
        gradient_accumulation_steps=1,
        max_completion_length=options.completion,
        learning_rate=1e-6,
        optim="adamw_torch",
        bf16=cuda,
        use_cpu=not cuda,
        gradient_checkpointing=cuda,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        temperature=1.0,
    )
    trainer = trainer_class(
        model=policy.model,
        args=arguments,
        processing_class=policy.tokenizer,
        reward_funcs=[pay_in_turn],
        train_dataset=datasets.Dataset.from_list([{"prompt": "?"}]),
    )
    if options.backend == "unsloth" and not cuda:  # float32, like the model
        trainer._autocast_enabled = trainer._autocast_force_float32 = False
        trainer._autocast_dtype = torch.float16
    generator = torch.Generator().manual_seed(SEED)

    def draw(count: int) -> list[int]:
        ids = torch.randint(100, len(policy.tokenizer) - 20, (count,), generator=generator)
        return ids.tolist()

    prompt, start, end = draw(options.prompt), draw(6), [*draw(3), policy.tokenizer.eos_token_id]
    lengths = torch.linspace(options.completion / 2, options.completion, options.generations)
    rows = [[*start, *draw(length - 10), *end] for length in lengths.int().tolist()]

    def generate(prompt_ids, *args, **kwargs):
        return [list(row) for row in rows], None

    trainer._generate_single_turn = generate
    trainer._tokenize_prompts = lambda prompts: ([list(prompt) for _ in prompts], None, {})
    return trainer


def pay_in_turn(completions, **kwargs) -> list[float]:
    """Rewards of 0, 1, 2, 0, 1, 2 and so on."""
    return [float(i % 3) for i in range(len(completions))]


class Step:
    """One optimizer step of `trainer` on its fixed rollout."""

    def __init__(self, trainer, options: argparse.Namespace, patch: tuple | None):
        self.trainer, self.batch = trainer, [{"prompt": "?"} for _ in range(options.generations)]
        trainer.current_gradient_accumulation_steps = 1
        self.parameters = [p for p in trainer.model.parameters() if p.requires_grad]
        self.patched = unittest.mock.patch(*patch) if patch else contextlib.nullcontext()

    def __call__(self) -> None:
        import torch

        trainer = self.trainer
        trainer.model.train()
        with self.patched:
            trainer.training_step(trainer.model, list(self.batch), None)
        torch.nn.utils.clip_grad_norm_(self.parameters, 0.1)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad(set_to_none=True)
        trainer.state.global_step += 1


def print_table(figures: dict) -> None:
    """Prints one row per trainer."""
    values = "  ".join(f"{key} {value}" for key, value in figures["options"].items())
    print(f"{measure.machine()['device']}: {values}")
    print(f"{figures['conflict_tokens']:.0%} of the tokens are conflict tokens")
    columns = f"{'':<24}{'s / step':>10}{'GTPO is':>9}{'peak MiB':>10}{'GTPO is':>9}"
    print(f"{columns}   (peak: beside the weights; ratio: with them)")
    for name, median in figures["median"].items():
        time, memory = (
            f"{figures[key][name]:.3f}" if name in figures[key] else ""
            for key in ("ratio", "memory_ratio")
        )
        peak = figures["peak_bytes"][name] / 2**20
        print(f"{name:<24}{median:>10.3f}{time:>9}{peak:>10.0f}{memory:>9}")


if __name__ == "__main__":
    sys.exit(main())
