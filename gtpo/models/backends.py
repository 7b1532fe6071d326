"""Load a LoRA policy with Unsloth or with transformers + peft, and save its adapter."""

import contextlib
import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gtpo.errors import RecipeError
from gtpo.hooks.merged_generation import merged
from gtpo.hooks.seams import wrap
from gtpo.models import adapters
from gtpo.models.base_model import check_context, check_free_memory, loading_error
from gtpo.models.generation import unsloth_uses_vllm
from gtpo.models.tokenizer import hand_over, prepare_tokenizer
from gtpo.recipe.sections import DocumentedTraining, ModelSection
from gtpo.system.environment import garbage_collection_off
from gtpo.system.whole_files import files_written_aside

ALL_LINEAR = "all-linear"  # peft's name for every linear layer but the output layer

logger = logging.getLogger(__name__)


@dataclass
class Policy:
    """A model with a LoRA adapter, its tokenizer, and the backend that loaded it."""

    model: Any  # a PeftModel, or the base model alone
    tokenizer: Any
    backend: str  # unsloth or transformers
    uses_vllm: bool = False  # to generate, inside Unsloth

    @contextlib.contextmanager
    def generating(self):
        """Inside, the model is ready to generate. Afterwards it is in its earlier mode again."""
        was_training = self.model.training
        self.model.eval()
        if self.backend == "unsloth":  # which has modes of its own
            from unsloth import FastLanguageModel

            FastLanguageModel.for_inference(self.model)
        try:
            with merged(self.model) if self.backend == "transformers" else contextlib.nullcontext():
                yield self.model
        finally:
            if self.backend == "unsloth":
                FastLanguageModel.for_training(self.model)
            self.model.train(was_training)

    def save_adapter(self, folder: str | Path, state: dict[str, Any] | None = None) -> None:
        """Save adapter and tokenizer to `folder`, as plain peft and transformers load them.

        `state` is the state dict of the whole model, for processes that hold only a part of it.
        """
        with files_written_aside(Path(folder)) as aside:
            self.model.save_pretrained(str(aside), safe_serialization=True, state_dict=state)
            self.tokenizer.save_pretrained(str(aside))


@garbage_collection_off()
def choose_backend(section: ModelSection) -> str:
    """The backend that loads the model here: unsloth or transformers.

    It is logged, and its library is imported. Unsloth must be imported before trl and transformers.
    Raises RecipeError if `model.backend: unsloth` is not possible on this machine.
    """
    import torch

    cuda, missing = torch.cuda.is_available(), None
    if not cuda:
        missing = "no NVIDIA GPU is visible"
    elif importlib.util.find_spec("unsloth") is None:
        missing = "the package unsloth is not installed"
    if section.backend == "unsloth" and missing:
        raise RecipeError(
            "model.backend", f"unsloth cannot be used here, {missing}; use transformers or auto"
        )
    backend = "transformers" if section.backend == "transformers" or missing else "unsloth"
    why = f" (auto: {missing})" if section.backend == "auto" and missing else ""
    device = torch.cuda.get_device_name() if cuda else "CPU"
    logger.info(
        "[GTPO] Backend: %s on %s%s",
        "Unsloth" if backend == "unsloth" else "transformers + peft",
        device,
        why,
    )
    # peft imports transformers, which is expensive
    importlib.import_module("unsloth" if backend == "unsloth" else "peft")
    return backend


def prepare_backend(section: ModelSection, options: dict) -> str:
    """The backend for training, as `choose_backend` returns it.

    Unsloth also patches TRL, which nothing may have imported before. `options` are those of
    torch.compile for its trainer. Raises RecipeError if Unsloth cannot patch TRL, and for what
    `choose_backend` refuses.
    """
    backend = choose_backend(section)
    if backend == "unsloth":
        import unsloth

        with compile_options(options):
            unsloth.PatchFastRL("GRPO", unsloth.FastLanguageModel)
        import trl

        # unsloth 2026.10.7: if patching fails, it warns and leaves TRL's trainer in place.
        if trl.GRPOTrainer.__module__ != "UnslothGRPOTrainer":
            raise RecipeError(
                "model.backend",
                "unsloth could not patch TRL; install requirements.txt, or use transformers",
            )
    return backend


@contextlib.contextmanager
def compile_options(options: dict):
    """Inside, the trainer that Unsloth generates compiles with `options` over its own options.

    unsloth 2026.10.7, models.rl.create_new_function, turns a source into a module. The source holds
    the options, and torch.compile reads them while the module is imported. So they must be set in
    the source.
    """
    import unsloth.models.rl as rl

    def create_with_options(create, name, new_source, *args, **kwargs):
        marker = "torch_compile_options = {"
        if name == "UnslothGRPOTrainer" and options:
            start = new_source.index(marker)
            end = new_source.index("}", start) + 1
            new_source = (
                f"{new_source[:end]}\ntorch_compile_options.update({options!r})\n{new_source[end:]}"
            )
        return create(name, new_source, *args, **kwargs)

    undo = wrap(rl, "create_new_function", create_with_options)
    try:
        yield
    finally:
        undo()


def precision(training: DocumentedTraining) -> str:
    """The precision to train in: bf16, fp16 or float32, the first that this device has.

    `training.bf16` and `training.fp16` choose a precision if true, and exclude it if false. On a
    CPU it is float32, unless one of them is true.
    """
    import torch

    given = training.trl_options()
    for name in ("bf16", "fp16"):
        if given.get(name):
            return name
    if not torch.cuda.is_available():
        return "float32"
    if torch.cuda.is_bf16_supported(including_emulation=False) and given.get("bf16") is not False:
        return "bf16"
    return "fp16" if given.get("fp16") is not False else "float32"


def load_policy(
    section: ModelSection,
    tokenizer,
    backend: str,
    *,
    seed: int,
    precision: str,
    gradient_checkpointing: bool,
    adapter: Path | None = None,
    lora: bool = True,
) -> Policy:
    """The base model with a LoRA adapter: a fresh one, or that of the folder `adapter`.

    `backend` is what `choose_backend` has returned. `precision` is bf16, fp16 or float32; on a CPU
    the weights are in float32 in any case. `lora=False` loads the base model without an adapter.
    Raises RecipeError for weights that cannot be loaded, for options that this machine cannot do,
    and for layers that the model does not have.
    """
    import torch
    from safetensors import SafetensorError

    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "float32": torch.float32}[precision]
    try:
        config = lora_config(section, adapter) if lora else None
        if backend == "unsloth":
            policy = _load_with_unsloth(
                section, tokenizer, dtype, config, seed, gradient_checkpointing
            )
        else:
            policy = _load_with_transformers(section, tokenizer, dtype, config)
    except RecipeError:
        raise
    # missing weights, damaged weights, a quantizer that is not installed
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise loading_error(
            "model", f"{section.model_name!r} cannot be loaded", section, error
        ) from error
    if lora and adapter:
        adapters.load_weights(policy.model, adapter, section.model_name)
    return policy


def lora_config(section: ModelSection, adapter: Path | None):
    """The peft.LoraConfig of the adapter: the recipe's, or that of the folder `adapter`."""
    from peft import LoraConfig

    if adapter:
        return adapters.saved_lora_config(adapter)
    every_layer = section.target_modules == [ALL_LINEAR]
    return LoraConfig(
        r=section.lora_rank,
        lora_alpha=section.lora_alpha,
        target_modules=ALL_LINEAR if every_layer else section.target_modules,
        lora_dropout=section.lora_dropout,
        use_rslora=section.use_rslora,
        use_dora=section.use_dora,
        init_lora_weights=section.init_lora_weights,
        modules_to_save=section.modules_to_save,
        task_type="CAUSAL_LM",
    )


def _load_with_unsloth(
    section: ModelSection, tokenizer, dtype, lora, seed: int, gradient_checkpointing: bool
) -> Policy:
    from unsloth import FastLanguageModel

    vllm = unsloth_uses_vllm(section)
    logger.info("[GTPO] Generation: %s", "vLLM" if vllm else "Unsloth, without vLLM")
    model, unsloth_tokenizer = FastLanguageModel.from_pretrained(
        model_name=section.model_name,
        dtype=dtype,
        max_seq_length=section.max_seq_length,
        load_in_4bit=section.load_in_4bit,
        fast_inference=vllm,
        max_lora_rank=lora.r if lora else section.lora_rank,
        gpu_memory_utilization=section.gpu_memory_utilization,
        trust_remote_code=section.trust_remote_code,
        random_state=seed,
    )
    if lora:
        if lora.rank_pattern or lora.alpha_pattern:
            raise RecipeError(
                "model.backend",
                "unsloth gives all layers one rank, and this adapter has several; use transformers",
            )
        layers = lora.target_modules  # a set, or a text such as all-linear
        check_layers(model, lora)
        model = FastLanguageModel.get_peft_model(
            model,
            r=lora.r,
            lora_alpha=lora.lora_alpha,
            target_modules=layers if isinstance(layers, str) else sorted(layers),
            lora_dropout=lora.lora_dropout,
            bias=lora.bias,
            use_rslora=lora.use_rslora,
            use_dora=lora.use_dora,
            init_lora_weights=lora.init_lora_weights,
            modules_to_save=lora.modules_to_save,
            random_state=seed,
            use_gradient_checkpointing="unsloth" if gradient_checkpointing else False,
        )
    hand_over(tokenizer, unsloth_tokenizer)
    ready = prepare_tokenizer(unsloth_tokenizer, section, "unsloth")
    return Policy(model, ready, "unsloth", uses_vllm=vllm)


def _load_with_transformers(section: ModelSection, tokenizer, dtype, lora) -> Policy:
    import torch
    from peft import prepare_model_for_kbit_training
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    cuda = torch.cuda.is_available()
    quantized = section.load_in_4bit and cuda
    if section.load_in_4bit and not cuda:
        _fall_back(section, "model.load_in_4bit", "true needs an NVIDIA GPU", "false")
    if section.fast_inference is True:
        _fall_back(section, "model.fast_inference", "true needs Unsloth", "auto")
    config = AutoConfig.from_pretrained(
        section.model_name, trust_remote_code=section.trust_remote_code
    )
    check_context(section, config)
    if not cuda:
        check_free_memory(section, config)
    four_bits = None
    if quantized:
        four_bits = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    model = AutoModelForCausalLM.from_pretrained(
        section.model_name,
        dtype=dtype if cuda else torch.float32,
        trust_remote_code=section.trust_remote_code,
        use_safetensors=True,
        device_map={"": int(os.environ.get("LOCAL_RANK", 0))} if cuda else None,
        quantization_config=four_bits,
    )
    if quantized:  # the trainer switches gradient checkpointing on
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    return Policy(add_lora(model, lora) if lora else model, tokenizer, "transformers")


def add_lora(model, lora):
    """`model` as a PeftModel with a fresh adapter; raises RecipeError for layers it does not have.

    `lora` is the peft.LoraConfig of the adapter.
    """
    check_layers(model, lora)
    try:
        return adapters.peft_model(model, lora)
    except (ValueError, NotImplementedError) as error:  # a kind of layer that peft cannot adapt
        raise RecipeError(
            "model.target_modules",
            f"{_as_listed(lora.target_modules)} does not fit this model"
            f" ({str(error).splitlines()[0]})",
        ) from error


def check_layers(model, lora) -> None:
    """Warns of layers of the peft.LoraConfig `lora` that `model` does not have.

    Raises RecipeError if it has none of them, or if it lacks a module to save. Also raises it if a
    module to save shares its weights with another one.
    """
    names = [name for name, _ in model.named_modules()]
    if isinstance(lora.target_modules, str):
        absent = []
    else:
        parameters = [name for name, _ in model.named_parameters()]
        absent = [
            layer
            for layer in sorted(lora.target_modules)
            if not any(_is_named(name, layer) for name in names)
            and not _is_in_experts(layer, parameters)
        ]
    if absent:
        problem = f"this model has no layer named {', '.join(absent)}"
        remedy = f"its linear layers are {', '.join(linear_layers(model))}"
        if len(absent) == len(lora.target_modules):
            raise RecipeError("model.target_modules", f"{problem}; {remedy}")
        logger.warning(
            "[GTPO] model.target_modules: %s, so no such layer is trained; %s", problem, remedy
        )
    for module in lora.modules_to_save or []:
        if not any(_is_named(name, module) for name in names):
            raise RecipeError(
                "model.modules_to_save",
                f"this model has no module named {module}; {remedy_for_modules(model)}",
            )
    heads = {"lm_head", "embed_tokens"} & set(lora.modules_to_save or [])
    if heads and model.config.get_text_config().tie_word_embeddings:
        raise RecipeError(
            "model.modules_to_save",
            f"{', '.join(sorted(heads))}: this model shares the weights of its embeddings and its"
            " output layer, and a saved copy of one would part them; leave it out",
        )


def linear_layers(model) -> list[str]:
    """The last parts of the names of a model's linear layers, without its output layer."""
    import torch

    head = model.get_output_embeddings()
    layers = {
        name.rpartition(".")[2]: None
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    }
    return list(layers)


def remedy_for_modules(model) -> str:
    """What `model.modules_to_save` can name."""
    return f"use one of {', '.join(dict.fromkeys(name for name, _ in model.named_children()))}"


def _is_named(name: str, layer: str) -> bool:
    return name == layer or name.endswith(f".{layer}")


def _is_in_experts(layer: str, parameters: list[str]) -> bool:
    """Whether a mixture of experts has the weights of this layer in one tensor for all experts.

    transformers 5 keeps gate_proj and up_proj there as gate_up_proj, and peft 0.21.2 adapts them.
    """
    names = {"gate_proj": ("gate_up_proj",), "up_proj": ("gate_up_proj",)}.get(layer, (layer,))
    return any(name.endswith(f".experts.{one}") for name in parameters for one in names)


def _as_listed(layers) -> str:
    return layers if isinstance(layers, str) else ", ".join(sorted(layers))


def _fall_back(section: ModelSection, key: str, problem: str, remedy: str) -> None:
    """Warn that the option `key` is replaced, with `backend: auto`; else raise RecipeError."""
    if section.backend != "auto":
        raise RecipeError(key, f"{problem}; use {remedy}")
    logger.warning("[GTPO] %s: %s; going on with %s", key, problem, remedy)
