r"""Finds the final answer in a text, formats references, and scores the format of a text.

A completion should end as references do:
`<reasoning>\n6 * 3 = 18\n</reasoning>\n<answer>18</answer>`.

No function here raises or hangs on any text. Each takes time linear in its length. What a correct
answer is worth is decided in `reward_math.py`.
"""

import re


def gsm8k_answer(text: str) -> str:
    """The text after the last `####`, else after the last `###`, else the last word.

    Returns "" where there is none of these.
    """
    mark = "####" if "####" in text else "###"
    return text.rpartition(mark)[2].strip() if mark in text else _last_word(text)


def boxed_answer(text: str) -> str:
    r"""The content of the last box; without a box, the last word.

    A box is `\boxed{...}`, `\fbox{...}` or `\boxed 5`. Braces are balanced, and `\{` and `\}` are
    no braces. Of nested boxes only the inner one counts. A box that never closes is none.
    """
    boxes = _boxes(text)
    return _content(text, boxes[-1]) if boxes else _last_word(text)


def boxed_answers(text: str) -> list[str]:
    """The contents of all boxes in their order (see `boxed_answer`)."""
    return [_content(text, box) for box in _boxes(text)]


def _boxes(text: str) -> list[slice]:
    """Where the contents of boxes stand; a box without braces has no end yet."""
    boxes: list[slice] = []
    open_braces: list[int] = []  # where a box's content begins; -1 for a brace that is no box
    for token in re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{?)|\\.|[{}]", text, re.DOTALL):
        is_box, start = token[1] is not None, token.end()
        if is_box and not token[1]:
            if text[start : start + 1] not in ("", "$", "}"):
                boxes.append(slice(start, None))
        elif token[1] or token[0] == "{":
            open_braces.append(start if is_box else -1)
        elif token[0] == "}" and open_braces:
            start = open_braces.pop()
            if start > (boxes[-1].start if boxes else -1):
                boxes.append(slice(start, token.start()))
    return boxes


def _content(text: str, box: slice) -> str:
    if box.stop is not None:
        return text[box].strip()
    # `\boxed 5` ends at white space, or where the formula does
    return re.match(r"[^\s$]*", text[box])[0].rstrip(".,;")


def _last_word(text: str) -> str:
    return (text.rsplit(None, 1) or [""])[-1]


def final_answer(text: str) -> str | None:
    """The content of the answer block, stripped.

    None where no answer block is well formed (see `format_score`), as where there are two.
    """
    block = _block(text, "answer")
    return text[block].strip() if block else None


def format_reference(reasoning: str, answer: str) -> str:
    """The two blocks that a completion should have, around a known-good solution."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>{answer}</answer>"


def reference_answer(reference: str) -> str:
    """The content of the block that ends a formatted reference; a bare answer as it is."""
    content = reference.removesuffix("</answer>")
    return content.rpartition("<answer>")[2].strip() if content != reference else reference


def format_score(text: str) -> float:
    """How well a text keeps to the format: 0, 1, 1.5, 3 or 10.

    10 is for one reasoning block followed by one answer block that ends the text. Otherwise each
    well-formed block scores 1.5 where the text has a tag of the other one, else 1.0.

    A block is well formed when each of its tags occurs exactly once, in order. Only white space may
    follow an answer block. Text before the reasoning and between the blocks is allowed, and a block
    may be empty. So two blocks that overlap or nest score 3.0 together. An answer inside the
    reasoning does not end the text, which leaves 1.5.
    """
    reasoning, answer = _block(text, "reasoning"), _block(text, "answer")
    if reasoning and answer and reasoning.stop < answer.start - len("<answer>"):
        return 10.0
    score = 0.0
    for block, other in ((reasoning, "answer"), (answer, "reasoning")):
        if block:
            score += 1.5 if f"<{other}>" in text or f"</{other}>" in text else 1.0
    return score


def _block(text: str, tag: str) -> slice | None:
    """Where the content of a well-formed block stands, None where there is no such block."""
    opening, closing = f"<{tag}>", f"</{tag}>"
    if not text.count(opening) == 1 == text.count(closing):
        return None
    content = slice(text.find(opening) + len(opening), text.find(closing))
    ends_text = not text[content.stop + len(closing) :].strip()
    return content if content.start <= content.stop and (ends_text or tag != "answer") else None
