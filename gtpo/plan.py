"""What a recipe would do, told without loading anything: `--dry-run`."""

import os
import sys

from gtpo.data import count_rows
from gtpo.recipe import Recipe
from gtpo.recipe.batch import batch_plan, log_batch_plan, optimizer_steps
from gtpo.recipe.yaml_text import to_yaml


def print_plan(recipe: Recipe, processes: int) -> None:
    """The resolved recipe on stdout, as YAML that can be fed back in; what it would do on
    stderr.
    """
    values, secrets = recipe.saved()
    to_yaml(values, sys.stdout)
    sys.stdout.flush()
    plan = batch_plan(recipe, processes)
    log_batch_plan(recipe, plan, processes)
    steps = optimizer_steps(recipe, count_rows(recipe.dataset), processes)
    total = "known when the dataset is loaded"
    if steps is not None:
        note = f" ({steps.note}, before the length filter)" if steps.note else ""
        total = f"{steps.count}{note}"
    run_dir = recipe.output_dir()
    lines = [
        (
            f"{plan.prompts_per_step:g} prompt{'' if plan.prompts_per_step == 1 else 's'} x"
            f" {recipe.training.num_generations} generations per optimizer"
            f" step{f' ({processes} processes)' if processes > 1 else ''}"
        ),
        f"steps: {total}",
        (
            f"max_completion_length: {recipe.max_completion_length} tokens, after prompts of at"
            f" most {recipe.max_prompt_length}"
        ),
        f"run directory: {run_dir}{' (exists already)' if os.path.exists(run_dir) else ''}",
    ]
    if secrets:
        lines.append(f"left out of the recipe above: {', '.join(secrets)}")
    print("\n".join(lines), file=sys.stderr)
