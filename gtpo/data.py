"""Turn a dataset into problems: rows with `prompt` (system and user message) and `answer`
(formatted reference).

A dataset of one's own needs no code here: `dataset.path` with column names, or `dataset.name:
my_module.load`.
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


class Source(NamedTuple):
    """Where a known dataset lives and how its rows read."""

    hub_name: str
    subsets: list[str]
    question_column: str
    answer_column: str
    reference: Callable[[str], str]  # text of the answer column -> formatted reference


def gsm8k_reference(text: str) -> str:
    """GSM8K's worked solution, which ends in `#### answer`, as a formatted reference."""
    return format_reference(text.rpartition("####")[0].strip(), gsm8k_answer(text))


def math_reference(text: str) -> str:
    """A MATH solution, whose last box holds the answer, as a formatted reference."""
    return format_reference(text.strip(), boxed_answer(text))


def any_reference(text: str) -> str:
    """The answer of one's own data: after `####`, in the last box, or the whole text."""
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
DATASETS = {
    "gsm8k": Source("openai/gsm8k", ["main"], "question", "answer", gsm8k_reference),
    "hendrycks_math": Source(
        "EleutherAI/hendrycks_math", MATH_SUBSETS, "problem", "solution", math_reference
    ),
    "file": Source("", [], "question", "answer", any_reference),
}


def check_source(section: DatasetSection) -> None:
    """A short look at where the dataset is, before anything heavy is loaded; raises RecipeError."""
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
    """Rows in the local files of the split; None where only loading would tell."""
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
    """The dataset as problems, without prompts longer than `max_prompt_length` tokens, shuffled
    with `seed`.

    Prompts are counted after the chat template, with the opening of the answer; how many were
    dropped is always said. Raises RecipeError for missing files, columns or splits, and if nothing
    is left.
    """
    problems = measured_problems(section, tokenizer, chat_template_kwargs=chat_template_kwargs)
    fitting = problems.filter(
        lambda length: length <= max_prompt_length,
        input_columns="prompt_length",
        load_from_cache_file=False,
    )
    logger.info(
        "[GTPO] %s: %d problems; %d of %d dropped, longer than %d prompt tokens",
        label,
        len(fitting),
        len(problems) - len(fitting),
        len(problems),
        max_prompt_length,
    )
    if not len(fitting):
        raise RecipeError(
            "training.max_prompt_length",
            f"{max_prompt_length} drops all {len(problems)} prompts; the shortest has "
            f"{min(problems['prompt_length'])} tokens after the chat template",
        )
    fitting = fitting.remove_columns("prompt_length")
    return fitting.shuffle(seed=seed) if shuffle else fitting


def measured_problems(
    section: DatasetSection,
    tokenizer,
    *,
    chat_template_kwargs: dict | None = None,
):
    """All the dataset's problems in their order, with `prompt_length` in tokens."""
    import datasets

    rows, source = _load_rows(section)
    question = section.question_column or source.question_column
    answer = section.answer_column or source.answer_column
    if missing := [column for column in (question, answer) if column not in rows.column_names]:
        raise RecipeError(
            "dataset",
            f"no column {' or '.join(map(repr, missing))}; this dataset has"
            f" {', '.join(rows.column_names)} (set dataset.question_column and"
            " dataset.answer_column)",
        )
    # three bars that flash by; the hub's downloads above keep theirs
    datasets.disable_progress_bars()
    for column in (question, answer):
        if any(not isinstance(value, str | int | float | None) for value in rows[column]):
            raise RecipeError(
                "dataset",
                f"the column {column!r} holds other things than text and numbers; give one text"
                " per row",
            )
    filled = rows.filter(
        lambda row: all(
            str(row[c] if row[c] is not None else "").strip() for c in (question, answer)
        ),
        load_from_cache_file=False,
    )
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
    system = (
        [{"role": "system", "content": section.system_instruction}]
        if section.system_instruction
        else []
    )

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


def _load_rows(section: DatasetSection) -> tuple[Any, Source]:
    import datasets

    if section.kind == "function" and section.path is None:
        return _rows_of_a_function(section), DATASETS["file"]
    source = DATASETS.get(section.kind, DATASETS["file"])
    try:
        if section.path is not None:
            base = section.split.split("[")[0]
            parts = [
                datasets.load_dataset(
                    "parquet" if files[0].suffix == ".parquet" else "json",
                    data_files={base: [str(f) for f in files]},
                    split=section.split,
                )
                for files in _files(section)
            ]
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


def _rows_of_a_function(section: DatasetSection):
    import datasets

    try:
        made = load_object(section.name)(
            **{"split": section.split} if "split" in section.model_fields_set else {}
        )
        made = (
            made
            if isinstance(made, datasets.Dataset)
            else datasets.Dataset.from_list([dict(row) for row in made])
        )
    # somebody's code: whatever it raises, the recipe is where it was named
    except Exception as error:
        raise RecipeError(
            "dataset.name",
            f"{section.name!r} gave no rows ({type(error).__name__}: {error}); return a "
            "datasets.Dataset, or a list of dicts",
        ) from error
    if not len(made):
        raise RecipeError("dataset.name", f"{section.name!r} returned no rows; return at least one")
    return made


def _subsets(section: DatasetSection, source: Source) -> list[str]:
    """Which configurations to load; GSM8K takes `subset` alone, so that a recipe's MATH subsets do
    no harm.
    """
    if section.subset:
        return [section.subset]
    chosen = (
        section.subsets if section.kind == "hendrycks_math" and section.subsets else source.subsets
    )
    if section.kind == "hendrycks_math" and (
        unknown := [s for s in chosen if s not in MATH_SUBSETS]
    ):
        raise RecipeError(
            "dataset.subsets",
            f"{', '.join(unknown)} is not known; use some of {', '.join(MATH_SUBSETS)}",
        )
    return chosen


def _files(section: DatasetSection) -> list[list[Path]]:
    """The local files of the split, one list per subset; raises RecipeError that says what
    exists.
    """
    path, split = Path(section.path), section.split.split("[")[0]
    if path.is_file():
        if path.suffix not in SUFFIXES:
            raise RecipeError(
                "dataset.path", f"{section.path!r} is not one of {', '.join(SUFFIXES)}"
            )
        if split != "train":
            raise RecipeError(
                "dataset.split",
                f"{split!r} names nothing in the single file {section.path!r}; leave it out, or "
                "give a folder with one file per split",
            )
        if not path.stat().st_size:
            raise RecipeError(
                "dataset.path", f"{section.path!r} is empty; give a file with at least one row"
            )
        return [[path]]
    if not path.is_dir():
        raise RecipeError("dataset.path", f"there is no file or folder {section.path!r}")
    source = DATASETS.get(section.kind, DATASETS["file"])
    named = _subsets(section, source)
    folders = [path / name for name in named if (path / name).is_dir()] if named else []
    if named and section.kind == "hendrycks_math" and len(folders) < len(named) and folders:
        absent = [name for name in named if not (path / name).is_dir()]
        raise RecipeError(
            "dataset.path",
            f"{section.path!r} has no folder {', '.join(absent)}; it has "
            f"{', '.join(sorted(f.name for f in path.iterdir() if f.is_dir()))}",
        )
    found = []
    for folder in folders or [path]:
        files = sorted(
            f
            for f in folder.iterdir()
            if f.suffix in SUFFIXES and f.stem.split("-")[0].split(".")[0] == split
        )
        if not files:
            there = sorted(
                {
                    f.stem.split("-")[0].split(".")[0]
                    for f in folder.iterdir()
                    if f.suffix in SUFFIXES
                }
            )
            raise RecipeError(
                "dataset.split",
                f"there is no {split!r} in {str(folder)!r}; it has "
                f"{', '.join(there) or 'no ' + ', '.join(SUFFIXES) + ' files'}",
            )
        found.append(files)
    return found


# ---- a recipe's problems: those to train on, and those held out to evaluate


def load_training(recipe: Recipe, tokenizer, processes: int):
    """The problems to train on, shuffled with the seed; raises RecipeError if they do not fill one
    rollout.
    """
    problems = _load_problems(recipe, recipe.dataset, tokenizer)
    check_enough_problems(recipe, len(problems), processes)
    return problems


def measured_training(recipe: Recipe, tokenizer):
    """All problems of the recipe's dataset, with `prompt_length`, before the length filter."""
    return measured_problems(
        recipe.dataset,
        tokenizer,
        chat_template_kwargs=recipe.training.chat_template_kwargs,
    )


def _load_problems(
    recipe: Recipe, section, tokenizer, *, shuffle: bool = True, label: str = "Dataset"
):
    return load_problems(
        section,
        tokenizer,
        recipe.max_prompt_length,
        recipe.seed,
        shuffle=shuffle,
        label=label,
        chat_template_kwargs=recipe.training.chat_template_kwargs,
    )


def held_out_section(recipe: Recipe):
    """`evaluation`'s file or split as a dataset section; None where the recipe names neither."""
    path, split = recipe.evaluation.path, recipe.evaluation.split
    if path is None:
        return split and recipe.dataset.model_copy(update={"split": split})
    return recipe.dataset.model_copy(
        update={"path": path, "split": split or ("test" if os.path.isdir(path) else "train")}
    )


def check_held_out(recipe: Recipe) -> None:
    """A short look at where the held-out problems are; raises RecipeError."""
    section = held_out_section(recipe)
    if section is not None:
        with _told_of_evaluation():
            check_source(section)


@contextlib.contextmanager
def _told_of_evaluation():
    try:
        yield
    except RecipeError as error:
        raise _of_evaluation(error) from None


def _of_evaluation(error: RecipeError) -> RecipeError:
    """`error` with the keys by which `evaluation` names held-out problems."""
    keys = {
        "dataset": "evaluation",
        "dataset.path": "evaluation.path",
        "dataset.split": "evaluation.split",
    }
    return RecipeError.of(
        Mistake(keys.get(mistake.key, mistake.key), mistake.sentence) for mistake in error.mistakes
    )


def load_held_out(recipe: Recipe, tokenizer):
    """The first held-out problems, unshuffled; None where the recipe names none."""
    section = held_out_section(recipe)
    if section is None:
        return None
    with _told_of_evaluation():
        problems = _load_problems(
            recipe, section, tokenizer, shuffle=False, label="Held-out problems"
        )
    return problems.select(range(min(recipe.evaluation.limit, len(problems))))
