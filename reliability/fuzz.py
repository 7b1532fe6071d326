"""Gives hostile input to everything that reads what others wrote.

Run `python reliability/fuzz.py [TARGET ...] [--inputs N] [--seed S]`. The targets:

- recipe: the recipe reader returns a Recipe that can be saved and read again, or RecipeError.
- answers: finding and comparing answers. No exception, no hang.
- rewards: the reward functions. No exception, no hang, each reward within its scale. A wrong number
  is never paid, and a right one always.
- report: the page of a run is well formed, and contains every completion as text.
- console: texts for terminals and logs. No control character, no secret.

Prints inputs, seconds, the slowest input and failures per target. Each failure is printed with the
seed that repeats it. Exits with 1 if there are failures. With `--atheris`, libFuzzer writes the
texts for recipe or answers, guided by coverage (pip install atheris).
"""

import argparse
import contextlib
import faulthandler
import json
import os
import random
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from reliability import hostile_inputs

HANG = 60  # seconds for one input or one report; math-verify may take 3 seconds for a comparison


class Hang(Exception):
    """An input took longer than HANG seconds."""


# ---- targets: each takes a random generator, checks one input or a batch, and returns the number
# of inputs checked


def check_recipe(dice: random.Random) -> int:
    """Checks one hostile recipe with hostile flags."""
    content, words = hostile_inputs.recipe(dice)
    return check_recipe_text(content, words)


def check_recipe_text(content: str, words: list[str]) -> int:
    """Checks that a recipe is refused in sentences, or can be saved and read again."""
    from gtpo.errors import RecipeError
    from gtpo.recipe import command_line as cli
    from gtpo.recipe.batch import batch_plan
    from gtpo.recipe.yaml_text import write_yaml

    in_memory = "/dev/shm" if os.path.isdir("/dev/shm") else None
    with tempfile.TemporaryDirectory(dir=in_memory) as folder, _same_import_path():
        file = Path(folder, "recipe.yaml")
        file.write_text(content, encoding="utf-8", errors="surrogatepass", newline="")
        try:
            recipe = cli.make_recipe(cli.parse([str(file), *words]))
            batch_plan(recipe)
        except RecipeError as error:
            assert all(line.strip() for line in str(error).split("\n")), "an empty line"
            assert len(str(error)) < 20_000, f"{len(str(error))} characters of error"
            return 1
        values, _ = recipe.saved()
        with file.open("w", encoding="utf-8") as stream:
            write_yaml(values, stream)
        assert cli.read_recipe([str(file)]).saved()[0] == values, "the saved recipe differs"
        name = Path(recipe.output_dir()).name
        assert not re.search(r"[\x00-\x1f]", name), "control characters in the directory's name"
    return 1


@contextlib.contextmanager
def _same_import_path():
    """Undoes what a recipe does to the import path: its folder becomes importable."""
    before = list(sys.path)
    yield
    sys.path[:] = before


def check_answers(dice: random.Random) -> int:
    """Checks one pair of answers and one hostile text."""
    return check_answer_texts(*hostile_inputs.answer_pair(dice), hostile_inputs.text(dice))


def check_answer_texts(one: str, other: str, text: str) -> int:
    """Checks the types and ranges of what the functions of gtpo.answers return."""
    from gtpo import answers, data

    for answer in (
        answers.gsm8k_answer(text),
        answers.boxed_answer(text),
        answers.reference_answer(text),
        data.any_reference(text),
        data.math_reference(text),
    ):
        assert isinstance(answer, str)
    assert answers.final_answer(text) is None or isinstance(answers.final_answer(text), str)
    assert answers.format_score(text) in (0, 1, 1.5, 3, 10)
    assert answers.same_answer(one, other) in (True, False)
    assert not answers.same_answer(text, "") and not answers.same_answer(None, other)
    return 1


SCALES = {  # the rewards that each function may pay
    "final_reward": {0, 1, 1.5, 3, 10, 20},
    "released_reward": {0, 1, 1.5, 10, 20},
    "formatting_penalty": {-10, -9, -8.5, -7, 0},
}


def check_rewards(dice: random.Random) -> int:
    """Checks the reward functions on 16 wrong, 4 right and 12 malformed completions."""
    import reward_math

    if dice.random() < 0.7:
        value = hostile_inputs.number(dice)
        reference = hostile_inputs.written(dice, value)
        wrong = [hostile_inputs.wrong_answer(dice, value, reference) for _ in range(16)]
        same = hostile_inputs.written(dice, value)
    else:
        reference = dice.choice(hostile_inputs.EXPRESSIONS + hostile_inputs.WORDS)
        others = dice.sample(hostile_inputs.EXPRESSIONS, 5)
        others = [other for other in others if other != reference]
        wrong = [
            dice.choice(hostile_inputs.WRONG).format(w=dice.choice(others), r=reference)
            for _ in range(16)
        ]
        same = reference
    wrong = [hostile_inputs.completion(dice, answer) for answer in wrong]
    right_forms = hostile_inputs.RIGHT if same[-1].isdigit() else hostile_inputs.RIGHT[:-6]
    right = [
        hostile_inputs.completion(dice, dice.choice(right_forms).format(r=same)) for _ in range(4)
    ]
    odd = (
        [hostile_inputs.broken(dice, reference) for _ in range(4)]
        + [hostile_inputs.mutated(dice, dice.choice(right)) for _ in range(4)]
        + [hostile_inputs.text(dice, 20) for _ in range(4)]
    )
    completions = wrong + right + odd
    columns = {
        "completions": completions,
        "answer": [hostile_reference(dice, reference)] * len(completions),
        "prompts": [i // 4 for i in range(len(completions))],
    }
    rewards = reward_math.final_reward(**columns)
    for i, (text, reward) in enumerate(zip(completions, rewards, strict=True)):
        paid = f"{reward} paid for {text!r} where {reference!r} is right"
        if i < len(wrong):
            assert reward == 10, paid
        elif i < len(wrong) + len(right):
            assert reward == 20, paid
        elif i < len(wrong) + len(right) + 4:
            assert reward < 10, f"{reward} paid for {text!r}, which is not well formed"
    for name, scale in SCALES.items():
        assert set(getattr(reward_math, name)(**columns)) <= scale, name
    scaled = reward_math.scaled_adaptive_reward_func(**columns)
    assert all(reward == 0 or 5 <= reward <= 10 for reward in scaled)
    return len(completions)


def hostile_reference(dice: random.Random, reference: str) -> str:
    """The reference by itself, or in the format of the datasets."""
    from gtpo.answers import format_reference

    return dice.choice(
        [
            reference,
            format_reference("6 * 3 = 18", reference),
            format_reference("see <answer>7</answer>", reference),
        ]
    )


FOREIGN = {"img", "iframe", "object", "embed", "form", "base"}  # elements that no report has


class _Page(HTMLParser):
    """Collects a page's elements, errors in their nesting, and the data of the conflict view."""

    VOID = {"meta", "link", "input", "br", "img", "hr"}

    def __init__(self):
        super().__init__(convert_charrefs=True)
        self.open, self.elements, self.problems, self.data = [], [], [], ""

    def handle_starttag(self, tag, attrs):
        self.elements.append(tag)
        for name, value in attrs:
            if name.startswith("on") or name in ("src", "srcdoc", "action", "formaction"):
                self.problems.append(f"<{tag} {name}={value!r}>")
            if name in ("href", "xlink:href") and value and not value.startswith(("#", "data:")):
                self.problems.append(f"<{tag} {name}={value!r}>")
        if tag not in self.VOID:
            self.open.append((tag, dict(attrs).get("id")))

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if not self.open or self.open.pop()[0] != tag:
            self.problems.append(f"</{tag}> closes another element")

    def handle_data(self, data):
        if self.open and self.open[-1] == ("script", "view"):
            self.data += data

    def handle_comment(self, data):
        self.problems.append(f"a comment: {data[:40]!r}")


def check_report(dice: random.Random, completions: int = 2048) -> int:
    """Checks the page of one run directory with hostile texts in all its files."""
    from gtpo.errors import RecipeError
    from gtpo.report.page import render
    from gtpo.report.run_record import read_run

    with tempfile.TemporaryDirectory() as folder:
        hostile_inputs.write_run(dice, Path(folder, "run"), completions)
        try:
            run = read_run(Path(folder, "run"))
            html = render([run], []).decode("utf-8")
        except RecipeError:
            return completions
        page = _Page()
        page.feed(html)
        page.close()
        assert not page.problems and not page.open, (page.problems[:3], page.open[:3])
        assert page.elements.count("script") == 2, "an injected script"
        assert not FOREIGN & set(page.elements), "an injected element"
        view = json.loads(page.data)
        for shown in view.get("runs", ()):
            for step in shown["steps"]:
                for group in step["groups"]:
                    _check_group(run, step["step"], group, view["tokens"])
    return completions


def _check_group(run, step: int, group: dict, texts: list[str]) -> None:
    """Checks that the shown tokens of a group are those recorded at this step."""
    recorded = {
        completion.row: completion
        for place in run.completions.groups
        if place.step == step
        for completion in run.completions.read(place)
        if completion.group == group["group"]
    }
    for row in group["rows"]:
        if "tokens" in row and row["head"] == row["length"]:
            shown = [texts[i] for i in row["tokens"]]
            assert shown == recorded[row["row"]].tokens, "tokens differ from those recorded"


def check_console(dice: random.Random) -> int:
    """Checks one hostile text with secrets in it."""
    from gtpo.system.safe_text import printable, without_secrets

    text, secret = hostile_inputs.text(dice), "".join(dice.choices("abcXYZ0189-_", k=12))
    text = f"{text}{secret}{text} hf_{'aZ09' * 8} {text}"
    shown = printable(without_secrets(text, {"MY_TOKEN": secret}))
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", shown), shown
    assert secret not in shown and "hf_aZ09" not in shown
    assert shown.encode("utf-8")
    return 1


# the function that checks, and the number of inputs
TARGETS: dict[str, tuple[Callable[[random.Random], int], int]] = {
    "recipe": (check_recipe, 20_000),
    "answers": (check_answers, 100_000),
    "rewards": (check_rewards, 100_000),
    "report": (check_report, 32_768),
    "console": (check_console, 100_000),
}


# ---- running


class Outcome(NamedTuple):
    """What happened to the inputs of one target."""

    target: str
    inputs: int
    seconds: float
    slowest: float  # seconds of one input or batch
    failures: list[tuple[int, str]]  # seed, error

    def row(self) -> str:
        """A row of the printed table."""
        return (
            f"{self.target:<10}{self.inputs:>9,}{self.seconds:>9.0f}{self.slowest:>9.2f}"
            f"{len(self.failures):>10}"
        )


def run(target: str, inputs: int, seed: int, most_failures: int = 20) -> Outcome:
    """The outcome of `inputs` inputs of a target.

    Each input or batch has a random generator of its own, whose seed repeats a failure.
    """
    check, _ = TARGETS[target]
    done, number, slowest, failures, began = 0, seed * 10**9, 0.0, [], time.monotonic()
    while done < inputs and len(failures) < most_failures:
        start = time.monotonic()
        try:
            with _alarm():
                done += check(random.Random(number))
        except Exception as error:  # the program looks for these
            failures.append((number, f"{type(error).__name__}: {error}"[:600]))
            done += 1
        slowest = max(slowest, time.monotonic() - start)
        number += 1
    return Outcome(target, done, time.monotonic() - began, slowest, failures)


def _warm_up(target: str) -> None:
    """Imports modules and starts math-verify, which are no part of an input's time."""
    with contextlib.suppress(Exception):
        TARGETS[target][0](random.Random(0))
    from gtpo.answers import same_answer

    same_answer("2x", "x+x")


@contextlib.contextmanager
def _alarm():
    """Raises Hang after HANG seconds; if that is not enough, ends the process with a traceback."""

    def hang(*_):
        raise Hang(f"no answer in {HANG} s")

    faulthandler.dump_traceback_later(4 * HANG, exit=True)
    signal.signal(signal.SIGALRM, hang)
    signal.alarm(HANG)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()


def run_atheris(target: str, inputs: int, seed: int) -> None:
    """Runs libFuzzer's loop, which ends the process by itself."""
    import atheris

    with atheris.instrument_imports(include=["gtpo", "ruamel.yaml"]):
        import gtpo.answers
        import gtpo.recipe.command_line  # noqa: F401

    def one_input(data: bytes) -> None:
        text = data.decode("utf-8", "replace")
        if target == "recipe":
            check_recipe_text(text, [])
        else:
            check_answer_texts(text[: len(text) // 2], text[len(text) // 2 :], text)

    with tempfile.TemporaryDirectory() as corpus:
        Path(corpus, "recipe").write_text(hostile_inputs.RECIPE)
        for i, answer in enumerate(hostile_inputs.ANSWERS):
            in_recipe = f"{hostile_inputs.RECIPE}run_name: {answer}\n"
            Path(corpus, str(i)).write_text(answer * 2 if target == "answers" else in_recipe)
        flags = [f"-runs={inputs}", f"-seed={seed}", f"-timeout={HANG}", "-max_len=2000"]
        flags += ["-verbosity=0", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *flags, corpus], one_input)
        atheris.Fuzz()


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "targets",
        nargs="*",
        choices=[*TARGETS, []],
        metavar="TARGET",
        help=f"{', '.join(TARGETS)} (default: all)",
    )
    parser.add_argument(
        "--inputs", type=int, help="inputs per target (default: a number for each target)"
    )
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--atheris",
        action="store_true",
        help="fuzz one target guided by coverage: recipe or answers",
    )
    options = parser.parse_args()
    if options.atheris:
        run_atheris(*options.targets, options.inputs or 20_000, options.seed)
    outcomes = []
    print(f"{'target':<10}{'inputs':>9}{'seconds':>9}{'slowest':>9}{'failures':>10}", flush=True)
    for target in options.targets or TARGETS:
        _warm_up(target)
        outcomes.append(outcome := run(target, options.inputs or TARGETS[target][1], options.seed))
        print(outcome.row(), flush=True)
        for number, what in outcome.failures:
            print(f"    random.Random({number}): {what}", flush=True)
    total = Outcome(
        "all",
        sum(outcome.inputs for outcome in outcomes),
        sum(outcome.seconds for outcome in outcomes),
        max(outcome.slowest for outcome in outcomes),
        [failure for outcome in outcomes for failure in outcome.failures],
    )
    print(total.row())
    return 1 if total.failures else 0


if __name__ == "__main__":
    sys.exit(main())
