"""Reward functions for mathematics in the `<reasoning>` / `<answer>` format.

Name them in a recipe, alone or together: `trainer.reward_funcs: ["reward_math.final_reward"]`. TRL
calls each with one entry per completion: `completions` (strings or lists of messages), `prompts`,
and the columns of the dataset. The column `answer` holds references as
`gtpo.answers.format_reference` makes them, or bare answers.

- `final_reward`: the format score, + 10 for a correct answer in perfect format; 0 to 20.
- `released_reward`: what the authors' released code pays, which can be hacked; 0 to 20.
- `formatting_penalty`: the format score - 10; -10 to 0.
- `scaled_adaptive_reward_func`: a correct answer in perfect format, more where it is rare; 0, or 5
  to 10.

`final_reward` and `released_reward` log metrics through the `log_metric` that TRL hands them, so
use one of the two. They log the means of their parts as `reward/formatting_avg`,
`reward/correctness_avg` and `reward/total_avg`. They log the shares of completions in perfect
format and with a correct answer as `reward/format_rate` and `reward/correct_rate`. The others log
nothing and can stand beside either.

A completion whose reference is None is not scored: its reward is None, which TRL leaves out.

`prompt_opening` is what the prompt has already written of the answer. For example, a chat template
may end its prompt in `<reasoning>`. It is put before each completion.
"""

from collections import defaultdict
from math import isfinite, nan

from gtpo.answers import CannotCompare, final_answer, format_score, reference_answer, same_answer

PERFECT_FORMAT = 10.0
CORRECT = 10.0


def final_reward(completions, answer=None, prompt_opening="", **kwargs) -> list[float | None]:
    """The format score, + 10 for a correct answer in perfect format: 0, 1, 1.5, 3, 10 or 20.

    The rules are those of `gtpo.answers.format_score` and `same_answer`. An empty reference matches
    nothing.
    """
    return _format_and_correctness(
        _texts(completions, prompt_opening),
        answer,
        format_score,
        _is_correct,
        kwargs.get("log_metric"),
    )


def released_reward(completions, answer=None, prompt_opening="", **kwargs) -> list[float | None]:
    """What `final_reward` of the authors' released code pays: 0, 1, 1.5, 10 or 20.

    It is for reproducing the logs of that code, not for training. Tags may be nested and repeated.
    An answer counts as correct where it contains the reference: 12 for 2, or anything for an empty
    reference. A number within 0.01 of the reference counts as well, while 1200 does not for 1,200.
    """
    return _format_and_correctness(
        _texts(completions, prompt_opening),
        answer,
        _released_score,
        _released_correct,
        kwargs.get("log_metric"),
    )


def formatting_penalty(completions, answer=None, prompt_opening="", **kwargs) -> list[float]:
    """The format score - 10: 0 for perfect format, -10 for none. It needs no references."""
    return [format_score(text) - PERFECT_FORMAT for text in _texts(completions, prompt_opening)]


def scaled_adaptive_reward_func(
    completions, answer=None, prompts=None, prompt_opening="", **kwargs
) -> list[float | None]:
    """10 (1 - p/2) for a correct answer in perfect format, else 0.

    p is the share of such completions among those of the same prompt in this call. So it pays 5
    where all succeed, and nearly 10 for a rare success. Without `prompts`, completions with the
    same reference count as a group. Completions that are not scored do not count.
    """
    rewards = final_reward(completions, answer, prompt_opening)
    correct = [None if reward is None else reward == PERFECT_FORMAT + CORRECT for reward in rewards]
    # as text, because messages are not hashable
    groups = [repr(group) for group in (answer if prompts is None else prompts)]
    scored = defaultdict(list)
    for group, is_correct in zip(groups, correct, strict=False):
        if is_correct is not None:
            scored[group].append(is_correct)
    pays = {group: CORRECT * (1 - sum(row) / len(row) / 2) for group, row in scored.items()}
    return [
        None if is_correct is None else is_correct * pays[group]
        for group, is_correct in zip(groups, correct, strict=False)
    ]


def _format_and_correctness(
    texts: list[str], answer, score, is_correct, log_metric
) -> list[float | None]:
    """The sums of format score and correctness, whose means are logged."""
    parts = []  # (format score, correctness), or None where it cannot be known
    for text, reference in zip(texts, _references(texts, answer), strict=True):
        if reference is None:
            parts.append(None)
            continue
        formatting = score(text)
        try:
            correct = formatting == PERFECT_FORMAT and is_correct(text, reference)
        except CannotCompare:
            parts.append(None)
            continue
        parts.append((formatting, CORRECT * correct))
    if log_metric is not None:
        _log(log_metric, [part for part in parts if part is not None])
    return [None if part is None else sum(part) for part in parts]


def _log(log_metric, parts: list[tuple[float, float]]) -> None:
    """Log the metrics of pairs of format score and correctness, NaN where there are none.

    They are logged in any case, because TRL gathers them from all processes.
    """
    rows = [(*part, part[0] == PERFECT_FORMAT) for part in parts] or [(nan, nan, nan)]
    formatting, correctness, format_rate = (
        sum(column) / len(rows) for column in zip(*rows, strict=True)
    )
    log_metric("reward/formatting_avg", formatting)
    log_metric("reward/correctness_avg", correctness)
    log_metric("reward/total_avg", formatting + correctness)
    log_metric("reward/format_rate", format_rate)
    log_metric("reward/correct_rate", correctness / CORRECT)


def _references(completions, answer) -> list[str | None]:
    if answer is None or isinstance(answer, str) or len(answer) != len(completions):
        raise ValueError(
            "reward_math: the column `answer` is missing, or has another length than the"
            " completions; give the dataset an `answer` column (see gtpo.answers.format_reference),"
            " one reference per row"
        )
    return [
        None if reference is None else reference_answer(str(reference).strip())
        for reference in answer
    ]


def _texts(completions, prompt_opening: str) -> list[str]:
    return [prompt_opening + _text(completion) for completion in completions]


def _text(completion) -> str:
    """The text of a completion: a string, or the content of its last assistant message."""
    if isinstance(completion, str):
        return completion
    messages = [completion] if isinstance(completion, dict) else list(completion or [{}])
    from_assistant = [message for message in messages if message.get("role") == "assistant"]
    content = (from_assistant or messages)[-1].get("content") or ""  # None beside a tool call
    if isinstance(content, str):
        return content
    return "".join(part if isinstance(part, str) else part.get("text") or "" for part in content)


def _is_correct(text: str, reference: str) -> bool:
    return same_answer(final_answer(text), reference)


def _released_score(text: str) -> float:
    has_answer = _released_answer(text) is not None
    opening = text.find("<reasoning>")
    has_reasoning = opening >= 0 and text.find("</reasoning>", opening) >= 0
    if has_reasoning and has_answer:
        return PERFECT_FORMAT
    if has_reasoning:
        return 1.5 if "<answer>" in text or "</answer>" in text else 1.0
    if has_answer:
        return 1.5 if "<reasoning>" in text or "</reasoning>" in text else 1.0
    return 0.0


def _released_answer(text: str) -> str | None:
    """From the first opening tag to a closing tag that ends the text, whatever stands between.

    One newline may follow the closing tag.
    """
    _, opening, content = text.removesuffix("\n").partition("<answer>")
    if not opening or not content.endswith("</answer>"):
        return None
    return content.removesuffix("</answer>").strip()


def _released_correct(text: str, reference: str) -> bool:
    answer = _released_answer(text)
    try:
        value, wanted = float(answer), float(reference)
    except ValueError:
        return reference in answer
    close = value == wanted or isfinite(wanted) and abs(value - wanted) <= 0.01 + 1e-5 * abs(wanted)
    return close or reference in answer
