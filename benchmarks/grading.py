"""How often right answers are refused and wrong ones are paid: `python benchmarks/grading.py`.

Every test answer of GSM8K and MATH (6,319) is written in other ways that mean the same, and changed
in ways that mean something else. Three graders decide: ours, math-verify 0.9.0 with its defaults,
and TRL's accuracy reward. The data sets are found through GTPO_SHARED (default: ../shared).
"""

import argparse
import collections
import json
import os
import random
import re
import sys
import time
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from gtpo.answers import boxed_answer, gsm8k_answer, same_answer
from gtpo.answers.quantity import number

SUPERSCRIPTS = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
NUMBER_WORDS = ["three", "seven", "twelve", "twenty"]


def test_answers(shared: Path) -> list[str]:
    """The answers of both test sets; without the two that are empty."""
    answers = []
    with (shared / "data/gsm8k/test.jsonl").open(encoding="utf-8") as lines:
        answers += [gsm8k_answer(json.loads(line)["answer"]) for line in lines]
    for file in sorted((shared / "data/hendrycks_math").glob("*/test.jsonl")):
        with file.open(encoding="utf-8") as lines:
            answers += [boxed_answer(json.loads(line)["solution"]) for line in lines]
    return [answer for answer in answers if answer]


# ---- the same value, written in another way; None where a way does not fit


def _unicode(answer: str, dice: random.Random) -> str | None:
    text = re.sub(r"\\sqrt\{(\d+)\}", r"√\1", answer).replace(r"\pi", "π")
    text = text.replace(r"\infty", "∞").replace(r"\cup", "∪").replace(r"\le", "≤")
    power = re.compile(r"\^(?:\{(\d+)\}|(\d))")
    text = power.sub(lambda found: (found[1] or found[2]).translate(SUPERSCRIPTS), text)
    return text if text != answer and "ft" not in text else None


def _decimal(answer: str, dice: random.Random) -> str | None:
    value = number(answer.replace(r"\dfrac", r"\frac"))
    if value is None or value.denominator == 1 or 10**6 % value.denominator:
        return None
    return f"{float(value):.6f}".rstrip("0")


def _thousands(answer: str, dice: random.Random) -> str | None:
    return f"{int(answer):,}" if re.fullmatch(r"-?\d{4,}", answer) else None


def _with_unit(answer: str, dice: random.Random) -> str | None:
    units = ["cm", "dollars", "red balls", "square feet", "miles per hour", "kg", "%", "tickets"]
    return f"{answer} {dice.choice(units)}" if re.fullmatch(r"-?\d+", answer) else None


def _money(answer: str, dice: random.Random) -> str | None:
    return dice.choice([f"${answer}", f"USD {answer}"]) if answer.isdecimal() else None


def _no_frac(answer: str, dice: random.Random) -> str | None:
    text = re.sub(r"\\d?frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", answer)
    return text if text != answer and re.fullmatch(r"-?\d+/\d+", text) else None


def _dfrac(answer: str, dice: random.Random) -> str | None:
    text = answer.replace(r"\frac", r"\dfrac")
    return text if text != answer else None


def _sized(answer: str, dice: random.Random) -> str | None:
    if not re.fullmatch(r"\(.*\)", answer) or r"\left" in answer:
        return None
    return dice.choice([rf"\left{answer[:-1]}\right)", rf"\bigl{answer[:-1]}\bigr)"])


def _reordered(answer: str, dice: random.Random) -> str | None:
    items = answer.split(",")
    if len(items) < 2 or re.search(r"[()\[\]{}\\]|\d,\d{3}(?!\d)", answer):
        return None
    return dice.choice([", ".join(items[::-1]), " and ".join(items), " or ".join(items)])


def _named(answer: str, dice: random.Random) -> str | None:
    return None if re.search(r"[=<>]|\\[lg]e|\\text|,|in\b|[A-Z]", answer) else f"x = {answer}"


def _wrapped(answer: str, dice: random.Random) -> str:
    forms = [r"\boxed{%s}", "$%s$", r"\( %s \)", r"\[ %s \]", "%s.", r"\boxed{\boxed{%s}}"]
    return dice.choice([*forms, r"$\boxed{%s}$", r"\begin{equation*} %s \end{equation*}"]) % answer


def _framed(answer: str, dice: random.Random) -> str:
    return dice.choice(["The answer is %s.", "Answer: %s", "the final answer is $%s$"]) % answer


def _bold(answer: str, dice: random.Random) -> str | None:
    if re.search(r"[{}\\]", answer):
        return f"**{answer}**"
    return dice.choice(["**%s**", r"\mathbf{%s}", r"\textbf{%s}", r"\underline{%s}"]) % answer


def _spaced(answer: str, dice: random.Random) -> str:
    return (
        re.sub(r"(?<=[\w)}])([+=,-])(?=[\w({\\])", r" \1 ", answer)
        if "," not in answer
        else (f" {answer} ")
    )


RIGHT = [_unicode, _decimal, _thousands, _with_unit, _money, _no_frac, _dfrac, _sized, _reordered]
RIGHT += [_named, _wrapped, _framed, _bold, _spaced]


# ---- another value, written alike; None where a way does not fit


def _next_number(answer: str, dice: random.Random) -> str | None:
    return str(int(answer) + dice.choice([-1, 1, 10])) if re.fullmatch(r"-?\d+", answer) else None


def _other_digit(answer: str, dice: random.Random) -> str | None:
    digits = [match.start() for match in re.finditer(r"\d", answer)]
    if not digits or "text" in answer or ":" in answer:
        return None
    place = dice.choice(digits)
    other = dice.choice([digit for digit in "123456789" if digit != answer[place]])
    return answer[:place] + other + answer[place + 1 :]


def _longer(answer: str, dice: random.Random) -> str | None:
    return answer + str(dice.randrange(1, 10)) if re.fullmatch(r"-?\d+", answer) else None


def _scaled(answer: str, dice: random.Random) -> str | None:
    scales = ["%s thousand", "%sk", "$%sM", "%s dozen", "%s hundredths", "%s million", "%s doubled"]
    scales += ["%s squared", "%s thirds", "%s lakhs", "%s and a half", "%s point five"]
    return dice.choice(scales) % answer if answer.isdecimal() and answer != "0" else None


def _hedged(answer: str, dice: random.Random) -> str | None:
    other = str(int(answer) + 1) if re.fullmatch(r"\d+", answer) else None
    word = dice.choice(NUMBER_WORDS)
    hedges = [f"{answer} or {other}", f"{answer}, {other}", f"not {answer}", f"{answer} or {word}"]
    hedges += [
        f"{answer} but maybe {word}",
        f"{answer} less than {word}",
        f"either {answer}, {word}",
    ]
    return dice.choice(hedges) if other else None


def _other_sign(answer: str, dice: random.Random) -> str | None:
    value = number(answer)
    return (
        None
        if value is None or value == 0
        else (answer[1:] if answer.startswith("-") else f"-{answer}")
    )


def _swapped(answer: str, dice: random.Random) -> str | None:
    pair = re.fullmatch(r"([(\[])([^,()]+),([^,()]+)([)\]])", answer)
    if not pair or pair[2].strip() == pair[3].strip():
        return None
    return f"{pair[1]}{pair[3]},{pair[2]}{pair[4]}"


def _inverted(answer: str, dice: random.Random) -> str | None:
    fraction = re.fullmatch(r"\\d?frac\{(\d+)\}\{(\d+)\}", answer)
    return rf"\frac{{{fraction[2]}}}{{{fraction[1]}}}" if fraction else None


def _nearby(answer: str, dice: random.Random) -> str | None:
    value = number(answer)
    if value is None:
        return (
            rf"{answer}+\frac{{1}}{{2^{{60}}}}" if "\\" in answer and "text" not in answer else None
        )
    return (
        str(float(value + Fraction(1, 1000))) if value.denominator == 1 else f"{float(value):.2f}1"
    )


def _uncomputed(answer: str, dice: random.Random) -> str | None:
    return f"{int(answer) - 3} + 3" if answer.isdecimal() else None


def _false_claim(answer: str, dice: random.Random) -> str | None:
    return f"{int(answer) + 1} = {answer}" if answer.isdecimal() else None


def _other_unit(answer: str, dice: random.Random) -> str | None:
    unit = re.search(r"\d ?\\text\{ ?(cm|feet|inches|miles|hours|dollars|degrees)\}$", answer)
    return answer.replace(unit[1], "kilograms") if unit else None


WRONG = [_next_number, _other_digit, _longer, _scaled, _hedged, _other_sign, _swapped, _inverted]
WRONG += [_nearby, _uncomputed, _false_claim, _other_unit]


def renderings(answers: list[str], ways: list, dice: random.Random) -> list[tuple[str, str, str]]:
    """One rendering for each answer where any way fits: the way's name, the text, the answer."""
    rendered = []
    for answer in answers:
        for way in dice.sample(ways, len(ways)):
            if (text := way(answer, dice)) is not None and text != answer:
                rendered.append((way.__name__.strip("_"), text, answer))
                break
    return rendered


# ---- graders


def by_math_verify(answer: str, reference: str) -> bool:
    """Whether math-verify takes the answer and the reference for equal, by itself."""
    from math_verify import parse, verify

    return verify(parse(f"${reference}$"), parse(_boxed(answer)))


def by_trl(answer: str, reference: str) -> bool:
    """Whether TRL's accuracy reward pays the answer."""
    from trl.rewards import accuracy_reward

    completion = [{"role": "assistant", "content": _boxed(answer)}]
    return accuracy_reward([completion], [f"${reference}$"])[0] == 1.0


def _boxed(answer: str) -> str:
    """The answer in a box, where both look first; an answer that has a box stays as it is."""
    return answer if r"\boxed" in answer else rf"\boxed{{{answer}}}"


GRADERS = {"ours": same_answer, "math-verify": by_math_verify, "TRL": by_trl}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=int, help="answers, drawn at random; default: all")
    parser.add_argument("--graders", nargs="+", choices=GRADERS, default=list(GRADERS))
    parser.add_argument("--show", type=int, default=0, help="wrong decisions of ours to print")
    options = parser.parse_args()
    dice = random.Random(options.seed)
    answers = test_answers(Path(os.environ.get("GTPO_SHARED", ROOT.parent / "shared")))
    answers = dice.sample(answers, options.limit) if options.limit else answers
    print(f"{len(answers):,} test answers, seed {options.seed}")
    for title, ways, should_pay in (
        ("right answers refused", RIGHT, True),
        ("wrong answers paid", WRONG, False),
    ):
        pairs = renderings(answers, ways, dice)
        for name in options.graders:
            began = time.perf_counter()
            mistakes = [pair for pair in pairs if bool(GRADERS[name](*pair[1:])) != should_pay]
            seconds = time.perf_counter() - began
            share = len(mistakes) / len(pairs)
            print(
                f"{title:<22} {name:<12} {len(mistakes):>5,} of {len(pairs):,}  {share:7.2%}"
                f"  {len(pairs) / seconds:8,.0f}/s"
            )
            if name == "ours":
                print("  by way:", dict(collections.Counter(way for way, *_ in mistakes)))
                for way, text, answer in mistakes[: options.show]:
                    print(f"  {way}: {text!r} for {answer!r}")


if __name__ == "__main__":
    main()
