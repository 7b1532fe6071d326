"""Reward functions that misbehave in every way, in real runs of a tiny policy.

Each run ends well, and no completion but those that a function fails on loses its reward.
"""

import enum
import json
import math
import os
import sys
import threading
import time
from decimal import Decimal
from fractions import Fraction

import gradients
import hostile_rewards
import psutil
import pytest
import torch
from conftest import ROOT

from gtpo.errors import RecipeError
from gtpo.recipe.dotted_paths import load_object
from gtpo.recipe.sections import RewardsSection
from gtpo.rewards import pool
from gtpo.rewards.failures import RewardCalls
from gtpo.rewards.guarded import GuardedRewards
from gtpo.rewards.pool import RewardPool, RewardProcess
from gtpo.rewards.worker import call_reward

GTPO = "gtpo.gtpo_training.UnslothGTPOTrainer"
GRPO = "custom_trainer.original.UnslothGRPOTrainer"


def trained(
    folder, *names: str, class_path: str = GTPO, rewards: dict | None = None, **options
) -> dict:
    """What a short run of a tiny policy showed, with these functions of hostile_rewards."""
    section = RewardsSection(**(rewards or {}))
    functions = [(f"hostile_rewards.{name}", getattr(hostile_rewards, name)) for name in names]
    file = folder / "reward_failures.jsonl"
    guarded = GuardedRewards(section, functions, seed=1, file=file)
    trainer = gradients.make_trainer(class_path, str(folder), reward=guarded.functions, **options)
    guarded.attach(trainer)
    seen = gradients.record_steps(trainer)
    seen |= {"trainer": trainer, "guarded": guarded, "completions": [], "prompts": [], "tables": []}
    calculate = trainer._calculate_rewards

    def recorded(inputs, prompts, completions, *rest):
        seen["completions"].append(completions)
        seen["prompts"].append(prompts)
        seen["tables"].append(calculate(inputs, prompts, completions, *rest).clone())
        return seen["tables"][-1]

    trainer._calculate_rewards = recorded
    trainer.train()
    lines = file.read_text().splitlines() if file.exists() else []
    seen["lines"] = [json.loads(line) for line in lines]
    return seen


def expected(completions: list[str]) -> list[float]:
    """What these functions pay, NaN for the completions that they misbehave on."""
    return [
        math.nan if hostile_rewards.offends(text) else hostile_rewards.vowels(text)
        for text in completions
    ]


# How the failure of each function is described, and the limits that it needs.
HOSTILE = {
    "raising": "raised KeyError: 'no reward for",
    "sleeping": "took longer than",
    "in_an_endless_regex": "took longer than",
    "leaving": "raised SystemExit: 0",
    "leaving_at_once": "ended its process (exit code 0)",
    "crashing": "ended its process (signal SIGSEGV)",
    "eating_memory": "raised MemoryError",
    "writing_to_the_pipe": "disturbed the replies of its process",
    "returning_nan": "returned nan",
    "returning_inf": "returned -inf",
    "returning_too_much": "returned inf",
    "returning_none": None,
}
LIMITS = {
    "sleeping": {"seconds": 1},
    "in_an_endless_regex": {"seconds": 1, "per": "completion"},
    "eating_memory": {"memory": 0.2},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_completions_that_a_function_fails_on_are_not_scored_and_the_others_keep_their_rewards(
    tmp_path, name
):
    seen = trained(tmp_path, name, rewards=LIMITS.get(name))
    (table,), (completions,) = seen["tables"], seen["completions"]
    wanted = torch.tensor(expected(completions)).unsqueeze(1)
    offenders = [text for text in completions if hostile_rewards.offends(text)]
    assert torch.equal(table.isnan(), wanted.isnan())
    assert torch.allclose(table, wanted, equal_nan=True)
    assert 0 < len(offenders) < len(completions) // 2

    groups = wanted.view(-1, 4)
    advantages = (groups - groups.nanmean(dim=1, keepdim=True)).nan_to_num(0.0).flatten()
    assert torch.allclose(seen["rollouts"][0]["advantages"], advantages, atol=1e-6)
    assert all(g.isfinite().all() for g in seen["gradients"][0].values())
    assert all(value is None or math.isfinite(value) for value in seen["logs"][0].values())

    failure = HOSTILE[name]
    failed = [line for line in seen["lines"] if not line["retried"]]
    assert seen["logs"][0]["reward/cannot_judge"] == len(failed)
    assert [line["completions"] for line in failed] == (offenders if failure else [])
    for line in failed:
        assert failure in line["failure"]
        assert line["function"] == f"hostile_rewards.{name}"
        has_traceback = failure.startswith(("raised", "took")) or "SIGSEGV" in failure
        assert ("hostile_rewards.py" in line["traceback"]) == has_traceback


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"rewards": {"isolated": False}},
        {"class_path": GRPO},
        {"rewards": {"per": "completion", "workers": 3}},
    ],
    ids=["in the process of the run", "in the baseline", "with several workers"],
)
def test_a_completion_without_one_of_its_rewards_has_none_at_all(tmp_path, options):
    seen = trained(tmp_path, "letters", "raising", **options)
    (table,), (completions,) = seen["tables"], seen["completions"]
    # half a reward would be worse than none
    wanted = torch.tensor(expected(completions)).unsqueeze(1).expand(-1, 2)
    assert torch.allclose(table, wanted, equal_nan=True)
    lengths = [len(text) for text in completions]
    mean_length = sum(lengths) / len(lengths)
    assert seen["logs"][0]["letters/mean_length"] == pytest.approx(mean_length)
    assert list(seen["trainer"]._logs["extra"]["length"]) == lengths
    assert {"rewards/letters/mean", "rewards/reward/mean"} <= seen["logs"][0].keys()


@pytest.mark.slow
def test_what_a_function_prints_reaches_neither_stdout_nor_the_rewards(tmp_path, capfd):
    seen = trained(tmp_path, "shouting", max_steps=2)
    out, err = capfd.readouterr()
    assert "xxx" not in out and "file descriptor" not in out
    assert err.count("to the file descriptor") == 2
    assert not torch.cat(seen["tables"]).isnan().any()
    assert seen["guarded"].failures.total == 0


@pytest.mark.slow
def test_a_hang_off_the_main_thread_ends_in_time_as_well(tmp_path):
    runs, name = [], "in_an_endless_regex"
    thread = threading.Thread(
        target=lambda: runs.append(trained(tmp_path, name, rewards=LIMITS[name])), daemon=True
    )
    thread.start()
    thread.join(300)
    assert runs and runs[0]["guarded"].failures.total > 0


@pytest.mark.slow
def test_a_function_that_compares_a_group_pays_what_it_would_pay_without_the_offenders(tmp_path):
    seen = trained(tmp_path, "rank_in_group")
    (table,), (completions,), (prompts,) = seen["tables"], seen["completions"], seen["prompts"]
    for text, prompt, reward in zip(completions, prompts, table[:, 0].tolist(), strict=True):
        group = [c for c, p in zip(completions, prompts, strict=True) if p == prompt]
        others = sorted(other for other in group if not hostile_rewards.offends(other))
        if hostile_rewards.offends(text):
            assert math.isnan(reward)
        else:
            assert reward == others.index(text)


@pytest.mark.slow
def test_an_asynchronous_function_is_isolated_as_well(tmp_path):
    seen = trained(tmp_path, "asynchronous", "letters")
    wanted = torch.tensor(expected(seen["completions"][0]))
    assert torch.allclose(seen["tables"][0][:, 0], wanted, equal_nan=True)
    assert "rewards/asynchronous/mean" in seen["logs"][0]


def test_reward_models_are_left_to_trl(tmp_path):
    model = torch.nn.Linear(1, 1)
    functions = [("some.model", model)]
    guarded = GuardedRewards(RewardsSection(), functions, seed=1, file=tmp_path / "f")
    assert guarded.functions == [model]


@pytest.mark.slow
@pytest.mark.parametrize("per", ["rollout", "group", "completion"])
def test_any_number_of_workers_gives_the_same_rewards_in_order(tmp_path, per):
    one, three = (
        trained(tmp_path, "dice", "letters", rewards={"workers": workers, "per": per}, max_steps=2)
        for workers in (1, 3)
    )
    assert torch.equal(torch.stack(one["tables"]), torch.stack(three["tables"]))
    first, second = one["tables"]
    assert first[:, 0].unique().numel() == 16 and not torch.equal(first, second)
    completions_per_call = {"rollout": 16, "group": 4, "completion": 1}[per]
    for run in (one, three):
        assert run["logs"][0]["dice/count"] == completions_per_call


# ---- when the run stops


@pytest.mark.slow
def test_past_the_rate_the_run_stops_with_a_checkpoint_and_trains_no_more(tmp_path):
    seen = trained(
        tmp_path, "failing_later", max_steps=9, per_device_train_batch_size=16, save_strategy="no"
    )
    state, guarded = seen["trainer"].state, seen["guarded"]
    assert state.global_step == 2
    assert (tmp_path / "checkpoint-2/adapter_model.safetensors").is_file()
    # none of the completions of step 2 counts
    assert all((g == 0).all() for g in seen["gradients"][1].values())
    assert guarded.stopped_by.startswith(
        "Step 2: reward functions failed on 21 of the last 64 completions, more than"
        " rewards.max_failures allows; the last of them: hostile_rewards.failing_later raised"
        " KeyError"
    )
    # after 21 failures the function was not called any more
    assert state.log_history[1]["reward/cannot_judge"] == 21


@pytest.mark.slow
def test_a_rate_of_one_never_stops(tmp_path):
    seen = trained(tmp_path, "failing_later", max_steps=4, rewards={"max_failures": 1})
    assert seen["guarded"].stopped_by is None
    assert [logs["reward/cannot_judge"] for logs in seen["logs"][:4]] == [0, 16, 32, 48]


@pytest.mark.slow
def test_a_run_that_was_stopped_and_resumed_begins_to_count_again(tmp_path):
    options = {"max_steps": 9, "per_device_train_batch_size": 16}
    guarded = trained(tmp_path, "failing_later", **options)["guarded"]
    state, file = guarded.resume_state(), tmp_path / "reward_failures.jsonl"
    assert state["total"] == 21 and state["recent"] == []
    with file.open("a") as stream:
        stream.write("what came after the checkpoint\n")
    guarded.failures.total = 99
    guarded.restore(state)
    assert guarded.failures.total == 21
    assert "what came after" not in file.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, sentence",
    [
        (
            "always_too_few",
            "'hostile_rewards.always_too_few' returned 1 rewards for 16 completions, not one for"
            " each; return a list",
        ),
        (
            "always_raising",
            "'hostile_rewards.always_raising' failed on every completion of the first rollout, it"
            " raised RuntimeError: the grader",
        ),
        (
            "without_keywords",
            "does not take what TRL hands over, prompts, completions, .* \\(got an unexpected"
            " keyword argument 'prompts'\\)",
        ),
    ],
)
def test_a_function_that_is_no_reward_function_is_refused_at_the_first_step(
    tmp_path, name, sentence
):
    with pytest.raises(RecipeError, match=f"trainer.reward_funcs: .*{sentence}"):
        trained(tmp_path, name)


@pytest.mark.slow
def test_no_secret_ends_up_in_the_file(tmp_path):
    with pytest.raises(RecipeError):
        trained(tmp_path, "always_raising")
    text = (tmp_path / "reward_failures.jsonl").read_text()
    assert "away, [secret]" in text
    assert "hf_abc" not in text.replace("hostile_rewards.py", "").split('"traceback"')[0]


@pytest.mark.slow
def test_a_wrong_count_later_on_stops_the_run_saved(tmp_path):
    seen = trained(tmp_path, "too_few_later", max_steps=9)
    assert seen["guarded"].stopped_by == (
        "Step 2: the reward function 'hostile_rewards.too_few_later' returned 15 rewards for 16 "
        "completions, not one for each; return a list with a number or None for each completion"
    )
    assert (tmp_path / "checkpoint-2/optimizer.pt").is_file() and seen["tables"][1].isnan().all()


# ---- one call


@pytest.mark.parametrize(
    "returned, bug",
    [
        ("high", "returned the str 'high', not a list"),
        ({"a": 1, "b": 2}, "returned a dict, not a list"),
        ({1.0, 2.0}, "returned a set, not"),
        (None, "returned None, not a list"),
        (1.0, "returned a float, not a list"),
        ([1.0], "returned 1 rewards for 2 completions"),
        ([1.0] * 3, "returned 3 rewards for 2 completions"),
        ([], "returned 0 rewards for 2"),
        (iter([1.0] * 9), "returned more rewards for 2"),
        (["1.0", 2.0], "returned the str '1.0' as a reward"),
        ([[1.0], 2.0], "returned a list as a reward"),
        ([torch.ones(2), torch.ones(2)], "returned a Tensor as a reward"),
        ([1j, 2.0], "returned a complex as a reward"),
    ],
)
def test_a_wrong_type_or_count_breaks_the_contract(returned, bug):
    assert call_reward(lambda **kwargs: returned, {}, 2)["bug"].startswith(bug)


@pytest.mark.parametrize(
    "returned",
    [[1, None], (True, None), torch.tensor([1.0, 2.0]), iter([1.0, 2.0]), [torch.tensor(1.0), 2]],
)
def test_what_trl_takes_for_rewards_is_taken(returned):
    reply = call_reward(lambda **kwargs: returned, {}, 2)
    assert reply["rewards"] in ([1.0, None], [1.0, 2.0])


def logging_this(**logged):
    """A reward function that logs metrics and columns, whose names have a prefix."""

    def pay(log_metric, log_extra, **kwargs):
        for name, value in logged.items():
            kind, _, name = name.partition("_")
            (log_metric if kind == "metric" else log_extra)(name or 5, value)
        return [1.0, 2.0]

    return pay


CANNOT_KEEP = "which a checkpoint cannot keep; log a list with numbers, texts or None, for instance"


@pytest.mark.parametrize(
    "logged, bug",
    [
        ({"column_parsed": [Fraction(1, 2)] * 2}, "logged a Fraction in the column 'parsed', "),
        ({"column_parsed": [1, {"a": [Decimal(1)]}]}, "logged a Decimal in the column 'parsed', "),
        ({"column_parsed": [{1, 2}, None]}, "logged a set in the column 'parsed', "),
        ({"column_parsed": [b"x", 1j]}, "logged the bytes b'x' in the column 'parsed', "),
        ({"column_parsed": [object()] * 2}, "logged a object in the column 'parsed', "),
        ({"column_parsed": "ab"}, "logged the str 'ab' instead of a list in the column 'parsed', "),
        ({"column_parsed": 5}, "logged a int instead of a list in the column 'parsed', "),
        ({"column_": [1, 2]}, "logged under a int instead of a name in the column a int, "),
        ({"metric_mean": "high"}, "logged the str 'high' as the metric 'mean'; log a number"),
        ({"metric_mean": None}, "logged None as the metric 'mean'; log a number"),
        ({"metric_mean": torch.ones(2)}, "logged a Tensor as the metric 'mean'; log a number"),
        ({"metric_": 1.0}, "logged under a int instead of a name as the metric a int; log"),
    ],
)
def test_a_logged_value_that_a_checkpoint_cannot_keep_breaks_the_contract(logged, bug):
    reply = call_reward(logging_this(**logged), {}, 2)
    assert reply["bug"].startswith(bug)
    if any(name.startswith("column") for name in logged):
        assert CANNOT_KEEP in reply["bug"]


def test_a_list_that_contains_itself_is_refused():
    endless = []
    endless.append(endless)
    reply = call_reward(logging_this(column_parsed=endless), {}, 2)
    assert reply["bug"].startswith("logged a list that is nested too deeply in the column 'parsed'")


def test_logged_values_become_plain_data_also_in_this_process():
    class Level(enum.IntEnum):
        HIGH = 3

    class Name(str):
        pass

    values = [Level.HIGH, Name("n"), -0.0, torch.tensor([1, 2]), {"a": (True, None)}]
    reply = call_reward(logging_this(column_parsed=values, metric_mean=torch.tensor(0.5)), {}, 2)
    assert repr(reply["columns"]) == ("[('parsed', [3, 'n', -0.0, [1, 2], {'a': [True, None]}])]")
    assert reply["metrics"] == [("mean", 0.5)]


@pytest.mark.slow
@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "in this process"])
@pytest.mark.parametrize("name", ["keeping_fractions", "keeping_fractions_asynchronously"])
def test_a_function_that_logs_what_cannot_be_kept_is_refused_at_its_first_call(
    tmp_path, name, isolated
):
    sentence = f"trainer.reward_funcs: 'hostile_rewards.{name}' logged a Fraction in the column"
    with pytest.raises(RecipeError, match=sentence):
        trained(tmp_path, name, rewards={"isolated": isolated})


@pytest.mark.slow
def test_a_value_that_cannot_be_kept_later_on_stops_the_run_saved(tmp_path):
    seen = trained(tmp_path, "keeping_fractions_later", max_steps=9)
    assert "Step 2: the reward function" in seen["guarded"].stopped_by
    assert "logged a Fraction in the column 'parsed'" in seen["guarded"].stopped_by
    assert (tmp_path / "checkpoint-2/optimizer.pt").is_file()


# ---- which calls are made again


def scored(groups: list[list[int]], fails, per: str = "rollout", too_many=lambda failures: False):
    """The rewards of a function that pays each completion the size of its call, and all calls."""
    calls = []

    def call(rows):
        calls.append(list(rows))
        if fails(rows):
            return {"failure": "raised", "traceback": ""}
        return {
            "rewards": [float(len(rows))] * len(rows),
            "metrics": [("seen", len(rows))],
            "columns": [("row", [str(row) for row in rows])],
        }

    def in_turn(task, items):
        return [task(item) for item in items]

    return RewardCalls(groups, call, in_turn, too_many).score(per), calls


def test_a_call_that_fails_is_made_again_by_group_then_one_by_one_then_without_the_offenders():
    rollout, calls = scored([[0, 1], [2, 3, 4], [5]], fails=lambda rows: 3 in rows)
    assert calls == [[0, 1, 2, 3, 4, 5], [0, 1], [2, 3, 4], [5], [2], [3], [4], [2, 4]]
    assert rollout.rewards == [2, 2, 2, None, 2, 1] and set(rollout.failures) == {3}
    assert [rows for rows, _ in rollout.retried] == [[0, 1, 2, 3, 4, 5], [2, 3, 4]]
    assert rollout.metrics() == {"seen": pytest.approx((2 * 2 + 1 + 2 * 2) / 5)}
    assert rollout.columns() == {"row": ["0", "1", "2", None, "4", "5"]}


def test_a_failure_that_does_not_come_again_costs_nothing():
    once = iter([True])
    rollout, calls = scored([[0, 1]], fails=lambda rows: next(once, False))
    assert rollout.rewards == [2, 2] and rollout.failures == {}
    assert len(rollout.retried) == 1 and calls[-1] == [0, 1]


def test_a_function_that_needs_whole_groups_loses_only_the_group_that_fails():
    rollout, _ = scored([[0, 1], [2, 3]], fails=lambda rows: len(rows) != 2 or 3 in rows)
    assert rollout.rewards == [2, 2, None, None] and set(rollout.failures) == {2, 3}


def test_past_the_limit_no_more_calls_are_made_and_nothing_of_the_rollout_counts():
    rollout, calls = scored(
        [[0, 1], [2, 3], [4, 5]],
        fails=lambda rows: rows[0] < 4,
        per="completion",
        too_many=lambda failures: failures > 1,
    )
    assert calls == [[0], [1]] and rollout.abandoned and rollout.rewards == [None] * 6
    assert set(rollout.failures) == {0, 1}


def test_a_call_may_take_longer_than_its_like_by_the_limit_of_one_completion(monkeypatch):
    limits, durations, called = [], iter([5.0, 16.0, 0.0, 0.0, 0.0]), set()

    class Process:
        """A process that notes the limit of each call, and says how long it took."""

        def __init__(self, memory):
            pass

        def has_called(self, function):
            return function in called

        def call(self, function, arguments, *, count, seed, seconds):
            called.add(function)
            limits.append(seconds)
            return {"rewards": [0.0] * count, "seconds": next(durations)}

    monkeypatch.setattr(pool, "RewardProcess", Process)
    rewards = RewardPool(1, seconds=10.0, memory=None)

    def call(count: int) -> None:
        rewards.call("f", {"completions": [""] * count}, seed="")

    rewards.map(call, [8])
    assert limits == [4 * 10]  # the first call may have something to load
    rewards.map(call, [8])
    assert limits[1:] == [10 + 8 * 5 / 8]  # 10 s more than calls took until now
    rewards.map(call, [8, 1])
    assert limits[2:] == [10 + 16, 10]  # never more than 10 s per completion
    called.clear()  # as in a new process, which has to load again
    rewards.map(call, [8])
    assert limits[4:] == [10 + 16 + 5]


# ---- processes

CALL_THAT_HANGS = """
import sys, threading
sys.path[:0] = sys.argv[1:]
from gtpo.rewards.pool import RewardProcess
RewardProcess().call(
    "hostile_rewards.in_an_endless_regex", {"completions": ["a", "#"]},
    count=2, seconds=99.0, seed="",
)
"""


@pytest.mark.slow
def test_a_process_in_an_endless_loop_ends_when_its_parent_is_killed():
    command = [sys.executable, "-c", CALL_THAT_HANGS, str(ROOT), str(ROOT / "tests")]
    parent = psutil.Popen(command)
    while not (children := parent.children()):
        time.sleep(0.01)
    time.sleep(0.5)
    (child,) = children
    assert child.is_running()
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=10)
    for process in alive:
        process.kill()
    assert not alive


@pytest.fixture
def called():
    """Calls a function of hostile_rewards on some completions, in one process for all calls."""
    process = RewardProcess()

    def call(name: str, *completions: str, seed: str = "") -> dict:
        arguments, count = {"completions": list(completions)}, len(completions)
        return process.call(
            f"hostile_rewards.{name}", arguments, count=count, seconds=9.0, seed=seed
        )

    yield call
    process.stop()


def test_calls_start_from_a_seed_of_their_own(called):
    one, again, other = (called("dice", "a", seed=seed)["rewards"] for seed in "xxy")
    assert one == again != other


@pytest.mark.slow
def test_a_process_imports_nothing_heavy(called):
    assert called("heavy_imports", "a")["rewards"] == [0.0]


@pytest.mark.slow
def test_what_a_function_logs_gets_into_the_log_of_the_run(called, caplog):
    called("logging_loudly", "a", "b")
    # but not what is below the level of the run
    assert caplog.record_tuples == [("its.own", 30, "called on 2")]


def test_rewards_cross_with_all_their_bits_and_none_nan_and_infinity_stay_apart(called):
    numbers = ["0.1", "-0.0", "5e-324", "1.7976931348623157e308", "nan", "inf", "-inf", "None"]
    reply = called("returning_the_number_in_the_text", *numbers)
    assert [repr(reward) for reward in reply["rewards"]] == [
        number.replace("e308", "e+308") for number in numbers
    ]


@pytest.mark.slow
def test_logged_values_cross_as_plain_data(called):
    (reply,) = [called("logging_values_of_many_kinds", "a")]
    metrics, columns = dict(reply["metrics"]), dict(reply["columns"])
    assert math.isnan(metrics["nan"]) and metrics["tensor"] == 0.5
    assert columns["numbers"] == [1, True, None, 0.5, 0.25, [1, 2], {"a": -math.inf}]
    assert columns["texts"] == ["½ \ud800", "2000-01-01"]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="sends a signal by its number")
def test_a_signal_without_a_name_is_a_failure_like_any_other(called):
    assert called("killing_itself", "40")["failure"] == "ended its process (signal 40)"


def test_an_argument_that_cannot_be_handed_over_is_one_clear_error(tmp_path):
    functions = [("hostile_rewards.letters", load_object("hostile_rewards.letters"))]
    guarded = GuardedRewards(RewardsSection(), functions, seed=1, file=tmp_path / "f")
    trainer = gradients.make_trainer(GTPO, str(tmp_path), reward=guarded.functions[0])
    guarded.attach(trainer)
    sentence = (
        "'hostile_rewards.letters' cannot be called in a process of its own, .*"
        " rewards.isolated to false"
    )
    with pytest.raises(RecipeError, match=sentence):
        guarded.functions[0](
            prompts=["a"],
            completions=["b"],
            lock=[threading.Lock()],
            trainer_state=trainer.state,
            log_metric=None,
            log_extra=None,
        )
