"""Writes the tables of docs/architecture.md: `python docs/tables.py`.

One table lists every module with the first sentence of its docstring. The other lists the members
of other libraries that GTPO relies on, from gtpo/hooks/seams.py. tests/test_docs.py checks that the
page is up to date.
"""

import ast
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs/architecture.md"
WINGS = [
    "answers",
    "system",
    "recipe",
    "hooks",
    "models",
    "rewards",
    "evaluation",
    "runs",
    "report",
]


def main() -> None:
    """Writes both tables between their marks."""
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")


def with_tables(page: str) -> str:
    """`page` with both tables as they should be."""
    for mark, table in (("modules", modules()), ("seams", seams())):
        page = re.sub(
            rf"(<!-- {mark} -->\n).*?(<!-- /{mark} -->)",
            lambda marks, table=table: f"{marks[1]}{table}{marks[2]}",
            page,
            flags=re.DOTALL,
        )
    return page


def modules() -> str:
    """A table of the modules directly in gtpo/, and one for each wing."""
    parts = [_table(sorted((ROOT / "gtpo").glob("*.py")))]
    for wing in WINGS:
        folder = ROOT / "gtpo" / wing
        files = [file for file in sorted(folder.glob("*.py")) if file.stem != "__init__"]
        parts.append(
            f"### gtpo/{wing}\n\n{first_sentence(folder / '__init__.py')}\n\n{_table(files)}"
        )
    return "\n" + "\n".join(parts) + "\n"


def seams() -> str:
    """A table of the members that GTPO relies on, a part for each library."""
    from gtpo.hooks.seams import SEAMS

    parts = []
    for library in dict.fromkeys(seam.library for seam in SEAMS):
        rows = ["| member | how | used by | why |", "|---|---|---|---|"]
        for seam in SEAMS:
            if seam.library == library:
                users = ", ".join(f"`{user}`" for user in seam.users)
                rows.append(f"| `{seam.member}` | {seam.how} | {users} | {seam.why} |")
        table = "\n".join(rows)
        parts.append(f"### {library.package} {', '.join(library.versions)}\n\n{table}\n")
    return "\n" + "\n".join(parts) + "\n"


def first_sentence(file: Path) -> str:
    """The first sentence of a module's docstring, on one line."""
    docstring = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    text = " ".join(docstring.split("\n\n")[0].split()).replace("|", "\\|")
    return re.split(r"(?<=[.!?])\s", text)[0].removesuffix(":")


def _table(files: list[Path]) -> str:
    rows = [f"| `{file.relative_to(ROOT)}` | {first_sentence(file)} |" for file in files]
    return "\n".join(["| module | what it does |", "|---|---|", *rows, ""])


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
