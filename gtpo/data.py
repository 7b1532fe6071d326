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
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from gtpo.answers import boxed_answer, format_reference, gsm8k_answer, reference_answer, references
from gtpo.errors import Mistake, RecipeError
from gtpo.recipe import Recipe
from gtpo.recipe.batch import check_enough_problems
from gtpo.recipe.dotted_paths import load_object
from gtpo.recipe.sections import DatasetSection
from gtpo.system import data_files

logger = logging.getLogger(__name__)

# Columns of a problem, and names that trl 1.13.0 reads from a row or hands to rewards itself, in
# GRPOTrainer._generate_and_score_completions and GRPOTrainer._calculate_rewards.
RESERVED = frozenset(
    ["prompt", "answer", "reference"]
    + ["prompts", "completion", "completions", "completion_ids", "trainer_state"]
    + ["log_extra", "log_metric", "image", "images", "environment", "environments"]
)
ROLES = {"human": "user", "gpt": "assistant"}  # other names of roles, as in ShareGPT's files


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

    A warning says how many of them are also in `trained_on`, the problems to train on. Raises
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
    if trained_on is not None:
        questions = set(_questions(trained_on))
        if again := sum(question in questions for question in _questions(problems)):
            logger.warning(
                "[GTPO] Held-out problems: %d of %d are also trained on", again, len(problems)
            )
    return problems


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
    reader = RowReader(section, _source(section), rows)
    filled = rows.select(reader.filled_rows(rows))
    if len(filled) < len(rows):
        logger.warning(
            "[GTPO] %s: %d rows without question or answer left out",
            label,
            len(rows) - len(filled),
        )
    lengths: list[int] = []

    def as_problems(batch: dict[str, list]) -> dict[str, list]:
        problems = [reader.problem(row) for row in _rows_of(batch)]
        lengths.extend(_prompt_lengths(problems, tokenizer, chat_template_kwargs))
        return {name: [problem[name] for problem in problems] for name in problems[0]}

    needed = filled.select_columns(reader.needed)
    problems = needed.map(
        as_problems,
        batched=True,
        remove_columns=needed.column_names,
        load_from_cache_file=False,
        # The function fills lists of this process, so its result must not be taken from a cache.
        new_fingerprint=f"problems-{os.urandom(8).hex()}",
    )
    others, renamed = _other_columns(filled, reader) if other_columns else (None, [])
    if others is not None:
        problems = datasets.concatenate_datasets([problems, others], axis=1)
    if sentence := references.warning(reader.found, reader.examples):
        logger.warning("[GTPO] %s: %s", label, sentence)
    return LoadedProblems(problems, lengths, [*reader.notes(), *renamed])


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
                raise RecipeError(
                    "dataset",
                    f"the chat template refuses a prompt with the roles {roles}"
                    f" ({' '.join(str(error).split())}): {prompt[-1]['content'][:80]!r}",
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


# ---- from a row to a problem


class RowReader:
    """Reads rows of a dataset as problems, and counts how.

    Raises RecipeError if the rows have no question or answer column.
    """

    def __init__(self, section: DatasetSection, source: Source, rows: Iterable[dict[str, Any]]):
        self.section, self.source = section, source
        self.question, self.answer = question_and_answer_columns(section, source, rows)
        self.found: Counter = Counter()  # how answers were found
        self.examples: dict[str, str] = {}  # an answer for each way
        self.own_system = self.ended_by_assistant = 0  # prompts

    @property
    def needed(self) -> list[str]:
        """The columns of the rows that hold question and answer."""
        return list(dict.fromkeys(self._tops))

    def filled_rows(self, rows) -> list[int]:
        """The places of the rows with question and answer; raises RecipeError if there are none."""
        self._tops = [_top(name, rows.column_names) for name in (self.question, self.answer)]
        filled = []
        for i, row in enumerate(rows.select_columns(self.needed)):
            try:
                if self._messages(row) and self._answer_text(row).strip():
                    filled.append(i)
            except _Unreadable as error:
                raise RecipeError("dataset", f"{error} (row {i + 1})") from None
        if not filled:
            raise RecipeError(
                "dataset",
                f"no row of {self.section.split!r} has a question and an answer; choose another"
                " split or path, or other columns",
            )
        return filled

    def problem(self, row: dict[str, Any]) -> dict[str, Any]:
        """The prompt, answer and reference of a row that has them."""
        prompt = self._messages(row)
        if prompt[0]["role"] in ("system", "developer"):
            self.own_system += 1
        elif self.section.system_instruction:
            system = {"role": "system", "content": self.section.system_instruction}
            prompt = [system, *prompt]
        if self.question != self.answer and _ends_with_assistant(_follow(row, self.question)[1]):
            self.ended_by_assistant += 1
        text = self._answer_text(row)
        reference = references.formatted(text, self.source.reference)
        answer, how = reference_answer(reference), references.how_found(text, reference)
        self.found[how] += 1
        self.examples.setdefault(how, answer)
        return {"prompt": prompt, "answer": answer, "reference": reference}

    def notes(self) -> list[str]:
        """Sentences on how references were found, and on prompts that are not just a question."""
        notes = [f"references: {references.summary(self.found)}"]
        if self.own_system:
            notes.append(
                f"{self.own_system} prompts have a system message of their own, so they do not get"
                " dataset.system_instruction"
            )
        if self.ended_by_assistant:
            notes.append(
                f"{self.ended_by_assistant} prompts end with a message of the assistant, which is"
                " left out"
            )
        return notes

    def _messages(self, row: dict[str, Any]) -> list[dict[str, str]]:
        """The messages of a row's question; none if it is empty."""
        value = _follow(row, self.question)[1]
        if not _is_conversation(value):
            text = _text(value, self.question)
            return [{"role": "user", "content": text}] if text.strip() else []
        messages = [_message(message, self.question) for message in value]
        while messages and messages[-1]["role"] == "assistant":
            messages.pop()  # what the model is to write
        if messages and messages[-1]["role"] != "user":
            raise _Unreadable(
                f"the column {self.question!r} ends with a message of the role"
                f" {messages[-1]['role']!r}; a prompt ends with a message of the user"
            )
        return messages if messages and messages[-1]["content"].strip() else []

    def _answer_text(self, row: dict[str, Any]) -> str:
        value = _follow(row, self.answer)[1]
        if not _is_conversation(value):
            return _text(value, self.answer)
        last = _message(value[-1], self.answer)
        return last["content"] if last["role"] == "assistant" else ""


class _Unreadable(Exception):
    """A value of a row cannot be used; the message is a sentence without the row."""


def question_and_answer_columns(
    section: DatasetSection, source: Source, rows: Iterable[dict[str, Any]]
) -> tuple[str, str]:
    """The names of the columns with the question and the answer, which may be dotted.

    Looks at as few rows as it takes. Where the question is a conversation and there is no column
    with an answer, its last message is the answer. Raises RecipeError if a column is missing.
    """
    question = section.question_column or source.question_column
    answer = section.answer_column or source.answer_column
    missing, names = dict.fromkeys((question, answer)), {}
    for row in rows:
        names |= dict.fromkeys(row)
        missing = {name: None for name in missing if not _follow(row, name)[0]}
        value = _follow(row, question)[1]
        if answer in missing and section.answer_column is None and _is_conversation(value):
            return question, question
        if not missing:
            return question, answer
    raise RecipeError(
        "dataset",
        f"no column {' or '.join(map(repr, missing))}; this dataset has {', '.join(names)} (set"
        " dataset.question_column and dataset.answer_column)",
    )


def _top(name: str, columns: Iterable[str]) -> str | None:
    """The column in which a dotted name lies: the longest beginning that is a column."""
    keys = name.split(".")
    beginnings = (".".join(keys[:count]) for count in range(len(keys), 0, -1))
    return next((beginning for beginning in beginnings if beginning in columns), None)


def _follow(row: dict[str, Any], name: str) -> tuple[bool, Any]:
    """Whether a row can have the column `name`, and its value: `a.b.0` is a list's first item."""
    top = _top(name, row)
    if top is None:
        return False, None
    value = row[top]
    for key in filter(None, name[len(top) :].split(".")):
        if value is None:
            return True, None
        if isinstance(value, dict) and key in value:
            value = value[key]
        elif isinstance(value, list) and re.fullmatch(r"-?\d+", key):
            index = int(key)
            value = value[index] if -len(value) <= index < len(value) else None
        else:
            return False, None
    return True, value


def _text(value: Any, column: str) -> str:
    """A question or an answer as text: "" for none, and 4 for 4.0."""
    if value is None or isinstance(value, float) and math.isnan(value):
        return ""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    if isinstance(value, str | int | float | Decimal):
        return str(value)
    raise _Unreadable(
        f"the column {column!r} holds values that are neither text nor numbers; give one text per"
        " row, or a list of messages for the question"
    )


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)


def _ends_with_assistant(value: Any) -> bool:
    roles = ("assistant", "gpt")
    return _is_conversation(value) and (value[-1].get("role") or value[-1].get("from")) in roles


def _message(message: dict[str, Any], column: str) -> dict[str, str]:
    """A message with `role` and `content` alone; ShareGPT calls them `from` and `value`."""
    role = message.get("role") or message.get("from")
    content = message.get("content") if "content" in message else message.get("value")
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else part for part in content]
        content = "".join(parts) if all(isinstance(part, str) for part in parts) else None
    if not isinstance(role, str) or not isinstance(content, str):
        raise _Unreadable(
            f"the column {column!r} has a message without a role and a text; give each the keys"
            " 'role' and 'content'"
        )
    return {"role": ROLES.get(role, role), "content": content}


def _rows_of(batch: dict[str, list]) -> list[dict[str, Any]]:
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def _other_columns(rows, reader: RowReader):
    """The columns that rewards get beside a problem's own, and a note for each with another name.

    A question or answer that stands in a column of a reserved name is not repeated.
    """
    read = {name for name in (reader.question, reader.answer) if name in RESERVED}
    names = [name for name in rows.column_names if name not in read]
    if not names:
        return None, []
    new_names, notes = {}, []
    for name in names:
        if name in RESERVED:
            new_name = f"column_{name}"
            while new_name in rows.column_names:
                new_name = f"column_{new_name}"
            new_names[name] = new_name
            notes.append(
                f"the column {name!r} reaches rewards as {new_name!r}, because GTPO or TRL uses"
                " its name"
            )
    return rows.select_columns(names).rename_columns(new_names), notes


# ---- where the rows come from: the hub, local files, or a function


def check_source(section: DatasetSection) -> None:
    """Raises RecipeError for missing files, splits and columns, and for files without rows.

    Reads no more than the first rows of local files. Of a dataset on the hub it checks what the hub
    or the cache says.
    """
    source = _source(section)
    if section.path is not None:
        for files in _files(section):
            rows = (row for file in files for row in data_files.first_rows(file))
            first = next(rows, None)
            if first is None:
                raise RecipeError(
                    "dataset.path",
                    f"{str(files[0])!r} is empty; give a file with at least one row",
                )
            question_and_answer_columns(section, source, _chain(first, rows))
    elif name := hub_name(section):
        _check_hub(section, source, name)


def _chain(first: dict, rows: Iterator[dict]) -> Iterator[dict]:
    yield first
    yield from rows


def _check_hub(section: DatasetSection, source: Source, name: str) -> None:
    from gtpo.system import hub

    if section.kind == "hub" and (Path(name).exists() or data_files.suffix(Path(name))):
        raise RecipeError("dataset.name", f"{name!r} looks like a file; set dataset.path to it")
    hub.look_up("dataset.name", name, kind="dataset", instead="local files through dataset.path")
    for subset in _subsets(section, source):
        contents = hub.dataset_contents(name, subset)
        split = data_files.split_name(section.split)
        if contents.splits and "+" not in section.split and split not in contents.splits:
            raise RecipeError(
                "dataset.split",
                f"{name!r} has no split {split!r}; it has {', '.join(contents.splits)}",
            )
        if contents.features and (missing := _surely_missing(section, source, contents.features)):
            raise RecipeError(
                "dataset",
                f"no column {' or '.join(map(repr, missing))}; this dataset has"
                f" {', '.join(contents.features)} (set dataset.question_column and"
                " dataset.answer_column)",
            )


def _surely_missing(section: DatasetSection, source: Source, columns: dict) -> list[str]:
    """The question and answer columns that are not among `columns`.

    An answer that is not named may be the last message of a question.
    """
    question = section.question_column or source.question_column
    answer = section.answer_column or source.answer_column
    may_be_in_messages = section.answer_column is None and section.question_column is not None
    wanted = [question] if may_be_in_messages else [question, answer]
    return [name for name in wanted if _top(name, columns) is None]


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
        raise RecipeError(
            "dataset.path",
            f"there is no file or folder {section.path!r} (a dataset of the hub is set by"
            " dataset.name)",
        )
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
