"""Load a LoRA policy and its tokenizer with Unsloth, or with transformers + peft; save the adapter."""

import contextlib
import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gtpo.recipe import RecipeError
from gtpo.sections import ModelSection

logger = logging.getLogger(__name__)

SPARE_PADS = ("<|finetune_right_pad_id|>", "<|endoftext|>", "<|vision_pad|>", "<pad>", "[PAD]", "<unk>")


@dataclass
class Policy:
    """A model with a LoRA adapter, its tokenizer, and which backend loaded it."""

    model: Any
    tokenizer: Any
    backend: str
    uses_vllm: bool = False

    def save_adapter(self, folder: str | Path) -> None:
        """Adapter and tokenizer, loadable by plain peft and transformers."""
        self.model.save_pretrained(str(folder), safe_serialization=True)
        self.tokenizer.save_pretrained(str(folder))


def prepare_backend(section: ModelSection, compile_options: dict) -> str:
    """Choose the backend, say which, and patch TRL if it is Unsloth: before anything imports trl or transformers.

    Raises RecipeError if `model.backend: unsloth` cannot be had on this machine.
    """
    import torch

    cuda, installed = torch.cuda.is_available(), importlib.util.find_spec("unsloth") is not None
    missing = "no NVIDIA GPU is visible" if not cuda else "the package unsloth is not installed" if not installed else None
    if section.backend == "unsloth" and missing:
        raise RecipeError(f"model.backend: unsloth cannot be used here, {missing}; use transformers or auto")
    backend = "transformers" if section.backend == "transformers" or missing else "unsloth"
    why = f" (auto: {missing})" if section.backend == "auto" and missing else ""
    device = torch.cuda.get_device_name() if cuda else "CPU"
    logger.info("[GTPO] Backend: %s on %s%s", "Unsloth" if backend == "unsloth" else "transformers + peft", device, why)
    if backend == "unsloth":
        import unsloth

        with _compile_options(compile_options):
            unsloth.PatchFastRL("GRPO", unsloth.FastLanguageModel)
    return backend


@contextlib.contextmanager
def _compile_options(options: dict):
    """Lay `options` over those that Unsloth's generated trainer compiles with.

    unsloth 2026.10.7 writes its options into the source that `create_new_function` turns into a module, and
    torch.compile reads them when that module is imported; so the source is where they can be set.
    """
    import unsloth.models.rl as rl

    create = rl.create_new_function

    def create_with_options(name, new_source, *args, **kwargs):
        marker = "torch_compile_options = {"
        if name == "UnslothGRPOTrainer" and options:
            start = new_source.index(marker)
            end = new_source.index("}", start) + 1
            new_source = f"{new_source[:end]}\ntorch_compile_options.update({options!r})\n{new_source[end:]}"
        return create(name, new_source, *args, **kwargs)

    rl.create_new_function = create_with_options
    try:
        yield
    finally:
        rl.create_new_function = create


def check_model(section: ModelSection) -> None:
    """A short look at the model's whereabouts, before anything is loaded; raises RecipeError with what to do."""
    name = section.model_name
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "config.json")):
            raise RecipeError(f"model.model_name: the folder {name!r} has no config.json; give a model saved by transformers")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RecipeError(f"model.model_name: there is no folder {name!r}; give an existing one, or a hub name such as "
                          "Qwen/Qwen2.5-3B-Instruct")
    else:
        from gtpo.hub import look_up

        look_up("model.model_name", name, kind="model", instead="a local folder")


def load_tokenizer(section: ModelSection, backend: str):
    """The tokenizer alone, with a chat template and a padding token; raises RecipeError if it cannot chat."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(section.model_name, trust_remote_code=section.trust_remote_code)
    except (OSError, ValueError) as error:
        raise RecipeError(f"model.model_name: no tokenizer could be loaded from {section.model_name!r} "
                          f"({str(error).splitlines()[0]})") from error
    return ready_tokenizer(tokenizer, section, backend)


def ready_tokenizer(tokenizer, section: ModelSection, backend: str):
    """Give `tokenizer` what training needs: chat template, padding token, padding on the left."""
    if section.chat_template:
        path = Path(section.chat_template)
        is_file = len(section.chat_template) < 1000 and path.is_file()
        tokenizer.chat_template = path.read_text(encoding="utf-8") if is_file else section.chat_template
    if not tokenizer.chat_template:
        raise RecipeError(f"model.model_name: {section.model_name!r} has no chat template (it is a base model); set "
                          "model.chat_template to a Jinja template or file, or use the model's Instruct version")
    if tokenizer.eos_token_id is None:
        raise RecipeError(f"model.model_name: the tokenizer of {section.model_name!r} has no end-of-sequence token, so no "
                          "completion could end; set one in its tokenizer_config.json")
    # Unsloth takes every pad id for padding: with pad = end of sequence, nothing would teach the policy to stop.
    if tokenizer.pad_token_id is None or (backend == "unsloth" and tokenizer.pad_token_id == tokenizer.eos_token_id):
        vocabulary = tokenizer.get_vocab()
        spare = next((t for t in SPARE_PADS if t in vocabulary and t != tokenizer.eos_token), tokenizer.eos_token)
        logger.warning("[GTPO] The tokenizer has no padding token of its own; %r is used", spare)
        tokenizer.pad_token = spare
    tokenizer.padding_side = "left"
    return tokenizer


def load_policy(section: ModelSection, tokenizer, backend: str) -> Policy:
    """The base model with a fresh LoRA adapter, by `backend` (what `prepare_backend` returned)."""
    return _load_with_unsloth(section) if backend == "unsloth" else _load_with_transformers(section, tokenizer)


def _load_with_unsloth(section: ModelSection) -> Policy:
    from unsloth import FastLanguageModel

    vllm = importlib.util.find_spec("vllm") is not None if section.fast_inference == "auto" else section.fast_inference
    logger.info("[GTPO] Generation: %s", "vLLM" if vllm else "Unsloth, without vLLM")
    model, tokenizer = FastLanguageModel.from_pretrained(
        model_name=section.model_name, max_seq_length=section.max_seq_length, load_in_4bit=section.load_in_4bit,
        fast_inference=vllm, max_lora_rank=section.lora_rank, gpu_memory_utilization=section.gpu_memory_utilization,
        trust_remote_code=section.trust_remote_code, random_state=section.random_seed,
    )
    model = FastLanguageModel.get_peft_model(
        model, r=section.lora_rank, lora_alpha=section.lora_alpha, target_modules=section.target_modules,
        use_gradient_checkpointing="unsloth", random_state=section.random_seed,
    )
    return Policy(model, ready_tokenizer(tokenizer, section, "unsloth"), "unsloth", uses_vllm=vllm)


def _load_with_transformers(section: ModelSection, tokenizer) -> Policy:
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    cuda = torch.cuda.is_available()
    dtype = torch.float32 if not cuda else torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
    config = AutoConfig.from_pretrained(section.model_name, trust_remote_code=section.trust_remote_code)
    _check_context(section, config)
    quantized = section.load_in_4bit and cuda
    if section.load_in_4bit and not cuda:
        if section.backend != "auto":
            raise RecipeError("model.load_in_4bit: true needs an NVIDIA GPU; use false")
        logger.warning("[GTPO] model.load_in_4bit needs an NVIDIA GPU; the model is loaded in float32 instead")
    if not cuda:
        _check_memory(section, config)
    model = AutoModelForCausalLM.from_pretrained(
        section.model_name, dtype=dtype, trust_remote_code=section.trust_remote_code, use_safetensors=True,
        device_map={"": int(os.environ.get("LOCAL_RANK", 0))} if cuda else None,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
        ) if quantized else None,
    )
    if quantized:
        model = prepare_model_for_kbit_training(model)
    lora = LoraConfig(r=section.lora_rank, lora_alpha=section.lora_alpha, target_modules=section.target_modules,
                      task_type="CAUSAL_LM")
    try:
        model = get_peft_model(model, lora)
    except ValueError as error:
        raise RecipeError(f"model.target_modules: {section.target_modules} does not fit this model "
                          f"({str(error).splitlines()[0]})") from error
    return Policy(model, tokenizer, "transformers")


def _check_context(section: ModelSection, config) -> None:
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and section.max_seq_length > context:
        raise RecipeError(f"model.max_seq_length: {section.max_seq_length} is more than the {context} tokens of context "
                          f"that {section.model_name!r} was made for; use at most {context}")


def _check_memory(section: ModelSection, config) -> None:
    """Raises RecipeError if the weights alone, in float32, do not fit what this machine has free."""
    import psutil
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    needed, free = 4 * parameters, psutil.virtual_memory().available
    if needed > 0.9 * free:
        raise RecipeError(f"model.model_name: {section.model_name!r} has {parameters / 1e9:.1f} billion parameters, "
                          f"{needed / 2**30:.0f} GiB in float32, and this machine without a GPU has {free / 2**30:.0f} GiB "
                          "free; use a smaller model, or a machine with an NVIDIA GPU")
