"""A recipe's problems: those to train on, and those held out to evaluate."""

import contextlib
import os

from gtpo.data import check_source, load_problems, measured_problems
from gtpo.errors import Mistake, RecipeError
from gtpo.recipe import Recipe
from gtpo.recipe.batch import check_enough_problems
from gtpo.recipe.dotted_paths import load_object


def load_training(recipe: Recipe, tokenizer, processes: int):
    """The problems to train on, shuffled with the seed; raises RecipeError if they do not fill one
    rollout.
    """
    problems = _load_problems(recipe, recipe.dataset, tokenizer)
    check_enough_problems(recipe, len(problems), processes)
    return problems


def measured_training(recipe: Recipe, tokenizer):
    """All problems of the recipe's dataset, with `prompt_length`, before the length filter."""
    return measured_problems(
        recipe.dataset,
        tokenizer,
        chat_template_kwargs=recipe.training.chat_template_kwargs,
        load_object=load_object,
    )


def _load_problems(
    recipe: Recipe, section, tokenizer, *, shuffle: bool = True, label: str = "Dataset"
):
    return load_problems(
        section,
        tokenizer,
        recipe.max_prompt_length,
        recipe.seed,
        shuffle=shuffle,
        label=label,
        chat_template_kwargs=recipe.training.chat_template_kwargs,
        load_object=load_object,
    )


def held_out_section(recipe: Recipe):
    """`evaluation`'s file or split as a dataset section; None where the recipe names neither."""
    path, split = recipe.evaluation.path, recipe.evaluation.split
    if path is None:
        return split and recipe.dataset.model_copy(update={"split": split})
    return recipe.dataset.model_copy(
        update={"path": path, "split": split or ("test" if os.path.isdir(path) else "train")}
    )


def check_held_out(recipe: Recipe) -> None:
    """A short look at where the held-out problems are; raises RecipeError."""
    section = held_out_section(recipe)
    if section is not None:
        with _told_of_evaluation():
            check_source(section)


@contextlib.contextmanager
def _told_of_evaluation():
    try:
        yield
    except RecipeError as error:
        raise _of_evaluation(error) from None


def _of_evaluation(error: RecipeError) -> RecipeError:
    """`error` with the keys by which `evaluation` names held-out problems."""
    keys = {
        "dataset": "evaluation",
        "dataset.path": "evaluation.path",
        "dataset.split": "evaluation.split",
    }
    return RecipeError.of(
        Mistake(keys.get(mistake.key, mistake.key), mistake.sentence) for mistake in error.mistakes
    )


def load_held_out(recipe: Recipe, tokenizer):
    """The first held-out problems, unshuffled; None where the recipe names none."""
    section = held_out_section(recipe)
    if section is None:
        return None
    with _told_of_evaluation():
        problems = _load_problems(
            recipe, section, tokenizer, shuffle=False, label="Held-out problems"
        )
    return problems.select(range(min(recipe.evaluation.limit, len(problems))))
