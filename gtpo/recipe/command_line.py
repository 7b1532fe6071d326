"""Schema defaults < YAML < command line, made into a `Recipe`; help from the schema; objects by
dotted path.

Flags are `--section.key value`, for every key of the schema. A parser of our own because no library
gave all three of: sections that take TRL's options beside ours, map keys that contain a dot, and
every mistake at once with its source.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from gtpo.errors import Mistake, RecipeError
from gtpo.recipe.dotted_paths import check_dotted_path, make_importable
from gtpo.recipe.keys import ALIASES, SWITCHES, alternatives, is_list, key_names, key_path
from gtpo.recipe.mistakes import nearest, one_line, validation_mistakes
from gtpo.recipe.recipe import Recipe
from gtpo.recipe.sections import DATASET_ALIASES
from gtpo.recipe.yaml_text import YamlError, check_plain, parse_yaml, read_yaml_file

__all__ = [
    "CommandLine",
    "make_recipe",
    "parse",
    "read_recipe",
    "read_saved",
]


@dataclass(frozen=True)
class CommandLine:
    """What was typed: the recipe file, the overrides by key path, the switches that are on, and
    what makes no sense.
    """

    recipe_file: str = "config.yaml"
    overrides: dict[tuple[str, ...], Any] = field(default_factory=dict)
    switches: frozenset[str] = frozenset()
    mistakes: tuple[Mistake, ...] = ()
    resume: str | None = None  # "" for --resume without a path


def read_recipe(argv: list[str]) -> Recipe:
    """The validated recipe of a command line; raises RecipeError with one sentence per mistake, all
    at once.
    """
    return make_recipe(parse(argv))


def parse(argv: list[str]) -> CommandLine:
    """Sort the words of a command line. Unknown flags and wrong counts of values are kept, to be
    told with the rest.
    """
    files, overrides, switches, mistakes, resume = [], {}, set(), [], None
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith("--"):
            files.append(word)
            continue
        name, equals, inline = word[2:].partition("=")
        key = name.replace("-", "_")
        if key == "resume":
            # that is the recipe
            named = (
                words and not words[0].startswith("--") and not words[0].endswith((".yaml", ".yml"))
            )
            resume = inline if equals else words.pop(0) if named else ""
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
            mistakes.append(
                Mistake(
                    f"--{name}",
                    f"unknown flag{nearest(key, [*SWITCHES, *ALIASES, *key_names()], '--')}",
                )
            )
            words = words[_count_values(words) :]
            continue
        path, annotation = target
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
    if len(files) > 1:
        mistakes.append(
            Mistake(
                " ".join(files[1:]),
                f"neither a flag nor a value that a flag takes, and the recipe file is {files[0]}; "
                "use --section.key value",
            )
        )
    if "force_resume" in switches and resume is None:
        mistakes.append(Mistake("--force-resume", "there is nothing to force without --resume"))
    if "json" in switches and "check" not in switches:
        mistakes.append(Mistake("--json", "goes with --check; give both, or leave it out"))
    return CommandLine(
        *(files[:1] or _recipe_of(resume)),
        overrides=overrides,
        switches=frozenset(switches),
        mistakes=tuple(mistakes),
        resume=resume,
    )


def make_recipe(command: CommandLine) -> Recipe:
    """Lay the overrides over the file and validate both together."""
    values = _read_yaml(Path(command.recipe_file))
    overrides = _subset_of_gsm8k(command.overrides, values)
    for path, value in overrides.items():
        _set(values, path, value)
    mistakes = list(command.mistakes) + _not_plain(overrides)
    try:
        recipe = Recipe.model_validate(values)
    except ValidationError as error:
        mistakes += validation_mistakes(error, command.recipe_file, overrides)
    if mistakes:
        raise RecipeError.of(mistakes)
    make_importable(Path(command.recipe_file).resolve().parent)
    paths = {
        "trainer.class_path": [recipe.trainer.class_path],
        "trainer.reward_funcs": recipe.trainer.reward_funcs,
    }
    if recipe.dataset.kind == "function":
        paths["dataset.name"] = [recipe.dataset.name]
    mistakes = [
        mistake
        for key, dotted in paths.items()
        for path in dotted
        if (mistake := check_dotted_path(key, path))
    ]
    if mistakes:
        raise RecipeError.of(mistakes)
    return recipe


def read_saved(file: Path) -> Recipe:
    """The recipe that a run has saved; its dotted paths are not looked up, for they need not be
    here any more.
    """
    try:
        return Recipe.model_validate(_read_yaml(file))
    except ValidationError as error:
        raise RecipeError.of(validation_mistakes(error, str(file), {})) from None


# ---- reading


def _not_plain(overrides: dict[tuple[str, ...], Any]) -> list[Mistake]:
    """A mistake for each flag whose words are no text: bytes that are not UTF-8, for one."""
    mistakes = []
    for path, value in overrides.items():
        try:
            check_plain([list(path), value])
        except YamlError as error:
            mistakes.append(Mistake(f"--{'.'.join(path)}", str(error)))
    return mistakes


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
    except (OSError, ValueError) as error:  # a folder, no rights, no UTF-8
        raise RecipeError(
            path, f"cannot be read as a recipe ({one_line(error)}); give a YAML text file"
        ) from None
    if not isinstance(values, dict):
        given = "is empty" if values is None else f"holds a {type(values).__name__}"
        raise RecipeError(
            path, f"{given}; a recipe is a mapping with at least the sections model and dataset"
        )
    # A section whose lines are all commented out is null: its defaults.
    return {key: value for key, value in values.items() if value is not None}


def _subset_of_gsm8k(overrides: dict, values: dict) -> dict:
    """`--dataset-subset` means `dataset.subset` where the dataset is GSM8K: its first value."""
    dataset = values.get("dataset")
    name = overrides.get(
        ("dataset", "name"), dataset.get("name") if isinstance(dataset, dict) else None
    )
    subsets = overrides.get(("dataset", "subsets"))
    if (
        isinstance(name, str)
        and DATASET_ALIASES.get(name) == "gsm8k"
        and isinstance(subsets, list)
        and subsets
    ):
        overrides = {
            path: value for path, value in overrides.items() if path != ("dataset", "subsets")
        }
        overrides[("dataset", "subset")] = subsets[0]
    return overrides


def _set(values: dict, path: tuple[str, ...], value: Any) -> None:
    *parents, last = path
    for parent in parents:
        if not isinstance(values.get(parent), dict):
            values[parent] = {}
        values = values[parent]
    values[last] = (
        {**values[last], **value}
        if isinstance(value, dict) and isinstance(values.get(last), dict)
        else value
    )


def _recipe_of(resume: str | None) -> list[str]:
    """The recipe that was saved with what --resume names, for want of another; nothing where it
    names nothing.
    """
    if not resume:
        return []
    found = [
        path
        for path in (Path(resume, "recipe.yaml"), Path(resume, "..", "recipe.yaml"))
        if path.is_file()
    ]
    return [os.path.normpath(path) for path in found[:1]]


def _count_values(words: list[str]) -> int:
    return next((i for i, word in enumerate(words) if word.startswith("--")), len(words))


def _value(values: list[str], annotation: Any) -> Any:
    """The typed words as a value for the schema: text stays text, everything else is read as
    YAML.
    """
    if not values:
        raise ValueError("needs a value")
    if is_list(annotation):
        if len(values) == 1 and values[0].lstrip().startswith("["):
            return parse_yaml(values[0])
        return values
    kinds = alternatives(annotation)
    if values[0] in ("null", "~") and type(None) in kinds:
        return None
    return values[0] if set(kinds) <= {str, type(None)} else parse_yaml(values[0])
