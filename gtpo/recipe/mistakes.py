"""Pydantic's errors about a recipe as sentences: where, what was given, and what would work."""

import difflib
import re
from collections.abc import Mapping

from pydantic import ValidationError

from gtpo.errors import Mistake, RecipeError
from gtpo.recipe.dialects import note, our_key, similar_key
from gtpo.recipe.keys import key_names
from gtpo.recipe.recipe import DERIVED, Recipe
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
# What a value in the place of a whole section usually means.
VALUE_OF_SECTION = {
    "model": "model.model_name",
    "dataset": "dataset.name",
    "trainer": "trainer.class_path",
    "rewards": "trainer.reward_funcs",
    "evaluation": "evaluation.split",
    "wandb": "wandb.project",
}
RECIPE_FILE_FLAGS = ("config", "config_file", "config_path", "recipe", "cfg", "yaml")
LONGEST = 200  # characters of a value that a sentence quotes in full


def validation_mistakes(
    error: ValidationError, recipe_file: str, flags: Mapping[tuple[str, ...], str]
) -> list[Mistake]:
    """One mistake for each key that pydantic refused.

    `flags` are the flags of the command line, by key path. Pydantic's own sentences say whether a
    value came from a flag or from `recipe_file`. `sourced_mistake` adds it to the others.
    """
    mistakes: dict[object, Mistake] = {}
    expected: dict[str, list[str]] = {}  # of a union, pydantic reports each member
    for detail in error.errors():
        path = _key_path(detail["loc"])
        key = ".".join(path)
        flag = _flag_of(path, flags)
        source = f"from {flag}" if flag else f"in {recipe_file}"
        match detail["type"]:
            case "default_factory_not_called":
                continue  # the default is another key's value, which is reported itself
            case "extra_forbidden":
                clause = _unknown_section(detail, key) or nearest(key, key_names())
                mistakes[key] = Mistake(key, f"unknown key {source}{clause}")
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
                if kind == "model_type" and key in VALUE_OF_SECTION:
                    clause += f"; did you mean {VALUE_OF_SECTION[key]}?"
                mistakes[key] = Mistake(key, f"{_shown(detail)} {source} is not valid; {clause}")
    return list(mistakes.values())


def sourced_mistake(
    mistake: Mistake, recipe_file: str, values: dict, flags: Mapping[tuple[str, ...], str]
) -> Mistake:
    """`mistake`, whose sentence says where the value of its key is set.

    `values` are those of `recipe_file`. Other keys that the sentence names follow, if they are set
    somewhere else. A sentence that names its file or flag already stays as it is.
    """

    def place(key: str) -> str | None:
        path = tuple(key.split("."))
        if flag := _flag_of(path, flags):
            return f"set by {flag}"
        return f"set in {recipe_file}" if _is_given(path, values) else None

    sentence, known = mistake.sentence, key_names()
    if (
        mistake.key not in known
        or recipe_file in sentence
        or re.search("(from|set by) --", sentence)
    ):
        return mistake
    source = place(mistake.key)
    sources = [source] if source else []
    for key in dict.fromkeys(re.findall(r"\b[a-z_]+\.\w+", sentence)):
        other = place(key) if key in known and key != mistake.key else None
        if other and other != source:
            sources.append(f"{key} is {other}")
    return Mistake(mistake.key, f"{sentence} ({'; '.join(sources)})") if sources else mistake


def _flag_of(path: tuple[str, ...], flags: Mapping[tuple[str, ...], str]) -> str | None:
    """The flag that set the key at `path`, a key inside it, or the mapping around it."""
    same = (flag for key, flag in flags.items() if path[: len(key)] == key[: len(path)])
    return next(same, None)


def _is_given(path: tuple[str, ...], values: object) -> bool:
    for part in path:
        if not isinstance(values, dict) or part not in values:
            return False
        values = values[part]
    return True


def _shown(detail: dict) -> str:
    """The given value, shortened.

    Of an environment variable only the name is shown, because the value may be a token.
    """
    if detail["loc"][0] == "env" and len(detail["loc"]) > 1:
        return f"the value of {detail['loc'][1]}"
    given = repr(detail["input"])
    return given if len(given) <= LONGEST else f"{given[:150]}... ({len(given)} characters)"


def nearest(key: str, known: list[str], prefix: str = "") -> str:
    """A clause that suggests the known key that `key` means, or the most similar one.

    It knows what other trainers call our keys. Then it compares the whole path, and then only the
    last part. `prefix` is -- for a flag.
    """
    if key in known:
        inner = VALUE_OF_SECTION.get(key)
        example = f", for example {prefix}{inner}" if inner else ""
        return f"; it is a section, use --{key}.<key> <value>{example}"
    if prefix and key in RECIPE_FILE_FLAGS:
        return "; name the recipe file without a flag: python train_model.py recipe.yaml"
    derived = [f"training.{name}" for name in DERIVED]
    settable = [name for name in known if name not in derived]
    ours = our_key(key, settable) or our_key(key, derived) or _most_similar(key, settable)
    if ours is None:
        return "; --help lists the known ones"
    section, _, name = ours.rpartition(".")
    if section == "training" and name in DERIVED:
        return f"; {DERIVED[name]}"
    return f"; did you mean {prefix}{ours}?{note(key, ours)}"


def _most_similar(key: str, known: list[str]) -> str | None:
    """The known key that looks most like `key`; for a dotted key, never a section."""
    section, _, last = key.rpartition(".")
    if not section:
        close = difflib.get_close_matches(key, known, 1, 0.75)
        return close[0] if close else _by_last_part(key, known, 0.7) or similar_key(key, known)
    same_section = [name for name in known if name.rpartition(".")[0] == section]
    return (
        _by_last_part(last, same_section, 0.8)
        or similar_key(key, known)
        or next(iter(difflib.get_close_matches(key, filter(_is_dotted, known), 1, 0.75)), None)
        or _by_last_part(last, known, 0.7)
    )


def _is_dotted(name: str) -> bool:
    return "." in name


def _by_last_part(last: str, known: list[str], cutoff: float) -> str | None:
    """The first known key whose last part is the most similar to `last`."""
    by_last_part = {name.rpartition(".")[2]: name for name in reversed(known)}
    close = difflib.get_close_matches(last, by_last_part, 1, cutoff)
    return (our_key(close[0], known) or by_last_part[close[0]]) if close else None


def _unknown_section(detail: dict, key: str) -> str | None:
    """A clause on the keys inside an unknown section; None if it is not a section."""
    if not isinstance(detail["input"], dict):
        return None
    known, pairs = key_names(), []
    known = [name for name in known if name.removeprefix("training.") not in DERIVED]
    for name in detail["input"]:
        if ours := our_key(f"{key}.{name}", known):
            pairs.append(f"{name} is {ours}")
    shown = ", ".join(pairs[:8])
    return f"; of its keys, {shown}" if pairs else None


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
