"""What draws an evaluation's completions: vLLM, Unsloth or transformers, with the model loaded at
the first draw.
"""

import functools
import importlib.util
import logging

from gtpo.errors import RecipeError
from gtpo.models import adapters
from gtpo.models.generation import Sampling, policy_sampler, vllm_samplers
from gtpo.models.saved import Saved, load_saved, saved_tokenizer

logger = logging.getLogger(__name__)


class Engine:
    """A saved model's tokenizer, and its completions with and without the adapter.

    `wanted` is auto, vllm, unsloth or transformers; auto is vLLM where it is installed and a GPU is
    there, unless the recipe says otherwise or it is a `conversation`, then Unsloth, then
    transformers. Raises RecipeError for a backend that cannot be had here.
    """

    def __init__(
        self,
        saved: Saved,
        wanted: str | None,
        chat_template: str | None = None,
        *,
        conversation: bool = False,
    ):
        from gtpo.models import backends

        self.saved, self.keys = saved, {"fast_inference": False}  # vLLM inside Unsloth, that is
        if chat_template:
            self.keys["chat_template"] = chat_template
        if saved.section.load_in_4bit and not _cuda():
            logger.warning(
                "[GTPO] model.load_in_4bit: true needs an NVIDIA GPU; going on with false"
            )
            self.keys["load_in_4bit"] = False
        if not conversation and _takes_vllm(wanted, saved.section):
            self.backend = "vllm"
            logger.info("[GTPO] Backend: vLLM")
        else:
            if wanted in ("unsloth", "transformers"):
                self.keys["backend"] = wanted
            self.backend = backends.choose_backend(saved.section_with(**self.keys))
        self.tokenizer = saved_tokenizer(
            saved, saved.section_with(**self.keys), self.backend, chat_template
        )

    @functools.cached_property
    def context(self) -> int | None:
        """The tokens that the model was made for; None where it does not say."""
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(
                self.saved.base, trust_remote_code=self.saved.section.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise RecipeError(
                self.saved.base, f"its config.json cannot be used ({str(error).splitlines()[0]})"
            ) from error
        return getattr(config.get_text_config(), "max_position_embeddings", None)

    def policy(self, length: int):
        """The model, by Unsloth or transformers, for sequences of `length` tokens."""
        return load_saved(
            self.saved,
            ready=(self.backend, self.tokenizer),
            **self.keys,
            max_seq_length=length,
            max_prompt_length=length,
        )

    def samplers(self, sampling: Sampling, max_prompt_length: int):
        """A function that returns the sampler with the adapter (True) or without it (False); they
        share one model.

        Raises RecipeError for sequences longer than the model's context.
        """
        completion, context = sampling.max_completion_length, self.context
        length = max_prompt_length + completion
        if context is not None and length > context:
            raise RecipeError(
                "--max-completion-length",
                f"prompts of {max_prompt_length} and completions of {completion} tokens are more"
                f" than the {context} of context that {self.saved.base!r} was made for; use at most"
                f" {max(0, context - max_prompt_length)}, or a smaller --max-prompt-length",
            )
        if self.backend == "vllm":
            return self._vllm(sampling, length)
        policy = functools.cache(lambda: self.policy(length))
        return lambda adapter: policy_sampler(
            policy(), sampling, adapter=adapter or self.saved.adapter is None
        )

    def _vllm(self, sampling: Sampling, length: int):
        adapter, section = self.saved.adapter, self.saved.section
        load = functools.cache(
            lambda: vllm_samplers(
                self.saved.base,
                self.tokenizer,
                sampling,
                max_length=length,
                adapter=adapter,
                load_in_4bit=section.load_in_4bit,
                rank=adapters.read_config(adapter)["r"] if adapter else None,
                trust_remote_code=section.trust_remote_code,
            )
        )
        return lambda use_adapter: load()(use_adapter and adapter is not None)


def _takes_vllm(wanted: str | None, section) -> bool:
    installed = importlib.util.find_spec("vllm") is not None
    missing = (
        "no NVIDIA GPU is visible"
        if not _cuda()
        else "the package vllm is not installed"
        if not installed
        else None
    )
    if wanted == "vllm" and missing:
        raise RecipeError(
            "--backend", f"vllm cannot be used here, {missing}; use auto or transformers"
        )
    recipe_allows = section.backend != "transformers" and section.fast_inference is not False
    return wanted == "vllm" or wanted in (None, "auto") and not missing and recipe_allows


def _cuda() -> bool:
    import torch

    return torch.cuda.is_available()
