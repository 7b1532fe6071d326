"""Times ways to compute log-probs and entropies from hidden states: `python benchmarks/heads.py`.

Each head gets the same hidden states, output matrix and tokens. It returns log-probs and entropies,
and the gradient of the hidden states. No head can be faster than its two matrix products: hidden
states times matrix in the forward pass, gradient times matrix in the backward pass. Unsloth's heads
are timed where Unsloth is installed: with entropies, and without, as its GRPO runs it.
"""

import argparse
import importlib.util
import os
import statistics
import sys
from pathlib import Path

import measure

CASES = {  # name: hidden size, vocabulary
    "small, V = 32 k": (1024, 32_000),
    "Llama-3.1-8B, V = 128 k": (4096, 128_256),
    "Qwen2.5-3B, V = 152 k": (2048, 151_936),
}
BOUND = "two matrix products"


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description="Time ways to compute log-probs and entropies.")
    parser.add_argument(
        "--tokens",
        type=int,
        help="completion tokens of a micro-batch of 8 rows (default: 4096 on a GPU, 128 on a CPU)",
    )
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not importlib.util.find_spec("unsloth"):
        print("Unsloth is not installed, so its heads are not timed")
    elif not _cuda():
        os.environ.update(UNSLOTH_ALLOW_CPU="1", UNSLOTH_COMPILE_DISABLE="1")
    tokens, cases = options.tokens or (4096 if _cuda() else 128), []
    for name in options.cases:
        cases.append({"name": name, **compare(*CASES[name], tokens, options.rounds)})
        print_table(cases[-1])
        measure.save(options.json, {"cases": cases})
    return 0


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def compare(hidden_size: int, vocabulary: int, tokens: int, rounds: int) -> dict:
    """Seconds, peak memory and gradient error of each head, on 8 rows of `tokens` / 8 tokens."""
    import torch

    if not _cuda():
        # With two threads, the CPU-seconds would include their waiting for each other.
        torch.set_num_threads(1)
    device, dtype = ("cuda", torch.bfloat16) if _cuda() else ("cpu", torch.float32)
    torch.manual_seed(0)
    hidden = torch.randn(
        8, tokens // 8, hidden_size, device=device, dtype=dtype, requires_grad=True
    )
    weight = (torch.randn(vocabulary, hidden_size, device=device) / hidden_size**0.5 * 2).to(dtype)
    ids = torch.randint(0, vocabulary, (8, tokens // 8), device=device)
    gradient = torch.randn(8, tokens // 8, device=device)

    def run(head):
        def step():
            hidden.grad = None
            log_probs, _ = head(hidden, weight, ids)
            (log_probs * gradient).sum().backward()

        return step

    runs = {BOUND: lambda: products(hidden, weight)}
    runs |= {name: run(head) for name, head in heads().items()}
    errors = {}
    with measure.using_the_gpu(alone=False):
        exact = float64(hidden, weight, ids, gradient)
        for name, function in runs.items():
            function()  # compiles
            function()
            if name != BOUND:
                errors[name] = ((hidden.grad[:, :8].double() - exact).norm() / exact.norm()).item()
    hidden.grad = None
    with measure.using_the_gpu(alone=True):
        peaks = {name: measure.peak_bytes(function) for name, function in runs.items()}
        taken = measure.interleaved(runs, rounds)
    return {
        "hidden": hidden_size,
        "vocabulary": vocabulary,
        "tokens": tokens,
        "seconds": taken,
        "peak_bytes": peaks,
        "median": {name: statistics.median(values) for name, values in taken.items()},
        "ratio": {name: measure.ratio(taken[name], taken[BOUND]) for name in taken},
        "gradient_error": errors,
    }


def heads() -> dict:
    """The heads by name: functions of hidden states, output matrix and ids."""
    unsloths = {}
    if importlib.util.find_spec("unsloth"):
        import unsloth  # noqa: F401 (first, because it patches the others)
        from unsloth_zoo import rl_replacements as zoo

        os.environ.pop("UNSLOTH_ALLOW_CPU", None)
        chunks = 32  # Unsloth's loss makes four for each of the eight rows

        def without_entropies(hidden, weight, ids):
            head = zoo.chunked_hidden_states_selective_log_softmax
            return head(hidden, weight, ids, chunks), None

        def with_entropies(hidden, weight, ids):
            head = zoo.chunked_hidden_states_selective_log_softmax_recompute
            return head(hidden, weight, ids, chunks, return_entropy=True)

        unsloths = {"Unsloth, without entropies": without_entropies, "Unsloth": with_entropies}
    import torch
    from trl.trainer import utils

    from gtpo.hooks.streaming_head import log_probs_and_entropies

    def whole_logits(hidden, weight, ids):
        # accelerate converts a model's outputs to float32.
        logits = torch.nn.functional.linear(hidden, weight).float()
        logits = logits / 1.0
        log_probs = utils.selective_log_softmax(logits, ids)
        with torch.no_grad():
            return log_probs, utils.entropy_from_logits(logits)

    return {"TRL": whole_logits, **unsloths, "streaming (ours)": log_probs_and_entropies}


def products(hidden, weight, rows: int = 512) -> None:
    """Computes the two products, with the logits in place of their gradient."""
    import torch

    with torch.no_grad():
        for part in hidden.view(-1, hidden.shape[-1]).split(rows):
            torch.mm(torch.nn.functional.linear(part, weight), weight)


def float64(hidden, weight, ids, gradient):
    """The gradient of each row's first eight hidden states, in double precision."""
    import torch

    some = hidden.detach()[:, :8].double().requires_grad_()
    with torch.device(hidden.device):
        log_p = (some @ weight.double().T).log_softmax(-1)
    (log_p.gather(-1, ids[:, :8, None]).squeeze(-1) * gradient[:, :8]).sum().backward()
    return some.grad


def print_table(case: dict) -> None:
    """Prints one row per head."""
    sizes = f"{case['tokens']} tokens, hidden size {case['hidden']}"
    print(f"\n{case['name']}: {sizes}, vocabulary {case['vocabulary']}")
    print(f"{'':<28}{'ms':>9}{'of the bound':>14}{'peak MiB':>10}{'gradient error':>16}")
    for name, median in case["median"].items():
        error = case["gradient_error"].get(name)
        error = "" if error is None else f"{error:.1e}"
        peak = case["peak_bytes"][name] / 2**20
        print(f"{name:<28}{median * 1e3:>9.1f}{case['ratio'][name]:>14.2f}{peak:>10.0f}{error:>16}")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
