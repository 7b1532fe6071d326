"""Datasets as problems: add a dataset here.

A problem is a row with two columns. `prompt` holds the system message and the user message.
`answer` holds the reference: the reasoning and the answer, each between its tags.

Your own data needs no code here. Set `dataset.path` to a file and name its two columns, or set
`dataset.name` to the dotted path of a function that returns rows.

To add a dataset that recipes can name:

1. Write a function that turns a text of its answer column into a reference, like `gsm8k_reference`.
2. Add a `Source` with that function to DATASETS.
3. Add the name to DATASET_ALIASES in gtpo/recipe/sections.py, with the spellings that users write.
"""

import contextlib
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from gtpo.answers import boxed_answer, format_reference, gsm8k_answer
from gtpo.errors import Mistake, RecipeError
from gtpo.recipe import Recipe
from gtpo.recipe.batch import check_enough_problems
from gtpo.recipe.dotted_paths import load_object
from gtpo.recipe.sections import DatasetSection

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".parquet")


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
    "file": Source("", [], "question", "answer", any_reference),  # also the rows of a function
}


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
    return problems


def load_held_out_problems(recipe: Recipe, tokenizer):
    """The first `evaluation.limit` held-out problems in their order; None if the recipe names none.

    Raises RecipeError for what `load_problems` refuses.
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
        )
    return problems.select(range(min(recipe.evaluation.limit, len(problems))))


def held_out_section(recipe: Recipe) -> DatasetSection | None:
    """The held-out problems of `evaluation` as a dataset section; None if the recipe names none."""
    path, split = recipe.evaluation.path, recipe.evaluation.split
    if path is None and not split:
        return None
    if path is None:
        return recipe.dataset.model_copy(update={"split": split})
    default_split = "test" if os.path.isdir(path) else "train"
    return recipe.dataset.model_copy(update={"path": path, "split": split or default_split})


def check_held_out_source(recipe: Recipe) -> None:
    """Raises RecipeError if the files of the held-out problems are missing; loads nothing."""
    section = held_out_section(recipe)
    if section is not None:
        with _errors_about_evaluation():
            check_source(section)


@contextlib.contextmanager
def _errors_about_evaluation():
    """Inside, errors about `dataset` name the keys of `evaluation` from which the section came."""
    keys = {
        "dataset": "evaluation",
        "dataset.path": "evaluation.path",
        "dataset.split": "evaluation.split",
    }
    try:
        yield
    except RecipeError as error:
        raise RecipeError.of(
            Mistake(keys.get(mistake.key, mistake.key), mistake.sentence)
            for mistake in error.mistakes
        ) from None


# ---- from a dataset section to problems


def load_problems(
    section: DatasetSection,
    tokenizer,
    max_prompt_length: int,
    seed: int,
    *,
    shuffle: bool = True,
    label: str = "Dataset",
    chat_template_kwargs: dict | None = None,
):
    """The problems of a dataset as a datasets.Dataset with the columns `prompt` and `answer`.

    Problems whose prompt is longer than `max_prompt_length` tokens are dropped. The log says how
    many, after `label`. The rest is shuffled with `seed` unless `shuffle` is false. Raises
    RecipeError for missing files, columns or splits, and if no problem is left.
    """
    problems = problems_with_lengths(section, tokenizer, chat_template_kwargs=chat_template_kwargs)
    fitting = drop_long_prompts(problems, max_prompt_length)
    summary = length_filter_summary(len(fitting), len(problems), max_prompt_length)
    logger.info("[GTPO] %s: %s", label, summary)
    fitting = fitting.remove_columns("prompt_length")
    return fitting.shuffle(seed=seed) if shuffle else fitting


def problems_with_lengths(
    section: DatasetSection, tokenizer, *, chat_template_kwargs: dict | None = None
):
    """All problems of a dataset in their order, with a third column `prompt_length` in tokens.

    The length is that of the prompt after the chat template, with the opening of the answer. Rows
    without a question or an answer are left out, with a warning. Raises RecipeError for missing
    files, columns or splits, and if no row is left.
    """
    import datasets

    rows, source = _load_rows(section)
    question = section.question_column or source.question_column
    answer = section.answer_column or source.answer_column
    # The next steps are short and need no progress bar. The downloads above have theirs.
    datasets.disable_progress_bars()
    filled = _filled_rows(section, rows, question, answer)
    system = []
    if section.system_instruction:
        system = [{"role": "system", "content": section.system_instruction}]

    def as_problems(batch: dict[str, list]) -> dict[str, list]:
        prompts = [[*system, {"role": "user", "content": str(value)}] for value in batch[question]]
        tokens = tokenizer.apply_chat_template(
            prompts, add_generation_prompt=True, return_dict=False, **(chat_template_kwargs or {})
        )
        return {
            "prompt": prompts,
            "answer": [source.reference(str(value)) for value in batch[answer]],
            "prompt_length": [len(ids) for ids in tokens],
        }

    return filled.map(
        as_problems, batched=True, remove_columns=rows.column_names, load_from_cache_file=False
    )


def drop_long_prompts(problems, max_prompt_length: int):
    """The problems whose `prompt_length` is at most `max_prompt_length` tokens.

    Raises RecipeError if there are none.
    """
    fitting = problems.filter(
        lambda length: length <= max_prompt_length,
        input_columns="prompt_length",
        load_from_cache_file=False,
    )
    if not len(fitting):
        raise RecipeError(
            "training.max_prompt_length",
            f"{max_prompt_length} drops all {len(problems)} prompts; the shortest has "
            f"{min(problems['prompt_length'])} tokens after the chat template",
        )
    return fitting


def length_filter_summary(kept: int, total: int, max_prompt_length: int) -> str:
    """How many of `total` problems the length filter has kept and dropped, as a sentence."""
    return (
        f"{kept} problems; {total - kept} of {total} dropped because their prompts are longer than"
        f" {max_prompt_length} tokens"
    )


def _filled_rows(section: DatasetSection, rows, question: str, answer: str):
    """The rows whose columns `question` and `answer` are not empty."""
    if missing := [column for column in (question, answer) if column not in rows.column_names]:
        raise RecipeError(
            "dataset",
            f"no column {' or '.join(map(repr, missing))}; this dataset has"
            f" {', '.join(rows.column_names)} (set dataset.question_column and"
            " dataset.answer_column)",
        )
    for column in (question, answer):
        if any(not isinstance(value, str | int | float | None) for value in rows[column]):
            raise RecipeError(
                "dataset",
                f"the column {column!r} holds values that are neither text nor numbers; give one"
                " text per row",
            )

    def is_filled(row: dict[str, Any]) -> bool:
        values = (row[question], row[answer])
        return all(value is not None and str(value).strip() for value in values)

    filled = rows.filter(is_filled, load_from_cache_file=False)
    if len(filled) < len(rows):
        logger.warning(
            "[GTPO] Dataset: %d rows without question or answer left out", len(rows) - len(filled)
        )
    if not len(filled):
        raise RecipeError(
            "dataset",
            f"no row of {section.split!r} has a question and an answer; choose another split or"
            " path",
        )
    return filled


# ---- where the rows come from: the hub, local files, or a function


def check_source(section: DatasetSection) -> None:
    """Raises RecipeError if the dataset's files are neither here nor on the hub; loads nothing."""
    if section.path is not None:
        _files(section)
    elif section.kind in DATASETS:
        from gtpo.system.hub import look_up

        look_up(
            "dataset.name",
            DATASETS[section.kind].hub_name,
            kind="dataset",
            instead="local files through dataset.path",
        )


def count_rows(section: DatasetSection) -> int | None:
    """The number of rows in the local files of the split; None if only loading them would tell."""
    if section.path is None or "[" in section.split:
        return None
    files = [file for part in _files(section) for file in part]
    if any(file.suffix == ".json" for file in files):
        return None
    return sum(_parquet_rows(file) if file.suffix == ".parquet" else _lines(file) for file in files)


def _lines(file: Path) -> int:
    with file.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


def _parquet_rows(file: Path) -> int:
    from pyarrow.parquet import read_metadata

    return read_metadata(file).num_rows


def _load_rows(section: DatasetSection) -> tuple[Any, Source]:
    """The rows of the split as a datasets.Dataset, and how they read."""
    import datasets

    if section.kind == "function" and section.path is None:
        return _rows_of_a_function(section), DATASETS["file"]
    source = DATASETS.get(section.kind, DATASETS["file"])
    try:
        if section.path is not None:
            parts = [_load_files(files, section.split) for files in _files(section)]
        else:
            parts = [
                datasets.load_dataset(source.hub_name, subset, split=section.split)
                for subset in _subsets(section, source)
            ]
    except RecipeError:
        raise
    except (ValueError, OSError, datasets.exceptions.DatasetGenerationError) as error:
        cause = error.__cause__ or error
        raise RecipeError(
            "dataset",
            f"{section.path or source.hub_name!r} cannot be read ({str(cause).splitlines()[0]})",
        ) from error
    return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0], source


def _load_files(files: list[Path], split: str):
    import datasets

    return datasets.load_dataset(
        "parquet" if files[0].suffix == ".parquet" else "json",
        data_files={_split_name(split): [str(file) for file in files]},
        split=split,
    )


def _rows_of_a_function(section: DatasetSection):
    import datasets

    arguments = {"split": section.split} if "split" in section.model_fields_set else {}
    try:
        rows = load_object(section.name)(**arguments)
        if not isinstance(rows, datasets.Dataset):
            rows = datasets.Dataset.from_list([dict(row) for row in rows])
    except Exception as error:  # a user's function may raise anything
        raise RecipeError(
            "dataset.name",
            f"{section.name!r} gave no rows ({type(error).__name__}: {error}); return a "
            "datasets.Dataset, or a list of dicts",
        ) from error
    if not len(rows):
        raise RecipeError("dataset.name", f"{section.name!r} returned no rows; return at least one")
    return rows


def _subsets(section: DatasetSection, source: Source) -> list[str]:
    """The configurations to load; raises RecipeError for names that the dataset does not have.

    `dataset.subsets` means nothing for a dataset with one configuration, such as GSM8K. So a recipe
    for MATH can be used for GSM8K by changing `dataset.name` alone.
    """
    if section.subset:
        return [section.subset]
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
    path, split = Path(section.path), _split_name(section.split)
    if path.is_file():
        _check_single_file(section, path, split)
        return [[path]]
    if not path.is_dir():
        raise RecipeError("dataset.path", f"there is no file or folder {section.path!r}")
    return [_files_of_split(folder, split) for folder in _subset_folders(section, path)]


def _check_single_file(section: DatasetSection, path: Path, split: str) -> None:
    if path.suffix not in SUFFIXES:
        raise RecipeError("dataset.path", f"{section.path!r} is not one of {', '.join(SUFFIXES)}")
    if split != "train":
        raise RecipeError(
            "dataset.split",
            f"{split!r} does not exist in the single file {section.path!r}; leave it out, or give a"
            " folder with one file per split",
        )
    if not path.stat().st_size:
        raise RecipeError(
            "dataset.path", f"{section.path!r} is empty; give a file with at least one row"
        )


def _subset_folders(section: DatasetSection, path: Path) -> list[Path]:
    """The folders of the chosen subsets inside `path`, or `path` itself if it has none of them."""
    names = _subsets(section, DATASETS.get(section.kind, DATASETS["file"]))
    folders = [path / name for name in names if (path / name).is_dir()]
    if folders and len(folders) < len(names):
        missing = [name for name in names if not (path / name).is_dir()]
        existing = sorted(folder.name for folder in path.iterdir() if folder.is_dir())
        raise RecipeError(
            "dataset.path",
            f"{section.path!r} has no folder {', '.join(missing)}; it has {', '.join(existing)}",
        )
    return folders or [path]


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """The files of `split` in `folder`: `train.jsonl`, or `train-00000-of-00002.parquet` and so on.

    Raises RecipeError if there are none, with the splits that exist.
    """
    by_split: dict[str, list[Path]] = {}
    for file in sorted(folder.iterdir()):
        if file.suffix in SUFFIXES:
            by_split.setdefault(file.stem.split("-")[0].split(".")[0], []).append(file)
    if split not in by_split:
        existing = ", ".join(sorted(by_split)) or f"no {', '.join(SUFFIXES)} files"
        raise RecipeError(
            "dataset.split", f"there is no {split!r} in {str(folder)!r}; it has {existing}"
        )
    return by_split[split]


def _split_name(split: str) -> str:
    """The name of a split without its slice: `train` for `train[:100]`."""
    return split.split("[")[0]
