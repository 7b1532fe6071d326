"""The engine that draws an evaluation's completions: vLLM, Unsloth or transformers.

The tokenizer is loaded at once, the model when the first completion is drawn.
"""

import functools
import importlib.util
import logging
from collections.abc import Callable

from gtpo.errors import RecipeError
from gtpo.models import adapters, base_model
from gtpo.models.generation import Sampler, Sampling, policy_sampler, vllm_samplers
from gtpo.models.saved import Saved, load_saved, saved_tokenizer
from gtpo.recipe.sections import ModelSection

logger = logging.getLogger(__name__)


class Engine:
    """A saved model's tokenizer, and its completions with and without the adapter.

    `backend` is auto, vllm, unsloth, transformers or None (auto). auto takes vLLM if it is
    installed and a GPU is visible, else Unsloth, else transformers. A recipe can rule out vLLM with
    `model.backend: transformers` or `model.fast_inference: false`. A `conversation` never uses it.

    Raises RecipeError for a backend that cannot be used on this machine.
    """

    def __init__(
        self,
        saved: Saved,
        backend: str | None,
        chat_template: str | None = None,
        *,
        conversation: bool = False,
    ):
        from gtpo.models import backends

        self.saved = saved
        # Keys that replace those of the run's model section. fast_inference is vLLM in Unsloth.
        self.overrides = {"fast_inference": False}
        if chat_template:
            self.overrides["chat_template"] = chat_template
        if saved.section.load_in_4bit and not _gpu_is_visible():
            logger.warning(
                "[GTPO] model.load_in_4bit: true needs an NVIDIA GPU; continuing with false"
            )
            self.overrides["load_in_4bit"] = False
        if not conversation and _uses_vllm(backend, saved.section):
            self.backend = "vllm"
            logger.info("[GTPO] Backend: vLLM")
        else:
            if backend in ("unsloth", "transformers"):
                self.overrides["backend"] = backend
            self.backend = backends.choose_backend(self.section)
        self.tokenizer = saved_tokenizer(saved, self.section, self.backend, chat_template)

    @property
    def section(self) -> ModelSection:
        """The model section with which the model is loaded."""
        return self.saved.section_with(**self.overrides)

    @functools.cached_property
    def context(self) -> int | None:
        """The most tokens that the base model was made for; None if its config does not say."""
        config = base_model.read_config(
            self.saved.base, trust_remote_code=self.saved.section.trust_remote_code
        )
        return base_model.context_length(config)

    def policy(self, length: int):
        """Loads the model with Unsloth or transformers, for sequences of `length` tokens."""
        return load_saved(
            self.saved,
            backend_and_tokenizer=(self.backend, self.tokenizer),
            **self.overrides,
            max_seq_length=length,
            max_prompt_length=length,
        )

    def samplers(self, sampling: Sampling, max_prompt_length: int) -> Callable[[bool], Sampler]:
        """Returns a function from "with the adapter?" to a sampler; both samplers share one model.

        Raises RecipeError if prompt and completion can be longer than the model's context.
        """
        completion, context = sampling.max_completion_length, self.context
        length = max_prompt_length + completion
        if context is not None and length > context:
            raise RecipeError(
                "--max-completion-length",
                f"prompts of {max_prompt_length} and completions of {completion} tokens exceed the"
                f" context of {self.saved.base!r} ({context} tokens); use at most"
                f" {max(0, context - max_prompt_length)}, or a smaller --max-prompt-length",
            )
        if self.backend == "vllm":
            return self._vllm_samplers(sampling, length)
        policy = functools.cache(lambda: self.policy(length))
        return lambda adapter: policy_sampler(
            policy(), sampling, adapter=adapter or self.saved.adapter is None
        )

    def _vllm_samplers(self, sampling: Sampling, length: int) -> Callable[[bool], Sampler]:
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


def _uses_vllm(backend: str | None, section: ModelSection) -> bool:
    """Whether vLLM draws the completions; raises RecipeError if it must and cannot."""
    if not _gpu_is_visible():
        obstacle = "no NVIDIA GPU is visible"
    elif importlib.util.find_spec("vllm") is None:
        obstacle = "the package vllm is not installed"
    else:
        obstacle = None
    if backend == "vllm":
        if obstacle:
            raise RecipeError(
                "--backend", f"vllm cannot be used here, {obstacle}; use auto or transformers"
            )
        return True
    recipe_allows = section.backend != "transformers" and section.fast_inference is not False
    return backend in (None, "auto") and obstacle is None and recipe_allows


def _gpu_is_visible() -> bool:
    import torch

    return torch.cuda.is_available()
