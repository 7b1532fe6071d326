"""GTPO's formulas (arXiv 2508.03772) as plain loops, in Python floats or float64.

They are slow and literal, so that they can be read beside the paper.
"""

import torch


def conflicts(
    ids: list[list[int]], mask: list[list[int]], advantages: list[float]
) -> list[list[bool]]:
    """Whether each token of one group is in a prefix run or a suffix run."""
    real = [[t for t, m in enumerate(row) if m] for row in mask]  # columns of real tokens

    def in_conflict(i: int, place: int, from_right: bool) -> bool:
        def token(j):
            columns = real[j][::-1] if from_right else real[j]
            return ids[j][columns[place]] if place < len(columns) else None

        return any(
            advantages[i] * advantages[j] < 0 and token(j) is not None and token(j) == token(i)
            for j in range(len(ids))
        )

    marked = [[False] * len(row) for row in ids]
    for i, columns in enumerate(real):
        for from_right in (False, True):
            for place, column in enumerate(columns[::-1] if from_right else columns):
                if not in_conflict(i, place, from_right):
                    break
                marked[i][column] = True
    return marked


def token_weights(ids, mask, advantages, weight: float) -> list[list[float]]:
    """lambda: `weight` on conflict tokens where A > 0, 0 where A < 0, else 1."""
    return [
        [(weight if a > 0 else 0.0) if conflict else 1.0 for conflict in row]
        for row, a in zip(conflicts(ids, mask, advantages), advantages, strict=True)
    ]


def entropy(log_probs: torch.Tensor) -> torch.Tensor:
    """The entropy of each distribution in nats, (..., V) -> (...)."""
    return -(log_probs.exp() * log_probs).sum(-1)


def loss(
    log_probs: list[torch.Tensor],
    ids: list[list[int]],
    mask,
    advantages: list[float],
    *,
    weight: float,
    scale: float,
    threshold: float,
    initial: float | None,
    counted=None,
) -> torch.Tensor:
    """-J of one group, from the (length, V) log-probs of each completion.

    Only the ratio carries a gradient. `counted` says which tokens enter the sums; by default it is
    the mask. Unsloth leaves out some tokens that still vote.
    """
    counted = counted or mask
    weights = token_weights(ids, mask, advantages, weight)
    total = torch.zeros((), dtype=torch.float64)
    for i, row in enumerate(log_probs):
        real = [t for t, m in enumerate(counted[i]) if m]
        if not real:
            continue
        mean_entropy = sum(entropy(row[t]).item() for t in real) / len(real)
        gate_is_off = initial is not None and initial > threshold
        kept = 1.0 if gate_is_off or not mean_entropy > threshold else 0.0
        coefficient = kept * (advantages[i] - scale * mean_entropy)
        for t in real:
            logp = row[t, ids[i][t]]
            ratio = (logp - logp.detach()).exp()
            total = total + coefficient * weights[i][t] * ratio / len(real)
    return -total / len(ids)
