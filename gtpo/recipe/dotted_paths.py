"""Dotted paths to Python objects: checked without an import, and then loaded.

The trainers import torch, and a typo in a path should not wait for that.
"""

import ast
import difflib
import importlib
import importlib.machinery
import sys
from pathlib import Path
from typing import Any, NamedTuple

from gtpo.errors import Mistake

LITERALS = ast.Constant | ast.List | ast.Dict | ast.Set | ast.Tuple | ast.JoinedStr


def load_object(dotted: str) -> Any:
    """The object at `package.module.name` or `package.module:name`. Imports the module."""
    module, name = _split(dotted)
    return getattr(importlib.import_module(module), name)


def make_importable(recipe_folder: Path) -> None:
    """Let modules in the current folder and in the recipe's folder be imported.

    The folders go to the end of the path. So a datasets.py beside a recipe cannot replace the
    library of that name.
    """
    for folder in (str(Path.cwd()), str(recipe_folder)):
        if folder not in sys.path:
            sys.path.append(folder)


def check_dotted_path(key: str, dotted: str) -> Mistake | None:
    """A mistake about `key` if `dotted` cannot name something callable, else None.

    The path is looked up in the sources, without an import. Where the sources do not decide it
    (compiled modules, lazy imports, `import *`), the result is None, and the later import decides.
    """
    module, name = _split(dotted)
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
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, SyntaxError) else ""
        return Mistake(
            key, f"{dotted!r} cannot be imported, {source.name}{line} is not valid Python ({error})"
        )
    names = _names_in(tree)
    if name in names.defined:
        what = names.defined[name]
        if not what:  # callable, or not known
            return None
        return Mistake(
            key, f"{dotted!r} is {what}, which cannot be called; name a function or class"
        )
    if not names.complete:
        return None
    if (source.parent / name).is_dir() or (source.parent / f"{name}.py").is_file():
        return Mistake(key, f"{dotted!r} is a module; name a function or class in it")
    similar = difflib.get_close_matches(name, names.defined, 1) or names.public_callables()[:5]
    return Mistake(
        key, f"module {module!r} has no {name!r}; it has {', '.join(similar) or 'nothing to call'}"
    )


def _split(dotted: str) -> tuple[str, str]:
    """The module and the name of a dotted path."""
    module, _, name = dotted.rpartition(":" if ":" in dotted else ".")
    return module, name


def _source(module: str) -> Path | None:
    """The module's file, found without importing its parents; None if it is not Python source.

    Raises ModuleNotFoundError with the first part of the path that does not exist.
    """
    folders = None  # sys.path first, then the folders of each package
    parts = module.split(".")
    for i, part in enumerate(parts):
        parent = ".".join(parts[: i + 1])
        if i == 0 and (part in sys.builtin_module_names or part == "__main__"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(part, folders)
        if spec is None and parent in sys.modules:  # os.path, whose file has another name
            return None
        if spec is None:
            raise ModuleNotFoundError(name=parent)
        folders = spec.submodule_search_locations
        if folders is None and i < len(parts) - 1:
            raise ModuleNotFoundError(name=".".join(parts[: i + 2]))
    return Path(spec.origin) if spec.origin and spec.origin.endswith(".py") else None


class _Names(NamedTuple):
    """The names that a module defines at its top level."""

    # "" for a function or class, None if not known, else what it is: "a float", "a collection"
    defined: dict[str, str | None]
    complete: bool  # whether no other names can appear when the module is imported

    def public_callables(self) -> list[str]:
        return sorted(n for n, what in self.defined.items() if what == "" and n[0] != "_")


def _names_in(tree: ast.Module) -> _Names:
    """The top-level names of a module, also those inside if, try and with statements."""
    defined, complete, pending = {}, True, list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined[node.name] = ""
            complete &= node.name != "__getattr__"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            for alias in node.names:
                defined[alias.asname or alias.name.split(".")[0]] = None
                complete &= alias.name != "*"
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            for target in targets:
                for part in ast.walk(target):
                    if isinstance(part, ast.Name):
                        what = _what_literal(node.value) if part is target else None
                        defined.setdefault(part.id, what)
        if isinstance(node, ast.Assign | ast.Expr) and "sys.modules" in ast.unparse(node):
            complete = False  # a module that replaces itself, as trl and transformers do
        if isinstance(node, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            children = ast.iter_child_nodes(node)
            pending += [c for c in children if isinstance(c, ast.stmt | ast.ExceptHandler)]
    return _Names(defined, complete)


def _what_literal(value: ast.expr | None) -> str | None:
    """What a literal is, for example "a float" or "a collection"; None for other expressions."""
    if isinstance(value, ast.Constant):
        return f"a {type(value.value).__name__}"
    return "a collection" if isinstance(value, LITERALS) else None
