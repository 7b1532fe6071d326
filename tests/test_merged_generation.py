"""Generating with the adapter merged: the same policy, and base weights that do not change."""

import gradients
import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from gtpo.hooks import merged_generation
from gtpo.hooks.merged_generation import merged

IDS = torch.arange(60).reshape(3, 20)


@pytest.fixture
def model():
    return tiny.with_lora(tiny.tiny_model(tiny.tiny_tokenizer()))


def lora_layers(model) -> list:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def count_merged(model) -> int:
    """How many layers are merged inside `merged`."""
    with merged(model):
        return sum(layer.merged for layer in lora_layers(model))


def copied_weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before: dict[str, torch.Tensor]) -> None:
    """No layer is merged, and all weights are those of `before`, bit for bit."""
    assert not any(layer.merged for layer in lora_layers(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_merged_model_computes_the_same_and_gets_its_base_weights_back(model):
    before = copied_weights(model)
    memory = [layer.base_layer.weight.data_ptr() for layer in lora_layers(model)]
    name = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"
    expected = model(IDS).logits
    with merged(model):
        inside = model(IDS).logits
        assert all(layer.merged for layer in lora_layers(model)) and len(lora_layers(model)) == 14
        assert not torch.equal(lora_layers(model)[0].base_layer.weight, before[name])
    assert torch.allclose(inside, expected, atol=1e-4) and expected.std() > 0.1
    with model.disable_adapter():
        # so the adapter makes a difference
        assert not torch.allclose(model(IDS).logits, expected, atol=1e-2)
    assert_unchanged(model, before)
    assert memory == [layer.base_layer.weight.data_ptr() for layer in lora_layers(model)]
    assert torch.equal(model(IDS).logits, expected)


def test_after_an_exception_inside_nothing_is_merged(model):
    before = copied_weights(model)
    with pytest.raises(KeyboardInterrupt), merged(model):
        raise KeyboardInterrupt
    assert_unchanged(model, before)


def test_after_an_exception_while_merging_nothing_is_merged(model, monkeypatch):
    before = copied_weights(model)

    def fails(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(lora_layers(model)[-1], "merge", fails)
    with pytest.raises(MemoryError), merged(model):
        pass
    assert_unchanged(model, before)


def test_an_adapter_that_is_switched_off_stays_off(model):
    with model.disable_adapter():
        expected = model(IDS).logits
        with merged(model):
            assert torch.equal(model(IDS).logits, expected)


def test_half_precision_weights_are_not_merged(model):
    assert count_merged(model) == 14
    assert count_merged(model.bfloat16()) == 0


def test_weights_under_autocast_are_not_merged(model, monkeypatch):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # A process has one precision for all its trainers. Those of earlier tests had another one.
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    assert count_merged(prepared) == 0


def test_a_large_model_is_not_merged(model, monkeypatch):
    size = sum(layer.base_layer.weight.nbytes for layer in lora_layers(model))
    monkeypatch.setattr(merged_generation, "MOST_BYTES", size)
    assert count_merged(model) == 14
    monkeypatch.setattr(merged_generation, "MOST_BYTES", size - 1)
    assert count_merged(model) == 0


def with_options(**options):
    """A tiny model with an adapter on two kinds of layers in each of two blocks."""
    torch.manual_seed(1)
    return get_peft_model(
        tiny.tiny_model(tiny.tiny_tokenizer()),
        LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], **options),
    )


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
def test_an_adapter_that_is_more_than_a_matrix_product_is_not_merged(options):
    assert count_merged(with_options()) == 4
    assert count_merged(with_options(**options)) == 0


def test_a_head_that_shares_the_embeddings_weights_is_not_merged():
    torch.manual_seed(1)
    base = tiny.tiny_model(tiny.tiny_tokenizer())
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.model.embed_tokens.weight
    layers = {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": False}
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM", **layers))
    embedding = base.model.embed_tokens.weight.clone()
    with merged(model):
        assert torch.equal(base.model.embed_tokens.weight, embedding)
        names = [name for name, layer in model.named_modules() if getattr(layer, "merged", False)]
    assert names == [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


@pytest.mark.slow
def test_trl_generates_with_the_adapter_merged_and_trains_without(tmp_path):
    trainer = gradients.make_trainer(
        "gtpo.gtpo_training.UnslothGTPOTrainer", str(tmp_path), max_steps=2
    )
    merged_generation.generate_merged(trainer)
    merged_counts = {"generate": set(), "compute_loss": set()}

    def observe(owner, name):
        original = getattr(owner, name)

        def observing(*args, **kwargs):
            count = sum(layer.merged for layer in lora_layers(trainer.model))
            merged_counts[name].add(count)
            return original(*args, **kwargs)

        setattr(owner, name, observing)

    observe(trainer.model, "generate")
    observe(trainer, "compute_loss")
    trainer.train()
    assert merged_counts == {"generate": {len(lora_layers(trainer.model))}, "compute_loss": {0}}
