"""The program of test_processes.py: two gloo processes that share groups.

torchrun runs it in an empty folder. Each process writes what it measured to figures-RANK.json.
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

TRAINER = "gtpo.gtpo_training.UnslothGTPOTrainer"
# A group of eight, of which each process has four.
HALF_A_GROUP = {
    "num_generations": 8,
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
}


def random_groups() -> dict:
    """Three groups of four completions of two letters, with lengths 0 to 6.

    They are the same in both processes.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 2, (12, 6), generator=generator)
    lengths = torch.tensor([6, 5, 6, 4, 3, 2, 1, 3, 0, 2, 3, 3])
    mask = (torch.arange(6) < lengths.unsqueeze(1)).long()
    advantages = torch.tensor([1.0, -1, -1, 1] * 3)
    return {"completion_ids": ids, "completion_mask": mask, "advantages": advantages}


def conflicts_over_processes(accelerator: Accelerator) -> dict:
    """Whether both processes find the conflict tokens of the whole rollout in their halves."""
    rollout, half = random_groups(), 6
    first_row = accelerator.process_index * half
    own = {name: tensor[first_row:][:half] for name, tensor in rollout.items()}
    # TRL pads the completions of each process to the longest among them.
    width = int(own["completion_mask"].sum(1).max())
    own = {name: tensor[:, :width] if tensor.ndim == 2 else tensor for name, tensor in own.items()}
    groups = whole_groups(own, rollout["advantages"], 4, accelerator)
    conflicts = groups["prefix"] | groups["suffix"]
    expected = torch.cat(
        [
            shaping.conflict_tokens(*(tensor[i : i + 4] for tensor in rollout.values()))
            for i in (0, 4, 8)
        ]
    )
    equal = torch.equal(conflicts, expected)
    return {"width": width, "equal": equal, "conflicts": int(conflicts.sum())}


def recorded_over_processes(folder: str) -> dict:
    """The lines that two processes record in one file, and the token ids of each process."""
    options = {**HALF_A_GROUP, "gradient_accumulation_steps": 2}
    run = recordings.record(TRAINER, folder, **options)
    ids = [
        row[mask.bool()].tolist()
        for rollout in run["rollouts"]
        for row, mask in zip(rollout["completion_ids"], rollout["completion_mask"], strict=True)
    ]
    return {"lines": run["lines"], "ids": ids, "entropy_error": run["entropy_error"]}


def training_over_processes(folder: str) -> dict:
    """Two real steps with a group of eight, of which each process has four completions."""
    trainer = gradients.make_trainer(TRAINER, folder, max_steps=2, **HALF_A_GROUP)
    seen = gradients.record_steps(trainer)
    trainer.train()
    accelerator = trainer.accelerator
    adapter = torch.cat(
        [p.detach().flatten() for n, p in trainer.model.named_parameters() if "lora_" in n]
    )
    rollout = seen["rollouts"][0]
    ids, mask = (
        accelerator.gather(accelerator.pad_across_processes(rollout[name], dim=1))
        for name in ("completion_ids", "completion_mask")
    )
    advantages = accelerator.gather(rollout["advantages"])
    conflicts = shaping.conflict_tokens(ids, mask, advantages)
    expected = shaping.token_weights(conflicts, advantages, 2.0)
    width = rollout["token_weights"].shape[1]
    own = expected[accelerator.process_index * 4 :][:4, :width]
    adapters = accelerator.gather(adapter.unsqueeze(0))
    entropies = accelerator.gather(torch.tensor([trainer.initial_entropy]))
    return {
        "lambda": torch.equal(rollout["token_weights"], own),
        "group": len(ids),
        "signs": advantages.sign().unique().tolist(),
        "in_step": torch.equal(adapters[0], adapters[1]),
        "initial_entropies": entropies.tolist(),
    }


def rewards_over_processes(folder: str) -> dict:
    """A run whose reward function fails on every completion of the second process.

    In the first process the function logs a metric.
    """
    import hostile_rewards

    from gtpo.recipe.sections import RewardsSection
    from gtpo.rewards.guarded import GuardedRewards

    function = hostile_rewards.failing_on_the_second
    guarded = GuardedRewards(
        RewardsSection(max_failures=0.1),
        [("hostile_rewards.failing_on_the_second", function)],
        seed=1,
        file=Path(folder, "failures.jsonl"),
    )
    trainer = gradients.make_trainer(
        TRAINER, folder, reward=guarded.functions, max_steps=9, **HALF_A_GROUP
    )
    guarded.attach(trainer)
    seen = gradients.record_steps(trainer)
    trainer.train()
    return {
        "steps": trainer.state.global_step,
        "stopped_by": guarded.stopped_by,
        "failures": guarded.failures.total,
        "scored": [rollout["judged"].tolist() for rollout in seen["rollouts"]],
        "logs": seen["logs"][:-1],
    }


if __name__ == "__main__":
    accelerator = Accelerator(cpu=True)
    folder = os.getcwd()
    figures = {
        "rewards": rewards_over_processes(folder),
        "shaping": conflicts_over_processes(accelerator),
        "training": training_over_processes(folder),
        "recorded": recorded_over_processes(folder),
        "resumed": resumes.where_resumed_runs_differ(
            TRAINER, Path("resumed"), steps=[1], per_device_train_batch_size=4
        ),
    }
    with open(f"figures-{accelerator.process_index}.json", "w") as file:
        json.dump(figures, file)
    torch.distributed.destroy_process_group()
