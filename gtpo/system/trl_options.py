"""The options of `trl.GRPOConfig`, read from the installed sources.

An import of trl takes seconds, and a typo in a recipe should be reported sooner.
"""

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union

# Options that would corrupt GTPO's factor, each with the only value that GTPO allows: TRL's entropy
# mask, its entropy bonus, and Liger's loss.
REQUIRED_BY_GTPO = {
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "use_liger_kernel": False,
}

# Base classes first, because a subclass's field replaces its parent's.
_SOURCES = (
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/grpo_config.py", "GRPOConfig"),
)
# The names that may occur in an annotation, beside transformers' enumerations.
_TYPES = {
    **{kind.__name__: kind for kind in (int, float, str, bool, dict, list)},
    **{"Any": Any, "Literal": Literal, "Union": Union},
}


class TrlOption(NamedTuple):
    """One field of `GRPOConfig`."""

    type: Any  # for validation; an enumeration of transformers is a Literal of its texts
    default: str  # as written in the source
    help: str  # the first sentence, without its full stop


@functools.cache
def grpo_options() -> dict[str, TrlOption]:
    """Every field of the installed `GRPOConfig`, by name.

    Raises ModuleNotFoundError if trl or transformers is not installed.
    """
    options = {}
    for package, file, class_name in _SOURCES:
        for statement in _class_body(_package_folder(package) / file, class_name):
            if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
                options[statement.target.id] = _option(statement)
    return options


def _package_folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(
            f"{package} is not installed; run: pip install -r requirements.txt", name=package
        )
    return Path(spec.submodule_search_locations[0])


def _class_body(path: Path, class_name: str) -> list[ast.stmt]:
    return next(
        node.body
        for node in _parsed(path).body
        if isinstance(node, ast.ClassDef) and node.name == class_name
    )


def _parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def _enumerations() -> dict[str, Any]:
    """transformers' enumerations as Literals: `OptimizerNames` is Literal["adamw_torch", ...]."""
    enumerations = {}
    for file in ("training_args.py", "trainer_utils.py"):
        for node in _parsed(_package_folder("transformers") / file).body:
            if isinstance(node, ast.ClassDef) and any("Enum" in ast.unparse(b) for b in node.bases):
                values = [
                    member.value.value
                    for member in node.body
                    if isinstance(member, ast.Assign) and isinstance(member.value, ast.Constant)
                ]
                enumerations[node.name] = Literal[tuple(values)]
    return enumerations


def _option(statement: ast.AnnAssign) -> TrlOption:
    keywords = {k.arg: k.value for k in getattr(statement.value, "keywords", [])}
    default = keywords.get("default", keywords.get("default_factory"))
    return TrlOption(
        type=_type(statement.annotation),
        default=ast.unparse(default) if default else "",
        help=_first_sentence(keywords),
    )


def _type(annotation: ast.expr) -> Any:
    """The annotation as a type.

    `SomeEnum | str` takes the values of the enumeration. A name that is not known becomes `str`.
    """
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    known = {name: _enumerations().get(name, _TYPES.get(name, str)) for name in names}
    if enumerations := names & _enumerations().keys():
        known["str"] = known[enumerations.pop()]
    # The expression comes from the installed trl. It sees no builtins and no other names.
    code = compile(ast.Expression(annotation), "<annotation>", "eval")
    return eval(code, {"__builtins__": {}}, known)


def _first_sentence(keywords: dict[str, ast.expr]) -> str:
    try:
        text = ast.literal_eval(keywords["metadata"])["help"]
    except (KeyError, ValueError):
        return ""
    return " ".join(text.split()).replace("%%", "%").split(". ")[0].rstrip(".")
