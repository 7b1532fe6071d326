"""What GTPO relies on in other libraries: one test per row of gtpo/hooks/seams.py.

Each test calls or reads the installed library. It fails on the day that a member is gone or behaves
differently. The tests at the end hold the table itself against the code.
"""

import ast
import contextlib
import importlib.metadata
import importlib.util
import inspect
import json
import re
from pathlib import Path

import gradients
import pytest
import tiny
import torch
import transformers
import trl
from accelerate.state import AcceleratorState
from conftest import ROOT
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState, PrinterCallback, ProgressCallback

from gtpo.hooks.seams import SEAMS, TRACKER_EVENTS, Seam
from gtpo.hooks.streaming_head import UNSLOTH_HEAD

pytestmark = pytest.mark.slow

GRPO = "custom_trainer.original.UnslothGRPOTrainer"
TESTED: set[str] = set()  # the members that have a test


def contract(*members: str):
    """Notes that the decorated test is the contract of these members."""
    TESTED.update(members)
    return lambda test: test


def make(folder, **options):
    return gradients.make_trainer(GRPO, str(folder), **options)


@pytest.fixture
def trainer(tmp_path):
    """A GRPO trainer that has not trained."""
    return make(tmp_path)


# ---- one run of TRL's own trainer, with what was seen on the way


class Notes(TrainerCallback, ExportableState):
    """Notes what callbacks see."""

    def __init__(self):
        self.trainer = None
        self.at_begin: dict = {}
        self.grad_norms: list[float] = []
        self.moved_before_step: list[bool] = []
        self.moved_by_step: list[bool] = []
        self.logged: list[tuple[dict, dict]] = []
        self.same_dict: list[bool] = []

    def state(self) -> dict:
        return {"args": {}, "attributes": {"steps": len(self.grad_norms)}}

    def weights(self) -> torch.Tensor:
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        return torch.cat([p.detach().flatten() for p in trained])

    def on_train_begin(self, args, state, control, **kwargs):
        names = ("_tr_loss", "_total_loss_scalar", "_globalstep_last_logged")
        names += ("_step", "_buffered_inputs")
        self.at_begin = {name: getattr(self.trainer, name) for name in names}
        self.last_weights = self.weights()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        gradients_ = [p.grad for p in self.trainer.model.parameters() if p.grad is not None]
        self.grad_norms.append(torch.nn.utils.get_total_norm(gradients_).item())
        self.moved_before_step.append(not torch.equal(self.weights(), self.last_weights))

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.moved_by_step.append(not torch.equal(self.weights(), self.last_weights))
        self.last_weights = self.weights()

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.same_dict.append(logs is state.log_history[-1])
        self.logged.append((dict(logs), dict(state.log_history[-1])))


class Run:
    """Two optimizer steps of four micro-batches each, on one rollout per step."""

    def __init__(self, folder: Path, checkpoint: Path | None = None, **options):
        self.folder = folder
        self.trainer = make(
            folder,
            **{
                "reward": [gradients.letters_reward, self.second_reward],
                "per_device_train_batch_size": 4,
                "gradient_accumulation_steps": 4,
                "max_steps": 2,
                "learning_rate": 1.0,
                "max_grad_norm": 1e-3,
                "save_strategy": "steps",
                "save_steps": 1,
                **options,
            },
        )
        self.notes = Notes()
        self.notes.trainer = self.trainer
        self.trainer.add_callback(self.notes)
        self.calls: dict[str, list] = {}
        self.generates_inside: list[bool] = []
        for name in (
            "_generate_and_score_completions",
            "_generate_single_turn",
            "_calculate_rewards",
            "_get_per_token_logps_and_entropies",
            "compute_loss",
            "_run_epoch",
            "_load_optimizer_and_scheduler",
            "create_model_card",
        ):
            self._record(name)
        generate = self.trainer.model.generate

        def generate_noted(*args, **kwargs):
            self.generates_inside.append("_generate_single_turn" in self.inside)
            return generate(*args, **kwargs)

        self.inside: list[str] = []
        self.trainer.model.generate = generate_noted
        self.trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))

    def second_reward(self, completions, log_metric, log_extra, **kwargs):
        """Scores nothing in the first group, and logs a metric."""
        log_metric("even", 1.0)
        log_metric("even", 3.0)
        log_extra("length", [len(text) for text in completions])
        return [None if i < 4 else 0.0 for i in range(len(completions))]

    def _record(self, name: str) -> None:
        """Notes each call of a method: arguments, result, and some attributes of the trainer."""
        original, calls = getattr(self.trainer, name), self.calls.setdefault(name, [])

        def noted(*args, **kwargs):
            attributes = {
                "step": self.trainer._step,
                "step_time": self.trainer._current_train_step_time,
                "buffered": self.trainer._buffered_inputs,
                "pending": dict(self.trainer._pending_metrics),
            }
            self.inside.append(name)
            try:
                result = original(*args, **kwargs)
            finally:
                self.inside.remove(name)
            if name == "_generate_and_score_completions":
                result["tag"] = result["completion_ids"].double() * 3
            attributes["pending_after"] = dict(self.trainer._pending_metrics)
            calls.append((args, kwargs, result, attributes))
            return result

        setattr(self.trainer, name, noted)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    return Run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def resumed(run, tmp_path_factory) -> Run:
    """A run that resumes from the first checkpoint of `run`."""
    folder = tmp_path_factory.mktemp("resumed")
    return Run(folder, checkpoint=run.folder / "checkpoint-1", learning_rate=0.5)


# ---- TRL: the path from prompts to the loss


@contract("trl.GRPOTrainer._generate_and_score_completions")
def test_a_rollout_has_rows_of_whole_groups_and_the_keys_that_gtpo_reads(run):
    args, _, rollout, _ = run.calls["_generate_and_score_completions"][0]
    (inputs,) = args
    assert len(inputs) == 16
    assert [row["prompt"] for row in inputs[::4]] == [row["prompt"] for row in inputs[3::4]]
    assert rollout["completion_ids"].shape == rollout["completion_mask"].shape
    assert rollout["advantages"].shape == (16,)


@contract("trl.GRPOTrainer._generate_and_score_completions")
def test_an_extra_key_of_the_rollout_survives_shuffle_and_split(run):
    batches = [args[1] for args, *_ in run.calls["compute_loss"]]
    assert len(batches) == 8 and all(len(batch["tag"]) == 4 for batch in batches)
    for batch in batches:
        assert torch.equal(batch["tag"], batch["completion_ids"].double() * 3)


@contract("trl.GRPOTrainer._generate_single_turn")
def test_trl_calls_generate_in_one_place(run):
    assert run.generates_inside == [True, True]
    assert inspect.getsource(trl.GRPOTrainer).count("unwrapped_model.generate(") == (
        inspect.getsource(trl.GRPOTrainer._generate_single_turn).count("unwrapped_model.generate(")
    )


@contract("trl.GRPOTrainer._generate")
def test_generate_returns_eight_values_and_appends_the_figures_of_truncated_completions(trainer):
    eos, pad = trainer.processing_class.eos_token_id, trainer.processing_class.pad_token_id
    rows = [[5, 6, eos], [5, pad], [5, 6]]
    trainer._generate_single_turn = lambda *args, **kwargs: (rows, None)
    prompts, ids, tool_mask, completions, log_probs, extra, images, tool_images = trainer._generate(
        ["a", "b", "c"]
    )
    assert ids == rows and tool_mask is None and len(prompts) == len(completions) == 3
    metrics = trainer._metrics["train"]
    assert metrics["completions/clipped_ratio"] == [pytest.approx(1 / 3)]  # padding is no end
    for name, length in (("mean", 2.5), ("min", 2), ("max", 3)):
        assert metrics[f"completions/{name}_terminated_length"] == [length]


@contract("trl.GRPOTrainer.mask_truncated_completions")
def test_a_mask_of_tools_takes_completions_out_of_the_loss_as_trls_own_mask_does(tmp_path):
    """The hook gives a mask of tools where TRL would mask a completion that has ended."""

    def losses(cut: bool):
        trainer = make(tmp_path)
        trainer.mask_truncated_completions = cut
        end = trainer.processing_class.eos_token_id
        if not cut:
            generate = trainer._generate

            def masked(prompts):
                prompt_ids, ids, _, *rest = generate(prompts)
                return prompt_ids, ids, [[int(row[-1] == end)] * len(row) for row in ids], *rest

            trainer._generate = masked
        seen = gradients.record_steps(trainer)
        trainer.train()
        assert 0 < seen["logs"][0]["completions/clipped_ratio"] < 1
        return seen["logs"][0]["loss"], seen["gradients"][0]

    (loss, by_trl), (other, by_tools) = losses(True), losses(False)
    assert loss == other and any(gradient.any() for gradient in by_trl.values())
    assert all(torch.equal(by_trl[name], by_tools[name]) for name in by_trl)


@contract("trl.GRPOTrainer.generation_config", "trl.GRPOTrainer.generation_kwargs")
def test_trl_generates_with_a_configuration_that_is_made_once(trainer):
    end = trainer.processing_class.eos_token_id
    assert (
        trainer.generation_config.eos_token_id == end == trainer.generation_kwargs["eos_token_id"]
    )
    source = inspect.getsource(trl.GRPOTrainer._generate_single_turn)
    assert "generation_config=self.generation_config" in source
    assert "generation_kwargs=self.generation_kwargs" in source


@contract("trl.generation.vllm_generation.VLLMGeneration.generation_kwargs")
def test_trl_makes_sampling_params_of_the_generation_kwargs_at_each_call():
    from trl.generation.vllm_generation import VLLMGeneration

    source = inspect.getsource(VLLMGeneration)
    assert "generation_kwargs.update(self.generation_kwargs)" in source
    assert "SamplingParams(**generation_kwargs)" in source
    assert '"generation_kwargs": self.generation_kwargs' in source  # to a server


@contract("trl.GRPOTrainer._calculate_rewards")
def test_the_reward_table_has_a_column_per_function_and_nan_for_none(run):
    args, kwargs, table, _ = run.calls["_calculate_rewards"][0]
    inputs, prompts, completions, completion_ids_list = args
    assert not kwargs and len(inputs) == len(prompts) == len(completions) == 16
    assert [len(ids) > 0 for ids in completion_ids_list] == [True] * 16
    assert table.shape == (16, 2) and table[:4, 1].isnan().all() and table[4:].isfinite().all()


@contract("trl.GRPOTrainer._calculate_rewards")
def test_a_completion_that_no_function_scores_gets_no_advantage_and_leaves_the_groups_mean(
    tmp_path,
):
    rewards = [None, 1.0, 3.0, 5.0] * 4
    trainer = make(tmp_path, reward=lambda completions, **kwargs: rewards)
    seen = gradients.record_steps(trainer)
    trainer.train()
    assert seen["rollouts"][0]["advantages"][:4].tolist() == [0.0, -2.0, 0.0, 2.0]


@contract("trl.GRPOTrainer._get_per_token_logps_and_entropies")
def test_the_log_prob_pass_in_the_loss_returns_entropies_of_the_completions_columns(run):
    args, kwargs, result, _ = run.calls["_get_per_token_logps_and_entropies"][-1]
    logps, entropies, *_ = result
    # The streaming head passes these four on by position.
    assert list(inspect.signature(trl.GRPOTrainer._get_per_token_logps_and_entropies).parameters)[
        1:5
    ] == ["model", "input_ids", "attention_mask", "logits_to_keep"]
    assert logps.shape == entropies.shape and not entropies.requires_grad and logps.requires_grad
    assert trl.GRPOTrainer._get_per_token_logps_and_entropies.__module__ == (
        "trl.trainer.grpo_trainer"
    )


@contract("trl.GRPOTrainer.compute_loss")
def test_compute_loss_runs_once_per_micro_batch_and_is_linear_in_the_advantages(run, trainer):
    assert len(run.calls["compute_loss"]) == 8
    losses = []
    parent = trainer.compute_loss

    def scaled(model, inputs, *args, **kwargs):
        for factor in (1.0, -2.0):
            changed = {**inputs, "advantages": factor * inputs["advantages"]}
            losses.append(parent(model, changed, *args, **kwargs).item())
        return parent(model, inputs, *args, **kwargs)

    trainer.compute_loss = scaled
    trainer.train()
    assert losses[0] != 0 and losses[1] == pytest.approx(-2 * losses[0])


def trainer_with_mask(folder, mask, **options):
    trainer = make(folder, **{"top_entropy_quantile": 0.5, **options})
    trainer.get_high_entropy_mask = mask
    return trainer


@contract("trl.GRPOTrainer.get_high_entropy_mask")
def test_the_entropy_mask_is_asked_with_detached_tensors_inside_the_loss(tmp_path):
    calls = []

    def mask(entropies, completion_mask, threshold):
        calls.append((entropies.shape, completion_mask.shape, entropies.requires_grad))
        return torch.ones_like(entropies)

    trainer_with_mask(tmp_path, mask).train()
    assert calls == [((8, 7), (8, 7), False)] * 2  # one call per micro-batch


@contract("trl.GRPOTrainer.get_high_entropy_mask")
@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_the_result_of_the_entropy_mask_multiplies_the_policy_term(tmp_path, factor):
    gradients_by_value = {}
    for value in (1.0, factor):
        trainer = trainer_with_mask(
            tmp_path, lambda entropies, mask, threshold, v=value: torch.full_like(entropies, v)
        )
        seen = gradients.record_steps(trainer)
        trainer.train()
        gradients_by_value[value] = seen["gradients"][0]
    for name, gradient in gradients_by_value[1.0].items():
        assert torch.allclose(gradients_by_value[factor][name], factor * gradient, atol=1e-7)


@contract("trl.GRPOTrainer.top_entropy_quantile")
def test_the_loss_asks_for_the_mask_only_where_the_trainers_quantile_is_below_one(tmp_path):
    def never(*args):
        raise AssertionError("called")

    trainer = trainer_with_mask(tmp_path, never, top_entropy_quantile=1.0)
    assert trainer.top_entropy_quantile == trainer.args.top_entropy_quantile == 1.0
    trainer.train()
    trainer = trainer_with_mask(tmp_path, never, top_entropy_quantile=1.0)
    trainer.top_entropy_quantile = 0.5
    with pytest.raises(AssertionError, match="called"):
        trainer.train()


@contract("trl.GRPOTrainer._metrics", "trl.GRPOTrainer.log")
def test_trl_logs_the_mean_of_each_metric_and_forgets_it(trainer):
    trainer.model.train()
    trainer._metrics["train"]["ours"] = [1.0, 4.0]
    trainer._metrics["train"]["single"] = [0.1]
    trainer.log({"loss": 0.0})
    line = trainer.state.log_history[-1]
    assert line["ours"] == 2.5 and line["single"] == 0.1 and not trainer._metrics["train"]
    trainer.model.eval()
    trainer._metrics["eval"]["ours"] = [3.0]
    trainer.log({"eval_loss": 0.0})
    assert trainer.state.log_history[-1]["eval_ours"] == 3.0


@contract("trl.GRPOTrainer._pending_metrics", "trl.GRPOTrainer._log_metric")
def test_a_reward_functions_metrics_are_pending_until_the_rollout_is_scored(run, trainer):
    assert run.calls["_calculate_rewards"][0][3]["pending_after"] == {"even": [1.0, 3.0]}
    assert not run.calls["compute_loss"][0][3]["pending"]
    assert run.notes.logged[0][0]["even"] == 2.0  # the mean
    trainer._log_metric("late", 5.0)
    assert trainer._pending_metrics == {"late": [5.0]}


@contract("trl.GRPOTrainer.reward_weights", "trl.GRPOTrainer.reward_func_names")
def test_reward_functions_have_a_weight_and_a_name_each(run):
    assert run.trainer.reward_weights.tolist() == [1.0, 1.0]
    assert run.trainer.reward_func_names == ["letters_reward", "second_reward"]


@contract("trl.GRPOTrainer.multi_objective_aggregation")
def test_the_trainer_says_how_it_combines_the_rewards_of_several_functions(tmp_path, trainer):
    assert trainer.multi_objective_aggregation == "sum_then_normalize"
    other = make(tmp_path, multi_objective_aggregation="normalize_then_sum")
    assert other.multi_objective_aggregation == "normalize_then_sum"


@contract(
    "trl.GRPOTrainer.num_generations",
    "trl.GRPOTrainer.num_generations_eval",
    "trl.GRPOTrainer.num_iterations",
    "trl.GRPOTrainer.temperature",
)
def test_sizes_and_temperature_are_attributes_of_the_trainer(tmp_path):
    trainer = make(tmp_path, num_generations_eval=2, num_iterations=3)
    assert (trainer.num_generations, trainer.num_generations_eval) == (4, 2)
    assert trainer.num_iterations == 3
    assert trainer.temperature == trainer.args.temperature == 0.9


@contract("trl.GRPOTrainer._entropy_bonus_enabled")
def test_an_entropy_bonus_shows_in_an_attribute(tmp_path, trainer):
    assert trainer._entropy_bonus_enabled is False
    assert make(tmp_path, entropy_coef=0.01)._entropy_bonus_enabled is True


@contract(
    "trl.GRPOTrainer.use_vllm",
    "trl.GRPOTrainer.is_fsdp_enabled",
    "trl.GRPOTrainer.is_deepspeed_enabled",
)
def test_the_trainer_says_what_generates_and_whether_weights_are_spread(trainer):
    assert not (trainer.use_vllm or trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled)


@contract(
    "trl.trainer.grpo_trainer.selective_log_softmax",
    "trl.trainer.grpo_trainer.entropy_from_logits",
    "torch.nn.Linear.forward",
)
def test_trl_applies_two_functions_to_the_heads_output_divided_by_the_temperature(
    trainer, monkeypatch
):
    calls = []

    def note(name):
        original = getattr(trl.trainer.grpo_trainer, name)

        def noted(logits, *ids):
            calls.append((name, logits))
            return original(logits, *ids)

        monkeypatch.setattr(trl.trainer.grpo_trainer, name, noted)

    note("selective_log_softmax")
    note("entropy_from_logits")
    head, outputs = trainer.model.get_output_embeddings(), []
    assert type(head) is torch.nn.Linear
    forward = head.forward
    # A call of the module takes a `forward` of the object itself.
    head.forward = lambda hidden: outputs.append(forward(hidden)) or outputs[-1]
    ids = torch.arange(8).view(2, 4)
    trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, torch.ones_like(ids), 2, compute_entropy=True
    )
    assert [name for name, _ in calls] == ["selective_log_softmax", "entropy_from_logits"]
    assert calls[0][1] is calls[1][1]
    assert torch.equal(calls[0][1], outputs[0][:, :-1][:, -2:] / 0.9)


@contract("trl.trainer.utils.split_tensor_dict")
def test_split_tensor_dict_cuts_a_rollout_into_equal_parts():
    from trl.trainer.utils import split_tensor_dict

    parts = split_tensor_dict({"a": torch.arange(6), "none": None}, 3)
    assert [part["a"].tolist() for part in parts] == [[0, 1], [2, 3], [4, 5]]


@contract("trl.trainer.utils.get_callable_name")
def test_get_callable_name_names_functions_and_the_trainer_uses_it(run):
    from trl.trainer.utils import get_callable_name

    assert get_callable_name(gradients.letters_reward) == "letters_reward"
    assert "rewards/letters_reward/mean" in run.notes.logged[0][0]


# ---- TRL: what a checkpoint leaves out


@contract("trl.GRPOTrainer._step")
def test_step_counts_micro_batches_and_is_not_restored(run, resumed):
    assert [noted["step"] for *_, noted in run.calls["compute_loss"]] == list(range(8))
    assert resumed.notes.at_begin["_step"] == 0


@contract("trl.GRPOTrainer._buffered_inputs")
def test_the_rollout_is_buffered_as_micro_batches_and_is_not_restored(run, resumed):
    assert run.notes.at_begin["_buffered_inputs"] is None
    for args, _, _, noted in run.calls["compute_loss"]:
        assert len(noted["buffered"]) == run.trainer.args.steps_per_generation == 4
        assert args[1] is noted["buffered"][noted["step"] % 4]
    assert resumed.notes.at_begin["_buffered_inputs"] is None


@contract("trl.GRPOTrainer._current_train_step_time")
def test_the_seconds_of_a_step_are_summed_over_its_micro_batches(run):
    times = [noted["step_time"] for *_, noted in run.calls["compute_loss"]]
    assert times[0] == times[4] == 0.0 and 0 < times[1] < times[2] < times[3]


@contract("trl.GRPOTrainer._logs")
def test_the_table_of_completions_is_kept_in_deques(run):
    logs = run.trainer._logs
    for values in (logs["prompt"], logs["completion"], logs["advantages"], logs["extra"]["length"]):
        assert len(values) == values.maxlen == 16
    assert set(logs["rewards"]) == {"letters_reward", "second_reward"}


@contract("trl.GRPOTrainer.log_completions", "trl.GRPOTrainer.log")
def test_the_table_is_printed_with_its_control_characters_where_it_is_switched_on(tmp_path, capsys):
    trainer = make(tmp_path, log_completions=True)
    assert trainer.log_completions is True
    trainer._logs["prompt"].append("a prompt")
    trainer._logs["completion"].append("\x1b[31mred")
    trainer._logs["advantages"].append(0.0)
    trainer.log({})
    assert "\x1b[31mred" in capsys.readouterr().out
    trainer.log_completions = False
    trainer.log({})
    assert "red" not in capsys.readouterr().out


@contract("trl.GRPOTrainer._get_train_sampler")
def test_the_sampler_draws_each_epoch_from_its_own_generator(trainer):
    sampler = trainer._get_train_sampler()
    before = sampler.generator.get_state()
    first, second = list(sampler), list(sampler)
    assert first != second
    sampler.generator.set_state(before)
    assert list(sampler) == first


@contract("trl.GRPOTrainer.create_model_card", "trl.GRPOTrainer._save_checkpoint")
def test_a_checkpoint_is_saved_with_a_card_that_the_trainer_writes(run):
    assert len(run.calls["create_model_card"]) == 2
    for step in (1, 2):
        assert (run.folder / f"checkpoint-{step}/trainer_state.json").is_file()
    assert "model_name" in run.calls["create_model_card"][0][1]


@contract("trl.GRPOTrainer._load_optimizer_and_scheduler")
def test_resuming_loads_the_optimizer_over_that_of_the_arguments(run, resumed):
    ((args, *_),) = resumed.calls["_load_optimizer_and_scheduler"]
    assert args == (str(run.folder / "checkpoint-1"),)
    assert resumed.trainer.args.learning_rate == 0.5
    assert resumed.trainer.optimizer.param_groups[0]["initial_lr"] == 1.0


@contract("trl.trainer.grpo_config")
def test_trls_own_config_is_found_by_its_module():
    assert trl.GRPOConfig.__module__ == "trl.trainer.grpo_config"


@contract("trl.GRPOTrainer")
def test_trl_casts_the_adapter_of_a_quantized_model_to_bfloat16():
    source = inspect.getsource(trl.GRPOTrainer.__init__)
    assert "param.data = param.data.to(torch.bfloat16)" in source
    assert "_is_quantized_model" in source


# ---- transformers


@contract("transformers.Trainer._run_epoch")
def test_a_run_resumed_at_its_last_step_takes_one_step_too_many(run, tmp_path):
    again = Run(tmp_path, checkpoint=run.folder / "checkpoint-1", max_steps=1)
    assert len(again.calls["_run_epoch"]) == 1 and again.trainer.state.global_step == 2


@contract("transformers.Trainer._get_output_dir")
def test_a_checkpoint_is_written_where_get_output_dir_says(run, tmp_path):
    trainer = run.trainer
    assert trainer._get_output_dir(trial=None) == str(run.folder)
    trainer._get_output_dir = lambda trial=None: str(tmp_path)
    try:
        trainer._save_checkpoint(trainer.model, None)
    finally:
        del trainer._get_output_dir
    assert (tmp_path / "checkpoint-2/trainer_state.json").is_file()


@contract(
    "transformers.Trainer._tr_loss",
    "transformers.Trainer._total_loss_scalar",
    "transformers.Trainer._globalstep_last_logged",
)
def test_the_sums_of_losses_are_set_before_training_begins_and_make_the_logged_loss(run, resumed):
    assert run.notes.at_begin["_tr_loss"].item() == run.notes.at_begin["_total_loss_scalar"] == 0.0
    assert run.notes.at_begin["_globalstep_last_logged"] == 0
    assert resumed.notes.at_begin["_globalstep_last_logged"] == 1
    assert resumed.notes.at_begin["_total_loss_scalar"] == 0.0  # so the mean of the run would lack
    trainer = run.trainer
    trainer.control.should_log = True
    trainer._globalstep_last_logged = 0
    trainer._maybe_log_save_evaluate(torch.tensor(6.0), None, trainer.model, None, 1, None, 0.0)
    assert trainer.state.log_history[-1]["loss"] == 6.0 / trainer.state.global_step
    assert trainer._globalstep_last_logged == trainer.state.global_step


@contract("transformers.Trainer.compute_loss_context_manager")
def test_the_context_of_the_loss_can_be_entered(trainer):
    with trainer.compute_loss_context_manager():
        pass
    source = inspect.getsource(transformers.Trainer.training_step)
    assert "with self.compute_loss_context_manager():" in source


@contract("transformers.Trainer.callback_handler")
def test_callbacks_see_an_event_in_the_order_of_their_list(trainer):
    order = []

    def callback(name):
        class Named(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                order.append(name)

        return Named()

    trainer.add_callback(callback("second"))
    trainer.callback_handler.callbacks.insert(0, callback("first"))
    trainer.callback_handler.on_step_end(trainer.args, trainer.state, trainer.control)
    assert order == ["first", "second"]


@contract("transformers.Trainer.log")
def test_transformers_log_leaves_trls_metrics_alone(trainer):
    trainer._metrics["train"]["ours"] = [1.0]
    transformers.Trainer.log(trainer, {"other": 2.0})
    assert trainer._metrics["train"]["ours"] == [1.0]
    assert trainer.state.log_history[-1]["other"] == 2.0


@contract(
    "transformers.trainer_callback.ExportableState", "transformers.TrainerState.stateful_callbacks"
)
def test_the_state_of_a_callback_is_saved_under_its_class_name_and_not_restored(run, resumed):
    saved = json.loads((run.folder / "checkpoint-1/trainer_state.json").read_text())
    assert saved["stateful_callbacks"]["Notes"]["attributes"] == {"steps": 1}
    assert "Notes" in resumed.trainer.state.stateful_callbacks
    assert not hasattr(resumed.notes, "steps")


@contract("transformers.TrainerState.compute_steps")
def test_compute_steps_takes_the_intervals_of_the_arguments(trainer):
    state = transformers.TrainerState(logging_steps=99, save_steps=98)
    trainer.args.save_steps = 7
    state.compute_steps(trainer.args, 10)
    assert (state.logging_steps, state.save_steps) == (1, 7)


@contract("transformers.TrainerState.log_history")
def test_callbacks_see_a_log_line_that_is_in_the_history_as_another_dict(run):
    assert run.notes.same_dict and not any(run.notes.same_dict)
    for logs, line in run.notes.logged:
        assert line.items() >= logs.items()


@contract("transformers.TrainerCallback.on_pre_optimizer_step")
def test_the_event_before_a_step_comes_after_clipping_and_before_the_weights_move(run):
    assert run.notes.grad_norms == pytest.approx([1e-3] * 2, rel=1e-2)
    assert run.notes.moved_before_step == [False] * 2 and run.notes.moved_by_step == [True] * 2


@contract("transformers.trainer_callback.PrinterCallback")
def test_printing_is_a_callback_that_can_be_removed(trainer):
    assert any(type(c) is PrinterCallback for c in trainer.callback_handler.callbacks)
    trainer.remove_callback(PrinterCallback)
    assert not any(type(c) is PrinterCallback for c in trainer.callback_handler.callbacks)


@contract("transformers.trainer_callback.ProgressCallback.training_bar")
def test_the_progress_bar_is_an_attribute_that_writes_lines_above_itself(trainer):
    progress = ProgressCallback()
    trainer.state.max_steps = 2
    trainer.state.is_world_process_zero = True
    assert progress.training_bar is None
    progress.on_train_begin(trainer.args, trainer.state, trainer.control)
    progress.training_bar.write("a line")
    progress.training_bar.close()


@contract(
    "transformers.integrations", *(f"transformers.TrainerCallback.{e}" for e in TRACKER_EVENTS)
)
def test_trackers_are_recognised_by_module_and_their_events_can_be_replaced_on_the_object(trainer):
    from transformers.integrations import TensorBoardCallback, WandbCallback

    for tracker in (TensorBoardCallback, WandbCallback):
        assert tracker.__module__.startswith("transformers.integrations")
    callback, called = TrainerCallback(), []
    for event in TRACKER_EVENTS:
        assert callable(getattr(callback, event))
        setattr(callback, event, lambda *args, event=event, **kwargs: called.append(event))
    trainer.callback_handler.callbacks = [callback]
    for event in TRACKER_EVENTS:
        trainer.callback_handler.call_event(event, trainer.args, trainer.state, trainer.control)
    assert called == list(TRACKER_EVENTS)


@contract("transformers.TrainingArguments._setup_devices")
def test_the_device_of_the_arguments_is_cached_on_them_and_can_be_replaced(trainer):
    assert trainer.args.device.type == "cpu"
    vars(trainer.args)["_setup_devices"] = torch.device("meta")
    assert trainer.args.device == torch.device("meta")


@contract("transformers.TrainingArguments._n_gpu")
def test_the_number_of_gpus_can_be_set(trainer):
    trainer.args._n_gpu = 5
    assert trainer.args.n_gpu == 5


@contract("transformers.training_args")
def test_every_option_of_the_installed_config_is_read_from_the_sources():
    import dataclasses

    from gtpo.system.trl_options import grpo_options

    installed = {f.name: f for f in dataclasses.fields(trl.GRPOConfig) if f.init}
    assert installed.keys() <= grpo_options().keys()
    for name, default in (
        ("temperature", "1.0"),
        ("num_generations", "8"),
        ("beta", "0.0"),
        ("epsilon", "0.2"),
    ):
        assert grpo_options()[name].default == default == str(installed[name].default)


@contract("transformers.TrainingArguments.ddp_timeout")
def test_on_a_cpu_transformers_does_not_pass_the_timeout_on(trainer):
    source = inspect.getsource(transformers.TrainingArguments._setup_devices.func)
    cpu_branch = source.split("if self.use_cpu", 1)[1].split("elif", 1)[0]
    assert "accelerator_state_kwargs" in cpu_branch and "timeout" not in cpu_branch
    assert trainer.args.ddp_timeout == 1800


@contract("transformers.PreTrainedTokenizerBase.init_kwargs")
def test_a_tokenizer_saves_and_loads_what_stands_in_its_init_kwargs(tmp_path):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.init_kwargs["turn_ends"] = [3, 4]
    tokenizer.save_pretrained(tmp_path)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.init_kwargs["turn_ends"] == [3, 4]


@contract("transformers.Trainer.processing_class")
def test_a_trainers_processing_class_is_a_plain_attribute(trainer):
    assert "processing_class" in vars(trainer)


@contract("transformers.GenerationConfig.save_pretrained")
def test_sampling_settings_without_sampling_cannot_be_saved(tmp_path):
    config = transformers.GenerationConfig(do_sample=False, temperature=0.5)
    with pytest.raises(ValueError):
        config.save_pretrained(tmp_path)
    config.update(temperature=None)
    config.save_pretrained(tmp_path)


@contract("transformers.dynamic_module_utils.resolve_trust_remote_code")
def test_a_model_with_code_of_its_own_is_refused_in_known_words():
    from transformers.dynamic_module_utils import resolve_trust_remote_code

    with pytest.raises(ValueError, match="custom code which must be executed"):
        resolve_trust_remote_code(False, "owner/model", has_local_code=False, has_remote_code=True)


# ---- accelerate


@contract("accelerate.Accelerator.scaler")
def test_the_scaler_is_there_for_fp16_alone(trainer):
    assert trainer.accelerator.scaler is None


@contract("torch.amp.GradScaler")
def test_the_scaler_skips_a_step_with_an_infinite_gradient():
    weight = torch.ones(2, requires_grad=True)
    scaler, optimizer = torch.amp.GradScaler("cpu"), torch.optim.SGD([weight], lr=1.0)
    scaler.scale(weight.sum()).backward()
    weight.grad.fill_(torch.inf)
    scaler.step(optimizer)
    assert weight.tolist() == [1.0, 1.0]


@contract("accelerate.Accelerator.prepare_model._original_forward")
def test_a_model_under_autocast_keeps_its_original_forward_and_any_other_has_none(monkeypatch):
    from accelerate import Accelerator

    # A process has one precision, and earlier trainers had another.
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    model = tiny.with_lora(tiny.tiny_model(tiny.tiny_tokenizer()))
    prepared = Accelerator(mixed_precision="bf16", cpu=True).prepare_model(model)
    assert hasattr(prepared, "_original_forward")
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})
    model = tiny.with_lora(tiny.tiny_model(tiny.tiny_tokenizer()))
    assert not hasattr(Accelerator(cpu=True).prepare_model(model), "_original_forward")


@contract("accelerate.utils.gather_object")
def test_gather_object_returns_the_list_of_a_single_process():
    """tests/two_processes.py holds it for several."""
    from accelerate.utils import gather_object

    assert gather_object([{"a": 1}, {"b": 2}]) == [{"a": 1}, {"b": 2}]


# ---- peft


@contract(
    "peft.tuners.lora.Linear",
    "peft.tuners.lora.Linear.merged_adapters",
    "peft.tuners.lora.Linear.lora_variant",
    "peft.tuners.lora.Linear.lora_bias",
)
def test_a_lora_layer_merges_in_place_and_counts_as_merged_by_a_list():
    from peft.tuners.lora import Linear

    model = tiny.with_lora(tiny.tiny_model(tiny.tiny_tokenizer()))
    layer = next(module for module in model.modules() if isinstance(module, Linear))
    weight = layer.get_base_layer().weight
    before, memory = weight.detach().clone(), weight.data_ptr()
    product = layer.get_delta_weight("default")
    assert not layer.merged and not layer.lora_variant and not any(layer.lora_bias.values())
    assert not layer.disable_adapters
    assert type(layer.lora_dropout["default"]) is torch.nn.Identity
    layer.merge()
    assert layer.merged and weight.data_ptr() == memory
    assert torch.allclose(weight, before + product)
    layer.merged_adapters.clear()
    assert not layer.merged


@contract("peft.PeftModel.create_or_update_model_card")
def test_saving_an_adapter_writes_the_card_through_a_method_that_can_be_replaced(tmp_path):
    model, folders = tiny.with_lora(tiny.tiny_model(tiny.tiny_tokenizer())), []
    model.create_or_update_model_card = folders.append
    model.save_pretrained(tmp_path)
    assert [str(folder) for folder in folders] == [str(tmp_path)]
    assert not (tmp_path / "README.md").exists()


# ---- Unsloth: its sources are read here; tests/test_unsloth.py trains with it


def source_of(package: str, file: str) -> str:
    """A source file of a package that is not imported, because Unsloth patches others."""
    spec = importlib.util.find_spec(package)
    if spec is None:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0], file).read_text(encoding="utf-8")


def functions_of(source: str) -> dict[str, list[str]]:
    """The functions and methods in a source, with the names of their parameters."""
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    return {node.name: [a.arg for a in node.args.args] for node in nodes}


@contract("unsloth.PatchFastRL", "unsloth.models.rl.create_new_function")
def test_unsloth_generates_a_trainer_from_source_with_compile_options():
    source = source_of("unsloth", "models/rl.py")
    assert functions_of(source)["PatchFastRL"][:2] == ["algorithm", "FastLanguageModel"]
    assert "from unsloth_zoo.compiler import create_new_function" in source
    assert "created_module = create_new_function(" in source
    assert "torch_compile_options = {{" in source or "torch_compile_options = {" in source
    assert functions_of(source_of("unsloth_zoo", "compiler.py"))["create_new_function"][:2] == [
        "name",
        "new_source",
    ]


@contract("unsloth.FastLanguageModel.for_inference", "unsloth.FastLanguageModel.for_training")
def test_unsloth_has_modes_for_generating_and_training():
    functions = functions_of(source_of("unsloth", "models/llama.py"))
    assert functions["for_inference"] == ["model"]
    assert functions["for_training"][0] == "model"


@contract("unsloth_zoo.rl_replacements.chunked_hidden_states_selective_log_softmax_recompute")
def test_unsloths_loss_imports_the_head_with_entropies_by_name_at_each_call():
    source = source_of("unsloth_zoo", "rl_replacements.py")
    name = "chunked_hidden_states_selective_log_softmax_recompute"
    assert {"hidden_states", "lm_head", "index", "chunks", "temperature", "return_entropy"} <= set(
        functions_of(source)[name]
    )
    loss = next(
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "grpo_accumulated_loss"
    )
    imported = [
        alias.name
        for node in ast.walk(loss)
        if isinstance(node, ast.ImportFrom) and node.module == "unsloth_zoo.rl_replacements"
        for alias in node.names
    ]
    assert name in imported


@contract("trl.GRPOTrainer.get_high_entropy_mask")
def test_unsloth_asks_for_gtpos_mask_because_its_source_gathers_nothing():
    """unsloth_zoo 2026.10.7 replaces a mask that gathers without padding on several processes."""
    from gtpo.gtpo_training import UnslothGTPOTrainer

    assert "accelerator.gather" in source_of("unsloth_zoo", "rl_replacements.py")
    assert "accelerator.gather" not in inspect.getsource(UnslothGTPOTrainer.get_high_entropy_mask)


# ---- trackers and vLLM


@contract("wandb.log")
def test_trl_calls_wandb_log_as_a_member_of_the_module():
    wandb = pytest.importorskip("wandb")
    assert callable(wandb.log) and "logging_backend.log(" in inspect.getsource(trl.GRPOTrainer.log)


@contract("wandb.sdk.lib.wbauth")
def test_wandb_says_whether_a_login_is_at_hand(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    from wandb.sdk.lib import wbauth

    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert wbauth.read_netrc_auth(host="https://api.wandb.ai") is None


@contract("vllm.config.LoRAConfig.max_lora_rank")
def test_vllm_accepts_the_ranks_that_gtpo_knows_and_no_others():
    pytest.importorskip("vllm")
    from vllm.config import LoRAConfig

    from gtpo.models.generation import VLLM_RANKS

    for rank in VLLM_RANKS:
        assert LoRAConfig(max_lora_rank=rank).max_lora_rank == rank
    with pytest.raises(ValueError):
        LoRAConfig(max_lora_rank=7)


# ---- the table itself


def full_name(seam: Seam) -> str:
    return f"{seam.library.package}.{seam.member}"


def source_file(module: str) -> Path:
    file = ROOT.joinpath(*module.split("."))
    return file / "__init__.py" if file.is_dir() else file.with_suffix(".py")


def our_files() -> list[Path]:
    """Every module that a run may import."""
    files = [*(ROOT / "gtpo").rglob("*.py"), *(ROOT / "custom_trainer").glob("*.py")]
    return sorted([*files, ROOT / "train_model.py"])


def test_every_row_has_a_contract_and_every_contract_a_row():
    assert {full_name(seam) for seam in SEAMS} == TESTED


def test_the_installed_versions_are_among_those_that_were_seen():
    for library in {seam.library for seam in SEAMS}:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed = importlib.metadata.version(library.package).partition("+")[0]
            assert installed in library.versions, (
                f"{library.package} {installed}: look at its rows in gtpo/hooks/seams.py"
            )


@pytest.mark.parametrize("seam", SEAMS, ids=lambda seam: f"{seam.how} {full_name(seam)}")
def test_a_row_names_modules_that_use_the_member_and_says_why_in_a_sentence(seam):
    for module in seam.users:
        assert seam.name in words_of(source_file(module)), module
    assert seam.why.endswith(".") and len(seam.why.split()) <= 25


def words_of(file: Path) -> set[str]:
    """The identifiers in a file, those in comments and strings included."""
    words = set(re.findall(r"\w+", file.read_text(encoding="utf-8")))
    return words | set(TRACKER_EVENTS) if "TRACKER_EVENTS" in words else words


def test_rows_are_told_apart_by_member_and_kind_of_use():
    keys = [(full_name(seam), seam.how) for seam in SEAMS]
    assert len(keys) == len(set(keys))


def is_trainer(node: ast.expr, in_trainer_class: bool) -> bool:
    """Whether an expression is a trainer: `trainer`, `self.trainer`, or `self` in its class."""
    if isinstance(node, ast.Attribute):
        return node.attr == "trainer"
    return isinstance(node, ast.Name) and (
        node.id == "trainer" or in_trainer_class and node.id == "self"
    )


def private_members(file: Path) -> set[str]:
    """The private members of a trainer that a file uses: `trainer._x`, getattr(trainer, "_x")."""
    names = set()
    for top in ast.parse(file.read_text(encoding="utf-8")).body:
        bases = [ast.unparse(base) for base in getattr(top, "bases", [])]
        in_class = any(base.endswith("Trainer") for base in bases)
        for node in ast.walk(top):
            if isinstance(node, ast.Attribute) and is_trainer(node.value, in_class):
                names.add(node.attr)
            elif isinstance(node, ast.Call) and node.args and is_trainer(node.args[0], in_class):
                names |= {arg.value for arg in node.args if isinstance(arg, ast.Constant)}
    return {name for name in names if isinstance(name, str) and re.match("_[^_]", name)}


def members_of_trl() -> set[str]:
    """Private names that TRL's and transformers' trainers define or set on themselves."""
    names = set()
    for trainer in trl.GRPOTrainer.__mro__[:-1]:
        names |= set(vars(trainer))
        if trainer.__module__.startswith(("trl", "transformers")):
            names |= {
                node.attr
                for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(trainer))))
                if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
            }
    return {name for name in names if name.startswith("_")}


def test_no_private_member_of_a_trainer_is_used_without_a_row():
    known, checked = members_of_trl(), 0
    for file in our_files():
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        rows = {seam.name for seam in SEAMS if module in seam.users}
        used = private_members(file) & known
        assert used <= rows, (module, used - rows)
        checked += len(used)
    assert checked >= 20  # the search finds what is there


def wrapped_names(file: Path) -> set[str]:
    """The member names that a file passes to `wrap`; a variable stands for all tracker events."""
    calls = [
        node
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "wrap"
    ]
    constants = {"UNSLOTH_HEAD": {UNSLOTH_HEAD}, "event": set(TRACKER_EVENTS)}
    names = set()
    for call in calls:
        name = call.args[1]
        names |= {name.value} if isinstance(name, ast.Constant) else constants[ast.unparse(name)]
    return names


def test_every_wrap_has_a_row_and_every_such_row_a_wrap():
    for file in our_files():
        module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
        rows = {seam.name for seam in SEAMS if seam.how == "wraps" and module in seam.users}
        assert wrapped_names(file) == rows, module
