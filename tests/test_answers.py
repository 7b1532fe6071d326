"""Answers: finding them, scoring the format, and telling the same from the different."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from pathlib import Path

import psutil
import pytest

from gtpo.answers import (
    boxed_answer,
    final_answer,
    format_reference,
    format_score,
    gsm8k_answer,
    same,
    same_answer,
    verifier,
)

ROOT = Path(__file__).resolve().parent.parent
MANY = 200_000  # repetitions in a hostile text: anything quadratic takes hours


def in_time(function, *arguments, seconds=60):
    """What a function returns in a thread of its own; fails where that takes so long that it must
    be a hang.
    """
    result = []
    thread = threading.Thread(target=lambda: result.append(function(*arguments)), daemon=True)
    thread.start()
    thread.join(seconds)
    assert result, f"{function.__name__} raised, or did not come back in {seconds} s"
    return result[0]


def draw(tags: str) -> str:
    """[ and ] stand for the tags of the reasoning, ( and ) for those of the answer."""
    names = {"[": "<reasoning>", "]": "</reasoning>", "(": "<answer>", ")": "</answer>"}
    return "".join(names.get(letter, letter) for letter in tags)


@pytest.fixture
def no_math_verify(monkeypatch):
    def fail(*texts):
        raise AssertionError(f"math-verify was asked about {texts}")

    monkeypatch.setattr(same, "equal_expressions", fail)


# Finding an answer


@pytest.mark.parametrize(("text", "answer"), [
    ("6 * 3 = 18\n#### 18", "18"),
    ("#### 1\nno, wait\n####  10,100 \n", "10,100"),
    ("### 5 dollars", "5 dollars"),
    ("### 4\n#### 5\n### 6", "5\n### 6"),
    ("so it is 7", "7"),
    ("####", ""),
    (" \n", ""),
    ("", ""),
])  # fmt: skip
def test_a_gsm8k_answer_follows_the_final_mark_or_is_the_last_word(text, answer):
    assert gsm8k_answer(text) == answer


@pytest.mark.parametrize(("text", "answer"), [
    (r"so $\boxed{5}$.", "5"),
    (r"$\boxed{\frac{1}{2}}$", r"\frac{1}{2}"),
    (r"\boxed{\frac{\sqrt{3}}{2}} and more", r"\frac{\sqrt{3}}{2}"),
    (r"\boxed{1}, no: \boxed{2}", "2"),
    (r"$\boxed 5$.", "5"),
    (r"$\boxed\frac12$", r"\frac12"),
    (r"\boxed {17}.$$", "17"),
    (r"\fbox{3}", "3"),
    (r"\boxed{1} then \fbox{2}", "2"),
    (r"\boxed{\boxed{5}}", "5"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
    (r"\boxed{x \} y}", r"x \} y"),
    (r"\boxed{1} and \boxed{2", "1"),
    (r"}}{ \boxed{4}", "4"),
    (r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}", r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}"),
    (r"\boxed{}", ""),
    (r"\boxedfoo{3} is 4", "4"),
    (r"ends in \boxed", r"\boxed"),
    ("no box 9", "9"),
    ("", ""),
])  # fmt: skip
def test_a_boxed_answer_is_the_last_closed_box_with_its_braces_balanced(text, answer):
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(("tags", "answer"), [
    ("[x]( 5 )", "5"), ("(5)\n ", "5"), ("()", ""), ("think (5", None), ("5)", None), ("(5).", None), ("(4)(5)", None),
    ("(5))", None), (")5(", None), ("", None),
])  # fmt: skip
def test_a_final_answer_is_the_content_of_the_one_block_that_ends_the_text(tags, answer):
    assert final_answer(draw(tags)) == answer


def test_a_reference_is_written_to_the_letter_and_read_back():
    reference = format_reference("6 * 3 = 18", "18")
    assert reference == "<reasoning>\n6 * 3 = 18\n</reasoning>\n<answer>18</answer>"
    assert final_answer(reference) == "18"
    assert format_score(reference) == 10


# Scoring the format

SCORES = [
    # text before and between
    ("[x](5)", 10), ("well, [x]\n(5)\n\n", 10), ("[x] between (5)", 10), ("[]()", 10),
    ("", 0), ("5", 0), ("[", 0), ("x ] y", 0), (")(", 0), ("][", 0),
    ("[x]", 1), ("(5)", 1), ("[x] 5", 1),  # one block, no trace of the other
    ("[x](5", 1.5), ("[x]5)", 1.5), ("](5)", 1.5), ("[(5)", 1.5),  # a trace of the other
    # the answer must be one, and the end
    ("[x](5) bye", 1.5), ("[x](5))", 1.5), ("[x](5)))", 1.5), ("[x](4)(5)", 1.5),
    # two reasoning blocks; the answer is well formed
    ("[x][y](5)", 1.5), ("[[x](5)", 1.5), ("[[x]](5)", 1.5),
    ("[x(5)]", 1.5), ("[x(5)]y", 1.5),  # an answer inside the reasoning does not end the text
    # reasoning in the answer, and overlap: each by itself is well formed
    ("([x]5)", 3), ("[x(5])", 3),
    ("[x][y](4)(5)", 0), ("[[]](())", 0),
]  # fmt: skip


@pytest.mark.parametrize(("tags", "score"), SCORES)
def test_the_format_score_is_10_only_for_one_reasoning_block_and_then_one_answer_block(tags, score):
    assert format_score(draw(tags)) == score


def slow_format_score(text: str) -> float:
    """The rule, literally."""
    r_starts, r_ends, a_starts, a_ends = ([found.span() for found in re.finditer(tag, text)] for tag in (
        "<reasoning>", "</reasoning>", "<answer>", "</answer>"))  # fmt: skip
    reasoning = len(r_starts) == len(r_ends) == 1 and r_starts < r_ends
    answer = (
        len(a_starts) == len(a_ends) == 1
        and a_starts < a_ends
        and text[a_ends[0][1] :].strip() == ""
    )
    if reasoning and answer and r_ends < a_starts:
        return 10
    return reasoning * (1.5 if a_starts or a_ends else 1) + answer * (
        1.5 if r_starts or r_ends else 1
    )


def test_the_format_score_agrees_with_the_literal_rule_on_random_texts():
    dice = random.Random(0)
    for _ in range(20_000):
        tags = "".join(dice.choices("[]()x \n", k=dice.randrange(9)))
        assert format_score(draw(tags)) == slow_format_score(draw(tags)), tags


@pytest.mark.parametrize("text", [
    draw("[") * MANY, draw("(") * MANY, draw("[)") * MANY, draw("[x](") + draw(")") * MANY, "<" * MANY * 5,
    " " * MANY * 5, r"\boxed{" * MANY, r"\boxed " * MANY, r"\boxed" * MANY, r"\boxed{}" * MANY, "{" * MANY * 5,
    "}" * MANY * 5, "\\" * MANY * 5, r"\boxed{" + "{" * MANY + "}" * MANY, "#" * MANY * 5, "### " * MANY,
    "9" * MANY * 5,
], ids=lambda text: repr(text[:12]))  # fmt: skip
def test_a_million_characters_of_anything_are_read_at_once(text):
    def read(text):
        gsm8k_answer(text), boxed_answer(text), final_answer(text), format_score(text)
        return [same_answer(text, text), same_answer(text, "5"), same_answer("5", text)]

    assert in_time(read, text) == [bool(text.strip()), False, False]


# The same answer. Judged by hand, one by one.

SAME = [
    # plain numbers
    ("1200", "1,200"), ("1,234,567", "1234567"), ("10\\,000", "10,000"), ("1 200", "1200"), ("15,\\!000", "15000"),
    ("23{,}000", "23000"), ("18.00", "18"), ("12.", "12"), ("007", "7"), ("+5", "5"), ("−5", "-5"), ("- 5", "-5"),
    ("-0", "0"), (".5", "0.5"), ("1/2", "0.5"), ("2/4", "\\frac12"), ("\\dfrac{1}{2}", "\\tfrac 12"), ("½", "0.5"),
    ("-\\frac{1}{2}", "\\frac{-1}{2}"), ("1\\frac12", "1.5"), ("1 1/2", "3/2"), ("-15\\frac{3}{5}", "-15.6"),
    ("1.5 \\times 10^3", "1500"), ("1.5e3", "1,500"), ("3×10^{-2}", "0.03"), ("2 million", "2,000,000"),
    ("10^6", "1000000"), ("100000000000000000001", "100,000,000,000,000,000,001"), ("\\frac{12}{5,\\!525}", "12/5525"),
    # what stands around them
    ("$18", "18"), ("\\$18", "18"), ("$18$", "18"), ("\\(18\\)", "18"), ("\\[18\\]", "18"), ("-\\$0.50", "-0.5"),
    ("**18**", "18"), ("18.", "18"), ("= 18", "18"), ("\\boxed{18}", "18"), ("The answer is \\boxed{18}.", "18"),
    ("\\approx 8.24 \\text{ mph}", "8.24"), ("18 dollars", "$18"), ("18 eggs per day", "18"), ("5€", "5 euros"),
    ("50%", "50"), ("50\\%", "50 percent"), ("5 cm", "5"), ("5cm", "5\\text{ centimeters}"), ("5 apples", "5 apple"),
    ("440 cm^2", "440\\text{ cm}^2"), ("12 sq units", "12\\text{ square units}"), ("90°", "90^\\circ"),
    ("90 degrees", "90^{\\circ}"), ("8\\sqrt{3}", "8\\sqrt{3} \\text{ square inches}"), ("3 p.m.", "3 PM"),
    ("2516_8", "2516_{8}"), ("2516", "2516_8"),
    # words
    ("monday", "\\text{Monday}"), ("Monday.", "\\mbox{Monday}"), ("(C)", "\\text{(C)}"), ("C", "\\text{(C)}"),
    ("june 20", "\\text{June 20}"), ("1:03 p.m.", "\\text{1:03 PM}"),
    # expressions, for math-verify
    ("x=5", "5"), ("5", "x = 5"), ("2+3=5", "5"), ("120 \\div 12 = 10 \\text{ feet}", "10"), ("\\sqrt{8}", "2\\sqrt2"),
    ("√8", "2 sqrt(2)"), ("(x+1)^2", "x^2+2x+1"), ("0.5x", "\\frac{x}{2}"), ("y = 2x + 3", "2x+3"), ("5!", "120"),
    ("1.5\\sqrt3", "\\frac{3\\sqrt{3}}{2}"), ("0.75\\pi", "\\frac 34 π"), ("-5i+6", "6 - 5i"), ("3:4", "3/4"),
    ("(1, 2)", "(1,2)"), ("(0.75, 5)", "\\left(\\frac34,5\\right)"), ("2,1", "1, 2"), ("\\{2,1\\}", "1,2"),
    ("5 and 6", "6, 5"), ("2,3,4", "2, 3, \\text{ and } 4"), ("x=\\pm 3", "3,-3"), ("D, A", "\\text{A,D}"),
    ("(-∞, 5)", "\\left(-\\infty,5\\right)"), ("x \\ge 0", "[0,\\infty)"), ("[0,\\infty)", "x \\ge 0"),
    ("\\begin{bmatrix}1\\\\2\\end{bmatrix}", "\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}."), ("4x-5y=-50", "5y-4x=50"),
    ("x > 2", "2 < x"),
]  # fmt: skip

DIFFERENT = [
    # plain numbers: no substring, no tolerance, no lists taken for thousands
    ("12", "2"), ("12", "120"), ("2", "12"), ("1 or 2 or 3", "2"), ("-5", "5"), ("5.004", "5"), ("0.333333", "1/3"),
    ("0.0000000001", "0"), ("1.0000000000000000001", "1"), ("100000000000000000001", "100000000000000000000"),
    ("10^{-30}", "0"), ("1,2,3", "123"), ("1,2", "12"), ("1,2", "1.2"), ("10,00", "1000"), ("1.000", "1000"),
    ("1 2", "12"), ("1 2", "3"), ("1, 200", "1200"), ("(1,200)", "1200"), ("5/0", "5"), ("\\frac{1}{2}3", "1/23"),
    ("1e3", "13"), ("5 million", "5"), ("5 million", "5 billion"), ("5 thousand", "5"),
    # several answers, and none
    ("4 or 5", "5"), ("4, 5", "5"), ("\\boxed{4} \\boxed{5}", "5"), ("4} \\boxed{5", "5"),
    ("5 apples and 6 pears", "5"), ("not 5", "5"), ("C. 5", "5"), ("", "5"), ("\\boxed{}", "5"), ("$", "5"),
    # equations and hedges that hold the reference, of which math-verify takes that part
    ("17 = 18", "18"), ("18 = 17", "18"), ("x = 17 = 18", "18"), ("1+i = \\sqrt2", "\\sqrt2"), ("2x = 18", "18"), ("\\pi = 3", "3"),
    ("\\frac{7}{10} \\cup 7", "\\frac{7}{10}"), ("<!--5-->\\frac{7}{10}", "\\frac{7}{10}"), ("answer: 6 (or \\frac{7}{10})", "\\frac{7}{10}"),
    ("\\frac15|6/5", "\\frac15"), ("\\frac15...21/100", "\\frac15"), ("0 to 89", "0"), ("0 whatever 7", "0"),
    ("\\text{\\frac{7}{10} or } 5", "\\frac{7}{10}"), ("18 dozen", "18"),
    # units
    ("50%", "0.5"), ("1", "100%"), ("5 cm", "5 m"), ("5 hours", "5 minutes"), ("5 cents", "\\$5"), ("3 a.m.", "3 p.m."),
    ("5x", "5"), ("3c", "3"), ("5 pi", "5"), ("5 squared", "5"), ("2 thirds", "2"), ("2516_8", "2516"),
    ("2516_7", "2516_8"),
    # words
    ("Monday", "Sunday"), ("neither", "either"), ("ECBAD", "ABCDE"), ("A", "B"), ("two", "2"), ("half", "2"),
    ("2:06 PM", "\\text{1:03 PM}"), ("June 21", "June 20"), ("A,C", "\\text{A,D}"),
    # expressions
    ("x=5", "y=5"), ("x^2", "2x"), ("6.0000001", "3!"), ("5.0000001\\sqrt2", "5\\sqrt2"), ("(5.0000001, 2)", "(5,2)"),
    ("3.14", "\\pi"), ("1.4142136", "\\sqrt2"), ("(2,1)", "(1,2)"), ("(1,1)", "(4,4)"), ("[1,2]", "(1,2)"),
    ("1,2", "[1,2]"), ("x > 5", "x < 5"), ("x > 5", "x \\ge 5"), ("\\infty", "-\\infty"), ("i", "-i"), ("5,6,7", "5,6"),
    ("\\begin{pmatrix}2\\\\1\\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "reference"), SAME)
def test_the_same_value_written_differently_is_the_same_answer(answer, reference):
    assert same_answer(answer, reference)


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_another_value_is_another_answer_however_alike_it_looks(answer, reference):
    assert not same_answer(answer, reference)


@pytest.mark.parametrize("nothing", ["", " \n", "$$", "\\boxed{}", "\\text{ }", None])
def test_an_empty_reference_matches_nothing(nothing):
    assert not any(same_answer(answer, nothing) for answer in ("", " ", "5", "x", None, nothing))


def test_sameness_of_numbers_and_of_their_units_does_not_depend_on_the_order(no_math_verify):
    for one, other in [pair for pair in SAME + DIFFERENT if None not in map(value, pair)]:
        assert same_answer(one, other) == same_answer(other, one), (one, other)


def value(text):
    return same._number(same._split_unit(same._tidy(text))[0])


def test_numbers_are_compared_exactly_in_all_their_spellings(no_math_verify):
    dice = random.Random(0)
    for _ in range(2_000):
        number = dice.randrange(-(10 ** dice.randrange(1, 12)), 10**9)
        spellings = [
            f"{number}",
            f"{number:,}",
            f"{number}.0",
            f"${number:,}$",
            f"{number} apples",
            f"{2 * number}/2",
            # fmt: skip
            f"\\frac{{{number}}}{{1}}",
            f"{number}e0",
            f"\\boxed{{{number}}}",
            f"{number:,}\\%",
        ]
        one, other = dice.choice(spellings), dice.choice(spellings)
        if {one[-1], other[-1]} != {"s", "%"}:  # apples are no percent
            assert same_answer(one, other), (one, other)
        assert not same_answer(one, str(number + dice.choice([-1, 1]))), one
        assert not same_answer(f"{number}.{'0' * dice.randrange(20)}1", one), one


def test_decimals_and_fractions_agree_with_exact_arithmetic(no_math_verify):
    dice = random.Random(1)
    for _ in range(2_000):
        top, places = dice.randrange(10**6), dice.randrange(1, 6)
        decimal = f"{top // 10**places}.{top % 10**places:0{places}d}"
        other = Fraction(top + dice.choice([0, 0, 1]), 10**places)
        fraction = rf"\frac{{{other.numerator}}}{{{other.denominator}}}"
        assert same_answer(decimal, fraction) == (Fraction(decimal) == other)


# Hostile texts

MONSTERS = ["9^{9^{9}}", "$9^{9^{9}}$", "9^9^9", "2^{2^{2^{2^{2}}}}", "9^{9999999}", "999999!", "(9!)!!", "1e999999999",
            "{" * 500, "}" * 500, "(" * 500, "\\sqrt{" * 90 + "2" + "}" * 90, "\\boxed{" * 50, "\\frac" * 100,
            "9" * 5_000, "\x00", "\ud800", "$" * 99, "\\" * 99, "\u2028", "1" + "0" * 599, "a," * 290,
            "-" * 599 + "1"]  # fmt: skip


@pytest.mark.parametrize("monster", MONSTERS, ids=lambda text: ascii(text[:12]))
def test_a_monster_is_not_the_answer(monster):
    assert not in_time(same_answer, monster, "5")
    assert not in_time(same_answer, "5", monster)


def test_towers_are_refused_without_asking_math_verify(no_math_verify):
    assert not same_answer("$9^{9^{9}}$", "5")
    assert not same_answer("x+1", "9^{9^{9}}")


def test_what_takes_too_long_is_not_the_same_and_the_next_question_is_answered():
    assert not in_time(same_answer, "9^{9 \\cdot 9^{9}}", "x+1", seconds=150)
    assert same_answer("x+1", "1+x")


PIECES = r"""
    \frac \boxed{ \fbox \text{ \left \right \! \, \\ \{ \} { } ( ) [ ] ^ _ $ \$ % \% , . : ; / + - = ! 0 1 5 12 000
    x pi e i cm million and or ½ − ° \sqrt \pi \circ #### <answer> </answer> <reasoning> \begin{pmatrix} & \end{pmatrix}
"""


def test_random_texts_never_raise_and_never_escape_the_box(monkeypatch):
    asked = []
    monkeypatch.setattr(same, "equal_expressions", lambda *texts: bool(asked.append(texts)))
    dice, pieces = random.Random(0), [*PIECES.split(), " ", "\n", "\x00", "\ud800", "\u0663"]
    for _ in range(5_000):
        one, other = ("".join(dice.choices(pieces, k=dice.randrange(12))) for _ in range(2))
        assert same_answer(one, other) in (True, False)
        gsm8k_answer(one), boxed_answer(one), final_answer(one), format_score(one)
    assert len(asked) > 1_000
    for text in (text for texts in asked for text in texts):
        bare = re.sub(r"\\.", "", text)
        while "{}" in (bare := re.sub(r"[^{}]", "", bare)):
            bare = bare.replace("{}", "")
        assert bare == "", text
    monkeypatch.undo()
    for texts in dice.sample(asked, 60):
        assert same_answer(*texts) in (True, False)


# The process behind it


def test_it_works_from_many_threads_at_once():
    results = {}

    def ask(number):
        results[number] = same_answer(
            f"({number} + x)^2", f"x^2 + {2 * number}x + {number**2 + number % 2}"
        )

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(2, 18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {number: number % 2 == 0 for number in range(2, 18)}


def children() -> list[psutil.Process]:
    """The processes of ours in which math-verify runs."""
    mine = psutil.Process().children()
    return [child for child in mine if "gtpo.answers.verifier" in child.cmdline()]


def child() -> psutil.Process:
    """The process in which math-verify has just answered."""
    (only,) = children()
    return only


def test_a_child_that_was_killed_from_outside_is_replaced():
    assert same_answer("a+b+1", "1+b+a")
    killed = child()
    killed.kill()
    killed.wait()
    assert same_answer("a+b+2", "2+b+a") and child() != killed


def test_a_signal_to_all_of_a_job_does_not_end_the_child_before_the_run():
    assert same_answer("s+1", "1+s")
    before = child()
    for signum in (signal.SIGINT, signal.SIGTERM):
        before.send_signal(signum)
    assert same_answer("s+2", "2+s") and child() == before


def test_after_an_interrupt_no_reply_is_taken_for_that_to_the_next_question():
    assert same_answer("c+1", "1+c")
    slow = child()
    slow.suspend()  # it will reply, but not before the interrupt
    main = threading.main_thread().ident
    threading.Timer(0.5, signal.pthread_kill, (main, signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        same_answer("c+2", "2+c")
    if slow.is_running():
        slow.resume()
    assert not same_answer("c+3", "3+2c")


def test_a_child_that_does_not_start_is_an_error_and_not_a_verdict(monkeypatch):
    for running in children():
        running.kill()
        running.wait()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(
        RuntimeError, match="math-verify does not start; try `/bin/false -c 'import math_verify'`"
    ):
        same_answer("d+1", "1+d")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads another process's limits")
def test_the_child_has_a_memory_limit():
    import resource

    assert same_answer("f+1", "1+f")
    assert resource.prlimit(child().pid, resource.RLIMIT_AS)[0] == verifier.MEMORY_BYTES


QUESTION = (
    "from gtpo.answers import same_answer\nprint(same_answer('x+1', '1+x'), same_answer('x+1',"
    " 'x+2'))\n"
)


def run(*command, **options):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120, **options
    )


def test_it_works_from_a_command_from_standard_input_and_from_a_script_without_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{QUESTION}")
    for finished in run("-c", QUESTION), run("-", input=QUESTION), run(str(script)):
        assert (finished.stdout, finished.stderr, finished.returncode) == ("True False\n", "", 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_gets_a_child_of_its_own():
    after_the_fork = "import os\npid = os.fork()\nif pid: os.waitpid(pid, 0)\n" + QUESTION.replace(
        "1", "3"
    )
    finished = run("-c", QUESTION + after_the_fork)
    assert (finished.stdout.splitlines(), finished.returncode) == (["True False"] * 3, 0)


def test_importing_it_loads_nothing_heavy():
    loaded = run("-c", "import sys, gtpo.answers, reward_math; print(*sys.modules)").stdout.split()
    assert "gtpo.answers" in loaded
    assert not {"torch", "sympy", "math_verify", "wandb", "numpy", "trl"} & set(loaded)


# Real data


def rows(folder: Path, pattern: str):
    for path in sorted(folder.glob(pattern)):
        with path.open(encoding="utf-8") as lines:  # not splitlines(): one row holds a U+2028
            yield from map(json.loads, lines)


def test_every_gsm8k_answer_is_found_and_is_the_same_as_itself(shared_data, no_math_verify):
    found = [gsm8k_answer(row["answer"]) for row in rows(shared_data, "gsm8k/*.jsonl")]
    assert len(found) == 8_792
    assert all(re.fullmatch(r"-?\d[\d,]*", answer) for answer in found)
    assert sum("," in answer for answer in found) == 93
    for answer, another in zip(found, found[1:] + found[:1], strict=True):
        assert same_answer(answer.replace(",", ""), f"${answer}")
        assert same_answer(answer, another) == (answer.replace(",", "") == another.replace(",", ""))


def test_every_math_answer_is_found_and_is_the_same_as_itself(shared_data):
    found = [boxed_answer(row["solution"]) for row in rows(shared_data, "hendrycks_math/*/*.jsonl")]
    assert len(found) == 12_500
    assert found.count("") == 2  # two rows of number theory have an empty box
    assert all(text.count("{") == text.count("}") for text in found)
    assert [text for text in found if not same_answer(text, text)] == ["", ""]

    expressions = sorted({text for text in found if text and value(text) is None})
    assert len(expressions) > 1_500
    dice = random.Random(0)
    for text in dice.sample(expressions, 120):
        expression = same._expression(same._split_unit(same._tidy(text))[0], None)
        assert not expression or verifier.equal_expressions(expression, expression), text
    for _ in range(120):
        one, other = dice.sample(expressions, 2)
        assert not same_answer(one, other), (one, other)


@pytest.mark.parametrize(
    "answer", ["0!!" + "=" * 290, "=" * same.LONGEST_ANSWER, "=1" * 150, "x==5", "5 == 5"]
)
def test_a_row_of_equality_signs_is_no_answer_and_no_recursion(answer):
    assert not same_answer(answer, "5") and not same_answer(answer, "2 million")


@pytest.mark.parametrize(
    "answer, reference",
    [
        (r"\frac{69}{5}\n\n0.0", "0.0"),
        (r"\frac{69}{5} 0", "0"),
        (r"\frac{5}{5}7", "7"),
        (r"\sqrt{4} .0", "0"),
        ("(5) 0", "0"),
        (r"5^{2} 0", "0"),
    ],
)
def test_two_numbers_one_after_the_other_are_no_product(answer, reference):
    assert not same_answer(answer.replace(r"\n", "\n"), reference)


def test_a_base_in_braces_before_a_number_is_no_number():
    assert same_answer(r"\log_{2} 8", "3")
