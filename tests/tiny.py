"""A tiny real policy for tests: a Llama with 2 layers and a character tokenizer, made in code."""

import string
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'][0] }}:{{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)
LINEAR_LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def tiny_tokenizer(
    pad: str = "~", alphabet: str = string.printable[:95] + "\n"
) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per character, a chat template, and `^` as the end of a sequence.

    With `pad="^"`, padding and end of sequence have the same id.
    """
    symbols = dict.fromkeys(["~", "^", *alphabet])
    tokenizer = Tokenizer(
        models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="?")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=pad,
        eos_token="^",
        unk_token="?",
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> LlamaForCausalLM:
    """An untrained Llama with 2 layers and 16 hidden units.

    Its weights are far enough from zero that the logits are not uniform.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        initializer_range=0.4,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)


def with_lora(model, rank: int = 4, seed: int = 1):
    """`model` with a LoRA adapter. Its factor B is not zero, so that both factors get gradients."""
    torch.manual_seed(seed)
    model = get_peft_model(
        model,
        LoraConfig(r=rank, lora_alpha=rank, target_modules=LINEAR_LAYERS, task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


def save_tiny_policy(folder, **tokenizer_options) -> str:
    """Save a tiny model and its tokenizer to `folder`; returns the folder's path."""
    tokenizer = tiny_tokenizer(**tokenizer_options)
    tiny_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_adapter(folder: Path, base: str) -> Path:
    """Saves an adapter that is not zero for the tiny model `base`, and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.name_or_path = base
    with_lora(model).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
