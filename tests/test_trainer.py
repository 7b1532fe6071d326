"""GTPO's trainer on TRL's own GRPOTrainer, with a tiny real policy on a CPU."""

import copy
import json
import logging
import subprocess
import sys

import gradients
import pytest
import torch
import trl
from conftest import ROOT

import gtpo
from gtpo import gtpo_training
from gtpo.gtpo_training import refuse_conflicting_options
from gtpo.hooks.groups import compared_rewards, frac_without_signal, whole_groups

GTPO, GRPO = "gtpo.gtpo_training.UnslothGTPOTrainer", "custom_trainer.original.UnslothGRPOTrainer"

CASES = {
    "several groups, accumulation": {},
    "the gate on": {"peaked": 4.0, "threshold": 0.5},
    "padding is the end token": {"pad": "^"},
    "groups spread over micro-batches": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 8,
    },
    "larger groups": {
        "num_generations": 8,
        "per_device_train_batch_size": 16,
        "gradient_accumulation_steps": 1,
    },
    "gradient checkpointing, as TRL has it": {"gradient_checkpointing": True},
    # The learning rate leaves the policy where it is, so both steps have the same objective.
    "two optimizer steps share a rollout": {
        "steps_per_generation": 4,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "learning_rate": 1e-12,
    },
}


@pytest.fixture(autouse=True)
def constants_as_they_were():
    saved = {name: copy.copy(getattr(gtpo_training, name)) for name in gtpo_training.CONSTANTS}
    yield
    vars(gtpo_training).update(saved)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_gradients_agree_with_the_float64_objective(tmp_path, case):
    figures = gradients.compare(str(tmp_path), **case)
    assert figures["gradient_error"] < 1e-5
    if case.get("max_steps") != 2:  # the logged loss is that of one step
        assert figures["loss"] == pytest.approx(figures["loss_float64"], abs=1e-6)
    assert figures["initial_entropy"] == pytest.approx(figures["initial_entropy_float64"], rel=1e-5)
    assert figures["conflicts"] > 0 and len(figures["prompt_lengths"]) > 1
    assert {-1.0, 1.0} <= set(figures["signs"])
    assert figures["filtered"] > 0 or "threshold" not in case


@pytest.mark.slow
def test_without_lambda_gate_and_penalty_a_step_is_grpos(tmp_path):
    assert gradients.distance_from_grpo(str(tmp_path)) < 1e-6


@pytest.mark.slow
def test_with_lambda_a_step_is_not_grpos(tmp_path):
    grpo, _ = gradients.two_steps(str(tmp_path), GRPO)
    gtpo, _ = gradients.two_steps(str(tmp_path), GTPO)
    assert max((grpo[name] - gtpo[name]).abs().max().item() for name in grpo) > 1e-5


@pytest.mark.slow
def test_several_iterations_use_the_parents_ratio_and_clip_by_the_advantages_sign(tmp_path):
    options = {"num_iterations": 2, "max_steps": 4, "learning_rate": 5e-2, "epsilon": 0.05}
    grpo, logs = gradients.two_steps(str(tmp_path), GRPO, **options)
    gtpo, our_logs = gradients.two_steps(
        str(tmp_path), "benchmarks.ablations.WithoutTokenWeights", **options
    )
    assert max((grpo[name] - gtpo[name]).abs().max().item() for name in grpo) < 1e-6
    assert logs[1]["clip_ratio/region_mean"] > 0  # TRL does clip here
    assert our_logs[1]["clip_ratio/region_mean"] == pytest.approx(logs[1]["clip_ratio/region_mean"])


@pytest.mark.slow
def test_initial_entropy_does_not_depend_on_the_micro_batch_size_and_is_measured_once(tmp_path):
    entropies = []
    for size, accumulation in ((16, 1), (4, 4), (2, 8)):
        trainer = gradients.make_trainer(
            GTPO,
            str(tmp_path),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=accumulation,
            max_steps=2,
        )
        seen = gradients.record_steps(trainer)
        trainer.train()
        entropies.append(trainer.initial_entropy)
        assert [logs["gtpo/initial_entropy"] for logs in seen["logs"][:2]] == [
            trainer.initial_entropy
        ] * 2
    assert entropies == pytest.approx([entropies[0]] * 3, rel=1e-6)


@pytest.mark.slow
def test_the_pass_that_measures_the_initial_entropy_logs_nothing(tmp_path):
    trainer = gradients.make_trainer(GTPO, str(tmp_path), gradient_accumulation_steps=2)
    compute_loss, initial_entropies, logged = trainer.compute_loss, [], []

    def look_first(*args, **kwargs):
        initial_entropies.append(trainer.initial_entropy)
        logged.append([name for name, values in trainer._metrics["train"].items() if values])
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = look_first
    trainer.train()
    of_the_loss = ("entropy", "clip_ratio", "gtpo/completion")
    assert initial_entropies[0] > 0 and "reward" in logged[0]
    assert not [name for name in logged[0] if name.startswith(of_the_loss)]
    assert [name for name in logged[1] if name.startswith(of_the_loss)]


def scores_two_of_three(completions, **kwargs):
    """A reward that cannot score every third completion."""
    rewards = gradients.letters_reward(completions)
    return [None if i % 3 == 0 else reward for i, reward in enumerate(rewards)]


@pytest.mark.slow
def test_a_completion_that_one_reward_cannot_score_gets_no_advantage_and_no_penalty(tmp_path):
    rewards = [scores_two_of_three, gradients.letters_reward]  # the second scores everything
    trainer = gradients.make_trainer(GTPO, str(tmp_path), reward=rewards)
    seen, inputs_of_losses, factors = gradients.record_steps(trainer), [], []
    compute_loss, hook = trainer.compute_loss, trainer.get_high_entropy_mask

    def recorded_loss(model, inputs, *args, **kwargs):
        inputs_of_losses.append(inputs)
        return compute_loss(model, inputs, *args, **kwargs)

    def recorded_factor(*args):
        factors.append(hook(*args))
        return factors[-1]

    trainer.compute_loss, trainer.get_high_entropy_mask = recorded_loss, recorded_factor
    trainer.train()
    rollout = seen["rollouts"][0]
    unscored = torch.arange(16) % 3 == 0
    assert torch.equal(rollout["judged"], ~unscored)
    assert (rollout["advantages"][unscored] == 0).all()
    assert (rollout["advantages"][~unscored] != 0).any()
    # The calls before the last two belong to the pass that measures the initial entropy.
    for inputs, factor in zip(inputs_of_losses, factors[-2:], strict=True):
        scored = inputs["judged"]
        assert (factor[~scored] == 0).all() and (factor[scored] != 0).any()


def nearly_equal(completions, **kwargs):
    """Equal rewards whose group mean in float32 is not exactly equal to them."""
    return [0.1 + 0.2] * len(completions)


@pytest.mark.slow
def test_rounding_in_the_group_mean_does_not_count_as_a_sign(tmp_path):
    trainer = gradients.make_trainer(
        GTPO,
        str(tmp_path),
        reward=nearly_equal,
        num_generations=7,
        per_device_train_batch_size=14,
        gradient_accumulation_steps=1,
    )
    seen = gradients.record_steps(trainer)
    trainer.train()
    rollout = seen["rollouts"][0]
    assert (rollout["advantages"] == 0).all() and (rollout["token_weights"] == 1).all()
    assert seen["gradients"] and all(g.isfinite().all() for g in seen["gradients"][0].values())


@pytest.mark.slow
def test_a_group_without_signal_still_feels_the_entropy_penalty(tmp_path):
    gtpo_training.ENT_THRESHOLD = 100.0
    trainer = gradients.make_trainer(GTPO, str(tmp_path), reward=nearly_equal)
    seen = gradients.record_steps(trainer)
    trainer.train()
    assert any(g.abs().max() > 0 for g in seen["gradients"][0].values())
    gtpo_training.ENT_SCALE = 0.0
    trainer = gradients.make_trainer(GTPO, str(tmp_path), reward=nearly_equal)
    seen = gradients.record_steps(trainer)
    trainer.train()
    assert all((g == 0).all() for g in seen["gradients"][0].values())


@pytest.mark.slow
def test_trls_own_evaluation_shapes_its_groups_and_leaves_the_training_state_alone(tmp_path):
    trainer = gradients.make_trainer(
        GTPO, str(tmp_path), num_generations_eval=2, per_device_eval_batch_size=4
    )
    trainer.train()
    measured = trainer.initial_entropy
    metrics = trainer.evaluate(eval_dataset=trainer.train_dataset)
    assert metrics["eval_loss"] == metrics["eval_loss"]  # not NaN
    logged = trainer.state.log_history[-1]
    assert 0 <= logged["eval_gtpo/frac_conflict_groups"] <= 1
    assert logged["eval_gtpo/completion_entropy"] > 0
    assert trainer.initial_entropy == measured and not trainer.non_finite.finite_losses


# Row 0 has the mean sum of its group, and is better than the mean in the first function. In the
# second group the first function pays everyone the same, up to rounding.
TWO_REWARDS = (
    [3.0, 0.0, 0.0, 1.0] + [0.1 + 0.2] * 4,
    [0.0, 5.0, 1.0, 2.0] + [1.0, 0.0, 0.0, 0.0],
)


def two_rewards(**how) -> tuple[torch.Tensor, torch.Tensor]:
    """The table (8, 2) of TWO_REWARDS, and what its groups of four are compared by."""
    table = torch.tensor(TWO_REWARDS).T
    return table, compared_rewards(table, torch.ones(2), 4, how["aggregation"])


def test_groups_are_compared_by_sums_or_by_each_functions_normalized_rewards():
    table, sums = two_rewards(aggregation="sum_then_normalize")
    assert torch.equal(sums, table.sum(dim=1))
    _, normalized = two_rewards(aggregation="normalize_then_sum")
    literal = torch.zeros(8)
    for group in (slice(0, 4), slice(4, 8)):
        for rewards in table[group].T:
            literal[group] += (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    assert normalized.tolist() == pytest.approx(literal.tolist(), abs=1e-3)
    assert normalized[0] == pytest.approx(2 / 2**0.5 - 2 / (14 / 3) ** 0.5, abs=1e-3)
    unscored = table.clone()
    unscored[0] = torch.nan
    assert compared_rewards(unscored, torch.ones(2), 4, "normalize_then_sum")[0].isnan()


@pytest.mark.parametrize(
    "rewards, share",
    [
        ([1.0, 1.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0], 0.5),
        ([None] * 8, 1.0),
        ([None] * 4 + [0.0, 1.0, 2.0, None], 0.5),
        ([5.0, None, None, None] + [0.1 + 0.2] * 4, 1.0),
        ([1e-3, 0.0, 0.0, 0.0] * 2, 0.0),
    ],
)
def test_a_group_without_two_different_rewards_has_no_signal(rewards, share):
    values = torch.tensor([torch.nan if reward is None else reward for reward in rewards])
    assert frac_without_signal(values, 4) == share


@pytest.mark.slow
def test_rewards_that_are_normalized_before_they_are_summed_keep_their_advantages(tmp_path):
    def paying(number: int):
        def pay(completions, **kwargs):
            return [TWO_REWARDS[number][i % 8] for i in range(len(completions))]

        pay.__name__ = f"pay_{number}"
        return pay

    advantages = {}
    for name in (GTPO, GRPO):
        trainer = gradients.make_trainer(
            name,
            str(tmp_path / name),
            reward=[paying(0), paying(1)],
            multi_objective_aggregation="normalize_then_sum",
        )
        seen = gradients.record_steps(trainer)
        trainer.train()
        advantages[name] = seen["rollouts"][0]["advantages"]
    assert advantages[GTPO][0].abs() > 0.1
    assert advantages[GTPO].tolist() == pytest.approx(advantages[GRPO].tolist(), abs=1e-6)


# Options beside the paper's, and what the one line about each of them says.
DEPARTURES = [
    ({"loss_type": "cispo"}, "loss_type = cispo with epsilon_high = 0.2"),
    ({"loss_type": "cispo", "epsilon_high": 0.9}, "loss_type = cispo with epsilon_high = 0.9"),
    ({"loss_type": "cispo", "epsilon_high": 5.0}, "loss_type = cispo is not"),
    ({"importance_sampling_level": "sequence"}, "importance_sampling_level = sequence is not"),
    ({"off_policy_mask_threshold": 0.5}, "off_policy_mask_threshold = 0.5 is not"),
    ({"delta": 4.0}, "delta = 4.0 is not"),
    ({"mask_truncated_completions": True}, "mask_truncated_completions = True is not"),
    ({"multi_objective_aggregation": "normalize_then_sum"}, "= normalize_then_sum is not"),
    ({"scale_rewards": "group"}, "scale_rewards = group is not"),
]


@pytest.mark.parametrize("options, sentence", DEPARTURES)
def test_an_option_beside_the_papers_objective_gets_one_line(tmp_path, caplog, options, sentence):
    def lines() -> list[str]:
        return [text for text in caplog.messages if "is not the paper's objective" in text]

    gradients.make_trainer(GTPO, str(tmp_path))
    gradients.make_trainer(GRPO, str(tmp_path), **options)
    assert lines() == []
    gradients.make_trainer(GTPO, str(tmp_path), **options)
    (line,) = lines()
    assert sentence in line


def test_tool_output_inside_a_completion_neither_votes_nor_ends_a_run():
    class OneProcess:
        gather = staticmethod(lambda tensor: tensor)
        pad_across_processes = staticmethod(lambda tensor, dim: tensor)

    rollout = {
        "completion_ids": torch.tensor([[1, 9, 2, 3], [1, 2, 4, 0]]),
        "completion_mask": torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0]]),
        "tool_mask": torch.tensor([[1, 0, 1, 1], [1, 1, 1, 1]]),
        "advantages": torch.tensor([1.0, -1.0]),
    }
    groups = whole_groups(rollout, torch.tensor([1.0, -1.0]), 2, OneProcess())
    assert groups["prefix"].tolist() == [[True, False, True, False], [True, True, False, False]]
    without = {key: value for key, value in rollout.items() if key != "tool_mask"}
    assert whole_groups(without, torch.tensor([1.0, -1.0]), 2, OneProcess())["prefix"].sum() == 2


@pytest.mark.slow
def test_every_checkpoint_keeps_the_initial_entropy_and_a_resumed_run_does_not_measure_again(
    tmp_path,
):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = gradients.make_trainer(GTPO, str(tmp_path), **options)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-1" / gtpo_training.STATE_FILE).read_text())
    assert state == {"initial_entropy": trainer.initial_entropy}
    resumed = gradients.make_trainer(GTPO, str(tmp_path), **options)
    resumed._measure_initial_entropy = lambda rollout: pytest.fail("measured again")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.initial_entropy == trainer.initial_entropy


@pytest.mark.parametrize(
    "option, value",
    [
        ("top_entropy_quantile", 0.2),
        ("entropy_coef", 0.01),
        ("use_adaptive_entropy", True),
        ("use_liger_kernel", True),
    ],
)
def test_options_that_gtpo_would_corrupt_are_refused(option, value):
    arguments = trl.GRPOConfig(output_dir="x", use_cpu=True, bf16=False)
    setattr(arguments, option, value)
    with pytest.raises(ValueError, match=f"training.{option}: .*does not go with GTPO"):
        refuse_conflicting_options(arguments)


def test_the_callers_arguments_stay_as_they_were(tmp_path, monkeypatch):
    made, config = [], trl.GRPOConfig

    def noted(**options):
        made.append(config(**options))
        return made[-1]

    monkeypatch.setattr(trl, "GRPOConfig", noted)
    trainer = gradients.make_trainer(GTPO, str(tmp_path))
    assert trainer.args.top_entropy_quantile < 1 and made[0].top_entropy_quantile == 1.0


@pytest.mark.slow
def test_a_parent_that_never_asks_for_the_factor_is_an_error_and_not_silently_grpo(tmp_path):
    trainer = gradients.make_trainer(GTPO, str(tmp_path))
    trainer.top_entropy_quantile = 1.0  # TRL's loss does not ask for the factor then
    with pytest.raises(RuntimeError, match="did not call get_high_entropy_mask"):
        trainer.train()


def test_constants_are_cast_set_and_logged(caplog):
    values = {
        "ent_threshold": "0.5",
        "PAD_ID": 7.0,
        "w_raw": None,
        "torch_compile_options": {"max_autotune": True},
    }
    with caplog.at_level(logging.INFO):
        gtpo_training.override_constants(values)
    assert gtpo_training.ENT_THRESHOLD == 0.5 and gtpo_training.W_RAW == 2.0
    assert gtpo_training.PAD_ID == 7 and isinstance(gtpo_training.PAD_ID, int)
    assert gtpo_training.torch_compile_options["max_autotune"] is True
    assert gtpo_training.torch_compile_options["shape_padding"] is True
    assert "[GTPO] Set ENT_THRESHOLD = 0.5" in caplog.text
    assert "[GTPO] Set PAD_ID = 7" in caplog.text


@pytest.mark.parametrize(
    "values, message",
    [
        ({"ent_treshold": 1}, "there is no such constant"),
        ({"w_raw": "big"}, "is not a valid float"),
    ],
)
def test_a_constant_that_cannot_be_set_is_an_error_that_says_why(values, message):
    with pytest.raises(ValueError, match=message):
        gtpo_training.override_constants(values)


@pytest.mark.slow
def test_a_constant_that_is_changed_later_takes_effect(tmp_path):
    trainer = gradients.make_trainer(GTPO, str(tmp_path))
    seen = gradients.record_steps(trainer)
    gtpo_training.W_RAW = 5.0
    trainer.train()
    assert 5.0 in seen["rollouts"][0]["token_weights"].unique().tolist()


@pytest.mark.slow
def test_a_pad_id_that_is_not_the_tokenizers_is_reported_once_and_changes_nothing(tmp_path, caplog):
    gtpo_training.PAD_ID = 128004
    with caplog.at_level(logging.WARNING):
        trainer = gradients.make_trainer(GTPO, str(tmp_path))
        seen = gradients.record_steps(trainer)
        trainer.train()
    assert caplog.text.count("PAD_ID = 128004 differs") == 1
    caplog.clear()
    gtpo_training.PAD_ID = trainer.processing_class.pad_token_id
    with caplog.at_level(logging.WARNING):
        again = gradients.make_trainer(GTPO, str(tmp_path))
        seen_again = gradients.record_steps(again)
        again.train()
    assert "PAD_ID" not in caplog.text
    first, second = seen["gradients"][0], seen_again["gradients"][0]
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_the_loss_factor_compiles_with_the_runtime_options():
    compiled = torch.compile(
        gtpo_training.loss_factor, dynamic=True, options=gtpo_training.torch_compile_options
    )
    inputs = {
        "entropies": torch.rand(4, 9),
        "mask": (torch.rand(4, 9) > 0.2).int(),
        "advantages": torch.tensor([1.0, -1.0, 0.0, 2.0]),
        "scored": torch.tensor([True, True, True, False]),
        "token_weights": torch.rand(4, 6),
        "keep": lambda entropy: entropy <= 0.6,
        "scale": 0.1,
    }
    pairs = zip(compiled(**inputs), gtpo_training.loss_factor(**inputs), strict=True)
    assert all(torch.allclose(computed, expected) for computed, expected in pairs)


@pytest.mark.slow
def test_three_steps_change_the_lora_weights_and_nothing_else(tmp_path):
    trainer = gradients.make_trainer(GTPO, str(tmp_path), max_steps=3, optim="adamw_torch")
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {
        name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed == {name for name in before if "lora_" in name}


def test_the_package_offers_the_trainer_and_a_config_with_the_papers_objective(tmp_path):
    assert gtpo.GTPOTrainer is gtpo_training.UnslothGTPOTrainer
    config = gtpo.GTPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, temperature=0.9)
    assert isinstance(config, trl.GRPOConfig) and config.temperature == 0.9
    assert (config.loss_type, config.scale_rewards, config.beta) == ("grpo", "none", 0.0)
    assert gtpo.GTPOConfig(output_dir="x", use_cpu=True, bf16=False, beta=0.04).beta == 0.04
    with pytest.raises(AttributeError, match="no attribute 'GTPOTrainr'"):
        _ = gtpo.GTPOTrainr


@pytest.mark.slow
def test_importing_the_package_imports_nothing_heavy():
    heavy = "{'torch', 'transformers', 'trl', 'unsloth', 'peft', 'datasets'}"
    script = f"import sys, gtpo; sys.exit(repr({heavy} & set(sys.modules)) != 'set()')"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0
