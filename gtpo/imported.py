"""What a recipe names by dotted path, imported: the trainer and the rewards. Only after the backend, which patches TRL."""

from gtpo.cli import load_object
from gtpo.recipe import Recipe, RecipeError


def trainer_class(recipe: Recipe):
    """The trainer that the recipe names; raises RecipeError if it cannot be imported or is none."""
    import trl

    found = load("trainer.class_path", recipe.trainer.class_path)
    if not (isinstance(found, type) and issubclass(found, trl.GRPOTrainer)):
        raise RecipeError(f"trainer.class_path: {recipe.trainer.class_path!r} is no subclass of trl.GRPOTrainer; use "
                          "gtpo.gtpo_training.UnslothGTPOTrainer, or a subclass of it")
    return found


def load(key: str, dotted: str):
    """The function or class at `dotted`; raises RecipeError, beginning with `key`, if it cannot be imported or called."""
    try:
        found = load_object(dotted)
    except (Exception, SystemExit) as error:  # somebody's code: whatever it raises, the recipe is where it was named
        raise RecipeError(f"{key}: {dotted!r} cannot be imported ({type(error).__name__}: {error})") from error
    if not callable(found):
        raise RecipeError(f"{key}: {dotted!r} is {type(found).__name__}, which cannot be called; name a function or class")
    return found
