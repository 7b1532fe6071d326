"""The reward doctor: what rewards pay for right and wrong; and those that raise, hang, crash or
return what is no reward.
"""

import datetime
import sys
import textwrap
import threading

import pytest
from conftest import ROOT

from gtpo.answers import format_reference
from gtpo.recipe.sections import RewardsSection
from gtpo.rewards.doctor import diagnose, probe_completions

PROBLEMS = [
    {
        "prompt": [{"role": "user", "content": f"{a} + {a}?"}],
        "answer": format_reference(f"{a}+{a}={2 * a}", str(2 * a)),
    }
    for a in (2, 6, 15, 50)
]


class Tokenizer:
    def __call__(self, text, add_special_tokens):
        return {"input_ids": list(text.encode())}


@pytest.fixture
def said(tmp_path, monkeypatch):
    """Verdicts and sentences on rewards of a module `mine` with this source."""
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path), str(ROOT)])

    def diagnosed(
        *rewards: str,
        source: str = "",
        weights=None,
        problems=PROBLEMS,
        import_seconds: float = 60,
        **limits,
    ):
        (tmp_path / "mine.py").write_text("import os, time, math\n" + textwrap.dedent(source))
        # imported here where a test says isolated: false
        monkeypatch.delitem(sys.modules, "mine", raising=False)
        found = diagnose(
            list(rewards), weights, problems, Tokenizer(), RewardsSection(**limits), import_seconds
        )
        return [(finding.verdict, finding.sentence) for finding in found]

    return diagnosed


def test_the_probes_are_the_reference_and_what_is_wrong():
    made = probe_completions(PROBLEMS)
    assert (
        made["reference"][1] == "<reasoning>\n6+6=12\n</reasoning>\n<answer>12</answer>"
        and made["empty"] == [""] * 4
    )
    assert made["truncated"][1] == "<reasoning>\n6+6=12\n</reasoning>\n<answer>"
    assert (
        made["wrong but containing"][1] == "<reasoning>\n6+6=12\n</reasoning>\n<answer>112</answer>"
    )
    assert made["another row's"][1] == PROBLEMS[0]["answer"]


def test_where_all_answers_are_the_same_no_other_row_is_wrong():
    made = probe_completions([PROBLEMS[0]] * 2)
    assert made["another row's"] == [None, None] and made["wrong but containing"][0].endswith(
        "<answer>14</answer>"
    )


def test_a_reward_that_pays_for_the_answer_is_fine(said):
    [(verdict, sentence)] = said("reward_math.final_reward")
    assert verdict == "ok" and sentence.startswith(
        "reward_math.final_reward pays: reference 20, empty 0, truncated 1.5, wrong but containing"
        " 10, another row's 10; "
    )
    assert sentence.endswith(" ms each")
    assert [verdict for verdict, _ in said("reward_math.scaled_adaptive_reward_func")] == ["ok"]


def test_the_released_reward_is_found_out_alone_and_beside_another(said):
    [(verdict, sentence)] = said("reward_math.released_reward")
    assert verdict == "warn" and sentence.startswith(
        "reward_math.released_reward pays what is wrong like the right answer "
        "(a wrong answer that contains the right one in 4 of 4 problems): reference 20, "
    )
    assert [v for v, _ in said("reward_math.released_reward", "reward_math.final_reward")] == [
        "warn",
        "ok",
        "ok",
    ]


def test_a_reward_for_the_format_is_fine_beside_one_for_the_answer_and_not_alone(said):
    assert said("reward_math.formatting_penalty")[0][0] == "warn"
    beside = said("reward_math.final_reward", "reward_math.formatting_penalty", weights=[1.0, 0.5])
    assert [verdict for verdict, _ in beside] == ["ok", "ok", "ok"]
    assert beside[1][1].startswith(
        "reward_math.formatting_penalty pays for the format alone, and the others for the answer: "
    )
    assert beside[2][1].startswith(
        "all rewards pays: reference 20, empty -5, truncated -2.75, wrong but containing 10,"
        " another row's 10"
    )
    drowned = said("reward_math.final_reward", "reward_math.formatting_penalty", weights=[0.0, 0.5])
    assert [verdict for verdict, _ in drowned] == ["ok", "warn", "warn"]


def test_a_reward_that_pays_the_empty_completion_best_is_found_out(said):
    [(verdict, sentence)] = said(
        "mine.short",
        source=(
            "def short(completions, **kwargs): return [-len(c[0]['content']) for c in completions]"
        ),
    )
    assert (
        verdict == "warn"
        and "an empty completion in 4 of 4 problems; a truncated completion in 4 of 4" in sentence
    )


@pytest.mark.parametrize(
    "body, sentence",
    [
        (
            "raise KeyError('judge is away')",
            "mine.pay raised KeyError: 'judge is away', mine.py line 3, on the reference answer",
        ),
        (
            "return [0.0]",
            (
                "mine.pay returned 1 rewards for 4 completions, not one for each; return a list"
                " with a number or None for each completion, on the"
            ),
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
        ("raise SystemExit(3)", "raised SystemExit: 3"),
        (
            "return [1.0 if c[0]['content'] else 1 / 0 for c in completions]",
            "raised ZeroDivisionError: division by zero, mine.py line 3, on an empty completion",
        ),
        ("os.kill(os.getpid(), 11)", "ended its process (signal SIGSEGV)"),
        (
            "return [len(bytearray(2**30))] * 4",
            "raised MemoryError (rewards.memory), mine.py line 3",
        ),
    ],
)
def test_a_reward_that_would_fail_in_a_run_fails_with_its_cause(said, body, sentence):
    [(verdict, found)] = said(
        "mine.pay", source=f"def pay(completions, **kwargs):\n    {body}\n", memory=0.5
    )
    assert verdict == "fail" and sentence in found


def test_a_reward_that_hangs_is_stopped_with_all_that_it_started(said):
    source = (
        "import subprocess\ndef pay(completions, **kwargs):\n    subprocess.run(['sleep', '600'])\n"
    )
    assert said("mine.pay", source=source, seconds=0.1) == [
        ("fail", "mine.pay took longer than 0.4 s (rewards.seconds), on the reference answer")
    ]
    assert said("mine.pay", source="while True: pass", import_seconds=0.7) == [
        ("fail", "mine.pay took longer than 0.7 s to be imported")
    ]


def test_a_reward_that_cannot_be_imported_or_called_fails(said):
    assert (
        "cannot be imported in its own process: AttributeError: module 'mine' has no attribute"
        " 'nothing'" in said("mine.nothing")[0][1]
    )
    assert (
        "raised TypeError: 'int' object is not callable"
        in said("mine.five", source="five = 5")[0][1]
    )
    broken = said("mine.pay", "reward_math.released_reward", source="raise OSError('no licence')")
    assert [verdict for verdict, _ in broken] == [
        "fail",
        "warn",
    ] and "OSError: no licence, mine.py line 2" in broken[0][1]


def test_a_column_of_any_kind_reaches_the_reward_or_is_told(said):
    problems = [
        {**problem, "when": datetime.date(2000, 1, i + 1)} for i, problem in enumerate(PROBLEMS)
    ]
    source = "def pay(completions, when, **kwargs): return [float(date.day) for date in when]"
    assert (
        said("mine.pay", source=source, problems=problems)[0][1]
        .split(": ")[1]
        .startswith("reference 1 to 4, empty 1 to 4")
    )
    problems = [{**problem, "when": threading.Lock()} for problem in PROBLEMS]
    [(verdict, sentence)] = said("mine.pay", source=source, problems=problems)
    assert (
        verdict == "fail"
        and "the dataset has a column that cannot be handed over (" in sentence
        and "set rewards.isolated to false" in sentence
    )
    assert (
        "no_such_name"
        in said(
            "mine.pay",
            source="def pay(**kwargs): return no_such_name",
            problems=problems,
            isolated=False,
        )[0][1]
    )


def test_none_is_no_verdict_and_leaves_the_completion_out(said):
    source = "def pay(completions, **kwargs): return [None] * len(completions)"
    assert said("mine.pay", source=source)[0][1].startswith(
        "mine.pay does not score the reference answers: reference None, empty None"
    )
    assert [v for v, _ in said("mine.pay", "reward_math.final_reward", source=source)] == [
        "warn",
        "ok",
        "warn",
    ]


def test_a_reward_gets_what_trl_hands_over_may_print_and_may_be_asynchronous(said):
    source = """
        import json
        async def pay(prompts, completions, completion_ids, answer, trainer_state, log_extra, log_metric, **kwargs):
            print("noise"), log_metric("a", 1.0), log_extra("b", [])
            assert not kwargs and prompts[0][0]["role"] == "user" and trainer_state.global_step == 0
            return [float(len(ids) > 5 and c[0]["content"] == a) for ids, c, a in zip(completion_ids, completions, answer)]
        """
    assert said("mine.pay", source=source)[0][1].startswith(
        "mine.pay pays: reference 1, empty 0, truncated 0, wrong but containing 0, another row's 0"
    )
