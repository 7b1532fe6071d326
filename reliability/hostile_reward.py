"""A reward that misbehaves, in one of many ways, on the completions that a checksum chooses.
`soak_rewards.py` trains with it.
"""

import ctypes
import os
import re
import sys
import time
import zlib

from gtpo.answers import format_score

PER_THOUSAND = 20  # how many completions it fails on


def raises(text):
    raise KeyError(text)


def hangs(text):
    time.sleep(3600)


def loops_in_c(text):
    re.match(r"(a+)+$", "a" * 40 + "b")


def exits(text):
    sys.exit(text)


def ends_the_process(text):
    os._exit(0)


def crashes(text):
    ctypes.string_at(0)


def eats_memory(text):
    hoard = []
    while True:
        hoard.append(bytearray(64 << 20))


def forks_and_hangs(text):
    if os.fork() == 0:
        time.sleep(3600)
    time.sleep(3600)


def is_not_a_number(text):
    return float("nan")


def is_infinite(text):
    return float("inf")


WAYS = (
    raises,
    hangs,
    loops_in_c,
    exits,
    ends_the_process,
    crashes,
    eats_memory,
    forks_and_hangs,
    is_not_a_number,
    is_infinite,
)


def way_of(prompt: list[dict], text: str):
    """How it misbehaves on this completion; None where it does not."""
    number, draw = divmod(zlib.crc32(f"{prompt[-1]['content']}\n{text}".encode()), 1000)
    return WAYS[number % len(WAYS)] if draw < PER_THOUSAND else None


def pay(completions, prompts, log_metric, **kwargs):
    """The format score."""
    texts = [completion[0]["content"] for completion in completions]
    rewards = []
    for prompt, text in zip(prompts, texts):
        way = way_of(prompt, text)
        rewards.append(way(text) if way else format_score(text))
    log_metric("reward/formatting_avg", sum(map(format_score, texts)) / len(texts))
    return rewards
