"""Run by torchrun with two gloo processes: groups split over both, completions of unequal length on
each.
"""

import json
import os
import sys
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.join(ROOT, "tests")]

import gradients  # noqa: E402
import recordings  # noqa: E402
import resumes  # noqa: E402
import torch  # noqa: E402
from accelerate import Accelerator  # noqa: E402

from gtpo import shaping  # noqa: E402
from gtpo.hooks.groups import whole_groups  # noqa: E402


def drawn() -> dict:
    """Three groups of four from two letters, with every length from 0 to 6: the same on both
    processes.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2, (12, 6), generator=generator)
    lengths = torch.tensor([6, 5, 6, 4, 3, 2, 1, 3, 0, 2, 3, 3])
    mask = (torch.arange(6) < lengths.unsqueeze(1)).long()
    return {
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": torch.tensor([1.0, -1, -1, 1] * 3),
    }


def weights_over_processes(accelerator: Accelerator) -> dict:
    """Whether lambda, decided from what each process holds, is that of the whole rollout."""
    everything, half = drawn(), 6
    mine = {
        name: tensor[accelerator.process_index * half :][:half]
        for name, tensor in everything.items()
    }
    # TRL pads each process's completions to their own longest
    width = int(mine["completion_mask"].sum(1).max())
    mine = {
        name: tensor[:, :width] if tensor.ndim == 2 else tensor for name, tensor in mine.items()
    }
    groups = whole_groups(mine, everything["advantages"], 4, accelerator)
    found = groups["prefix"] | groups["suffix"]
    expected = torch.cat(
        [
            shaping.conflict_tokens(
                *(
                    everything[name][i : i + 4]
                    for name in ("completion_ids", "completion_mask", "advantages")
                )
            )
            for i in (0, 4, 8)
        ]
    )
    return {"width": width, "equal": torch.equal(found, expected), "conflicts": int(found.sum())}


def recorded_over_processes(folder: str) -> dict:
    """What two processes record in one file, beside the rollout of each."""
    run = recordings.record(
        "gtpo.gtpo_training.UnslothGTPOTrainer",
        folder,
        num_generations=8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
    )
    ids = [
        row[mask.bool()].tolist()
        for rollout in run["rollouts"]
        for row, mask in zip(rollout["completion_ids"], rollout["completion_mask"], strict=True)
    ]
    return {"lines": run["lines"], "ids": ids, "entropy_error": run["entropy_error"]}


def training_over_processes(folder: str) -> dict:
    """One real step with a group of eight spread over two processes of four."""
    trainer = gradients.make_trainer(
        "gtpo.gtpo_training.UnslothGTPOTrainer",
        folder,
        num_generations=8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=2,
    )
    seen = gradients.watch(trainer)
    trainer.train()
    gather = trainer.accelerator.gather
    weights = torch.cat(
        [p.detach().flatten() for n, p in trainer.model.named_parameters() if "lora_" in n]
    )
    rollout = seen["rollouts"][0]
    ids, mask = (
        gather(trainer.accelerator.pad_across_processes(rollout[name], dim=1))
        for name in ("completion_ids", "completion_mask")
    )
    advantages = gather(rollout["advantages"])
    expected = shaping.token_weights(
        shaping.conflict_tokens(ids, mask, advantages), advantages, 2.0
    )
    mine = expected[trainer.accelerator.process_index * 4 :][
        :4, : rollout["token_weights"].shape[1]
    ]
    both = gather(weights.unsqueeze(0))
    entropies = gather(torch.tensor([trainer.initial_entropy]))
    return {
        "lambda": torch.equal(rollout["token_weights"], mine),
        "group": len(ids),
        "signs": advantages.sign().unique().tolist(),
        "in_step": torch.equal(both[0], both[1]),
        "initial_entropies": entropies.tolist(),
        "one_sided_here": len(set(rollout["advantages"].sign().tolist())) == 1,
    }


def judged_over_processes(folder: str) -> dict:
    """A function that fails on everything the second process has, and logs a metric where it does
    not.
    """
    import hostile_rewards

    from gtpo.recipe.sections import RewardsSection
    from gtpo.rewards.guarded import GuardedRewards

    guarded = GuardedRewards(
        RewardsSection(max_failures=0.1),
        [("hostile_rewards.failing_on_the_second", hostile_rewards.failing_on_the_second)],
        seed=1,
        file=Path(folder, "failures.jsonl"),
    )
    trainer = gradients.make_trainer(
        "gtpo.gtpo_training.UnslothGTPOTrainer",
        folder,
        reward=guarded.functions,
        num_generations=8,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        max_steps=9,
    )
    guarded.attach(trainer)
    seen = gradients.watch(trainer)
    trainer.train()
    return {
        "steps": trainer.state.global_step,
        "stopped_by": guarded.stopped_by,
        "failures": guarded.failures.total,
        "judged": [rollout["judged"].tolist() for rollout in seen["rollouts"]],
        "logs": seen["logs"][:-1],
    }


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    figures = {
        "judged": judged_over_processes(os.getcwd()),
        "shaping": weights_over_processes(accelerator),
        "training": training_over_processes(os.getcwd()),
        "recorded": recorded_over_processes(os.getcwd()),
        "resumed": resumes.where_resumed_runs_differ(
            "gtpo.gtpo_training.UnslothGTPOTrainer",
            Path("resumed"),
            steps=[1],
            per_device_train_batch_size=4,
        ),
    }
    with open(f"figures-{accelerator.process_index}.json", "w") as file:
        json.dump(figures, file)
    torch.distributed.destroy_process_group()
