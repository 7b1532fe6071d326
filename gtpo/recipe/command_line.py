"""Defaults < YAML < command line, combined into a `Recipe`.

Every key of the schema is a flag: `--section.key value`. This parser is our own, because no library
offered three things together. TRL's options stand beside ours in one section. Keys may contain a
dot. All mistakes are reported at once, with their sources.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gtpo.errors import Mistake, RecipeError
from gtpo.recipe.dotted_paths import check_dotted_path, make_importable
from gtpo.recipe.keys import (
    ALIASES,
    SWITCHES,
    USAGE,
    alternatives,
    is_list,
    key_names,
    key_path,
)
from gtpo.recipe.mistakes import nearest, one_line, sourced_mistake, validation_mistakes
from gtpo.recipe.recipe import Recipe
from gtpo.recipe.sections import DATASET_ALIASES
from gtpo.recipe.yaml_text import YamlError, check_plain, parse_yaml, read_yaml_file
from gtpo.system.safe_text import printable, without_secrets

__all__ = [
    *("CommandLine", "make_recipe", "parse", "read_recipe", "read_saved"),
    *("usage", "with_sources"),
]


@dataclass(frozen=True)
class CommandLine:
    """A parsed command line, before the recipe file is read."""

    recipe_file: str | None = None  # None if no recipe file is named
    overrides: dict[tuple[str, ...], Any] = field(default_factory=dict)  # by key path
    switches: frozenset[str] = frozenset()
    mistakes: tuple[Mistake, ...] = ()  # reported together with those of the recipe
    resume: str | None = None  # the path after --resume; "" without one
    flags: dict[tuple[str, ...], str] = field(default_factory=dict)  # by key path, as typed


def read_recipe(argv: list[str]) -> Recipe:
    """The validated recipe of a command line.

    Raises RecipeError with all mistakes, one sentence for each.
    """
    return make_recipe(parse(argv))


def parse(argv: list[str]) -> CommandLine:
    """Sort the words of a command line.

    Unknown flags and flags without a value are kept as mistakes; nothing is raised.
    """
    files, overrides, switches, mistakes, resume = [], {}, set(), [], None
    flags: dict[tuple[str, ...], str] = {}
    skipped: list[str] = []  # words after unknown flags
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            files.append(word)
            continue
        name, equals, inline = word[2:].partition("=")
        key = name.replace("-", "_")
        if key == "resume":
            resume = inline if equals else words.pop(0) if _is_path_to_resume(words) else ""
            continue
        if key in SWITCHES:
            switches.add(key)
            if equals:
                mistakes.append(
                    Mistake(f"--{name}", "takes no value; give it alone, or leave it out")
                )
            continue
        target = key_path(ALIASES.get(key, key).split("."))
        if target is None:
            suggestion = nearest(key, [*SWITCHES, *ALIASES, *key_names()], "--")
            mistakes.append(Mistake(f"--{name}", f"unknown flag{suggestion}"))
            count = _count_values(words)
            skipped, words = [*skipped, *words[:count]], words[count:]
            continue
        path, annotation = target
        flags[path] = f"--{name}"
        count = _count_values(words) if is_list(annotation) else min(1, _count_values(words))
        values = [inline] if equals else [words.pop(0) for _ in range(count)]
        if not values and bool in alternatives(annotation):
            values = ["true"]
        try:
            value = _value(values, annotation)
        except ValueError as error:
            mistakes.append(Mistake(f"--{name}", one_line(error)))
            continue
        if is_list(annotation) and isinstance(overrides.get(path), list):
            value = overrides[path] + value
        overrides[path] = value
    mistakes += _contradictions(files, switches, resume)
    # The value of an unknown flag may be the recipe file: --lr 1e-5 config.yaml
    recipes = [*files, *(word for word in skipped if _is_recipe_file(word)), *_saved_recipe(resume)]
    return CommandLine(
        *recipes[:1],
        overrides=overrides,
        switches=frozenset(switches),
        mistakes=tuple(mistakes),
        resume=resume,
        flags=flags,
    )


def usage(command: CommandLine) -> str:
    """What is printed where the command line names no recipe file, with its mistakes."""
    lines = [f"error: {mistake}" for mistake in command.mistakes]
    for path, value in command.overrides.items():
        for word in value if isinstance(value, list) else [value]:
            if isinstance(word, str) and _is_recipe_file(word):
                flag = command.flags[path]
                lines.append(f"error: {flag}: {word} is read as its value; put {word} first")
    if command.resume:
        lines.append(f"error: --resume: there is no recipe.yaml in or beside {command.resume}")
    lines += [
        USAGE,
        "",
        "A recipe file must be named, for example:",
        "  python train_model.py config.yaml         the documented recipe, for a GPU",
        "  python train_model.py recipes/demo.yaml   a small model, on a CPU",
        "--help lists every key and flag.",
    ]
    return printable(without_secrets("\n".join(lines)))


def make_recipe(command: CommandLine) -> Recipe:
    """The validated recipe: the overrides of `command` laid over its recipe file.

    Raises RecipeError with all mistakes.
    """
    if command.recipe_file is None:
        raise RecipeError("recipe file", "none is named; name one, for example config.yaml")
    values = _read_yaml(Path(command.recipe_file))
    overrides = _with_subset_of_gsm8k(command.overrides, values)
    for path, value in overrides.items():
        _set(values, path, value)
    mistakes = list(command.mistakes) + _not_plain(overrides)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        mistakes += validation_mistakes(error, command.recipe_file, command.flags)
    if mistakes:
        raise with_sources(RecipeError.of(mistakes), command)
    make_importable(Path(command.recipe_file).resolve().parent)
    if mistakes := _wrong_dotted_paths(recipe):
        raise with_sources(RecipeError.of(mistakes), command)
    return recipe


def with_sources(error: BaseException, command: CommandLine) -> BaseException:
    """`error`; the sentences of a RecipeError say which file or flag their values came from."""
    if not isinstance(error, RecipeError) or command.recipe_file is None:
        return error
    try:
        values = _read_yaml(Path(command.recipe_file))
    except RecipeError:  # it is about the file itself
        return error
    sourced = (
        sourced_mistake(mistake, command.recipe_file, values, command.flags)
        for mistake in error.mistakes
    )
    return RecipeError.of(sourced).with_traceback(error.__traceback__)


def read_saved(file: Path) -> Recipe:
    """The recipe that a run has saved.

    Its dotted paths are not checked, because that code need not exist on this machine.
    """
    try:
        return Recipe.model_validate(_read_yaml(file))
    except ValidationError as error:
        raise RecipeError.of(validation_mistakes(error, str(file), {})) from None


# ---- the words of the command line


def _is_path_to_resume(words: list[str]) -> bool:
    """Whether the word after --resume is its path, not the next flag or the recipe file."""
    return bool(words) and not words[0].startswith("--") and not _is_recipe_file(words[0])


def _is_recipe_file(word: str) -> bool:
    return word.endswith((".yaml", ".yml"))


def _count_values(words: list[str]) -> int:
    return next((i for i, word in enumerate(words) if word.startswith("--")), len(words))


def _value(values: list[str], annotation: Any) -> Any:
    """The words after a flag as a value: text stays text, anything else is read as YAML."""
    if not values:
        raise ValueError("needs a value")
    if is_list(annotation):
        if len(values) == 1 and values[0].lstrip().startswith("["):
            return parse_yaml(values[0])
        return values
    types = alternatives(annotation)
    if values[0] in ("null", "~") and type(None) in types:
        return None
    return values[0] if set(types) <= {str, type(None)} else parse_yaml(values[0])


def _contradictions(files: list[str], switches: set[str], resume: str | None) -> list[Mistake]:
    mistakes = []
    if len(files) > 1:
        mistakes.append(
            Mistake(
                " ".join(files[1:]),
                f"neither a flag nor the value of a flag, and the recipe file is {files[0]}; "
                "use --section.key value",
            )
        )
    if "force_resume" in switches and resume is None:
        mistakes.append(Mistake("--force-resume", "works only with --resume; give both"))
    if "json" in switches and "check" not in switches:
        mistakes.append(Mistake("--json", "works only with --check; give both"))
    return mistakes


def _saved_recipe(resume: str | None) -> list[str]:
    """The recipe saved in or beside the path that --resume names; empty if there is none."""
    if not resume:
        return []
    candidates = (Path(resume, "recipe.yaml"), Path(resume, "..", "recipe.yaml"))
    return [os.path.normpath(path) for path in candidates if path.is_file()][:1]


# ---- the values of the recipe


def _read_yaml(path: Path) -> dict:
    try:
        values = parse_yaml(read_yaml_file(path))
    except FileNotFoundError:
        raise RecipeError(
            path, "there is no such recipe file; try recipes/demo.yaml, or give the path of yours"
        ) from None
    except YamlError as error:
        where = f"{path}, line {error.line}" if error.line else str(path)
        raise RecipeError(where, f"this is not valid YAML for a recipe ({error})") from None
    except (OSError, ValueError) as error:  # a folder, no permission, not UTF-8
        raise RecipeError(
            path, f"cannot be read as a recipe ({one_line(error)}); give a YAML text file"
        ) from None
    if not isinstance(values, dict):
        given = "is empty" if values is None else f"contains a {type(values).__name__}"
        raise RecipeError(
            path, f"{given}; a recipe is a mapping with at least the sections model and dataset"
        )
    # A section whose lines are all commented out is null, and gets its defaults.
    return {key: value for key, value in values.items() if value is not None}


def _with_subset_of_gsm8k(overrides: dict, values: dict) -> dict:
    """The overrides, where --dataset-subset sets `dataset.subset` if the dataset is GSM8K.

    For any other dataset it sets `dataset.subsets`. GSM8K takes the first value.
    """
    dataset = values.get("dataset")
    name_in_file = dataset.get("name") if isinstance(dataset, dict) else None
    name = overrides.get(("dataset", "name"), name_in_file)
    subsets = overrides.get(("dataset", "subsets"))
    is_gsm8k = isinstance(name, str) and DATASET_ALIASES.get(name) == "gsm8k"
    if not (is_gsm8k and isinstance(subsets, list) and subsets):
        return overrides
    others = {path: value for path, value in overrides.items() if path != ("dataset", "subsets")}
    return {**others, ("dataset", "subset"): subsets[0]}


def _set(values: dict, path: tuple[str, ...], value: Any) -> None:
    """Set the value at `path`; a mapping is merged into a mapping that is there."""
    *parents, last = path
    for parent in parents:
        if not isinstance(values.get(parent), dict):
            values[parent] = {}
        values = values[parent]
    if isinstance(value, dict) and isinstance(values.get(last), dict):
        value = {**values[last], **value}
    values[last] = value


def _not_plain(overrides: dict[tuple[str, ...], Any]) -> list[Mistake]:
    """A mistake for each flag whose value is not plain, for example bytes that are not UTF-8."""
    mistakes = []
    for path, value in overrides.items():
        try:
            check_plain([list(path), value])
        except YamlError as error:
            mistakes.append(Mistake(f"--{'.'.join(path)}", str(error)))
    return mistakes


def _wrong_dotted_paths(recipe: Recipe) -> list[Mistake]:
    """A mistake for each dotted path that names nothing callable."""
    paths = [
        ("trainer.class_path", recipe.trainer.class_path),
        *(("trainer.reward_funcs", path) for path in recipe.trainer.reward_funcs),
    ]
    if recipe.dataset.kind == "function":
        paths.append(("dataset.name", recipe.dataset.name))
    checked = (check_dotted_path(key, dotted) for key, dotted in paths)
    return [mistake for mistake in checked if mistake]
