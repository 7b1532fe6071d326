"""Pydantic's errors about a recipe as sentences: where, what was given, and what would work."""

import difflib
import re

from pydantic import ValidationError

from gtpo.errors import Mistake, RecipeError
from gtpo.recipe.keys import key_names
from gtpo.recipe.recipe import Recipe
from gtpo.recipe.sections import Section

# pydantic's error types (2.x), and what the value should be.
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
LONGEST = 200  # characters of a value that a sentence quotes in full


def validation_mistakes(
    error: ValidationError, recipe_file: str, overrides: dict[tuple[str, ...], object]
) -> list[Mistake]:
    """One mistake for each key that pydantic refused.

    `overrides` are the values of the flags, by key path. A sentence says whether a value came from
    the command line or from `recipe_file`.
    """
    mistakes: dict[object, Mistake] = {}
    expected: dict[str, list[str]] = {}  # of a union, pydantic reports each member
    for detail in error.errors():
        path = _key_path(detail["loc"])
        key = ".".join(path)
        on_flags = any(path[: len(flag)] == flag[: len(path)] for flag in overrides)
        source = "on the command line" if on_flags else f"in {recipe_file}"
        match detail["type"]:
            case "default_factory_not_called":
                continue  # the default is another key's value, which is reported itself
            case "extra_forbidden":
                mistakes[key] = Mistake(key, f"unknown key {source}{nearest(key, key_names())}")
            case "missing":
                or_flag = "" if key in Recipe.model_fields else f" or with --{key}"
                mistakes[key] = Mistake(key, f"missing; set it in {recipe_file}{or_flag}")
            case "value_error":  # raised by a rule of sections.py or recipe.py
                cause = detail["ctx"]["error"]
                is_ours = isinstance(cause, RecipeError)  # which names the key itself
                mistake = cause.mistakes[0] if is_ours else Mistake(key, str(cause))
                mistakes[mistake] = mistake
            case kind:
                message = detail["msg"].removeprefix("Input should be ")
                expected.setdefault(key, []).append(EXPECTED.get(kind, message))
                should_be = " or ".join(dict.fromkeys(expected[key]))
                clause = _nearest_choice(detail) or f"it should be {should_be}"
                mistakes[key] = Mistake(key, f"{_shown(detail)} {source} is not valid; {clause}")
    return list(mistakes.values())


def _shown(detail: dict) -> str:
    """The given value, shortened.

    Of an environment variable only the name is shown, because the value may be a token.
    """
    if detail["loc"][0] == "env" and len(detail["loc"]) > 1:
        return f"the value of {detail['loc'][1]}"
    given = repr(detail["input"])
    return given if len(given) <= LONGEST else f"{given[:150]}... ({len(given)} characters)"


def nearest(key: str, known: list[str], prefix: str = "") -> str:
    """A clause that suggests the known key most similar to `key`.

    It compares the whole path first, then only the last part.
    """
    if key in known:
        return f"; it is a section, use --{key}.<key> <value>"
    by_last_part = {name.split(".")[-1]: name for name in known}
    close = difflib.get_close_matches(key, known, 1, 0.75)
    if not close:
        last_parts = difflib.get_close_matches(key.split(".")[-1], by_last_part, 1, 0.7)
        close = [by_last_part[part] for part in last_parts]
    return f"; did you mean {prefix}{close[0]}?" if close else "; --help lists the known ones"


def _nearest_choice(detail: dict) -> str | None:
    """A clause with the most similar choice, where a list of all would be too long to read."""
    choices = re.findall(r"'([^']*)'", detail.get("ctx", {}).get("expected", ""))
    close = difflib.get_close_matches(str(detail["input"]), choices, 1) if len(choices) > 5 else []
    return f"did you mean {close[0]!r}?" if close else None


def one_line(error: Exception) -> str:
    """The message of `error` without line breaks."""
    return " ".join(str(error).split())


def _key_path(location: tuple[int | str, ...]) -> tuple[str, ...]:
    """The key path of an error's location.

    pydantic appends the member of a union and the place in a list, which are left out.
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
