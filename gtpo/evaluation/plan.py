"""Which problems to evaluate, how to draw completions, and which file to keep them in.

Flags come first, then the run's recipe, then defaults.
"""

import hashlib
import os
import re
from argparse import Namespace
from pathlib import Path
from typing import Any, NamedTuple

from gtpo.data import held_out_section
from gtpo.errors import RecipeError
from gtpo.evaluation.file import EvaluationFile, make_header, turn_ends_note
from gtpo.evaluation.scores import samples_and_ks
from gtpo.models.generation import Sampling
from gtpo.models.saved import Saved
from gtpo.recipe import Recipe
from gtpo.recipe.dotted_paths import check_dotted_path
from gtpo.recipe.sections import (
    DATASET_ALIASES,
    DOTTED_PATH,
    HUB_NAME,
    SYSTEM_INSTRUCTION,
    DatasetSection,
)
from gtpo.system.data_files import suffix

# For a model without a recipe:
MAX_LENGTH = 1024  # tokens of a prompt, and tokens of a completion
SEED = 3407
BATCH_SIZE = 32


class EvaluationPlan(NamedTuple):
    """The settings of an evaluation, known before anything is loaded."""

    section: DatasetSection
    limit: int | None  # number of problems, from the first; None for all
    samples: int  # completions per problem
    ks: list[int]  # of pass@k and maj@k
    sampling: Sampling
    max_prompt_length: int  # tokens
    batch_size: int  # completions
    chat_template_kwargs: dict[str, Any]


def make_plan(flags: Namespace, saved: Saved) -> EvaluationPlan:
    """Returns the plan that evaluate_model.py's flags and the run's recipe make.

    A flag that was not given is None. Raises RecipeError if flags contradict each other or name no
    problems.
    """
    recipe = saved.recipe
    samples, ks = samples_and_ks(flags.samples, flags.k)
    section, limit = _problems(flags, recipe)
    temperature = flags.temperature
    if temperature is None:
        temperature = 0.0 if samples == 1 else _training_temperature(recipe)
    if temperature == 0 and samples > 1:
        raise RecipeError(
            "--temperature",
            f"0 is greedy, so all {samples} samples of a problem would be the same; use a"
            " temperature above 0, or --samples 1",
        )
    sampling = Sampling(
        temperature,
        top_p=1.0 if flags.top_p is None else flags.top_p,
        seed=_first(flags.seed, recipe.seed if recipe else SEED),
        max_completion_length=_max_completion_length(flags, recipe),
    )
    return EvaluationPlan(
        section,
        limit=flags.limit or limit,
        samples=samples,
        ks=ks,
        sampling=sampling,
        max_prompt_length=(
            flags.max_prompt_length or (recipe.max_prompt_length if recipe else MAX_LENGTH)
        ),
        batch_size=flags.batch_size or (recipe.evaluation.batch_size if recipe else BATCH_SIZE),
        chat_template_kwargs=template_options(flags, recipe),
    )


def chat_sampling(flags: Namespace, recipe: Recipe | None) -> Sampling:
    """Returns how a conversation is drawn: by default with the training's temperature and
    completion length.
    """
    return Sampling(
        temperature=_first(flags.temperature, _training_temperature(recipe)),
        top_p=flags.top_p or 1.0,
        seed=_first(flags.seed, SEED),
        max_completion_length=_max_completion_length(flags, recipe),
    )


def system_instruction(flags: Namespace, recipe: Recipe | None) -> str | None:
    """Returns the system message of every prompt; None for none."""
    if flags.system_instruction is not None:
        return flags.system_instruction or None
    return recipe.dataset.system_instruction if recipe else SYSTEM_INSTRUCTION


def system_role(flags: Namespace, recipe: Recipe | None) -> str:
    """Returns where the system message stands: system, or user for the user's message."""
    return flags.system_role or (recipe.dataset.system_role if recipe else "system")


def template_options(flags: Namespace, recipe: Recipe | None) -> dict[str, Any]:
    """Returns the options of the chat template, such as enable_thinking."""
    if flags.chat_template_kwargs is not None:
        return flags.chat_template_kwargs
    return (recipe.training.chat_template_kwargs if recipe else None) or {}


def _training_temperature(recipe: Recipe | None) -> float:
    options = recipe.training.trl_options() if recipe else {}
    return float(options.get("temperature") or 1.0)


def _max_completion_length(flags: Namespace, recipe: Recipe | None) -> int:
    default = recipe.max_completion_length if recipe else MAX_LENGTH
    return flags.max_completion_length or default


def _first(value, default):
    return default if value is None else value


def _problems(flags: Namespace, recipe: Recipe | None) -> tuple[DatasetSection, int | None]:
    """The problems as a dataset section, and the recipe's limit on their number."""
    values = {
        "system_instruction": system_instruction(flags, recipe),
        "system_role": system_role(flags, recipe),
    }
    for column in ("question_column", "answer_column"):
        if getattr(flags, column):
            values[column] = getattr(flags, column)
    if flags.subset:
        values["subset"] = flags.subset[0] if len(flags.subset) == 1 else None
        values["subsets"] = flags.subset
    if flags.split:
        values["split"] = flags.split
    if flags.dataset is None and flags.path is None:
        section, limit = _problems_of_the_run(flags, recipe)
        section = section.model_copy(update=values)
    else:
        section, limit = _problems_of_the_flags(flags, values), None
    return _with_split_of_a_file(section), limit


def _problems_of_the_run(
    flags: Namespace, recipe: Recipe | None
) -> tuple[DatasetSection, int | None]:
    """The problems that the recipe holds out, else the test split of its dataset."""
    if recipe is None:
        raise RecipeError(
            "--dataset",
            "a model alone names no problems; use gsm8k, hendrycks_math, or a file with questions"
            " and answers",
        )
    section = held_out_section(recipe)
    if section:
        return section, None if flags.split else recipe.evaluation.limit
    if recipe.dataset.path and os.path.isfile(recipe.dataset.path):
        raise RecipeError(
            "--dataset",
            "the recipe holds out no problems; use gsm8k, hendrycks_math, or a file with questions"
            " and answers",
        )
    return recipe.dataset.model_copy(update={"split": "test"}), None


def _problems_of_the_flags(flags: Namespace, values: dict[str, Any]) -> DatasetSection:
    """The problems that --dataset and --path name: a known dataset, a file, a folder or a function.

    `values` are keys of the section that other flags set.
    """
    name = DATASET_ALIASES.get(flags.dataset)
    path = flags.path if name or flags.dataset is None else flags.dataset
    is_hub_name = name is None and flags.dataset and _is_hub_name(flags.dataset)
    if is_hub_name:
        name, path = flags.dataset, flags.path
    elif name is None and not (path and _looks_like_a_path(path)):
        if not DOTTED_PATH.fullmatch(path) or check_dotted_path("--dataset", path) is not None:
            raise RecipeError(
                "--dataset",
                f"{path!r} is not known; use gsm8k, hendrycks_math, an existing file or"
                " folder, or a dotted path such as my_data.load, or owner/name for the hub",
            )
        name, path = path, flags.path
    if path or name in DATASET_ALIASES or is_hub_name:  # a function need not have splits
        values = {"split": "test", **values}
    return DatasetSection(name=name, path=path, **values)


def _looks_like_a_path(text: str) -> bool:
    return Path(text).exists() or suffix(Path(text)) is not None or os.sep in text


def _is_hub_name(text: str) -> bool:
    is_a_file = Path(text).exists() or suffix(Path(text)) is not None
    return HUB_NAME.fullmatch(text) is not None and not is_a_file


def _with_split_of_a_file(section: DatasetSection) -> DatasetSection:
    """`section` with train as the name of the split if its path is a single file.

    datasets calls the rows of a file train. So `--split test[:5]` means the file's first five rows.
    """
    if not (section.path and os.path.isfile(section.path)):
        return section
    _, bracket, slice_of_rows = section.split.partition("[")
    return section.model_copy(update={"split": f"train{bracket}{slice_of_rows}"})


def open_file(
    flags: Namespace,
    saved: Saved,
    plan: EvaluationPlan,
    backend: str,
    tokenizer,
    problems,
    prompts: list[str],
    *,
    adapter: bool,
    prompt_opening: str = "",
) -> EvaluationFile:
    """Returns the file of the completions with or without the adapter.

    It is --to, or a name made of the settings. Raises RecipeError as EvaluationFile does.
    """
    path = flags.to or _file_path(saved, plan, len(prompts), adapter=adapter)
    if flags.to and flags.base and not adapter:
        path = path.with_stem(f"base-{path.stem}")
    section, adapter_folder = plan.section, saved.adapter if adapter else None
    folders = [
        Path(folder) for folder in (saved.base, adapter_folder) if folder and os.path.isdir(folder)
    ]
    hub_name = "" if os.path.isdir(saved.base) else f"{saved.base} "
    is_file_of_problems = section.path and not (section.name and os.path.isdir(section.path))
    header = make_header(
        problems,
        prompts,
        plan.sampling,
        plan.samples,
        weights=f"{hub_name}{weights_fingerprint(*folders)}",
        model=saved.base,
        backend=backend,
        split=section.split,
        adapter=adapter_folder and str(adapter_folder),
        system_instruction=section.system_instruction,
        dataset=section.path if is_file_of_problems else section.name,
        prompt_opening=prompt_opening,
        **turn_ends_note(tokenizer),
    )
    return EvaluationFile(path, header, overwrite=flags.overwrite)


def weights_fingerprint(*folders: Path) -> str:
    """Returns a digest that differs if the folders have other weights or use them otherwise.

    It covers the model's and the adapter's config, and name, size and 64 samples of each file of
    weights.
    """
    digest = hashlib.blake2b(digest_size=8)
    for folder in folders:
        for name in ("config.json", "adapter_config.json"):
            file = folder / name
            digest.update(file.read_bytes() if file.is_file() else b"")
    weights = [
        file
        for folder in folders
        for file in folder.glob("*model*")
        if file.suffix in (".safetensors", ".bin")
    ]
    for file in sorted(weights):
        size = file.stat().st_size
        digest.update(f"{file.name} {size} ".encode())
        with file.open("rb") as content:
            for offset in range(0, size, max(65536, size // 64)):
                content.seek(offset)
                digest.update(content.read(4096))
    return digest.hexdigest()


def _file_path(saved: Saved, plan: EvaluationPlan, problems: int, *, adapter: bool) -> Path:
    """A path in evaluation/ of the run, or of the current directory for a model without a run.

    The name lists the settings. It begins with "base-" for a run's base model, and with the
    checkpoint's name for a checkpoint. Without a run it begins with the model's name.
    """
    section, folder = plan.section, saved.run_dir or Path()
    model = Path(saved.adapter or saved.base).absolute().name
    if saved.kind != "base" and not adapter:
        prefix = "base" if saved.run_dir else f"base-{model}"
    elif saved.run_dir is not None and saved.adapter == saved.run_dir:
        prefix = ""
    else:
        prefix = model
    if section.path and not os.path.isdir(section.path):
        source, split = Path(section.path).stem, None
    else:
        source, split = section.name or Path(section.path).absolute().name, section.split
    parts = [
        prefix,
        source,
        *(section.subsets or [section.subset]),
        split,
        f"{problems}x{plan.samples}",
        f"t{plan.sampling.temperature:g}",
    ]
    name = "-".join(re.sub(r"[^\w.-]+", "-", str(part)).strip("-") for part in parts if part)
    return folder / "evaluation" / f"{name}.jsonl"
