"""Checks what only a GPU can show: `make gpu-check`, or `python benchmarks/gpu_check.py`.

It needs no network, and nothing but this repository. Its parts:

- gradients: compares the LoRA gradients of one GTPO step with those of transformers in float32.
  A Llama-shaped model with random weights, in 16 and in 4 bits, is loaded by Unsloth's
  FastLanguageModel and takes the step on a fixed rollout. transformers has the same base weights,
  dequantised ones for 4 bits. The error may be 1.25 times that of transformers in bfloat16. Then
  three steps with real generation are timed.
- train: runs `train_model.py config.yaml`, the documented recipe, on such a model and the demo's
  data. It stops the run half-way, resumes it and evaluates it. It compares the GPU memory used with
  the estimate of `--check`.
- step, heads: run benchmarks/step.py and benchmarks/heads.py with the shapes of real models.

Each case runs in a process of its own, because Unsloth replaces TRL's trainers. A case that fails
is recorded and does not stop the others. The results are written to docs/gpu/, as JSON and as a
table. Without a GPU, the program says so and exits with 0.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import functools
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import measure

ROOT = measure.ROOT
ALLOWED = 1.25  # error of the LoRA gradients, relative to that of transformers in bfloat16
PARTS = ["gradients", "train", "step", "heads"]
CASES = ["unsloth", "reference", "bfloat16"]  # of gradients
SEED, RANK, GENERATIONS, LENGTH = 3407, 16, 8, 48
STEPS = [  # shape, GiB needed, and the flags of benchmarks/step.py
    (shape, gib, ["--backend", backend, *flags])
    for shape, gib in (("qwen2.5-3b", 40), ("llama-3.1-8b", 50))
    for backend, flags in (("unsloth", []), ("transformers", []), ("unsloth", ["--bits", "4"]))
]
# Runs a program, and prints the most GPU memory that it used.
PEAK = """
import atexit, pathlib, runpy, sys

def print_peak():
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        allocated = torch.cuda.max_memory_allocated() / 2**30
        reserved = torch.cuda.max_memory_reserved() / 2**30
        print(f"PEAK {allocated:.2f} GiB allocated, {reserved:.2f} GiB reserved")

atexit.register(print_peak)
sys.argv = sys.argv[1:]
sys.path.insert(0, str(pathlib.Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""
STEP = ["--generations", "8", "--prompt", "256", "--completion", "1024", "--rounds", "9"]


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Check GTPO on this machine's GPU.")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs/gpu", help="folder for the JSON file and the table"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, help="run only these parts")
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=measure.SHAPES,
        default=["qwen2.5-3b", "llama-3.1-8b"],
        help="model shapes for step",
    )
    parser.add_argument(
        "--side-by-side",
        type=int,
        default=1,
        metavar="N",
        help=(
            "cases at a time (default: 1); more need a GPU with 100 GiB and many cores, and a timed"
            " case has the GPU alone, but not the CPU"
        ),
    )
    parser.add_argument("--limit", type=int, default=900, help="most seconds for a case")
    parser.add_argument("--commit", help="the commit, for a copy without a repository")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
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
    return Check(options).run()


class Check:
    """The cases and their results, which are written after each case so that none is lost."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.parts = options, options.only or PARTS
        machine = measure.machine()
        if options.commit:
            machine["commit"] = options.commit
        self.figures = {"date": datetime.date.today().isoformat(), "machine": machine, "cases": {}}
        self.lock = threading.Lock()

    def run(self) -> int:
        """Runs the cases; returns 1 if one failed."""
        import torch

        with tempfile.TemporaryDirectory() as folder:
            self.work = Path(folder)
            make_model(self.work / "model")
            os.environ["GTPO_GPU_LOCK"] = str(self.work / "lock")
            cases = {
                "train": self.train,
                "gradients, 16 bits": functools.partial(self.gradients, 16),
                "gradients, 4 bits": functools.partial(self.gradients, 4),
                "heads": functools.partial(self.benchmark, "heads.py"),
            }
            cases = {name: case for name, case in cases.items() if name.split(",")[0] in self.parts}
            for shape, gib, flags in STEPS:
                if "step" in self.parts and shape in self.options.shapes and self.has(shape, gib):
                    case = functools.partial(self.step, shape, flags)
                    cases[f"step {shape} {' '.join(flags)}"] = case
                    if not (self.work / shape).exists():
                        measure.make_model(shape, self.work / shape)
            torch.cuda.empty_cache()
            with concurrent.futures.ThreadPoolExecutor(self.options.side_by_side) as pool:
                for name, case in cases.items():
                    pool.submit(self.keep, name, case)
        results = self.figures["cases"]
        failed = [name for name, result in results.items() if not result.get("passed", True)]
        print(f"failed: {', '.join(failed)}" if failed else "all passed")
        return 1 if failed else 0

    def keep(self, name: str, case) -> None:
        """Runs a case, and writes its result or its error."""
        began = time.monotonic()
        try:
            result = case()
        except Exception as error:  # the report shows it
            result = {"passed": False, "error": str(error)[-4000:]}
        with self.lock:
            seconds = time.monotonic() - began
            print(f"== {name}: {seconds:.0f} s\n{result.get('error', '')}", flush=True)
            self.figures["cases"][name] = result
            write(self.figures, self.options.out)

    def gradients(self, bits: int) -> dict:
        """The error of Unsloth's gradients and its bound, and the figures of its steps."""
        from safetensors.torch import load_file

        flags = ["--bits", bits, "--work", self.work]
        unsloth, reference, _ = (
            printed_figures(self.python(Path(__file__), "--case", case, *flags, timed=False))
            for case in CASES
        )
        ours, exact, rounded = (
            load_file(self.work / f"{case}-{bits}.safetensors") for case in CASES
        )
        error, bound = relative_error(ours, exact), ALLOWED * relative_error(rounded, exact)
        return {
            "gradient_error": error,
            "bound": bound,
            "passed": error <= bound,
            **unsloth,
            "reference_seconds_per_step": reference["seconds_per_step"],
        }

    def train(self) -> dict:
        """What the documented recipe prints on the small model.

        It trains half a run, resumes it, and evaluates it.
        """
        recipe = [
            *[ROOT / "train_model.py", ROOT / "config.yaml", "--model-name", self.work / "model"],
            *["--dataset.path", ROOT / "demo/data/train.jsonl"],
            *["--dataset.name", "gsm8k", "--dataset.subsets", "null"],
            *["--dataset.system_instruction", "Reason, then answer."],
            *["--model.max_seq_length", "256", "--model.max_prompt_length", "128"],
            *["--training.max_prompt_length", "128", "--training.save_steps", "2"],
            *["--training.report_to", "none"],
            *["--output_root", self.work / "runs", "--run-name", "check"],
        ]
        half, whole = (["--training.max_steps", steps] for steps in ("2", "4"))
        check = [*whole, "--check", "--json"]
        checked = self.python(*recipe, *check, timed=False, may_fail=True)
        trained = self.python("-c", PEAK, *recipe, *half, timed=False)
        run = next((self.work / "runs").iterdir())
        resumed = self.python(*recipe, *whole, "--resume", timed=False)
        dataset = ["--dataset", ROOT / "demo/data/test.jsonl", "--limit", "16"]
        samples = ["--samples", "2", "--k", "1", "2"]
        program = ROOT / "evaluate_model.py"
        evaluated = self.python(program, run, *dataset, *samples, timed=False)
        saved = sorted(file.name for file in run.iterdir())
        peaks = [line for line in trained.splitlines() if line.startswith("PEAK ")]
        return {
            "passed": "adapter_model.safetensors" in saved,
            "saved": saved,
            "check": [
                check["sentence"]
                for check in json.loads(checked)["checks"]
                if check["check"] in ("backend", "model", "memory")
            ],
            "peak": peaks[0] if peaks else "PEAK is not known",
            "resumed": [line for line in resumed.splitlines() if "step" in line][-6:],
            "evaluated": evaluated[-1500:],
        }

    def has(self, shape: str, gib: int) -> bool:
        """Whether the GPU has enough free memory for a step of this shape."""
        import torch

        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gib:
            print(f"skipped: a step of {shape} needs {gib} GiB, {free:.0f} are free")
        return free >= gib

    def step(self, shape: str, flags: list[str]) -> dict:
        """What benchmarks/step.py prints and saves."""
        model = ["--shape", shape, "--model", self.work / shape]
        return self.benchmark("step.py", *model, *STEP, *flags)

    def benchmark(self, program: str, *flags) -> dict:
        """What a program of this folder prints and saves."""
        file = Path(tempfile.mkdtemp(dir=self.work)) / "figures.json"
        printed = "\n" + self.python(ROOT / "benchmarks" / program, "--json", file, *flags)
        # Libraries print lines before it.
        start = "\n\n" if program == "heads.py" else f"\n{self.figures['machine']['device']}: "
        return {"printed": printed[printed.find(start) :], **json.loads(file.read_text())}

    def python(self, *arguments, timed: bool = True, may_fail: bool = False) -> str:
        """What a Python process printed.

        Raises RuntimeError with the end of its output if it fails or takes too long. A program that
        is `timed` waits for the GPU by itself.
        """
        command = [sys.executable, *map(str, arguments)]
        name, limit = " ".join(command[1:])[:300], self.options.limit
        folder = tempfile.mkdtemp(dir=self.work)  # Unsloth writes a cache into the current folder
        with contextlib.nullcontext() if timed else measure.using_the_gpu(alone=False):
            try:
                run = subprocess.run(
                    command, cwd=folder, capture_output=True, text=True, timeout=limit
                )
            except subprocess.TimeoutExpired as error:
                end = (error.stderr or b"").decode(errors="replace")[-2000:]
                raise RuntimeError(f"{name}: not done after {limit} s\n{end}") from None
        if run.returncode and not may_fail:
            end = f"{run.stdout[-1000:]}\n{run.stderr[-3000:]}"
            raise RuntimeError(f"{name}: exit code {run.returncode}\n{end}")
        return run.stdout


def printed_figures(output: str) -> dict:
    """The figures in what `--case` printed."""
    line = next(line for line in output.splitlines() if line.startswith("FIGURES "))
    return json.loads(line.removeprefix("FIGURES "))


def make_model(folder: Path) -> None:
    """Saves a Llama-shaped model with random weights.

    They are far enough from zero for logits that are not uniform.
    """
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/model")
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        initializer_range=0.06,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_case(case: str, bits: int, work: Path) -> dict:
    """The figures of one step on the fixed rollout and of three timed steps.

    Saves the gradients of the first step.
    """
    from gtpo.models import backends
    from gtpo.models.tokenizer import load_tokenizer
    from gtpo.recipe.sections import ModelSection

    section = ModelSection(
        model_name=str(work / "model"),
        backend="unsloth" if case == "unsloth" else "transformers",
        max_seq_length=256,
        lora_rank=RANK,
        load_in_4bit=bits == 4,
        fast_inference=False,
    )
    backend = backends.prepare_backend(section, {})
    tokenizer = load_tokenizer(section, backend)
    if case == "unsloth":
        import torch

        bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        policy = backends.load_policy(
            section,
            tokenizer,
            backend,
            seed=SEED,
            precision="bf16" if bf16 else "fp16",
            gradient_checkpointing=True,
        )
        save_base_weights(policy.model, work / f"base-{bits}")
    else:
        policy = reference_policy(
            work / f"base-{bits}", work / "model", tokenizer, bfloat16=case == "bfloat16"
        )
    fill_adapter(policy.model)
    gradients, figures = steps(policy, case, work)
    from safetensors.torch import save_file

    save_file(gradients, work / f"{case}-{bits}.safetensors")
    return figures


def save_base_weights(model, file: Path) -> None:
    """Saves the base weights that the policy computes with, with 4-bit weights dequantised."""
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


def reference_policy(weights: Path, model_folder: Path, tokenizer, *, bfloat16: bool):
    """A policy of transformers and peft with the base weights that the Unsloth case saved.

    It is in float32, or in bfloat16 with a float32 adapter.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    from gtpo.models.backends import Policy
    from gtpo.recipe.sections import ModelSection

    model = AutoModelForCausalLM.from_pretrained(
        model_folder, dtype=torch.bfloat16 if bfloat16 else torch.float32, device_map={"": 0}
    )
    model.load_state_dict(load_file(weights.with_suffix(".safetensors")))
    target_modules = ModelSection.model_fields["target_modules"].default
    model = get_peft_model(
        model,
        LoraConfig(r=RANK, lora_alpha=RANK, target_modules=target_modules, task_type="CAUSAL_LM"),
    )
    for parameter in model.parameters():
        parameter.data = parameter.data.float() if parameter.requires_grad else parameter.data
    return Policy(model, tokenizer, "transformers")


def fill_adapter(model) -> None:
    """Fills the LoRA weights with small random numbers, the same in every case.

    B is not zero, so both factors get gradients.
    """
    import torch

    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(values.to(parameter.device, parameter.dtype))


def steps(policy, case: str, work: Path) -> tuple[dict, dict]:
    """The LoRA gradients of a step on the fixed rollout, and the figures of three more steps.

    The three steps generate.
    """
    import torch
    import trl
    from transformers import TrainerCallback

    from gtpo.data import load_problems
    from gtpo.gtpo_training import UnslothGTPOTrainer
    from gtpo.recipe.sections import DatasetSection

    dataset = DatasetSection(
        name="gsm8k",
        path=str(ROOT / "demo/data/train.jsonl"),
        system_instruction="Reason, then answer.",
    )
    problems = load_problems(dataset, policy.tokenizer, 128, SEED)
    bf16 = case != "reference" and torch.cuda.is_bf16_supported(including_emulation=False)
    arguments = trl.GRPOConfig(
        output_dir=str(work / "run"),
        seed=SEED,
        max_steps=4,
        num_generations=GENERATIONS,
        per_device_train_batch_size=16,
        gradient_accumulation_steps=2,
        max_completion_length=LENGTH,
        loss_type="grpo",
        scale_rewards="none",
        beta=0.0,
        learning_rate=1e-6,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch",
        temperature=1.0,
        bf16=bf16,
        fp16=case == "unsloth" and not bf16,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=1,
        # Unsloth repacks a row at every pad id
        generation_kwargs={"suppress_tokens": [policy.tokenizer.pad_token_id]},
    )
    trainer = UnslothGTPOTrainer(
        model=policy.model,
        args=arguments,
        processing_class=policy.tokenizer,
        train_dataset=problems,
        reward_funcs=[pay_in_turn],
    )
    generate, gradients, times = trainer._generate_single_turn, {}, []

    def first_rollout_is_fixed(prompt_ids, *args, **kwargs):
        if gradients:
            return generate(prompt_ids, *args, **kwargs)
        generator = torch.Generator().manual_seed(SEED)

        def draw(count: int) -> list[int]:
            ids = torch.randint(100, len(policy.tokenizer) - 20, (count,), generator=generator)
            return ids.tolist()

        # Completions of unequal length share their beginning and end, so there are conflicts.
        beginning, end = draw(LENGTH)[:5], policy.tokenizer.eos_token_id
        return [[*beginning, *draw(8 + i % 16), end] for i in range(len(prompt_ids))], None

    trainer._generate_single_turn = first_rollout_is_fixed

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            for name, parameter in () if gradients else list(model.named_parameters()):
                if parameter.grad is not None:
                    gradients[name] = parameter.grad.float().cpu().contiguous()

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            times.append(time.perf_counter())

    trainer.add_callback(Record())
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    logs, parent = trainer.state.log_history[0], type(trainer).__mro__[1]
    return gradients, {
        "trainer": f"{parent.__module__}.{parent.__name__}",
        "initial_entropy": trainer.initial_entropy,
        "frac_conflict_tokens": logs["gtpo/frac_conflict_tokens"],
        "loss": logs["loss"],
        "seconds_per_step": (times[-1] - times[0]) / max(len(times) - 1, 1),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def pay_in_turn(completions, **kwargs) -> list[float]:
    """Rewards of 0, 1, 2, 0, 1, 2 and so on."""
    return [float(i % 3) for i in range(len(completions))]


def relative_error(actual: dict, expected: dict) -> float:
    """The norm of the difference between two sets of tensors, relative to that of `expected`."""
    import torch

    if actual.keys() != expected.keys():
        names = sorted(actual.keys() ^ expected.keys())[:4]
        raise SystemExit(f"the two models train different weights: {names}")
    actual, expected = (
        torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])
        for tensors in (actual, expected)
    )
    return ((actual - expected).norm() / expected.norm()).item()


def write(figures: dict, out: Path) -> None:
    """Writes the JSON file and the tables, named after date, GPU and commit."""
    machine, cases = figures["machine"], figures["cases"]
    name = f"{figures['date']}-{machine['device'].replace(' ', '-')}-{machine['commit'][:7]}"
    measure.save(out / f"{name}.json", figures)
    lines = [f"# {machine['device']}, {figures['date']}", ""]
    lines += [f"Printed by `make gpu-check` at commit {machine['commit']}.", ""]
    lines += [
        "| LoRA gradients, FastLanguageModel against float32 | error (bound) | passed | s/step"
        " (reference) | peak memory | conflict tokens |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {case} | {row['gradient_error']:.1e} ({row['bound']:.0e}) | {row['passed']} |"
        f" {row['seconds_per_step']:.2f} ({row['reference_seconds_per_step']:.2f}) |"
        f" {row['peak_memory_gib']:.2f} GiB | {row['frac_conflict_tokens']:.0%} |"
        for case, row in cases.items()
        if "gradient_error" in row
    ]
    for case, row in cases.items():
        if "printed" in row:
            lines += ["", f"## {case}", "", "```", row["printed"].strip("\n"), "```"]
        elif "evaluated" in row:
            lines += [
                "",
                f"## {case}: `config.yaml`, half a run, `--resume`, an evaluation",
                "",
                f"Passed: {row['passed']}. `--check` printed:",
                "",
                *(f"- {line}" for line in row["check"]),
                "",
                row["peak"].replace("PEAK", "Two steps used at most"),
                "",
                "```",
                *row["resumed"],
                row["evaluated"].strip(),
                "```",
            ]
        elif "error" in row:
            lines += ["", f"## {case}: failed", "", "```", row["error"].strip(), "```"]
    lines += ["", "## Versions", "", *(f"- {key} {value}" for key, value in machine.items())]
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
