"""Mistakes of the user: where, what was given, and what would work."""

from collections.abc import Iterable
from typing import NamedTuple


class Mistake(NamedTuple):
    """One mistake: the key, flag or file it is about, and a sentence that does not repeat it."""

    key: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.key}: {self.sentence}" if self.key else self.sentence


class RecipeError(ValueError):
    """An error that the user can correct. The commands print it and end with exit code 2.

    `RecipeError(key, sentence)` is one mistake, and `RecipeError.of(mistakes)` is several. With one
    argument, that is the whole sentence, without a key.
    """

    def __init__(self, key: str, sentence: str | None = None):
        self.mistakes = (Mistake("", key) if sentence is None else Mistake(key, sentence),)
        super().__init__(*self.mistakes[0])

    @classmethod
    def of(cls, mistakes: Iterable[Mistake]) -> "RecipeError":
        """One error with all of `mistakes`; there must be at least one."""
        mistakes = tuple(mistakes)
        error = cls(*mistakes[0])
        error.mistakes = mistakes
        return error

    @property
    def key(self) -> str:
        """The key of the first mistake."""
        return self.mistakes[0].key

    def with_key(self, key: str) -> "RecipeError":
        """The same mistakes with `key` in front of their own keys: `key: their key: sentence`."""
        return type(self).of(Mistake(key, str(mistake)) for mistake in self.mistakes)

    def __str__(self) -> str:
        return "\n".join(map(str, self.mistakes))
