"""GTPO as the authors' released code computes it, for people who must reproduce its logs.

It differs from the paper: the loss is summed over the group, each completion's loss is divided by
the length of its longer run, the overlap of both runs gets the weight squared, and the gate never
looks at the initial entropy. The trainer reproduces these four. The pure functions below also
reproduce how padding and PAD_ID enter the released tables; they exist to be held against the golden
cases, and nothing else should use them.
"""

import torch
from torch import Tensor

from gtpo import gtpo_training, shaping


class ReleasedGTPOTrainer(gtpo_training.UnslothGTPOTrainer):
    """The only changes: W_RAW squared on overlaps, a division by the longer run, a sum over the
    group, a gate always on.
    """

    def token_weights(self, rollout: dict[str, Tensor]) -> Tensor:
        prefix, suffix = rollout["prefix"], rollout["suffix"]
        on_prefix = shaping.token_weights(prefix, rollout["advantages"], gtpo_training.W_RAW)
        on_suffix = shaping.token_weights(suffix, rollout["advantages"], gtpo_training.W_RAW)
        longer_run = torch.maximum(prefix.sum(1), suffix.sum(1)).clamp(min=1)  # (N,)
        # The parent averages over completions; a factor G turns the mean over a group into its sum.
        return on_prefix * on_suffix / longer_run.unsqueeze(1) * self.num_generations

    def keep(self, completion_entropy: Tensor) -> Tensor:
        return shaping.entropy_filter(completion_entropy, None, gtpo_training.ENT_THRESHOLD)


def released_conflicts(
    ids: Tensor, mask: Tensor, advantages: Tensor, *, pad_id: int, vocab_size: int, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The released code's token weights (G, T), its `conflict_mask` (G, T) and its `n_conflict`
    (G,).

    Padding votes, an id beyond `vocab_size` collides with the next position, tokens with id
    `pad_id` are not marked (in the suffix run: those whose mirrored place holds it), and
    `conflict_mask` draws the suffix run in mirrored columns.
    """
    length = ids.shape[1]
    columns = torch.arange(length)
    # (G, T): columns counted from the last token
    mirrored = (mask.sum(1, keepdim=True) - 1 - columns) % max(length, 1)

    prefix = _run(ids, columns, advantages, vocab_size) & (ids != pad_id)
    # The mirrored table numbers its columns from the right end, and the id at the *unmirrored*
    # place decides.
    mirrored_suffix = _run(ids.gather(1, mirrored), columns.flip(0), advantages, vocab_size) & (
        ids != pad_id
    )
    suffix = mirrored_suffix.gather(1, mirrored)

    weights = shaping.token_weights(prefix, advantages, weight) * shaping.token_weights(
        suffix, advantages, weight
    )
    conflict_mask = (prefix | mirrored_suffix) & mask.bool()
    n_conflict = torch.where(advantages != 0, conflict_mask.sum(1).clamp(min=1), 0)
    return weights * mask, conflict_mask, n_conflict


def released_loss(
    logps: Tensor,
    log_probs: Tensor,
    mask: Tensor,
    advantages: Tensor,
    weights: Tensor,
    n_conflict: Tensor,
    *,
    scale: float,
    threshold: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The released loss per completion (G,), with its entropies, gate and coefficients; the loss is
    their sum.

    `logps` (G, T) are the chosen tokens' log-probs, `log_probs` (G, T, V) all of them.
    """
    probs = log_probs.detach().exp()
    entropy = shaping.mean_entropy(-(probs * probs.clamp(min=eps).log()).sum(-1), mask)
    kept = shaping.entropy_filter(entropy, None, threshold)
    coefficient = shaping.shaped_advantages(advantages, entropy, kept, scale)
    ratio = (logps - logps.detach()).exp()
    per_completion = (
        (ratio * weights * mask).sum(1) / mask.sum(1).clamp(min=1) / n_conflict.clamp(min=1)
    )
    return -coefficient * per_completion, entropy, kept, coefficient


def _run(ids: Tensor, columns: Tensor, advantages: Tensor, vocab_size: int) -> Tensor:
    """The longest start of positions whose key, column x vocab_size + id, some positive and some
    negative row hold.
    """
    keys = columns * vocab_size + ids
    held = torch.isin(keys, keys[advantages > 0]) & torch.isin(keys, keys[advantages < 0])
    return (held & (advantages != 0).unsqueeze(1)).long().cumprod(dim=1).bool()
