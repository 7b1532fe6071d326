"""Reward functions that misbehave on some completions, and pay the share of vowels for the
others.
"""

import logging
import os
import random
import re
import sys
import time
from math import inf, nan


def offends(text: str) -> bool:
    """About one in seven completions of the tiny policy."""
    return sum(map(ord, text)) % 7 == 0


def vowels(text: str) -> float:
    return round(10 * sum(c in "aeiou" for c in text) / max(len(text), 1)) / 10


def letters(completions, log_metric, log_extra, **kwargs):
    """Harmless, and it logs."""
    log_metric("letters/mean_length", sum(map(len, completions)) / len(completions))
    log_extra("length", [len(text) for text in completions])
    return [vowels(text) for text in completions]


def _paying(misbehave):
    def reward(completions, **kwargs):
        return [misbehave(text) if offends(text) else vowels(text) for text in completions]

    return reward


def _raise(text):
    raise KeyError(f"no verdict on {text}")


def _endless_regex(text):
    return re.match(r"(a+)+$", "a" * 40 + "b")


def _eat_memory(text):
    hoard = []
    while True:
        hoard.append(bytearray(16 << 20))


def _crash(text):
    import ctypes

    return ctypes.string_at(0)


raising = _paying(_raise)
sleeping = _paying(lambda text: time.sleep(60))
in_an_endless_regex = _paying(_endless_regex)
leaving = _paying(lambda text: sys.exit(0))
leaving_at_once = _paying(lambda text: os._exit(0))
crashing = _paying(_crash)
eating_memory = _paying(_eat_memory)
returning_nan = _paying(lambda text: nan)
returning_inf = _paying(lambda text: -inf)
returning_too_much = _paying(lambda text: 10**400)
returning_none = _paying(lambda text: None)


def shouting(completions, **kwargs):
    print("x" * 1_000_000)
    os.write(1, b"to the file descriptor\n")
    return [vowels(text) for text in completions]


def failing_later(completions, trainer_state, **kwargs):
    """Fails on everything from the second step on."""
    return [
        vowels(_text(c)) if trainer_state.global_step == 0 else _raise("anything")
        for c in completions
    ]


def too_few_later(completions, trainer_state, **kwargs):
    return [vowels(_text(c)) for c in completions[trainer_state.global_step :]]


def always_too_few(completions, **kwargs):
    return [1.0]


def always_raising(completions, **kwargs):
    raise RuntimeError("the judge is away, hf_abcdefghijklmnopqrstuvwxyz")


def without_keywords(completions):
    return [0.0] * len(completions)


def dice(completions, log_metric, **kwargs):
    """Random numbers, after naps of random lengths."""
    time.sleep(random.random() / 50)
    log_metric("dice/count", len(completions))
    return [random.random() for _ in completions]


def rank_in_group(completions, prompts, **kwargs):
    """A reward that compares the completions of a group: it needs them together."""
    for text in completions:
        if offends(text):
            raise ValueError(text)
    groups = {
        prompt: sorted(
            text for text, other in zip(completions, prompts, strict=True) if other == prompt
        )
        for prompt in prompts
    }
    return [groups[prompt].index(text) for text, prompt in zip(completions, prompts, strict=True)]


async def asynchronous(completions, **kwargs):
    import asyncio

    await asyncio.sleep(0.001)
    return [_raise(text) if offends(text) else vowels(text) for text in completions]


def _text(completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]


def heavy_imports(completions, **kwargs):
    return [
        len({"torch", "numpy", "pydantic", "transformers", "asyncio"} & sys.modules.keys())
        for _ in completions
    ]


def failing_on_the_second(completions, trainer_state, log_metric, **kwargs):
    """Of two processes; from the second step on."""
    if os.environ["RANK"] == "1" and trainer_state.global_step > 0:
        raise ValueError("not here")
    log_metric("judged/here", len(completions))
    return [vowels(text) for text in completions]


def failing_on_some_texts(completions, prompts, **kwargs):
    texts = [
        _text(completion) + prompt[-1]["content"]
        for completion, prompt in zip(completions, prompts, strict=True)
    ]
    return [_raise(text) if sum(map(ord, text)) % 3 == 0 else vowels(text) for text in texts]


def logging_loudly(completions, **kwargs):
    logging.getLogger("its.own").info("in vain")
    logging.getLogger("its.own").warning("asked about %d", len(completions))
    return [0.0] * len(completions)


def failing_step_by_step(completions, trainer_state, **kwargs):
    """On some completions at first, on all of them in the second step, on none afterwards."""
    failing = {0: offends, 1: lambda text: True, 2: lambda text: False}[trainer_state.global_step]
    return [_raise(text) if failing(text) else vowels(text) for text in completions]
