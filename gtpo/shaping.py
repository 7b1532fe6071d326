"""The method: GTPO as pure tensor functions, one per symbol of the paper (arXiv 2508.03772, v5).

    J = E[ 1/G  sum_i  delta_i (A_i - gamma <H>_i) / |o_i|  sum_t  r_{i,t} lambda_{i,t} ]

    lambda_{i,t}                 `token_weights`, of the tokens in `conflict_tokens`
    <H>_i                        `mean_entropy`
    delta_i                      `entropy_filter`
    delta_i (A_i - gamma <H>_i)  `shaped_advantages`

There are no constants, no state and no logs here. `gtpo.gtpo_training` decides when each function
is called. The arithmetic is float32 at least; wider input keeps its dtype.

Letters: B rows of a micro-batch, G group size, T completion columns, W loss columns. Entropies are
in nats. "Real" tokens are those whose mask is 1.
"""

import torch
from torch import Tensor


def conflict_runs(ids: Tensor, mask: Tensor, advantages: Tensor) -> tuple[Tensor, Tensor]:
    """The prefix run and the suffix run of every completion of one group, two bool (G, T).

    A token is in conflict if its id stands at the same place in a completion of the other sign. Of
    the two, one has A > 0 and the other A < 0. The prefix run is the unbroken run of conflicting
    tokens that begins at the first real token, with the group aligned on the left. The suffix run
    is the unbroken run that ends at the last real token, with the group aligned on the right.

    `ids` and `mask` are (G, T), `advantages` is (G,). Places are counted over real tokens alone. A
    group whose advantages have one sign has no conflicts.
    """
    prefix = _leading_run(ids, mask.bool(), advantages)
    suffix = _leading_run(ids.flip(1), mask.bool().flip(1), advantages).flip(1)
    return prefix, suffix


def conflict_tokens(ids: Tensor, mask: Tensor, advantages: Tensor) -> Tensor:
    """The conflict tokens of one group, bool (G, T): prefix run or suffix run.

    The arguments are those of `conflict_runs`.
    """
    prefix, suffix = conflict_runs(ids, mask, advantages)
    return prefix | suffix


def token_weights(conflicts: Tensor, advantages: Tensor, weight: float) -> Tensor:
    """lambda, (G, T): `weight` on conflict tokens of A > 0, 0 on those of A < 0, and 1 elsewhere.

    `conflicts` is bool (G, T), `advantages` is (G,). `weight` is 2 in the paper.
    """
    advantages = _at_least_float32(advantages)
    on_conflict = torch.where(advantages > 0, weight, 0.0).to(advantages.dtype)  # (G,)
    return torch.where(conflicts, on_conflict.unsqueeze(1), 1.0)


def mean_entropy(entropies: Tensor, mask: Tensor) -> Tensor:
    """<H>_i, (B,): the mean entropy over the real tokens of each completion, in nats.

    `entropies` and `mask` are (B, W). A completion without a real token gets 0.
    """
    mask = mask.bool()
    total = torch.where(mask, _at_least_float32(entropies), 0.0).sum(dim=1)
    return total / mask.sum(dim=1).clamp(min=1)


def entropy_filter(entropy: Tensor, initial: float | None, threshold: float) -> Tensor:
    """delta_i, bool (B,): True keeps completion i, False switches it off.

    All are kept if <H>_ini is above the threshold. Otherwise those are kept whose <H>_i is at most
    the threshold; the paper's threshold is ln 2. `entropy` is <H>_i, (B,). `initial` is <H>_ini;
    None, not measured yet, counts as not above.
    """
    if initial is not None and initial > threshold:
        return torch.ones_like(entropy, dtype=torch.bool)
    return ~(entropy > threshold)


def shaped_advantages(advantages: Tensor, entropy: Tensor, kept: Tensor, scale: float) -> Tensor:
    """delta_i (A_i - gamma <H>_i), (B,): what multiplies the ratio and the weight of each token.

    `advantages` is A_i, `entropy` is <H>_i, `kept` is delta_i, all (B,), and `scale` is gamma. The
    entropy carries no gradient. The result is exactly 0 where `kept` is False.
    """
    return torch.where(kept, _at_least_float32(advantages) - scale * entropy.detach(), 0.0)


def to_loss_columns(weights: Tensor, mask: Tensor) -> Tensor:
    """`weights`, (B, T), moved to the columns of the loss, (B, W).

    Row i of the result begins at the first column that row i of `mask`, (B, W), leaves in. TRL's
    loss has the completion's own columns, so W = T. Unsloth packs whole rows to the left, so each
    completion begins at another column there. Columns outside the completion get 0. A row without a
    real token stays where it is.
    """
    if weights.shape[1] == 0 or mask.shape[1] == 0:
        return weights.new_zeros(mask.shape)
    start = mask.to(torch.int8).argmax(dim=1, keepdim=True)  # (B, 1); the first of equals
    column = torch.arange(mask.shape[1], device=weights.device) - start  # (B, W)
    inside = (column >= 0) & (column < weights.shape[1])
    return torch.where(inside, weights.gather(1, column.clamp(0, weights.shape[1] - 1)), 0.0)


def to_completion_columns(values: Tensor, mask: Tensor, width: int) -> Tensor:
    """`values` of the loss, (B, W), moved back to the completion's own columns, (B, width).

    This is the inverse of `to_loss_columns`. A column that `mask`, (B, W), leaves out gets NaN:
    what Unsloth's loss holds there belongs to no token. If W is `width`, nothing changes.
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
    # Real tokens first, in their order. Masked columns inside a completion are skipped too.
    real_first = torch.argsort(~mask, dim=1, stable=True)
    packed, real = ids.long().gather(1, real_first), mask.gather(1, real_first)
    # The masked columns of each row get an id that no other row has, so they match nothing.
    no_token = -1 - torch.arange(len(ids), device=ids.device).unsqueeze(1)
    packed = torch.where(real, packed, no_token)
    positive, negative = advantages > 0, advantages < 0
    # (G+, G-, T). Pairs of completions are much cheaper than a table over the vocabulary.
    same = packed[positive].unsqueeze(1) == packed[negative].unsqueeze(0)
    conflict = torch.zeros_like(mask)
    conflict[positive], conflict[negative] = same.any(dim=1), same.any(dim=0)
    run = conflict.long().cumprod(dim=1).bool()
    return torch.zeros_like(mask).scatter(1, real_first, run)


def _at_least_float32(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
