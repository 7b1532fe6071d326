"""What an evaluation is to do: which problems, drawn how, kept where; from flags, a run's recipe,
and defaults.
"""

import hashlib
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from gtpo.data import held_out_section
from gtpo.errors import RecipeError
from gtpo.evaluation.file import EvaluationFile, make_header
from gtpo.evaluation.scores import samples_and_ks
from gtpo.models.generation import Sampling
from gtpo.models.saved import Saved
from gtpo.recipe import Recipe
from gtpo.recipe.dotted_paths import check_dotted_path
from gtpo.recipe.sections import DATASET_ALIASES, DOTTED_PATH, SYSTEM_INSTRUCTION, DatasetSection

SUFFIXES = (".jsonl", ".json", ".parquet")
LENGTH = 1024  # tokens of prompts and of completions, each, for a model without a recipe
SEED = 3407


class Plan(NamedTuple):
    """An evaluation before anything is loaded."""

    section: DatasetSection
    limit: int | None  # problems, from the first
    samples: int
    ks: list[int]
    sampling: Sampling
    max_prompt_length: int
    batch_size: int
    chat_template_kwargs: dict[str, Any]


def make_plan(asked: SimpleNamespace, saved: Saved) -> Plan:
    """The plan that the flags `asked` (None where not given) and the run's recipe make; raises
    RecipeError.
    """
    recipe = saved.recipe
    samples, ks = samples_and_ks(asked.samples, asked.k)
    section, limit = _problems(asked, recipe)
    temperature = asked.temperature
    if temperature is None:
        training = recipe.training.trl_options() if recipe else {}
        temperature = 0.0 if samples == 1 else float(training.get("temperature") or 1.0)
    if temperature == 0 and samples > 1:
        raise RecipeError(
            "--temperature",
            f"0 is greedy, so all {samples} samples of a problem would be the same; use a "
            "temperature above 0, or --samples 1",
        )
    sampling = Sampling(
        temperature,
        1.0 if asked.top_p is None else asked.top_p,
        asked.seed if asked.seed is not None else recipe.seed if recipe else SEED,
        asked.max_completion_length or (recipe.max_completion_length if recipe else LENGTH),
    )
    return Plan(
        section,
        asked.limit or limit,
        samples,
        ks,
        sampling,
        batch_size=asked.batch_size or (recipe.evaluation.batch_size if recipe else 32),
        max_prompt_length=asked.max_prompt_length
        or (recipe.max_prompt_length if recipe else LENGTH),
        chat_template_kwargs=recipe.training.chat_template_kwargs or {} if recipe else {},
    )


def _problems(asked: SimpleNamespace, recipe: Recipe | None) -> tuple[DatasetSection, int | None]:
    """The problems as a dataset section, and how many of them the recipe takes."""
    given = {"system_instruction": system_instruction(asked, recipe)}
    given |= {
        name: getattr(asked, name)
        for name in ("question_column", "answer_column")
        if getattr(asked, name)
    }
    if asked.dataset is None and asked.path is None:
        if recipe is None:
            raise RecipeError(
                "--dataset",
                "a model alone names no problems; use gsm8k, hendrycks_math, or a file with"
                " questions and answers",
            )
        section = held_out_section(recipe)
        limit = recipe.evaluation.limit if section and not asked.split else None
        if section is None and recipe.dataset.path and os.path.isfile(recipe.dataset.path):
            raise RecipeError(
                "--dataset",
                "the recipe holds out no problems; use gsm8k, hendrycks_math, or a file with"
                " questions and answers",
            )
        section = section or recipe.dataset.model_copy(update={"split": "test"})
        return _named(section.model_copy(update={**given, **_split_and_subset(asked)})), limit
    name = DATASET_ALIASES.get(asked.dataset)
    path = asked.path if name or asked.dataset is None else asked.dataset
    if name is None and not (
        path and (Path(path).exists() or path.endswith(SUFFIXES) or os.sep in path)
    ):
        if not (DOTTED_PATH.fullmatch(path) and check_dotted_path("--dataset", path) is None):
            raise RecipeError(
                "--dataset",
                f"{path!r} is not known; use gsm8k, hendrycks_math, an existing file or folder, or"
                " a dotted path such as my_data.load",
            )
        name, path = path, asked.path
    if path or name in DATASET_ALIASES:  # a function need not know any
        given["split"] = "test"
    return _named(DatasetSection(name=name, path=path, **given | _split_and_subset(asked))), None


def _named(section: DatasetSection) -> DatasetSection:
    """`section` with the split of a single file called train, whatever the flags call it:
    `test[:5]` is its first five rows.
    """
    if not (section.path and os.path.isfile(section.path)):
        return section
    _, bracket, rest = section.split.partition("[")
    return section.model_copy(update={"split": f"train{bracket}{rest}"})


def _split_and_subset(asked: SimpleNamespace) -> dict[str, Any]:
    subset = (
        {"subset": asked.subset[0] if len(asked.subset) == 1 else None, "subsets": asked.subset}
        if asked.subset
        else {}
    )
    return subset | ({"split": asked.split} if asked.split else {})


def system_instruction(asked: SimpleNamespace, recipe: Recipe | None) -> str | None:
    if asked.system_instruction is not None:
        return asked.system_instruction or None
    return recipe.dataset.system_instruction if recipe else SYSTEM_INSTRUCTION


def chat_sampling(asked: SimpleNamespace, recipe: Recipe | None) -> Sampling:
    """How a conversation is drawn: by default at the training's temperature, with completions as
    long.
    """
    training = recipe.training.trl_options() if recipe else {}
    temperature = (
        float(training.get("temperature") or 1.0)
        if asked.temperature is None
        else asked.temperature
    )
    seed = SEED if asked.seed is None else asked.seed
    length = asked.max_completion_length or (recipe.max_completion_length if recipe else LENGTH)
    return Sampling(temperature, asked.top_p or 1.0, seed, length)


def open_file(
    asked: SimpleNamespace,
    saved: Saved,
    plan: Plan,
    backend: str,
    problems,
    prompts: list[str],
    *,
    adapter: bool,
) -> EvaluationFile:
    """The file of the completions with or without the adapter, --to or the one named after the
    settings; raises RecipeError.
    """
    path = asked.to or _file_path(saved, plan, len(prompts), adapter=adapter)
    if asked.to and asked.base and not adapter:
        path = path.with_stem(f"base-{path.stem}")
    section, adapter_folder = plan.section, saved.adapter if adapter else None
    local = [
        Path(folder) for folder in (saved.base, adapter_folder) if folder and os.path.isdir(folder)
    ]
    weights = (
        f"{'' if os.path.isdir(saved.base) else saved.base + ' '}{weights_fingerprint(*local)}"
    )
    return EvaluationFile(
        path,
        make_header(
            problems,
            prompts,
            plan.sampling,
            plan.samples,
            weights,
            model=saved.base,
            backend=backend,
            split=section.split,
            adapter=adapter_folder and str(adapter_folder),
            system_instruction=section.system_instruction,
            dataset=(
                section.path
                if section.path and not (section.name and os.path.isdir(section.path))
                else section.name
            ),
        ),
        overwrite=asked.overwrite,
    )


def weights_fingerprint(*folders: Path) -> str:
    """What tells other weights in the same folders: names, sizes, and pieces of every file of
    weights; and how they are used.
    """
    digest = hashlib.blake2b(digest_size=8)
    for file in (
        folder / name for folder in folders for name in ("config.json", "adapter_config.json")
    ):
        digest.update(file.read_bytes() if file.is_file() else b"")
    weights = (
        file
        for folder in folders
        for file in folder.glob("*model*")
        if file.suffix in (".safetensors", ".bin")
    )
    for file in sorted(weights):
        digest.update(f"{file.name} {file.stat().st_size} ".encode())
        with file.open("rb") as content:
            for place in range(0, file.stat().st_size, max(65536, file.stat().st_size // 64)):
                content.seek(place)
                digest.update(content.read(4096))
    return digest.hexdigest()


def _file_path(saved: Saved, plan: Plan, problems: int, *, adapter: bool) -> Path:
    """evaluation/ of the run, else of the current directory, and a name that tells the settings.

    The file of a run's base model begins with base-, that of a checkpoint with its name, and what
    is in no run with its own.
    """
    section, folder = plan.section, saved.run_dir or Path()
    model = Path(saved.adapter or saved.base).absolute().name
    prefix = model if saved.run_dir is None else "" if saved.adapter == saved.run_dir else model
    if saved.kind != "base" and not adapter:
        prefix = "base" if saved.run_dir else f"base-{model}"
    from_file = section.path and not os.path.isdir(section.path)
    source = (
        Path(section.path).stem if from_file else section.name or Path(section.path).absolute().name
    )
    parts = [
        prefix,
        source,
        *(section.subsets or [section.subset]),
        None if from_file else section.split,
        f"{problems}x{plan.samples}",
        f"t{plan.sampling.temperature:g}",
    ]
    name = "-".join(re.sub(r"[^\w.-]+", "-", str(part)).strip("-") for part in parts if part)
    return folder / "evaluation" / f"{name}.jsonl"
