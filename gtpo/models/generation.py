"""Completions of prompts, drawn with transformers, Unsloth or vLLM behind one signature.

Each completion has a seed of its own. So it does not depend on the other prompts of its batch, and
the random generators of a training are not touched.
"""

import contextlib
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gtpo.errors import RecipeError
from gtpo.hooks.turn_ends import is_truncated, turn_ends, up_to_end
from gtpo.recipe.sections import ModelSection
from gtpo.system import processes

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # that vllm 0.31.0 allows


class Sampling(NamedTuple):
    """How completions are drawn."""

    temperature: float  # 0 is greedy
    top_p: float
    seed: int
    max_completion_length: int  # tokens


class SampledCompletion(NamedTuple):
    """A completion as a reward function gets it: decoded, without special tokens."""

    text: str
    tokens: int  # with the end of the turn
    truncated: bool  # the turn does not end


Sampler = Callable[[list[str], list[int]], list[SampledCompletion]]
"""A function from prompts (after the chat template) and their seeds to completions."""


def completion_seed(seed: int, problem: int, sample: int) -> int:
    """The seed of one completion, from 0 to 2^63 - 1.

    No two completions of an evaluation have the same, nor do those of evaluations with two seeds.
    """
    digest = hashlib.blake2b(f"{seed} {problem} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def decoded_completion(ids: list[int], tokenizer) -> SampledCompletion:
    """The completion in `ids`, up to the first end of a turn. What follows is padding."""
    ends = turn_ends(tokenizer)
    ids = up_to_end(ids, ends)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    return SampledCompletion(text, len(ids), is_truncated(ids, ends))


# ---- transformers and Unsloth


def policy_sampler(policy, sampling: Sampling, *, adapter: bool = True) -> Sampler:
    """A sampler that draws from `policy.model`; `adapter=False` switches its LoRA weights off."""
    import torch

    tokenizer = policy.tokenizer

    @torch.no_grad()
    def sample(prompts: list[str], seeds: list[int]) -> list[SampledCompletion]:
        inputs = tokenizer(
            prompts,
            return_tensors="pt",
            padding=True,
            padding_side="left",
            add_special_tokens=False,
        )
        names = inputs.keys() & {"input_ids", "attention_mask"}
        switch = contextlib.nullcontext() if adapter else policy.model.disable_adapter()
        with switch, policy.generating() as model:
            ids = model.generate(
                **{name: inputs[name].to(model.device) for name in names},
                **generate_options(tokenizer, sampling, seeds, model.device),
            )
        drawn = ids[:, inputs["input_ids"].shape[1] :].tolist()
        return [decoded_completion(row, tokenizer) for row in drawn]

    return sample


def generate_options(tokenizer, sampling: Sampling, seeds: list[int], device) -> dict[str, Any]:
    """The arguments with which transformers' `generate` draws one completion per seed."""
    from transformers import (
        GenerationConfig,
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopPLogitsWarper,
    )

    # Everything is stated that a model's own generation_config could set. Training ignores it too.
    config = GenerationConfig(
        max_new_tokens=sampling.max_completion_length,
        do_sample=False,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_length=0,
        use_cache=True,
        disable_compile=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=list(turn_ends(tokenizer)),
    )
    processors = LogitsProcessorList()
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(_GumbelNoise(seeds, device))
    return {"generation_config": config, "logits_processor": processors}


class _GumbelNoise:
    """A logits processor that makes the most likely token a draw from the softmax.

    The argmax of logits plus Gumbel noise is distributed as the softmax of the logits. Each row has
    a random generator of its own.
    """

    def __init__(self, seeds: list[int], device):
        import torch

        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids, scores):
        noise = scores.new_empty(scores.shape)  # (B, V)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


# ---- vLLM


def vllm_samplers(
    base: str,
    tokenizer,
    sampling: Sampling,
    *,
    max_length: int,
    adapter: Path | None = None,
    rank: int | None = None,
    load_in_4bit: bool = False,
    trust_remote_code: bool = False,
) -> Callable[[bool], Sampler]:
    """Load the model `base` into vLLM (0.31.0); returns a function that returns samplers.

    Its argument says whether the adapter, of the given LoRA rank, is used. `max_length` is that of
    prompt and completion together, in tokens.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    lora_options = {}
    if adapter:
        lora_options["max_lora_rank"] = next(size for size in VLLM_RANKS if size >= rank)
    llm = LLM(
        model=base,
        max_model_len=max_length,
        seed=0,
        trust_remote_code=trust_remote_code,
        quantization="bitsandbytes" if load_in_4bit else None,
        enable_lora=adapter is not None,
        **lora_options,
    )
    lora = LoRARequest("adapter", 1, str(adapter)) if adapter else None

    def parameters(seed: int) -> SamplingParams:
        # The same ids end a completion as in training. A model's configuration may name others.
        return SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            max_tokens=sampling.max_completion_length,
            seed=seed,
            ignore_eos=True,
            stop_token_ids=list(turn_ends(tokenizer)),
            detokenize=False,
        )

    def sampler(use_adapter: bool) -> Sampler:
        def sample(prompts: list[str], seeds: list[int]) -> list[SampledCompletion]:
            ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
            outputs = llm.generate(
                [{"prompt_token_ids": row} for row in ids],
                [parameters(seed) for seed in seeds],
                use_tqdm=False,
                lora_request=lora if use_adapter else None,
            )
            drawn = [list(output.outputs[0].token_ids) for output in outputs]
            return [decoded_completion(row, tokenizer) for row in drawn]

        return sample

    return sampler


def unsloth_uses_vllm(section: ModelSection) -> bool:
    """Whether Unsloth samples with vLLM while it trains.

    Raises RecipeError if `model.fast_inference: true` asks for that and it is not possible.
    """
    wanted, installed = section.fast_inference, importlib.util.find_spec("vllm") is not None
    if wanted is True and not installed:
        raise RecipeError(
            "model.fast_inference",
            "true needs vLLM, which is not installed; use auto, or: pip install vllm==0.31.0",
        )
    # With several processes, each would train as a group of one process: a run of its own.
    if wanted is True and processes.count() > 1:
        raise RecipeError(
            "model.fast_inference",
            f"true is for one process, and there are {processes.count()}; use auto or false, or a "
            "vLLM server (docs/scaling.md)",
        )
    return wanted is not False and installed and processes.count() == 1
