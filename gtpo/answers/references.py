"""References: a solution of the data as reasoning and answer, and how its answer was found."""

import re
from collections import Counter
from collections.abc import Callable

from gtpo.answers.text import (
    boxed_answer,
    boxed_answers,
    format_reference,
    gsm8k_answer,
    reference_answer,
)

AFTER_HASHES, BOXED, TAGGED = "after ####", "boxed", "tagged"
NUMBER, WHOLE_TEXT = "as a number", "as the whole text"
OWN_RULE = "by the dataset's own rule"
# Nothing marks such an answer in its text, so it is probably not the answer.
LAST_WORD, SENTENCE = "as the last word", "as a whole sentence"
TAGS = re.compile("</?(?:reasoning|answer)>")
PLAIN_NUMBER = re.compile(r"[-+]?\s*\$?\s*(\d[\d,]*\.?\d*|\.\d+)(\s*/\s*\d+|e[-+]?\d+)?\s*%?")
SENTENCE_WORDS = 5  # a text with as many words and a full stop is a sentence


def formatted(text: str, read: Callable[[str], str]) -> str:
    """The formatted reference of a text: by its tags if it has them, else by `read`.

    With several answer blocks the last one counts. A box inside it is opened.
    """
    before, closing, _ = text.rpartition("</answer>")
    reasoning, opening, answer = before.rpartition("<answer>")
    if not (opening and closing):
        return read(text)
    if boxed_answers(answer):
        answer = boxed_answer(answer)
    return format_reference(TAGS.sub("", reasoning).strip(), answer.strip())


def how_found(text: str, reference: str) -> str:
    """How the answer of a formatted `reference` was found in its `text`, as a clause."""
    text, answer = text.strip(), reference_answer(reference)
    if "<answer>" in text and "</answer>" in text:
        return TAGGED
    if "###" in text and answer == gsm8k_answer(text):
        return AFTER_HASHES
    if (boxes := boxed_answers(text)) and answer == boxes[-1]:
        return BOXED
    if answer == text:
        if PLAIN_NUMBER.fullmatch(text):
            return NUMBER
        is_sentence = text.endswith((".", "!")) and len(text.split()) >= SENTENCE_WORDS
        return SENTENCE if is_sentence else WHOLE_TEXT
    return LAST_WORD if text.split()[-1:] == [answer] else OWN_RULE


def summary(found: Counter) -> str:
    """A clause such as `30 after ####, 6 boxed`; the most frequent comes first."""
    return ", ".join(f"{count} {how}" for how, count in found.most_common())


def warning(found: Counter, examples: dict[str, str]) -> str | None:
    """A sentence if nothing marks the answer in most texts; `examples` has an answer by `how`."""
    unmarked = found[LAST_WORD] + found[SENTENCE]
    if 2 * unmarked <= found.total():
        return None
    how = LAST_WORD if found[LAST_WORD] >= found[SENTENCE] else SENTENCE
    return (
        f"nothing marks the answer in {unmarked} of {found.total()} references, so"
        f" {how.removeprefix('as ')} was taken, for example {examples[how][:80]!r}; put answers"
        " after ####, in \\boxed{} or in <answer> tags, or name a column that holds them alone"
    )
