"""The worst-case estimate, against cases computed by hand, and against what a GPU used."""

import json

import pytest
from conftest import ROOT

from gtpo.errors import RecipeError
from gtpo.recipe.sections import ModelSection
from gtpo.runs.memory import LIBRARIES, Load, Shape, checkpoint, optimizer_bytes, peak, shape

LLAMA_8B = Shape(
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


def lora(rank: int, targets=LINEAR):
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, task_type="CAUSAL_LM")


@pytest.fixture
def llama_8b(tmp_path) -> ModelSection:
    """Llama-3.1-8B's configuration, and nothing else of it."""
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


def test_the_shape_of_llama_8b_is_counted_without_its_weights(llama_8b):
    assert shape(llama_8b, lora(128)) == LLAMA_8B
    assert shape(llama_8b, lora(16)).adapter == 41_943_040
    with pytest.raises(
        RecipeError, match=r"model.target_modules: \['nothing'\] does not fit this model"
    ):
        shape(llama_8b, lora(16, ["nothing"]))


def test_weights_take_what_their_bits_say():
    def weights(**load):
        return peak(LLAMA_8B, Load(completions=1, rollout=1, prompt=1, completion=1, **load))[
            "weights"
        ]

    assert weights(bits=16) == 2 * 8_030_261_248 and weights(bits=32) == 4 * 8_030_261_248
    # weights, and the double-quantised scales of their blocks
    four_bits = 6_979_321_856 * (4 + 8 / 64 + 32 / 64 / 256) / 8
    embeddings_head_and_norms = 2 * 128_256 * 4096 + (2 * 32 + 1) * 4096
    assert weights(bits=4, unsloth=True) == int(four_bits + 2 * embeddings_head_and_norms)
    assert weights(bits=4) == int(four_bits + 4 * embeddings_head_and_norms)


def test_the_documented_recipe_by_hand():
    """8 completions of 1,500 tokens after prompts of 4,000, rank 128, an 8-bit optimizer, Unsloth
    without vLLM.
    """
    found = peak(
        LLAMA_8B,
        Load(
            completions=8,
            rollout=8,
            prompt=4000,
            completion=1500,
            bits=4,
            unsloth=True,
            optimizer=2.1,
        ),
    )
    tokens = 8 * 5500
    assert found["adapter and optimizer"] == int(335_544_320 * 10.1)
    one_layer = tokens * (8 * 4096 + 2 * 1024 + 4 * 14_336) * 2
    assert found["activations"] == tokens * 4096 * 2 * 32 + 2 * one_layer
    assert found["logits"] == int(8 * 1500 * 128_256 * 14 / 4)
    assert found["sampling"] == 0 and found["libraries"] == LIBRARIES
    assert sum(found.values()) / 2**30 == pytest.approx(
        5.31 + 3.16 + 10.74 + 15.11 + 5.02 + 1.0, abs=0.02
    )


def test_on_transformers_logits_are_streamed_and_where_they_cannot_be_trl_keeps_those_of_the_whole_micro_batch():
    load = Load(completions=2, rollout=8, prompt=500, completion=1000)
    rows = 2**27 // 128_256  # of 2,000 tokens
    assert peak(LLAMA_8B, load)["logits"] == rows * 128_256 * 8 + 2000 * 4096 * 2
    assert peak(LLAMA_8B, load._replace(bits=32))["logits"] == 128 * 128_256 * 12 + 2000 * 4096 * 4
    whole = 2 * 1000 * 128_256 * 18
    assert (
        peak(LLAMA_8B._replace(plain_head=False), load)["logits"]
        == peak(LLAMA_8B, load._replace(sharded=True))["logits"]
        == whole
    )


def test_the_chunks_are_those_of_the_streaming_head():
    from gtpo.hooks import streaming_head
    from gtpo.runs import memory

    assert (
        streaming_head.CHUNK == {"cuda": memory.OWN_CHUNK[16], "cpu": memory.OWN_CHUNK[32]}
        and streaming_head.LEAST == memory.OWN_ROWS
    )


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
    assert not shape(ModelSection(model_name=str(tmp_path)), lora(4)).plain_head


def test_without_checkpointing_every_layer_keeps_its_activations():
    few, many = (
        peak(LLAMA_8B, Load(completions=1, rollout=1, prompt=500, completion=500, checkpointing=c))[
            "activations"
        ]
        for c in (True, False)
    )
    one_layer = 1000 * (16 * 4096 + 2 * 1024 + 4 * 14_336 + 32 * 1000) * 2
    assert many == 33 * one_layer and few == 2 * one_layer + 32 * 1000 * 4096 * 2


def test_sampling_and_training_take_turns_so_the_larger_one_counts():
    found = peak(
        LLAMA_8B, Load(completions=1, rollout=512, prompt=100, completion=900, unsloth=True)
    )
    assert found["activations"] == found["logits"] == 0
    assert (
        found["sampling"]
        == 512 * 1000 * 32 * 2 * 1024 * 2
        + 512 * 100 * (4 * 4096 + 2 * 14_336) * 2
        + 512 * 128_256 * 12
    )


def test_vllm_takes_its_share_and_holds_the_weights():
    found = peak(
        LLAMA_8B,
        Load(
            completions=1,
            rollout=512,
            prompt=100,
            completion=900,
            bits=16,
            unsloth=True,
            vllm=40 * 2**30,
        ),
    )
    assert found["vLLM"] == 40 * 2**30 and found["sampling"] == found["weights"] == 0
    small = peak(
        LLAMA_8B,
        Load(
            completions=1, rollout=8, prompt=100, completion=900, bits=16, unsloth=True, vllm=2**30
        ),
    )
    assert small["vLLM"] == 2 * 8_030_261_248
    # TRL's, colocated
    beside = peak(
        LLAMA_8B,
        Load(completions=1, rollout=8, prompt=100, completion=900, bits=16, vllm=40 * 2**30),
    )
    assert (
        beside["vLLM"] == 40 * 2**30
        and beside["weights"] == 2 * 8_030_261_248
        and beside["sampling"] == 0
    )


def test_a_checkpoint_holds_adapter_optimizer_and_tokenizer():
    assert checkpoint(LLAMA_8B, 8, 17 * 10**6) == 335_544_320 * 12 + 17 * 10**6 + 2**20
    assert [
        optimizer_bytes(name) for name in ("adamw_torch", "paged_adamw_8bit", "adamw_8bit", "sgd")
    ] == [8, 2.1, 2.1, 8]


def test_float32_weights_of_a_small_model_are_there_twice_while_it_samples_with_its_adapter_merged():
    small = LLAMA_8B._replace(parameters=2**28, quantizable=2**28)
    load = Load(completions=1, rollout=512, prompt=100, completion=900, bits=32)
    plain = (
        512 * 1000 * 32 * 2 * 1024 * 4
        + 512 * 100 * (4 * 4096 + 2 * 14_336) * 4
        + 512 * 128_256 * 12
    )
    assert peak(small, load)["sampling"] == plain + 4 * 2**28
    # more than that is not merged
    assert peak(small._replace(quantizable=2**28 + 1), load)["sampling"] == plain


@pytest.fixture
def qwen_3b(tmp_path) -> Shape:
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
    return shape(ModelSection(model_name=str(tmp_path)), lora(16))


@pytest.mark.parametrize(
    "case, most, load",
    [
        ("--backend transformers", 1.1, {"checkpointing": False}),  # as it was then
        ("--backend unsloth", 2.2, {"unsloth": True}),  # which keeps less than it might
        ("--backend unsloth --bits 4", 3.2, {"unsloth": True, "bits": 4}),
    ],
)
def test_it_is_above_what_an_h200_used(qwen_3b, case, most, load):
    """The steps of docs/gpu: 8 completions of at most 1,024 tokens on a prompt of 256."""
    ran = json.loads((ROOT / "docs/gpu/2026-11-27-NVIDIA-H200-03e5e3f.json").read_text())["cases"][
        f"step qwen2.5-3b {case}"
    ]
    used = ran["peak_bytes"]["GTPO"] + ran["weights_bytes"]  # of the allocator: no CUDA context
    estimate = (
        sum(
            peak(
                qwen_3b, Load(completions=8, rollout=8, prompt=256, completion=1024, **load)
            ).values()
        )
        - LIBRARIES
    )
    assert 1.0 < estimate / used < most
