"""The recipe's keys as a command line sees them: dotted paths, types, short flags, and the help
made from the schema.
"""

import textwrap
import types
import typing
from typing import Annotated, Any

from gtpo.recipe.recipe import Recipe
from gtpo.recipe.sections import DocumentedTraining, Section
from gtpo.system.trl_options import grpo_options

SWITCHES = {
    "help": "Print this help.",
    "version": "Print our version and the libraries'.",
    "check": (
        "Try all that can fail early, rewards included, without loading the model; say ok, warn or"
        " fail. Exit code 0 or 2."
    ),
    "json": "With --check: the findings as JSON.",
    "dry_run": "Print the resolved recipe (stdout) and the plan (stderr); load nothing.",
    "overwrite": "Replace the run directory if it exists.",
    "resume": (
        "Go on from the run directory's last whole checkpoint; --resume PATH: from that checkpoint,"
        " or that run's last."
    ),
    "force_resume": "Resume although the recipe has changed.",
}
ALIASES = {
    "model_name": "model.model_name",
    "dataset_name": "dataset.name",
    "dataset_subset": "dataset.subsets",
    "dataset_split": "dataset.split",
    "cuda": "env.CUDA_VISIBLE_DEVICES",
    "run_name": "run_name",
}


def help_text() -> str:
    """Every switch, short flag and key with its type, default and one sentence."""
    lines = [
        "usage: python train_model.py [config.yaml] [--section.key value ...]",
        "",
        (
            "Defaults < recipe file < flags. '-' and '_' are the same; lists are written as: a b c,"
            " or [a, b]."
        ),
        "",
    ]
    lines += [f"  --{name.replace('_', '-'):<18} {text}" for name, text in SWITCHES.items()]
    lines += [
        f"  --{name.replace('_', '-'):<18} the same as --{key}" for name, key in ALIASES.items()
    ]
    own, trl = [], []
    for path, info, section in recipe_fields():
        ours = (
            section == "training"
            and path[-1] in grpo_options()
            and path[-1] not in DocumentedTraining.model_fields
        )
        default = grpo_options()[path[-1]].default if ours else _default(info)
        (trl if ours else own).append(
            f"  --{'.'.join(path)}  ({_type_name(info.annotation)}{default and f'; {default}'})\n"
            f"{_indented(info.description or '')}"
        )
    return "\n".join(
        [
            *lines,
            "",
            "Keys (type; default):",
            *own,
            "",
            "The other options of trl.GRPOConfig (type; TRL's default):",
            *trl,
        ]
    )


def _indented(text: str) -> str:
    return textwrap.fill(
        " ".join(text.split()), 100, initial_indent=" " * 6, subsequent_indent=" " * 6
    )


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, without Annotated."""
    if typing.get_origin(annotation) is Annotated:
        return alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return [kind for member in typing.get_args(annotation) for kind in alternatives(member)]
    return [annotation]


def is_list(annotation: Any) -> bool:
    return any(kind is list or typing.get_origin(kind) is list for kind in alternatives(annotation))


def key_path(
    parts: list[str], section: type[Section] = Recipe
) -> tuple[tuple[str, ...], Any] | None:
    """The key path that dotted `parts` name and its annotation; in a map, the rest is one key. None
    if unknown.
    """
    info = section.model_fields.get(parts[0])
    if info is None:
        return None
    if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
        found = key_path(parts[1:], info.annotation) if parts[1:] else None
        return found and ((parts[0], *found[0]), found[1])
    if typing.get_origin(info.annotation) is dict and parts[1:]:
        return (parts[0], ".".join(parts[1:])), typing.get_args(info.annotation)[1]
    return ((parts[0],), info.annotation) if not parts[1:] else None


def recipe_fields(section: type[Section] = Recipe, prefix: tuple[str, ...] = ()):
    """Every key: its path, its field, and the name of its section."""
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from recipe_fields(info.annotation, (*prefix, name))
        else:
            yield (*prefix, name), info, prefix[-1] if prefix else ""


def key_names() -> list[str]:
    """Every key path, and the sections by themselves."""
    return [
        *Recipe.model_fields,
        *(".".join(path) for path, _, section in recipe_fields() if section),
    ]


def _default(info) -> str:
    if info.is_required():
        return "required"
    if info.default_factory:
        return "from its neighbours"
    return "null" if info.default is None else str(info.default)


def _type_name(annotation: Any) -> str:
    names = [
        str(
            typing.get_args(kind)
            if typing.get_origin(kind) is typing.Literal
            else getattr(kind, "__name__", kind)
        )
        for kind in alternatives(annotation)
        if kind is not type(None)
    ]
    return " or ".join(names)
