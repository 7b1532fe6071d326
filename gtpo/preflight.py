"""`--check` and `--dry-run`: what a run would do, and what would stop it.

`--check` tries everything that can fail early. It calls the same functions as a run, in the same
order, but never loads the model's weights. It takes less than a minute. The table CHECKS lists what
is checked.

`--dry-run` loads nothing. It prints the resolved recipe and what follows from its numbers.
"""

import contextlib
import logging
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from gtpo.data import check_local_files, count_rows
from gtpo.errors import RecipeError
from gtpo.recipe import Recipe
from gtpo.recipe.batch import batch_plan, log_batch_plan, optimizer_steps
from gtpo.recipe.command_line import CommandLine, make_recipe, with_sources
from gtpo.recipe.yaml_text import write_yaml
from gtpo.runs.start import Request, resolve_start
from gtpo.system.console import Finding, conclusion, finding_line, findings_as_json
from gtpo.system.environment import set_environment
from gtpo.system.safe_text import printable, without_secrets

logger = logging.getLogger(__name__)

PROMPT = "---- the first prompt, as the model reads it"
RULER = "----"


# ---- --check: the checks, in the order of a run


@dataclass
class Facts:
    """What the checks know. The first three are given; a check that passes adds its own."""

    command: CommandLine
    request: Request
    processes: int
    recipe: Recipe | None = None  # from the check "recipe"
    turn_ends_from: Path | None = None  # from "run directory": the checkpoint of a resumed run
    backend: str | None = None  # from "backend"
    trainer_class: Any = None  # from "trainer"
    arguments: Any = None  # from "trainer": the trl.GRPOConfig
    optimizer_bytes: float = 8.0  # from "trainer", per trained parameter; without it the most
    tokenizer: Any = None  # from "tokenizer"
    problems: Any = None  # from "dataset": those to train on
    longest_prompt: int | None = None  # from "dataset": in tokens
    model_size: Any = None  # from "model": a gtpo.runs.memory.ModelSize


def _check_recipe(facts: Facts) -> str:
    from gtpo.models.saved import resolve_adapter

    recipe = make_recipe(facts.command)
    set_environment(recipe.env)
    sys.argv = [without_secrets(word) for word in sys.argv]
    recipe = resolve_adapter(recipe)
    batch = _batch_per_step(recipe, facts.processes)
    facts.recipe = recipe
    return (
        f"{facts.command.recipe_file}: {batch}, each completion of at most"
        f" {recipe.max_completion_length} tokens"
    )


def _check_run_directory(facts: Facts) -> str:
    start = resolve_start(facts.recipe, facts.request, facts.processes)
    facts.turn_ends_from = start.turn_ends_from
    if start.finished_steps is not None:
        return f"{start.run_dir} holds this run, which finished after {start.finished_steps} steps"
    if start.checkpoint is not None:
        return f"{start.run_dir}: the run continues after step {start.checkpoint.step}"
    return f"{start.run_dir} {'will be replaced' if start.run_dir.exists() else 'is free'}"


def _check_trackers(facts: Facts) -> str:
    from gtpo.runs.trackers import prepare_trackers

    prepare_trackers(facts.recipe, Path(facts.recipe.output_dir()))
    names = [tracker for tracker in facts.recipe.training.report_to if tracker != "none"]
    if "wandb" in names:
        offline = os.environ.get("WANDB_MODE") in ("offline", "disabled")
        names[names.index("wandb")] = f"wandb ({'offline' if offline else 'logged in'})"
    return " and ".join(names) or "none"


def _check_model_files(facts: Facts) -> str:
    from gtpo.models.base_model import check_model

    section = facts.recipe.model
    check_model(section.model_name)
    if section.trust_remote_code:
        logger.warning("model.trust_remote_code: Python code that comes with the model will be run")
    is_local = os.path.isdir(section.model_name)
    return (
        f"{section.model_name} is {'a local folder' if is_local else 'in the cache or on the hub'}"
    )


def _check_data_files(facts: Facts) -> str:
    from gtpo.data import check_held_out_source, check_source

    section = facts.recipe.dataset
    check_source(section)
    check_held_out_source(facts.recipe)
    if section.path:
        return f"{section.path} exists"
    place = "a function" if section.kind == "function" else "in the cache or on the hub"
    return f"{section.name} is {place}"


def _check_hub_token(facts: Facts) -> str:
    from gtpo.system.hub import token_status

    return token_status(facts.recipe.model.model_name)


def _check_backend(facts: Facts) -> str:
    import torch

    from gtpo.models.backends import prepare_backend

    facts.backend = prepare_backend(
        facts.recipe.model, facts.recipe.gtpo_runtime.torch_compile_options
    )
    name = "Unsloth" if facts.backend == "unsloth" else "transformers + peft"
    if torch.cuda.is_available():
        return f"{name} on {torch.cuda.get_device_name()}"
    threads = torch.get_num_threads()
    return f"{name} on the CPU, with {threads} thread{'' if threads == 1 else 's'}"


def _check_trainer(facts: Facts) -> str:
    from gtpo.runs.arguments import training_arguments
    from gtpo.runs.memory import optimizer_bytes
    from gtpo.runs.trainers import trainer_class

    facts.trainer_class = trainer_class(facts.recipe)
    with tempfile.TemporaryDirectory() as folder:
        facts.arguments = training_arguments(facts.recipe, folder, processes=facts.processes)
    optimizer = facts.arguments.optim.value
    facts.optimizer_bytes = optimizer_bytes(optimizer)
    return f"{facts.recipe.trainer.class_path}, with the optimizer {optimizer}"


def _check_tokenizer(facts: Facts) -> str:
    from gtpo.models.saved import training_tokenizer
    from gtpo.models.tokenizer import named, turn_ends

    facts.tokenizer = training_tokenizer(
        facts.recipe.model, facts.backend, facts.recipe.training, checkpoint=facts.turn_ends_from
    )
    ends = named(facts.tokenizer, turn_ends(facts.tokenizer))
    return (
        f"{len(facts.tokenizer)} tokens; a turn ends with {ends}; padding is"
        f" {facts.tokenizer.pad_token!r}"
    )


def _check_chat_template(facts: Facts) -> str:
    from gtpo.models.prompt import check_recipe

    is_new = facts.request.resume is None
    check_recipe(facts.tokenizer, facts.recipe, backend=facts.backend, strict=is_new)
    if not facts.recipe.dataset.system_instruction:
        return "it prints what the user says, without a system message"
    role = facts.recipe.dataset.system_role
    return f"it prints the system message, as one of the role {role}, and what the user says"


def _check_dataset(facts: Facts) -> str:
    import datasets

    from gtpo.data import (
        check_recorded_columns,
        drop_long_prompts,
        length_filter_summary,
        problems_with_lengths,
    )
    from gtpo.recipe.batch import check_enough_problems

    recipe, limit = facts.recipe, facts.recipe.max_prompt_length
    datasets.disable_progress_bars()
    loaded = problems_with_lengths(
        recipe.dataset,
        facts.tokenizer,
        chat_template_kwargs=recipe.training.chat_template_kwargs,
    )
    fitting = drop_long_prompts(loaded, limit)
    kept, total = len(fitting.lengths), len(loaded.lengths)
    check_enough_problems(recipe, kept, facts.processes)
    facts.problems = fitting.problems
    facts.longest_prompt = max(fitting.lengths)
    if total - kept > total / 10:
        logger.warning(
            "the length filter drops %d of %d problems; training.max_prompt_length is %d and the"
            " longest prompt has %d tokens",
            total - kept,
            total,
            limit,
            max(loaded.lengths),
        )
    check_recorded_columns(recipe, fitting.problems)
    steps = optimizer_steps(recipe, kept, facts.processes)
    sentences = [
        length_filter_summary(kept, total, limit),
        f"the longest prompt that is left has {facts.longest_prompt} tokens",
        f"{'about ' if steps.note else ''}{steps.count} optimizer steps",
        *fitting.notes,
    ]
    return "; ".join(sentences)


def _check_held_out(facts: Facts) -> str:
    from gtpo.data import load_held_out_problems, overlap_note

    problems = load_held_out_problems(facts.recipe, facts.tokenizer)
    if problems is None:
        return "none, so nothing is evaluated"
    note = overlap_note(problems, facts.problems) if facts.problems is not None else None
    return f"{len(problems)} problems{f'; {note}' if note else ''}"


def _check_prompt(facts: Facts) -> list[Finding]:
    from gtpo.models.prompt import check_prompts, read_prompt

    check_prompts(facts.tokenizer, facts.recipe, facts.problems, backend=facts.backend)
    prompt = read_prompt(
        facts.tokenizer,
        facts.problems[0]["prompt"],
        facts.recipe.training.chat_template_kwargs,
    )
    sentence = (
        f"the first has {len(prompt.ids)} tokens, and the completion begins after"
        f" {prompt.end[-40:]!r}"
    )
    details = {"prompt": without_secrets(prompt.text), "ids": prompt.ids}
    return [Finding("ok", "prompt", sentence, details)]


def _check_options(facts: Facts) -> str | list[Finding]:
    from gtpo.runs.trainers import try_options

    if facts.backend != "transformers" or facts.arguments.use_vllm:
        return []  # Unsloth and vLLM need a real model for that
    facts.arguments.report_to = []  # the check "trackers" looks at them
    with tempfile.TemporaryDirectory() as folder:
        facts.arguments.output_dir = folder
        try_options(facts.recipe, facts.arguments, facts.tokenizer, facts.problems)
    return "the trainer accepts all options of the training section"


def _check_rewards(facts: Facts) -> list[Finding]:
    from gtpo.gtpo_training import UnslothGTPOTrainer
    from gtpo.models.prompt import prompt_opening
    from gtpo.rewards.doctor import PROBLEMS, check_sum, diagnose

    recipe, count = facts.recipe, min(PROBLEMS, len(facts.problems))
    # problems from everywhere in the dataset
    rows = [facts.problems[i * len(facts.problems) // count] for i in range(count)]
    weights, trainer = recipe.training.reward_weights, facts.trainer_class or UnslothGTPOTrainer
    # GTPO leaves a completion out that one of the functions does not score.
    needs_all = issubclass(trainer, UnslothGTPOTrainer)
    findings = diagnose(
        recipe.trainer.reward_funcs,
        weights,
        rows,
        facts.tokenizer,
        recipe.rewards,
        prompt_opening=prompt_opening(
            facts.tokenizer, rows[0]["prompt"], recipe.training.chat_template_kwargs
        ),
        needs_all=needs_all,
    )
    return check_sum(findings, weights, rows, needs_all)


def _check_model(facts: Facts) -> str:
    from gtpo.models.backends import lora_config
    from gtpo.runs.memory import model_size

    section = facts.recipe.model
    adapter = section.adapter and Path(section.adapter)
    facts.model_size = model_size(section, lora_config(section, adapter))
    size = facts.model_size
    return f"{size.parameters:,} parameters in the base model, {size.adapter:,} in the adapter"


def _check_memory(facts: Facts) -> str:
    from gtpo.runs.memory import check_memory

    return check_memory(
        facts.recipe,
        facts.model_size,
        backend=facts.backend,
        processes=facts.processes,
        longest_prompt=facts.longest_prompt,
        optimizer_bytes=facts.optimizer_bytes,
    )


def _check_disk(facts: Facts) -> str:
    from gtpo.runs.memory import check_disk, checkpoint_bytes

    with tempfile.TemporaryDirectory() as folder:
        facts.tokenizer.save_pretrained(folder)
        tokenizer_bytes = sum(file.stat().st_size for file in Path(folder).iterdir())
    run_dir = Path(facts.recipe.output_dir())
    existing = next(path for path in (run_dir, *run_dir.absolute().parents) if path.is_dir())
    return check_disk(
        facts.recipe,
        checkpoint_bytes(facts.model_size, facts.optimizer_bytes, tokenizer_bytes),
        free=shutil.disk_usage(existing).free,
        problems=len(facts.problems),
        processes=facts.processes,
    )


class Check(NamedTuple):
    """One line of the table of checks.

    `run` returns a sentence, or findings of its own. It raises RecipeError for what would stop a
    run. What it logs as a warning becomes a finding too.
    """

    name: str
    needs: tuple[str, ...]  # checks above it that must have passed
    run: Callable[[Facts], str | list[Finding]]


# All the others need the first one.
# fmt: off
CHECKS = (
    Check("recipe",        (),                         _check_recipe),
    Check("run directory", (),                         _check_run_directory),
    Check("trackers",      (),                         _check_trackers),
    Check("model files",   (),                         _check_model_files),
    Check("data files",    (),                         _check_data_files),
    Check("hub token",     (),                         _check_hub_token),
    Check("backend",       (),                         _check_backend),
    Check("trainer",       ("backend",),               _check_trainer),
    Check("tokenizer",     ("model files", "backend"), _check_tokenizer),
    Check("chat template", ("tokenizer",),             _check_chat_template),
    Check("dataset",       ("chat template",),         _check_dataset),
    Check("held-out",      ("chat template",),         _check_held_out),
    Check("prompt",        ("dataset",),               _check_prompt),
    Check("options",       ("trainer", "dataset"),     _check_options),
    Check("rewards",       ("dataset",),               _check_rewards),
    Check("model",         ("model files", "backend"), _check_model),
    Check("memory",        ("dataset", "model"),       _check_memory),
    Check("disk",          ("dataset", "model"),       _check_disk),
)
# fmt: on


# ---- --check: running them


def run_checks(command: CommandLine, request: Request, processes: int) -> int:
    """Run all checks and print their findings; returns the exit code, 2 if a check failed.

    The findings are a line each, printed as they come, or with `--json` one JSON object.
    """
    out, printed = sys.stdout, []
    as_json = "json" in command.switches
    # What a user's module prints does not belong in the table.
    with contextlib.redirect_stdout(sys.stderr):
        for finding in findings(Facts(command, request, processes)):
            printed.append(finding)
            if not as_json:
                print(finding_line(finding, colour=out.isatty()), file=out, flush=True)
    if as_json:
        print(findings_as_json(printed), file=out)
    else:
        for prompt in (finding.details.get("prompt") for finding in printed):
            if prompt:
                print(f"{PROMPT}\n{printable(prompt)}\n{RULER}", file=out)
        print(conclusion(printed), file=out)
    return 2 if any(finding.verdict == "fail" for finding in printed) else 0


def findings(facts: Facts) -> Iterator[Finding]:
    """The findings of all checks, in order; those of the first alone if that one fails."""
    passed = set()
    for check in CHECKS:
        if missing := [name for name in check.needs if name not in passed]:
            yield Finding("warn", check.name, _not_checked(missing))
            continue
        with _logged_warnings() as warnings:
            results = _results(check, facts)
        yield from (Finding("warn", check.name, text) for text in warnings)
        yield from results
        if all(finding.verdict != "fail" for finding in results):
            passed.add(check.name)
        elif check is CHECKS[0]:
            return


def _results(check: Check, facts: Facts) -> list[Finding]:
    try:
        result = check.run(facts)
    except RecipeError as error:
        mistakes = with_sources(error, facts.command).mistakes
        return [Finding("fail", check.name, str(mistake)) for mistake in mistakes]
    except (Exception, SystemExit) as error:  # a user's code or a library may raise anything
        return [Finding("fail", check.name, f"{type(error).__name__}: {error}")]
    return result if isinstance(result, list) else [Finding("ok", check.name, result)]


def _not_checked(missing: list[str]) -> str:
    above = " and ".join(map(repr, missing))
    return f"not checked, because {above} above did not pass"


@contextlib.contextmanager
def _logged_warnings():
    """The warnings that GTPO logs inside, as a list. Nothing that it logs reaches the terminal."""
    warnings: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            warnings.append(record.getMessage().removeprefix("[GTPO] "))

    gtpo_logger, collector = logging.getLogger("gtpo"), Collector(logging.WARNING)
    gtpo_logger.addHandler(collector)
    propagate, gtpo_logger.propagate = gtpo_logger.propagate, False
    try:
        yield warnings
    finally:
        gtpo_logger.removeHandler(collector)
        gtpo_logger.propagate = propagate


# ---- --dry-run


def print_dry_run(recipe: Recipe, processes: int) -> None:
    """Print the resolved recipe on stdout, as YAML that can be used as a recipe again.

    What follows from its numbers goes to stderr: the batch, the steps, the lengths and the run
    directory.
    """
    check_local_files(recipe)
    values, secrets = recipe.saved()
    write_yaml(values, sys.stdout)
    sys.stdout.flush()
    log_batch_plan(recipe, batch_plan(recipe, processes), processes)
    run_dir = recipe.output_dir()
    lines = [
        _batch_per_step(recipe, processes),
        f"optimizer steps: {_steps_before_loading(recipe, processes)}",
        (
            f"max_completion_length: {recipe.max_completion_length} tokens, for prompts of at most"
            f" {recipe.max_prompt_length}"
        ),
        f"run directory: {run_dir}{' (it exists already)' if os.path.exists(run_dir) else ''}",
    ]
    if secrets:
        lines.append(f"secrets left out of the recipe above: {', '.join(secrets)}")
    print("\n".join(lines), file=sys.stderr)


def _steps_before_loading(recipe: Recipe, processes: int) -> str:
    steps = optimizer_steps(recipe, count_rows(recipe.dataset), processes)
    if steps is None:
        return "not known before the dataset is loaded"
    note = f" ({steps.note}, before the length filter)" if steps.note else ""
    return f"{steps.count}{note}"


def _batch_per_step(recipe: Recipe, processes: int) -> str:
    """`8 prompts x 8 completions per optimizer step`, and over how many processes."""
    prompts = batch_plan(recipe, processes).prompts_per_step
    several = f" (over {processes} processes)" if processes > 1 else ""
    return (
        f"{prompts:g} prompt{'' if prompts == 1 else 's'} x"
        f" {recipe.training.num_generations} completions per optimizer step{several}"
    )
