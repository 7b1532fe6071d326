"""GTPO's arithmetic as pure tensor functions, one per symbol of the paper (arXiv 2508.03772).

    J = E[ 1/G  sum_i  delta_i (A_i - gamma <H>_i) / |o_i|  sum_t  r_{i,t} lambda_{i,t} ]

No constants, no state, no logging: the trainer decides when to call what. Computed in float32 at
least; wider input keeps its dtype. Letters: B rows of a micro-batch, G group size, T completion
columns, W loss columns.
"""

import torch
from torch import Tensor


def conflict_runs(ids: Tensor, mask: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """The prefix run and the suffix run of every completion of one group, two bool (G, T).

    A token is in conflict when the same id stands at the same place in a completion with A > 0 and
    in one with A < 0. The prefix run is the unbroken run of conflicting tokens from the first real
    token on (group aligned on the left); the suffix run ends at the last real token (group aligned
    on the right). `ids` and `mask` are (G, T), `advantages` (G,). Only real tokens (mask 1) exist:
    places are counted over them alone. A one-sided group has no conflicts.
    """
    prefix = _leading_run(ids, mask.bool(), advantages)
    suffix = _leading_run(ids.flip(1), mask.bool().flip(1), advantages).flip(1)
    return prefix, suffix


def conflict_tokens(ids: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """C, the conflict tokens of one group: prefix run or suffix run, bool (G, T); see
    `conflict_runs`.
    """
    prefix, suffix = conflict_runs(ids, mask, advantages)
    return prefix | suffix


def token_weights(conflicts: Tensor, advantages: Tensor, weight: float) -> Tensor:
    """lambda (G, T): `weight` on the conflict tokens of A > 0, 0 on those of A < 0, 1 everywhere
    else.
    """
    advantages = _at_least_float32(advantages)
    on_conflict = torch.where(advantages > 0, weight, 0.0).to(advantages.dtype)  # (G,)
    return torch.where(conflicts, on_conflict.unsqueeze(1), 1.0)


def mean_entropy(entropies: Tensor, mask: Tensor) -> Tensor:
    """<H>_i, the mean token entropy of each completion in nats, (B, W), (B, W) -> (B,); 0 where the
    mask is empty.
    """
    mask = mask.bool()
    total = torch.where(mask, _at_least_float32(entropies), 0.0).sum(dim=1)
    return total / mask.sum(dim=1).clamp(min=1)


def entropy_filter(entropy: Tensor, initial: float | None, threshold: float) -> Tensor:
    """delta_i, bool (B,): True keeps completion i.

    All are kept when <H>_ini is above the threshold; otherwise those with <H>_i at most the
    threshold (nats). An initial entropy that is not known yet (None) counts as not above.
    """
    if initial is not None and initial > threshold:
        return torch.ones_like(entropy, dtype=torch.bool)
    return ~(entropy > threshold)


def shaped_advantages(advantages: Tensor, entropy: Tensor, kept: Tensor, scale: float) -> Tensor:
    """delta_i (A_i - gamma <H>_i), (B,): what multiplies each token's ratio and weight; exactly 0
    where not kept.
    """
    return torch.where(kept, _at_least_float32(advantages) - scale * entropy.detach(), 0.0)


def to_loss_columns(weights: Tensor, mask: Tensor) -> Tensor:
    """The (B, T) `weights` on the loss's (B, W) columns: row i begins at the first unmasked column
    of `mask`'s row i.

    TRL's loss works on the completion's own columns (W = T). Unsloth left-packs whole rows, so that
    each completion begins at an offset of its own. Columns outside the completion get 0; a fully
    masked row stays where it is.
    """
    if weights.shape[1] == 0 or mask.shape[1] == 0:
        return weights.new_zeros(mask.shape)
    # (B, 1); argmax gives the first of equals
    start = mask.to(torch.int8).argmax(dim=1, keepdim=True)
    column = torch.arange(mask.shape[1], device=weights.device) - start  # (B, W)
    inside = (column >= 0) & (column < weights.shape[1])
    return torch.where(inside, weights.gather(1, column.clamp(0, weights.shape[1] - 1)), 0.0)


def to_completion_columns(values: Tensor, mask: Tensor, width: int) -> Tensor:
    """The inverse of `to_loss_columns`: the loss's (B, W) `values` on the completion's own (B,
    width) columns.

    NaN where `mask` leaves a column out: what Unsloth's loss holds there belongs to no token. Equal
    widths: as they are.
    """
    if mask.shape[1] == width:
        return values
    start = mask.to(torch.int8).argmax(dim=1, keepdim=True)  # (B, 1)
    column = start + torch.arange(width, device=values.device)  # (B, width)
    inside = column.clamp(0, mask.shape[1] - 1)
    known = (column < mask.shape[1]) & mask.bool().gather(1, inside)
    return torch.where(known, values.gather(1, inside), torch.nan)


def _leading_run(ids: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """The run of conflicting tokens that begins at each row's first real token, bool (G, T)."""
    # skips masked columns, also those inside a completion
    real_first = torch.argsort(~mask, dim=1, stable=True)
    packed, real = ids.long().gather(1, real_first), mask.gather(1, real_first)
    # A token id of its own for each row's masked columns: they match nothing.
    nobody = -1 - torch.arange(len(ids), device=ids.device).unsqueeze(1)
    packed = torch.where(real, packed, nobody)
    positive, negative = advantages > 0, advantages < 0
    # (G+, G-, T): no table over the vocabulary
    same = packed[positive].unsqueeze(1) == packed[negative].unsqueeze(0)
    conflict = torch.zeros_like(mask)
    conflict[positive], conflict[negative] = same.any(dim=1), same.any(dim=0)
    run = conflict.long().cumprod(dim=1).bool()
    return torch.zeros_like(mask).scatter(1, real_first, run)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
