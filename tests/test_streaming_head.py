"""The head that never holds all logits: the same log-probs, entropies and gradients, and TRL's own
path where it cannot.
"""

import gradients
import pytest
import torch
import trl

from custom_trainer.original import UnslothGRPOTrainer
from gtpo.hooks import streaming_head
from gtpo.hooks.streaming_head import StreamingHead, log_probs_and_entropies, stream_log_probs


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-5)])
# one at a time, and a number that does not divide all
@pytest.mark.parametrize("rows", [1, 7, 10**6, None])
# nearly uniform, ordinary, one token certain
@pytest.mark.parametrize("scale, temperature", [(0.1, 1.0), (3.0, 1.0), (3.0, 0.6), (300.0, 1.0)])
def test_values_and_gradients_are_those_of_whole_logits(dtype, bound, rows, scale, temperature):
    torch.manual_seed(0)
    hidden = torch.randn(3, 5, 8, dtype=dtype).requires_grad_()
    weight, ids = torch.randn(50, 8, dtype=dtype) * scale, torch.randint(0, 50, (3, 5))
    upstream = torch.randn(3, 5, dtype=dtype)
    found, entropies = log_probs_and_entropies(hidden, weight, ids, rows, temperature)
    (gradient,) = torch.autograd.grad((found * upstream).sum(), hidden)
    exact = hidden.detach().double().requires_grad_()
    log_p = (exact @ weight.double().T / temperature).log_softmax(-1)
    expected = log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    (expected_gradient,) = torch.autograd.grad((expected * upstream).sum(), exact)
    assert torch.allclose(found.double(), expected, rtol=bound, atol=bound)
    assert torch.allclose(
        entropies.double(), -(log_p.exp() * log_p).sum(-1), rtol=bound, atol=bound
    )
    assert torch.allclose(gradient.double(), expected_gradient, rtol=bound, atol=bound * scale)
    assert not entropies.requires_grad and (entropies >= 0).all()


@pytest.mark.slow
def test_a_step_of_grpo_has_the_gradients_it_has_with_whole_logits_and_no_more_than_a_chunk_of_them(
    tmp_path, monkeypatch
):
    rows = []

    def counted(logits, *args, **kwargs):
        rows.append(logits.shape)
        return statistics(logits, *args, **kwargs)

    statistics = streaming_head._statistics
    monkeypatch.setattr(streaming_head, "_statistics", counted)
    monkeypatch.setattr(streaming_head, "LEAST", 5)
    monkeypatch.setattr(streaming_head, "CHUNK", {"cpu": 1, "cuda": 1})
    steps = []
    for attach in (lambda trainer: None, stream_log_probs):
        trainer = gradients.make_trainer(
            "custom_trainer.original.UnslothGRPOTrainer", str(tmp_path), num_iterations=2
        )
        attach(trainer)
        seen = gradients.watch(trainer)
        trainer.train()
        steps.append(seen["gradients"][0])
        assert bool(rows) == (attach is stream_log_probs)
    assert max(shape[0] for shape in rows) == 5
    assert (
        gradients.relative_error(steps[1], {name: g.double() for name, g in steps[0].items()})
        < 1e-5
    )


def test_gtpo_streams_by_itself_and_once(tmp_path):
    trainer = gradients.make_trainer("gtpo.gtpo_training.UnslothGTPOTrainer", str(tmp_path))
    assert (
        trainer.streaming_head.reason is None
        and stream_log_probs(trainer) is trainer.streaming_head
    )


def scaled_logits(model) -> None:
    """As a Cohere or Gemma model does: something after the head."""
    inner = model.base_model.model
    forward = inner.forward

    def scaling(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    inner.forward = scaling


def with_bias(model) -> None:
    model.get_output_embeddings().bias = torch.nn.Parameter(
        torch.zeros(model.get_output_embeddings().out_features), requires_grad=False
    )


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
def test_where_it_would_not_be_the_same_trl_computes_as_ever(tmp_path, change, reason):
    found = []
    for attach in (lambda trainer: None, StreamingHead):
        trainer = gradients.make_trainer(
            "custom_trainer.original.UnslothGRPOTrainer", str(tmp_path)
        )
        change(trainer.model)
        head = attach(trainer)
        seen = gradients.watch(trainer)
        trainer.train()
        found.append(seen["gradients"][0])
    assert reason in head.reason
    assert found[0].keys() == found[1].keys() and all(
        torch.equal(found[0][name], found[1][name]) for name in found[0]
    )


def test_trl_is_left_as_it_was_also_after_an_error(tmp_path):
    before = (
        trl.trainer.grpo_trainer.selective_log_softmax,
        trl.trainer.grpo_trainer.entropy_from_logits,
    )
    trainer = gradients.make_trainer("custom_trainer.original.UnslothGRPOTrainer", str(tmp_path))
    assert isinstance(trainer, UnslothGRPOTrainer)
    StreamingHead(trainer)
    # TypeError: 'NoneType' object is not callable
    trainer.model.base_model.model.model.forward = None
    with pytest.raises(TypeError):
        trainer._get_per_token_logps_and_entropies(
            trainer.model, torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4), 2
        )
    assert before == (
        trl.trainer.grpo_trainer.selective_log_softmax,
        trl.trainer.grpo_trainer.entropy_from_logits,
    )
    assert "forward" not in trainer.model.get_output_embeddings().__dict__


def test_a_policy_that_breaks_later_is_not_taken_for_one_that_changes_its_logits(tmp_path):
    trainer = gradients.make_trainer("gtpo.gtpo_training.UnslothGTPOTrainer", str(tmp_path))
    rows = (torch.ones(1, 4, dtype=torch.long), torch.ones(1, 4), 2)
    assert trainer._get_per_token_logps_and_entropies(trainer.model, *rows)[0].isfinite().all()
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data.fill_(torch.nan)
    assert trainer._get_per_token_logps_and_entropies(trainer.model, *rows)[0].isnan().all()
    assert trainer.streaming_head.reason is None
