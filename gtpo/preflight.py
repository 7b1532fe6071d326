"""`--check` and `--dry-run`: what a run would do, and whether anything stands against it.

`--check` runs what can fail early, in a run's order and by the very code that a run calls, in under
a minute and without loading the model's weights.
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
from typing import Any

from gtpo.data import count_rows
from gtpo.errors import RecipeError
from gtpo.recipe import Recipe
from gtpo.recipe import command_line as cli
from gtpo.recipe.batch import batch_plan, log_batch_plan, optimizer_steps
from gtpo.recipe.yaml_text import write_yaml
from gtpo.runs.start import Request, resolve_start
from gtpo.system.console import Finding, conclusion, finding_line, findings_as_json
from gtpo.system.environment import set_environment
from gtpo.system.safe_text import without_secrets

logger = logging.getLogger(__name__)


@dataclass
class Facts:
    """What is known so far; None where nothing is, yet."""

    command: cli.CommandLine
    request: Request
    processes: int
    recipe: Recipe | None = None
    files: bool | None = None  # the model's are there
    backend: str | None = None
    arguments: Any = None  # TRL's
    tokenizer: Any = None
    problems: Any = None  # those to train on
    longest: int | None = None  # tokens of the longest prompt among them
    shape: Any = None
    optimizer: float = 8.0  # bytes per trained parameter


def _recipe(facts: Facts) -> str:
    from gtpo.models.saved import resolve_adapter

    recipe = cli.make_recipe(facts.command)
    set_environment(recipe.env)
    sys.argv = [without_secrets(word) for word in sys.argv]
    recipe = resolve_adapter(recipe)
    plan = batch_plan(recipe, facts.processes)
    facts.recipe = recipe
    return (
        f"{facts.command.recipe_file}: {plan.prompts_per_step:g} x"
        f" {recipe.training.num_generations} completions per optimizer step, of at most"
        f" {recipe.max_completion_length} tokens"
    )


def _run_directory(facts: Facts) -> str:
    start = resolve_start(facts.recipe, facts.request, facts.processes)
    if start.finished_steps is not None:
        return f"{start.run_dir} holds this run, finished after {start.finished_steps} steps"
    if start.checkpoint is not None:
        return f"{start.run_dir}: the run goes on after step {start.checkpoint.step}"
    return f"{start.run_dir} {'will be replaced' if start.run_dir.exists() else 'is free'}"


def _model_files(facts: Facts) -> str:
    from gtpo.models.base_model import check_model

    section = facts.recipe.model
    check_model(section.model_name)
    facts.files = True
    if section.trust_remote_code:
        logger.warning("model.trust_remote_code: Python code that comes with the model will be run")
    return (
        f"{section.model_name} is"
        f" {'a folder here' if os.path.isdir(section.model_name) else 'in the cache or on the hub'}"
    )


def _data_files(facts: Facts) -> str:
    from gtpo.data import check_held_out_source, check_source

    check_source(facts.recipe.dataset)
    check_held_out_source(facts.recipe)
    section = facts.recipe.dataset
    place = "a function" if section.kind == "function" else "in the cache or on the hub"
    return f"{section.path} is here" if section.path else f"{section.name} is {place}"


def _hub_token(facts: Facts) -> str:
    from gtpo.system.hub import token_status

    return token_status(facts.recipe.model.model_name)


def _backend(facts: Facts) -> str:
    import torch

    from gtpo.models.backends import prepare_backend

    facts.backend = prepare_backend(
        facts.recipe.model, facts.recipe.gtpo_runtime.torch_compile_options
    )
    device = (
        torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else f"a CPU, {torch.get_num_threads()} threads"
    )
    return f"{'Unsloth' if facts.backend == 'unsloth' else 'transformers + peft'} on {device}"


def _trainer(facts: Facts) -> str:
    from gtpo.runs.arguments import training_arguments
    from gtpo.runs.memory import optimizer_bytes
    from gtpo.runs.trainers import trainer_class

    trainer_class(facts.recipe)
    with tempfile.TemporaryDirectory() as folder:
        facts.arguments = training_arguments(facts.recipe, folder, processes=facts.processes)
    facts.optimizer = optimizer_bytes(facts.arguments.optim.value)
    return f"{facts.recipe.trainer.class_path}, with {facts.arguments.optim.value}"


def _tokenizer(facts: Facts) -> str:
    from gtpo.models.saved import training_tokenizer

    facts.tokenizer = training_tokenizer(facts.recipe.model, facts.backend)
    ends, pads = facts.tokenizer.eos_token, facts.tokenizer.pad_token
    return (
        f"{len(facts.tokenizer)} entries; the chat template works; ends with {ends!r}, pads with"
        f" {pads!r}"
    )


def _dataset(facts: Facts) -> str:
    import datasets

    from gtpo.data import drop_long_prompts, length_filter_summary, problems_with_lengths
    from gtpo.recipe.batch import check_enough_problems

    recipe, limit = facts.recipe, facts.recipe.max_prompt_length
    datasets.disable_progress_bars()
    problems = problems_with_lengths(
        recipe.dataset,
        facts.tokenizer,
        chat_template_kwargs=recipe.training.chat_template_kwargs,
    )
    fitting = drop_long_prompts(problems, limit)
    kept, total = len(fitting), len(problems)
    check_enough_problems(recipe, kept, facts.processes)
    facts.longest = max(fitting["prompt_length"])
    facts.problems = fitting.remove_columns("prompt_length")
    if total - kept > total / 10:
        logger.warning(
            "the length filter drops %d of %d problems; training.max_prompt_length is %d and the"
            " longest prompt has %d tokens",
            total - kept,
            total,
            limit,
            max(problems["prompt_length"]),
        )
    steps = optimizer_steps(recipe, kept, facts.processes)
    return (
        f"{length_filter_summary(kept, total, limit)}; the longest prompt that is left has"
        f" {facts.longest}; {'about ' if steps.note else ''}{steps.count} optimizer steps"
    )


def _options(facts: Facts) -> str | list[Finding]:
    from gtpo.runs.trainers import try_options

    if facts.backend != "transformers" or facts.arguments.use_vllm:
        return []  # Unsloth and vLLM would want a real model
    facts.arguments.report_to = []  # there is a check for trackers
    with tempfile.TemporaryDirectory() as facts.arguments.output_dir:
        try_options(facts.recipe, facts.arguments, facts.tokenizer, facts.problems)
    return "the trainer takes them"


def _held_out(facts: Facts) -> str:
    from gtpo.data import load_held_out_problems

    held_out = load_held_out_problems(facts.recipe, facts.tokenizer)
    return "none: nothing is evaluated" if held_out is None else f"{len(held_out)} problems"


def _rewards(facts: Facts) -> list[Finding]:
    from gtpo.rewards.doctor import PROBLEMS, diagnose

    recipe, count = facts.recipe, min(PROBLEMS, len(facts.problems))
    # from all over the data
    rows = [facts.problems[i * len(facts.problems) // count] for i in range(count)]
    return diagnose(
        recipe.trainer.reward_funcs,
        recipe.training.reward_weights,
        rows,
        facts.tokenizer,
        recipe.rewards,
    )


def _model(facts: Facts) -> str:
    from gtpo.models.backends import lora_config
    from gtpo.runs.memory import shape

    adapter = facts.recipe.model.adapter
    facts.shape = shape(
        facts.recipe.model, lora_config(facts.recipe.model, adapter and Path(adapter))
    )
    return f"{facts.shape.parameters:,} parameters, and {facts.shape.adapter:,} in the adapter"


def _memory(facts: Facts) -> str:
    from gtpo.runs.memory import check_memory

    return check_memory(
        facts.recipe,
        facts.shape,
        backend=facts.backend,
        processes=facts.processes,
        longest=facts.longest,
        optimizer=facts.optimizer,
    )


def _disk(facts: Facts) -> str:
    from gtpo.runs.memory import check_disk, checkpoint

    with tempfile.TemporaryDirectory() as folder:
        facts.tokenizer.save_pretrained(folder)
        tokenizer = sum(file.stat().st_size for file in Path(folder).iterdir())
    run_dir = Path(facts.recipe.output_dir())
    there = next(folder for folder in (run_dir, *run_dir.absolute().parents) if folder.is_dir())
    return check_disk(
        facts.recipe,
        checkpoint(facts.shape, facts.optimizer, tokenizer),
        free=shutil.disk_usage(there).free,
        problems=len(facts.problems),
        processes=facts.processes,
    )


def _trackers(facts: Facts) -> str:
    from gtpo.runs.trackers import prepare_trackers

    prepare_trackers(facts.recipe, Path(facts.recipe.output_dir()))
    trackers = [tracker for tracker in facts.recipe.training.report_to if tracker != "none"]
    offline = "wandb" in trackers and os.environ.get("WANDB_MODE") in ("offline", "disabled")
    return f"{' and '.join(trackers) or 'none'}{', offline' if offline else ', with a login' if 'wandb' in trackers else ''}"


# name, facts it needs, check
STEPS: list[tuple[str, tuple[str, ...], Callable[[Facts], str | list[Finding]]]] = [
    ("recipe", (), _recipe),
    ("run directory", ("recipe",), _run_directory),
    ("trackers", ("recipe",), _trackers),
    ("model files", ("recipe",), _model_files),
    ("data files", ("recipe",), _data_files),
    ("hub token", ("recipe",), _hub_token),
    ("backend", ("recipe",), _backend),
    ("trainer", ("recipe", "backend"), _trainer),
    ("tokenizer", ("recipe", "files", "backend"), _tokenizer),
    ("dataset", ("recipe", "tokenizer"), _dataset),
    ("held-out", ("recipe", "tokenizer"), _held_out),
    ("options", ("recipe", "arguments", "problems"), _options),
    ("rewards", ("recipe", "problems"), _rewards),
    ("model", ("recipe", "files", "backend"), _model),
    ("memory", ("recipe", "shape", "longest"), _memory),
    ("disk", ("recipe", "shape", "problems"), _disk),
]


def check(command: cli.CommandLine, request: Request, processes: int) -> int:
    """Print what was found, a line each as it is found or all as JSON; returns the exit code."""
    out, found = sys.stdout, []
    asked = "json" in command.switches
    # what somebody's module prints belongs to no table
    with contextlib.redirect_stdout(sys.stderr):
        for finding in findings(Facts(command, request, processes)):
            found.append(finding)
            if not asked:
                print(finding_line(finding, colour=out.isatty()), file=out, flush=True)
    print(findings_as_json(found) if asked else conclusion(found), file=out)
    return 2 if any(finding.verdict == "fail" for finding in found) else 0


def findings(facts: Facts) -> Iterator[Finding]:
    for name, needed, step in STEPS:
        if any(getattr(facts, fact) is None for fact in needed):
            if facts.recipe is not None:
                yield Finding("warn", name, "not checked, since what it needs has failed above")
            continue
        with _warnings() as warned:
            try:
                said = step(facts)
                made = said if isinstance(said, list) else [Finding("ok", name, said)]
            except RecipeError as error:
                made = [Finding("fail", name, sentence) for sentence in str(error).split("\n")]
            # somebody's code, or a library's: what it raises is what was to be found
            except (Exception, SystemExit) as error:
                made = [Finding("fail", name, f"{type(error).__name__}: {error}")]
        yield from (Finding("warn", name, text.removeprefix("[GTPO] ")) for text in warned)
        yield from made


@contextlib.contextmanager
def _warnings():
    """The warnings that our modules log inside, as a list; nothing they log reaches the
    terminal.
    """
    texts: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    ours, keep = logging.getLogger("gtpo"), Keep(logging.WARNING)
    ours.addHandler(keep)
    propagate, ours.propagate = ours.propagate, False
    try:
        yield texts
    finally:
        ours.removeHandler(keep)
        ours.propagate = propagate


# ---- --dry-run


def print_plan(recipe: Recipe, processes: int) -> None:
    """The resolved recipe on stdout, as YAML that can be fed back in; what it would do on
    stderr.
    """
    values, secrets = recipe.saved()
    write_yaml(values, sys.stdout)
    sys.stdout.flush()
    plan = batch_plan(recipe, processes)
    log_batch_plan(recipe, plan, processes)
    steps = optimizer_steps(recipe, count_rows(recipe.dataset), processes)
    total = "known when the dataset is loaded"
    if steps is not None:
        note = f" ({steps.note}, before the length filter)" if steps.note else ""
        total = f"{steps.count}{note}"
    run_dir = recipe.output_dir()
    lines = [
        (
            f"{plan.prompts_per_step:g} prompt{'' if plan.prompts_per_step == 1 else 's'} x"
            f" {recipe.training.num_generations} generations per optimizer"
            f" step{f' ({processes} processes)' if processes > 1 else ''}"
        ),
        f"steps: {total}",
        (
            f"max_completion_length: {recipe.max_completion_length} tokens, after prompts of at"
            f" most {recipe.max_prompt_length}"
        ),
        f"run directory: {run_dir}{' (exists already)' if os.path.exists(run_dir) else ''}",
    ]
    if secrets:
        lines.append(f"left out of the recipe above: {', '.join(secrets)}")
    print("\n".join(lines), file=sys.stderr)
