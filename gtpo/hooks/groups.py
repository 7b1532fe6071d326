"""Make a rollout's groups whole: gather them over processes and mark their conflict runs.

Letters: N rows of all processes, B rows of this process, G group size, T completion columns, F
reward functions.
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
    (B,), and for tool calls `tool_mask`, (B, T). `rewards` are the `compared_rewards` of all
    processes, (N,). The `size` rows of a group stand after each other, and a group may
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


def compared_rewards(table: Tensor, weights: Tensor, size: int, aggregation: str) -> Tensor:
    """What the completions of a group are compared by, (N,); NaN where no function scores one.

    `table` (N, F) holds the rewards of each function, NaN where it does not score a completion.
    With TRL's aggregation "sum_then_normalize" this is their sum, weighted by `weights` (F,). With
    "normalize_then_sum", the rewards of each function are first centred and scaled in their group,
    as TRL does (trl 1.13.0, `_generate_and_score_completions`). Rounding is removed before that.
    """
    rewards = table
    if aggregation == "normalize_then_sum":
        groups = table.view(-1, size, table.shape[1])
        deviations = deviations_from_mean(groups)
        count = deviations.isfinite().sum(dim=1, keepdim=True)
        variance = deviations.square().nansum(dim=1, keepdim=True) / (count - 1)
        rewards = (deviations / (variance.sqrt() + 1e-4)).view_as(table)
    weighted = (rewards * weights.to(table.device)).nansum(dim=1)
    return torch.where(table.isnan().all(dim=1), torch.nan, weighted)


def deviations_from_mean(rewards: Tensor) -> Tensor:
    """The distance of rewards from the mean of their group, which is dimension 1.

    A distance below 1e-6 max(1, max |R|) is 0. The float32 mean of equal rewards is not exactly
    those rewards.
    """
    largest = rewards.nan_to_num(0.0).abs().amax(dim=1, keepdim=True).clamp(min=1.0)
    distance = rewards - rewards.nanmean(dim=1, keepdim=True)
    return torch.where(distance.abs() < 1e-6 * largest, 0.0, distance)


def without_rounding(advantages: Tensor, rewards: Tensor) -> Tensor:
    """`advantages` with 0 where the reward equals its group's mean; all (groups, G).

    A division by the standard deviation of equal rewards enlarges what rounding has left of them.
    That rest must not count as a sign.
    """
    return torch.where(deviations_from_mean(rewards) == 0, 0.0, advantages)


def frac_without_signal(rewards: Tensor, size: int) -> float:
    """The share of groups that teach nothing, from the `compared_rewards` of all processes.

    In such a group all rewards are equal, or fewer than two completions have one.
    """
    deviations = deviations_from_mean(rewards.view(-1, size))
    return (deviations.isnan() | (deviations == 0)).all(dim=1).float().mean().item()


def conflict_fractions(groups: dict[str, Tensor], size: int) -> tuple[float, float]:
    """The share of tokens that are conflict tokens, and the share of groups that have any."""
    conflicts = groups["prefix"] | groups["suffix"]  # (N, T)
    of_tokens = conflicts.sum() / groups["completion_mask"].sum().clamp(min=1)
    of_groups = conflicts.any(dim=1).view(-1, size).any(dim=1).float().mean()
    return of_tokens.item(), of_groups.item()
