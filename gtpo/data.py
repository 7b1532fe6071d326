"""Datasets as problems: add a dataset here.

A problem is a row with these columns:

- `prompt`: messages, the last of which is the user's
- `answer`: the bare final answer, a text
- `reference`: the reasoning and the answer, each between its tags
- the row's other columns under their own names, for rewards

Your own data needs no code here. Set `dataset.path` to a file or `dataset.name` to a dataset of the
hub, and name its two columns. Or set `dataset.name` to the dotted path of a function that returns
rows.

To add a dataset that recipes can name:

1. Write a function that turns a text of its answer column into a reference, like `gsm8k_reference`.
2. Add a `Source` with that function to DATASETS.
3. Add the name to DATASET_ALIASES in gtpo/recipe/sections.py, with the spellings that users write.
"""

import contextlib
import logging
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gtpo.answers import boxed_answer, format_reference, gsm8k_answer, references
from gtpo.answers.problem import (
    Columns,
    ProblemReader,
    find_columns,
    missing_columns,
    top_column,
)
from gtpo.errors import Mistake, RecipeError
from gtpo.recipe import Recipe
from gtpo.recipe.batch import check_enough_problems
from gtpo.recipe.dotted_paths import load_object
from gtpo.recipe.sections import HUB_NAME, DatasetSection
from gtpo.system import data_files

logger = logging.getLogger(__name__)

# Columns of a problem, and names that trl 1.13.0 reads from a row or hands to rewards itself, in
# GRPOTrainer._generate_and_score_completions and GRPOTrainer._calculate_rewards.
RESERVED = frozenset(
    ["prompt", "answer", "reference"]
    + ["prompts", "completion", "completions", "completion_ids", "trainer_state"]
    + ["log_extra", "log_metric", "image", "images", "environment", "environments"]
    + ["prompt_opening"]  # of GTPO
)


# ---- known datasets


class Source(NamedTuple):
    """A known dataset: where it is on the hub, and how its rows read."""

    hub_name: str
    subsets: list[str]  # its configurations, in the order in which they are put together
    question_column: str
    answer_column: str
    reference: Callable[[str], str]  # a text of the answer column -> the formatted reference


def gsm8k_reference(text: str) -> str:
    """The formatted reference of a GSM8K solution, which ends in `#### answer`."""
    return format_reference(text.rpartition("####")[0].strip(), gsm8k_answer(text))


def math_reference(text: str) -> str:
    """The formatted reference of a MATH solution, whose last box holds the answer."""
    return format_reference(text.strip(), boxed_answer(text))


def any_reference(text: str) -> str:
    """The formatted reference of an answer in your own data.

    The answer is what follows `####`, or what the last box holds, or else the whole text.
    """
    if "####" in text:
        return gsm8k_reference(text)
    return math_reference(text) if "\\boxed" in text else format_reference("", text.strip())


MATH_SUBSETS = [
    "algebra",
    "geometry",
    "counting_and_probability",
    "number_theory",
    "intermediate_algebra",
    "prealgebra",
    "precalculus",
]
DATASETS = {  # by DatasetSection.kind
    "gsm8k": Source("openai/gsm8k", ["main"], "question", "answer", gsm8k_reference),
    "hendrycks_math": Source(
        "EleutherAI/hendrycks_math", MATH_SUBSETS, "problem", "solution", math_reference
    ),
    # also rows of a function, and other datasets of the hub
    "file": Source("", [], "question", "answer", any_reference),
}


def hub_name(section: DatasetSection) -> str | None:
    """The hub's name of a section's dataset; None for files and for rows of a function."""
    if section.path is not None or section.kind == "function":
        return None
    return section.name if section.kind == "hub" else _source(section).hub_name


def _source(section: DatasetSection) -> Source:
    return DATASETS.get(section.kind, DATASETS["file"])


# ---- the problems of a recipe: those to train on, and those held out for evaluation


def load_training_problems(recipe: Recipe, tokenizer, processes: int):
    """The problems to train on, as a datasets.Dataset that is shuffled with the recipe's seed.

    Raises RecipeError if they do not fill one rollout of all `processes`, and for what
    `load_problems` refuses.
    """
    problems = load_problems(
        recipe.dataset,
        tokenizer,
        recipe.max_prompt_length,
        recipe.seed,
        chat_template_kwargs=recipe.training.chat_template_kwargs,
    )
    check_enough_problems(recipe, len(problems), processes)
    check_recorded_columns(recipe, problems)
    return problems


def check_recorded_columns(recipe: Recipe, problems) -> None:
    """Raises RecipeError if `watch.columns` names a column that the problems do not have."""
    names = [name for name in problems.column_names if name not in ("prompt", "reference")]
    if missing := [name for name in recipe.watch.columns if name not in names]:
        raise RecipeError(
            "watch.columns",
            f"there is no column {', '.join(map(repr, missing))}; there are {', '.join(names)}",
        )


def load_held_out_problems(recipe: Recipe, tokenizer, trained_on=None):
    """The first `evaluation.limit` held-out problems in their order; None if the recipe names none.

    The log says how many of them are also in `trained_on`, the problems to train on. Raises
    RecipeError for what `load_problems` refuses.
    """
    section = held_out_section(recipe)
    if section is None:
        return None
    with _errors_about_evaluation():
        problems = load_problems(
            section,
            tokenizer,
            recipe.max_prompt_length,
            recipe.seed,
            shuffle=False,
            label="Held-out problems",
            chat_template_kwargs=recipe.training.chat_template_kwargs,
            other_columns=False,
        )
    problems = problems.select(range(min(recipe.evaluation.limit, len(problems))))
    if trained_on is not None and (note := overlap_note(problems, trained_on)):
        logger.info("[GTPO] Held-out problems: %s", note)
    return problems


def overlap_note(held_out, trained_on) -> str | None:
    """A sentence on the held-out problems that are also trained on; None if there are none."""
    questions = set(_questions(trained_on))
    count = sum(question in questions for question in _questions(held_out))
    return f"{count} of {len(held_out)} are also trained on" if count else None


def held_out_section(recipe: Recipe) -> DatasetSection | None:
    """The held-out problems of `evaluation` as a dataset section; None if the recipe names none."""
    evaluation = recipe.evaluation
    if evaluation.path is None and not evaluation.split:
        return None
    given = {"path": evaluation.path, "split": evaluation.split}
    given |= {key: getattr(evaluation, key) for key in ("question_column", "answer_column")}
    if evaluation.path is not None and not evaluation.split:
        given["split"] = "test" if os.path.isdir(evaluation.path) else "train"
    return recipe.dataset.model_copy(
        update={key: value for key, value in given.items() if value is not None}
    )


def check_held_out_source(recipe: Recipe, *, local: bool = False) -> None:
    """`check_source` of the held-out problems; with `local` only of files on this machine."""
    section = held_out_section(recipe)
    if section is not None and (section.path is not None or not local):
        with _errors_about_evaluation():
            check_source(section)


def check_local_files(recipe: Recipe) -> None:
    """`check_source` of all files on this machine that the recipe names; asks no hub."""
    if recipe.dataset.path is not None:
        check_source(recipe.dataset)
    check_held_out_source(recipe, local=True)


@contextlib.contextmanager
def _errors_about_evaluation():
    """Inside, errors about `dataset` name the keys of `evaluation` from which the section came."""
    keys = ("path", "split", "question_column", "answer_column")
    names = {f"dataset.{key}": f"evaluation.{key}" for key in keys} | {"dataset": "evaluation"}
    try:
        yield
    except RecipeError as error:
        raise RecipeError.of(
            Mistake(
                names.get(mistake.key, mistake.key),
                re.sub(r"dataset\.\w+", lambda word: names.get(word[0], word[0]), mistake.sentence),
            )
            for mistake in error.mistakes
        ) from None


# ---- from a dataset section to problems


class LoadedProblems(NamedTuple):
    """Problems, the lengths of their prompts in tokens, and sentences on how they were read."""

    problems: Any  # a datasets.Dataset
    lengths: list[int]
    notes: list[str]


def load_problems(
    section: DatasetSection,
    tokenizer,
    max_prompt_length: int,
    seed: int,
    *,
    shuffle: bool = True,
    label: str = "Dataset",
    chat_template_kwargs: dict | None = None,
    other_columns: bool = True,
):
    """The problems of a dataset as a datasets.Dataset, with the columns that problems have.

    Problems whose prompt is longer than `max_prompt_length` tokens are dropped. The log says how
    many, and how references were found, after `label`. The rest is shuffled with `seed` unless
    `shuffle` is false. Only rewards need the row's `other_columns`. Raises RecipeError for missing
    files, columns or splits, and if no problem is left.
    """
    loaded = problems_with_lengths(
        section,
        tokenizer,
        label=label,
        chat_template_kwargs=chat_template_kwargs,
        other_columns=other_columns,
    )
    fitting = drop_long_prompts(loaded, max_prompt_length)
    total = len(loaded.problems)
    summary = length_filter_summary(len(fitting.problems), total, max_prompt_length)
    for note in (summary, *fitting.notes):
        logger.info("[GTPO] %s: %s", label, note)
    return fitting.problems.shuffle(seed=seed) if shuffle else fitting.problems


def problems_with_lengths(
    section: DatasetSection,
    tokenizer,
    *,
    label: str = "Dataset",
    chat_template_kwargs: dict | None = None,
    other_columns: bool = True,
) -> LoadedProblems:
    """All problems of a dataset in their order, and the lengths of their prompts.

    A length is that of the prompt after the chat template, with the opening of the answer. Rows
    without a question or an answer are left out. A warning says so, or that nothing marks the
    answers. Raises RecipeError for missing files, columns or splits, and if no row is left.
    """
    import datasets

    rows = _load_rows(section)
    # The next steps are short and need no progress bar. The downloads above have theirs.
    datasets.disable_progress_bars()
    if not len(rows):
        raise _no_row(section)
    columns, read = find_columns(_columns(section), rows), _source(section).reference
    reader = ProblemReader(columns, section.system_instruction, read, section.system_role)
    needed = list(dict.fromkeys(top_column(name, rows.column_names) for name in columns[:2]))
    batches = rows.select_columns(needed).iter(1000)
    filled = reader.filled_rows(row for batch in batches for row in _rows_of(batch))
    if len(filled) < len(rows):
        logger.warning(
            "[GTPO] %s: %d rows without question or answer left out",
            label,
            len(rows) - len(filled),
        )
    if not filled:
        raise _no_row(section)
    rows, lengths, text = rows.select(filled), [], datasets.Value("string")

    def as_problems(batch: dict[str, list]) -> dict[str, list]:
        problems = [reader.problem(row) for row in _rows_of(batch)]
        lengths.extend(_prompt_lengths(problems, tokenizer, chat_template_kwargs))
        return {name: [problem[name] for problem in problems] for name in problems[0]}

    problems = rows.select_columns(needed).map(
        as_problems,
        batched=True,
        remove_columns=needed,
        # Without them, an answer would get the type of a column `answer` of the rows.
        features=datasets.Features(
            prompt=datasets.List({"role": text, "content": text}), answer=text, reference=text
        ),
        load_from_cache_file=False,
        # The function fills lists of this process, so its result must not come from a cache.
        new_fingerprint=f"problems-{os.urandom(8).hex()}",
    )
    notes = reader.notes()
    if other_columns:
        problems, renamed = _with_other_columns(problems, rows, columns)
        notes += renamed
    if sentence := references.warning(reader.found, reader.examples):
        logger.warning("[GTPO] %s: %s", label, sentence)
    return LoadedProblems(problems, lengths, notes)


def _rows_of(batch: dict[str, list]) -> list[dict[str, Any]]:
    return [dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True)]


def _no_row(section: DatasetSection) -> RecipeError:
    return RecipeError(
        "dataset",
        f"no row of {section.split!r} has a question and an answer; choose another split or path",
    )


def _columns(section: DatasetSection) -> Columns:
    """The columns that a section names, else its dataset's own."""
    source = _source(section)
    return Columns(
        section.question_column or source.question_column,
        section.answer_column or source.answer_column,
        answer_is_given=section.answer_column is not None,
    )


def _prompt_lengths(problems: list[dict], tokenizer, chat_template_kwargs) -> list[int]:
    """The prompts' lengths in tokens; raises RecipeError if the template refuses one of them."""

    def lengths(prompts: list) -> list[int]:
        tokens = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, return_dict=False, **(chat_template_kwargs or {})
        )
        return [len(ids) for ids in tokens]

    prompts = [problem["prompt"] for problem in problems]
    try:
        return lengths(prompts)
    except Exception:  # templates are programs, and may raise anything
        for prompt in prompts:
            try:
                lengths([prompt])
            except Exception as error:
                roles = ", ".join(message["role"] for message in prompt)
                remedy = "; set dataset.system_role to user" if "system" in roles else ""
                raise RecipeError(
                    "dataset",
                    f"the chat template refuses a prompt with the roles {roles}"
                    f" ({' '.join(str(error).split())}): {prompt[-1]['content'][:80]!r}{remedy}",
                ) from error
        raise


def drop_long_prompts(loaded: LoadedProblems, max_prompt_length: int) -> LoadedProblems:
    """The problems whose prompts have at most `max_prompt_length` tokens.

    Their notes count duplicates. Raises RecipeError if there are none.
    """
    fitting = [i for i, length in enumerate(loaded.lengths) if length <= max_prompt_length]
    if not fitting:
        raise RecipeError(
            "training.max_prompt_length",
            f"{max_prompt_length} drops all {len(loaded.lengths)} prompts; the shortest has "
            f"{min(loaded.lengths)} tokens after the chat template",
        )
    problems = loaded.problems.select(fitting)
    notes = loaded.notes + ([note] if (note := _duplicates(problems)) else [])
    return LoadedProblems(problems, [loaded.lengths[i] for i in fitting], notes)


def length_filter_summary(kept: int, total: int, max_prompt_length: int) -> str:
    """How many of `total` problems the length filter has kept and dropped, as a sentence."""
    return (
        f"{kept} problems; {total - kept} of {total} dropped because their prompts are longer than"
        f" {max_prompt_length} tokens"
    )


def _questions(problems) -> Iterator[tuple]:
    """What each problem asks, without its system message and differences of white space."""
    for prompt in problems["prompt"]:
        yield tuple(
            (message["role"], " ".join(message["content"].split()))
            for message in prompt
            if message["role"] not in ("system", "developer")
        )


def _duplicates(problems) -> str | None:
    """A sentence on problems whose question occurs before, None if there are none."""
    answers: dict[tuple, set[str]] = {}
    for question, answer in zip(_questions(problems), problems["answer"], strict=True):
        answers.setdefault(question, set()).add(answer)
    repeated = len(problems) - len(answers)
    if not repeated:
        return None
    several = sum(len(answers_of_one) > 1 for answers_of_one in answers.values())
    contradictions = f"; {several} questions have several answers" if several else ""
    return f"{repeated} of {len(problems)} problems repeat an earlier question{contradictions}"


def _with_other_columns(problems, rows, columns: Columns):
    """`problems` with the other columns of their `rows`, and a note for each that is renamed.

    A question or answer in a column of a reserved name is not repeated.
    """
    import datasets

    names = [name for name in rows.column_names if name not in RESERVED or name not in columns[:2]]
    if not names:
        return problems, []
    new_names = {}
    for name in RESERVED.intersection(names):
        new_names[name] = f"column_{name}"
        while new_names[name] in names:
            new_names[name] = f"column_{new_names[name]}"
    notes = [
        f"the column {name!r} reaches rewards as {new_name!r}, because GTPO or TRL uses its name"
        for name, new_name in sorted(new_names.items())
    ]
    others = rows.select_columns(names).rename_columns(new_names)
    return datasets.concatenate_datasets([problems, others], axis=1), notes


# ---- where the rows come from: the hub, local files, or a function


def check_source(section: DatasetSection) -> None:
    """Raises RecipeError for missing files, splits and columns, and for files without rows.

    Reads no more than the first rows of local files. A dataset of the hub is downloaded only if the
    hub and the cache do not say which columns it has.
    """
    if section.path is not None:
        for files in _files(section):
            rows = (row for file in files for row in data_files.first_rows(file))
            find_columns(_columns(section), rows)
    elif name := hub_name(section):
        _check_hub(section, name)


def _check_hub(section: DatasetSection, name: str) -> None:
    from gtpo.system import hub

    if section.kind == "hub" and (Path(name).exists() or data_files.suffix(Path(name))):
        raise RecipeError("dataset.name", f"{name!r} looks like a file; set dataset.path to it")
    hub.look_up("dataset.name", name, kind="dataset", instead="local files through dataset.path")
    columns, split = _columns(section), data_files.split_name(section.split)
    for subset in _subsets(section, _source(section)):
        contents = hub.dataset_contents(name, subset)
        if contents.splits and "+" not in section.split and split not in contents.splits:
            raise RecipeError(
                "dataset.split",
                f"{name!r} has no split {split!r}; it has {', '.join(contents.splits)}",
            )
        missing = [name for name in columns[:2] if top_column(name, contents.columns) is None]
        # An answer that is not named may be the last message of a conversation.
        if contents.columns and (columns.answer_is_given or columns.question in missing):
            if missing:
                raise missing_columns(missing, contents.columns)
        elif missing:
            find_columns(columns, hub.load_dataset_split(name, subset, section.split))


def count_rows(section: DatasetSection) -> int | None:
    """The number of rows in the local files of the split; None if only loading them would tell."""
    if section.path is None or "[" in section.split:
        return None
    return data_files.count_rows([file for part in _files(section) for file in part])


def _load_rows(section: DatasetSection):
    """The rows of the split as a datasets.Dataset."""
    import datasets

    if section.path is not None:
        parts = [data_files.load_rows(files, section.split) for files in _files(section)]
    elif (name := hub_name(section)) is None:
        return _rows_of_a_function(section)
    else:
        from gtpo.system.hub import load_dataset_split

        parts = [
            load_dataset_split(name, subset, section.split)
            for subset in _subsets(section, _source(section))
        ]
    try:
        return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]
    except Exception as error:  # pyarrow's errors have no common class
        raise RecipeError(
            "dataset.subsets", f"their columns differ ({' '.join(str(error).split())}); use one"
        ) from error


def _rows_of_a_function(section: DatasetSection):
    import datasets

    arguments = {"split": section.split} if "split" in section.model_fields_set else {}
    try:
        rows = load_object(section.name)(**arguments)
        if not isinstance(rows, datasets.Dataset):
            rows = [dict(row) for row in rows]
            rows = data_files.as_dataset(rows) if any(rows) else []
    except Exception as error:  # a user's function may raise anything
        raise RecipeError(
            "dataset.name",
            f"{section.name!r} gave no rows ({type(error).__name__}: {error}); return a "
            "datasets.Dataset, or a list of dicts",
        ) from error
    if not len(rows):
        raise RecipeError("dataset.name", f"{section.name!r} returned no rows; return at least one")
    return rows


def _subsets(section: DatasetSection, source: Source) -> list[str | None]:
    """The configurations to load, None for the only one.

    Raises RecipeError for names that a known dataset does not have. `dataset.subsets` means nothing
    for a known dataset with one configuration, such as GSM8K. So a recipe for MATH can be used for
    GSM8K by changing `dataset.name` alone.
    """
    if section.subset:
        return [section.subset]
    if not source.subsets:
        return section.subsets or [None]
    several = len(source.subsets) > 1
    chosen = section.subsets if several and section.subsets else source.subsets
    if unknown := [name for name in chosen if name not in source.subsets]:
        raise RecipeError(
            "dataset.subsets",
            f"{', '.join(unknown)} is not known; use some of {', '.join(source.subsets)}",
        )
    return chosen


def _files(section: DatasetSection) -> list[list[Path]]:
    """The local files of the split, one list per subset.

    Raises RecipeError if there are none, with the names of those that exist.
    """
    path = Path(section.path)
    if path.is_file():
        data_files.check_single_file(path, section.split)
        return [[path]]
    if not path.is_dir():
        is_hub_name = HUB_NAME.fullmatch(section.path) and not data_files.suffix(path)
        hint = "; a dataset of the hub is set by dataset.name" if is_hub_name else ""
        raise RecipeError("dataset.path", f"there is no file or folder {section.path!r}{hint}")
    return [
        data_files.files_of_split(folder, section.split)
        for folder in _subset_folders(section, path)
    ]


def _subset_folders(section: DatasetSection, path: Path) -> list[Path]:
    """The folders of the chosen subsets inside `path`, or `path` itself if it has none of them."""
    names = [name for name in _subsets(section, _source(section)) if name]
    folders = [path / name for name in names if (path / name).is_dir()]
    if folders and len(folders) < len(names):
        missing = [name for name in names if not (path / name).is_dir()]
        existing = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
        raise RecipeError(
            "dataset.path",
            f"{section.path!r} has no folder {', '.join(missing)}; it has {', '.join(existing)}",
        )
    return folders or [path]
