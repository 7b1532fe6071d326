"""The trainer that a recipe names: found, made, fitted with its hooks, run, and saved.

Import this module after `backends.prepare_backend`: it imports TRL, which Unsloth patches.
"""

import contextlib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trl
from accelerate.utils import DistributedType
from transformers import enable_full_determinism, set_seed

from gtpo.errors import RecipeError
from gtpo.evaluation.held_out import HeldOut
from gtpo.evaluation.scores import Scores
from gtpo.gtpo_training import override_constants
from gtpo.hooks.alarm import Alarm
from gtpo.hooks.merged_generation import generate_merged
from gtpo.hooks.nonfinite import SkipNonFiniteSteps, skip_non_finite
from gtpo.hooks.padding import keep_padding_apart
from gtpo.hooks.recorder import Recorder
from gtpo.hooks.streaming_head import StreamingHead, stream_log_probs
from gtpo.hooks.turn_ends import EndTurns, end_turns
from gtpo.models.backends import Policy
from gtpo.models.prompt import prompt_opening
from gtpo.models.tokenizer import unheeded_ends
from gtpo.recipe import Recipe
from gtpo.recipe.dotted_paths import load_object
from gtpo.rewards.guarded import GuardedRewards
from gtpo.runs import exact_resume
from gtpo.runs.endings import RunStopped
from gtpo.runs.progress import escape_completions_table, replace_console
from gtpo.runs.start import Start
from gtpo.runs.trackers import shield_trackers
from gtpo.system import processes
from gtpo.system.signals import Interruption
from gtpo.system.whole_files import written_aside

# ---- what a recipe names by dotted path


def trainer_class(recipe: Recipe) -> type[trl.GRPOTrainer]:
    """The class that `trainer.class_path` names; raises RecipeError if it is not a GRPOTrainer."""
    loaded = load_callable("trainer.class_path", recipe.trainer.class_path)
    # Read now and not when this module was imported: Unsloth may have put a class of its own there.
    if not (isinstance(loaded, type) and issubclass(loaded, trl.GRPOTrainer)):
        raise RecipeError(
            "trainer.class_path",
            f"{recipe.trainer.class_path!r} is no subclass of trl.GRPOTrainer; use "
            "gtpo.gtpo_training.UnslothGTPOTrainer, or a subclass of it",
        )
    return loaded


def guarded_rewards(recipe: Recipe, run_dir: Path) -> GuardedRewards:
    """The recipe's reward functions, which can no longer end the run; failures go to `run_dir`."""
    paths = recipe.trainer.reward_funcs
    functions = [load_callable("trainer.reward_funcs", path) for path in paths]
    return GuardedRewards(
        recipe.rewards,
        list(zip(paths, functions, strict=True)),
        seed=recipe.seed,
        file=run_dir / "reward_failures.jsonl",
    )


def load_callable(key: str, dotted_path: str) -> Callable:
    """The function or class at a dotted path.

    Raises RecipeError about `key` if it cannot be imported, or cannot be called.
    """
    try:
        loaded = load_object(dotted_path)
    # The module is the user's: it may raise anything, and the recipe names it.
    except (Exception, SystemExit) as error:
        raise RecipeError(
            key, f"{dotted_path!r} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    if not callable(loaded):
        raise RecipeError(
            key,
            f"{dotted_path!r} is {type(loaded).__name__}, which cannot be called; name a function"
            " or class",
        )
    return loaded


# ---- make a trainer


def seed_everything(recipe: Recipe) -> None:
    """Seeds the random generators of Python, NumPy and torch."""
    deterministic = recipe.training.trl_options().get("full_determinism")
    (enable_full_determinism if deterministic else set_seed)(recipe.seed)


def set_constants(recipe: Recipe, tokenizer) -> None:
    """Gives GTPO's trainers the constants of the recipe's section `gtpo_runtime`."""
    constants = recipe.gtpo_runtime.model_dump()
    if constants["pad_id"] is None:
        constants["pad_id"] = tokenizer.pad_token_id
    override_constants(constants)


def make_trainer(
    made_by: type[trl.GRPOTrainer], policy: Policy, rewards: list[Callable], arguments, problems
) -> trl.GRPOTrainer:
    """A trainer of the class `made_by`; raises RecipeError if TRL refuses an option."""
    try:
        trainer = _construct(made_by, policy.model, policy.tokenizer, rewards, arguments, problems)
    except RecipeError:
        with contextlib.suppress(OSError):
            # TRL has made this folder already. It stays if there is anything in it.
            os.removedirs(arguments.output_dir)
        raise
    # trl 1.13.0 casts the adapter of a 4-bit model to bfloat16, where small steps get lost.
    if policy.backend == "transformers":
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    # TRL's model card would describe a base model called None.
    trainer.create_model_card = lambda *args, **kwargs: None
    return trainer


def try_options(recipe: Recipe, arguments, tokenizer, problems) -> None:
    """Makes the recipe's trainer with a tiny model; raises RecipeError if TRL refuses an option.

    TRL checks some options only together, when a trainer is made.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    lora = LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(LlamaForCausalLM(config), lora)
    set_constants(recipe, tokenizer)

    def zero_reward(completions, **kwargs):
        return [0.0] * len(completions)

    rewards = [zero_reward for _ in recipe.trainer.reward_funcs]
    _construct(trainer_class(recipe), model, tokenizer, rewards, arguments, problems)


def _construct(made_by, model, tokenizer, rewards: list, arguments, problems) -> trl.GRPOTrainer:
    try:
        return made_by(
            model=model,
            reward_funcs=rewards,
            args=arguments,
            train_dataset=problems,
            processing_class=tokenizer,
        )
    # ConnectionError: there is no vLLM server.
    except (ValueError, TypeError, ImportError, NotImplementedError, ConnectionError) as error:
        raise RecipeError("training", " ".join(str(error).split())) from error


# ---- attach the hooks


@dataclass
class TrainingRun:
    """A trainer with all that its hooks need, and the hooks that are attached to it so far."""

    trainer: trl.GRPOTrainer
    recipe: Recipe
    start: Start
    policy: Policy
    rewards: GuardedRewards
    held_out_problems: Any  # a dataset, or None
    interruption: Interruption
    hooks: dict[str, Any] = field(default_factory=dict)

    @functools.cached_property
    def prompt_opening(self) -> str:
        """What the chat template has already written of the answer, such as `<reasoning>`."""
        first = self.trainer.train_dataset[0]["prompt"]
        options = self.recipe.training.chat_template_kwargs
        return prompt_opening(self.policy.tokenizer, first, options)

    @property
    def stopped_by(self) -> str | None:
        """The sentence of the first hook in HOOKS that stopped the run."""
        sentences = (getattr(hook, "stopped_by", None) for hook in self.hooks.values())
        return next((sentence for sentence in sentences if sentence), None)


def attach_hooks(run: TrainingRun) -> TrainingRun:
    """`run` with all hooks attached to its trainer.

    Raises RecipeError if the processes do not work together, or if one process cannot evaluate the
    held-out problems.
    """
    check_processes(run.trainer, run.held_out_problems)
    for name, attach in HOOKS:
        run.hooks[name] = attach(run)
    return run


def _attach_rewards(run: TrainingRun) -> GuardedRewards:
    run.rewards.attach(run.trainer, run.prompt_opening)
    return run.rewards


def _attach_turn_ends(run: TrainingRun) -> EndTurns:
    kwargs = run.recipe.training.chat_template_kwargs
    return end_turns(run.trainer, unheeded_ends(run.policy.tokenizer, run.recipe.model, kwargs))


def _attach_padding(run: TrainingRun) -> None:
    keep_padding_apart(run.trainer)


def _attach_streaming_head(run: TrainingRun) -> StreamingHead:
    return stream_log_probs(run.trainer)


def _attach_merged_generation(run: TrainingRun) -> None:
    if run.policy.backend == "transformers":  # Unsloth generates in its own way
        generate_merged(run.trainer)


def _attach_non_finite(run: TrainingRun) -> SkipNonFiniteSteps:
    return skip_non_finite(run.trainer, run.recipe.training.max_skipped_steps)


def _attach_recorder(run: TrainingRun) -> Recorder | None:
    section = run.recipe.watch
    file = run.start.run_dir / "completions.jsonl" if section.completions else None
    if file or section.show_every:
        return Recorder(
            run.trainer,
            file,
            tokens_every=section.tokens_every,
            reference_column="reference",
            columns=section.columns,
            prompt_opening=run.prompt_opening,
        )
    return None


def _attach_console(run: TrainingRun) -> None:
    replace_console(
        run.trainer,
        run.hooks["recorder"],
        show_every=run.recipe.watch.show_every,
        ent_threshold=run.recipe.gtpo_runtime.ent_threshold,
    )
    if run.trainer.log_completions:
        escape_completions_table(run.trainer)


def _attach_alarm(run: TrainingRun) -> Alarm | None:
    section = run.recipe.alarm
    if section.action == "none":
        return None
    limits = section.limits(run.recipe.gtpo_runtime.ent_threshold)
    alarm = Alarm(action=section.action, window=section.window, limits=limits)
    run.trainer.callback_handler.callbacks.insert(0, alarm)
    return alarm


def _attach_tracker_shields(run: TrainingRun) -> None:
    shield_trackers(run.trainer)


def _attach_held_out(run: TrainingRun) -> HeldOut | None:
    # One process evaluates. The others wait for it at their next common step.
    if not run.held_out_problems or not run.trainer.accelerator.is_main_process:
        return None
    held_out = HeldOut(
        run.recipe,
        run.policy,
        run.held_out_problems,
        run.start.run_dir,
        run.trainer,
        run.interruption,
    )
    run.trainer.add_callback(held_out)
    return held_out


def _attach_exact_resume(run: TrainingRun) -> None:
    exact_resume.resume_exactly(run.trainer, run.start, run.recipe, run.interruption)


# The hooks in the order of their attachment. A hook that is attached later wraps those before it,
# and its callback sees an event after theirs.
HOOKS: tuple[tuple[str, Callable[[TrainingRun], Any]], ...] = (
    # The table of rewards must be complete and finite before another hook reads it.
    ("rewards", _attach_rewards),
    # A completion is cut at its end before any other hook sees it.
    ("turn ends", _attach_turn_ends),
    # The hooks around it see the rollout as TRL has padded it.
    ("padding", _attach_padding),
    # It replaces TRL's log-probs and entropies. The recorder reads what it returns.
    ("streaming head", _attach_streaming_head),
    # The merged weights are there while the model generates, and no longer.
    ("merged generation", _attach_merged_generation),
    # A loss must be judged before the recorder writes a line about its micro-batch.
    ("non-finite", _attach_non_finite),
    # It reads rewards, entropies and losses, so it comes after the hooks that make them.
    ("recorder", _attach_recorder),
    # It shows completions of the recorder.
    ("console", _attach_console),
    # Its callback is put first: the trackers log its metrics as well.
    ("alarm", _attach_alarm),
    # The trackers' callbacks are wrapped last, so that nothing they raise reaches the trainer.
    ("trackers", _attach_tracker_shields),
    # An evaluation belongs to the step before a checkpoint, so its callback comes before the next.
    ("held-out", _attach_held_out),
    # A checkpoint holds what all other hooks have done at the end of a step.
    ("exact resume", _attach_exact_resume),
)


# ---- several processes with one trainer


def check_processes(trainer: trl.GRPOTrainer, held_out_problems: Any) -> None:
    """Raises RecipeError if the processes do not know of each other.

    Raises it as well if held-out problems are given, and the one process that would evaluate them
    does not have the whole model.
    """
    connected, started = trainer.accelerator.num_processes, processes.count()
    if connected != started:  # each process would write as if it were the first
        raise RecipeError(
            "WORLD_SIZE",
            f"it is {started}, and accelerate found {connected}"
            f" process{'es' if connected > 1 else ''}; start with torchrun or accelerate launch,"
            " or unset WORLD_SIZE",
        )
    if held_out_problems is not None and is_sharded(trainer):
        raise RecipeError(
            "evaluation",
            "one process evaluates, and FSDP and ZeRO-3 spread the model over all; set"
            " evaluation.path and evaluation.split to null, and use evaluate_model.py later",
        )


def is_sharded(trainer: trl.GRPOTrainer) -> bool:
    """Whether FSDP or ZeRO-3 spreads the model, so that no process has all of it."""
    state = trainer.accelerator.state
    if state.distributed_type == DistributedType.DEEPSPEED:
        return state.deepspeed_plugin.zero_stage == 3
    return state.distributed_type == DistributedType.FSDP


def full_state_dict(trainer: trl.GRPOTrainer) -> dict[str, Any] | None:
    """All tensors of a sharded model, in the first process; None if the model is not sharded.

    All processes must call it together.
    """
    if not is_sharded(trainer):
        return None
    return trainer.accelerator.get_state_dict(trainer.model_wrapped)


# ---- train and save


def evaluate_held_out(run: TrainingRun, name: str) -> Scores | None:
    """The scores of the policy as it is now; None without held-out problems.

    The completions go to evaluation/`name`.jsonl.
    """
    held_out = run.hooks["held-out"]
    return held_out.evaluate(name) if held_out else None


def train(run: TrainingRun) -> None:
    """Trains to the end of the run, or until a signal or a hook stops it.

    Raises Interrupted after a signal, when a checkpoint is saved. Raises RunStopped if the weights
    are not finite, because they must not be saved.
    """
    trainer, checkpoint = run.trainer, run.start.checkpoint
    with run.interruption.deferred():
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint.folder))
    non_finite = run.hooks["non-finite"]
    if non_finite.poisoned:
        raise RunStopped(non_finite.stopped_by)
    run.interruption.raise_if_requested(
        f"checkpoint-{trainer.state.global_step} is saved in {run.start.run_dir}; continue with"
        " --resume"
    )


def save_adapter(run: TrainingRun) -> None:
    """Saves adapter and tokenizer into the run directory. All processes must call it together."""
    state_dict = full_state_dict(run.trainer)
    if run.trainer.accelerator.is_main_process:
        run.policy.save_adapter(run.start.run_dir, state_dict)


def finish(run: TrainingRun, before: Scores | None, after: Scores | None) -> None:
    """Prints the held-out scores before and after, and writes the file that says "finished".

    Raises RunStopped if a hook stopped the run.
    """
    trainer, run_dir = run.trainer, run.start.run_dir
    if before and after:
        say = run.hooks["held-out"].say
        say(f"Before, {before.problems} held-out problems: {before}")
        say(f"After,  {after.problems} held-out problems: {after}")
    if trainer.accelerator.is_main_process:
        run.policy.model.create_or_update_model_card(run_dir)  # again, now with the evaluation
        with written_aside(run_dir / "trainer_state.json") as aside:
            trainer.state.save_to_json(str(aside))
        print(f"Run directory: {run_dir}")
    if run.stopped_by:
        raise RunStopped(
            f"{run.stopped_by}; the run was stopped there, its adapter and a checkpoint are saved"
        )
