"""A run that goes on with another number of processes than it had.

Weights, optimizer, schedule, metrics and the order of the problems are the same in all processes,
so any number can take them up; with as many completions per step the updates are those of the run
that it was, as far as they depend on them. Sampling depends on the processes: each has a generator
of its own. And a rollout under way is spread over them: it cannot be taken up.
"""

from pathlib import Path

from gtpo.errors import RecipeError


def check(folder: Path, told: dict, processes: int) -> None:
    """Raises RecipeError if `processes` cannot take up the checkpoint in `folder`, whose manifest
    told `told`.
    """
    if told.get("processes", processes) != processes and told.get("within_rollout"):
        raise _within_rollout(folder, told)


def step(trainer, folder: Path, told: dict, rollout) -> int:
    """TRL's counter of micro-batches after the step that `trainer` resumes from, and generators for
    its processes.

    Raises RecipeError if a rollout does not begin there, for these processes as well as for those
    that were.
    """
    from accelerate.utils import set_seed

    args, steps = trainer.args, trainer.state.global_step
    micro_batches = steps * args.gradient_accumulation_steps
    if rollout is not None or micro_batches % (args.steps_per_generation * trainer.num_iterations):
        raise _within_rollout(folder, told)
    set_seed(args.seed + steps, device_specific=True)
    return micro_batches


def _within_rollout(folder: Path, told: dict) -> RecipeError:
    return RecipeError(
        "--resume",
        f"{folder} lies within a rollout, which is spread over {told['processes']}"
        f" process{'' if told['processes'] == 1 else 'es'}; go on with as many, or from a"
        " checkpoint between two rollouts",
    )
