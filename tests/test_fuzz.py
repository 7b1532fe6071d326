"""A little hostile input. reliability/fuzz.py, which these tests call, brings more of it.

hypothesis draws random texts. reliability/hostile_inputs.py makes recipes, answers and runs.
"""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gtpo import answers
from gtpo.recipe import yaml_text
from gtpo.system import safe_text
from reliability import fuzz, hostile_inputs
from reward_math import final_reward, released_reward

FEW = settings(max_examples=80, deadline=None, derandomize=True, database=None)
PIECES = st.one_of(st.sampled_from(hostile_inputs.PIECES), st.text(max_size=8))
TEXTS = st.lists(PIECES, max_size=12).map("".join)
NUMBERS = st.integers(-(10**12), 10**12)


@pytest.mark.slow
@pytest.mark.parametrize(
    "target, inputs",
    [
        ("recipe", 80),
        ("answers", 200),
        ("rewards", 320),
        pytest.param("report", 256, marks=pytest.mark.slow),
        ("console", 300),
    ],
)
def test_hostile_input_does_no_harm(target, inputs, monkeypatch):
    if target == "report":  # of a small run

        def check(dice):
            return fuzz.check_report(dice, 256)

        monkeypatch.setitem(fuzz.TARGETS, "report", (check, inputs))
    outcome = fuzz.run(target, inputs, seed=2)
    assert outcome.failures == [] and outcome.inputs >= inputs


def test_a_failure_is_reported_with_the_seed_that_repeats_it(monkeypatch):
    monkeypatch.setitem(fuzz.TARGETS, "answers", (lambda dice: 1 // (dice.random() > 0.5), 10))
    outcome = fuzz.run("answers", 10, seed=0)
    assert outcome.failures and outcome.inputs == 10
    number, what = outcome.failures[0]
    assert what.startswith("ZeroDivisionError") and random.Random(number).random() < 0.5


HACKS = [
    "<script>",
    "<img src=x>",
    "<!-- x -->",
    "</details>",
    "<a href='http://x'>x</a>",
    "<p onclick=x>x</p>",
]


@pytest.mark.slow
@pytest.mark.parametrize("hack", HACKS)
def test_the_check_of_a_page_sees_what_has_escaped(hack, monkeypatch):
    import jinja2

    init = jinja2.Environment.__init__

    def without_escaping(self, *args, **options):
        init(self, *args, **{**options, "autoescape": False})

    monkeypatch.setattr(jinja2.Environment, "__init__", without_escaping)
    monkeypatch.setattr(hostile_inputs, "text", lambda dice, pieces=12: hack)
    with pytest.raises(AssertionError):
        fuzz.check_report(random.Random(0), 16)


@pytest.mark.slow  # many random texts
@FEW
@given(TEXTS)
def test_any_text_has_a_format_score_and_answers(text):
    fuzz.check_answer_texts(text[:50], text[50:100], text)
    assert answers.format_score(text) < 10 or answers.final_answer(text) is not None


@FEW
@given(TEXTS, NUMBERS, NUMBERS)
def test_only_the_right_number_is_paid(text, wrong, right):
    completion = answers.format_reference(text, str(wrong))
    [paid] = final_reward([completion], [str(right)])
    if wrong != right:
        assert paid < 20
    elif answers.format_score(completion) == 10:
        assert paid == 20
    assert released_reward([completion], [str(right)])[0] >= 0


@FEW
@given(TEXTS)
def test_any_text_becomes_printable_once_and_for_all(text):
    shown = safe_text.printable(text)
    assert safe_text.printable(shown) == shown
    assert all(c.isprintable() or c in "\n\t" or not c.isascii() for c in shown)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**63), 2**63), st.floats(allow_nan=False), st.text()
)
PLAIN = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@pytest.mark.slow  # many random texts
@FEW
@given(st.dictionaries(st.text(), PLAIN, max_size=4))
def test_plain_values_come_back_from_yaml_as_they_were(values):
    import io

    stream = io.StringIO()
    yaml_text.write_yaml(values, stream)
    assert yaml_text.parse_yaml(stream.getvalue()) == values
