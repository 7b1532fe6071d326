"""Reward functions that misbehave on some completions, and pay the share of vowels for others."""

import datetime
import logging
import os
import random
import re
import sys
import time
from fractions import Fraction
from math import inf, nan


def offends(text: str) -> bool:
    """Whether these functions misbehave on a text: one in seven of the tiny policy's."""
    return sum(map(ord, text)) % 7 == 0


def vowels(text: str) -> float:
    """The share of vowels, with one decimal."""
    return round(10 * sum(c in "aeiou" for c in text) / max(len(text), 1)) / 10


def letters(completions, log_metric, log_extra, **kwargs):
    """Harmless, and it logs."""
    log_metric("letters/mean_length", sum(map(len, completions)) / len(completions))
    log_extra("length", [len(text) for text in completions])
    return [vowels(text) for text in completions]


# ---- functions that misbehave on single completions


def _paying(misbehave):
    def reward(completions, **kwargs):
        return [misbehave(text) if offends(text) else vowels(text) for text in completions]

    return reward


def _raise(text):
    raise KeyError(f"no reward for {text}")


def _endless_regex(text):
    return re.match(r"(a+)+$", "a" * 40 + "b")


def _eat_memory(text):
    hoard = []
    while True:
        hoard.append(bytearray(16 << 20))


def _crash(text):
    import ctypes

    return ctypes.string_at(0)


def _write_to_the_pipe(text):
    """Write a message that is no JSON to every pipe of this process."""
    import struct

    for number in range(3, 20):
        try:
            os.write(number, struct.pack("!cQ", b"\x80", 3) + b"???")
        except OSError:
            continue
    return 0.0


raising = _paying(_raise)
sleeping = _paying(lambda text: time.sleep(60))
in_an_endless_regex = _paying(_endless_regex)
leaving = _paying(lambda text: sys.exit(0))
leaving_at_once = _paying(lambda text: os._exit(0))
crashing = _paying(_crash)
eating_memory = _paying(_eat_memory)
writing_to_the_pipe = _paying(_write_to_the_pipe)
returning_nan = _paying(lambda text: nan)
returning_inf = _paying(lambda text: -inf)
returning_too_much = _paying(lambda text: 10**400)
returning_none = _paying(lambda text: None)


def rank_in_group(completions, prompts, **kwargs):
    """A reward that compares the completions of a group: it needs them together."""
    for text in completions:
        if offends(text):
            raise ValueError(text)
    pairs = list(zip(completions, prompts, strict=True))
    groups = {
        prompt: sorted(text for text, other in pairs if other == prompt) for prompt in prompts
    }
    return [groups[prompt].index(text) for text, prompt in pairs]


async def asynchronous(completions, **kwargs):
    """Raises like `raising`, in a coroutine."""
    import asyncio

    await asyncio.sleep(0.001)
    return [_raise(text) if offends(text) else vowels(text) for text in completions]


# ---- functions that fail as a whole


def always_too_few(completions, **kwargs):
    """Returns one reward for any number of completions."""
    return [1.0]


def always_raising(completions, **kwargs):
    """Raises with a token in its message."""
    raise RuntimeError("the grader is away, hf_abcdefghijklmnopqrstuvwxyz")


def without_keywords(completions):
    """Takes no keyword arguments but `completions`."""
    return [0.0] * len(completions)


# ---- functions that fail at some steps


def failing_later(completions, trainer_state, **kwargs):
    """Fails on everything from the second step on."""
    if trainer_state.global_step > 0:
        _raise("anything")
    return [vowels(_text(completion)) for completion in completions]


def too_few_later(completions, trainer_state, **kwargs):
    """Returns one reward less in the second step."""
    return [vowels(_text(completion)) for completion in completions[trainer_state.global_step :]]


def failing_step_by_step(completions, trainer_state, **kwargs):
    """Fails on some completions at first, on all in the second step, on none afterwards."""
    failing = {0: offends, 1: lambda text: True, 2: lambda text: False}[trainer_state.global_step]
    return [_raise(text) if failing(text) else vowels(text) for text in completions]


def failing_on_the_second(completions, trainer_state, log_metric, **kwargs):
    """Fails in the second of two processes, from the second step on."""
    if os.environ["RANK"] == "1" and trainer_state.global_step > 0:
        raise ValueError("not here")
    log_metric("scored/here", len(completions))
    return [vowels(text) for text in completions]


def failing_on_some_texts(completions, prompts, **kwargs):
    """Fails on one in three pairs of a prompt and a completion, given as messages."""
    texts = [
        _text(completion) + prompt[-1]["content"]
        for completion, prompt in zip(completions, prompts, strict=True)
    ]
    return [_raise(text) if sum(map(ord, text)) % 3 == 0 else vowels(text) for text in texts]


# ---- functions that print, log or draw random numbers


def shouting(completions, **kwargs):
    """Prints a lot, also past Python's sys.stdout."""
    print("x" * 1_000_000)
    os.write(1, b"to the file descriptor\n")
    return [vowels(text) for text in completions]


def dice(completions, log_metric, **kwargs):
    """Random numbers, after naps of random lengths."""
    time.sleep(random.random() / 50)
    log_metric("dice/count", len(completions))
    return [random.random() for _ in completions]


def heavy_imports(completions, **kwargs):
    """How many heavy packages this process has imported."""
    heavy = {"torch", "numpy", "pydantic", "transformers", "asyncio"}
    return [len(heavy & sys.modules.keys()) for _ in completions]


def logging_loudly(completions, **kwargs):
    """Logs below and above the usual level."""
    logging.getLogger("its.own").info("in vain")
    logging.getLogger("its.own").warning("called on %d", len(completions))
    return [0.0] * len(completions)


def logging_values_of_many_kinds(completions, log_metric, log_extra, **kwargs):
    """Logs values of Python, numpy, torch and others."""
    import numpy
    import torch

    log_metric("nan", nan)
    log_metric("tensor", torch.tensor(0.5))
    plain = [1, numpy.bool_(True), None]
    log_extra(
        "numbers",
        [*plain, numpy.float32(0.5), torch.tensor(0.25), numpy.arange(1, 3), {"a": -inf}],
    )
    log_extra("texts", ["½ \ud800", datetime.date(2000, 1, 1)])
    return [0.0] * len(completions)


def keeping_fractions(completions, log_extra, **kwargs):
    """Logs what no checkpoint can keep."""
    log_extra("parsed", [Fraction(1, 2)] * len(completions))
    return [float(len(_text(completion))) for completion in completions]


async def keeping_fractions_asynchronously(completions, log_extra, **kwargs):
    """The same, as a coroutine."""
    return keeping_fractions(completions, log_extra)


def keeping_fractions_later(completions, log_extra, trainer_state, **kwargs):
    """The same, in every step but the first."""
    if trainer_state.global_step:
        return keeping_fractions(completions, log_extra)
    return [float(len(_text(completion))) for completion in completions]


def returning_the_number_in_the_text(completions, **kwargs):
    """Pays the number that a completion is, or None."""
    return [None if text == "None" else float(text) for text in completions]


def killing_itself(completions, **kwargs):
    """Ends its process by the signal whose number is the text."""
    os.kill(os.getpid(), int(completions[0]))


def _text(completion) -> str:
    return completion if isinstance(completion, str) else completion[0]["content"]
