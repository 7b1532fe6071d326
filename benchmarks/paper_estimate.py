"""Estimates the speed and memory of Llama-3.1-8B on 1, 8 and 64 GPUs.

Run `python benchmarks/paper_estimate.py`. It measures nothing. docs/scaling.md explains each line.
Change the assumptions at the top to fit your machines.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from gtpo.runs.memory import DeviceLoad, ModelSize, optimizer_bytes, peak_memory

# ---- assumptions: H100s of 80 GB, eight in a node

FLOPS = 989e12  # per second, dense, in bfloat16
USED = 0.2  # the share of FLOPS in training: 0.22 in the Unsloth step of docs/performance.md
BANDWIDTH = 3.35e12  # bytes per second of the GPU's memory
READ = 0.7  # the share of BANDWIDTH in decoding
NVLINK = 300e9  # bytes per second and GPU within a node
NETWORK = 50e9  # bytes per second and GPU between nodes (400 Gbit/s)
BUSY = {1: 1.0, 8: 0.9, 64: 0.8}  # the rest is waiting for the process with longest completions
SYNC = 1.0  # seconds for rewards, and for merging the adapter and sending it to vLLM

# ---- the run

PROMPT, COMPLETION, LONGEST = 250, 1000, 1500  # tokens
ROWS = 64  # completions per GPU and step: 8 prompts x 8 generations
MICRO = 8  # completions per micro-batch
SIZE = ModelSize(  # the adapter has rank 128
    parameters=8_030_261_248,
    quantizable=6_979_321_856,
    adapter=335_544_320,
    layers=32,
    hidden=4096,
    intermediate=14_336,
    kv=1024,
    heads=32,
    vocabulary=128_256,
)
CACHE = 2 * 2 * SIZE.kv * SIZE.layers  # bytes of keys and values per token
GIB = 2**30


def step_seconds() -> tuple[float, float]:
    """Seconds for sampling and for training the rows of one GPU, without waiting for others."""
    # seconds to decode one token of each row
    decode = (2 * SIZE.parameters + ROWS * (PROMPT + COMPLETION / 2) * CACHE) / (BANDWIDTH * READ)
    # Per token: forward, forward again for gradient checkpointing, and backward to the adapters.
    # Frozen weights need no gradients.
    flops = 6 * SIZE.parameters
    return COMPLETION * decode, ROWS * (PROMPT + COMPLETION) * flops / (FLOPS * USED)


def reduce_seconds(gpus: int) -> float:
    """Seconds for summing the adapter's float32 gradients over all GPUs, once per step.

    A ring does it, at the speed of its slowest link.
    """
    return 2 * 4 * SIZE.adapter * (gpus - 1) / gpus / slowest_link(gpus)


def gather_seconds(gpus: int) -> float:
    """Seconds for gathering the weights with FSDP.

    Each micro-batch gathers them for forward, for gradient checkpointing and for backward.
    """
    times, size = 3 * ROWS / MICRO, 2 * SIZE.parameters
    return times * size * (gpus - 1) / gpus / slowest_link(gpus)


def slowest_link(gpus: int) -> float:
    """Bytes per second between GPUs."""
    return NVLINK if gpus <= 8 else NETWORK


def memory(gpus: int, spread: bool) -> float:
    """GiB per GPU: the worst case of training by gtpo/runs/memory.py, and vLLM beside it.

    The optimizer is paged_adamw_8bit, and vLLM's cache holds all rows. With Unsloth, vLLM samples
    from the weights that train. With FSDP (`spread`), it has weights of its own. Logits are
    streamed, by Unsloth or by gtpo/hooks/streaming_head.py. With FSDP they are not, and TRL keeps
    those of a micro-batch.
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
    if spread and gpus > 1:
        shared = shared / gpus + 2 * layer  # a layer's weights are gathered, and the next layer's
    return (rest + vllm + shared) / GIB


def main() -> None:
    """Runs the command line."""
    sampling, training = step_seconds()
    print(
        f"one GPU, {ROWS} completions of {COMPLETION} tokens: sampling {sampling:.1f} s, training"
        f" {training:.1f} s, the rest {SYNC:.1f} s"
    )
    for gpus, busy in BUSY.items():
        once, tokens = sampling + training + SYNC, gpus * ROWS * COMPLETION
        reduce, gather = reduce_seconds(gpus), gather_seconds(gpus)
        ddp, fsdp = (once + reduce) / busy, (once + gather) / busy
        print(
            f"{gpus:2} GPUs, DDP:  {tokens / ddp:8,.0f} tokens/s, {ddp:4.1f} s a step, all-reduce"
            f" {1000 * reduce:2.0f} ms, {memory(gpus, False):.0f} GiB each"
        )
        if gpus > 1:
            print(
                f"{gpus:2} GPUs, FSDP: {tokens / fsdp:8,.0f} tokens/s, {fsdp:4.1f} s a step,"
                f" gathering {gather:3.1f} s, {memory(gpus, True):.0f} GiB each"
            )


if __name__ == "__main__":
    main()
