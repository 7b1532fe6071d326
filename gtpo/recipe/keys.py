"""The keys of a recipe: as flags of the command line, as help text, and as a page of the docs.

`python -m gtpo.recipe.keys > docs/recipe_reference.md` writes that page.
"""

import ast
import importlib.metadata
import re
import textwrap
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple

from pydantic.fields import FieldInfo

from gtpo.recipe.recipe import DERIVED, TWO_NAMES, Recipe
from gtpo.recipe.sections import DocumentedTraining, SameAs, Section
from gtpo.system.trl_options import REQUIRED_BY_GTPO, grpo_options

SWITCHES = {
    "help": "Print this help.",
    "version": "Print the versions of GTPO and of the libraries that it uses.",
    "check": (
        "Check everything that can fail early, the reward functions included, without loading the"
        " model's weights. Prints ok, warn or fail for each check. The exit code is 0 or 2."
    ),
    "json": "With --check: print the results as JSON.",
    "dry_run": (
        "Print the complete recipe to stdout and the plan of the run to stderr. Nothing is loaded."
    ),
    "overwrite": "Replace the run directory if it exists.",
    "resume": (
        "Continue from the last complete checkpoint of the run directory. --resume PATH continues"
        " from that checkpoint, or from the last one of that run directory."
    ),
    "force_resume": "With --resume: continue although the recipe has changed.",
}
ALIASES = {
    "model_name": "model.model_name",
    "dataset_name": "dataset.name",
    "dataset_subset": "dataset.subsets",
    "dataset_split": "dataset.split",
    "cuda": "env.CUDA_VISIBLE_DEVICES",
    "run_name": "run_name",
}
USAGE = "usage: python train_model.py recipe.yaml [--section.key value ...]"
PRECEDENCE = "Flags override the recipe file, and the recipe file overrides the defaults."
SPELLING = (
    "In flags, - and _ mean the same. A list is written as: a b c, or as: [a, b, c]. A key with a"
    " mapping takes its entries one by one: --env.NAME value."
)
OTHER_NAMES = {trl_name: documented for documented, trl_name in TWO_NAMES}
MOST_CHOICES = 9  # listed beside a key; more are listed after its description


# ---- keys, for the command line


def alternatives(annotation: Any) -> list[Any]:
    """The members of a union, without Annotated."""
    if typing.get_origin(annotation) is Annotated:
        return alternatives(typing.get_args(annotation)[0])
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        members = typing.get_args(annotation)
        return [alternative for member in members for alternative in alternatives(member)]
    return [annotation]


def is_list(annotation: Any) -> bool:
    """Whether a key with this annotation can take a list."""
    return any(typing.get_origin(a) is list or a is list for a in alternatives(annotation))


def key_path(
    parts: list[str], section: type[Section] = Recipe
) -> tuple[tuple[str, ...], Any] | None:
    """The path and the annotation of the key that the dotted `parts` name, or None if unknown.

    In a mapping such as env, the parts after its name are one key: it may contain dots.
    """
    first, *rest = parts
    info = section.model_fields.get(first)
    if info is None:
        return None
    if _is_section(info.annotation):
        inner = key_path(rest, info.annotation) if rest else None
        return inner and ((first, *inner[0]), inner[1])
    if typing.get_origin(info.annotation) is dict and rest:
        return (first, ".".join(rest)), typing.get_args(info.annotation)[1]
    return ((first,), info.annotation) if not rest else None


def recipe_fields(
    section: type[Section] = Recipe, prefix: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], FieldInfo, str]]:
    """Every key: its path, its field, and the name of its section ("" at the top level)."""
    for name, info in section.model_fields.items():
        if _is_section(info.annotation):
            yield from recipe_fields(info.annotation, (*prefix, name))
        else:
            yield (*prefix, name), info, prefix[-1] if prefix else ""


def key_names() -> list[str]:
    """Every dotted key, and the names of the sections."""
    in_sections = [".".join(path) for path, _, section in recipe_fields() if section]
    return [*Recipe.model_fields, *in_sections]


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Section)


# ---- descriptions, for the help and the docs


class KeyDescription(NamedTuple):
    """What the help and the docs say about one key."""

    key: str
    section: str  # "" at the top level
    type: str
    default: str  # as it is written in YAML; "required" if there is none
    text: str
    only_trl: bool  # one of the options of trl.GRPOConfig that GTPO does not describe itself


def describe_keys() -> list[KeyDescription]:
    """A description of every key, in the order of the schema."""
    return [_describe(path, info, section) for path, info, section in recipe_fields()]


def _describe(path: tuple[str, ...], info: FieldInfo, section: str) -> KeyDescription:
    key, text = ".".join(path), " ".join((info.description or "").split())
    only_trl = section == "training" and path[-1] not in DocumentedTraining.model_fields
    if only_trl:
        default = _default_of_trl(grpo_options()[path[-1]].default)
        text = f"{text}." if text else ""
    else:
        default = _default(info)
    choices = _choices(info.annotation)
    if only_trl and path[-1] in DERIVED:
        text = f"Cannot be set: {DERIVED[path[-1]]}."
    elif documented := OTHER_NAMES.get(key):
        text = f"{text} Another way to set {documented}; give one of them."
    elif only_trl and path[-1] in REQUIRED_BY_GTPO:
        text = f"{text} GTPO allows only the default."
    elif len(choices) > MOST_CHOICES:
        text = f"{text} One of: {', '.join(choices)}."
    return KeyDescription(key, section, _type_name(info.annotation), default, text, only_trl)


def _default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    if isinstance(info.default_factory, SameAs):
        return f"the value of {info.default_factory.key}"
    return _as_yaml(info.default)


def _default_of_trl(source: str) -> str:
    """A default from TRL's source, as it is written in YAML; "" if it is computed there."""
    if source in ("list", "dict"):
        return {"list": "[]", "dict": "{}"}[source]
    try:
        return _as_yaml(ast.literal_eval(source))
    except ValueError:
        return ""


def _as_yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_as_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else '""'


def _choices(annotation: Any) -> list[str]:
    """The values that the Literals of an annotation list."""
    return [
        _as_yaml(choice)
        for alternative in alternatives(annotation)
        if typing.get_origin(alternative) is Literal
        for choice in typing.get_args(alternative)
    ]


def _type_name(annotation: Any) -> str:
    """`int`, `int or float`, `auto or bool`, `list of str`: the types and choices a key takes."""
    names: list[str] = []
    for alternative in alternatives(annotation):
        if alternative is type(None):
            continue
        if typing.get_origin(alternative) is Literal:
            choices = _choices(alternative)
            names += choices if len(choices) <= MOST_CHOICES else ["one of a list"]
        elif typing.get_origin(alternative) is list:
            item = typing.get_args(alternative)[0]
            few = len(_choices(item)) <= MOST_CHOICES
            names.append(f"list of {_type_name(item)}" if few else "list")
        elif typing.get_origin(alternative) is dict:
            names.append("mapping")
        else:
            names.append({dict: "mapping"}.get(alternative, alternative.__name__))
    *others, last = dict.fromkeys(names)
    return f"{', '.join(others)} or {last}" if others else last


# ---- the help


def help_text() -> str:
    """Every switch, short flag and key with its type, default and description."""
    keys = describe_keys()
    switches = {
        **SWITCHES,
        **{name: f"The same as --{key}." for name, key in ALIASES.items()},
    }
    return "\n".join(
        [
            USAGE,
            "",
            textwrap.fill(f"{PRECEDENCE} {SPELLING}", 100),
            "",
            *(_help_of_switch(name, text) for name, text in switches.items()),
            "",
            "Keys (type; default):",
            *(_help_of_key(key) for key in keys if not key.only_trl),
            "",
            "Other options of trl.GRPOConfig (type; TRL's default):",
            *(_help_of_key(key) for key in keys if key.only_trl),
        ]
    )


def _help_of_switch(name: str, text: str) -> str:
    flag = f"  --{name.replace('_', '-'):<18} "
    return textwrap.fill(text, 100, initial_indent=flag, subsequent_indent=" " * len(flag))


def _help_of_key(key: KeyDescription) -> str:
    about = f"({key.type}; {key.default})" if key.default else f"({key.type})"
    head = textwrap.fill(
        f"--{key.key}  {about}", 100, initial_indent="  ", subsequent_indent=" " * 8
    )
    if not key.text:
        return head
    indent = " " * 6
    return (
        f"{head}\n{textwrap.fill(key.text, 100, initial_indent=indent, subsequent_indent=indent)}"
    )


# ---- the page of the docs


def reference_page() -> str:
    """`docs/recipe_reference.md`: every section and key, then TRL's other options."""
    keys = describe_keys()
    flags = [
        *((f"--{name.replace('_', '-')}", text) for name, text in SWITCHES.items()),
        *((f"--{n.replace('_', '-')}", f"The same as --{key}.") for n, key in ALIASES.items()),
    ]
    trl = importlib.metadata.version("trl")
    return "\n".join(
        [
            "<!-- Made from the schema by: python -m gtpo.recipe.keys > docs/recipe_reference.md",
            "     Do not edit it by hand. tests/test_recipe.py checks that it is current. -->",
            "",
            "# Recipe reference",
            "",
            "```bash",
            "python train_model.py config.yaml --training.learning_rate 2e-6",
            "```",
            "",
            "`python train_model.py --help` prints this page on the terminal.",
            "",
            "A recipe is a YAML file that describes a run. Only the sections `model` and `dataset`",
            "are required. Every key is also a flag: `--section.key value`.",
            "",
            *textwrap.wrap(PRECEDENCE, 100),
            *textwrap.wrap(SPELLING, 100),
            "",
            "## Flags that are not keys",
            "",
            "| flag | meaning |",
            "|---|---|",
            *(f"| `{flag}` | {_cell(text)} |" for flag, text in flags),
            "",
            *_page_of_section("Top level", "", Recipe, keys),
            *(
                line
                for name, info in Recipe.model_fields.items()
                if _is_section(info.annotation)
                for line in _page_of_section(f"`{name}`", name, info.annotation, keys)
            ),
            "## Other options of `training`",
            "",
            "`training` also takes every option of `trl.GRPOConfig`, by TRL's name. This list is",
            f"that of TRL {trl}. The default is TRL's own.",
            "",
            *_table([key for key in keys if key.only_trl]),
        ]
    )


def _page_of_section(
    title: str, name: str, section: type[Section], keys: list[KeyDescription]
) -> list[str]:
    documented = DocumentedTraining if issubclass(section, DocumentedTraining) else section
    about = "" if section is Recipe else " ".join((documented.__doc__ or "").split())
    rows = [key for key in keys if key.section == name and not key.only_trl]
    return [f"## {title}", "", *([about, ""] if about else []), *_table(rows), ""]


def _table(keys: list[KeyDescription]) -> list[str]:
    head = ["| key | type | default | meaning |", "|---|---|---|---|"]
    rows = []
    for key in keys:
        is_value = key.default not in ("", "required") and not key.default.startswith("the value")
        default = f"`{key.default}`" if is_value else key.default
        rows.append(f"| `{key.key}` | {key.type} | {default} | {_cell(key.text)} |")
    return head + rows


def _cell(text: str) -> str:
    """`text` in a cell of a Markdown table: no cell ends in it, and no HTML begins."""
    code_or_tag = re.compile("`[^`]*`|<")
    text = code_or_tag.sub(lambda match: "&lt;" if match[0] == "<" else match[0], text)
    return text.replace("|", "\\|")


if __name__ == "__main__":
    print(reference_page())
