"""One line of `completions.jsonl`: its keys and types, for the recorder that writes it and the
report that reads it.

Imports no torch, so that reports load quickly.
"""

import json
import math
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict

# Some readers of text take these characters for the end of a line; json.dumps leaves them as they
# are.
LINE_BREAKS = {code: f"\\u{code:04x}" for code in (0x85, 0x2028, 0x2029)}


def _finite_or_none(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# A number that is NaN or infinite in a damaged or foreign file counts as not recorded.
Number = Annotated[float | None, AfterValidator(_finite_or_none)]


class CompletionLine(BaseModel):
    """A training completion, its keys in the order of the file.

    Only lines with something in them have `prompt_opening` and `raw_completion`. Steps whose
    per-token lists are not recorded have no `ids`, `tokens`, `weights` and `entropies`.
    """

    model_config = ConfigDict(extra="ignore")

    step: int  # optimizer step that trained on it first, counted from 1
    rollout: int | None = None  # counted from 1 in each run of the program
    group: int  # place of its prompt in the rollout, from 0
    row: int  # place in its group, from 0
    prompt: Any = None  # messages, or a text
    prompt_opening: str = ""  # what the prompt has already written of the answer
    completion: str = ""  # as the rewards got it, without special tokens
    raw_completion: str | None = None  # with special tokens, if others than the usual end
    answer: Any = None  # the problem's reference, with its reasoning
    columns: dict[str, Any] = {}  # other columns of its row, those that are recorded
    reward: Number = None  # weighted sum; None if no function could score it
    rewards: dict[str, Number] = {}  # by reward function
    advantage: Number = None
    truncated: bool = False  # cut off at the length limit
    prefix: int = 0  # tokens of the prefix run
    suffix: int = 0  # tokens of the suffix run
    entropy: Number = None  # mean over its tokens, nats
    kept: bool | None = None  # False if the entropy filter switched it off
    # one entry per token, T in all
    ids: list[int] | None = None
    tokens: list[str] | None = None  # their texts
    weights: list[Number] | None = None  # lambda; None for a trainer without token weights
    entropies: list[Number] | None = None  # nats


def encoded(values: dict[str, Any]) -> bytes:
    """Returns `values`, fields of a CompletionLine by name, as one line of JSON in UTF-8.

    What JSON does not know becomes its `str`. Raises ValueError for NaN, an infinite number or a
    key that is not in the schema.
    """
    fields = CompletionLine.model_fields
    if unknown := values.keys() - fields.keys():
        raise ValueError(f"{', '.join(sorted(unknown))}: not a key of CompletionLine")
    ordered = {name: values[name] for name in fields if name in values}
    text = json.dumps(ordered, ensure_ascii=False, allow_nan=False, default=str)
    # "backslashreplace" writes half of a surrogate pair as JSON's escape for it
    return (text.translate(LINE_BREAKS) + "\n").encode("utf-8", errors="backslashreplace")
