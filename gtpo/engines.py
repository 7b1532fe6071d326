"""What draws an evaluation's completions: vLLM, Unsloth or transformers, with the model loaded at the first draw."""

import functools
import importlib.util
import logging

from gtpo import adapters
from gtpo.generation import Sampler, Sampling, with_model, with_vllm
from gtpo.recipe import RecipeError
from gtpo.saved import Saved, load_saved, saved_tokenizer

logger = logging.getLogger(__name__)


class Engine:
    """A saved model's tokenizer, and its completions with and without the adapter.

    `wanted` is auto, vllm, unsloth or transformers; auto is vLLM where it is installed and a GPU is there, unless the
    recipe says otherwise, then Unsloth, then transformers. Raises RecipeError for a backend that cannot be had here, and
    for sequences longer than the model's context.
    """

    def __init__(self, saved: Saved, wanted: str | None, chat_template: str | None = None):
        from gtpo import backends

        self.saved, self.chat_template, section = saved, chat_template, saved.section
        if _takes_vllm(wanted, section):
            self.backend, keys = "vllm", {}
            logger.info("[GTPO] Backend: vLLM")
        else:
            keys = {} if wanted in (None, "auto", "vllm") else {"backend": wanted}
            self.backend = backends.choose_backend(saved.section_with(**keys))
        # What a GPU holds in 4 bits, a CPU does not; vLLM has had its turn.
        self.keys = {**keys, "fast_inference": False, **({} if _cuda() else {"load_in_4bit": False})}
        if chat_template:
            self.keys["chat_template"] = chat_template
        self.tokenizer = saved_tokenizer(saved, saved.section_with(**self.keys), self.backend, chat_template)

    @functools.cached_property
    def context(self) -> int | None:
        """The tokens that the model was made for; None where it does not say."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(self.saved.base, trust_remote_code=self.saved.section.trust_remote_code)
        except (OSError, ValueError) as error:
            raise RecipeError(f"{self.saved.base}: its config.json cannot be used ({str(error).splitlines()[0]})") from error
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    def policy(self, length: int):
        """The model, by Unsloth or transformers, for sequences of `length` tokens."""
        backend = self.backend if self.backend != "vllm" else "transformers"
        return load_saved(self.saved, ready=(backend, self.tokenizer), max_seq_length=length, max_prompt_length=length, **self.keys)

    def samplers(self, sampling: Sampling, max_prompt_length: int):
        """A function that returns the sampler with the adapter (True) or without it (False); they share one model."""
        length = max_prompt_length + sampling.max_completion_length
        if self.context is not None and length > self.context:
            raise RecipeError(f"--max-completion-length: prompts of {max_prompt_length} and completions of {sampling.max_completion_length} "
                              f"tokens are more than the {self.context} of context that {self.saved.base!r} was made for; use at most "
                              f"{max(0, self.context - max_prompt_length)}, or a smaller --max-prompt-length")
        if self.backend == "vllm":
            return self._vllm(sampling, length)
        policy = functools.cache(lambda: self.policy(length))
        return lambda adapter: with_model(policy(), sampling, adapter=adapter or self.saved.adapter is None)

    def _vllm(self, sampling: Sampling, length: int):
        adapter, section = self.saved.adapter, self.saved.section
        load = functools.cache(lambda: with_vllm(
            self.saved.base, self.tokenizer, sampling, max_length=length, adapter=adapter, load_in_4bit=section.load_in_4bit,
            rank=adapters.read_config(adapter)["r"] if adapter else None, trust_remote_code=section.trust_remote_code))
        return lambda use_adapter: load()(use_adapter and adapter is not None)


def _takes_vllm(wanted: str | None, section) -> bool:
    missing = "no NVIDIA GPU is visible" if not _cuda() else None if importlib.util.find_spec("vllm") else "the package vllm is not installed"
    if wanted == "vllm" and missing:
        raise RecipeError(f"--backend: vllm cannot be used here, {missing}; use auto or transformers")
    by_itself = wanted in (None, "auto") and not missing and section.backend != "transformers" and section.fast_inference is not False
    return wanted == "vllm" or by_itself


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
