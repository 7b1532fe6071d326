"""What a recipe would do, told without loading anything: `--dry-run`."""

import os
import sys

from gtpo.data import count_rows
from gtpo.recipe import Recipe
from gtpo.recipe.command_line import to_yaml
from gtpo.runs.arguments import batch_plan, say_batch_plan, steps


def print_plan(recipe: Recipe, processes: int) -> None:
    """The resolved recipe on stdout, as YAML that can be fed back in; what it would do on
    stderr.
    """
    values, secrets = recipe.saved()
    to_yaml(values, sys.stdout)
    sys.stdout.flush()
    plan = batch_plan(recipe, processes)
    say_batch_plan(recipe, plan, processes)
    total = steps(recipe, plan, count_rows(recipe.dataset))
    run_dir = recipe.output_dir()
    lines = [
        (
            f"{plan.prompts_per_step:g} prompt{'' if plan.prompts_per_step == 1 else 's'} x"
            f" {recipe.training.num_generations} generations per optimizer"
            f" step{f' ({processes} processes)' if processes > 1 else ''}"
        ),
        f"steps: {total or 'known when the dataset is loaded'}",
        (
            f"max_completion_length: {recipe.max_completion_length} tokens, after prompts of at"
            f" most {recipe.max_prompt_length}"
        ),
        f"run directory: {run_dir}{' (exists already)' if os.path.exists(run_dir) else ''}",
    ]
    if secrets:
        lines.append(f"left out of the recipe above: {', '.join(secrets)}")
    print("\n".join(lines), file=sys.stderr)
