"""What a user may write in a recipe, and how it is read. Nothing here imports torch or TRL."""

from gtpo.errors import RecipeError
from gtpo.recipe.recipe import Recipe

__all__ = ["Recipe", "RecipeError"]
