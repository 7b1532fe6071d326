"""The reward doctor: what rewards pay for right and wrong, and rewards that would fail in a run."""

import datetime
import sys
import textwrap
import threading

import pytest
from conftest import ROOT

from gtpo.answers import format_reference
from gtpo.recipe.sections import RewardsSection
from gtpo.rewards.doctor import check_sum, diagnose, probe_completions

PROBLEMS = [
    {
        "prompt": [{"role": "user", "content": f"{a} + {a}?"}],
        "answer": str(2 * a),
        "reference": format_reference(f"{a}+{a}={2 * a}", str(2 * a)),
    }
    for a in (2, 6, 15, 50)
]


class Tokenizer:
    """A byte per token."""

    def __call__(self, text, add_special_tokens):
        return {"input_ids": list(text.encode())}


@pytest.fixture
def diagnosed(tmp_path, monkeypatch):
    """Diagnoses rewards, among them those of a module `mine` with this source.

    Returns pairs of ok, warn or fail and a sentence.
    """
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path), str(ROOT)])

    def diagnosis(
        *rewards: str,
        source: str = "",
        weights=None,
        problems=PROBLEMS,
        import_seconds: float = 60,
        with_sum: bool = False,
        needs_all: bool = True,
        **limits,
    ) -> list[tuple[str, str]]:
        source = "import os, time, math; from fractions import Fraction\n" + textwrap.dedent(source)
        (tmp_path / "mine.py").write_text(source)
        # with isolated: false it is imported in this process
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        section = RewardsSection(**limits)
        tokenizer = Tokenizer()
        findings = diagnose(
            list(rewards),
            weights,
            problems,
            tokenizer,
            section,
            import_seconds,
            needs_all=needs_all,
        )
        if with_sum:
            findings = check_sum(findings, weights, problems, needs_all)
        return [(finding.verdict, finding.sentence) for finding in findings]

    return diagnosis


def levels(findings: list[tuple[str, str]]) -> list[str]:
    return [level for level, _ in findings]


# ---- what rewards pay


def test_the_probes_are_the_reference_and_wrong_completions():
    probes = probe_completions(PROBLEMS)
    reasoning = "<reasoning>\n6+6=12\n</reasoning>\n"
    assert probes["reference"][1] == f"{reasoning}<answer>12</answer>"
    assert probes["empty"] == [""] * 4
    assert probes["truncated"][1] == f"{reasoning}<answer>"
    assert probes["wrong but containing"][1] == f"{reasoning}<answer>112</answer>"
    assert probes["another row's"][1] == PROBLEMS[0]["reference"]


def test_where_all_answers_are_the_same_no_other_row_is_wrong():
    probes = probe_completions([PROBLEMS[0]] * 2)
    assert probes["another row's"] == [None, None]
    assert probes["wrong but containing"][0].endswith("<answer>14</answer>")


def test_a_reward_that_pays_for_the_answer_is_fine(diagnosed):
    [(level, sentence)] = diagnosed("reward_math.final_reward")
    assert level == "ok" and sentence.endswith(" ms each")
    assert sentence.startswith(
        "reward_math.final_reward pays: reference 20, empty 0, truncated 1.5, "
        "wrong but containing 10, another row's 10; "
    )
    assert levels(diagnosed("reward_math.scaled_adaptive_reward_func")) == ["ok"]


def test_the_released_reward_gets_a_warning_alone_and_beside_another(diagnosed):
    [(level, sentence)] = diagnosed("reward_math.released_reward")
    assert level == "warn" and sentence.startswith(
        "reward_math.released_reward pays what is wrong like the right answer "
        "(a wrong answer that contains the right one in 4 of 4 problems): reference 20, "
    )
    both = diagnosed("reward_math.released_reward", "reward_math.final_reward")
    assert levels(both) == ["warn", "ok", "ok"]


def test_a_reward_for_the_format_is_fine_beside_one_for_the_answer_and_not_alone(diagnosed):
    rewards = "reward_math.final_reward", "reward_math.formatting_penalty"
    assert levels(diagnosed("reward_math.formatting_penalty")) == ["warn"]
    both = diagnosed(*rewards, weights=[1.0, 0.5])
    assert levels(both) == ["ok", "ok", "ok"]
    assert both[1][1].startswith(
        "reward_math.formatting_penalty pays for the format alone, and the others for the answer: "
    )
    assert both[2][1].startswith(
        "all rewards pays: reference 20, empty -5, truncated -2.75, wrong but containing 10,"
        " another row's 10"
    )
    format_only = diagnosed(*rewards, weights=[0.0, 0.5])
    assert levels(format_only) == ["ok", "warn", "warn"]


def test_a_reward_that_pays_the_empty_completion_best_gets_a_warning(diagnosed):
    source = "def short(completions, **kwargs): return [-len(c[0]['content']) for c in completions]"
    [(level, sentence)] = diagnosed("mine.short", source=source)
    assert level == "warn"
    assert "an empty completion in 4 of 4 problems; a truncated completion in 4 of 4" in sentence


def test_a_reward_of_none_leaves_the_completion_out(diagnosed):
    source = "def pay(completions, **kwargs): return [None] * len(completions)"
    [(_, sentence)] = diagnosed("mine.pay", source=source)
    assert sentence.startswith(
        "mine.pay does not score the reference answers: reference None, empty None"
    )
    both = diagnosed("mine.pay", "reward_math.final_reward", source=source)
    assert levels(both) == ["warn", "ok", "warn"]


def test_a_sum_that_pays_the_reference_no_more_than_nothing_fails_with_what_to_look_at(diagnosed):
    source = """
        def never(completions, **kwargs): return [0.0] * len(completions)
        def short(completions, **kwargs): return [-len(c[0]['content']) for c in completions]
        def wants_tags(completions, answer, **kwargs):
            return [float(f"<result>{a}</result>" in c[0]["content"])
                    for c, a in zip(completions, answer)]
        def scores_nothing(completions, **kwargs): return [None] * len(completions)
        """
    for reward in ("never", "short", "wants_tags", "scores_nothing"):
        (_, _), (level, sentence) = diagnosed(f"mine.{reward}", source=source, with_sum=True)
        assert level == "fail" and sentence.startswith("the weighted sum of all rewards ")
        for place in ("dataset.answer_column", "tags", "trainer.reward_funcs"):
            assert place in sentence
        assert f"the first answer is {PROBLEMS[0]['answer']!r}"[:40] in sentence
    several = diagnosed("mine.never", "mine.short", source=source, with_sum=True)
    assert levels(several) == ["warn", "warn", "fail"]


def test_a_length_reward_beside_one_for_the_answer_gets_a_warning_alone(diagnosed):
    source = (
        "def short(completions, **kwargs):\n"
        "    return [-len(c[0]['content']) / 1000 for c in completions]"
    )
    rewards = "reward_math.final_reward", "mine.short"
    assert levels(diagnosed(*rewards, source=source, with_sum=True)) == ["ok", "warn", "ok"]
    heavy = diagnosed(*rewards, source=source, weights=[1.0, 1000.0], with_sum=True)
    assert levels(heavy) == ["ok", "warn", "fail"]
    none = diagnosed(*rewards, source=source, weights=[0.0, 0.0], with_sum=True)
    assert levels(none)[-1] == "fail"
    assert levels(diagnosed("reward_math.final_reward", with_sum=True)) == ["ok"]


def test_a_format_reward_that_never_pays_gets_a_warning_beside_one_that_does(diagnosed):
    # A pattern without re.DOTALL, as in a notebook that many copy: a line break ends its match.
    source = """
        import re
        def soft_format(completions, **kwargs):
            pattern = r"<reasoning>.*?</reasoning>\\s*<answer>.*?</answer>"
            return [0.5 * bool(re.match(pattern, c[0]["content"])) for c in completions]
        """
    rewards = "reward_math.final_reward", "mine.soft_format"
    both = diagnosed(*rewards, source=source, with_sum=True)
    assert levels(both) == ["ok", "warn", "ok"]
    assert "an empty completion in 4 of 4 problems" in both[1][1]


def test_a_function_that_fails_has_no_second_finding_on_the_sum(diagnosed):
    source = "def pay(completions, **kwargs): raise KeyError"
    assert levels(diagnosed("mine.pay", source=source, with_sum=True)) == ["fail"]


def test_with_grpo_a_function_that_scores_nothing_leaves_the_others_their_say(diagnosed):
    source = "def pay(completions, **kwargs): return [None] * len(completions)"
    rewards = "mine.pay", "reward_math.final_reward"
    gtpo = diagnosed(*rewards, source=source, with_sum=True)
    grpo = diagnosed(*rewards, source=source, with_sum=True, needs_all=False)
    assert levels(gtpo) == ["warn", "ok", "fail"] and levels(grpo) == ["warn", "ok", "ok"]


# ---- rewards that would fail in a run

# The body of a reward function, and what the doctor says of it.
FAILING = [
    (
        "raise KeyError('grader is away')",
        "mine.pay raised KeyError: 'grader is away', mine.py line 3, on the reference answer",
    ),
    (
        "return [0.0]",
        "mine.pay returned 1 rewards for 4 completions, not one for each; return a list with a "
        "number or None for each completion, on the",
    ),
    ("return [math.nan] * 4", "mine.pay returned nan, on the reference answer"),
    ("return [-math.inf] * 4", "returned -inf, on"),
    ("return [10**400] * 4", "returned inf, on"),
    ("return [1e300] * 4", "returned 1e+300, on"),
    ("return ['good'] * 4", "returned the str 'good' as a reward"),
    ("return [[1]] * 4", "returned a list as a reward"),
    ("return 5", "returned a int, not a list"),
    ("return dict.fromkeys(range(4), 1.0)", "returned a dict, not a list"),
    ("return {1.0, 2.0, 3.0, 4.0}", "returned a set, not a list"),
    ("return map(float, iter(int, 1))", "returned more rewards for 4 completions"),
    ("os._exit(7)", "mine.pay ended its process (exit code 7), on the reference answer"),
    ("os.kill(os.getpid(), 11)", "ended its process (signal SIGSEGV)"),
    ("raise SystemExit(3)", "raised SystemExit: 3"),
    (
        "kwargs['log_extra']('parsed', [Fraction(1, 2)] * 4)",
        "mine.pay returned None, not a list",
    ),
    (
        "kwargs['log_extra']('parsed', [Fraction(1, 2)] * 4); return [1.0] * 4",
        "mine.pay logged a Fraction in the column 'parsed', which a checkpoint cannot keep; log a"
        " list with numbers, texts or None, for instance str(value), on the reference answer",
    ),
    (
        "kwargs['log_metric']('mean', 'high'); return [1.0] * 4",
        "mine.pay logged the str 'high' as the metric 'mean'; log a number, on the reference",
    ),
    (
        "return [1.0 if c[0]['content'] else 1 / 0 for c in completions]",
        "raised ZeroDivisionError: division by zero, mine.py line 3, on an empty completion",
    ),
    ("return [len(bytearray(2**30))] * 4", "raised MemoryError (rewards.memory), mine.py line 3"),
]


@pytest.mark.parametrize("body, sentence", FAILING)
def test_a_reward_that_would_fail_in_a_run_fails_with_its_cause(diagnosed, body, sentence):
    source = f"def pay(completions, **kwargs):\n    {body}\n"
    [(level, shown)] = diagnosed("mine.pay", source=source, memory=0.5)
    assert level == "fail" and sentence in shown


@pytest.mark.slow
def test_a_reward_that_hangs_is_stopped_with_all_that_it_started(diagnosed):
    source = """
        import subprocess
        def pay(completions, **kwargs):
            subprocess.run(["sleep", "600"])
        """
    assert diagnosed("mine.pay", source=source, seconds=0.1) == [
        ("fail", "mine.pay took longer than 0.4 s (rewards.seconds), on the reference answer")
    ]
    assert diagnosed("mine.pay", source="while True: pass", import_seconds=0.7) == [
        ("fail", "mine.pay took longer than 0.7 s to be imported")
    ]


def test_a_reward_that_cannot_be_imported_or_called_fails(diagnosed):
    [(_, sentence)] = diagnosed("mine.nothing")
    assert (
        "cannot be imported in its own process: AttributeError: module 'mine' has no attribute"
        " 'nothing'"
    ) in sentence
    [(_, sentence)] = diagnosed("mine.five", source="five = 5")
    assert sentence == (
        "mine.five raised TypeError: 'int' object is not callable, on the reference answer"
    )
    both = diagnosed(
        "mine.pay", "reward_math.released_reward", source="raise OSError('no licence')"
    )
    assert levels(both) == ["fail", "warn"]
    assert "OSError: no licence, mine.py line 2" in both[0][1]


def test_a_column_of_any_kind_reaches_the_reward(diagnosed):
    days = [datetime.date(2000, 1, day) for day in (1, 2, 3, 4)]
    problems = [{**row, "when": day} for row, day in zip(PROBLEMS, days, strict=True)]
    source = "def pay(completions, when, **kwargs): return [float(date.day) for date in when]"
    [(_, sentence)] = diagnosed("mine.pay", source=source, problems=problems)
    assert sentence.split(": ")[1].startswith("reference 1 to 4, empty 1 to 4")


def test_a_column_that_cannot_be_handed_over_is_a_failure_only_if_rewards_are_isolated(diagnosed):
    problems = [{**problem, "lock": threading.Lock()} for problem in PROBLEMS]
    source = "def pay(**kwargs): return no_such_name"
    [(level, sentence)] = diagnosed("mine.pay", source=source, problems=problems)
    assert level == "fail" and "set rewards.isolated to false" in sentence
    assert "the dataset has a column that cannot be handed over (" in sentence
    [(_, sentence)] = diagnosed("mine.pay", source=source, problems=problems, isolated=False)
    assert "no_such_name" in sentence


def test_a_reward_gets_what_trl_hands_over_may_print_and_may_be_asynchronous(diagnosed):
    source = """
        import json
        async def pay(prompts, completions, completion_ids, answer, reference, trainer_state,
                      log_extra, log_metric, **kwargs):
            print("noise"), log_metric("a", 1.0), log_extra("b", [])
            assert not kwargs and prompts[0][0]["role"] == "user"
            assert trainer_state.global_step == 0
            rows = zip(completion_ids, completions, reference)
            return [float(len(ids) > 5 and c[0]["content"] == a) for ids, c, a in rows]
        """
    [(_, sentence)] = diagnosed("mine.pay", source=source)
    assert sentence.startswith(
        "mine.pay pays: reference 1, empty 0, truncated 0, wrong but containing 0, another row's 0"
    )
