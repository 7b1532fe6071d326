"""Make a rollout's groups whole: gather them over processes and mark their conflict runs.

Letters: N rows of all processes, B rows of this process, G group size, T completion columns.
"""

import torch
from accelerate import Accelerator
from torch import Tensor

from gtpo import shaping


def whole_groups(
    rollout: dict[str, Tensor], rewards: Tensor, size: int, accelerator: Accelerator
) -> dict[str, Tensor]:
    """The rows of all processes with their conflict runs.

    `rollout` holds this process's `completion_ids` and `completion_mask`, (B, T), `advantages`,
    (B,), and for tool calls `tool_mask`, (B, T). `rewards` are those of all processes, (N,), NaN
    for an unscored completion. The `size` rows of a group stand after each other, and a group may
    be spread over processes.

    Returns `completion_ids`, `completion_mask`, `prefix` and `suffix`, all (N, T), and
    `advantages`, (N,), without rounding. T is the longest completion of any process. Tool output is
    masked, so it counts as no token.
    """
    mask = rollout["completion_mask"]
    if "tool_mask" in rollout:
        mask = mask * rollout["tool_mask"]
    ids, mask = (
        accelerator.gather(accelerator.pad_across_processes(tensor.contiguous(), dim=1))
        for tensor in (rollout["completion_ids"], mask)
    )
    advantages = without_rounding(
        accelerator.gather(rollout["advantages"]).view(-1, size), rewards.view(-1, size)
    )
    runs = [
        shaping.conflict_runs(*group)
        for group in zip(ids.split(size), mask.split(size), advantages, strict=True)
    ]
    prefix, suffix = (torch.cat(side) for side in zip(*runs, strict=True))
    return {
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages.flatten(),
        "prefix": prefix,
        "suffix": suffix,
    }


def without_rounding(advantages: Tensor, rewards: Tensor) -> Tensor:
    """`advantages` with 0 where the reward equals its group's mean; all (groups, G).

    "Equals" means a distance below 1e-6 max(1, max |R|). The float32 mean of equal rewards is not
    exactly those rewards, and a division by their standard deviation enlarges the rest. That rest
    must not count as a sign.
    """
    largest = rewards.nan_to_num(0.0).abs().amax(dim=1, keepdim=True).clamp(min=1.0)
    distance = (rewards - rewards.nanmean(dim=1, keepdim=True)).abs()
    return torch.where(distance < 1e-6 * largest, 0.0, advantages)


def conflict_fractions(groups: dict[str, Tensor], size: int) -> tuple[float, float]:
    """The share of tokens that are conflict tokens, and the share of groups that have any."""
    conflicts = groups["prefix"] | groups["suffix"]  # (N, T)
    of_tokens = conflicts.sum() / groups["completion_mask"].sum().clamp(min=1)
    of_groups = conflicts.any(dim=1).view(-1, size).any(dim=1).float().mean()
    return of_tokens.item(), of_groups.item()
