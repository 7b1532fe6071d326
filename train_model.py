"""Train LoRA adapters with GTPO: `python train_model.py [config.yaml] [--section.key value ...]`.

Reads a recipe, loads a policy, trains it, saves the adapter. `--help` lists every key. Exit code 2:
the recipe or the machine cannot do it; 3: an alarm or a limit stopped the run, and all is saved;
130 and 143: Ctrl-C or SIGTERM did, likewise.
"""

import contextlib
import logging
import logging.handlers
import os
import sys
from pathlib import Path

from gtpo.errors import RecipeError
from gtpo.recipe import Recipe
from gtpo.recipe import command_line as cli
from gtpo.runs.endings import RunStopped, end
from gtpo.system import processes
from gtpo.system.console import log_to_console
from gtpo.system.environment import set_environment
from gtpo.system.safe_text import without_secrets
from gtpo.system.signals import Interrupted, Interruption


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if "--export" in argv:
        import export_model

        return export_model.main([word for word in argv if word != "--export"])
    command = cli.parse(argv)
    if command.switches & {"help", "version", "dry_run", "check"} and not processes.is_first():
        return 0
    with (
        processes.only_first_prints(),
        log_to_console() as early_log,
        Interruption().handling_signals() as interruption,
    ):
        try:
            with interruption.unwrapped():
                return _run(command, early_log, interruption)
        except (Exception, Interrupted) as error:
            return end(error, interruption)


def _run(
    command: cli.CommandLine, early_log: logging.handlers.MemoryHandler, interruption: Interruption
) -> int:
    if "help" in command.switches:
        from gtpo.recipe.keys import help_text

        print(help_text())
        return 0
    if "version" in command.switches:
        from gtpo.runs.directory import versions

        print("\n".join(f"{name} {version}" for name, version in versions().items()))
        return 0
    if "check" in command.switches:
        from gtpo.preflight import run_checks

        return run_checks(command, _request(command), processes.forget_others())
    recipe = cli.make_recipe(command)
    set_environment(recipe.env)  # before torch, so that CUDA_VISIBLE_DEVICES counts
    sys.argv = [without_secrets(word) for word in sys.argv]  # which trackers keep
    if "dry_run" in command.switches:
        from gtpo.models.saved import resolve_adapter
        from gtpo.preflight import print_dry_run

        print_dry_run(resolve_adapter(recipe), processes.count())
    else:
        train(recipe, _request(command), early_log=early_log, interruption=interruption)
    return 0


def _request(command: cli.CommandLine):
    from gtpo.runs.start import Request

    return Request(
        command.resume,
        force="force_resume" in command.switches,
        overwrite="overwrite" in command.switches,
    )


def train(
    recipe: Recipe,
    request=None,
    *,
    early_log: logging.handlers.MemoryHandler | None = None,
    interruption: Interruption | None = None,
) -> Path:
    """Train as `recipe` (its `env` is set) and `request` (a `gtpo.runs.start.Request`) say, and return
    the run directory.
    """
    from gtpo.models.saved import resolve_adapter
    from gtpo.runs.endings import explained
    from gtpo.runs.start import Request, resolve_start
    from gtpo.runs.trackers import tracker_run

    recipe = resolve_adapter(recipe)
    start = resolve_start(recipe, request or Request(), processes.count())
    if start.finished_steps is not None:
        logging.getLogger("gtpo").info(
            "[GTPO] This run is finished, after %d steps; to train on, raise training.max_steps or "
            "training.num_train_epochs",
            start.finished_steps,
        )
        print(f"Run directory: {start.run_dir}")
    else:
        with tracker_run(recipe, start), explained(recipe, start.run_dir):
            _train(recipe, start, early_log, interruption or Interruption())
    return start.run_dir


def _train(
    recipe: Recipe,
    start,
    early_log: logging.handlers.MemoryHandler | None,
    interruption: Interruption,
) -> None:
    from gtpo import data
    from gtpo.models import backends, base_model
    from gtpo.models.saved import training_tokenizer
    from gtpo.report import model_card
    from gtpo.runs import directory as runs
    from gtpo.runs import trackers
    from gtpo.runs import trainers as imported
    from gtpo.runs.arguments import answer_timeout, training_arguments
    from gtpo.system.environment import garbage_collection_off
    from gtpo.system.whole_files import written_aside

    run_dir = start.run_dir
    data.check_source(recipe.dataset)
    data.check_held_out_source(recipe)
    base_model.check_model(recipe.model.model_name)
    trackers.prepare_trackers(recipe, run_dir)

    with garbage_collection_off():
        backend = backends.prepare_backend(recipe.model, recipe.gtpo_runtime.torch_compile_options)
        trainer_class = imported.trainer_class(recipe)  # only now: it binds to the patched TRL
    rewards = [imported.load("trainer.reward_funcs", path) for path in recipe.trainer.reward_funcs]
    _seed_everything(recipe)
    tokenizer = training_tokenizer(recipe.model, backend)
    train_set = data.load_training_problems(recipe, tokenizer, processes.count())
    held_out = data.load_held_out_problems(recipe, tokenizer)
    policy = backends.load_policy(
        recipe.model,
        tokenizer,
        backend,
        seed=recipe.seed,
        precision=backends.precision(recipe.training),
        gradient_checkpointing=recipe.training.trl_options().get("gradient_checkpointing", True),
        adapter=recipe.model.adapter and Path(recipe.model.adapter),
    )

    imported.set_constants(recipe, policy.tokenizer)
    processes.connect_on_cpu(answer_timeout(recipe))
    arguments = training_arguments(
        recipe, str(run_dir), processes=processes.count(), use_vllm=policy.uses_vllm
    )
    from gtpo.evaluation.held_out import HeldOut
    from gtpo.hooks.merged_generation import generate_merged
    from gtpo.hooks.nonfinite import skip_non_finite
    from gtpo.hooks.streaming_head import stream_log_probs
    from gtpo.rewards.guarded import GuardedRewards
    from gtpo.runs.exact_resume import resume_exactly
    from gtpo.runs.progress import watch  # after the backend, like all that imports trl

    guarded = GuardedRewards(
        recipe.rewards,
        list(zip(recipe.trainer.reward_funcs, rewards)),
        seed=recipe.seed,
        file=run_dir / "reward_failures.jsonl",
    )
    trainer = _make_trainer(trainer_class, policy, guarded.functions, arguments, train_set)
    guarded.attach(trainer)
    stream_log_probs(trainer)
    if policy.backend == "transformers":
        generate_merged(trainer)
    non_finite = skip_non_finite(trainer, recipe.training.max_skipped_steps)
    alarm = watch(trainer, recipe, run_dir)
    trackers.shield_trackers(trainer)
    model_card.describe_saves(policy.model, trainer, recipe, run_dir)

    imported.check_processes(trainer, held_out)
    is_main = trainer.accelerator.is_main_process
    with runs.opened(start, recipe, early_log) if is_main else contextlib.nullcontext():
        held_out = (
            HeldOut(recipe, policy, held_out, run_dir, trainer, interruption)
            if held_out and is_main
            else None
        )
        if held_out:  # the other processes wait at their next common step
            trainer.add_callback(held_out)
            before = held_out.evaluate("before")
        resume_exactly(trainer, start, recipe, interruption)
        with interruption.deferred():
            trainer.train(resume_from_checkpoint=start.checkpoint and str(start.checkpoint.folder))
        if non_finite.poisoned:
            raise RunStopped(non_finite.stopped_by)
        interruption.raise_if_requested(
            f"checkpoint-{trainer.state.global_step} is saved in {run_dir}; continue with --resume"
        )
        state = imported.whole_state(trainer)
        if is_main:
            policy.save_adapter(run_dir, state)
        if held_out:
            after = held_out.evaluate("after")
            held_out.say(f"Before, {before.problems} held-out problems: {before}")
            held_out.say(f"After,  {after.problems} held-out problems: {after}")
        if is_main:
            # once more: now the evaluation is there
            policy.model.create_or_update_model_card(run_dir)
            # last: it says that the run is finished
            with written_aside(run_dir / "trainer_state.json") as aside:
                trainer.state.save_to_json(str(aside))
            print(f"Run directory: {run_dir}")
        if stopped_by := guarded.stopped_by or non_finite.stopped_by or alarm.stopped_by:
            raise RunStopped(
                f"{stopped_by}; the run was stopped there, its adapter and a checkpoint are saved"
            )


def _seed_everything(recipe: Recipe) -> None:
    from transformers import enable_full_determinism, set_seed

    deterministic = recipe.training.trl_options().get("full_determinism")
    (enable_full_determinism if deterministic else set_seed)(recipe.seed)


def _make_trainer(trainer_class, policy, rewards, arguments, train_set):
    from gtpo.runs.trainers import made_trainer

    try:
        trainer = made_trainer(
            trainer_class, policy.model, policy.tokenizer, rewards, arguments, train_set
        )
    except RecipeError:
        with contextlib.suppress(OSError):
            # which TRL has made already; it stays if anything is in it
            os.removedirs(arguments.output_dir)
        raise
    # trl 1.13.0 casts the adapter of a 4-bit model to bfloat16: small steps get lost
    if policy.backend == "transformers":
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    # TRL's would describe a base model called None
    trainer.create_model_card = lambda *args, **kwargs: None
    return trainer


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of --help went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
