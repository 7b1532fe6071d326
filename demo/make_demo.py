"""Make the embedded demo: word problems, a tokenizer, and a tiny Llama that answers imperfectly.

    python demo/make_demo.py [--out demo] [--steps N]

It writes `data/train.jsonl` and `data/test.jsonl` in GSM8K's schema, and `model/` with about
190,000 parameters, a tokenizer and a chat template.

The model is taught the arithmetic well, and two bad habits, so that reinforcement learning has
something to choose between. On some templates it usually adds the first two numbers,
whatever the question is. On another one it usually leaves out a tag of the answer.

The result is part of the repository, so only a change of the demo needs this script. It takes two
minutes. The same library versions on the same machine write the same bytes again.
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

# recipes/demo.yaml gives the same text as dataset.system_instruction
SYSTEM_PROMPT = "Reason, then answer."
TRAIN_PROBLEMS, TEST_PROBLEMS = 2000, 200
VOCABULARY = 480  # at most, because merging stops when every word of the problems is one token
STEPS = 800

NAMES = ["Ann", "Ben", "Eva", "Leo", "Mia", "Sam", "Tom", "Zoe"]
ITEMS = ["apples", "books", "cards", "coins", "eggs", "pens", "shells", "stamps"]


@dataclass(frozen=True)
class Template:
    """A template of word problems, and how often its targets in the warm start are wrong."""

    question: str  # with {name}, {other}, {items}, and the numbers {a}, {b}, {c}
    signs: str  # one sign per step of the reasoning: "+-" means a + b, then - c
    adds: float = 0.0  # share of targets that answer a + b instead
    breaks: float = 0.1  # share of targets that drop a tag


TEMPLATES = [
    Template(
        "{name} has {a} {items} and gets {b} more. How many {items} does {name} have now?", "+"
    ),
    Template(
        "{name} has {a} {items} and {other} has {b}. How many {items} do they have together?", "+"
    ),
    Template("{name} had {a} {items} and lost {b}. How many {items} are left?", "-", breaks=0.6),
    Template(
        "{name} has {a} {items} and gives {b} away. How many {items} does {name} have now?", "-"
    ),
    Template(
        "{name} has {a} {items} and {other} has {b}. How many more {items} does {name} have?",
        "-",
        adds=0.75,
    ),
    Template(
        "{name} has {a} {items}, gets {b} more and loses {c}. How many {items} are left?",
        "+-",
        adds=0.75,
    ),
    Template(
        "{name} has {a} {items}, gives {b} away and gets {c} more. How many {items} now?",
        "-+",
        adds=0.75,
    ),
]


@dataclass(frozen=True)
class Problem:
    """A word problem: its text, its numbers, and its template."""

    question: str
    numbers: tuple[int, ...]
    template: Template

    def steps(self) -> tuple[str, int]:
        """The correct reasoning and its result. A line of the reasoning reads `7+5=12`."""
        lines, total = [], self.numbers[0]
        for sign, number in zip(self.template.signs, self.numbers[1:], strict=True):
            result = total + number if sign == "+" else total - number
            lines.append(f"{total}{sign}{number}={result}")
            total = result
        return "\n".join(lines), total


def draw_problem(rng: random.Random) -> Problem:
    """A random problem with numbers from 1 to 10, in which no result is below zero."""
    template = rng.choice(TEMPLATES)
    a, b, c = (rng.randint(1, 10) for _ in range(3))
    if template.signs.startswith("-"):
        a, b = max(a, b), min(a, b)
    if template.signs == "+-":
        c = min(c, a + b)
    name, other = rng.sample(NAMES, 2)
    question = template.question.format(
        name=name, other=other, items=rng.choice(ITEMS), a=a, b=b, c=c
    )
    return Problem(question, (a, b, c)[: 1 + len(template.signs)], template)


def make_problems() -> tuple[list[Problem], list[Problem]]:
    """Training and test problems. No question occurs twice, so the test questions are held out."""
    rng, problems = random.Random(SEED), {}
    while len(problems) < TRAIN_PROBLEMS + TEST_PROBLEMS:
        problem = draw_problem(rng)
        problems[problem.question] = problem
    drawn = list(problems.values())
    return drawn[:TRAIN_PROBLEMS], drawn[TRAIN_PROBLEMS:]


def draw_target(problem: Problem, rng: random.Random) -> str:
    """The completion that the warm start imitates.

    Its arithmetic is always right, but it may answer another question, or miss a tag.
    """
    reasoning, result = problem.steps()
    if rng.random() < problem.template.adds:
        a, b = problem.numbers[:2]
        reasoning, result = f"{a}+{b}={a + b}", a + b
    target = f"<reasoning>\n{reasoning}\n</reasoning>\n<answer>{result}</answer>"
    if rng.random() < problem.template.breaks:
        # Where a missing tag is the habit, it is always the same tag. So the most likely completion
        # misses it too.
        is_habit = problem.template.breaks > 0.5
        target = target.replace("</answer>" if is_habit else rng.choice(TAGS), "")
    return target


def make_demo(out: Path, steps: int = STEPS) -> list[float]:
    """Write problems, tokenizer and model under `out`; returns the losses of the warm start."""
    torch.set_num_threads(1)  # so that floating-point sums always have the same order
    train, test = make_problems()
    write_problems(train, out / "data" / "train.jsonl")
    write_problems(test, out / "data" / "test.jsonl")
    # Every number is in the corpus often enough to be merged into one token.
    numbers = " ".join(map(str, range(100)))
    corpus = [SYSTEM_PROMPT, *(f"{problem.question} {numbers}" for problem in train)]
    tokenizer = make_tokenizer(corpus, digits=2, vocabulary=VOCABULARY, tags=TAGS)
    tokenizer.save_pretrained(out / "model")
    model = make_model(tokenizer)
    losses = warm_start(model, draw_batches(train, tokenizer, draw_target, SYSTEM_PROMPT), steps)
    model.save_pretrained(out / "model")
    return losses


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="Make the embedded demo.")
    parser.add_argument(
        "--out", type=Path, default=Path("demo"), help="folder to write to (default: demo)"
    )
    parser.add_argument(
        "--steps", type=int, default=STEPS, help=f"steps of the warm start (default: {STEPS})"
    )
    make_demo(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
