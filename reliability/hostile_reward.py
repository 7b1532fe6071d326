"""A reward function that misbehaves on some completions, in ten ways.

A checksum of prompt and completion chooses which. soak_rewards.py trains with this function.
"""

import ctypes
import os
import re
import sys
import time
import zlib

from gtpo.answers import format_score

PER_THOUSAND = 20  # completions on which it misbehaves


def raises(text):
    """Raises KeyError."""
    raise KeyError(text)


def hangs(text):
    """Sleeps for an hour."""
    time.sleep(3600)


def loops_in_c(text):
    """Spends exponential time within the regular-expression engine."""
    re.match(r"(a+)+$", "a" * 40 + "b")


def exits(text):
    """Raises SystemExit."""
    sys.exit(text)


def ends_the_process(text):
    """Ends its process without clean-up."""
    os._exit(0)


def crashes(text):
    """Reads address 0, which ends the process with a segmentation fault."""
    ctypes.string_at(0)


def eats_memory(text):
    """Allocates memory until none is left."""
    hoard = []
    while True:
        hoard.append(bytearray(64 << 20))


def forks_and_hangs(text):
    """Starts a child process, and both sleep for an hour."""
    if os.fork() == 0:
        time.sleep(3600)
    time.sleep(3600)


def is_not_a_number(text):
    """Returns NaN."""
    return float("nan")


def is_infinite(text):
    """Returns infinity."""
    return float("inf")


WAYS = (
    *(raises, hangs, loops_in_c, exits, ends_the_process),
    *(crashes, eats_memory, forks_and_hangs, is_not_a_number, is_infinite),
)


def way_of(prompt: list[dict], text: str):
    """The function of WAYS that misbehaves on this completion, or None."""
    number, draw = divmod(zlib.crc32(f"{prompt[-1]['content']}\n{text}".encode()), 1000)
    return WAYS[number % len(WAYS)] if draw < PER_THOUSAND else None


def pay(completions, prompts, log_metric, **kwargs):
    """The format score of each completion, unless the function misbehaves on it."""
    texts = [completion[0]["content"] for completion in completions]
    rewards = []
    for prompt, text in zip(prompts, texts, strict=True):
        way = way_of(prompt, text)
        rewards.append(way(text) if way else format_score(text))
    log_metric("reward/formatting_avg", sum(map(format_score, texts)) / len(texts))
    return rewards
