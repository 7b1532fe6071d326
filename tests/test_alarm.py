"""The collapse alarm on made-up log lines, on logs of real runs, and in whole runs."""

import json
import math
from types import SimpleNamespace

import pytest
from conftest import ROOT

from gtpo.hooks.alarm import CONDITIONS, METRICS, Alarm
from gtpo.recipe.sections import AlarmSection

HEALTHY = {
    "reward": 12.0,
    "loss": 0.0,
    "grad_norm": 0.3,
    "gtpo/skipped_steps": 0.0,
    "gtpo/initial_entropy": 0.5,
    "gtpo/completion_entropy": 0.4,
    "gtpo/frac_filtered": 0.1,
    "reward/format_rate": 0.9,
    "frac_reward_zero_std": 0.5,
    "completions/clipped_ratio": 0.1,
}
NAN = math.nan


def alarm_of(**given) -> Alarm:
    section = AlarmSection(**{"window": 5, "entropy_rising": None, **given})
    return Alarm(action=section.action, window=section.window, limits=section.limits(0.7))


def raised(alarm: Alarm, *stretches: tuple[int, dict]) -> list[tuple[int, str, str]]:
    """The events of a run, each as (number of the log line, condition, evidence).

    A stretch is a number of healthy log lines and the metrics that are replaced in them.
    """
    lines = [{**HEALTHY, **changed} for count, changed in stretches for _ in range(count)]
    return [
        (number, *event)
        for number, line in enumerate(lines, 1)
        for event in alarm.observe(line).items()
    ]


# condition: a metric, a healthy value near the limit, one beyond it, and what the evidence says
CASES = {
    "entropy_above": (
        "gtpo/completion_entropy",
        0.69,
        0.8,
        "is 0.72 nats, above 0.7 (it began at 0.50)",
    ),
    "entropy_low": ("gtpo/completion_entropy", 0.06, 0.02, "is 0.020 nats, 4% of the initial 0.50"),
    "all_filtered": (
        "gtpo/frac_filtered",
        0.95,
        1.0,
        "switches off 100% of completions: no gradient is left",
    ),
    "format_falling": ("reward/format_rate", 0.7, 0.6, "fell to 60%, from 90% at its best"),
    "no_signal": ("frac_reward_zero_std", 0.9, 1.0, "in 100% of the groups all rewards are equal"),
    "truncated": ("completions/clipped_ratio", 0.45, 0.75, "62% of the completions are cut off"),
}
BAD = {condition: {metric: beyond} for condition, (metric, _, beyond, _) in CASES.items()}


@pytest.mark.parametrize("condition", CASES)
def test_a_condition_that_holds_for_a_window_is_reported_once_with_its_evidence(condition):
    metric, edge, beyond, evidence = CASES[condition]
    assert raised(alarm_of(), (10, {}), (30, {metric: edge})) == []
    ((line, name, said),) = raised(alarm_of(), (10, {}), (30, {metric: beyond}))
    assert name == condition and evidence in said and "\n" not in said
    assert 11 <= line <= 15


@pytest.mark.parametrize("condition", CASES)
def test_a_single_bad_line_raises_no_alarm(condition):
    assert raised(alarm_of(), *[(6, {}), (1, BAD[condition])] * 4) == []


@pytest.mark.parametrize("condition", CASES)
def test_a_condition_is_reported_again_only_after_it_had_recovered(condition):
    bad = BAD[condition]
    events = raised(alarm_of(), (5, {}), (10, bad), (15, {}), (10, bad))
    assert [name for _, name, _ in events] == [condition, condition]
    flickering = raised(alarm_of(), (5, {}), (10, bad), (3, {}), (10, bad))
    assert [name for _, name, _ in flickering] == [condition]


def test_groups_without_any_reward_are_reported_with_what_to_look_at():
    ((_, name, said),) = raised(alarm_of(), (9, {"frac_reward_zero_std": 1.0, "reward": NAN}))
    assert name == "no_signal" and said.startswith("no completion has a reward, so nothing is")
    assert "trainer.reward_funcs" in said


@pytest.mark.parametrize("condition", CONDITIONS)
def test_null_switches_a_condition_off(condition):
    everything = {metric: beyond for metric, _, beyond, _ in CASES.values()}
    lines = [
        (5, {}),
        (20, {**everything, "gtpo/completion_entropy": 0.9, "gtpo/skipped_steps": 9.0}),
        (20, BAD["entropy_low"]),
    ]
    given = {"entropy_rising": 0.2}
    assert {name for _, name, _ in raised(alarm_of(**given), *lines)} == set(CONDITIONS)
    left = {name for _, name, _ in raised(alarm_of(**{**given, condition: None}), *lines)}
    assert left == set(CONDITIONS) - {condition}


def test_a_steep_rise_is_reported_long_before_the_threshold():
    rising = [(1, {"gtpo/completion_entropy": 0.1 + 0.05 * i}) for i in range(10)]
    ((line, name, said),) = raised(alarm_of(entropy_rising=0.2), *rising)
    assert name == "entropy_rising" and "from 0.20 to 0.45 nats within 5 log lines" in said
    slowly = [(1, {"gtpo/completion_entropy": 0.1 + 0.01 * i}) for i in range(50)]
    assert raised(alarm_of(entropy_rising=0.2), *slowly) == []


def test_a_policy_that_began_above_the_threshold_may_stay_there():
    for initial in (1.1, None):  # None: the trainer does not measure it
        line = {"gtpo/initial_entropy": initial, "gtpo/completion_entropy": 1.0}
        assert raised(alarm_of(), (30, line)) == []


def test_without_gtpos_metrics_entropy_is_compared_with_the_first_window():
    grpo = {name: value for name, value in HEALTHY.items() if not name.startswith("gtpo/")}
    lines = [{**grpo, "entropy": entropy} for entropy in [0.4] * 5 + [0.03] * 9]
    alarm = alarm_of()
    events = [event for line in lines for event in alarm.observe(line).items()]
    assert [name for name, _ in events] == ["entropy_low"] and "of the initial 0.40" in events[0][1]


def test_metrics_that_are_not_logged_raise_no_alarm():
    alarm = alarm_of()
    assert all(alarm.observe({"reward": 0.0}) == {} for _ in range(30))


def test_non_finite_steps_are_counted_with_and_without_a_trainer_that_skips_them():
    # Two skipped steps are below the limit of three.
    assert raised(alarm_of(), (5, {}), (9, {"gtpo/skipped_steps": 2.0, "grad_norm": NAN})) == []
    skipping = [(1, {"gtpo/skipped_steps": float(count)}) for count in (0, 1, 2, 3, 3, 3, 3, 3, 3)]
    ((line, name, said),) = raised(alarm_of(), (5, {}), *skipping)
    assert (line, name) == (9, "non_finite") and said.startswith("3 steps within 5 log lines")
    plain = {"gtpo/skipped_steps": None}
    assert raised(alarm_of(), (9, plain), (2, {**plain, "grad_norm": math.inf}), (9, plain)) == []
    ((line, name, _),) = raised(
        alarm_of(),
        (9, plain),
        (1, {**plain, "grad_norm": NAN}),
        (1, plain),
        (2, {**plain, "loss": NAN}),
    )
    assert (line, name) == (13, "non_finite")
    # The count works before the window is full.
    ((line, name, _),) = raised(alarm_of(window=50), (3, {**plain, "grad_norm": NAN}))
    assert (line, name) == (3, "non_finite")


def test_a_metric_that_is_not_finite_counts_as_unknown():
    line = {"gtpo/completion_entropy": NAN, "reward/format_rate": None}
    assert raised(alarm_of(), (30, line)) == []


def test_the_state_survives_a_checkpoint():
    alarm = alarm_of()
    raised(alarm, (10, {}), (4, BAD["no_signal"]))
    again = Alarm.from_state(json.loads(json.dumps(alarm.state())))
    assert [name for _, name, _ in raised(again, (9, BAD["no_signal"]))] == ["no_signal"]
    later = Alarm.from_state(json.loads(json.dumps(again.state())))
    assert raised(later, (9, BAD["no_signal"])) == []


@pytest.mark.parametrize(
    "action, saves, stops", [("warn", False, False), ("save", True, False), ("stop", True, True)]
)
def test_an_event_is_logged_as_a_metric_and_does_what_the_action_says(caplog, action, saves, stops):
    alarm = alarm_of(action=action)
    control = SimpleNamespace(should_save=False, should_training_stop=False)
    for step in range(1, 12):
        logs = {**HEALTHY, **BAD["truncated"]}
        state = SimpleNamespace(global_step=step, log_history=[{**logs, "step": step}])
        alarm.on_log(None, state, control, logs=logs)
        for record in (logs, state.log_history[-1]):
            assert record.get("alarm/truncated") == (1.0 if step == 5 else None)
    alarm.on_log(None, state, control, logs={"eval_reward": 1.0})  # not a line of training
    assert (control.should_save, control.should_training_stop) == (saves, stops)
    (message,) = caplog.messages
    assert message.startswith(
        "[GTPO] Alarm at step 5: 75% of the completions are cut off before their end; "
    )
    assert alarm.stopped_by == (message.removeprefix("[GTPO] ") if stops else None)


def test_every_condition_has_a_threshold_in_the_recipe_and_reads_metrics_that_are_logged():
    assert AlarmSection().limits(0.7).keys() == CONDITIONS.keys()
    assert set(METRICS) <= HEALTHY.keys()


# ---- logs of real runs: both demo recipes for 100 steps, and with a learning rate of 2e-2 for 120


def reported(run: str) -> dict[str, int]:
    """What the default alarm reports in a run of tests/alarm_logs.json: conditions and steps."""
    columns = json.loads((ROOT / "tests/alarm_logs.json").read_text())[run]
    section = AlarmSection()
    alarm = Alarm(action="warn", window=section.window, limits=section.limits(0.7))
    lines = (
        dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)
    )
    return {
        condition: step for step, line in enumerate(lines, 1) for condition in alarm.observe(line)
    }


@pytest.mark.parametrize("recipe", ["demo", "demo_grpo"])
def test_the_demo_recipes_raise_no_alarm(recipe):
    assert reported(recipe) == {}


def test_the_collapse_of_both_trainers_at_a_high_learning_rate_is_reported_within_40_steps():
    gtpo, grpo = reported("demo 2e-2"), reported("demo_grpo 2e-2")
    assert gtpo == {"format_falling": 28, "truncated": 33, "entropy_rising": 40, "no_signal": 48}
    assert grpo == {
        "entropy_above": 27,
        "format_falling": 27,
        "truncated": 30,
        "entropy_rising": 40,
        "no_signal": 90,
    }


# ---- whole runs


def run(here, *flags: str) -> tuple[int, list[dict]]:
    import demo_run

    import train_model

    code = train_model.main(demo_run.demo_flags("--training.save_steps", "100", *flags))
    return code, demo_run.history(demo_run.run_dir(here))


# The released trainer's gate is always on, so a threshold of 0 switches off every completion.
ALL_FILTERED = [
    *("--trainer.class_path", "custom_trainer.released.ReleasedGTPOTrainer"),
    *("--gtpo_runtime.ent_threshold", "0.0"),
    *("--training.max_steps", "6"),
    *("--alarm.window", "3"),
]


@pytest.mark.slow
def test_a_run_whose_completions_are_all_filtered_is_stopped_with_everything_saved(here, capsys):
    code, history = run(here, *ALL_FILTERED, "--alarm.action", "stop")
    assert code == 3
    steps = [line for line in history if "reward" in line]
    assert len(steps) == 3
    assert steps[-1]["alarm/all_filtered"] == 1.0 and "alarm/all_filtered" not in steps[1]
    (folder,) = (here / "runs").iterdir()
    for name in (
        "adapter_model.safetensors",
        "trainer_state.json",
        "checkpoint-3/adapter_model.safetensors",
    ):
        assert (folder / name).is_file(), name
    state = json.loads((folder / "checkpoint-3/trainer_state.json").read_text())
    alarm = state["stateful_callbacks"]["Alarm"]
    assert alarm["attributes"]["told"] == {"all_filtered": 0}  # the key that checkpoints have
    sentence = (
        "Alarm at step 3: the entropy filter switches off 100% of completions: no gradient is left"
    )
    assert sentence in (folder / "train.log").read_text()
    captured = capsys.readouterr()
    assert f"stopped: {sentence}" in captured.err
    assert f"Run directory: {folder.relative_to(here)}" in captured.out
    assert "Traceback" not in captured.err


@pytest.mark.slow
def test_warn_lets_the_run_go_on_and_none_reports_nothing(here):
    code, history = run(here, *ALL_FILTERED)
    assert code == 0 and [line["step"] for line in history if "alarm/all_filtered" in line] == [3]
    assert len([line for line in history if "reward" in line]) == 6
    code, history = run(here, *ALL_FILTERED, "--alarm.action", "none", "--overwrite")
    assert code == 0 and not [line for line in history if "alarm/all_filtered" in line]


@pytest.mark.slow
@pytest.mark.parametrize("trainer", ["gtpo_training.UnslothGTPOTrainer", "GRPO"])
def test_a_run_in_which_nothing_is_scored_has_no_signal_and_raises_the_alarm(
    here, monkeypatch, capsys, trainer
):
    (here / "scores_nothing.py").write_text(
        "def pay(completions, **kwargs):\n    return [None] * len(completions)\n"
    )
    monkeypatch.syspath_prepend(here)
    flags = ["--trainer.reward_funcs", "scores_nothing.pay", "--training.max_steps", "3"]
    if trainer == "GRPO":
        flags += ["--trainer.class_path", "custom_trainer.original.UnslothGRPOTrainer"]
    code, history = run(here, *flags, "--alarm.window", "2", "--alarm.action", "stop")
    steps = [line for line in history if "reward" in line]
    assert [line["frac_reward_zero_std"] for line in steps] == [1.0, 1.0]
    assert code == 3 and "alarm/no_signal" in steps[-1]
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert "Step 1: no completion of this rollout has a reward" in said
    assert said.count("no completion of this rollout") == 1 and "no signal 100%" in said
