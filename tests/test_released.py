"""The released code: its golden `reference` columns, and the trainer that reproduces its logs."""

import gradients
import pytest
import torch
from test_shaping import by_name, golden

from custom_trainer import released
from gtpo import gtpo_training, shaping


@pytest.mark.parametrize("case", golden("conflict_cases.json"), ids=by_name)
def test_golden_conflicts_follow_the_released_code(case):
    weights, conflict_mask, n_conflict = released.released_conflicts(
        torch.tensor(case["ids"]),
        torch.tensor(case["mask"]),
        torch.tensor(case["advantages"], dtype=torch.float64),
        pad_id=case["pad_id"],
        vocab_size=case["vocab_size"],
        weight=case["w_raw"],
    )
    expected = case["reference"]
    assert torch.equal(weights, torch.tensor(expected["delta"], dtype=torch.float64))
    assert conflict_mask.int().tolist() == expected["conflict_mask"]
    assert n_conflict.tolist() == expected["n_conflict"]


@pytest.mark.parametrize("case", golden("objective_cases.json"), ids=by_name)
def test_golden_objective_follows_the_released_code(case):
    expected, knobs = case["reference"], case["knobs"]
    hidden = torch.tensor(case["hidden"], dtype=torch.float64, requires_grad=True)
    ids, mask = torch.tensor(case["ids"]), torch.tensor(case["mask"])
    advantages = torch.tensor(case["advantages"], dtype=torch.float64)
    head = torch.tensor(case["lm_head"], dtype=torch.float64)
    log_probs = (hidden[:, :-1] @ head.T).log_softmax(-1)
    weights, _, n_conflict = released.released_conflicts(
        ids, mask, advantages, pad_id=knobs["pad_id"], vocab_size=case["V"], weight=knobs["w_raw"]
    )
    losses, entropy, kept, coefficient = released.released_loss(
        log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1),
        log_probs,
        mask,
        advantages,
        weights,
        n_conflict,
        scale=knobs["gamma"],
        threshold=knobs["reference_ent_threshold"],
        eps=knobs["eps"],
    )
    losses.sum().backward()
    for computed, name in (
        (entropy, "entropies"),
        (coefficient, "coef"),
        (weights, "delta"),
        (losses, "loss_per_completion"),
        (losses.sum(), "loss"),
        (hidden.grad, "grad_hidden"),
    ):
        value = torch.tensor(expected[name], dtype=torch.float64)
        assert torch.allclose(computed.detach(), value, rtol=0, atol=1e-9), name
    assert kept.int().tolist() == expected["gate"] and n_conflict.tolist() == expected["n_conflict"]


def odd_ones_win(completions, **kwargs):
    """Pays every second completion, so that equal completions conflict over their whole length."""
    return [float(i % 2) for i in range(len(completions))]


@pytest.mark.slow
def test_the_trainers_loss_is_the_one_in_the_released_logs(tmp_path):
    """The loss is sum_i -(A_i - 0.1 H_i) (sum_t lambda_{i,t} / |o_i|) / max(n_i, 1).

    The gate is on, although the initial entropy is above the threshold.
    """
    trainer = gradients.make_trainer(
        "custom_trainer.released.ReleasedGTPOTrainer",
        str(tmp_path),
        peaked=4.0,
        num_generations=8,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        reward=odd_ones_win,
    )
    gtpo_training.ENT_THRESHOLD = 0.5
    seen = gradients.record_steps(trainer)
    losses, compute_loss = [], trainer.compute_loss

    def recorded(model, inputs, *args, **kwargs):
        loss = compute_loss(model, inputs, *args, **kwargs)
        losses.append((inputs, trainer.seen_by_loss["completion_entropy"]))
        return loss

    trainer.compute_loss = recorded
    trainer.initial_entropy = 99.0  # above the threshold: the paper's gate would be off
    try:
        trainer.train()
    finally:
        gtpo_training.ENT_THRESHOLD = 0.7
    rollout = seen["rollouts"][0]  # one group; TRL shuffles it later, which changes no sum
    ids, mask, advantages = (
        rollout[name] for name in ("completion_ids", "completion_mask", "advantages")
    )
    prefix, suffix = shaping.conflict_runs(ids, mask, advantages)
    weights = shaping.token_weights(prefix, advantages, 2.0) * shaping.token_weights(
        suffix, advantages, 2.0
    )
    longer = torch.maximum(prefix.sum(1), suffix.sum(1)).clamp(min=1)
    entropy = entropy_by_row(rollout, *losses[0])
    coefficient = torch.where(entropy <= 0.5, advantages - 0.1 * entropy, 0.0)
    expected = -(coefficient * (weights * mask).sum(1) / mask.sum(1) / longer).sum()
    assert (prefix & suffix).any() and (entropy > 0.5).any() and longer.max() > 1
    assert seen["logs"][0]["loss"] == pytest.approx(expected.item(), abs=1e-5)


def entropy_by_row(rollout, batch, shuffled):
    """The entropies of the shuffled micro-batch `batch` in the order of the rollout."""
    rows = [
        next(
            i
            for i in range(len(shuffled))
            if torch.equal(batch["completion_ids"][i], ids)
            and torch.equal(batch["prompt_ids"][i], prompt)
        )
        for ids, prompt in zip(rollout["completion_ids"], rollout["prompt_ids"], strict=True)
    ]
    return shuffled[rows]
