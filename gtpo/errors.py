"""Mistakes of the user's: where, what was given, and what would work."""

from collections.abc import Iterable
from typing import NamedTuple


class Mistake(NamedTuple):
    """One mistake: the key, flag or file that it is about, and a sentence that does not repeat
    it.
    """

    key: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.key}: {self.sentence}" if self.key else self.sentence


class RecipeError(ValueError):
    """Something that the user can put right. The verbs print it as sentences and end with exit code
    2.

    `RecipeError(key, sentence)` is one mistake; `RecipeError.of(mistakes)` are several, told
    together. With one argument, that is the whole sentence and it has no key.
    """

    def __init__(self, key: str, sentence: str | None = None):
        self.mistakes = (Mistake("", key) if sentence is None else Mistake(key, sentence),)
        super().__init__(*self.mistakes[0])

    @classmethod
    def of(cls, mistakes: Iterable[Mistake]) -> "RecipeError":
        """One error with all of `mistakes`, of which there is at least one."""
        mistakes = tuple(mistakes)
        error = cls(*mistakes[0])
        error.mistakes = mistakes
        return error

    @property
    def key(self) -> str:
        """The key of the first mistake."""
        return self.mistakes[0].key

    def with_key(self, key: str) -> "RecipeError":
        """The same mistakes as parts of what `key` names: `key: their key: their sentence`."""
        return type(self).of(Mistake(key, str(mistake)) for mistake in self.mistakes)

    def __str__(self) -> str:
        return "\n".join(map(str, self.mistakes))
