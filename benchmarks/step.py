"""What GTPO costs over GRPO: a step of each on one model and one fixed rollout, in turn: `python
benchmarks/step.py`.

A step is everything but sampling: scoring the rollout, conflict tokens, forward, backward,
clipping, optimizer. `--backend unsloth` compares with Unsloth's generated trainer, its
shared-prefix trick off and as it comes, and with GTPO on Unsloth's own head; on a CPU, uncompiled
and on a model that transformers loads. Without `--backend`, TRL's trainer, once with its own
log-probs and once with the streaming head that GTPO uses there.
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
from figures import ratio

SEED, RANK = 3407, 16
STOCK, UNSLOTHS_HEAD = "GRPO, as Unsloth comes", "GTPO, Unsloth's head"
PATCHES = {  # what is another way in a step on Unsloth: a name, and its value for that step
    # the shared-prefix trick, which needs that no entropies are asked for
    "GRPO": ("unsloth.utils.prefix_grouper._ENABLED", False),
    UNSLOTHS_HEAD: ("gtpo.gtpo_training.streaming_in_unsloths_loss", contextlib.nullcontext),
}


def main() -> int:
    parser = argparse.ArgumentParser(description="Time GTPO's step against GRPO's.")
    parser.add_argument("--backend", choices=["transformers", "unsloth"], default="transformers")
    parser.add_argument("--shape", choices=measure.SHAPES, default="small")
    parser.add_argument(
        "--model",
        type=Path,
        help="folder of a model of that shape, made before; one is made if left out",
    )
    parser.add_argument("--bits", type=int, choices=[4, 16], default=16)
    parser.add_argument("--generations", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=48, help="tokens of the prompt")
    parser.add_argument(
        "--completion",
        type=int,
        default=128,
        help="tokens of the longest completion; the shortest has half",
    )
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # Unsloth writes a cache where it runs
        figures = compare(options, Path(folder))
    print_table(figures)
    measure.save(figures, options.json)
    return 0


def compare(options: argparse.Namespace, folder: Path) -> dict:
    policy = load(options, folder)
    import torch
    import trl

    from gtpo.gtpo_training import UnslothGTPOTrainer

    on_unsloth = options.backend == "unsloth"
    between = (
        {STOCK: trl.GRPOTrainer, UNSLOTHS_HEAD: UnslothGTPOTrainer}
        if on_unsloth
        else {"GRPO, streaming head": trl.GRPOTrainer}
    )
    makers = {"GRPO": trl.GRPOTrainer, **between, "GTPO": UnslothGTPOTrainer}
    steps, first = {}, None
    if not torch.cuda.is_available():
        # CPU-seconds of one core: two would also count their waiting for each other
        torch.set_num_threads(1)
    elif options.backend == "transformers":  # what Trainer.train() does first
        policy.model.gradient_checkpointing_enable()
    for name, maker in makers.items():
        trainer = make_trainer(maker, policy, options, folder)
        if name == "GRPO, streaming head":
            from gtpo.hooks.streaming_head import StreamingHead

            StreamingHead(trainer)
        first = first or trainer
        trainer.optimizer = first.optimizer or first.create_optimizer()
        steps[name] = Step(trainer, options, PATCHES.get(name) if on_unsloth else None)
    with measure.using_the_gpu(alone=False):
        for step in steps.values():
            step(), step()  # compiles, and GTPO measures its initial entropy
    with measure.using_the_gpu(alone=True):
        peaks = {name: measure.peak_bytes(step) for name, step in steps.items()}
        taken = measure.interleaved(steps, options.rounds)
    held = sum(p.numel() * p.element_size() for p in policy.model.parameters())
    return {
        "machine": measure.machine(),
        "options": {k: str(v) for k, v in vars(options).items() if k not in ("json", "model")},
        "seconds": taken,
        "median": {name: statistics.median(values) for name, values in taken.items()},
        "ratio": {name: ratio(taken["GTPO"], taken[name]) for name in taken if name != "GTPO"},
        "peak_bytes": peaks,
        "weights_bytes": held,
        "memory_ratio": {
            name: (held + peaks["GTPO"]) / (held + peak)
            for name, peak in peaks.items()
            if name != "GTPO"
        },
        "conflict_tokens": steps["GTPO"].trainer._metrics["train"]["gtpo/frac_conflict_tokens"][-1],
    }


def load(options: argparse.Namespace, folder: Path):
    """The policy as train_model.py loads it, of a model with random weights."""
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
    # before anything imports TRL
    backend = (
        backends.prepare_backend(section, {})
        if cuda or options.backend != "unsloth"
        else unsloth_on_a_cpu()
    )
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
        # what Unsloth's trainer calls
        policy.model.for_training = policy.model.for_inference = lambda *args, **kwargs: None
    return policy


def unsloth_on_a_cpu() -> str:
    """Let Unsloth generate its trainer without a GPU; returns the backend that can load the
    model.
    """
    os.environ.update(UNSLOTH_ALLOW_CPU="1", UNSLOTH_COMPILE_DISABLE="1", UNSLOTH_FORCE_FLOAT32="1")
    import unsloth

    del os.environ["UNSLOTH_ALLOW_CPU"]
    unsloth.PatchFastRL("GRPO", unsloth.FastLanguageModel)
    return "transformers"


def make_trainer(maker, policy, options: argparse.Namespace, folder: Path):
    """A trainer whose generation returns one fixed rollout: a shared start and end, and lengths
    from a half to the whole.
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
    trainer = maker(
        model=policy.model,
        args=arguments,
        processing_class=policy.tokenizer,
        reward_funcs=[
            lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))]
        ],
        train_dataset=datasets.Dataset.from_list([{"prompt": "?"}]),
    )
    if options.backend == "unsloth" and not cuda:  # float32, as the model is
        trainer._autocast_enabled, trainer._autocast_force_float32, trainer._autocast_dtype = (
            False,
            False,
            torch.float16,
        )
    generator = torch.Generator().manual_seed(SEED)
    draw = lambda n: torch.randint(
        100, len(policy.tokenizer) - 20, (n,), generator=generator
    ).tolist()  # noqa: E731
    prompt, start, end = draw(options.prompt), draw(6), [*draw(3), policy.tokenizer.eos_token_id]
    lengths = (
        torch.linspace(options.completion / 2, options.completion, options.generations)
        .int()
        .tolist()
    )
    rows = [[*start, *draw(length - 10), *end] for length in lengths]
    trainer._generate_single_turn = lambda prompt_ids, *args, **kwargs: (
        [list(row) for row in rows],
        None,
    )
    trainer._tokenize_prompts = lambda prompts: ([list(prompt) for _ in prompts], None, {})
    return trainer


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
    made_of = "  ".join(f"{key} {value}" for key, value in figures["options"].items())
    print(
        f"{figures['machine']['device']}: {made_of}\n{figures['conflict_tokens']:.0%} of the tokens"
        " are conflict tokens"
    )
    print(
        f"{'':<24}{'s / step':>10}{'GTPO is':>9}{'peak MiB':>10}{'GTPO is':>9}   (peak: beside the"
        " weights; ratio: with them)"
    )
    for name, median in figures["median"].items():
        ratios = [
            f"{figures[key][name]:.3f}" if name in figures[key] else ""
            for key in ("ratio", "memory_ratio")
        ]
        print(
            f"{name:<24}{median:>10.3f}{ratios[0]:>9}{figures['peak_bytes'][name] / 2**20:>10.0f}{ratios[1]:>9}"
        )


if __name__ == "__main__":
    sys.exit(main())
