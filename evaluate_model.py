"""Sample completions from a model or a run, grade them as the reward does, and print pass@k, maj@k
and more.

    python evaluate_model.py RUN_DIR_OR_MODEL [--dataset gsm8k|hendrycks_math|FILE] [--split test]
    [--k 1 4 8] [--base] ...

`--help` lists the flags. Every completion is kept in evaluation/*.jsonl: the same command goes on
where it was interrupted, and `--from FILE` computes the numbers again without a model. Exit code 2:
it cannot be done, and nothing was overwritten.
"""

import argparse
import difflib
import os
import re
import sys
from pathlib import Path

from gtpo.errors import Mistake, RecipeError
from gtpo.recipe.sections import DATASET_ALIASES
from gtpo.system.console import log_to_console, print_ending
from gtpo.system.environment import set_environment

FLAGS = {  # how a recipe's keys, in sentences of the parts, are called here
    "dataset.name": "--dataset",
    "dataset.split": "--split",
    "dataset.subsets": "--subset",
    "model.backend": "--backend",
    "dataset.question_column": "--question-column",
    "dataset.answer_column": "--answer-column",
    "batch_size": "--batch-size",
    "training.max_prompt_length": "--max-prompt-length",
    "model.chat_template": "--chat-template",
}
VLLM_BATCH = 1024  # completions between two looks at the progress; vLLM makes its own batches
# tokens of a conversation, or what the run was trained with, within the model's context
CHAT_LENGTH = 4096


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    asked = None
    with log_to_console():
        try:
            asked = _parse(sys.argv[1:] if argv is None else argv)
            _run(asked)
        except RecipeError as error:
            print_ending("error", _in_flags(error, asked))
            return 2
        except KeyboardInterrupt:
            print(
                "\ninterrupted: what was drawn is kept, and the same command goes on from there",
                file=sys.stderr,
            )
            return 130
    return 0


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise _flag_error(message)


def parser() -> argparse.ArgumentParser:
    """The flags; None where not given."""
    made = _Parser(
        usage="python evaluate_model.py RUN_DIR_OR_MODEL [flags]",
        allow_abbrev=False,
        description=__doc__.split("\n\n")[0],
        epilog=(
            "Defaults are those of the run's recipe.yaml; without one: prompts and completions of"
            " at most 1024 tokens each."
        ),
    )
    count, add = _number(int, 1), made.add_argument
    add(
        "target",
        nargs="?",
        metavar="RUN_DIR_OR_MODEL",
        help="a run, checkpoint, adapter or base model (folder or hub name)",
    )
    add(
        "--dataset",
        help=(
            "gsm8k, hendrycks_math, a jsonl, json or parquet file, or a dotted path; default: the"
            " run's own"
        ),
    )
    add(
        "--path",
        help="the files of gsm8k or hendrycks_math in the hub's layout, instead of the hub",
    )
    add("--split", help="default: test; slices such as test[:100] work")
    add("--subset", nargs="+", help="some subsets of hendrycks_math; default: all")
    add("--question-column", help="column of a file that holds the question; default: question")
    add("--answer-column", help="column of a file that holds the answer; default: answer")
    add("--system-instruction", help='system message of every prompt; "" for none')
    add("--limit", type=count, help="how many problems, from the first")
    add(
        "--k",
        type=count,
        nargs="+",
        help="which pass@k and maj@k; default: 2, 4, 8, ... up to the samples",
    )
    add("--samples", type=count, help="completions per problem; default: the largest k, or 1")
    add(
        "--temperature",
        type=_number(float, 0),
        help="default: 0 (greedy) for one sample, else the training's, 1.0",
    )
    add("--top-p", type=_number(float, 1e-6, 1), help="default: 1.0")
    add("--seed", type=_number(int, 0), help="of the draws")
    add("--max-prompt-length", type=count, help="longer prompts are dropped, and counted; tokens")
    add("--max-completion-length", type=count, help="tokens")
    add(
        "--base",
        action="store_true",
        help="evaluate the base model too, on the same problems and seeds, and compare",
    )
    add(
        "--backend",
        choices=["auto", "vllm", "unsloth", "transformers"],
        help="default: auto, vLLM or Unsloth with a GPU",
    )
    add("--batch-size", type=count, help="completions at a time")
    add("--chat-template", help="Jinja chat template, text or file, for base models that have none")
    add(
        "--to",
        type=Path,
        metavar="FILE",
        help="where completions go; default: in evaluation/ of the run, or here",
    )
    add("--overwrite", action="store_true", help="begin that file anew")
    add(
        "--from",
        dest="files",
        type=Path,
        nargs="+",
        metavar="FILE",
        help=(
            "compute the numbers from a file, without a model; with a second one, also the"
            " differences"
        ),
    )
    add("--chat", action="store_true", help="talk to the model in the terminal")
    return made


def _parse(argv: list[str]) -> argparse.Namespace:
    """The flags' values; raises RecipeError for what makes no sense."""
    flags = parser()
    words = [re.sub("^--[a-z_]+", lambda flag: flag[0].replace("_", "-"), word) for word in argv]
    asked, unknown = flags.parse_known_args(words)
    for word in unknown:
        known = (
            difflib.get_close_matches(word.split("=")[0], flags._option_string_actions, 1)
            if word.startswith("-")
            else []
        )
        raise RecipeError(
            word, f"unknown; {f'did you mean {known[0]}?' if known else '--help lists the flags'}"
        )
    if asked.target is None and not asked.files:
        raise RecipeError(
            "RUN_DIR_OR_MODEL",
            "missing; give a run directory, checkpoint, adapter or base model, or --from FILE",
        )
    return asked


def _number(kind: type, least: float, most: float = float("inf")):
    def read(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most or value == float("inf"):
            bounds = f"{least:g} or more" if most == float("inf") else f"{least:g} to {most:g}"
            raise argparse.ArgumentTypeError(
                f"{text!r} is not valid; use a {'whole ' if kind is int else ''}number, {bounds}"
            )
        return value

    return read


def _run(asked: argparse.Namespace) -> None:
    if asked.files:
        _from_files(asked)
        return
    from gtpo.models.saved import find_saved
    from gtpo.recipe.dotted_paths import make_importable

    saved = find_saved(asked.target)
    make_importable(Path.cwd())
    env = saved.recipe.env if saved.recipe else {}
    # Before torch; what the caller has set, CUDA_VISIBLE_DEVICES for one, beats what the run was
    # trained with.
    set_environment({name: value for name, value in env.items() if name not in os.environ})
    (_chat if asked.chat else _evaluate)(asked, saved)


def _from_files(asked: argparse.Namespace) -> None:
    from gtpo.evaluation.file import read_evaluation
    from gtpo.evaluation.scores import report

    _allow(asked, "--from", "files", "k")
    if len(asked.files) > 2:
        raise RecipeError("--from", f"{len(asked.files)} files; give one, or two to compare")
    held = {str(file): read_evaluation(file) for file in asked.files}
    if cut := [name for name, evaluation in held.items() if evaluation.cut]:
        raise RecipeError(
            cut[0],
            "its last line was cut; the command that wrote it draws that again, or take the line"
            " away",
        )
    print(report(held, asked.k))


def _allow(asked: argparse.Namespace, flag: str, *names: str) -> None:
    """Raises RecipeError for a flag that means nothing beside `flag`."""
    for name, value in vars(asked).items():
        if value is not None and value is not False and name not in names:
            told = value if name == "target" else f"--{name.replace('_', '-')}"
            raise RecipeError(flag, f"{told} means nothing here; leave it out")


def _evaluate(asked: argparse.Namespace, saved) -> None:
    from gtpo.data import check_source, load_problems
    from gtpo.evaluation import draw as evaluation
    from gtpo.evaluation import plan as evaluation_plan
    from gtpo.evaluation.engines import Engine
    from gtpo.evaluation.file import Evaluation
    from gtpo.evaluation.scores import report

    plan = evaluation_plan.make_plan(asked, saved)
    if asked.base and saved.adapter is None:
        raise RecipeError("--base", f"{asked.target} is a base model itself; leave it out")
    check_source(plan.section)
    engine = Engine(saved, asked.backend, asked.chat_template)
    samplers = engine.samplers(plan.sampling, plan.max_prompt_length)
    problems = load_problems(
        plan.section,
        engine.tokenizer,
        plan.max_prompt_length,
        0,
        shuffle=False,
        label="Problems",
        chat_template_kwargs=plan.chat_template_kwargs,
    )
    problems = problems.select(range(min(plan.limit or len(problems), len(problems))))
    prompts = evaluation.rendered_prompts(problems, engine.tokenizer, plan.chat_template_kwargs)
    files = {}
    for name, adapter in (("trained", True), ("base" if saved.adapter else "model", False)):
        if asked.base or adapter == (saved.adapter is not None):
            files[name] = evaluation_plan.open_file(
                asked, saved, plan, engine.backend, problems, prompts, adapter=adapter
            )
    batch_size = asked.batch_size or max(
        plan.batch_size, VLLM_BATCH if engine.backend == "vllm" else 1
    )
    for name, file in files.items():
        if not file.missing:
            print(
                f"{file.path} is complete: nothing is drawn again (--overwrite does)",
                file=sys.stderr,
            )
            continue
        if file.rows:
            cut = "; the last line was cut, and is drawn again" if file.cut else ""
            print(f"{file.path}: going on after {len(file.rows)} completions{cut}", file=sys.stderr)
        evaluation.evaluate(
            file, samplers(name == "trained"), problems, prompts, batch_size=batch_size
        )
    print(
        report(
            {name: Evaluation(file.header, file.rows, False, 0) for name, file in files.items()},
            plan.ks,
        )
    )
    print(*(f"Completions: {file.path}" for file in files.values()), sep="\n")


def _chat(asked: argparse.Namespace, saved) -> None:
    from gtpo.evaluation.chat import chat
    from gtpo.evaluation.engines import Engine
    from gtpo.evaluation.plan import chat_sampling, system_instruction

    _allow(
        asked,
        "--chat",
        "target",
        "chat",
        "system_instruction",
        "temperature",
        "top_p",
        "seed",
        "max_completion_length",
        "backend",
        "chat_template",
    )
    if asked.backend == "vllm":
        raise RecipeError(
            "--backend", "vllm holds no conversations here; use auto, unsloth or transformers"
        )
    engine = Engine(saved, asked.backend, asked.chat_template, conversation=True)
    context = min(engine.context or CHAT_LENGTH, max(CHAT_LENGTH, saved.section.max_seq_length))
    chat(
        engine.policy(context),
        chat_sampling(asked, saved.recipe),
        context=context,
        system_instruction=system_instruction(asked, saved.recipe),
        chat_template_kwargs=saved.recipe and saved.recipe.training.chat_template_kwargs,
    )


def _flag_error(message: str) -> RecipeError:
    """argparse's `argument --flag: sentence` as our error."""
    flag, colon, sentence = message.removeprefix("argument ").partition(": ")
    return RecipeError(flag, sentence) if colon else RecipeError(flag)


def _in_flags(error: RecipeError, asked: argparse.Namespace | None) -> RecipeError:
    """`error` about a recipe's keys, told with the flags that stand for them here."""
    names = FLAGS | {
        "dataset.path": "--path" if asked and asked.dataset in DATASET_ALIASES else "--dataset"
    }
    mentioned = re.compile(r"(?<![\w./-])(" + "|".join(map(re.escape, names)) + r")(?![\w.])")
    return RecipeError.of(
        Mistake(
            names.get(mistake.key, mistake.key),
            mentioned.sub(lambda key: names[key[0]], mistake.sentence),
        )
        for mistake in error.mistakes
    )


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader went away
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
