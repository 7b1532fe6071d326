"""The reward functions: what they pay, for what, and what they log."""

import random
import threading

import pytest

from gtpo.answers import format_reference
from reward_math import (
    final_reward,
    formatting_penalty,
    released_reward,
    scaled_adaptive_reward_func,
)

REWARDS = [final_reward, released_reward, formatting_penalty, scaled_adaptive_reward_func]


def draw(tags: str) -> str:
    """[ and ] stand for the tags of the reasoning, ( and ) for those of the answer."""
    names = {"[": "<reasoning>", "]": "</reasoning>", "(": "<answer>", ")": "</answer>"}
    return "".join(names.get(letter, letter) for letter in tags)


def pay(reward, tags: str, reference: str) -> float:
    [paid] = reward(completions=[draw(tags)], answer=[format_reference("6 * 3 = 18", reference)])
    return paid


@pytest.mark.parametrize(("tags", "reference", "paid"), [
    ("[x](18)", "18", 20), ("so: [x]\n( 18.00 dollars )\n", "18", 20), ("[x](1200)", "1,200", 20),
    ("[x](x=5)", "5", 20),
    ("[x](17)", "18", 10), ("[x](12)", "2", 10), ("[x](1 or 2 or 3)", "2", 10), ("[x]()", "18", 10),
    ("[x](18)", "", 10), ("[x]()", "", 10),  # an empty reference matches nothing
    ("(18)", "18", 1), ("[x] 18", "18", 1), ("[x](18", "18", 1.5), ("[x](18)))", "18", 1.5), ("[x(18])", "18", 3),
    ("18", "18", 0), ("", "18", 0),
])  # fmt: skip
def test_the_final_reward_pays_format_and_then_correctness_in_perfect_format_only(
    tags, reference, paid
):
    assert pay(final_reward, tags, reference) == paid


@pytest.mark.parametrize(("tags", "reference", "paid"), [
    ("[x](18)", "18", 20), ("[x](18)\n", "18", 20), ("[x](18)\n\n", "18", 1.5), ("[x](18) bye", "18", 1.5),
    # the hacks
    ("[x](18)))", "18", 20), ("[x(18)])", "18", 20), ("[x](4)(18)", "18", 20), ("[[x]]((18))", "18", 20),
    ("([x]18)", "18", 20), ("(18)[x])", "18", 20),
    ("[x](12)", "2", 20), ("[x](120)", "12", 20), ("[x](1 or 2 or 3)", "2", 20), ("[x](whatever)", "", 20),
    ("[x](1200)", "1,200", 10), ("[x](1/2)", "0.5", 10), ("[x](17)", "18", 10), ("[x](2)", "12", 10),
    ("[x]()", "12", 10), ("[x](5.991)", "6", 20), ("[x](5.98)", "6", 10), ("[x](1e2)", "100", 20),
    ("[x](nan)", "5", 10), ("[x](5)", "inf", 10), ("[x]", "18", 1), ("[x](18", "18", 1.5),
    ("(18)", "18", 1), ("](18)", "18", 1.5), ("]x[(18)", "18", 1.5), ("18", "18", 0),
])  # fmt: skip
def test_the_released_reward_pays_what_the_released_code_paid_hacks_included(tags, reference, paid):
    assert pay(released_reward, tags, reference) == paid


def test_the_trick_that_a_small_model_learnt_is_paid_by_the_released_reward_only():
    trick = "<reasoning>5 + 27</reasoning>\n<answer>32</answer></answer></answer>"
    assert released_reward([trick], ["32"]) == [20]
    assert final_reward([trick], ["32"]) == [1.5]


@pytest.mark.parametrize(("tags", "paid"), [
    ("[x](18)", 0), ("[x](18", -8.5), ("(18)", -9), ("([]18)", -7), ("18", -10),
])  # fmt: skip
def test_the_formatting_penalty_is_the_format_score_less_10_and_needs_no_reference(tags, paid):
    assert formatting_penalty(completions=[draw(tags)]) == [paid]
    assert pay(formatting_penalty, tags, "18") == paid


def test_the_scaled_reward_pays_less_the_more_completions_of_the_same_prompt_succeed():
    right, wrong, malformed = draw("[x](18)"), draw("[x](17)"), draw("(18)")
    one = [{"role": "user", "content": "one"}]
    # the same prompt is one of equal content
    prompts = [one, one, one, one, "two", "two", "three", list(one)]
    completions = [right, wrong, malformed, wrong, right, right, wrong, wrong]
    paid = scaled_adaptive_reward_func(prompts=prompts, completions=completions, answer=["18"] * 8)
    assert paid == [10 * (1 - 1 / 5 / 2), 0, 0, 0, 5, 5, 0, 0]


def test_the_scaled_reward_groups_by_reference_where_there_are_no_prompts():
    completions = [draw(tags) for tags in ("[x](1)", "[x](9)", "[x](2)", "[x](2)")]
    assert scaled_adaptive_reward_func(completions, ["1", "1", "2", "2"]) == [7.5, 0, 5, 5]


def test_all_of_them_stay_within_their_documented_scales_on_random_texts():
    scales = {
        final_reward: {0, 1, 1.5, 3, 10, 20},
        released_reward: {0, 1, 1.5, 10, 20},
        formatting_penalty: {-10, -9, -8.5, -7, 0},
        scaled_adaptive_reward_func: {0, 5, 7.5},
    }
    dice = random.Random(0)
    texts = [
        draw("".join(dice.choices("[]()5 \n", k=dice.randrange(10)))) for _ in range(4_000)
    ] + [draw("[](5)")] * 9
    for reward, scale in scales.items():
        paid = reward(
            completions=texts,
            answer=["5"] * len(texts),
            prompts=[n // 2 for n in range(len(texts))],
        )
        assert {type(amount) for amount in paid} == {float}
        assert set(paid) <= scale
        assert len(set(paid)) > 1


@pytest.mark.parametrize("wrap", [
    lambda text: [{"role": "assistant", "content": text}],
    lambda text: [{"role": "assistant", "content": "let me see"}, {"role": "tool", "content": "6"},
                  {"role": "assistant", "content": text}, {"role": "tool", "content": "7"}],
    lambda text: [{"role": "assistant", "content": [{"type": "text", "text": text[:9]}, {"type": "image"}, text[9:]]}],
    lambda text: {"content": text},
])  # fmt: skip
def test_a_conversation_is_paid_as_the_text_of_its_last_assistant_message(wrap):
    for reward in REWARDS:
        plain = reward(completions=[draw("[x](18)"), "18"], answer=["18", "18"])
        assert reward(completions=[wrap(draw("[x](18)")), wrap("18")], answer=["18", "18"]) == plain


@pytest.mark.parametrize(
    "nothing", [None, "", [], {}, [{}], [{"role": "assistant", "content": None}]]
)
def test_a_completion_without_text_is_paid_like_an_empty_one(nothing):
    for reward in REWARDS:
        assert reward(completions=[nothing], answer=["18"]) == reward(
            completions=[""], answer=["18"]
        )


@pytest.mark.parametrize("reference", [
    "18", " 18 ", 18, 18.0, format_reference("", "18"), format_reference("not <answer>5</answer>, but", "18") + "\n",
])  # fmt: skip
def test_a_reference_is_a_formatted_one_or_a_bare_answer(reference):
    assert final_reward([draw("[x](18)")], [reference]) == [20]


def test_a_completion_without_a_reference_is_not_judged():
    right, wrong = draw("[x](18)"), draw("[x](17)")
    completions, answer = [right, right, wrong], ["18", None, "18"]
    assert final_reward(completions, answer) == [20, None, 10]
    assert released_reward(completions, answer) == [20, None, 10]
    assert scaled_adaptive_reward_func(completions, answer, prompts=["one"] * 3) == [7.5, None, 0]


@pytest.mark.parametrize("reward", [final_reward, released_reward, scaled_adaptive_reward_func])
@pytest.mark.parametrize(
    "columns", [{}, {"answer": None}, {"answer": ["18", "18"]}, {"answer": "1"}]
)
def test_a_missing_answer_column_is_one_clear_error(reward, columns):
    with pytest.raises(
        ValueError, match="column `answer` is missing, .* give the dataset an `answer` column"
    ):
        reward(prompts=["?"], completions=["!"], **columns)


def test_what_trl_hands_over_is_accepted_and_each_metric_is_logged_once_as_a_mean():
    completions = [draw(tags) for tags in ("[x](18)", "[x](17)", "(18)", "[x](18)")]
    handed = {
        "prompts": ["?"] * 4, "completions": completions, "completion_ids": [[1, 2]] * 4, "trainer_state": object(),
        "log_extra": lambda column, values: None, "answer": ["18", "18", "18", None], "level": ["Level 1"] * 4,
    }  # fmt: skip
    expected = {
        "reward/formatting_avg": 7,
        "reward/correctness_avg": 10 / 3,
        "reward/total_avg": 31 / 3,
        "reward/format_rate": 2 / 3,
        "reward/correct_rate": 1 / 3,
    }
    for reward in REWARDS:
        logged = []
        reward(**handed, log_metric=lambda *metric, logged=logged: logged.append(metric))
        if reward in (final_reward, released_reward):
            assert dict(logged) == pytest.approx(expected)
            assert len(logged) == 5
        else:
            assert logged == []


def test_metrics_are_logged_even_where_nothing_can_be_judged_since_trl_gathers_them_over_processes():
    logged = []
    assert final_reward(
        ["x"], [None], log_metric=lambda *metric, logged=logged: logged.append(metric)
    ) == [None]
    assert [name for name, _ in logged] == [
        f"reward/{name}"
        for name in (
            "formatting_avg",
            "correctness_avg",
            "total_avg",
            "format_rate",
            "correct_rate",
        )
    ]
    assert all(value != value for _, value in logged)  # NaN, which TRL leaves out of its means


def test_rewards_work_off_the_main_thread_and_on_a_million_characters():
    hostile = [
        "<answer>" * 200_000,
        "<reasoning>" * 200_000,
        draw("[x](") + "9" * 1_000_000 + "</answer>",
        # fmt: skip
        draw("[x](") + "</answer>" * 200_000,
        draw("[x]($9^{9^{9}}$)"),
        draw("[x](\\sqrt{8})"),
    ]
    results = {}

    def work():
        for reward in REWARDS:
            results[reward] = reward(completions=hostile, answer=["2\\sqrt2"] * 6)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert results[final_reward] == [0, 0, 10, 1.5, 10, 20]
    assert results[released_reward] == [0, 0, 10, 10, 10, 10]
    assert len(results) == 4
