"""GTPO as the authors' released code computes it, for people who must reproduce its logs.

The released code differs from the paper in four ways, which the trainer here reproduces:

- the loss is summed over the group instead of averaged;
- each completion's loss is divided by the length of its longer run;
- a token in both runs gets W_RAW squared;
- delta ignores the initial entropy.

The pure functions below also reproduce how padding and PAD_ID enter the released tables. They exist
for tests against the golden cases. Nothing else should use them.
"""

import torch
from torch import Tensor

from gtpo import gtpo_training, shaping


class ReleasedGTPOTrainer(gtpo_training.UnslothGTPOTrainer):
    """The only changes are the four that the head of this file lists."""

    def token_weights(self, rollout: dict[str, Tensor]) -> Tensor:
        """lambda, (N, T), with the division by the longer run and the sum over the group."""
        prefix, suffix = rollout["prefix"], rollout["suffix"]
        on_prefix = shaping.token_weights(prefix, rollout["advantages"], gtpo_training.W_RAW)
        on_suffix = shaping.token_weights(suffix, rollout["advantages"], gtpo_training.W_RAW)
        longer_run = torch.maximum(prefix.sum(1), suffix.sum(1)).clamp(min=1)  # (N,)
        # The parent averages over the G completions of a group, so a factor G makes it a sum.
        return on_prefix * on_suffix / longer_run.unsqueeze(1) * self.num_generations

    def keep(self, completion_entropy: Tensor) -> Tensor:
        """delta, bool (B,), as if the initial entropy were never above the threshold."""
        return shaping.entropy_filter(completion_entropy, None, gtpo_training.ENT_THRESHOLD)


def released_conflicts(
    ids: Tensor, mask: Tensor, advantages: Tensor, *, pad_id: int, vocab_size: int, weight: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The released token weights and `conflict_mask`, both (G, T), and `n_conflict`, (G,).

    `ids` and `mask` are (G, T), `advantages` is (G,). The released code differs from the paper in
    these places:

    - padding votes;
    - an id of `vocab_size` or more collides with the next position;
    - a token with id `pad_id` is not marked; for the suffix run, the id at the mirrored place
      decides;
    - `conflict_mask` draws the suffix run in mirrored columns.
    """
    length = ids.shape[1]
    columns = torch.arange(length)
    # (G, T): the column as far from the last token as this one is from the first
    mirrored = (mask.sum(1, keepdim=True) - 1 - columns) % max(length, 1)

    prefix = _run(ids, columns, advantages, vocab_size) & (ids != pad_id)
    # The mirrored table numbers its columns from the right end. The released code looks for
    # `pad_id` at the unmirrored place.
    mirrored_suffix = _run(ids.gather(1, mirrored), columns.flip(0), advantages, vocab_size)
    mirrored_suffix = mirrored_suffix & (ids != pad_id)
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
    """The released loss, entropy, gate and coefficient of each completion, all (G,).

    The loss of the group is the sum of the first. `logps` are the log-probs of the chosen tokens,
    (G, T), and `log_probs` those of all tokens, (G, T, V). `mask` and `weights` are (G, T);
    `advantages` and `n_conflict` are (G,). `scale` is gamma; `threshold` is in nats.
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
    """The leading run of conflicting positions of each row, bool (G, T).

    The key of a position is column x vocab_size + id. A position conflicts if a positive row and a
    negative row have its key.
    """
    keys = columns * vocab_size + ids
    shared = torch.isin(keys, keys[advantages > 0]) & torch.isin(keys, keys[advantages < 0])
    return (shared & (advantages != 0).unsqueeze(1)).long().cumprod(dim=1).bool()
