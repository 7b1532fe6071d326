"""Small random models, unlike the demo's: fused layers, a mixture of experts, a tied head."""

import torch
from conftest import ROOT
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

MODELS = {
    "fused": ("phi3", {}),  # qkv_proj and gate_up_proj in place of five layers
    "experts": (
        "qwen3_moe",
        {
            "head_dim": 32,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 64,
            "decoder_sparse_step": 1,
        },
    ),
    "tied": ("llama", {"tie_word_embeddings": True}),
}


def save_model(folder, name: str) -> str:
    """Write the model and the demo's tokenizer to `folder`, and return its path."""
    model_type, extra = MODELS[name]
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/model")
    torch.manual_seed(0)
    options = {"tie_word_embeddings": False, **extra}
    config = CONFIG_MAPPING[model_type](
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.2,
        **options,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
