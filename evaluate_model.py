"""Draw completions from a model or a run, grade them as the reward does, and print the scores.

    python evaluate_model.py RUN_DIR_OR_MODEL [--dataset gsm8k|hendrycks_math|FILE] [--split test]
    [--k 1 4 8] [--base] ...

`--help` lists the flags. Every completion is kept in evaluation/*.jsonl. After an interruption the
same command continues there. `--from FILE` computes the scores again without a model. Exit code 2:
the evaluation is not possible, and no file was overwritten.
"""

import argparse
import difflib
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from gtpo.errors import Mistake, RecipeError
from gtpo.recipe.sections import DATASET_ALIASES
from gtpo.system.console import log_to_console, print_ending
from gtpo.system.environment import set_environment

FLAG_OF_KEY = {  # the flag that stands for a recipe's key, which errors name
    "dataset.name": "--dataset",
    "dataset.split": "--split",
    "dataset.subset": "--subset",
    "dataset.subsets": "--subset",
    "dataset.question_column": "--question-column",
    "dataset.answer_column": "--answer-column",
    "dataset.system_instruction": "--system-instruction",
    "dataset.system_role": "--system-role",
    "evaluation.batch_size": "--batch-size",
    "model.backend": "--backend",
    "model.chat_template": "--chat-template",
    "training.chat_template_kwargs": "--chat-template-kwargs",
    "training.max_prompt_length": "--max-prompt-length",
    "null": '""',  # the value of --system-instruction for none
}
VLLM_BATCH = 1024  # completions between two updates of the bar; vLLM forms its own batches
CHAT_LENGTH = 4096  # tokens of a conversation, unless the run was trained with longer sequences


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    flags = None
    with log_to_console():
        try:
            flags = parse_flags(sys.argv[1:] if argv is None else argv)
            _run(flags)
        except RecipeError as error:
            print_ending("error", _in_flags(error, flags))
            return 2
        except KeyboardInterrupt:
            print(
                "\ninterrupted: drawn completions are kept; the same command continues from there",
                file=sys.stderr,
            )
            return 130
    return 0


def _run(flags: argparse.Namespace) -> None:
    if flags.files:
        _print_scores_of_files(flags)
        return
    from gtpo.models.saved import find_saved
    from gtpo.recipe.dotted_paths import make_importable

    saved = find_saved(flags.target)
    make_importable(Path.cwd())
    _set_environment(saved)
    if flags.chat:
        _chat(flags, saved)
    else:
        _evaluate(flags, saved)


def _set_environment(saved) -> None:
    """Sets the run's environment variables, before torch is imported.

    The caller's own variables, CUDA_VISIBLE_DEVICES for instance, take precedence over the run's.
    """
    env = saved.recipe.env if saved.recipe else {}
    set_environment({name: value for name, value in env.items() if name not in os.environ})


def _print_scores_of_files(flags: argparse.Namespace) -> None:
    from gtpo.evaluation.file import read_evaluation
    from gtpo.evaluation.scores import scores_as_text

    _refuse_other_flags(flags, "--from", "files", "k")
    if len(flags.files) > 2:
        raise RecipeError("--from", f"{len(flags.files)} files; give one, or two to compare")
    evaluations = {str(file): read_evaluation(file) for file in flags.files}
    for name, evaluation in evaluations.items():
        if evaluation.cut:
            raise RecipeError(
                name,
                "its last line is incomplete; run the command that wrote the file again, or delete"
                " the line",
            )
    print(scores_as_text(evaluations, flags.k))


def _evaluate(flags: argparse.Namespace, saved) -> None:
    from gtpo.data import check_source
    from gtpo.evaluation.draw import evaluate, rendered_prompts
    from gtpo.evaluation.engines import Engine
    from gtpo.evaluation.file import Evaluation
    from gtpo.evaluation.plan import make_plan
    from gtpo.evaluation.scores import scores_as_text
    from gtpo.models.prompt import check_token_ids, prompt_opening, unreadable_ids

    plan = make_plan(flags, saved)
    if flags.base and saved.adapter is None:
        raise RecipeError("--base", f"{flags.target} is a base model itself; leave it out")
    check_source(plan.section)
    engine = Engine(saved, flags.backend, flags.chat_template)
    samplers = engine.samplers(plan.sampling, plan.max_prompt_length)
    section, options = plan.section, plan.chat_template_kwargs
    _check_template(engine, section.system_instruction, section.system_role, options)
    problems = _load_problems(plan, engine.tokenizer)
    check_token_ids(
        engine.tokenizer,
        unreadable_ids(engine.tokenizer, engine.section),
        problems["prompt"],
        options,
    )
    prompts = rendered_prompts(problems, engine.tokenizer, options)
    opening = prompt_opening(engine.tokenizer, problems[0]["prompt"], options)
    files = _open_files(flags, saved, plan, engine, problems, prompts, opening)
    batch_size = plan.batch_size
    if engine.backend == "vllm" and not flags.batch_size:
        batch_size = max(batch_size, VLLM_BATCH)
    for name, file in files.items():
        _say_what_is_there(file)
        if file.missing:
            sampler = samplers(name == "trained")
            evaluate(file, sampler, problems, prompts, batch_size=batch_size)
    evaluations = {name: Evaluation(file.header, file.rows) for name, file in files.items()}
    print(scores_as_text(evaluations, plan.ks))
    for file in files.values():
        print(f"Completions: {file.path}")


def _check_template(engine, instruction: str | None, role: str, options: dict) -> None:
    """Raises RecipeError if the chat template or the tokenizer cannot make prompts; loads nothing.

    What the model was trained with all the same is a warning.
    """
    from gtpo.models.prompt import check_embedding, check_template

    check_template(engine.tokenizer, instruction, role, options, strict=False)
    check_embedding(engine.tokenizer, engine.section, engine.backend)


def _load_problems(plan, tokenizer):
    """The plan's problems without those whose prompt is too long, in the order of the dataset."""
    from gtpo.data import load_problems

    problems = load_problems(
        plan.section,
        tokenizer,
        plan.max_prompt_length,
        seed=0,
        shuffle=False,
        label="Problems",
        chat_template_kwargs=plan.chat_template_kwargs,
        other_columns=False,
    )
    count = min(plan.limit or len(problems), len(problems))
    return problems.select(range(count))


def _open_files(
    flags: argparse.Namespace, saved, plan, engine, problems, prompts, opening: str
) -> dict:
    """The evaluation files by the title of their column: trained, base, or model if it has no
    adapter.
    """
    from gtpo.evaluation.plan import open_file

    if saved.adapter is None:
        adapter_of_title = {"model": False}
    elif flags.base:
        adapter_of_title = {"trained": True, "base": False}
    else:
        adapter_of_title = {"trained": True}
    return {
        title: open_file(
            flags,
            saved,
            plan,
            engine.backend,
            engine.tokenizer,
            problems,
            prompts,
            adapter=adapter,
            prompt_opening=opening,
        )
        for title, adapter in adapter_of_title.items()
    }


def _say_what_is_there(file) -> None:
    """Prints what the evaluation file already has, if anything."""
    if not file.missing:
        print(
            f"{file.path} is complete, so nothing is drawn (--overwrite draws it again)",
            file=sys.stderr,
        )
    elif file.rows:
        cut = "; the last line was incomplete and is drawn again" if file.cut else ""
        print(f"{file.path}: continuing after {len(file.rows)} completions{cut}", file=sys.stderr)


def _chat(flags: argparse.Namespace, saved) -> None:
    from gtpo.evaluation.chat import chat
    from gtpo.evaluation.engines import Engine
    from gtpo.evaluation.plan import (
        chat_sampling,
        system_instruction,
        system_role,
        template_options,
    )

    drawing = ("temperature", "top_p", "seed", "max_completion_length")
    model = ("target", "backend", "chat_template", "chat_template_kwargs")
    system = ("system_instruction", "system_role")
    _refuse_other_flags(flags, "--chat", "chat", *drawing, *model, *system)
    if flags.backend == "vllm":
        raise RecipeError("--backend", "vllm cannot chat; use auto, unsloth or transformers")
    engine = Engine(saved, flags.backend, flags.chat_template, conversation=True)
    length = max(CHAT_LENGTH, saved.section.max_seq_length)
    context = min(engine.context or CHAT_LENGTH, length)
    instruction, role = system_instruction(flags, saved.recipe), system_role(flags, saved.recipe)
    options = template_options(flags, saved.recipe)
    _check_template(engine, instruction, role, options)
    chat(
        engine.policy(context),
        chat_sampling(flags, saved.recipe),
        context=context,
        system_instruction=instruction,
        system_role=role,
        chat_template_kwargs=options,
    )


# ---- flags


def parser() -> argparse.ArgumentParser:
    """Returns the parser of the command line. A flag that is not given is None."""
    made = _Parser(
        usage="python evaluate_model.py RUN_DIR_OR_MODEL [flags]",
        allow_abbrev=False,
        description=__doc__.split("\n\n")[0],
        epilog=(
            "Defaults are those of the run's recipe.yaml. Without a recipe, prompts and completions"
            " have at most 1024 tokens each."
        ),
    )
    count, add = _number(int, 1), made.add_argument
    # fmt: off
    add("target", nargs="?", metavar="RUN_DIR_OR_MODEL",
        help="folder of a run, checkpoint, adapter or base model; or a hub name")
    add("--dataset",
        help="gsm8k, hendrycks_math, a dataset of the hub as owner/name, a jsonl, json, csv or"
             " parquet file, or the dotted path of a function; default: the run's own problems")
    add("--path", help="local files of gsm8k or hendrycks_math, laid out as on the hub")
    add("--split", help="default: test; slices such as test[:100] work")
    add("--subset", nargs="+", help="subsets of hendrycks_math; default: all")
    add("--question-column", help="column of a file with the question; default: question")
    add("--answer-column", help="column of a file with the answer; default: answer")
    add("--system-instruction", help='system message of every prompt; "" for none')
    add("--system-role", choices=["system", "user"],
        help="user puts the system message at the start of the user's message")
    add("--limit", type=count, help="number of problems, from the first; default: all")
    add("--k", type=count, nargs="+",
        help="the k of pass@k and maj@k; default: 2, 4, 8, ... up to the samples")
    add("--samples", type=count, help="completions per problem; default: the largest k, or 1")
    add("--temperature", type=_number(float, 0),
        help="default: 0 (greedy) for one sample, else the training's, which is 1.0 unless set")
    add("--top-p", type=_number(float, 1e-6, 1), help="default: 1.0")
    add("--seed", type=_number(int, 0), help="seed of the draws")
    add("--max-prompt-length", type=count,
        help="tokens; longer prompts are left out, and their number is printed")
    add("--max-completion-length", type=count, help="tokens")
    add("--base", action="store_true",
        help="evaluate the base model too, on the same problems and seeds, and compare")
    add("--backend", choices=["auto", "vllm", "unsloth", "transformers"],
        help="default: auto, which is vLLM or Unsloth with a GPU, else transformers")
    add("--batch-size", type=count, help="completions drawn at a time")
    add("--chat-template", help="Jinja chat template (text or file) for a model without one")
    add("--chat-template-kwargs", type=_mapping, metavar="MAPPING",
        help="options of the chat template, such as '{enable_thinking: false}'")
    add("--to", type=Path, metavar="FILE",
        help="file of the completions; default: in evaluation/ of the run, or of this directory")
    add("--overwrite", action="store_true", help="replace that file")
    add("--from", dest="files", type=Path, nargs="+", metavar="FILE",
        help="compute the scores of a file without a model; of two files, also their difference")
    add("--chat", action="store_true", help="talk to the model in the terminal")
    # fmt: on
    return made


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        """Raises argparse's `argument --flag: sentence` as a RecipeError."""
        flag, colon, sentence = message.removeprefix("argument ").partition(": ")
        raise RecipeError(flag, sentence) if colon else RecipeError(flag)


def parse_flags(argv: list[str]) -> argparse.Namespace:
    """The values of the flags; raises RecipeError for unknown flags and invalid values."""
    flag_parser = parser()
    # --max_prompt_length is another spelling of --max-prompt-length.
    words = [re.sub("^--[a-z_]+", lambda flag: flag[0].replace("_", "-"), word) for word in argv]
    flags, unknown = flag_parser.parse_known_args(words)
    for word in unknown:
        nearest = difflib.get_close_matches(
            word.split("=")[0], flag_parser._option_string_actions, 1
        )
        if word.startswith("-") and nearest:
            raise RecipeError(word, f"unknown; did you mean {nearest[0]}?")
        raise RecipeError(word, "unknown; --help lists the flags")
    if flags.target is None and not flags.files:
        raise RecipeError(
            "RUN_DIR_OR_MODEL",
            "missing; give a run directory, checkpoint, adapter or base model, or --from FILE",
        )
    return flags


def _number(convert: type, least: float, most: float = float("inf")) -> Callable[[str], float]:
    """A type for argparse: a finite int or float from `least` to `most`."""

    def read(text: str):
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most or value == float("inf"):
            noun = "a whole number" if convert is int else "a number"
            bounds = f"{least:g} or more" if most == float("inf") else f"{least:g} to {most:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not valid; use {noun}, {bounds}")
        return value

    return read


def _mapping(text: str) -> dict:
    """A type for argparse: a mapping in YAML, which JSON is too."""
    from gtpo.recipe.sections import check_template_options
    from gtpo.recipe.yaml_text import YamlError, parse_yaml

    try:
        value = parse_yaml(text)
        check_template_options(value)
    except (RecipeError, YamlError) as error:
        mistakes = getattr(error, "mistakes", None)
        raise argparse.ArgumentTypeError(
            mistakes[0].sentence if mistakes else f"{text!r} is no YAML ({error})"
        ) from None
    return value or {}


def _refuse_other_flags(flags: argparse.Namespace, flag: str, *allowed: str) -> None:
    """Raises RecipeError if a flag that has no effect beside `flag` was given."""
    for name, value in vars(flags).items():
        if value is not None and value is not False and name not in allowed:
            given = value if name == "target" else f"--{name.replace('_', '-')}"
            raise RecipeError(flag, f"{given} has no effect here; leave it out")


def _in_flags(error: RecipeError, flags: argparse.Namespace | None) -> RecipeError:
    """`error` with this command's flags in place of a recipe's keys."""
    path_is_a_flag = flags and flags.dataset in DATASET_ALIASES
    flag_of_key = FLAG_OF_KEY | {"dataset.path": "--path" if path_is_a_flag else "--dataset"}

    def with_flags(sentence: str) -> str:
        return re.sub(r"[\w./-]+", lambda word: flag_of_key.get(word[0], word[0]), sentence)

    return RecipeError.of(
        Mistake(flag_of_key.get(mistake.key, mistake.key), with_flags(mistake.sentence))
        for mistake in error.mistakes
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
