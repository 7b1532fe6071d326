"""A recipe's mistakes as sentences: where, what was given, what would work."""

import difflib
import re

from pydantic import ValidationError

from gtpo.errors import Mistake, RecipeError
from gtpo.recipe.keys import key_names
from gtpo.recipe.recipe import Recipe
from gtpo.recipe.sections import Section

EXPECTED = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "int_type": "a whole number",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "list_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a section with keys of its own",
    "string_type": "text",
    "string_too_short": "text that is not empty",
    "too_short": "a list with at least one entry",
    "finite_number": "a finite number",
    "invalid_key": "named by text",
}


def validation_mistakes(
    error: ValidationError, recipe_file: str, overrides: dict[tuple[str, ...], object]
) -> list[Mistake]:
    """One mistake per key that pydantic refused, with where its value came from; `overrides` are
    those of the flags.
    """
    told: dict[object, Mistake] = {}
    expected: dict[str, list[str]] = {}
    for problem in error.errors():
        path = _key_path(problem["loc"])
        key = ".".join(path)
        on_flags = any(path[: len(flag)] == flag[: len(path)] for flag in overrides)
        source = "on the command line" if on_flags else f"in {recipe_file}"
        match problem["type"]:
            # a default taken from a neighbour that is itself wrong
            case "default_factory_not_called":
                continue
            case "extra_forbidden":
                told[key] = Mistake(key, f"unknown key {source}{nearest(key, key_names())}")
            case "missing":
                told[key] = Mistake(
                    key,
                    "missing; set it in"
                    f" {recipe_file}{'' if key in Recipe.model_fields else f' or with --{key}'}",
                )
            case "value_error":  # our own rules; those across keys name the key themselves
                cause = problem["ctx"]["error"]
                mistake = (
                    cause.mistakes[0]
                    if isinstance(cause, RecipeError)
                    else Mistake(key, str(cause))
                )
                told[mistake] = mistake
            case kind:
                expected.setdefault(key, []).append(
                    EXPECTED.get(kind, problem["msg"].removeprefix("Input should be "))
                )
                clause = (
                    _nearest_choice(problem)
                    or f"it should be {' or '.join(dict.fromkeys(expected[key]))}"
                )
                told[key] = Mistake(key, f"{_shown(problem)} {source} is not valid; {clause}")
    return list(told.values())


def _shown(problem: dict) -> str:
    """What was given, shortened; of an environment variable only its name, for the value may be a
    token.
    """
    if problem["loc"][0] == "env" and len(problem["loc"]) > 1:
        return f"the value of {problem['loc'][1]}"
    given = repr(problem["input"])
    return given if len(given) <= 200 else f"{given[:150]}... ({len(given)} characters)"


def nearest(key: str, known: list[str], prefix: str = "") -> str:
    """A clause that names the known key most like `key`: by its whole path, else by its last
    part.
    """
    if key in known:
        return f"; it is a section, use --{key}.<key> <value>"
    by_last_part = {name.split(".")[-1]: name for name in known}
    close = difflib.get_close_matches(key, known, 1, 0.75)
    close = close or [
        by_last_part[n] for n in difflib.get_close_matches(key.split(".")[-1], by_last_part, 1, 0.7)
    ]
    return f"; did you mean {prefix}{close[0]}?" if close else "; --help lists the known ones"


def _nearest_choice(problem: dict) -> str | None:
    """The nearest of many choices, in place of a list too long to read."""
    choices = re.findall(r"'([^']*)'", problem.get("ctx", {}).get("expected", ""))
    close = difflib.get_close_matches(str(problem["input"]), choices, 1) if len(choices) > 5 else []
    return f"did you mean {close[0]!r}?" if close else None


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _key_path(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """An error's location up to the key, without the union members and list places that pydantic
    adds to it.
    """
    section: type | None = Recipe
    path = []
    for part in location:
        path.append(str(part))
        info = section.model_fields.get(part)
        section = info.annotation if info else None
        if not (isinstance(section, type) and issubclass(section, Section)):
            break
    return tuple(path)
