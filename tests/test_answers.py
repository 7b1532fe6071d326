"""Answers: finding them, scoring the format, and telling equal from different ones."""

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
from gtpo.answers.quantity import quantity
from gtpo.answers.spelling import one_spelling

ROOT = Path(__file__).resolve().parent.parent
MANY = 200_000  # repetitions in a hostile text: anything quadratic takes hours


def in_time(function, *arguments, seconds=60):
    """What a function returns in a thread of its own. Fails where it takes too long."""
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
    """Fails the test where math-verify is needed."""

    def fail(*texts):
        raise AssertionError(f"math-verify was called with {texts}")

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


@pytest.mark.parametrize(("tags", "answer"), [("[x]( 5 )", "5"), ("(5)\n ", "5"), ("()", "")])
def test_a_final_answer_is_the_content_of_the_one_block_that_ends_the_text(tags, answer):
    assert final_answer(draw(tags)) == answer


@pytest.mark.parametrize("tags", ["think (5", "5)", "(5).", "(4)(5)", "(5))", ")5(", ""])
def test_without_such_a_block_there_is_no_final_answer(tags):
    assert final_answer(draw(tags)) is None


def test_a_reference_is_written_to_the_letter_and_read_back():
    reference = format_reference("6 * 3 = 18", "18")
    assert reference == "<reasoning>\n6 * 3 = 18\n</reasoning>\n<answer>18</answer>"
    assert final_answer(reference) == "18"
    assert format_score(reference) == 10


# Scoring the format

# fmt: off
SCORES = [
    # one reasoning block, then one answer block; text before and between
    ("[x](5)", 10), ("well, [x]\n(5)\n\n", 10), ("[x] between (5)", 10), ("[]()", 10),
    # no block
    ("", 0), ("5", 0), ("[", 0), ("x ] y", 0), (")(", 0), ("][", 0),
    # one block, no tag of the other
    ("[x]", 1), ("(5)", 1), ("[x] 5", 1),
    # one block, and a tag of the other
    ("[x](5", 1.5), ("[x]5)", 1.5), ("](5)", 1.5), ("[(5)", 1.5),
    # the answer block must be one, and the end
    ("[x](5) bye", 1.5), ("[x](5))", 1.5), ("[x](5)))", 1.5), ("[x](4)(5)", 1.5),
    # two reasoning blocks; the answer is well formed
    ("[x][y](5)", 1.5), ("[[x](5)", 1.5), ("[[x]](5)", 1.5),
    # an answer inside the reasoning does not end the text
    ("[x(5)]", 1.5), ("[x(5)]y", 1.5),
    # reasoning inside the answer, and overlap: each by itself is well formed
    ("([x]5)", 3), ("[x(5])", 3),
    # neither is well formed
    ("[x][y](4)(5)", 0), ("[[]](())", 0),
]
# fmt: on


@pytest.mark.parametrize(("tags", "score"), SCORES)
def test_the_format_score_is_10_only_for_one_reasoning_block_and_then_one_answer_block(tags, score):
    assert format_score(draw(tags)) == score


def slow_format_score(text: str) -> float:
    """The rule, literally."""
    r_starts, r_ends, a_starts, a_ends = (
        [match.span() for match in re.finditer(tag, text)]
        for tag in ("<reasoning>", "</reasoning>", "<answer>", "</answer>")
    )
    reasoning = len(r_starts) == len(r_ends) == 1 and r_starts < r_ends
    answer = len(a_starts) == len(a_ends) == 1 and a_starts < a_ends
    answer = answer and text[a_ends[0][1] :].strip() == ""
    if reasoning and answer and r_ends < a_starts:
        return 10
    score_of_reasoning = 1.5 if a_starts or a_ends else 1
    score_of_answer = 1.5 if r_starts or r_ends else 1
    return reasoning * score_of_reasoning + answer * score_of_answer


def test_the_format_score_agrees_with_the_literal_rule_on_random_texts():
    dice = random.Random(0)
    for _ in range(20_000):
        tags = "".join(dice.choices("[]()x \n", k=dice.randrange(9)))
        assert format_score(draw(tags)) == slow_format_score(draw(tags)), tags


LONG = [
    *(draw(tags) * MANY for tags in ("[", "(", "[)")),
    draw("[x](") + draw(")") * MANY,
    *(letter * MANY * 5 for letter in ("<", " ", "{", "}", "\\", "#", "9")),
    *(box * MANY for box in (r"\boxed{", r"\boxed ", r"\boxed", r"\boxed{}")),
    r"\boxed{" + "{" * MANY + "}" * MANY,
    "### " * MANY,
]


@pytest.mark.parametrize("text", LONG, ids=lambda text: repr(text[:12]))
def test_a_million_characters_of_anything_are_read_at_once(text):
    def read(text):
        gsm8k_answer(text), boxed_answer(text), final_answer(text), format_score(text)
        return [same_answer(text, text), same_answer(text, "5"), same_answer("5", text)]

    assert in_time(read, text) == [bool(text.strip()), False, False]


# The same answer


def answer_pairs() -> list[tuple[str, str, str]]:
    """(answer, "is" or "is not", reference) of each line of answer_pairs.txt."""
    lines = (ROOT / "tests/answer_pairs.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line for line in lines if line and not line.startswith("# ")]
    return [re.fullmatch(r"(.+?)  +(is not|is) +(.+)", pair).groups() for pair in pairs]


SAME = [(answer, reference) for answer, verb, reference in answer_pairs() if verb == "is"]
DIFFERENT = [(answer, reference) for answer, verb, reference in answer_pairs() if verb == "is not"]
DIFFERENT += [("", "5"), ("\\frac{69}{5}\n\n0.0", "0.0")]  # which a line cannot hold


@pytest.mark.parametrize(("answer", "reference"), SAME)
def test_the_same_value_written_differently_is_the_same_answer(answer, reference):
    assert same_answer(answer, reference)


@pytest.mark.parametrize(("answer", "reference"), DIFFERENT)
def test_another_value_is_another_answer_however_alike_it_looks(answer, reference):
    assert not same_answer(answer, reference)


@pytest.mark.parametrize("nothing", ["", " \n", "$$", "\\boxed{}", "\\text{ }", None])
def test_an_empty_reference_matches_nothing(nothing):
    assert not any(same_answer(answer, nothing) for answer in ("", " ", "5", "x", None, nothing))


def value(text):
    """The exact value of an answer that is a plain number, None for any other answer."""
    return quantity(one_spelling(text)).value


def test_numbers_and_their_units_are_compared_the_same_way_in_both_orders(no_math_verify):
    for one, other in [pair for pair in SAME + DIFFERENT if None not in map(value, pair)]:
        assert same_answer(one, other) == same_answer(other, one), (one, other)


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


@pytest.mark.slow
def test_decimals_and_fractions_agree_with_exact_arithmetic(no_math_verify):
    dice = random.Random(1)
    for _ in range(2_000):
        top, places = dice.randrange(10**6), dice.randrange(1, 6)
        decimal = f"{top // 10**places}.{top % 10**places:0{places}d}"
        other = Fraction(top + dice.choice([0, 0, 1]), 10**places)
        fraction = rf"\frac{{{other.numerator}}}{{{other.denominator}}}"
        assert same_answer(decimal, fraction) == (Fraction(decimal) == other)


# Hostile texts

# fmt: off
MONSTERS = [
    "9^{9^{9}}", "$9^{9^{9}}$", "9^9^9", "2^{2^{2^{2^{2}}}}", "9^{9999999}",
    "999999!", "(9!)!!", "1e999999999", "1" + "0" * 599, "9" * 5_000, "-" * 599 + "1",
    "{" * 500, "}" * 500, "(" * 500, "\\sqrt{" * 90 + "2" + "}" * 90, "\\boxed{" * 50,
    "\\frac" * 100, "$" * 99, "\\" * 99, "a," * 290, "\x00", "\ud800", "\u2028",
]
# fmt: on


@pytest.mark.parametrize("monster", MONSTERS, ids=lambda text: ascii(text[:12]))
def test_a_monster_is_not_the_answer(monster):
    assert not in_time(same_answer, monster, "5")
    assert not in_time(same_answer, "5", monster)


@pytest.mark.parametrize(
    "answer", ["0!!" + "=" * 290, "=" * same.LONGEST_ANSWER, "=1" * 150, "x==5", "5 == 5"]
)
def test_a_row_of_equality_signs_is_no_answer_and_no_recursion(answer):
    assert not same_answer(answer, "5") and not same_answer(answer, "2 million")


def test_towers_are_refused_without_math_verify(no_math_verify):
    assert not same_answer("$9^{9^{9}}$", "5")
    assert not same_answer("x+1", "9^{9^{9}}")


@pytest.mark.slow
def test_what_takes_too_long_is_not_the_same_and_the_next_question_is_answered():
    assert not in_time(same_answer, "9^{9 \\cdot 9^{9}}", "x+1", seconds=150)
    assert same_answer("x+1", "1+x")


PIECES = r"""
    \frac \boxed{ \fbox \text{ \left \right \! \, \\ \{ \} { } ( ) [ ] ^ _ $ \$ % \% , . : ; / + - =
    ! 0 1 5 12 000 x pi e i cm million and or ½ − ° \sqrt \pi \circ #### <answer> </answer>
    <reasoning> \begin{pmatrix} & \end{pmatrix}
"""


@pytest.mark.slow
def test_random_texts_never_raise_and_never_escape_the_box(monkeypatch):
    compared = []
    monkeypatch.setattr(same, "equal_expressions", lambda *texts: bool(compared.append(texts)))
    dice, pieces = random.Random(0), [*PIECES.split(), " ", "\n", "\x00", "\ud800", "\u0663"]
    for _ in range(6_000):
        one, other = ("".join(dice.choices(pieces, k=dice.randrange(12))) for _ in range(2))
        assert same_answer(one, other) in (True, False)
        gsm8k_answer(one), boxed_answer(one), final_answer(one), format_score(one)
    assert len(compared) > 1_000
    for text in (text for texts in compared for text in texts):
        bare = re.sub(r"\\.", "", text)
        while "{}" in (bare := re.sub(r"[^{}]", "", bare)):
            bare = bare.replace("{}", "")
        assert bare == "", text
    monkeypatch.undo()
    for texts in dice.sample(compared, 60):
        assert same_answer(*texts) in (True, False)


# The process of math-verify


def test_it_works_from_many_threads_at_once():
    results = {}

    def compare(number):
        expanded = f"x^2 + {2 * number}x + {number**2 + number % 2}"
        results[number] = same_answer(f"({number} + x)^2", expanded)

    threads = [threading.Thread(target=compare, args=(number,)) for number in range(2, 18)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {number: number % 2 == 0 for number in range(2, 18)}


def children() -> list[psutil.Process]:
    """The child processes in which math-verify runs."""
    mine = psutil.Process().children()
    return [child for child in mine if "gtpo.answers.verifier" in child.cmdline()]


def child() -> psutil.Process:
    """The process in which math-verify has just answered."""
    (only,) = children()
    return only


@pytest.mark.slow
def test_a_child_that_was_killed_from_outside_is_replaced():
    assert same_answer("a+b+1", "1+b+a")
    killed = child()
    killed.kill()
    killed.wait()
    assert same_answer("a+b+2", "2+b+a") and child() != killed


def test_a_signal_to_all_processes_of_a_job_does_not_end_the_child():
    assert same_answer("s+1", "1+s")
    before = child()
    for signum in (signal.SIGINT, signal.SIGTERM):
        before.send_signal(signum)
    assert same_answer("s+2", "2+s") and child() == before


@pytest.mark.slow
def test_a_reply_that_comes_after_an_interrupt_is_not_taken_for_the_next_one():
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


@pytest.mark.slow
def test_a_child_that_does_not_start_is_an_error_and_not_a_different_answer(monkeypatch):
    for running in children():
        running.kill()
        running.wait()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    sentence = "math-verify does not start; try `/bin/false -c 'import math_verify'`"
    with pytest.raises(RuntimeError, match=sentence):
        same_answer("d+1", "1+d")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads another process's limits")
def test_the_child_has_a_memory_limit():
    import resource

    assert same_answer("f+1", "1+f")
    assert resource.prlimit(child().pid, resource.RLIMIT_AS)[0] == verifier.MEMORY_BYTES


QUESTION = """
from gtpo.answers import same_answer
print(same_answer('x+1', '1+x'), same_answer('x+1', 'x+2'))
"""


def run(*command, **options):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=120, **options
    )


@pytest.mark.slow
def test_it_works_from_a_command_from_standard_input_and_from_a_script_without_main_guard(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{QUESTION}")
    for finished in run("-c", QUESTION), run("-", input=QUESTION), run(str(script)):
        assert (finished.stdout, finished.stderr, finished.returncode) == ("True False\n", "", 0)


IN_A_FORK = """
import os
pid = os.fork()
if pid: os.waitpid(pid, 0)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_gets_a_child_of_its_own():
    finished = run("-c", QUESTION + IN_A_FORK + QUESTION.replace("1", "3"))
    assert (finished.stdout.splitlines(), finished.returncode) == (["True False"] * 3, 0)


@pytest.mark.slow
def test_importing_it_loads_nothing_heavy():
    program = "import sys, gtpo.answers, reward_math; print(*sys.modules)"
    loaded = run("-c", program).stdout.split()
    assert "gtpo.answers" in loaded
    assert not {"torch", "sympy", "math_verify", "wandb", "numpy", "trl"} & set(loaded)


# Real data


def rows(folder: Path, pattern: str):
    """The rows of all JSONL files that match."""
    for path in sorted(folder.glob(pattern)):
        with path.open(encoding="utf-8") as lines:  # not splitlines(): one row holds a U+2028
            yield from map(json.loads, lines)


@pytest.mark.slow
def test_every_gsm8k_answer_is_found_and_is_the_same_as_itself(shared_data, no_math_verify):
    answers = [gsm8k_answer(row["answer"]) for row in rows(shared_data, "gsm8k/*.jsonl")]
    assert len(answers) == 8_792
    assert all(re.fullmatch(r"-?\d[\d,]*", answer) for answer in answers)
    assert sum("," in answer for answer in answers) == 93
    for answer, another in zip(answers, answers[1:] + answers[:1], strict=True):
        digits, other_digits = answer.replace(",", ""), another.replace(",", "")
        assert same_answer(digits, f"${answer}")
        assert same_answer(answer, another) == (digits == other_digits)


@pytest.mark.slow
def test_every_math_answer_is_found_and_is_the_same_as_itself(shared_data):
    solutions = [row["solution"] for row in rows(shared_data, "hendrycks_math/*/*.jsonl")]
    answers = [boxed_answer(solution) for solution in solutions]
    assert len(answers) == 12_500
    assert answers.count("") == 2  # two rows of number theory have an empty box
    assert all(text.count("{") == text.count("}") for text in answers)
    assert [text for text in answers if not same_answer(text, text)] == ["", ""]

    expressions = sorted({text for text in answers if text and value(text) is None})
    assert len(expressions) > 1_500
    dice = random.Random(0)
    for text in dice.sample(expressions, 120):
        expression = same.for_math_verify(quantity(one_spelling(text)).text, None)
        assert not expression or verifier.equal_expressions(expression, expression), text
    for _ in range(120):
        one, other = dice.sample(expressions, 2)
        assert not same_answer(one, other), (one, other)
