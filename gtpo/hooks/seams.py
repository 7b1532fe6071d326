"""The members of other libraries that GTPO wraps, overrides, replaces, sets or reads, as one table.

A seam is a member that its library does not promise to keep, or whose behaviour GTPO relies on
beyond its documentation. Ordinary calls of documented functions are not listed. When a library is
upgraded, this table says where to look, and tests/test_seams.py says what broke.

`wrap` is the one function that puts code of ours around such a member.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple


class Library(NamedTuple):
    """A Python package and the versions in which its seams were seen to work."""

    package: str
    versions: tuple[str, ...]


class Seam(NamedTuple):
    """One member of a library, how GTPO uses it, and why."""

    library: Library
    member: str  # dotted, below the package
    how: Literal["wraps", "overrides", "replaces", "sets", "reads"]
    users: tuple[str, ...]  # modules of ours; for "wraps" the innermost layer comes first
    why: str

    @property
    def name(self) -> str:
        """The last part of the dotted member."""
        return self.member.rpartition(".")[2]


TRL = Library("trl", ("1.13.0",))
TRANSFORMERS = Library("transformers", ("5.17.0",))
PEFT = Library("peft", ("0.21.2",))
ACCELERATE = Library("accelerate", ("1.15.0",))
UNSLOTH = Library("unsloth", ("2026.10.7",))
UNSLOTH_ZOO = Library("unsloth_zoo", ("2026.10.7",))
WANDB = Library("wandb", ("0.31.0",))
TORCH = Library("torch", ("2.11.0", "2.13.0"))
VLLM = Library("vllm", ("0.31.0",))

# Callback methods of a tracker. The shield around a tracker catches what they raise.
TRACKER_EVENTS = ("on_train_begin", "on_epoch_begin", "on_step_end", "on_log", "on_evaluate",
                  "on_save", "on_epoch_end", "on_train_end")  # fmt: skip

# fmt: off
SEAMS: tuple[Seam, ...] = (
    # ---- TRL: the path from prompts to the loss
    Seam(TRL, "GRPOTrainer._generate_and_score_completions", "overrides", ("gtpo.gtpo_training",),
         "Only here are all rows of a rollout known, so lambda is decided here for whole groups."),
    Seam(TRL, "GRPOTrainer._generate_and_score_completions", "wraps",
         ("gtpo.rewards.guarded", "gtpo.hooks.recorder"),
         "TRL's share of groups without signal is corrected, and the recorder adds the key `row`."),
    Seam(TRL, "GRPOTrainer._generate", "wraps", ("gtpo.hooks.turn_ends",),
         "It decodes completions, and counts as truncated what ends neither with eos nor padding."),
    Seam(TRL, "GRPOTrainer._generate_single_turn", "wraps",
         ("gtpo.hooks.turn_ends", "gtpo.hooks.merged_generation"),
         "It is the only place where TRL calls the model's `generate`; it cuts rows at eos alone."),
    Seam(TRL, "GRPOTrainer.generation_config", "sets", ("gtpo.hooks.turn_ends",),
         "TRL generates with it, and it names the ids at which `generate` ends a row."),
    Seam(TRL, "GRPOTrainer.generation_kwargs", "sets", ("gtpo.hooks.turn_ends",),
         "TRL lays them over the model's own generation configuration while it generates."),
    Seam(TRL, "generation.vllm_generation.VLLMGeneration.generation_kwargs", "sets",
         ("gtpo.hooks.turn_ends",),
         "TRL makes vLLM's SamplingParams from them, which know no `eos_token_id`."),
    Seam(TRL, "GRPOTrainer.mask_truncated_completions", "sets", ("gtpo.hooks.turn_ends",),
         "TRL masks by eos and padding; the hook masks instead where another id ends a row."),
    Seam(TRL, "GRPOTrainer._calculate_rewards", "overrides", ("gtpo.gtpo_training",),
         "A completion that one reward function cannot score gets no reward at all."),
    Seam(TRL, "GRPOTrainer._calculate_rewards", "wraps",
         ("gtpo.rewards.guarded", "gtpo.hooks.recorder"),
         "The guard removes the rewards of failed completions before the recorder reads them."),
    Seam(TRL, "GRPOTrainer._get_per_token_logps_and_entropies", "wraps",
         ("gtpo.hooks.padding", "gtpo.hooks.streaming_head", "gtpo.hooks.recorder"),
         "The streaming head computes the entropies, so the recorder looks from outside it."),
    Seam(TRL, "GRPOTrainer.compute_loss", "overrides", ("gtpo.gtpo_training",),
         "The parent multiplies the factor by A_i, so the trainer replaces A_i = 0 by -1 before."),
    Seam(TRL, "GRPOTrainer.compute_loss", "wraps",
         ("gtpo.hooks.padding", "gtpo.hooks.nonfinite", "gtpo.hooks.recorder"),
         "The last two only look at the loss. GTPO's trainer attaches the first two itself."),
    Seam(TRL, "GRPOTrainer.get_high_entropy_mask", "overrides", ("gtpo.gtpo_training",),
         "TRL and Unsloth multiply the policy loss by its result: GTPO's factor enters here."),
    Seam(TRL, "GRPOTrainer.top_entropy_quantile", "sets", ("gtpo.gtpo_training",),
         "The loss asks for the entropy mask only where this is below 1."),
    Seam(TRL, "GRPOTrainer._metrics", "sets",
         ("gtpo.gtpo_training", "gtpo.hooks.nonfinite", "gtpo.hooks.turn_ends",
          "gtpo.rewards.guarded", "gtpo.runs.exact_resume"),
         "TRL logs the mean of each list of `_metrics[mode]` and clears it, so metrics go there."),
    Seam(TRL, "GRPOTrainer._pending_metrics", "reads", ("gtpo.rewards.guarded",),
         "Processes must log the same names, because TRL gathers each pending metric."),
    Seam(TRL, "GRPOTrainer._log_metric", "reads", ("gtpo.rewards.guarded",),
         "It adds the names that only another process logged."),
    Seam(TRL, "GRPOTrainer.reward_weights", "reads",
         ("gtpo.gtpo_training", "gtpo.hooks.recorder", "gtpo.rewards.guarded"),
         "A completion's reward is the weighted sum over reward functions."),
    Seam(TRL, "GRPOTrainer.multi_objective_aggregation", "reads",
         ("gtpo.gtpo_training", "gtpo.hooks.recorder", "gtpo.rewards.guarded"),
         "It says whether TRL compares sums of rewards, or each function's rewards by themselves."),
    Seam(TRL, "GRPOTrainer.reward_func_names", "reads", ("gtpo.hooks.recorder",),
         "They name the columns of the reward table."),
    Seam(TRL, "GRPOTrainer.num_generations", "reads",
         ("gtpo.gtpo_training", "gtpo.hooks.recorder", "gtpo.rewards.guarded",
          "custom_trainer.released"),
         "It is the group size G: the rows of a group stand after each other."),
    Seam(TRL, "GRPOTrainer.num_generations_eval", "reads",
         ("gtpo.gtpo_training", "gtpo.rewards.guarded"),
         "It is the group size in TRL's own evaluation."),
    Seam(TRL, "GRPOTrainer.temperature", "reads", ("gtpo.hooks.streaming_head",),
         "TRL divides the logits by it before both functions that the streaming head replaces."),
    Seam(TRL, "GRPOTrainer._entropy_bonus_enabled", "reads", ("gtpo.hooks.streaming_head",),
         "An entropy bonus needs entropies with a gradient, which the streaming head lacks."),
    Seam(TRL, "GRPOTrainer.use_vllm", "reads", ("gtpo.hooks.merged_generation",),
         "vLLM generates with weights of its own, so there is nothing to merge."),
    Seam(TRL, "GRPOTrainer.is_fsdp_enabled", "reads",
         ("gtpo.hooks.merged_generation", "gtpo.hooks.streaming_head"),
         "FSDP spreads weights over devices, and neither hook works on a part of a matrix."),
    Seam(TRL, "GRPOTrainer.is_deepspeed_enabled", "reads",
         ("gtpo.hooks.merged_generation", "gtpo.hooks.streaming_head"),
         "DeepSpeed spreads weights over devices, as FSDP does."),
    Seam(TRL, "trainer.grpo_trainer.selective_log_softmax", "wraps",
         ("gtpo.hooks.streaming_head",),
         "TRL passes it the head's output, which is the hidden states while the head streams."),
    Seam(TRL, "trainer.grpo_trainer.entropy_from_logits", "wraps",
         ("gtpo.hooks.streaming_head",),
         "TRL calls it right after `selective_log_softmax`, with the same logits."),
    Seam(TRL, "trainer.utils.split_tensor_dict", "reads", ("gtpo.gtpo_training",),
         "It cuts the first rollout into micro-batches for the initial entropy."),
    Seam(TRL, "trainer.utils.get_callable_name", "reads", ("gtpo.rewards.guarded",),
         "A guarded reward function keeps the name that TRL puts into its metrics."),
    # ---- TRL: what a checkpoint leaves out
    Seam(TRL, "GRPOTrainer._step", "sets", ("gtpo.runs.exact_resume",),
         "It counts micro-batches and decides when to sample; TRL does not restore it."),
    Seam(TRL, "GRPOTrainer._buffered_inputs", "sets", ("gtpo.runs.exact_resume",),
         "It is the rollout that the next steps still train on; TRL does not restore it."),
    Seam(TRL, "GRPOTrainer._current_train_step_time", "sets", ("gtpo.runs.exact_resume",),
         "It holds the seconds of an optimizer step that is not logged yet."),
    Seam(TRL, "GRPOTrainer._logs", "sets", ("gtpo.runs.exact_resume", "gtpo.runs.progress"),
         "It holds deques of prompts and completions, which TRL prints as a table."),
    Seam(TRL, "GRPOTrainer.log_completions", "sets",
         ("gtpo.runs.exact_resume", "gtpo.runs.trainers"),
         "It switches that table on."),
    Seam(TRL, "GRPOTrainer.num_iterations", "reads", ("gtpo.runs.exact_resume",),
         "A rollout lasts `steps_per_generation * num_iterations` micro-batches."),
    Seam(TRL, "GRPOTrainer._get_train_sampler", "wraps", ("gtpo.runs.exact_resume",),
         "Its RepeatSampler draws the order of each epoch from a generator of its own."),
    Seam(TRL, "GRPOTrainer.log", "wraps", ("gtpo.runs.progress",),
         "TRL prints completions with rich, which sends control characters to the terminal."),
    Seam(TRL, "GRPOTrainer.create_model_card", "replaces", ("gtpo.runs.trainers",),
         "TRL's card of a LoRA run describes a base model called None."),
    Seam(TRL, "GRPOTrainer._save_checkpoint", "overrides", ("gtpo.gtpo_training",),
         "The initial entropy is saved with every checkpoint."),
    Seam(TRL, "GRPOTrainer._save_checkpoint", "wraps", ("gtpo.runs.exact_resume",),
         "A checkpoint is written aside and gets its name when it is whole."),
    Seam(TRL, "GRPOTrainer._load_optimizer_and_scheduler", "overrides", ("gtpo.gtpo_training",),
         "The initial entropy is read again when a run resumes."),
    Seam(TRL, "GRPOTrainer._load_optimizer_and_scheduler", "wraps", ("gtpo.runs.exact_resume",),
         "A resumed run may have other optimizer settings, which transformers would overwrite."),
    Seam(TRL, "trainer.grpo_config", "reads", ("gtpo.runs.arguments",),
         "Unsloth's generated configuration has other defaults; TRL's own are found by module."),
    Seam(TRL, "GRPOTrainer", "reads", ("gtpo.runs.trainers",),
         "It casts the adapter of a 4-bit model to bfloat16, where small steps get lost."),
    # ---- transformers
    Seam(TRANSFORMERS, "Trainer._run_epoch", "wraps", ("gtpo.runs.exact_resume",),
         "A run that resumes at its last step would train one step too many."),
    Seam(TRANSFORMERS, "Trainer._get_output_dir", "replaces", ("gtpo.runs.exact_resume",),
         "A checkpoint is written into another folder than the run directory."),
    Seam(TRANSFORMERS, "Trainer._get_output_dir", "reads", ("gtpo.gtpo_training",),
         "It names the folder in which the checkpoint is being written."),
    Seam(TRANSFORMERS, "Trainer._tr_loss", "sets", ("gtpo.runs.exact_resume",),
         "It sums losses that are not logged yet, on the device."),
    Seam(TRANSFORMERS, "Trainer._total_loss_scalar", "sets", ("gtpo.runs.exact_resume",),
         "It sums losses that are logged; the mean at the end of a run needs it."),
    Seam(TRANSFORMERS, "Trainer._globalstep_last_logged", "sets", ("gtpo.runs.exact_resume",),
         "A logged loss is the mean over the steps since then."),
    Seam(TRANSFORMERS, "Trainer.compute_loss_context_manager", "reads", ("gtpo.gtpo_training",),
         "The pass that measures the initial entropy runs under the autocast of training."),
    Seam(TRANSFORMERS, "Trainer.callback_handler", "sets",
         ("gtpo.runs.exact_resume", "gtpo.runs.trackers", "gtpo.runs.trainers"),
         "Its list `callbacks` is the order in which callbacks see an event."),
    Seam(TRANSFORMERS, "Trainer.log", "reads", ("gtpo.evaluation.held_out",),
         "A held-out evaluation is logged without TRL's `log`, which would clear its metrics."),
    Seam(TRANSFORMERS, "trainer_callback.ExportableState", "reads",
         ("gtpo.hooks.alarm", "gtpo.runs.exact_resume"),
         "transformers saves such a callback's `state()` under its class name."),
    Seam(TRANSFORMERS, "TrainerState.stateful_callbacks", "reads", ("gtpo.runs.exact_resume",),
         "It holds those states in a checkpoint; transformers would not restore them in place."),
    Seam(TRANSFORMERS, "TrainerState.compute_steps", "reads", ("gtpo.runs.exact_resume",),
         "It sets logging and saving intervals from the arguments, not from the checkpoint."),
    Seam(TRANSFORMERS, "TrainerState.log_history", "sets", ("gtpo.hooks.alarm",),
         "Its last entry is the line that callbacks see in `on_log`, as another dict."),
    Seam(TRANSFORMERS, "TrainerCallback.on_pre_optimizer_step", "overrides",
         ("gtpo.hooks.nonfinite",),
         "It comes after gradient clipping and right before `optimizer.step()`."),
    Seam(TRANSFORMERS, "trainer_callback.PrinterCallback", "reads", ("gtpo.runs.progress",),
         "GTPO's console line takes the place of what it prints."),
    Seam(TRANSFORMERS, "trainer_callback.ProgressCallback.training_bar", "reads",
         ("gtpo.runs.progress",),
         "Lines are written above the progress bar."),
    Seam(TRANSFORMERS, "integrations", "reads", ("gtpo.runs.trackers",),
         "Callbacks whose class is defined there are trackers."),
    *(Seam(TRANSFORMERS, f"TrainerCallback.{event}", "wraps", ("gtpo.runs.trackers",),
           "A tracker that fails is reported once and then left out.") for event in TRACKER_EVENTS),
    Seam(TRANSFORMERS, "TrainingArguments._setup_devices", "replaces", ("gtpo.runs.exact_resume",),
         "Under several processes it is `cpu:0`, to which torch cannot load an optimizer."),
    Seam(TRANSFORMERS, "TrainingArguments._n_gpu", "sets", ("gtpo.runs.arguments",),
         "Above 1 transformers uses DataParallel, which multiplies the batch."),
    Seam(TRANSFORMERS, "training_args", "reads", ("gtpo.system.trl_options",),
         "Its source is parsed for the fields of TrainingArguments, without importing it."),
    Seam(TRANSFORMERS, "TrainingArguments.ddp_timeout", "reads",
         ("gtpo.runs.arguments",),
         "On a CPU transformers does not pass it on, so GTPO starts the process group itself."),
    Seam(TRANSFORMERS, "PreTrainedTokenizerBase.init_kwargs", "sets", ("gtpo.models.tokenizer",),
         "`save_pretrained` writes them to tokenizer_config.json: the ends of a turn stand there."),
    Seam(TRANSFORMERS, "Trainer.processing_class", "sets", ("gtpo.hooks.padding",),
         "Unsloth's loss and log-probs read `pad_token_id` from it at each call."),
    Seam(TRANSFORMERS, "GenerationConfig.save_pretrained", "reads", ("gtpo.models.export",),
         "It refuses sampling settings beside `do_sample=False`."),
    Seam(TRANSFORMERS, "dynamic_module_utils.resolve_trust_remote_code", "reads",
         ("gtpo.models.base_model",),
         "The words of its error say that a model comes with Python code."),
    # ---- accelerate
    Seam(ACCELERATE, "Accelerator.scaler", "reads", ("gtpo.hooks.nonfinite",),
         "In fp16 without clipping it looks for infinities only after our callback."),
    Seam(ACCELERATE, "Accelerator.prepare_model._original_forward", "reads",
         ("gtpo.hooks.merged_generation",),
         "A model under autocast has it; merged weights would be rounded there."),
    Seam(ACCELERATE, "utils.gather_object", "reads",
         ("gtpo.hooks.recorder", "gtpo.rewards.guarded"),
         "It joins one list per process in the order of processes."),
    # ---- peft
    Seam(PEFT, "tuners.lora.Linear", "reads", ("gtpo.hooks.merged_generation",),
         "Its `merge` adds the adapter to the base weight in place."),
    Seam(PEFT, "tuners.lora.Linear.merged_adapters", "sets", ("gtpo.hooks.merged_generation",),
         "A layer whose list is empty counts as not merged."),
    Seam(PEFT, "tuners.lora.Linear.lora_variant", "reads", ("gtpo.hooks.merged_generation",),
         "DoRA and other variants do not merge as a plain sum."),
    Seam(PEFT, "tuners.lora.Linear.lora_bias", "reads", ("gtpo.hooks.merged_generation",),
         "A LoRA bias would change the bias of the base layer as well."),
    Seam(PEFT, "PeftModel.create_or_update_model_card", "replaces", ("gtpo.report.model_card",),
         "Each save writes GTPO's model card in place of peft's."),
    # ---- Unsloth
    Seam(UNSLOTH, "PatchFastRL", "reads", ("gtpo.models.backends", "gtpo.hooks.padding"),
         "It puts a class of the module UnslothGRPOTrainer in place of `trl.GRPOTrainer`."),
    Seam(UNSLOTH, "models.rl.create_new_function", "wraps", ("gtpo.models.backends",),
         "The compile options stand in the generated source before it is imported."),
    Seam(UNSLOTH, "FastLanguageModel.for_inference", "reads", ("gtpo.models.backends",),
         "Unsloth has modes of its own for generating and training."),
    Seam(UNSLOTH, "FastLanguageModel.for_training", "reads", ("gtpo.models.backends",),
         "It returns to the mode in which the model trains."),
    Seam(UNSLOTH_ZOO, "rl_replacements.chunked_hidden_states_selective_log_softmax_recompute",
         "wraps", ("gtpo.hooks.streaming_head",),
         "Unsloth's loss imports it by name at each call for log-probs with entropies."),
    # ---- torch, trackers and vLLM
    Seam(TORCH, "nn.Linear.forward", "wraps", ("gtpo.hooks.streaming_head",),
         "The output head passes hidden states on while log-probs are computed from them."),
    Seam(TORCH, "amp.GradScaler", "reads", ("gtpo.hooks.nonfinite",),
         "It skips an optimizer step in which it finds an infinite gradient."),
    Seam(WANDB, "log", "wraps", ("gtpo.runs.trackers",),
         "TRL calls it too, and a failing tracker must not stop training."),
    Seam(WANDB, "sdk.lib.wbauth", "reads", ("gtpo.runs.trackers",),
         "It says whether a login is at hand; `wandb.login` would ask a question."),
    Seam(VLLM, "config.LoRAConfig.max_lora_rank", "reads", ("gtpo.models.generation",),
         "vLLM accepts only certain ranks, so a rank is rounded up to one of them."),
)
# fmt: on


def wrap(owner: Any, name: str, around: Callable) -> Callable[[], None]:
    """Puts `around` around `owner.name`; returns a function that takes it away again.

    A call of `owner.name(...)` becomes `around(original, ...)`. The module that defines `around` is
    the layer. The wrapped member keeps the metadata of the original, because unsloth_zoo 2026.10.7
    reads the source of `get_high_entropy_mask`.

    Raises ValueError if the table does not list the layer for this member. It also does so if the
    layer is there already, or if it belongs inside a layer that is there already.
    """
    layer, original, own = around.__module__, getattr(owner, name), name in vars(owner)
    _check_order(name, layer, original)
    arounds = [around]

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        if not arounds:  # undone beneath another layer
            return original(*args, **kwargs)
        return arounds[0](original, *args, **kwargs)

    def undo() -> None:
        arounds.clear()  # what `around` holds, tensors for instance, is free at once
        wrapped.layer = None
        if vars(owner).get(name) is not wrapped:  # another layer stands on it, or it is undone
            return
        if own:
            setattr(owner, name, original)
        else:
            delattr(owner, name)

    wrapped.layer = layer
    setattr(owner, name, wrapped)
    return undo


def _check_order(name: str, layer: str, original: Callable) -> None:
    """Raises ValueError where `layer` may not be put around `original`."""
    orders = [seam.users for seam in SEAMS if seam.how == "wraps" and seam.name == name]
    order = next((users for users in orders if layer in users), None)
    if order is None:
        raise ValueError(
            f"{layer} wraps {name}, which gtpo/hooks/seams.py does not list; add a row for it"
        )
    present = _layers(original)
    if layer in present:
        raise ValueError(f"{layer} wraps {name} already; attach it once to each object")
    outer = [other for other in order[order.index(layer) + 1 :] if other in present]
    if outer:
        raise ValueError(f"{layer} must wrap {name} before {outer[0]} does; attach it first")


def _layers(member: Callable) -> set[str]:
    """The layers of ours that stand around a member now."""
    layers = set()
    while member is not None:
        layers.add(getattr(member, "layer", None))
        member = getattr(member, "__wrapped__", None)
    return layers - {None}
