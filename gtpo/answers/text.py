r"""Find the final answer in a text, score the text's format, and decide whether two answers are the
same.

A completion should end as references do: `<reasoning>\n6 * 3 =
18\n</reasoning>\n<answer>18</answer>`. Nothing here raises or hangs on any text, from any thread;
the time is linear in its length. What a correct answer is worth is decided in `reward_math.py`.
"""

import re


def gsm8k_answer(text: str) -> str:
    """The text after the final `####`; else after the final `###`; else the last word; "" where
    there is none.
    """
    mark = "####" if "####" in text else "###"
    return text.rpartition(mark)[2].strip() if mark in text else _last_word(text)


def boxed_answer(text: str) -> str:
    r"""The content of the last `\boxed{…}` or `\fbox{…}`, braces balanced, or of `\boxed 5`; else
    the last word.

    Of nested boxes the inner one counts; `\{` and `\}` are no braces; a box that never closes is
    none.
    """
    last, open_braces = None, []
    for token in re.finditer(r"\\(?:boxed|fbox)(?![A-Za-z])\s*(\{?)|\\.|[{}]", text, re.DOTALL):
        is_box, start = token[1] is not None, token.end()
        if is_box and not token[1] and text[start : start + 1] not in ("", "$", "}"):
            last = slice(start, None)
        elif token[1] or token[0] == "{":
            open_braces.append(start if is_box else -1)
        elif (
            token[0] == "}"
            and open_braces
            and (start := open_braces.pop()) > (last.start if last else -1)
        ):
            last = slice(start, token.start())
    if last and last.stop is None:  # `\boxed 5` ends at white space, or where the formula does
        return re.match(r"[^\s$]*", text[last])[0].rstrip(".,;")
    return text[last].strip() if last else _last_word(text)


def _last_word(text: str) -> str:
    return (text.rsplit(None, 1) or [""])[-1]


def final_answer(text: str) -> str | None:
    """The content of the answer block, stripped; None if it is not well formed (see
    `format_score`), as two are not.
    """
    block = _block(text, "answer")
    return text[block].strip() if block else None


def format_reference(reasoning: str, answer: str) -> str:
    """The two blocks that a completion should have, around a known-good solution."""
    return f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>{answer}</answer>"


def reference_answer(reference: str) -> str:
    """What stands in the block that ends a formatted reference; all of a bare answer."""
    content = reference.removesuffix("</answer>")
    return content.rpartition("<answer>")[2].strip() if content != reference else reference


def format_score(text: str) -> float:
    """How well a text keeps to the format: 10 for one reasoning block followed by one answer block
    that ends the text.

    A block is well formed when each of its tags occurs exactly once, in order; after an answer
    block only white space may follow. Text before the reasoning and between the blocks is allowed,
    and a block may be empty. Otherwise each well-formed block scores 1.5 where the other one has a
    tag in the text, else 1.0: two that overlap or nest score 3.0 together, and an answer inside the
    reasoning, which cannot end the text, leaves 1.5.
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
    if not text.count(f"<{tag}>") == 1 == text.count(f"</{tag}>"):
        return None
    content = slice(text.find(f"<{tag}>") + len(f"<{tag}>"), text.find(f"</{tag}>"))
    ends_text = not text[content.stop + len(f"</{tag}>") :].strip()
    return content if content.start <= content.stop and (ends_text or tag != "answer") else None
