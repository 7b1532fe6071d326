"""What only a GPU can show: `make gpu-check`, or `python benchmarks/gpu_check.py`. Needs no network and nothing but this repository.

For 16 and 4 bits, a randomly initialised Llama-shaped model goes through Unsloth's FastLanguageModel with LoRA and takes
one GTPO step on a fixed rollout. The gradients of its LoRA weights are held against transformers in float32 on the same
base weights (for 4 bits: the dequantised ones). Then three steps with real generation are timed. Each case runs in a
process of its own, because Unsloth replaces TRL's trainers. Writes JSON and a table to docs/gpu/. Without a GPU it says
so and exits 0.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

BOUND = {"16-bit": 2e-2, "4-bit": 2e-2}  # relative error of the LoRA gradients
SEED, RANK, GENERATIONS, LENGTH = 3407, 16, 8, 48


def main() -> int:
    parser = argparse.ArgumentParser(description="Check GTPO on this machine's GPU.")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/gpu", help="folder for the JSON file and the table")
    parser.add_argument("--case", choices=["unsloth", "reference"], help=argparse.SUPPRESS)
    parser.add_argument("--bits", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        print("FIGURES " + json.dumps(run_case(options.case, options.bits, options.work)))
        return 0
    try:
        import torch
    except ImportError:
        print("skipped: torch is not installed")
        return 0
    if not torch.cuda.is_available():
        print("skipped: no NVIDIA GPU is visible")
        return 0
    figures = check()
    write(figures, options.out)
    return 0 if all(row["passed"] for row in figures["cases"]) else 1


def check() -> dict:
    """Run every case and compare; returns what is written to docs/gpu."""
    import torch
    from safetensors.torch import load_file

    from gtpo.runs import versions

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make_model(work / "model")
        for bits in (16, 4):
            found, reference = (in_a_process(case, bits, work) for case in ("unsloth", "reference"))
            ours, theirs = (load_file(work / f"{case}-{bits}.safetensors") for case in ("unsloth", "reference"))
            error = relative_error(ours, theirs)
            bound = BOUND[f"{bits}-bit"]
            rows.append({"bits": bits, "gradient_error": error, "bound": bound, "passed": error <= bound, **found,
                         "reference_seconds_per_step": reference["seconds_per_step"]})
    return {"date": datetime.date.today().isoformat(), "gpu": torch.cuda.get_device_name(), "versions": versions(), "cases": rows}


def in_a_process(case: str, bits: int, work: Path) -> dict:
    command = [sys.executable, __file__, "--case", case, "--bits", str(bits), "--work", str(work)]
    run = subprocess.run(command, cwd=work, stdout=subprocess.PIPE, text=True)
    if run.returncode:
        raise SystemExit(f"the case {case}, {bits} bits, failed; its output is above\n{run.stdout[-2000:]}")
    return json.loads(next(line for line in run.stdout.splitlines() if line.startswith("FIGURES ")).removeprefix("FIGURES "))


def make_model(folder: Path) -> None:
    """A Llama-shaped model with random weights, far enough from zero that its logits are not uniform."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/model")
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1536, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=2048, initializer_range=0.06, tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_case(case: str, bits: int, work: Path) -> dict:
    """Train one step on the fixed rollout, save the gradients, then time three steps; returns the figures."""
    from gtpo import backends
    from gtpo.chat_tokenizer import load_tokenizer
    from gtpo.sections import ModelSection

    section = ModelSection(
        model_name=str(work / "model"), backend="unsloth" if case == "unsloth" else "transformers", max_seq_length=256,
        lora_rank=RANK, load_in_4bit=bits == 4, fast_inference=False,
    )
    backend = backends.prepare_backend(section, {})
    tokenizer = load_tokenizer(section, backend)
    if case == "unsloth":
        import torch

        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        policy = backends.load_policy(
            section, tokenizer, backend, seed=SEED, precision="bf16" if bf16 else "fp16", gradient_checkpointing=True)
        save_base_weights(policy.model, work / f"base-{bits}")
    else:
        policy = float32_policy(work / f"base-{bits}", work / "model", tokenizer)
    fill_adapter(policy.model)
    gradients, figures = steps(policy, case, work)
    from safetensors.torch import save_file

    save_file(gradients, work / f"{case}-{bits}.safetensors")
    return figures


def save_base_weights(model, file: Path) -> None:
    """The base weights that the policy really computes with, dequantised where it holds 4 bits."""
    from safetensors.torch import save_file

    weights = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            continue
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            import bitsandbytes

            parameter = bitsandbytes.functional.dequantize_4bit(parameter.data, state)
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        weights[name] = parameter.detach().float().cpu().contiguous()
    save_file(weights, file.with_suffix(".safetensors"))


def float32_policy(weights: Path, model_folder: Path, tokenizer):
    """The reference: transformers + peft in float32, on the base weights that the Unsloth case saved."""
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from gtpo.backends import Policy
    from gtpo.sections import ModelSection

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32, device_map={"": 0})
    model.load_state_dict(load_file(weights.with_suffix(".safetensors")))
    target_modules = ModelSection.model_fields["target_modules"].default
    model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, target_modules=target_modules, task_type="CAUSAL_LM"))
    return Policy(model, tokenizer, "transformers")


def fill_adapter(model) -> None:
    """The same small random LoRA weights in every case, B included, so that both factors get gradients."""
    import torch

    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(values.to(parameter.device, parameter.dtype))


def steps(policy, case: str, work: Path) -> tuple[dict, dict]:
    """The LoRA gradients of one step on the fixed rollout, and the figures of three steps with real generation."""
    import time

    import torch
    import trl
    from transformers import TrainerCallback

    from gtpo.data import load_problems
    from gtpo.gtpo_training import UnslothGTPOTrainer
    from gtpo.sections import DatasetSection

    dataset = DatasetSection(name="gsm8k", path=str(ROOT / "demo/data/train.jsonl"), system_instruction="Reason, then answer.")
    problems = load_problems(dataset, policy.tokenizer, 128, SEED)
    bf16 = case == "unsloth" and torch.cuda.is_bf16_supported(including_emulation=False)
    arguments = trl.GRPOConfig(
        output_dir=str(work / "run"), seed=SEED, max_steps=4, num_generations=GENERATIONS, per_device_train_batch_size=16,
        gradient_accumulation_steps=2, max_completion_length=LENGTH, loss_type="grpo", scale_rewards="none", beta=0.0,
        learning_rate=1e-6, max_grad_norm=0.0, lr_scheduler_type="constant", warmup_steps=0, optim="adamw_torch", temperature=1.0,
        bf16=bf16, fp16=case == "unsloth" and not bf16, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
        generation_kwargs={"suppress_tokens": [policy.tokenizer.pad_token_id]},  # Unsloth repacks a row at every pad id
    )
    trainer = UnslothGTPOTrainer(
        model=policy.model, args=arguments, processing_class=policy.tokenizer, train_dataset=problems,
        reward_funcs=[lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))]],
    )
    generate, gradients, marks = trainer._generate_single_turn, {}, []

    def first_fixed(prompt_ids, *args, **kwargs):
        if gradients:
            return generate(prompt_ids, *args, **kwargs)
        generator = torch.Generator().manual_seed(SEED)
        stem = torch.randint(100, len(policy.tokenizer) - 20, (LENGTH,), generator=generator).tolist()
        rows = []
        for i in range(len(prompt_ids)):  # a shared beginning and end, of unequal length, so that there are conflicts
            own = torch.randint(100, len(policy.tokenizer) - 20, (8 + i % 16,), generator=generator).tolist()
            rows.append([*stem[:5], *own, policy.tokenizer.eos_token_id])
        return rows, None

    trainer._generate_single_turn = first_fixed

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if not gradients:
                gradients.update({n: p.grad.float().cpu().contiguous() for n, p in model.named_parameters() if p.grad is not None})

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            marks.append(time.perf_counter())

    trainer.add_callback(Watch())
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    logs = trainer.state.log_history[0]
    return gradients, {
        "trainer": f"{type(trainer).__mro__[1].__module__}.{type(trainer).__mro__[1].__name__}",
        "initial_entropy": trainer.initial_entropy, "frac_conflict_tokens": logs["gtpo/frac_conflict_tokens"],
        "loss": logs["loss"], "seconds_per_step": (marks[-1] - marks[0]) / (len(marks) - 1),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def relative_error(found: dict, expected: dict) -> float:
    import torch

    if found.keys() != expected.keys():
        raise SystemExit(f"the two paths train other weights: {sorted(found.keys() ^ expected.keys())[:4]}")
    found, expected = (torch.cat([tensors[name].double().flatten() for name in sorted(tensors)]) for tensors in (found, expected))
    return ((found - expected).norm() / expected.norm()).item()


def write(figures: dict, out: Path) -> None:
    """JSON and a table, named after date and GPU; the table goes to the terminal too."""
    name = f"{figures['date']}-{figures['gpu'].replace(' ', '-')}"
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(figures, indent=2) + "\n")
    lines = [f"# {figures['gpu']}, {figures['date']}", "", "Printed by `make gpu-check`.", "",
             "| case | gradient error (bound) | passed | s/step (reference) | peak memory | conflict tokens |",
             "|---|---|---|---|---|---|"]
    lines += [f"| FastLanguageModel, {row['bits']}-bit | {row['gradient_error']:.1e} ({row['bound']:.0e}) | {row['passed']} | "
              f"{row['seconds_per_step']:.2f} ({row['reference_seconds_per_step']:.2f}) | {row['peak_memory_gib']:.2f} GiB | "
              f"{row['frac_conflict_tokens']:.0%} |" for row in figures["cases"]]
    lines += ["", *(f"- {key} {value}" for key, value in figures["versions"].items())]
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
