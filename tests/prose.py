"""The sentences of a Markdown page, for tests of its prose."""

import re

FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
TABLE_RULE = re.compile(r"^\|[\s|:-]+\|$")


def sentences(page: str) -> list[str]:
    """The sentences of `page` as plain text.

    Headings, list items and table cells are read on their own. Code blocks, pictures, HTML and what
    programs write between two marks (`<!-- x -->` and `<!-- /x -->`) are left out. Inline code
    counts as one word, and a link counts as its text. A full stop ends a sentence, so pages use no
    abbreviations with one.
    """
    return [
        sentence
        for block in _blocks(_plain(page))
        for sentence in re.split(r"(?<=[.!?])[\"')*]*\s+", block)
        if sentence.strip()
    ]


def words(sentence: str) -> list[str]:
    """The words of a sentence: what holds a letter or a digit between white space."""
    return [word for word in sentence.split() if re.search(r"\w", word)]


def _plain(page: str) -> str:
    page = FENCE.sub("\n", page)
    page = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", " ", page, flags=re.DOTALL)
    page = re.sub(r"<!--.*?-->|</?[a-z][^>]*>", " ", page, flags=re.DOTALL)
    page = re.sub(r"`[^`]+`", "code", page)
    page = re.sub(r"!\[[^]]*\]\([^)]*\)", " ", page)
    return re.sub(r"\[([^]]+)\]\([^)]*\)", r"\1", page)


def _blocks(page: str) -> list[str]:
    """Paragraphs, headings, list items and table cells, each as one line."""
    blocks, lines = [], []
    for line in [*page.splitlines(), ""]:
        line = line.strip()
        begins = re.match(r"(?:[-*]|\d+\.)\s+|#+\s+|\|", line)
        if begins or not line:
            blocks.append(" ".join(lines))
            lines = []
        if line.startswith("|"):
            blocks += [] if TABLE_RULE.match(line) else line.strip("|").split("|")
        elif line.startswith("#"):
            blocks.append(line.lstrip("# "))
        elif line:
            lines.append(line[begins.end() :] if begins else line)
    return [block for block in blocks if block.strip()]
