"""The streaming head: the same numbers as with whole logits, or TRL's own path."""

import json
import types

import gradients
import pytest
import torch
import trl

from custom_trainer.original import UnslothGRPOTrainer
from gtpo.hooks import streaming_head
from gtpo.hooks.recorder import Recorder
from gtpo.hooks.streaming_head import StreamingHead, log_probs_and_entropies, stream_log_probs


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
# One token at a time, a number that does not divide all, all at once, and the default.
@pytest.mark.parametrize("rows", [1, 7, 10**6, None])
# Nearly uniform, ordinary, ordinary at a lower temperature, and one certain token.
@pytest.mark.parametrize("scale, temperature", [(0.1, 1.0), (3.0, 1.0), (3.0, 0.6), (300.0, 1.0)])
def test_values_and_gradients_are_those_of_whole_logits(dtype, bound, rows, scale, temperature):
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 8, dtype=dtype).requires_grad_()
    weight, ids = torch.randn(50, 8, dtype=dtype) * scale, torch.randint(0, 50, (3, 5))
    upstream = torch.randn(3, 5, dtype=dtype)
    log_probs, entropies = log_probs_and_entropies(hidden, weight, ids, rows, temperature)
    (gradient,) = torch.autograd.grad((log_probs * upstream).sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    log_p = (exact @ weight.double().T / temperature).log_softmax(-1)
    expected = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    (expected_gradient,) = torch.autograd.grad((expected * upstream).sum(), exact)
    assert torch.allclose(log_probs.double(), expected, rtol=bound, atol=bound)
    assert torch.allclose(
        entropies.double(), -(log_p.exp() * log_p).sum(-1), rtol=bound, atol=bound
    )
    assert torch.allclose(gradient.double(), expected_gradient, rtol=bound, atol=bound * scale)
    assert not entropies.requires_grad and (entropies >= 0).all()


@pytest.mark.slow
def test_a_step_of_grpo_has_the_same_gradients_and_never_more_than_a_chunk_of_logits(
    tmp_path, monkeypatch
):
    shapes = []  # of the logits that the streaming head computes

    def linear(hidden, weight):
        logits = torch.nn.functional.linear(hidden, weight)
        shapes.append(logits.shape)
        return logits

    monkeypatch.setattr(streaming_head, "F", types.SimpleNamespace(linear=linear))
    monkeypatch.setattr(streaming_head, "LEAST", 5)
    monkeypatch.setattr(streaming_head, "CHUNK", {"cpu": 1, "cuda": 1})
    steps = []
    for attach in (lambda trainer: None, stream_log_probs):
        trainer = gradients.make_trainer(
            "custom_trainer.original.UnslothGRPOTrainer", str(tmp_path), num_iterations=2
        )
        attach(trainer)
        seen = gradients.record_steps(trainer)
        trainer.train()
        steps.append(seen["gradients"][0])
        assert bool(shapes) == (attach is stream_log_probs)
    assert max(shape[0] for shape in shapes) == 5
    assert (
        gradients.relative_error(steps[1], {name: g.double() for name, g in steps[0].items()})
        < 1e-5
    )


def test_gtpos_trainer_has_a_head_of_its_own_and_gets_no_second_one(tmp_path):
    trainer = gradients.make_trainer("gtpo.gtpo_training.UnslothGTPOTrainer", str(tmp_path))
    assert trainer.streaming_head.reason is None
    assert stream_log_probs(trainer) is trainer.streaming_head


def scaled_logits(model) -> None:
    """Scales the logits after the head, as Cohere's models do."""
    inner = model.base_model.model
    forward = inner.forward

    def scaling(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    inner.forward = scaling


def with_bias(model) -> None:
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features), requires_grad=False)


def trained_head(model) -> None:
    model.get_output_embeddings().weight.requires_grad_()


@pytest.mark.slow
@pytest.mark.parametrize(
    "change, reason",
    [
        (scaled_logits, "changes its logits"),
        (with_bias, "not a frozen matrix"),
        (trained_head, "not a frozen matrix"),
    ],
)
def test_trls_own_path_stays_where_the_head_would_compute_something_else(tmp_path, change, reason):
    steps = []
    for attach in (lambda trainer: None, StreamingHead):
        trainer = gradients.make_trainer(
            "custom_trainer.original.UnslothGRPOTrainer", str(tmp_path)
        )
        change(trainer.model)
        head = attach(trainer)
        seen = gradients.record_steps(trainer)
        trainer.train()
        steps.append(seen["gradients"][0])
    assert reason in head.reason
    assert steps[0].keys() == steps[1].keys()
    assert all(torch.equal(steps[0][name], steps[1][name]) for name in steps[0])


@pytest.mark.slow
def test_a_recorder_still_sees_entropies_after_the_head_has_stepped_back(tmp_path):
    trainer = gradients.make_trainer(
        "custom_trainer.original.UnslothGRPOTrainer", str(tmp_path), max_steps=2
    )
    scaled_logits(trainer.model)
    head = StreamingHead(trainer)
    Recorder(trainer, tmp_path / "completions.jsonl")
    trainer.train()
    lines = [json.loads(line) for line in (tmp_path / "completions.jsonl").open()]
    assert head.reason and {line["step"] for line in lines} == {1, 2}
    assert all(line["entropy"] > 0 for line in lines)


def test_trls_functions_are_put_back_after_an_error_too(tmp_path):
    module = trl.trainer.grpo_trainer
    before = module.selective_log_softmax, module.entropy_from_logits
    trainer = gradients.make_trainer("custom_trainer.original.UnslothGRPOTrainer", str(tmp_path))
    assert isinstance(trainer, UnslothGRPOTrainer)
    StreamingHead(trainer)
    # A call of it is a TypeError.
    trainer.model.base_model.model.model.forward = None
    with pytest.raises(TypeError):
        trainer._get_per_token_logps_and_entropies(
            trainer.model, torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4), 2
        )
    assert before == (module.selective_log_softmax, module.entropy_from_logits)
    assert "forward" not in vars(trainer.model.get_output_embeddings())


def test_nan_weights_are_not_mistaken_for_a_model_that_changes_its_logits(tmp_path):
    trainer = gradients.make_trainer("gtpo.gtpo_training.UnslothGTPOTrainer", str(tmp_path))
    rows = (torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4), 2)
    assert trainer._get_per_token_logps_and_entropies(trainer.model, *rows)[0].isfinite().all()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(torch.nan)
    assert trainer._get_per_token_logps_and_entropies(trainer.model, *rows)[0].isnan().all()
    assert trainer.streaming_head.reason is None
