"""A row of data as a problem: the messages of its prompt, its answer, and its reference.

The question is a text or a conversation. Question and answer may lie inside a column: `a.b.0` is
the first item of the entry `b` of the column `a`.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any, Literal, NamedTuple

from gtpo.answers import references
from gtpo.answers.text import reference_answer
from gtpo.errors import RecipeError

ROLES = {"human": "user", "gpt": "assistant"}  # other names of roles, as in ShareGPT's files
SYSTEM = ("system", "developer")

Row = dict[str, Any]
SystemRole = Literal["system", "user"]  # of the message in which a system message stands


def with_system_message(
    messages: list[Row], instruction: str | None, role: SystemRole = "system"
) -> list[Row]:
    """`messages` after the system message `instruction`, unless they begin with one of their own.

    With the role `user`, the text of the system message stands at the start of the first message of
    the user instead.
    """
    has_own = bool(messages) and messages[0]["role"] in SYSTEM
    if instruction and not has_own:
        messages = [{"role": "system", "content": instruction}, *messages]
    if role == "system" or len(messages) < 2 or messages[0]["role"] not in SYSTEM:
        return messages
    system, first, *rest = messages
    if first["role"] != "user":
        return messages
    return [{**first, "content": f"{system['content']}\n\n{first['content']}"}, *rest]


class Columns(NamedTuple):
    """Where a row has its question and its answer; the names may be dotted."""

    question: str
    answer: str
    answer_is_given: bool = True  # False for a default, which a conversation need not have


def find_columns(columns: Columns, rows: Iterable[Row]) -> Columns:
    """`columns`, looked for in as few rows as it takes.

    Where the question is a conversation and there is no column with an answer, its last message is
    the answer. Raises RecipeError if a column is missing, with those that exist.
    """
    missing, names, row = [columns.question, columns.answer], {}, {}
    for row in rows:
        names |= dict.fromkeys(row)
        missing = [name for name in missing if not _follow(row, name)[0]]
        is_conversation = _is_conversation(_follow(row, columns.question)[1])
        if columns.answer in missing and is_conversation and not columns.answer_is_given:
            return Columns(columns.question, columns.question)
        if not missing:
            return columns
    for name in missing:
        if isinstance(inner := row.get(top_column(name, row)), dict):
            names |= dict.fromkeys(f"{top_column(name, row)}.{key}" for key in inner)
    raise missing_columns(missing, names)


def missing_columns(missing: Iterable[str], existing: Iterable[str]) -> RecipeError:
    """The error about columns that are not among the `existing` ones."""
    return RecipeError(
        "dataset",
        f"no column {' or '.join(map(repr, dict.fromkeys(missing)))}; this dataset has"
        f" {', '.join(existing)} (set dataset.question_column and dataset.answer_column)",
    )


def top_column(name: str, columns: Iterable[str]) -> str | None:
    """The column in which a dotted name lies: the longest beginning that is a column."""
    keys = name.split(".")
    beginnings = (".".join(keys[:count]) for count in range(len(keys), 0, -1))
    return next((beginning for beginning in beginnings if beginning in columns), None)


class ProblemReader:
    """Reads rows as problems, and counts how.

    `read_reference` makes a formatted reference of a text of the answer column.
    """

    def __init__(
        self,
        columns: Columns,
        system_instruction: str | None,
        read_reference: Callable[[str], str],
        system_role: SystemRole = "system",
    ):
        self.columns, self.system_instruction = columns, system_instruction
        self.system_role = system_role
        self.read_reference = read_reference
        self.found: Counter = Counter()  # how answers were found
        self.examples: dict[str, str] = {}  # an answer for each way
        self.own_system = self.ended_by_assistant = 0  # numbers of prompts

    def filled_rows(self, rows: Iterable[Row]) -> list[int]:
        """The places of the rows that have a question and an answer.

        Raises RecipeError for a value that is neither text nor a number nor a conversation.
        """
        filled = []
        for i, row in enumerate(rows):
            try:
                if self._messages(row) and self._answer_text(row).strip():
                    filled.append(i)
            except _Unreadable as error:
                raise RecipeError("dataset", f"{error} (row {i + 1})") from None
        return filled

    def problem(self, row: Row) -> Row:
        """The prompt, answer and reference of a row that has them."""
        prompt = self._messages(row)
        if prompt[0]["role"] in SYSTEM:
            self.own_system += 1
        prompt = with_system_message(prompt, self.system_instruction, self.system_role)
        if self.columns.question != self.columns.answer and self._ends_with_assistant(row):
            self.ended_by_assistant += 1
        text = self._answer_text(row)
        reference = references.formatted(text, self.read_reference)
        answer, how = reference_answer(reference), references.how_found(text, reference)
        self.found[how] += 1
        self.examples.setdefault(how, answer)
        return {"prompt": prompt, "answer": answer, "reference": reference}

    def notes(self) -> list[str]:
        """Sentences on how references were found, and on prompts that are not just a question."""
        notes = [f"references found: {references.summary(self.found)}"]
        if self.own_system:
            notes.append(
                f"{self.own_system} prompts have a system message of their own, so they do not get"
                " dataset.system_instruction"
            )
        if self.ended_by_assistant:
            notes.append(
                f"{self.ended_by_assistant} prompts end with a message of the assistant, which is"
                " left out"
            )
        return notes

    def _messages(self, row: Row) -> list[dict[str, str]]:
        """The messages of a row's question; none if it is empty."""
        column = self.columns.question
        value = _follow(row, column)[1]
        if not _is_conversation(value):
            text = _text(value, column)
            return [{"role": "user", "content": text}] if text.strip() else []
        messages = [_message(message, column) for message in value]
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()  # what the model is to write
        if messages and messages[-1]["role"] != "user":
            raise _Unreadable(
                f"the column {column!r} ends with a message of the role"
                f" {messages[-1]['role']!r}; a prompt ends with a message of the user"
            )
        return messages if messages and messages[-1]["content"].strip() else []

    def _ends_with_assistant(self, row: Row) -> bool:
        value = _follow(row, self.columns.question)[1]
        if not _is_conversation(value):
            return False
        return _message(value[-1], self.columns.question)["role"] == "assistant"

    def _answer_text(self, row: Row) -> str:
        value = _follow(row, self.columns.answer)[1]
        if not _is_conversation(value):
            return _text(value, self.columns.answer)
        last = _message(value[-1], self.columns.answer)
        return last["content"] if last["role"] == "assistant" else ""


class _Unreadable(Exception):
    """A value of a row cannot be used; the message is a sentence without the row."""


def _follow(row: Row, name: str) -> tuple[bool, Any]:
    """Whether a row can have the column `name`, and its value."""
    top = top_column(name, row)
    if top is None:
        return False, None
    value = row[top]
    for key in filter(None, name[len(top) :].split(".")):
        if value is None:
            return True, None
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and re.fullmatch(r"-?\d+", key):
            index = int(key)
            value = value[index] if -len(value) <= index < len(value) else None
        else:
            return False, None
    return True, value


def _text(value: Any, column: str) -> str:
    """A question or an answer as text: "" for none, and 4 for 4.0."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, str | int | float | Decimal):
        return str(value)
    raise _Unreadable(
        f"the column {column!r} holds values that are neither text nor numbers; give one text per"
        " row, or a list of messages for the question"
    )


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)


def _message(message: Row, column: str) -> dict[str, str]:
    """A message with `role` and `content` alone; ShareGPT calls them `from` and `value`."""
    role = message.get("role") or message.get("from")
    content = message.get("content") if "content" in message else message.get("value")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise _Unreadable(
            f"the column {column!r} has a message without a role and a text; give each the keys"
            " 'role' and 'content'"
        )
    return {"role": ROLES.get(role, role), "content": content}
