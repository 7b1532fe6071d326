"""A rollout's groups made whole: gathered over all processes, freed of rounding, with their
conflict runs marked.
"""

import torch
from accelerate import Accelerator
from torch import Tensor

from gtpo import shaping


def whole_groups(
    rollout: dict[str, Tensor], rewards: Tensor, size: int, accelerator: Accelerator
) -> dict[str, Tensor]:
    """`completion_ids`, `completion_mask`, `prefix`, `suffix`, all (N, T), and `advantages` (N,),
    of all processes.

    N rows, `size` after each other per group (a group may be spread over processes); T is the
    longest completion of any process. `rewards` (N,) tell rounding from a difference; NaN where a
    completion is unjudged. Masked tool output counts as no token.
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
    """`advantages` with 0 where the reward is the mean of its group, but for 1e-6 max(1, max |R|);
    both (groups, G).

    A float32 group mean leaves rounding behind where all rewards are equal, which a division by a
    standard deviation then magnifies; it must not count as a sign.
    """
    largest = rewards.nan_to_num(0.0).abs().amax(dim=1, keepdim=True).clamp(min=1.0)
    distance = (rewards - rewards.nanmean(dim=1, keepdim=True)).abs()
    return torch.where(distance < 1e-6 * largest, 0.0, advantages)


def conflict_fractions(groups: dict[str, Tensor], size: int) -> tuple[float, float]:
    """The share of tokens that are conflict tokens, and the share of groups that have any."""
    conflicts = groups["prefix"] | groups["suffix"]
    of_tokens = conflicts.sum() / groups["completion_mask"].sum().clamp(min=1)
    of_groups = conflicts.any(dim=1).view(-1, size).any(dim=1).float().mean()
    return of_tokens.item(), of_groups.item()
