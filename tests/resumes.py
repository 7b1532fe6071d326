"""Trains a tiny policy straight, and again from a checkpoint in the middle.

A trainer and gtpo.runs.exact_resume are all that is needed.
"""

from pathlib import Path

import gradients

# With these options rollouts end within steps, and epochs end within the run.
OPTIONS = {
    "max_steps": 4,
    "steps_per_generation": 3,
    "num_iterations": 2,
    "optim": "adamw_torch",
    "logging_steps": 2,
    "save_strategy": "steps",
    "save_steps": 1,
}


def train(
    class_path: str,
    folder: Path,
    *,
    checkpoint=None,
    use_recipe_optimizer: bool = False,
    callback=None,
    **options,
) -> dict:
    """All that must have the same bits in a straight and a resumed run, with a recorder."""
    from gtpo.hooks.recorder import Recorder
    from gtpo.runs.exact_resume import ExactResume
    from reliability.resume_proof import drop_times

    folder.mkdir(parents=True, exist_ok=True)
    trainer = gradients.make_trainer(class_path, str(folder), **{**OPTIONS, **options})
    completions = folder / "completions.jsonl"
    # In a run, one process writes the file.
    if checkpoint and trainer.accelerator.is_main_process:
        earlier = checkpoint.folder.parent / completions.name
        completions.write_bytes(earlier.read_bytes()[: checkpoint.manifest["completions"]])
    Recorder(trainer, completions)
    if callback:
        trainer.add_callback(callback)
    ExactResume(
        trainer,
        folder,
        {"recipe": {}, "processes": trainer.accelerator.num_processes},
        checkpoint=checkpoint,
        use_recipe_optimizer=use_recipe_optimizer,
    )
    trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint.folder))
    trainer.accelerator.wait_for_everyone()  # until the main process has written its files
    return {
        "weights": {
            name: value.detach().clone()
            for name, value in trainer.model.named_parameters()
            if value.requires_grad
        },
        "optimizer": trainer.optimizer.state_dict(),
        "completions": completions.read_bytes(),
        "metrics": [drop_times(dict(line)) for line in trainer.state.log_history],
    }


def where_resumed_runs_differ(
    class_path: str, folder: Path, steps=(1, 2, 3), **options
) -> list[str]:
    """Where a run that resumes from each of `steps` differs from the straight run."""
    from gtpo.runs import checkpoints
    from reliability.resume_proof import differences

    straight = train(class_path, folder / "straight", **options)
    places = []
    for step in steps:
        checkpoint = checkpoints.read(folder / f"straight/checkpoint-{step}")
        resumed = train(class_path, folder / str(step), checkpoint=checkpoint, **options)
        places += [f"{step}{place}" for place in differences(straight, resumed)]
    return places
