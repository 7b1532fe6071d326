"""Tokens per second and memory of Llama-3.1-8B on 1, 8 and 64 GPUs, on paper: `python
benchmarks/paper_estimate.py`.

Nothing is measured here. docs/scaling.md explains each line; change the assumptions at the top to
those of your machines.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gtpo.runs.memory import DeviceLoad, ModelSize, optimizer_bytes, peak_memory  # noqa: E402

# ---- assumptions: an H100 of 80 GB, eight in a node
# bf16, dense; the share that training reaches: 0.22 in the Unsloth step of docs/performance.md
FLOPS, USED = 989e12, 0.2
BANDWIDTH, READ = 3.35e12, 0.7  # bytes per second of its memory; the share that decoding reaches
# bytes per second and GPU, within a node and between nodes (400 Gbit/s)
NVLINK, NETWORK = 300e9, 50e9
# of the time, that is no waiting for the process with the longest completions
WAITING = {1: 1.0, 8: 0.9, 64: 0.8}
SYNC = 1.0  # seconds: the adapter merged and handed to vLLM, rewards

# ---- the run: 8 prompts x 8 generations per GPU and step, micro-batches of 8
PROMPT, COMPLETION, LONGEST, ROWS, MICRO = 250, 1000, 1500, 64, 8  # tokens; completions
SIZE = ModelSize(
    parameters=8_030_261_248,
    quantizable=6_979_321_856,
    adapter=335_544_320,
    layers=32,
    hidden=4096,
    intermediate=14_336,
    kv=1024,
    heads=32,
    vocabulary=128_256,
)  # with rank 128
CACHE, GIB = 2 * 2 * SIZE.kv * SIZE.layers, 2**30  # bytes of keys and values per token


def step_seconds() -> tuple[float, float]:
    """Sampling and training of one GPU's rows, with nobody to wait for."""
    # a token of each row
    decode = (2 * SIZE.parameters + ROWS * (PROMPT + COMPLETION / 2) * CACHE) / (BANDWIDTH * READ)
    # per token: forward, again for the checkpoints, and back to the adapters (no gradients of
    # frozen weights)
    flops = 6 * SIZE.parameters
    return COMPLETION * decode, ROWS * (PROMPT + COMPLETION) * flops / (FLOPS * USED)


def reduce_seconds(gpus: int) -> float:
    """The adapter's float32 gradients summed over all GPUs, once per step, by a ring over the
    slowest of its links.
    """
    return 2 * 4 * SIZE.adapter * (gpus - 1) / gpus / (NVLINK if gpus <= 8 else NETWORK)


def gather_seconds(gpus: int) -> float:
    """FSDP: the weights gathered for forward, checkpoints and backward of each micro-batch."""
    return (
        ROWS
        / MICRO
        * 3
        * 2
        * SIZE.parameters
        * (gpus - 1)
        / gpus
        / (NVLINK if gpus <= 8 else NETWORK)
    )


def memory(gpus: int, spread: bool) -> float:
    """GiB per GPU: gtpo/runs/memory.py's worst case of training with paged_adamw_8bit's moments, and
    vLLM beside it.

    vLLM's cache holds all rows; with Unsloth it samples from the weights that train, and beside
    FSDP it has its own. Logits are streamed, by Unsloth or by gtpo/hooks/streaming_head.py, but not with
    FSDP: there TRL keeps those of a micro-batch.
    """
    load = DeviceLoad(
        completions=MICRO,
        rollout=MICRO,
        prompt_tokens=PROMPT,
        completion_tokens=LONGEST,
        optimizer_bytes=optimizer_bytes("adamw_8bit"),
        unsloth=not spread,
        sharded=spread,
    )
    parts = peak_memory(SIZE, load)
    shared = parts["weights"] + parts["adapter and optimizer"]
    rest = sum(parts.values()) - shared
    layer = 2 * SIZE.quantizable / SIZE.layers
    vllm = ROWS * (PROMPT + LONGEST) * CACHE + (2 * SIZE.parameters if spread else 0)
    return (rest + vllm + (shared / gpus + 2 * layer if spread and gpus > 1 else shared)) / GIB


def main() -> None:
    sampling, training = step_seconds()
    print(
        f"one GPU, {ROWS} completions of {COMPLETION} tokens: sampling {sampling:.1f} s, training"
        f" {training:.1f} s, the rest {SYNC:.1f} s"
    )
    for gpus, busy in WAITING.items():
        once = sampling + training + SYNC
        ddp, fsdp = (
            (once + extra) / busy for extra in (reduce_seconds(gpus), gather_seconds(gpus))
        )
        tokens = gpus * ROWS * COMPLETION
        print(
            f"{gpus:2} GPUs, DDP:  {tokens / ddp:8,.0f} tokens/s, {ddp:4.1f} s a step, all-reduce"
            f" {1000 * reduce_seconds(gpus):2.0f} ms, {memory(gpus, False):.0f} GiB each"
        )
        if gpus > 1:
            print(
                f"{gpus:2} GPUs, FSDP: {tokens / fsdp:8,.0f} tokens/s, {fsdp:4.1f} s a step,"
                f" gathering {gather_seconds(gpus):3.1f} s, {memory(gpus, True):.0f} GiB each"
            )


if __name__ == "__main__":
    main()
