"""Completions of prompts, by transformers, Unsloth or vLLM: one call, whichever it is.

Every completion has a seed of its own, so what is drawn does not depend on what else is in its
batch, and the random generators of a training are left alone.
"""

import contextlib
import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gtpo.errors import RecipeError
from gtpo.recipe.sections import ModelSection
from gtpo.system import processes

VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vllm 0.31.0 takes for max_lora_rank


class Sampling(NamedTuple):
    """How completions are drawn; temperature 0 is greedy."""

    temperature: float
    top_p: float
    seed: int
    max_completion_length: int  # tokens


class SampledCompletion(NamedTuple):
    """A completion as the reward sees it: decoded, without special tokens."""

    text: str
    tokens: int  # with the end-of-sequence token
    truncated: bool  # it has none


Sampler = Callable[[list[str], list[int]], list[SampledCompletion]]
"""Prompts, after the chat template, and their seeds -> completions."""


def completion_seed(seed: int, problem: int, sample: int) -> int:
    """The seed of one completion, 0 to 2^63 - 1: no two of an evaluation, nor of two seeds, are
    alike.
    """
    digest = hashlib.blake2b(f"{seed} {problem} {sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def policy_sampler(policy, sampling: Sampling, *, adapter: bool = True) -> Sampler:
    """A sampler that asks `policy.model.generate`; `adapter=False` switches the LoRA weights
    off.
    """
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
        with (
            contextlib.nullcontext() if adapter else policy.model.disable_adapter(),
            policy.generating() as model,
        ):
            ids = model.generate(
                **{
                    k: v.to(model.device)
                    for k, v in inputs.items()
                    if k in ("input_ids", "attention_mask")
                },
                **generate_options(tokenizer, sampling, seeds, model.device),
            )
        return [
            decoded_completion(row, tokenizer)
            for row in ids[:, inputs["input_ids"].shape[1] :].tolist()
        ]

    return sample


def generate_options(tokenizer, sampling: Sampling, seeds: list[int], device) -> dict[str, Any]:
    """What transformers' `generate` needs to draw one completion per seed."""
    from transformers import (
        GenerationConfig,
        LogitsProcessorList,
        TemperatureLogitsWarper,
        TopPLogitsWarper,
    )

    # all that a model's own generation_config could bring in; training ignores that as well
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
        eos_token_id=tokenizer.eos_token_id,
    )
    processors = LogitsProcessorList()
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.top_p < 1:
            processors.append(TopPLogitsWarper(sampling.top_p))
        processors.append(_GumbelNoise(seeds, device))
    return {"generation_config": config, "logits_processor": processors}


class _GumbelNoise:
    """Noise that makes the most likely token a draw from the softmax, from a generator per row."""

    def __init__(self, seeds: list[int], device):
        import torch

        self.generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids, scores):
        noise = scores.new_empty(scores.shape)  # (B, V)
        for row, generator in zip(noise, self.generators, strict=True):
            row.exponential_(generator=generator)
        return scores - noise.log()


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
    """Load `base` into vLLM; returns a function from `adapter` (use it or not) to a sampler. For
    vllm 0.31.0.
    """
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    llm = LLM(
        model=base,
        max_model_len=max_length,
        seed=0,
        trust_remote_code=trust_remote_code,
        quantization="bitsandbytes" if load_in_4bit else None,
        enable_lora=adapter is not None,
        **{"max_lora_rank": next(r for r in VLLM_RANKS if r >= rank)} if adapter else {},
    )
    lora = LoRARequest("adapter", 1, str(adapter)) if adapter else None

    def sampler(use_adapter: bool) -> Sampler:
        def sample(prompts: list[str], seeds: list[int]) -> list[SampledCompletion]:
            ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
            parameters = [
                SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    max_tokens=sampling.max_completion_length,
                    seed=seed,
                    ignore_eos=True,
                    stop_token_ids=[tokenizer.eos_token_id],
                    detokenize=False,
                )
                # the tokenizer's end alone ends a completion, as in training; a model's config may
                # name more
                for seed in seeds
            ]
            outputs = llm.generate(
                [{"prompt_token_ids": row} for row in ids],
                parameters,
                use_tqdm=False,
                lora_request=lora if use_adapter else None,
            )
            return [
                decoded_completion(list(output.outputs[0].token_ids), tokenizer)
                for output in outputs
            ]

        return sample

    return sampler


def decoded_completion(ids: list[int], tokenizer) -> SampledCompletion:
    """What `ids` say up to the first end-of-sequence token; what follows is padding."""
    ended = tokenizer.eos_token_id in ids
    ids = ids[: ids.index(tokenizer.eos_token_id) + 1] if ended else ids
    return SampledCompletion(tokenizer.decode(ids, skip_special_tokens=True), len(ids), not ended)


def unsloth_uses_vllm(section: ModelSection) -> bool:
    """Whether Unsloth samples with vLLM while it trains; raises RecipeError where that is asked for
    and cannot be had.
    """
    wanted, installed = section.fast_inference, importlib.util.find_spec("vllm") is not None
    if wanted is True and not installed:
        raise RecipeError(
            "model.fast_inference",
            "true needs vLLM, which is not installed; use auto, or: pip install vllm==0.31.0",
        )
    # each would be a group of one process, and so a run of its own
    if wanted is True and processes.count() > 1:
        raise RecipeError(
            "model.fast_inference",
            f"true is for one process, and there are {processes.count()}; use auto or false, or a "
            "vLLM server (docs/scaling.md)",
        )
    return wanted is not False and installed and processes.count() == 1
