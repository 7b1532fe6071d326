"""Check a dotted path without importing what it names: the trainers import torch, and a typo should
not wait for it.
"""

import ast
import difflib
import importlib
import importlib.machinery
import sys
from pathlib import Path
from typing import Any

from gtpo.errors import Mistake


def make_importable(recipe_folder: Path) -> None:
    """Last on the path, so that a stray datasets.py beside a recipe cannot stand in for the
    library.
    """
    sys.path.extend(
        folder for folder in (str(Path.cwd()), str(recipe_folder)) if folder not in sys.path
    )


def check_dotted_path(key: str, dotted: str) -> Mistake | None:
    """A mistake of `key` if `dotted` (`package.module.name` or `package.module:name`) cannot be a
    callable, else None.

    Where the sources do not tell (compiled modules, lazy or starred imports) the later, real import
    decides.
    """
    module, _, name = dotted.rpartition(":" if ":" in dotted else ".")
    try:
        source = _source(module)
    except ModuleNotFoundError as error:
        return Mistake(
            key,
            f"{dotted!r} names module {module!r}, but there is no module {error.name!r} here or"
            " installed",
        )
    if source is None:
        return None
    try:
        names, complete = _top_level_names(ast.parse(source.read_text(encoding="utf-8")))
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        return Mistake(
            key, f"{dotted!r} cannot be imported, {source.name}{line} is not valid Python ({error})"
        )
    if name not in names:
        if (
            not complete
            or (source.parent / name).is_dir()
            or (source.parent / f"{name}.py").is_file()
        ):
            return (
                Mistake(key, f"{dotted!r} is a module; name a function or class in it")
                if complete
                else None
            )
        close = (
            difflib.get_close_matches(name, names, 1)
            or sorted(n for n in names if names[n] == "" and not n.startswith("_"))[:5]
        )
        return Mistake(
            key,
            f"module {module!r} has no {name!r}; it has {', '.join(close) or 'nothing to call'}",
        )
    return (
        Mistake(
            key, f"{dotted!r} is {names[name]}, which cannot be called; name a function or class"
        )
        if names[name]
        else None
    )


def _source(module: str) -> Path | None:
    """The module's file, found without importing its parents; None if it is not Python source."""
    path = None  # sys.path first, then each package's folder
    parts = module.split(".")
    for i, part in enumerate(parts):
        if i == 0 and (part in sys.builtin_module_names or part in ("__main__",)):
            return None
        spec = importlib.machinery.PathFinder.find_spec(part, path)
        # os.path: a module under another name
        if spec is None and ".".join(parts[: i + 1]) in sys.modules:
            return None
        if spec is None:
            raise ModuleNotFoundError(name=".".join(parts[: i + 1]))
        path = spec.submodule_search_locations
        if path is None and i < len(parts) - 1:
            raise ModuleNotFoundError(name=".".join(parts[: i + 2]))
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


def _top_level_names(tree: ast.Module) -> tuple[dict[str, str | None], bool]:
    """Names bound at module level and whether these are all: "" for a function or class, what it is
    if not callable, else None.
    """
    names, complete, pending = {}, True, list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names[node.name] = ""
            complete &= node.name != "__getattr__"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = None
                complete &= alias.name != "*"
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            literal = isinstance(
                node.value, ast.Constant | ast.List | ast.Dict | ast.Set | ast.Tuple | ast.JoinedStr
            )
            what = (
                f"a {type(ast.literal_eval(node.value)).__name__}"
                if isinstance(node.value, ast.Constant)
                else "a collection"
            )
            for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                for leaf in ast.walk(target):
                    if isinstance(leaf, ast.Name):
                        names.setdefault(leaf.id, what if literal and leaf is target else None)
        elif isinstance(node, ast.Expr) and "sys.modules" in ast.unparse(node):
            complete = False
        pending += [
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler)
            and isinstance(child, ast.stmt | ast.ExceptHandler)
        ]
        if isinstance(node, ast.Assign) and "sys.modules" in ast.unparse(node):
            complete = False  # a lazy module: trl, transformers
    return names, complete


def load_object(dotted: str) -> Any:
    """The object at `package.module.name` or `package.module:name`; imports the module."""
    module, _, name = dotted.rpartition(":" if ":" in dotted else ".")
    return getattr(importlib.import_module(module), name)
