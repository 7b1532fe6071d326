"""The worst-case estimate of memory, against cases computed by hand and against a GPU's figures."""

import json

import pytest
from conftest import ROOT

from gtpo.errors import RecipeError
from gtpo.recipe.command_line import read_recipe
from gtpo.recipe.sections import ModelSection
from gtpo.runs import memory
from gtpo.runs.memory import (
    LIBRARIES,
    OWN_CHUNK,
    OWN_ROWS,
    DeviceLoad,
    ModelSize,
    checkpoint_bytes,
    model_size,
    optimizer_bytes,
    peak_memory,
)

LLAMA_8B = ModelSize(
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
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
GIB = 2**30


def lora(rank: int, targets=LINEAR):
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM")


def load(rollout: int = 1, prompt: int = 100, completion: int = 900, **values) -> DeviceLoad:
    """A load with micro-batches of one completion, unless `values` says otherwise."""
    values = {"completions": 1, **values}
    return DeviceLoad(rollout=rollout, prompt_tokens=prompt, completion_tokens=completion, **values)


@pytest.fixture
def llama_8b(tmp_path) -> ModelSection:
    """A folder with the configuration of Llama-3.1-8B and no weights."""
    from transformers import LlamaConfig

    LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
        architectures=["LlamaForCausalLM"],
    ).save_pretrained(tmp_path)
    return ModelSection(model_name=str(tmp_path))


# ---- the size of a model


@pytest.mark.slow  # seconds of work
def test_the_size_of_llama_8b_is_counted_without_its_weights(llama_8b):
    assert model_size(llama_8b, lora(128)) == LLAMA_8B
    assert model_size(llama_8b, lora(16)).adapter == 41_943_040
    with pytest.raises(
        RecipeError, match="model.target_modules: this model has no layer named nothing"
    ):
        model_size(llama_8b, lora(16, ["nothing"]))


def test_a_model_that_caps_its_logits_has_no_plain_head(tmp_path):
    from transformers import Gemma2Config

    Gemma2Config(
        vocab_size=100,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        architectures=["Gemma2ForCausalLM"],
    ).save_pretrained(tmp_path)
    assert not model_size(ModelSection(model_name=str(tmp_path)), lora(4)).plain_head


# ---- each part of the estimate


def test_weights_take_the_bytes_of_their_bits():
    def weights(**values):
        return peak_memory(LLAMA_8B, load(**values))["weights"]

    assert weights(weight_bits=16) == 2 * 8_030_261_248
    assert weights(weight_bits=32) == 4 * 8_030_261_248
    # The weights, the scales of their blocks, and the scales of those scales.
    four_bits = 6_979_321_856 * (4 + 8 / 64 + 32 / 64 / 256) / 8
    embeddings_head_and_norms = 2 * 128_256 * 4096 + (2 * 32 + 1) * 4096
    assert weights(weight_bits=4, unsloth=True) == int(four_bits + 2 * embeddings_head_and_norms)
    assert weights(weight_bits=4) == int(four_bits + 4 * embeddings_head_and_norms)


def test_the_documented_recipe_is_estimated_as_by_hand():
    """8 completions of 1,500 tokens after prompts of 4,000 tokens.

    The rank is 128, the optimizer has 8 bits, and Unsloth samples without vLLM.
    """
    parts = peak_memory(
        LLAMA_8B,
        load(8, 4000, 1500, completions=8, weight_bits=4, unsloth=True, optimizer_bytes=2.1),
    )
    tokens = 8 * 5500
    assert parts["adapter and optimizer"] == int(335_544_320 * 10.1)
    one_layer = tokens * (8 * 4096 + 2 * 1024 + 4 * 14_336) * 2
    assert parts["activations"] == tokens * 4096 * 2 * 32 + 2 * one_layer
    assert parts["logits"] == int(8 * 1500 * 128_256 * 14 / 4)
    assert parts["sampling"] == 0 and parts["libraries"] == LIBRARIES
    by_hand = 5.31 + 3.16 + 10.74 + 15.11 + 5.02 + 1.0
    assert sum(parts.values()) / GIB == pytest.approx(by_hand, abs=0.02)


def test_logits_are_streamed_with_transformers():
    batch = load(8, 500, 1000, completions=2)
    rows = 2**27 // 128_256  # of 2,000 tokens
    assert peak_memory(LLAMA_8B, batch)["logits"] == rows * 128_256 * 8 + 2000 * 4096 * 2
    float32 = batch._replace(weight_bits=32)
    assert peak_memory(LLAMA_8B, float32)["logits"] == 128 * 128_256 * 12 + 2000 * 4096 * 4


def test_logits_of_the_whole_micro_batch_count_where_they_cannot_be_streamed():
    batch, all_logits = load(8, 500, 1000, completions=2), 2 * 1000 * 128_256 * 18
    assert peak_memory(LLAMA_8B._replace(plain_head=False), batch)["logits"] == all_logits
    assert peak_memory(LLAMA_8B, batch._replace(sharded=True))["logits"] == all_logits


def test_the_chunks_are_those_of_the_streaming_head():
    from gtpo.hooks import streaming_head

    assert streaming_head.CHUNK == {"cuda": OWN_CHUNK[16], "cpu": OWN_CHUNK[32]}
    assert streaming_head.LEAST == OWN_ROWS


def test_without_checkpointing_every_layer_keeps_its_activations():
    few, many = (
        peak_memory(LLAMA_8B, load(1, 500, 500, checkpointing=checkpointing))["activations"]
        for checkpointing in (True, False)
    )
    one_layer = 1000 * (16 * 4096 + 2 * 1024 + 4 * 14_336 + 32 * 1000) * 2
    assert many == 33 * one_layer and few == 2 * one_layer + 32 * 1000 * 4096 * 2


def test_sampling_and_training_take_turns_so_the_larger_one_counts():
    parts = peak_memory(LLAMA_8B, load(512, unsloth=True))
    assert parts["activations"] == parts["logits"] == 0
    cache = 512 * 1000 * 32 * 2 * 1024 * 2
    prefill = 512 * 100 * (4 * 4096 + 2 * 14_336) * 2
    assert parts["sampling"] == cache + prefill + 512 * 128_256 * 12


def test_unsloth_trains_on_the_weights_in_vllms_share():
    parts = peak_memory(LLAMA_8B, load(512, unsloth=True, vllm_bytes=40 * GIB))
    assert parts["vLLM"] == 40 * GIB and parts["sampling"] == parts["weights"] == 0
    too_small_a_share = load(8, unsloth=True, vllm_bytes=GIB)
    assert peak_memory(LLAMA_8B, too_small_a_share)["vLLM"] == 2 * 8_030_261_248


def test_trl_has_weights_of_its_own_beside_vllms_share():
    parts = peak_memory(LLAMA_8B, load(8, vllm_bytes=40 * GIB))
    assert parts["vLLM"] == 40 * GIB and parts["sampling"] == 0
    assert parts["weights"] == 2 * 8_030_261_248


def test_a_small_float32_model_counts_twice_while_it_samples_with_its_adapter_merged():
    small = LLAMA_8B._replace(parameters=2**28, quantizable=2**28)
    batch = load(512, weight_bits=32)
    cache = 512 * 1000 * 32 * 2 * 1024 * 4
    prefill = 512 * 100 * (4 * 4096 + 2 * 14_336) * 4
    without_copy = cache + prefill + 512 * 128_256 * 12
    assert peak_memory(small, batch)["sampling"] == without_copy + 4 * 2**28
    # A larger model is not merged.
    larger = small._replace(quantizable=2**28 + 1)
    assert peak_memory(larger, batch)["sampling"] == without_copy


def test_a_checkpoint_holds_adapter_optimizer_and_tokenizer():
    expected = 335_544_320 * 12 + 17 * 10**6 + 2**20
    assert checkpoint_bytes(LLAMA_8B, 8, 17 * 10**6) == expected
    names = ("adamw_torch", "paged_adamw_8bit", "adamw_8bit", "sgd")
    assert [optimizer_bytes(name) for name in names] == [8, 2.1, 2.1, 8]


# ---- the estimate against a GPU


@pytest.fixture
def qwen_3b(tmp_path) -> ModelSize:
    from transformers import Qwen2Config

    Qwen2Config(
        vocab_size=151_936,
        hidden_size=2048,
        intermediate_size=11_008,
        num_hidden_layers=36,
        num_attention_heads=16,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(tmp_path)
    return model_size(ModelSection(model_name=str(tmp_path)), lora(16))


@pytest.mark.parametrize(
    "case, most, values",
    [
        ("--backend transformers", 1.1, {"checkpointing": False}),  # as that run had it
        ("--backend unsloth", 2.2, {"unsloth": True}),  # Unsloth keeps less than it might
        ("--backend unsloth --bits 4", 3.2, {"unsloth": True, "weight_bits": 4}),
    ],
)
def test_the_estimate_is_above_what_an_h200_used(qwen_3b, case, most, values):
    """The steps in docs/gpu: 8 completions of at most 1,024 tokens after a prompt of 256 tokens."""
    report = json.loads((ROOT / "docs/gpu/2026-11-27-NVIDIA-H200-03e5e3f.json").read_text())
    figures = report["cases"][f"step qwen2.5-3b {case}"]
    # The allocator's figures do not contain the CUDA context.
    used = figures["peak_bytes"]["GTPO"] + figures["weights_bytes"]
    parts = peak_memory(qwen_3b, load(8, 256, 1024, completions=8, **values))
    assert 1.0 < (sum(parts.values()) - LIBRARIES) / used < most


# ---- what is free


def demo_recipe(*flags: str):
    return read_recipe([str(ROOT / "recipes/demo.yaml"), *flags])


def test_too_little_memory_is_refused_with_three_keys_that_save(monkeypatch):
    size = ModelSize(
        parameters=10**9,
        quantizable=9 * 10**8,
        adapter=10**7,
        layers=10,
        hidden=1000,
        intermediate=4000,
        kv=500,
        heads=10,
        vocabulary=100_000,
        plain_head=False,
    )
    monkeypatch.setattr(memory, "free_memory", lambda cuda: (2 * GIB, "the card"))
    expected = (
        r"at worst .* GiB \(logits .*\), and the card has 2.0 GiB free; lower"
        " training.per_device_train_batch_size, model.max_seq_length, training.max_prompt_length"
    )
    with pytest.raises(RecipeError, match=expected):
        memory.check_memory(
            demo_recipe("--model.max_seq_length", "2000"),
            size,
            backend="transformers",
            processes=1,
            longest_prompt=60,
            optimizer_bytes=8,
        )
    parts = {"sampling": 5, "weights": 3, "libraries": 1}
    first, *_ = memory.keys_that_save(parts, DeviceLoad(1, 1, 1, 1))
    assert first == "training.gradient_accumulation_steps"


def test_the_disk_must_hold_the_checkpoints_that_stay_and_the_completions():
    def disk(*flags: str, free=10**12) -> str:
        recipe = demo_recipe(*flags)
        return memory.check_disk(recipe, GIB // 2, free=free, problems=2000, processes=1)

    assert disk("--training.save_steps", "10").startswith(
        "at most 5.5 GiB (11 checkpoints of 512 MiB, completions.jsonl 0.005)"
    )
    two_stay = ["--training.save_total_limit", "2"]
    assert disk("--training.save_steps", "10", *two_stay).startswith(
        "at most 1.5 GiB (3 checkpoints"
    )
    assert disk("--training.save_steps", "0.25").startswith("at most 2.5 GiB (5 checkpoints")
    expected = "and the disk has 1.0 GiB free; set training.save_total_limit"
    with pytest.raises(RecipeError, match=expected):
        disk(free=GIB)
