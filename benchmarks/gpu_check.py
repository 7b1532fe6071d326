"""What only a GPU can show: `make gpu-check`, or `python benchmarks/gpu_check.py`. Needs no network
and nothing but this repository.

- gradients: for 16 and 4 bits, a randomly initialised Llama-shaped model goes through Unsloth's
FastLanguageModel with LoRA
  and takes one GTPO step on a fixed rollout. The gradients of its LoRA weights are held against
  transformers in float32 on
  the same base weights (for 4 bits: the dequantised ones), and may be off by what bfloat16 costs
  transformers itself, and a
  quarter of that. Then three steps with real generation are timed.
- train: `train_model.py config.yaml`, the documented recipe, on such a model and the demo's data;
stopped half-way, resumed,
  evaluated; the GPU memory it took beside the estimate of `--check`.
- step, heads: benchmarks/step.py and benchmarks/heads.py with the shapes of real models.

Each case runs in a process of its own, because Unsloth replaces TRL's trainers. One that fails is
written down and does not stop the others. Writes JSON and a table to docs/gpu/. Without a GPU it
says so and exits 0.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
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
ALLOWED = 1.25  # relative error of the LoRA gradients, in errors of transformers in bfloat16
SEED, RANK, GENERATIONS, LENGTH = 3407, 16, 8, 48
STEPS = [  # shape, GiB it needs, and the flags of benchmarks/step.py
    (shape, gib, ["--backend", backend, *flags])
    for shape, gib in (("qwen2.5-3b", 40), ("llama-3.1-8b", 50))
    for backend, flags in (("unsloth", []), ("transformers", []), ("unsloth", ["--bits", "4"]))
]
PEAK = """
import atexit, runpy, sys
def say():
    torch = sys.modules.get("torch")
    if torch and torch.cuda.is_initialized():
        print(f"PEAK {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB allocated, {torch.cuda.max_memory_reserved() / 2**30:.2f} GiB reserved")
atexit.register(say)
sys.argv = sys.argv[1:]
sys.path.insert(0, str(__import__("pathlib").Path(sys.argv[0]).parent))
runpy.run_path(sys.argv[0], run_name="__main__")
"""  # runs a program, and says the most GPU memory that it held
STEP = ["--generations", "8", "--prompt", "256", "--completion", "1024", "--rounds", "9"]


def main() -> int:
    parser = argparse.ArgumentParser(description="Check GTPO on this machine's GPU.")
    parser.add_argument(
        "--out", type=Path, default=ROOT / "docs/gpu", help="folder for the JSON file and the table"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=["gradients", "train", "step", "heads"],
        help="some of the parts",
    )
    parser.add_argument(
        "--shapes",
        nargs="+",
        choices=measure.SHAPES,
        default=["qwen2.5-3b", "llama-3.1-8b"],
        help="for step",
    )
    parser.add_argument(
        "--side-by-side",
        type=int,
        default=1,
        metavar="N",
        help=(
            "cases at a time, on a GPU with 100 GiB and many cores; what is timed is alone on the"
            " GPU, not on the CPU"
        ),
    )
    parser.add_argument(
        "--limit", type=int, default=900, help="seconds after which a case is given up"
    )
    parser.add_argument("--commit", help="to write down where the copy has no repository")
    parser.add_argument(
        "--case", choices=["unsloth", "reference", "bfloat16"], help=argparse.SUPPRESS
    )
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
    """The cases, and what they found so far; it is written down after each, so that nothing is
    lost.
    """

    def __init__(self, options: argparse.Namespace):
        self.options, self.only = options, options.only or ["gradients", "train", "step", "heads"]
        machine = measure.machine()
        if options.commit:
            machine["commit"] = options.commit
        self.figures = {"date": datetime.date.today().isoformat(), "machine": machine, "cases": {}}
        self.lock = threading.Lock()

    def run(self) -> int:
        import torch

        with tempfile.TemporaryDirectory() as folder:
            self.work = Path(folder)
            make_model(self.work / "model")
            os.environ["GTPO_GPU_LOCK"] = str(self.work / "lock")
            cases = {
                "train": self.train,
                **{
                    f"gradients, {bits} bits": lambda bits=bits: self.gradients(bits)
                    for bits in (16, 4)
                },
                "heads": lambda: self.benchmark("heads.py"),
            }
            cases = {name: case for name, case in cases.items() if name.split(",")[0] in self.only}
            for shape, gib, flags in STEPS:
                if "step" in self.only and shape in self.options.shapes and self.has(shape, gib):
                    cases[f"step {shape} {' '.join(flags)}"] = lambda shape=shape, flags=flags: (
                        self.step(shape, flags)
                    )
                    if not (self.work / shape).exists():
                        measure.make_model(shape, self.work / shape)
            torch.cuda.empty_cache()
            with concurrent.futures.ThreadPoolExecutor(self.options.side_by_side) as pool:
                for name, case in cases.items():
                    pool.submit(self.keep, name, case)
        failed = [
            name for name, case in self.figures["cases"].items() if not case.get("passed", True)
        ]
        print(f"failed: {', '.join(failed)}" if failed else "all passed")
        return 1 if failed else 0

    def keep(self, name: str, case) -> None:
        began = time.monotonic()
        try:
            found = case()
        except Exception as error:  # a case that fails is a finding
            found = {"passed": False, "error": str(error)[-4000:]}
        with self.lock:
            print(
                f"== {name}: {time.monotonic() - began:.0f} s\n{found.get('error', '')}", flush=True
            )
            self.figures["cases"][name] = found
            write(self.figures, self.options.out)

    def gradients(self, bits: int) -> dict:
        from safetensors.torch import load_file

        cases = ("unsloth", "reference", "bfloat16")
        found, reference, _ = (
            _figures(
                self.python(
                    Path(__file__), "--case", case, "--bits", bits, "--work", self.work, timed=False
                )
            )
            for case in cases
        )
        ours, exact, rounded = (
            load_file(self.work / f"{case}-{bits}.safetensors") for case in cases
        )
        error, bound = relative_error(ours, exact), ALLOWED * relative_error(rounded, exact)
        return {
            "gradient_error": error,
            "bound": bound,
            "passed": error <= bound,
            **found,
            "reference_seconds_per_step": reference["seconds_per_step"],
        }

    def train(self) -> dict:
        """The documented recipe on the small model: half a run, the rest after --resume, and an
        evaluation.
        """
        flags = [
            "--model-name",
            self.work / "model",
            "--dataset.name",
            "gsm8k",
            "--dataset.subsets",
            "null",
            "--dataset.path",
            ROOT / "demo/data/train.jsonl",
            "--dataset.system_instruction",
            "Reason, then answer.",
            "--model.max_seq_length",
            "256",
            "--model.max_prompt_length",
            "128",
            "--training.max_prompt_length",
            "128",
            "--training.save_steps",
            "2",
            "--training.report_to",
            "none",
            "--output_root",
            self.work / "runs",
            "--run-name",
            "check",
        ]
        recipe = [ROOT / "train_model.py", ROOT / "config.yaml", *flags]
        checked = self.python(
            *recipe, "--training.max_steps", "4", "--check", "--json", timed=False, may_fail=True
        )
        trained = self.python("-c", PEAK, *recipe, "--training.max_steps", "2", timed=False)
        run = next((self.work / "runs").iterdir())
        resumed = self.python(*recipe, "--training.max_steps", "4", "--resume", timed=False)
        evaluated = self.python(
            ROOT / "evaluate_model.py",
            run,
            "--dataset",
            ROOT / "demo/data/test.jsonl",
            "--limit",
            "16",
            "--samples",
            "2",
            "--k",
            "1",
            "2",
            timed=False,
        )
        saved = sorted(file.name for file in run.iterdir())
        return {
            "passed": "adapter_model.safetensors" in saved,
            "saved": saved,
            "check": [
                check["sentence"]
                for check in json.loads(checked)["checks"]
                if check["check"] in ("backend", "model", "memory")
            ],
            "peak": next(
                (line for line in trained.splitlines() if line.startswith("PEAK ")),
                "PEAK is not known",
            ),
            "resumed": [line for line in resumed.splitlines() if "step" in line][-6:],
            "evaluated": evaluated[-1500:],
        }

    def has(self, shape: str, gib: int) -> bool:
        import torch

        free = torch.cuda.mem_get_info()[0] / 2**30
        if free < gib:
            print(f"skipped: a step of {shape} needs {gib} GiB, {free:.0f} are free")
        return free >= gib

    def step(self, shape: str, flags: list[str]) -> dict:
        return self.benchmark(
            "step.py", "--shape", shape, "--model", self.work / shape, *STEP, *flags
        )

    def benchmark(self, program: str, *flags) -> dict:
        file = Path(tempfile.mkdtemp(dir=self.work)) / "figures.json"
        printed = "\n" + self.python(ROOT / "benchmarks" / program, "--json", file, *flags)
        # after what libraries print
        start = "\n\n" if program == "heads.py" else f"\n{self.figures['machine']['device']}: "
        return {"printed": printed[printed.find(start) :], **json.loads(file.read_text())}

    def python(self, *arguments, timed: bool = True, may_fail: bool = False) -> str:
        """What a Python process printed; RuntimeError with the end of it where it failed or took
        too long.
        """
        command = [sys.executable, *map(str, arguments)]
        folder = tempfile.mkdtemp(dir=self.work)  # Unsloth writes a cache where it runs
        # what is timed asks for itself
        with contextlib.nullcontext() if timed else measure.using_the_gpu(alone=False):
            try:
                run = subprocess.run(
                    command, cwd=folder, capture_output=True, text=True, timeout=self.options.limit
                )
            except subprocess.TimeoutExpired as error:
                end = (error.stderr or b"").decode(errors="replace")[-2000:]
                raise RuntimeError(
                    f"{' '.join(command[1:])[:300]}: not done after {self.options.limit} s\n{end}"
                ) from None
        if run.returncode and not may_fail:
            raise RuntimeError(
                f"{' '.join(command[1:])[:300]}: exit code"
                f" {run.returncode}\n{run.stdout[-1000:]}\n{run.stderr[-3000:]}"
            )
        return run.stdout


def _figures(printed: str) -> dict:
    return json.loads(
        next(line for line in printed.splitlines() if line.startswith("FIGURES ")).removeprefix(
            "FIGURES "
        )
    )


def make_model(folder: Path) -> None:
    """A Llama-shaped model with random weights, far enough from zero that its logits are not
    uniform.
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
    """Train one step on the fixed rollout, save the gradients, then time three steps; returns the
    figures.
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


def reference_policy(weights: Path, model_folder: Path, tokenizer, *, bfloat16: bool):
    """transformers + peft in float32, or in bfloat16 with a float32 adapter, on the base weights
    that the Unsloth case saved.
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
    """The same small random LoRA weights in every case, B included, so that both factors get
    gradients.
    """
    import torch

    generator = torch.Generator().manual_seed(SEED)
    for name, parameter in sorted(model.named_parameters()):
        if "lora_" in name:
            values = torch.randn(parameter.shape, generator=generator) * 0.02
            parameter.data.copy_(values.to(parameter.device, parameter.dtype))


def steps(policy, case: str, work: Path) -> tuple[dict, dict]:
    """The LoRA gradients of one step on the fixed rollout, and the figures of three steps with real
    generation.
    """
    import time

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
        reward_funcs=[
            lambda completions, **kwargs: [float(i % 3) for i in range(len(completions))]
        ],
    )
    generate, gradients, marks = trainer._generate_single_turn, {}, []

    def first_fixed(prompt_ids, *args, **kwargs):
        if gradients:
            return generate(prompt_ids, *args, **kwargs)
        generator = torch.Generator().manual_seed(SEED)
        stem = torch.randint(
            100, len(policy.tokenizer) - 20, (LENGTH,), generator=generator
        ).tolist()
        rows = []
        # a shared beginning and end, of unequal length, so that there are conflicts
        for i in range(len(prompt_ids)):
            own = torch.randint(
                100, len(policy.tokenizer) - 20, (8 + i % 16,), generator=generator
            ).tolist()
            rows.append([*stem[:5], *own, policy.tokenizer.eos_token_id])
        return rows, None

    trainer._generate_single_turn = first_fixed

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            if not gradients:
                gradients.update(
                    {
                        n: p.grad.float().cpu().contiguous()
                        for n, p in model.named_parameters()
                        if p.grad is not None
                    }
                )

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            marks.append(time.perf_counter())

    trainer.add_callback(Watch())
    torch.cuda.reset_peak_memory_stats()
    trainer.train()
    logs = trainer.state.log_history[0]
    return gradients, {
        "trainer": f"{type(trainer).__mro__[1].__module__}.{type(trainer).__mro__[1].__name__}",
        "initial_entropy": trainer.initial_entropy,
        "frac_conflict_tokens": logs["gtpo/frac_conflict_tokens"],
        "loss": logs["loss"],
        "seconds_per_step": (marks[-1] - marks[0]) / max(len(marks) - 1, 1),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def relative_error(found: dict, expected: dict) -> float:
    import torch

    if found.keys() != expected.keys():
        raise SystemExit(
            f"the two paths train other weights: {sorted(found.keys() ^ expected.keys())[:4]}"
        )
    found, expected = (
        torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])
        for tensors in (found, expected)
    )
    return ((found - expected).norm() / expected.norm()).item()


def write(figures: dict, out: Path) -> None:
    """JSON and tables, named after date, GPU and commit."""
    machine, cases = figures["machine"], figures["cases"]
    name = f"{figures['date']}-{machine['device'].replace(' ', '-')}-{machine['commit'][:7]}"
    measure.save(figures, out / f"{name}.json")
    lines = [
        f"# {machine['device']}, {figures['date']}",
        "",
        f"Printed by `make gpu-check` at commit {machine['commit']}.",
        "",
        (
            "| LoRA gradients, FastLanguageModel against float32 | error (bound) | passed | s/step"
            " (reference) | peak memory | conflict tokens |"
        ),
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
                f"Passed: {row['passed']}. `--check` had said:",
                "",
                *(f"- {line}" for line in row["check"]),
                "",
                row["peak"].replace("PEAK", "Two steps held at most"),
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
