"""Generating with the adapter merged: the same policy, and base weights that are bit for bit what
they were.
"""

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model

from gtpo.hooks import merged_generation as merging
from gtpo.hooks.merged_generation import merged


@pytest.fixture
def model():
    return tiny.with_lora(tiny.tiny_model(tiny.tiny_tokenizer()))


IDS = torch.arange(60).reshape(3, 20)


def layers(model) -> list:
    return [module for module in model.modules() if hasattr(module, "lora_A")]


def merged_layers(model) -> int:
    with merged(model):
        return sum(layer.merged for layer in layers(model))


def test_a_merged_model_says_the_same_and_gets_its_base_weights_back(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    memory = [layer.base_layer.weight.data_ptr() for layer in layers(model)]
    expected = model(IDS).logits
    with merged(model):
        inside = model(IDS).logits
        assert all(layer.merged for layer in layers(model)) and len(layers(model)) == 14
        assert not torch.equal(
            layers(model)[0].base_layer.weight,
            before["base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight"],
        )
    assert torch.allclose(inside, expected, atol=1e-4) and expected.std() > 0.1
    with model.disable_adapter():
        # the adapter does say something
        assert not torch.allclose(model(IDS).logits, expected, atol=1e-2)
    assert not any(layer.merged for layer in layers(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert memory == [layer.base_layer.weight.data_ptr() for layer in layers(model)]
    assert torch.equal(model(IDS).logits, expected)


def test_an_exception_inside_leaves_nothing_merged(model):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(KeyboardInterrupt), merged(model):
        raise KeyboardInterrupt
    assert not any(layer.merged for layer in layers(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_exception_while_merging_leaves_nothing_merged(model, monkeypatch):
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def fails(*args, **kwargs):
        raise MemoryError

    monkeypatch.setattr(layers(model)[-1], "merge", fails)
    with pytest.raises(MemoryError), merged(model):
        pass
    assert not any(layer.merged for layer in layers(model))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_an_adapter_that_is_switched_off_stays_so(model):
    with model.disable_adapter():
        expected = model(IDS).logits
        with merged(model):
            assert torch.equal(model(IDS).logits, expected)


def test_half_precision_is_not_merged(model):
    assert merged_layers(model) == 14
    assert merged_layers(model.bfloat16()) == 0


def test_weights_that_are_cast_by_autocast_are_not_merged(model, monkeypatch):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    # a process has one precision, and trainers before had another
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    assert merged_layers(Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)) == 0


def test_large_models_are_not_merged(model, monkeypatch):
    size = sum(layer.base_layer.weight.nbytes for layer in layers(model))
    monkeypatch.setattr(merging, "MOST_BYTES", size)
    assert merged_layers(model) == 14
    monkeypatch.setattr(merging, "MOST_BYTES", size - 1)
    assert merged_layers(model) == 0


def with_options(**options):
    torch.manual_seed(1)
    return get_peft_model(
        tiny.tiny_model(tiny.tiny_tokenizer()), LoraConfig(r=4, task_type="CAUSAL_LM", **options)
    )


@pytest.mark.parametrize("options", [{"lora_dropout": 0.1}, {"use_dora": True}], ids=str)
def test_adapters_that_are_more_than_a_product_are_not_merged(options):
    assert merged_layers(with_options(target_modules=["q_proj", "v_proj"])) == 4
    assert merged_layers(with_options(target_modules=["q_proj", "v_proj"], **options)) == 0


def test_a_head_that_is_the_embedding_is_not_merged():
    torch.manual_seed(1)
    base = tiny.tiny_model(tiny.tiny_tokenizer())
    base.config.tie_word_embeddings = True
    base.lm_head.weight = base.model.embed_tokens.weight
    model = get_peft_model(
        base,
        LoraConfig(
            r=4,
            target_modules=["q_proj", "lm_head"],
            task_type="CAUSAL_LM",
            ensure_weight_tying=False,
        ),
    )
    embedding = base.model.embed_tokens.weight.clone()
    with merged(model):
        assert torch.equal(base.model.embed_tokens.weight, embedding)
        assert [
            name for name, module in model.named_modules() if getattr(module, "merged", False)
        ] == [f"base_model.model.model.layers.{i}.self_attn.q_proj" for i in (0, 1)]


def test_trl_generates_with_the_adapter_merged_and_trains_without(tmp_path):
    import gradients

    trainer = gradients.make_trainer(
        "gtpo.gtpo_training.UnslothGTPOTrainer", str(tmp_path), max_steps=2
    )
    merging.generate_merged(trainer)
    seen = {"generate": [], "loss": []}

    def note(owner, name, key):
        original = getattr(owner, name)

        def noting(*args, **kwargs):
            seen[key].append(sum(layer.merged for layer in layers(trainer.model)))
            return original(*args, **kwargs)

        setattr(owner, name, noting)

    note(trainer.model, "generate", "generate")
    note(trainer, "compute_loss", "loss")
    trainer.train()
    assert set(seen["generate"]) == {len(layers(trainer.model))} and set(seen["loss"]) == {0}
