"""lambda, delta and gamma against drawn examples, golden cases, and the formulas as plain loops."""

import json
import random

import pytest
import reference
import torch
from conftest import ROOT

from gtpo import shaping

NO_TOKEN = "."  # drawn padding; `_` draws a masked-out token inside a completion


def group(*rows: str):
    """The ids, mask and advantages of drawn completions, one letter per token.

    "+ abcX" has a positive advantage, "- abcY" a negative one, "0 abc" none.
    """
    width = max(len(row) - 2 for row in rows)
    texts = [row[2:].ljust(width, NO_TOKEN) for row in rows]
    ids = torch.tensor([[ord(c) for c in text] for text in texts])
    mask = torch.tensor([[int(c not in NO_TOKEN + "_") for c in text] for text in texts])
    return ids, mask, torch.tensor([{"+": 1.0, "-": -1.0, "0": 0.0}[row[0]] for row in rows])


def drawn_weights(*rows: str) -> list[str]:
    """lambda of drawn completions, one digit per token; W_RAW is 2."""
    ids, mask, advantages = group(*rows)
    weights = shaping.token_weights(shaping.conflict_tokens(ids, mask, advantages), advantages, 2.0)
    return [
        "".join(f"{w:.0f}" if m else "." for w, m in zip(*row, strict=True))
        for row in zip(weights.tolist(), mask.tolist(), strict=True)
    ]


def test_shared_prefix_is_spared_in_negative_completions():
    assert drawn_weights("+ abcX", "- abcY") == ["2221", "0001"]


def test_shared_suffix_is_aligned_from_each_completions_own_end():
    assert drawn_weights("+ Xxy..", "- ABCxy") == ["122..", "11100"]


def test_prefix_ends_at_the_first_token_that_differs_even_if_later_ones_match():
    assert drawn_weights("+ aXbY", "- aZbW") == ["2111", "0111"]


def test_a_token_in_both_runs_is_weighted_once():
    assert drawn_weights("+ abc", "- abc") == ["222", "000"]


def test_completions_without_advantage_neither_vote_nor_are_marked():
    assert drawn_weights("+ abX", "0 abY", "- cdZ") == ["111", "111", "111"]


def test_one_sided_group_has_no_conflicts():
    assert drawn_weights("+ abc", "+ abd") == ["111", "111"]


def test_padding_never_votes_and_never_matches():
    assert drawn_weights("+ ab..", "- ab..", "- XYZW") == ["22..", "00..", "1111"]


def test_masked_tokens_inside_a_completion_are_skipped_by_runs_and_alignment():
    assert drawn_weights("+ a_bX", "- abY.", "- a_bZ") == ["2.21", "001.", "0.01"]


def test_truncated_completion_shares_no_end_token():
    assert drawn_weights("+ aX$", "- bYc") == ["111", "111"]


def test_a_tiny_advantage_is_a_sign_and_negative_zero_is_none():
    ids, mask, _ = group("+ ab", "- ab")
    assert shaping.conflict_tokens(ids, mask, torch.tensor([1e-12, -1e-12])).all()
    assert not shaping.conflict_tokens(ids, mask, torch.tensor([1.0, -0.0])).any()


def test_an_empty_completion_and_a_group_without_columns_are_harmless():
    assert drawn_weights("+ ..", "- ab") == ["..", "11"]
    nothing = torch.zeros(2, 0, dtype=torch.long)
    assert shaping.conflict_tokens(nothing, nothing, torch.tensor([1.0, -1.0])).shape == (2, 0)


def golden(name: str) -> list[dict]:
    return json.loads((ROOT / "tests/golden" / name).read_text())["cases"]


def by_name(case: dict) -> str:
    return case["name"]


@pytest.mark.parametrize("case", golden("conflict_cases.json"), ids=by_name)
def test_golden_conflicts_follow_the_paper(case):
    ids, mask = torch.tensor(case["ids"]), torch.tensor(case["mask"])
    advantages = torch.tensor(case["advantages"], dtype=torch.float64)
    prefix, suffix = shaping.conflict_runs(ids, mask, advantages)
    assert prefix.int().tolist() == case["paper"]["forward"]
    assert suffix.int().tolist() == case["paper"]["backward"]
    conflicts = shaping.conflict_tokens(ids, mask, advantages)
    assert conflicts.sum(1).tolist() == case["paper"]["n_conflict_union"]
    weights = shaping.token_weights(conflicts, advantages, case["w_raw"])
    assert torch.equal(weights * mask, torch.tensor(case["paper"]["lambda"], dtype=torch.float64))


@pytest.mark.parametrize("case", golden("objective_cases.json"), ids=by_name)
def test_golden_objective_follows_the_paper(case):
    paper, knobs = case["paper"], case["knobs"]
    hidden = torch.tensor(case["hidden"], dtype=torch.float64, requires_grad=True)
    ids, mask = torch.tensor(case["ids"]), torch.tensor(case["mask"])
    advantages = torch.tensor(case["advantages"], dtype=torch.float64)
    head = torch.tensor(case["lm_head"], dtype=torch.float64)
    log_probs = (hidden[:, :-1] @ head.T).log_softmax(-1)
    logps = log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)

    entropy = shaping.mean_entropy(reference.entropy(log_probs).detach(), mask)
    kept = shaping.entropy_filter(entropy, knobs["h_ini"], knobs["paper_ent_threshold"])
    coefficient = shaping.shaped_advantages(advantages, entropy, kept, knobs["gamma"])
    weights = shaping.token_weights(
        shaping.conflict_tokens(ids, mask, advantages), advantages, knobs["w_raw"]
    )
    ratio = (logps - logps.detach()).exp()
    per_completion = -coefficient * (ratio * weights * mask).sum(1) / mask.sum(1).clamp(min=1)
    per_completion.mean().backward()

    def close(computed, expected):
        assert torch.allclose(
            computed, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9
        )

    close(entropy, paper["entropies"])
    assert kept.int().tolist() == paper["gate"]
    close(torch.where(kept, advantages - knobs["gamma"] * entropy, 0.0), paper["coef"])
    close(weights * mask, paper["lambda"])
    close(per_completion.detach(), paper["loss_per_completion"])
    close(per_completion.mean().detach(), paper["loss"])
    close(hidden.grad, paper["grad_hidden"])


def random_group(rng: random.Random):
    """The ids, mask and advantages of 2 to 8 completions from a small vocabulary.

    Some masks have holes inside a completion, as tool output leaves them.
    """
    size, width, vocabulary = rng.randint(2, 8), rng.randint(1, 9), rng.randint(1, 4)
    stem = [rng.randrange(vocabulary) for _ in range(width)]
    ids = [
        [rng.randrange(vocabulary) if rng.random() < 0.3 else token for token in stem]
        for _ in range(size)
    ]
    mask = []
    for _ in range(size):
        length = rng.randint(0, width)
        holes = rng.random() < 0.2
        mask.append([int(t < length and not (holes and rng.random() < 0.3)) for t in range(width)])
    advantages = [rng.choice([-1.5, -0.25, 0.0, 0.25, 1.5, rng.gauss(0, 1)]) for _ in range(size)]
    return ids, mask, advantages


@pytest.mark.slow
def test_four_thousand_random_groups_agree_with_the_plain_loops():
    rng = random.Random(0)
    marked = 0
    for _ in range(4000):
        ids, mask, advantages = random_group(rng)
        conflicts = shaping.conflict_tokens(
            torch.tensor(ids), torch.tensor(mask), torch.tensor(advantages)
        )
        assert conflicts.tolist() == reference.conflicts(ids, mask, advantages)
        weights = shaping.token_weights(
            conflicts, torch.tensor(advantages, dtype=torch.float64), 3.0
        )
        assert weights.tolist() == reference.token_weights(ids, mask, advantages, 3.0)
        marked += bool(conflicts.any())
    assert marked > 1000  # many of the groups have conflicts


@pytest.mark.slow
def test_random_objectives_agree_with_the_plain_loops():
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    for _ in range(300):
        ids, mask, advantages = random_group(rng)
        shape = (len(ids), len(ids[0]), 5)
        logits = torch.randn(shape, generator=generator, dtype=torch.float64) * rng.choice([1, 4])
        initial, threshold = rng.choice([None, 0.4, 1.3]), rng.choice([0.7, 1.2])
        log_probs = logits.log_softmax(-1).requires_grad_()
        expected = reference.loss(
            list(log_probs),
            ids,
            mask,
            advantages,
            weight=2.0,
            scale=0.1,
            threshold=threshold,
            initial=initial,
        )
        expected_grad = None
        if expected.requires_grad:
            (expected_grad,) = torch.autograd.grad(expected, log_probs, allow_unused=True)

        ids, mask = torch.tensor(ids), torch.tensor(mask)
        advantages = torch.tensor(advantages, dtype=torch.float64)
        entropy = shaping.mean_entropy(reference.entropy(log_probs).detach(), mask)
        kept = shaping.entropy_filter(entropy, initial, threshold)
        coefficient = shaping.shaped_advantages(advantages, entropy, kept, 0.1)
        weights = shaping.token_weights(
            shaping.conflict_tokens(ids, mask, advantages), advantages, 2.0
        )
        logps = log_probs.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
        ratio = (logps - logps.detach()).exp()
        loss = -(coefficient * (ratio * weights * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
        assert loss.item() == pytest.approx(expected.item(), abs=1e-12)
        if expected_grad is not None:
            (loss_grad,) = torch.autograd.grad(loss, log_probs)
            assert torch.allclose(loss_grad, expected_grad, rtol=0, atol=1e-12)


def test_permuting_a_group_permutes_its_weights():
    ids, mask, advantages = group("+ abX", "- abY", "+ aZY", "0 abX")
    order = torch.tensor([2, 0, 3, 1])
    conflicts = shaping.conflict_tokens(ids[order], mask[order], advantages[order])
    assert torch.equal(conflicts, shaping.conflict_tokens(ids, mask, advantages)[order])


def test_an_entropy_of_exactly_the_threshold_is_kept_and_such_a_start_leaves_the_gate_on():
    entropy = torch.tensor([0.7, 0.70001], dtype=torch.float64)
    assert shaping.entropy_filter(entropy, 0.2, 0.7).tolist() == [True, False]
    assert shaping.entropy_filter(entropy, 0.7, 0.7).tolist() == [True, False]
    assert shaping.entropy_filter(entropy, 0.8, 0.7).tolist() == [True, True]
    assert shaping.entropy_filter(entropy, None, 0.7).tolist() == [True, False]


def test_mean_entropy_ignores_masked_tokens_even_nan_and_is_zero_for_an_empty_completion():
    entropies = torch.tensor([[1.0, 3.0, float("nan")], [float("inf"), float("nan"), 5.0]])
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    assert shaping.mean_entropy(entropies, mask).tolist() == [2.0, 0.0]


def test_narrow_input_is_computed_in_float32_and_wide_input_stays_wide():
    entropies, mask = torch.ones(1, 3, dtype=torch.bfloat16), torch.ones(1, 3)
    assert shaping.mean_entropy(entropies, mask).dtype == torch.float32
    assert shaping.mean_entropy(entropies.double(), mask).dtype == torch.float64
    conflicts = torch.tensor([[True, False]])
    for given, computed in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        weights = shaping.token_weights(conflicts, torch.ones(1, dtype=given), 2.0)
        assert weights.dtype == computed


def test_weights_move_to_each_rows_first_unmasked_loss_column():
    weights = torch.tensor([[2.0, 3.0, 4.0], [5.0, 6.0, 7.0], [8.0, 9.0, 1.0], [1.0, 2.0, 3.0]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0]])
    assert shaping.to_loss_columns(weights, mask).tolist() == [
        [0.0, 0.0, 2.0, 3.0, 4.0],
        [5.0, 6.0, 7.0, 0.0, 0.0],
        [0.0, 8.0, 9.0, 1.0, 0.0],
        [1.0, 2.0, 3.0, 0.0, 0.0],
    ]


def test_weights_stay_where_they_are_when_the_loss_has_the_completions_own_columns():
    weights = torch.rand(3, 4)
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
    assert torch.equal(shaping.to_loss_columns(weights, mask), weights)


def test_values_of_the_loss_move_back_to_the_completions_columns():
    values = torch.tensor(
        [[9.0, 9, 1, 2, 3], [1, 2, 3, 9, 9], [9, 1, 2, 9, 9], [9, 9, 9, 9, 9], [9, 9, 9, 1, 2]]
    )
    mask = torch.tensor(
        [[0, 0, 1, 1, 1], [1, 1, 1, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]
    )
    back = shaping.to_completion_columns(values, mask, 3)
    assert back.nan_to_num(0.0).tolist() == [[1, 2, 3], [1, 2, 3], [1, 2, 0], [0, 0, 0], [1, 2, 0]]
    assert shaping.to_completion_columns(values, mask, 5) is values
