"""What `trl.GRPOConfig` accepts, read from the installed sources: importing trl takes seconds, a
typo should not.
"""

import ast
import functools
import importlib.util
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union

# What GTPO's factor would corrupt, with the value that leaves it alone: TRL's entropy mask, its
# bonus, and Liger.
REQUIRED_BY_GTPO = {
    "top_entropy_quantile": 1.0,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "use_liger_kernel": False,
}

_SOURCES = (  # base class first: a subclass's field replaces its parent's
    ("transformers", "training_args.py", "TrainingArguments"),
    ("trl", "trainer/base_config.py", "_BaseConfig"),
    ("trl", "trainer/grpo_config.py", "GRPOConfig"),
)
_TYPES = {
    "int": int,
    "float": float,
    "str": str,
    "bool": bool,
    "dict": dict,
    "list": list,
    "Any": Any,
    "Literal": Literal,
    "Union": Union,
}


class TrlOption(NamedTuple):
    type: Any  # for validation; enumerations of transformers count as text
    default: str  # as written in the source
    help: str  # first sentence


@functools.cache
def grpo_options() -> dict[str, TrlOption]:
    """Every field of the installed `GRPOConfig` by name. Raises ModuleNotFoundError where trl is
    not installed.
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
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return next(
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == class_name
    )


@functools.cache
def _enumerations() -> dict[str, Any]:
    """transformers' enumerations of text, as literals: `OptimizerNames` -> Literal["adamw_torch",
    ...].
    """
    found = {}
    for file in ("training_args.py", "trainer_utils.py"):
        for node in ast.parse(
            (_package_folder("transformers") / file).read_text(encoding="utf-8")
        ).body:
            if isinstance(node, ast.ClassDef) and any(
                "Enum" in ast.unparse(base) for base in node.bases
            ):
                values = [
                    a.value.value
                    for a in node.body
                    if isinstance(a, ast.Assign) and isinstance(a.value, ast.Constant)
                ]
                found[node.name] = Literal[tuple(values)]
    return found


def _option(statement: ast.AnnAssign) -> TrlOption:
    keywords = {k.arg: k.value for k in getattr(statement.value, "keywords", [])}
    default = keywords.get("default", keywords.get("default_factory"))
    return TrlOption(
        _type(statement.annotation),
        ast.unparse(default) if default else "",
        _first_sentence(keywords),
    )


def _type(annotation: ast.expr) -> Any:
    """The annotation as a type. `SomeEnum | str` takes the enumeration's values; other names become
    text.
    """
    names = {node.id for node in ast.walk(annotation) if isinstance(node, ast.Name)}
    known = {name: _enumerations().get(name, _TYPES.get(name, str)) for name in names}
    if enumerations := names & _enumerations().keys():
        known["str"] = known[enumerations.pop()]
    # An annotation from the installed trl, with no builtins and no name but those above.
    return eval(
        compile(ast.Expression(annotation), "<annotation>", "eval"), {"__builtins__": {}}, known
    )


def _first_sentence(keywords: dict[str, ast.expr]) -> str:
    try:
        text = ast.literal_eval(keywords["metadata"])["help"]
    except (KeyError, ValueError):
        return ""
    return " ".join(text.split()).replace("%%", "%").split(". ")[0].rstrip(".")
