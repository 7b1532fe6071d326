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


# fmt: off
FINAL_REWARDS = [
    # perfect format and a correct answer
    ("[x](18)", "18", 20), ("so: [x]\n( 18.00 dollars )\n", "18", 20),
    ("[x](1200)", "1,200", 20), ("[x](x=5)", "5", 20),
    # perfect format and a wrong answer; an empty reference matches nothing
    ("[x](17)", "18", 10), ("[x](12)", "2", 10), ("[x](1 or 2 or 3)", "2", 10), ("[x]()", "18", 10),
    ("[x](18)", "", 10), ("[x]()", "", 10),
    # imperfect format
    ("(18)", "18", 1), ("[x] 18", "18", 1), ("[x](18", "18", 1.5), ("[x](18)))", "18", 1.5),
    ("[x(18])", "18", 3), ("18", "18", 0), ("", "18", 0),
]
RELEASED_REWARDS = [
    ("[x](18)", "18", 20), ("[x](18)\n", "18", 20),
    # hacks of the format
    ("[x](18)))", "18", 20), ("[x(18)])", "18", 20), ("[x](4)(18)", "18", 20),
    ("[[x]]((18))", "18", 20), ("([x]18)", "18", 20), ("(18)[x])", "18", 20),
    # hacks of the answer
    ("[x](12)", "2", 20), ("[x](120)", "12", 20), ("[x](1 or 2 or 3)", "2", 20),
    ("[x](whatever)", "", 20), ("[x](5.991)", "6", 20), ("[x](1e2)", "100", 20),
    # answers that count as wrong
    ("[x](1200)", "1,200", 10), ("[x](1/2)", "0.5", 10), ("[x](17)", "18", 10),
    ("[x](2)", "12", 10), ("[x]()", "12", 10), ("[x](5.98)", "6", 10), ("[x](nan)", "5", 10),
    ("[x](5)", "inf", 10),
    # imperfect format
    ("[x](18)\n\n", "18", 1.5), ("[x](18) bye", "18", 1.5), ("[x](18", "18", 1.5),
    ("](18)", "18", 1.5), ("]x[(18)", "18", 1.5), ("[x]", "18", 1), ("(18)", "18", 1),
    ("18", "18", 0),
]
# fmt: on


@pytest.mark.parametrize(("tags", "reference", "paid"), FINAL_REWARDS)
def test_the_final_reward_pays_format_and_then_correctness_in_perfect_format_only(
    tags, reference, paid
):
    assert pay(final_reward, tags, reference) == paid


@pytest.mark.parametrize(("tags", "reference", "paid"), RELEASED_REWARDS)
def test_the_released_reward_pays_what_the_released_code_paid_hacks_included(tags, reference, paid):
    assert pay(released_reward, tags, reference) == paid


def test_a_trick_that_a_small_model_has_learnt_is_paid_by_the_released_reward_only():
    trick = "<reasoning>5 + 27</reasoning>\n<answer>32</answer></answer></answer>"
    assert released_reward([trick], ["32"]) == [20]
    assert final_reward([trick], ["32"]) == [1.5]


@pytest.mark.parametrize(
    ("tags", "paid"),
    [("[x](18)", 0), ("[x](18", -8.5), ("(18)", -9), ("([]18)", -7), ("18", -10)],
)
def test_the_formatting_penalty_is_the_format_score_less_10_and_needs_no_reference(tags, paid):
    assert formatting_penalty(completions=[draw(tags)]) == [paid]
    assert pay(formatting_penalty, tags, "18") == paid


def test_the_scaled_reward_pays_less_the_more_completions_of_the_same_prompt_succeed():
    right, wrong, malformed = draw("[x](18)"), draw("[x](17)"), draw("(18)")
    one = [{"role": "user", "content": "one"}]
    # prompts of equal content are the same
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
    texts = ["".join(dice.choices("[]()5 \n", k=dice.randrange(10))) for _ in range(4_000)]
    texts = [draw(text) for text in texts] + [draw("[](5)")] * 9
    for reward, scale in scales.items():
        paid = reward(
            completions=texts,
            answer=["5"] * len(texts),
            prompts=[n // 2 for n in range(len(texts))],
        )
        assert {type(amount) for amount in paid} == {float}
        assert set(paid) <= scale
        assert len(set(paid)) > 1


def message(content, role: str = "assistant") -> dict:
    return {"role": role, "content": content}


def in_parts(text: str) -> list:
    return [{"type": "text", "text": text[:9]}, {"type": "image"}, text[9:]]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda text: [message(text)],
        lambda text: [
            message("let me see"), message("6", "tool"), message(text), message("7", "tool")
        ],
        lambda text: [message(in_parts(text))],
        lambda text: {"content": text},
    ],
    ids=["one message", "among tool calls", "in parts", "a bare message"],
)  # fmt: skip
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


@pytest.mark.parametrize(
    "reference",
    [
        *("18", " 18 ", 18, 18.0),
        format_reference("", "18"),
        format_reference("not <answer>5</answer>, but", "18") + "\n",
    ],
)
def test_a_reference_is_a_formatted_one_or_a_bare_answer(reference):
    assert final_reward([draw("[x](18)")], [reference]) == [20]


def test_a_completion_without_a_reference_is_not_scored():
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
    sentence = "column `answer` is missing, .* give the dataset an `answer` column"
    with pytest.raises(ValueError, match=sentence):
        reward(prompts=["?"], completions=["!"], **columns)


def logged_by(reward, **arguments) -> list[tuple[str, float]]:
    """The metrics that a reward function logs, in their order."""
    logged = []
    reward(**arguments, log_metric=lambda *metric: logged.append(metric))
    return logged


def test_what_trl_hands_over_is_accepted_and_each_metric_is_logged_once_as_a_mean():
    completions = [draw(tags) for tags in ("[x](18)", "[x](17)", "(18)", "[x](18)")]
    arguments = {
        "prompts": ["?"] * 4,
        "completions": completions,
        "completion_ids": [[1, 2]] * 4,
        "trainer_state": object(),
        "log_extra": lambda column, values: None,
        "answer": ["18", "18", "18", None],
        "level": ["Level 1"] * 4,
    }
    expected = {
        "reward/formatting_avg": 7,
        "reward/correctness_avg": 10 / 3,
        "reward/total_avg": 31 / 3,
        "reward/format_rate": 2 / 3,
        "reward/correct_rate": 1 / 3,
    }
    for reward in (final_reward, released_reward):
        logged = logged_by(reward, **arguments)
        assert dict(logged) == pytest.approx(expected)
        assert len(logged) == 5
    for reward in (formatting_penalty, scaled_adaptive_reward_func):
        assert logged_by(reward, **arguments) == []


def test_metrics_are_logged_even_where_nothing_is_scored_since_trl_gathers_them():
    assert final_reward(["x"], [None]) == [None]
    logged = logged_by(final_reward, completions=["x"], answer=[None])
    names = ["formatting_avg", "correctness_avg", "total_avg", "format_rate", "correct_rate"]
    assert [name for name, _ in logged] == [f"reward/{name}" for name in names]
    assert all(value != value for _, value in logged)  # NaN, which TRL leaves out of its means


def test_rewards_work_off_the_main_thread_and_on_a_million_characters():
    hostile = [
        "<answer>" * 200_000,
        "<reasoning>" * 200_000,
        draw("[x](") + "9" * 1_000_000 + "</answer>",
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
