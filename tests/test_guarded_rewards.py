"""Reward functions that misbehave in every way, in real runs on a tiny policy: each run ends well,
with nothing lost.
"""

import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import gradients
import hostile_rewards
import pytest
import torch
from conftest import ROOT

from gtpo.errors import RecipeError
from gtpo.recipe.dotted_paths import load_object
from gtpo.recipe.sections import RewardsSection
from gtpo.rewards.failures import Settling
from gtpo.rewards.guarded import GuardedRewards
from gtpo.rewards.pool import RewardPool, RewardProcess
from gtpo.rewards.worker import call_reward

GTPO = "gtpo.gtpo_training.UnslothGTPOTrainer"
GRPO = "custom_trainer.original.UnslothGRPOTrainer"


def trained(
    folder, *names: str, class_path: str = GTPO, rewards: dict | None = None, **options
) -> dict:
    """What a short run of a tiny policy saw, with the named functions of hostile_rewards."""
    section = RewardsSection(**(rewards or {}))
    functions = [(f"hostile_rewards.{name}", getattr(hostile_rewards, name)) for name in names]
    guarded = GuardedRewards(section, functions, seed=1, file=folder / "reward_failures.jsonl")
    trainer = gradients.make_trainer(class_path, str(folder), reward=guarded.functions, **options)
    guarded.attach(trainer)
    seen = gradients.watch(trainer)
    seen |= {"trainer": trainer, "guarded": guarded, "completions": [], "prompts": [], "tables": []}
    calculate = trainer._calculate_rewards

    def recorded(inputs, prompts, completions, *rest):
        seen["completions"].append(completions)
        seen["prompts"].append(prompts)
        seen["tables"].append(calculate(inputs, prompts, completions, *rest).clone())
        return seen["tables"][-1]

    trainer._calculate_rewards = recorded
    trainer.train()
    file = folder / "reward_failures.jsonl"
    seen["lines"] = (
        [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    )
    return seen


def expected(completions: list[str]) -> list[float]:
    return [
        math.nan if hostile_rewards.offends(text) else hostile_rewards.vowels(text)
        for text in completions
    ]


HOSTILE = {
    "raising": "raised KeyError: 'no verdict on",
    "sleeping": "took longer than",
    "in_an_endless_regex": "took longer than",
    "leaving": "raised SystemExit: 0",
    "leaving_at_once": "ended its process (exit code 0)",
    "crashing": "ended its process (signal SIGSEGV)",
    "eating_memory": "raised MemoryError",
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


@pytest.mark.parametrize("name", HOSTILE)
def test_the_completions_it_fails_on_cannot_be_judged_and_the_others_keep_their_rewards(
    tmp_path, name
):
    seen = trained(tmp_path, name, rewards=LIMITS.get(name))
    (table,), (completions,) = seen["tables"], seen["completions"]
    wanted = torch.tensor(expected(completions)).unsqueeze(1)
    offenders = [text for text in completions if hostile_rewards.offends(text)]
    assert torch.equal(table.isnan(), wanted.isnan()) and torch.allclose(
        table, wanted, equal_nan=True
    )
    assert 0 < len(offenders) < len(completions) // 2

    groups = wanted.view(-1, 4)
    advantages = (groups - groups.nanmean(dim=1, keepdim=True)).nan_to_num(0.0).flatten()
    assert torch.allclose(seen["rollouts"][0]["advantages"], advantages, atol=1e-6)
    assert all(g.isfinite().all() for g in seen["gradients"][0].values())
    assert all(value is None or math.isfinite(value) for value in seen["logs"][0].values())

    told = [line for line in seen["lines"] if not line["retried"]]
    said = HOSTILE[name]
    assert seen["logs"][0]["reward/cannot_judge"] == len(told) == (len(offenders) if said else 0)
    for line, text in zip(told, offenders, strict=bool(said)):
        assert (
            said in line["failure"]
            and line["completions"] == text
            and line["function"] == f"hostile_rewards.{name}"
        )
        assert ("hostile_rewards.py" in line["traceback"]) == (
            said.startswith(("raised", "took")) or "SIGSEGV" in said
        )


@pytest.mark.parametrize(
    "options",
    [
        {"rewards": {"isolated": False}},
        {"class_path": GRPO},
        {"rewards": {"per": "completion", "workers": 3}},
    ],
)
def test_so_it_is_in_our_own_process_for_the_baseline_and_with_several_workers(tmp_path, options):
    seen = trained(tmp_path, "letters", "raising", **options)
    (table,), (completions,) = seen["tables"], seen["completions"]
    # half a reward would be worse than none
    wanted = torch.tensor(expected(completions)).unsqueeze(1).expand(-1, 2)
    assert torch.allclose(table, wanted, equal_nan=True)
    judged = [len(text) for text in completions]
    assert seen["logs"][0]["letters/mean_length"] == pytest.approx(sum(judged) / len(judged))
    assert list(seen["trainer"]._logs["extra"]["length"]) == judged
    assert {"rewards/letters/mean", "rewards/reward/mean"} <= seen["logs"][0].keys()


def test_what_it_prints_reaches_neither_stdout_nor_the_rewards(tmp_path, capfd):
    seen = trained(tmp_path, "shouting", max_steps=2)
    out, err = capfd.readouterr()
    assert (
        "xxx" not in out
        and "file descriptor" not in out
        and err.count("to the file descriptor") == 2
    )
    assert not torch.cat(seen["tables"]).isnan().any() and seen["guarded"].failures.total == 0


def test_a_hang_off_the_main_thread_ends_in_time_too(tmp_path):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(
            trained(tmp_path, "in_an_endless_regex", rewards=LIMITS["in_an_endless_regex"])
        ),
        daemon=True,
    )
    thread.start()
    thread.join(300)
    assert found and found[0]["guarded"].failures.total > 0


def test_a_function_that_compares_a_group_gives_the_rewards_it_would_give_without_the_offenders(
    tmp_path,
):
    seen = trained(tmp_path, "rank_in_group")
    (table,), (completions,), (prompts,) = seen["tables"], seen["completions"], seen["prompts"]
    for text, prompt, reward in zip(completions, prompts, table[:, 0].tolist(), strict=True):
        others = sorted(
            other
            for other, same in zip(completions, prompts, strict=True)
            if same == prompt and not hostile_rewards.offends(other)
        )
        assert math.isnan(reward) if hostile_rewards.offends(text) else reward == others.index(text)


def test_an_asynchronous_function_is_isolated_as_well(tmp_path):
    seen = trained(tmp_path, "asynchronous", "letters")
    assert torch.allclose(
        seen["tables"][0][:, 0], torch.tensor(expected(seen["completions"][0])), equal_nan=True
    )
    assert "rewards/asynchronous/mean" in seen["logs"][0]


def test_reward_models_are_left_to_trl(tmp_path):
    model = torch.nn.Linear(1, 1)
    assert GuardedRewards(
        RewardsSection(), [("some.model", model)], seed=1, file=tmp_path / "f"
    ).functions == [model]


@pytest.mark.parametrize("per", ["rollout", "group", "completion"])
def test_any_number_of_workers_gives_the_same_rewards_in_order(tmp_path, per):
    runs = [
        trained(tmp_path, "dice", "letters", rewards={"workers": workers, "per": per}, max_steps=2)
        for workers in (1, 3)
    ]
    assert torch.equal(torch.stack(runs[0]["tables"]), torch.stack(runs[1]["tables"]))
    assert runs[0]["tables"][0][:, 0].unique().numel() == 16 and not torch.equal(*runs[0]["tables"])
    assert [run["logs"][0]["dice/count"] for run in runs] == [
        {"rollout": 16, "group": 4, "completion": 1}[per]
    ] * 2


# ---- when to stop


def test_past_the_rate_the_run_stops_with_a_checkpoint_and_trains_no_more(tmp_path):
    seen = trained(
        tmp_path, "failing_later", max_steps=9, per_device_train_batch_size=16, save_strategy="no"
    )
    state, guarded = seen["trainer"].state, seen["guarded"]
    assert (
        state.global_step == 2 and (tmp_path / "checkpoint-2/adapter_model.safetensors").is_file()
    )
    # none of its completions counts
    assert all((g == 0).all() for g in seen["gradients"][1].values())
    assert guarded.stopped_by.startswith(
        "Step 2: reward functions failed on 21 of the last 64 completions, more than"
        " rewards.max_failures allows; the last of them: hostile_rewards.failing_later raised"
        " KeyError"
    )
    assert state.log_history[1]["reward/cannot_judge"] == 21  # then it was not asked any more


def test_a_rate_of_one_never_stops(tmp_path):
    seen = trained(tmp_path, "failing_later", max_steps=4, rewards={"max_failures": 1})
    assert seen["guarded"].stopped_by is None and [
        logs["reward/cannot_judge"] for logs in seen["logs"][:4]
    ] == [0, 16, 32, 48]


def test_a_run_that_was_stopped_and_resumed_begins_to_count_again(tmp_path):
    guarded = trained(tmp_path, "failing_later", max_steps=9, per_device_train_batch_size=16)[
        "guarded"
    ]
    kept = guarded.resume_state()
    assert kept["total"] == 21 and kept["recent"] == []
    with (tmp_path / "reward_failures.jsonl").open("a") as file:
        file.write("what came after the checkpoint\n")
    guarded.failures.total = 99
    guarded.restore(kept)
    assert (
        guarded.failures.total == 21
        and "what came after" not in (tmp_path / "reward_failures.jsonl").read_text()
    )


@pytest.mark.parametrize(
    "name, sentence",
    [
        (
            "always_too_few",
            (
                "'hostile_rewards.always_too_few' returned 1 rewards for 16 completions, not one"
                " for each; return a list"
            ),
        ),
        (
            "always_raising",
            (
                r"'hostile_rewards.always_raising' failed on every completion of the first rollout,"
                r" it raised RuntimeError: the judge"
            ),
        ),
        (
            "without_keywords",
            (
                "does not take what TRL hands over, prompts, completions, .* \\(got an unexpected"
                " keyword argument 'prompts'\\)"
            ),
        ),
    ],
)
def test_a_function_that_is_no_reward_function_is_told_at_the_first_step(tmp_path, name, sentence):
    with pytest.raises(RecipeError, match=f"trainer.reward_funcs: .*{sentence}"):
        trained(tmp_path, name)


def test_no_token_ends_up_in_the_file(tmp_path):
    with pytest.raises(RecipeError):
        trained(tmp_path, "always_raising")
    assert "away, [secret]" in (tmp_path / "reward_failures.jsonl").read_text()
    assert (
        "hf_abc"
        not in (tmp_path / "reward_failures.jsonl")
        .read_text()
        .replace("hostile_rewards.py", "")
        .split('"traceback"')[0]
    )


def test_a_wrong_count_later_on_stops_the_run_saved(tmp_path):
    seen = trained(tmp_path, "too_few_later", max_steps=9)
    assert (
        seen["guarded"].stopped_by
        == "Step 2: the reward function 'hostile_rewards.too_few_later' returned 15 rewards for 16 "
        "completions, not one for each; return a list with a number or None for each completion"
    )
    assert (tmp_path / "checkpoint-2/optimizer.pt").is_file() and seen["tables"][1].isnan().all()


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
def test_a_wrong_type_or_count_is_a_bug_of_the_function(returned, bug):
    assert call_reward(lambda **kwargs: returned, {}, 2)["bug"].startswith(bug)


@pytest.mark.parametrize(
    "returned",
    [[1, None], (True, None), torch.tensor([1.0, 2.0]), iter([1.0, 2.0]), [torch.tensor(1.0), 2]],
)
def test_what_trl_takes_for_rewards_is_taken(returned):
    assert call_reward(lambda **kwargs: returned, {}, 2)["rewards"] in ([1.0, None], [1.0, 2.0])


# ---- what is asked again


def settled(groups: list[list[int]], fails, per: str = "rollout", give_up=lambda failures: False):
    """The verdict of a function that pays each completion how many it saw, and the calls that this
    took.
    """
    calls = []

    def ask(rows):
        calls.append(list(rows))
        if fails(rows):
            return {"failure": "raised", "traceback": ""}
        return {
            "rewards": [float(len(rows))] * len(rows),
            "metrics": [("seen", len(rows))],
            "columns": [("row", [str(r) for r in rows])],
        }

    return (
        Settling(groups, ask, lambda task, items: [task(item) for item in items], give_up).verdict(
            per
        ),
        calls,
    )


def test_a_call_that_fails_is_made_again_by_group_then_one_by_one_then_without_the_offenders():
    verdict, calls = settled([[0, 1], [2, 3, 4], [5]], fails=lambda rows: 3 in rows)
    assert calls == [[0, 1, 2, 3, 4, 5], [0, 1], [2, 3, 4], [5], [2], [3], [4], [2, 4]]
    assert verdict.rewards == [2, 2, 2, None, 2, 1] and set(verdict.failures) == {3}
    assert [rows for rows, _ in verdict.retried] == [[0, 1, 2, 3, 4, 5], [2, 3, 4]]
    assert verdict.metrics() == {"seen": pytest.approx((2 * 2 + 1 + 2 * 2) / 5)}
    assert verdict.columns() == {"row": ["0", "1", "2", None, "4", "5"]}


def test_a_failure_that_does_not_come_again_costs_nothing():
    once = iter([True])
    verdict, calls = settled([[0, 1]], fails=lambda rows: next(once, False))
    assert (
        verdict.rewards == [2, 2]
        and verdict.failures == {}
        and len(verdict.retried) == 1
        and calls[-1] == [0, 1]
    )


def test_a_function_that_needs_whole_groups_loses_only_the_group_that_fails():
    verdict, _ = settled([[0, 1], [2, 3]], fails=lambda rows: len(rows) != 2 or 3 in rows)
    assert verdict.rewards == [2, 2, None, None] and set(verdict.failures) == {2, 3}


def test_past_the_limit_nothing_more_is_asked_and_nothing_of_the_rollout_counts():
    verdict, calls = settled(
        [[0, 1], [2, 3], [4, 5]],
        fails=lambda rows: rows[0] < 4,
        per="completion",
        give_up=lambda n: n > 1,
    )
    assert calls == [[0], [1]] and verdict.abandoned and verdict.rewards == [None] * 6
    assert set(verdict.failures) == {0, 1}


def test_a_call_may_take_longer_than_its_like_by_the_limit_of_one_completion():
    pool = RewardPool(1, seconds=10.0, memory=None)
    assert pool._limit("f", 8, fresh=True) == 40  # the first call may have something to load
    pool._pace["f"], pool._start["f"] = 2.0, 5.0
    assert (
        pool._limit("f", 8, fresh=False) == 10 + 16
        and pool._limit("f", 8, fresh=True) == 10 + 16 + 5
    )
    assert pool._limit("f", 1, fresh=False) == 10


# ---- processes


def test_a_process_ends_with_its_parent_even_when_that_is_killed_and_it_is_in_a_loop_of_its_own():
    program = (
        "import sys, threading, time; sys.path[:0] = sys.argv[1:]; from gtpo.rewards.pool import"
        " RewardProcess; p = RewardProcess();ask = lambda:"
        " p.call('hostile_rewards.in_an_endless_regex', {'completions': ['a', '#']}, count=2,"
        " seconds=99.0, seed='');threading.Thread(target=ask, daemon=True).start()\nwhile p._child"
        " is None: time.sleep(0.01)\nprint(p._child.pid, flush=True); time.sleep(99)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(ROOT), str(ROOT / "tests")],
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(parent.stdout.readline())
    time.sleep(0.5)
    os.kill(child, 0)  # it runs
    parent.kill()
    parent.communicate()
    for _ in range(100):
        try:
            os.kill(child, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.kill(child, signal.SIGKILL)
    pytest.fail("it is still there")


def test_a_process_imports_nothing_heavy_and_calls_start_from_a_seed_of_their_own():
    process = RewardProcess()

    def ask(seed):
        return process.call(
            "hostile_rewards.dice", {"completions": ["a"]}, count=1, seconds=9.0, seed=seed
        )["rewards"]

    assert ask("x") == ask("x") != ask("y")
    heavy = process.call(
        "hostile_rewards.heavy_imports", {"completions": ["a"]}, count=1, seconds=9.0, seed=""
    )
    assert heavy["rewards"] == [0.0]
    process.stop()


def test_what_it_logs_gets_into_our_log(caplog):
    process = RewardProcess()
    process.call(
        "hostile_rewards.logging_loudly", {"completions": ["a", "b"]}, count=2, seconds=9.0, seed=""
    )
    # and not what is below the level here
    assert caplog.record_tuples == [("its.own", 30, "asked about 2")]
    process.stop()


def test_what_cannot_be_handed_over_is_told(tmp_path):
    guarded = GuardedRewards(
        RewardsSection(),
        [("hostile_rewards.letters", load_object("hostile_rewards.letters"))],
        seed=1,
        file=tmp_path / "f",
    )
    trainer = gradients.make_trainer(GTPO, str(tmp_path), reward=guarded.functions[0])
    guarded.attach(trainer)
    with pytest.raises(
        RecipeError,
        match=(
            "'hostile_rewards.letters' cannot be called in a process of its own, .*"
            " rewards.isolated to false"
        ),
    ):
        guarded.functions[0](
            prompts=["a"],
            completions=["b"],
            lock=[threading.Lock()],
            trainer_state=trainer.state,
            log_metric=None,
            log_extra=None,
        )
