"""Train LoRA adapters with GTPO: `python train_model.py config.yaml [--section.key value ...]`.

Reads a recipe, loads a policy, trains it, and saves the adapter. `--help` lists every key.

Exit codes: 2 for a mistake in the recipe, or a machine that cannot run it. 3 if an alarm or a limit
stopped the run, 130 after Ctrl-C, 143 after SIGTERM; a checkpoint is saved in these three cases.
"""

import logging
import logging.handlers
import os
import sys
from pathlib import Path

from gtpo.recipe import Recipe
from gtpo.recipe import command_line as cli
from gtpo.runs.endings import end
from gtpo.runs.start import Request, Start, resolve_start
from gtpo.system import processes
from gtpo.system.console import log_to_console
from gtpo.system.environment import set_environment
from gtpo.system.safe_text import without_secrets
from gtpo.system.signals import Interrupted, Interruption


def main(argv: list[str] | None = None) -> int:
    """Runs the command line, and returns the exit code."""
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
            return end(cli.with_sources(error, command), interruption)


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
    if command.recipe_file is None:
        if processes.is_first_to_say("usage"):
            print(cli.usage(command), file=sys.stderr)
        return 2
    if "check" in command.switches:
        from gtpo.preflight import run_checks

        return run_checks(command, _request(command), processes.forget_others())
    recipe = cli.make_recipe(command)
    set_environment(recipe.env)  # before torch, so that CUDA_VISIBLE_DEVICES counts
    sys.argv = [without_secrets(word) for word in sys.argv]  # trackers save it
    if "dry_run" in command.switches:
        from gtpo.models.saved import resolve_adapter
        from gtpo.preflight import print_dry_run

        print_dry_run(resolve_adapter(recipe), processes.count())
    else:
        train(recipe, _request(command), early_log=early_log, interruption=interruption)
    return 0


def _request(command: cli.CommandLine) -> Request:
    return Request(
        command.resume,
        force="force_resume" in command.switches,
        overwrite="overwrite" in command.switches,
    )


def train(
    recipe: Recipe,
    request: Request | None = None,
    *,
    early_log: logging.handlers.MemoryHandler | None = None,
    interruption: Interruption | None = None,
) -> Path:
    """Trains the policy of a recipe, and returns the run directory.

    `recipe.env` must be in the environment already. `request` says whether the run resumes or
    overwrites. `early_log` holds messages that go to train.log first. Raises RecipeError for a
    mistake of the user, RunStopped if a hook stopped the run, and Interrupted after a signal.
    """
    from gtpo.models.saved import resolve_adapter
    from gtpo.runs.endings import explained
    from gtpo.runs.trackers import tracker_run

    recipe = resolve_adapter(recipe)
    start = resolve_start(recipe, request or Request(), processes.count())
    if start.finished_steps is not None:
        logging.getLogger("gtpo").info(
            "[GTPO] This run is finished, after %d steps; to train further, raise"
            " training.max_steps or training.num_train_epochs",
            start.finished_steps,
        )
        print(f"Run directory: {start.run_dir}")
    else:
        with tracker_run(recipe, start), explained(recipe, start.run_dir):
            _train(recipe, start, early_log, interruption or Interruption())
    return start.run_dir


def _train(
    recipe: Recipe,
    start: Start,
    early_log: logging.handlers.MemoryHandler | None,
    interruption: Interruption,
) -> None:
    """What a run does, in the steps that the README lists."""
    from gtpo import data
    from gtpo.models import backends, base_model, prompt, saved
    from gtpo.report import model_card
    from gtpo.runs import directory
    from gtpo.runs.arguments import policy_options, training_arguments
    from gtpo.runs.trackers import prepare_trackers
    from gtpo.system.environment import garbage_collection_off

    # 1. Start: what a user may have got wrong is found before anything slow.
    data.check_source(recipe.dataset)
    data.check_held_out_source(recipe)
    base_model.check_model(recipe.model.model_name)
    prepare_trackers(recipe, start.run_dir)
    # 2. Backend.
    with garbage_collection_off():
        backend = backends.prepare_backend(recipe.model, recipe.gtpo_runtime.torch_compile_options)
        from gtpo.runs import trainers  # it imports TRL, which the backend has patched
    # 3. Trainer class and rewards.
    trainer_class = trainers.trainer_class(recipe)
    rewards = trainers.guarded_rewards(recipe, start.run_dir)
    # 4. Tokenizer and problems.
    trainers.seed_everything(recipe)
    tokenizer = saved.training_tokenizer(
        recipe.model, backend, recipe.training, checkpoint=start.turn_ends_from
    )
    is_new = start.checkpoint is None
    prompt.check_recipe(tokenizer, recipe, backend=backend, strict=is_new)
    problems = data.load_training_problems(recipe, tokenizer, processes.count())
    held_out_problems = data.load_held_out_problems(recipe, tokenizer, problems)
    prompt.check_prompts(tokenizer, recipe, problems, held_out_problems, backend=backend)
    # 5. Policy.
    policy = backends.load_policy(recipe.model, tokenizer, backend, **policy_options(recipe))
    if policy.tokenizer is not tokenizer:  # Unsloth may have chosen another padding token
        prompt.check_prompts(policy.tokenizer, recipe, problems, backend=backend)
    # 6. Arguments.
    trainers.set_constants(recipe, policy.tokenizer)
    arguments = training_arguments(
        recipe, str(start.run_dir), processes=processes.count(), use_vllm=policy.uses_vllm
    )
    # 7. Trainer.
    trainer = trainers.make_trainer(trainer_class, policy, rewards.functions, arguments, problems)
    model_card.write_with_each_save(policy.model, trainer, recipe, start.run_dir)
    run = trainers.attach_hooks(
        trainers.TrainingRun(
            trainer, recipe, start, policy, rewards, held_out_problems, interruption
        )
    )
    with directory.opened(start, recipe, early_log):
        # 8. Held-out before.
        before = trainers.evaluate_held_out(run, "before")
        # 9. Train.
        trainers.train(run)
        # 10. Save, and held-out after.
        trainers.save_adapter(run)
        after = trainers.evaluate_held_out(run, "after")
        trainers.finish(run, before, after)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # whoever reads the output of --help has stopped reading
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
