"""Make the columns task: three-digit sums, worked out column by column in random words.

    python demo/make_columns.py [--out demo/columns] [--steps N]

It is a fairer small test of GTPO than the demo. Its completions have about 80 tokens, and the
format that all of them share is a small part of that. Every digit is one token, and every tag is
several.

The model is taught imperfectly on purpose: its targets drop carries, have wrong digits and break
tags. The result is part of the repository, so only a change of the task needs this script. It takes
several minutes.
"""

import argparse
import random
from dataclasses import dataclass
from pathlib import Path

import torch
from warm_start import (
    SEED,
    TAGS,
    draw_batches,
    make_model,
    make_tokenizer,
    warm_start,
    write_problems,
)

# recipes/columns.yaml gives the same text as dataset.system_instruction
SYSTEM_PROMPT = "Work in columns, then answer."
TRAIN_PROBLEMS, TEST_PROBLEMS, STEPS, VOCABULARY = 4000, 300, 2000, 480
# How often the targets of the warm start go wrong, per column or per target. Greedy decoding
# follows a habit that is more frequent than a half.
DROPPED_CARRY, DROPPED_BORROW, SLIP, MALFORMED = 0.2, 0.55, 0.03, 0.15

QUESTIONS = ["What is {a} {sign} {b}?", "Compute {a} {sign} {b}.", "Find {a} {sign} {b}."]
OPENINGS = [  # an opening has one word of each line
    "First Now Well Here Again Today Slowly Next Good Right So Fine".split(),
    "we I you they all people some both".split(),
    "add write take work go start count read think check look try".split(),
    (
        "calmly,neatly,twice,gladly,surely,again,quickly,with care,as ever,at once,in order,by hand"
    ).split(","),
]
ADVERBS = (
    "then,next,after,also,here,now,so,and,further,there,clearly,plainly,simply,again,once more,"
    "indeed"
).split(",")
COLUMNS = [
    ["ones", "units", "last column"],
    ["tens", "middle column", "next column"],
    ["hundreds", "first column", "left column"],
]
WORKS = [
    "{x} {sign} {y} {carry}makes {result}",
    "{x} {sign} {y} {carry}is {result}",
    "{x} {sign} {y} {carry}gives {result}",
]
WRITES = {
    "+": [", carry {c}", ", and {c} goes on", ", keep {c}"],
    "-": [", borrow {c}", ", and {c} is lent", ", owe {c}"],
}
CLOSINGS = ["we get {n}", "the result is {n}", "it makes {n}", "this reads {n}", "all done: {n}"]


@dataclass(frozen=True)
class Sum:
    """`a sign b` with numbers of at most three digits and a result from 0 to 999."""

    question: str
    a: int
    b: int
    sign: str

    def steps(self) -> tuple[str, int]:
        """The reference: the sum itself, and its result."""
        result = self.a + self.b if self.sign == "+" else self.a - self.b
        return f"{self.a}{self.sign}{self.b}={result}", result


def draw_sum(rng: random.Random) -> Sum:
    """A random sum of two numbers from 100 to 899, with a result of at most three digits."""
    sign = rng.choice("+-")
    a, b = rng.randint(100, 899), rng.randint(100, 899)
    if sign == "-":
        a, b = max(a, b), min(a, b)
    else:
        b = rng.randint(100, 999 - a) if a < 899 else 100
    return Sum(rng.choice(QUESTIONS).format(a=a, b=b, sign=sign), a, b, sign)


def make_sums() -> tuple[list[Sum], list[Sum]]:
    """Training and test problems. No sum occurs in both."""
    rng, sums = random.Random(SEED), {}
    while len(sums) < TRAIN_PROBLEMS + TEST_PROBLEMS:
        problem = draw_sum(rng)
        sums[problem.a, problem.b, problem.sign] = problem
    drawn = list(sums.values())
    return drawn[:TRAIN_PROBLEMS], drawn[TRAIN_PROBLEMS:]


def draw_target(problem: Sum, rng: random.Random, *, faults: bool = True) -> str:
    """The completion that the warm start imitates, worded at random.

    With `faults` it is wrong as often as the constants at the top say.
    """
    carry, digits, lines, sign = 0, "", [], problem.sign
    drop = DROPPED_CARRY if sign == "+" else DROPPED_BORROW
    for place, names in enumerate(COLUMNS):
        x, y = problem.a // 10**place % 10, problem.b // 10**place % 10
        value = x + y + carry if sign == "+" else x - y - carry
        digit, next_carry = value % 10, int(value > 9 or value < 0)
        if faults and rng.random() < SLIP:
            digit = rng.randrange(10)
        if faults and next_carry and rng.random() < drop:
            next_carry = 0
        text = rng.choice(WORKS).format(
            x=x, y=y, sign=sign, carry=f"{sign} {carry} " if carry else "", result=digit
        )
        text += rng.choice(WRITES[sign]).format(c=next_carry) if next_carry else ""
        lines.append(f"{rng.choice(ADVERBS)} {rng.choice(names)}: {text}.")
        carry, digits = next_carry, f"{digit}{digits}"
    number = int(digits)
    opening, closing = " ".join(map(rng.choice, OPENINGS)), rng.choice(CLOSINGS).format(n=number)
    body = "\n".join([f"{opening}.", *lines, f"{rng.choice(ADVERBS)} {closing}."])
    target = f"<reasoning>\n{body}\n</reasoning>\n<answer>{number}</answer>"
    return target.replace(rng.choice(TAGS), "") if faults and rng.random() < MALFORMED else target


def make_columns(out: Path, steps: int = STEPS) -> list[float]:
    """Write problems, tokenizer and model under `out`; returns the losses of the warm start."""
    torch.set_num_threads(1)  # so that floating-point sums always have the same order
    train, test = make_sums()
    write_problems(train, out / "data" / "train.jsonl")
    write_problems(test, out / "data" / "test.jsonl")
    rng = random.Random(SEED)
    corpus = [
        SYSTEM_PROMPT,
        *(f"{problem.question}\n{draw_target(problem, rng, faults=False)}" for problem in train),
    ]
    # Without tags of its own, the tokenizer makes several tokens of a tag.
    tokenizer = make_tokenizer(corpus, digits=1, vocabulary=VOCABULARY, tags=[])
    tokenizer.save_pretrained(out / "model")
    model = make_model(tokenizer)
    losses = warm_start(model, draw_batches(train, tokenizer, draw_target, SYSTEM_PROMPT), steps)
    model.save_pretrained(out / "model")
    return losses


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make the columns task.")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("demo/columns"),
        help="folder to write to (default: demo/columns)",
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"steps of the warm start (default: {STEPS})"
    )
    make_columns(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
