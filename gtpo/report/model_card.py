"""The model card of an adapter or a merged model: what it is, how it was trained, how to load it.

A card is written from the recipe and the files of the run directory. It has no path of this
machine, no environment variable and no secret.
"""

import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from gtpo.answers.problem import with_system_message
from gtpo.data import hub_name
from gtpo.errors import RecipeError
from gtpo.evaluation.file import read_evaluation
from gtpo.evaluation.scores import mean_scores
from gtpo.models.base_model import is_hub_name
from gtpo.recipe import Recipe
from gtpo.report.run_record import evaluation_files, read_state, read_versions
from gtpo.system.whole_files import write_whole

logger = logging.getLogger(__name__)

GTPO = (
    "**GTPO** (Group-relative Trajectory-based Policy Optimization,"
    " [arXiv 2508.03772](https://arxiv.org/abs/2508.03772))"
)
GRPO = (
    "**GRPO** (Group Relative Policy Optimization,"
    " [arXiv 2402.03300](https://arxiv.org/abs/2402.03300))"
)
BASELINE = f"with {GRPO}, the baseline that GTPO is compared with"
RELEASED = f"with {GTPO}, computed as in its authors' released code"
METHODS = {  # class path of a trainer, or of a base class -> tag, method
    "gtpo.gtpo_training.UnslothGTPOTrainer": ("gtpo", f"with {GTPO}"),
    "custom_trainer.released.ReleasedGTPOTrainer": ("gtpo", RELEASED),
    "custom_trainer.original.UnslothGRPOTrainer": ("grpo", BASELINE),
    "trl.trainer.grpo_trainer.GRPOTrainer": ("grpo", f"with {GRPO}"),
    "trl.GRPOTrainer": ("grpo", f"with {GRPO}"),
}
METRICS = {  # of the last logged step
    "reward": "reward",
    "reward/formatting_avg": "format reward",
    "reward/correctness_avg": "correctness reward",
    "gtpo/completion_entropy": "completion entropy (nats)",
    "gtpo/initial_entropy": "initial entropy (nats)",
    "gtpo/frac_conflict_tokens": "conflict tokens (share)",
    "gtpo/frac_filtered": "filtered completions (share)",
    "completions/mean_length": "mean length (tokens)",
}
VERSIONS = ("gtpo", "commit", "torch", "transformers", "trl", "peft", "unsloth", "vllm", "python")


def write(folder: Path, card: str) -> None:
    """Writes a card to README.md of a folder."""
    write_whole(Path(folder) / "README.md", card)


def write_with_each_save(model, trainer, recipe: Recipe, run_dir: Path) -> None:
    """Makes each save of `model`, a PeftModel, write the adapter's card.

    Replaces PeftModel.create_or_update_model_card of peft 0.21.2, whose card names a local folder
    as the base model and says nothing else.
    """
    model.create_or_update_model_card = lambda folder: write(
        folder, adapter_card(recipe, run_dir, trainer)
    )


def adapter_card(recipe: Recipe, run_dir: Path, trainer) -> str:
    """Returns the card of the adapter as `trainer` has trained it so far."""
    base_classes = [f"{base.__module__}.{base.__name__}" for base in type(trainer).__mro__[1:]]
    tag, method = _method(recipe.trainer.class_path, base_classes)
    state, base = trainer.state, recipe.model.model_name
    return _card(
        recipe.run_name,
        _metadata(recipe, base, "peft", [tag, "lora", "trl"], "adapter"),
        [
            f"A LoRA adapter for {_model_name(base)}, trained {method}.",
            _usage(recipe, "from peft import AutoPeftModelForCausalLM as AutoModel"),
            *_training(recipe, tag, base, run_dir, state.global_step, state.log_history),
        ],
    )


def merged_card(saved, dtype: str, fidelity: str) -> str:
    """Returns the card of the weights merged from `saved`, a gtpo.models.saved.Saved.

    `fidelity` is the result of the comparison with base model and adapter, as text.
    """
    recipe = saved.recipe
    weights = f"The weights of {_model_name(saved.base)} with a LoRA adapter merged into them"
    compared = f"Compared with base model and adapter after merging: {fidelity}."
    usage = _usage(recipe, "from transformers import AutoModelForCausalLM as AutoModel")
    if recipe is None:
        unknown = "The files do not say how the adapter was trained."
        metadata = _metadata(None, saved.base, "transformers", [], "finetune")
        return _card("Merged model", metadata, [f"{weights} ({dtype}). {unknown}", compared, usage])
    if recipe.model.load_in_4bit:
        compared += (
            " The adapter was trained on the base model in 4 bits. It was merged into the base"
            " model in 16 bits and compared with that."
        )
    run_tags = _tags(saved.run_dir)
    of_those_tags = [path for path, (tag, _) in METHODS.items() if tag in run_tags]
    tag, method = _method(recipe.trainer.class_path, of_those_tags)
    step, history = _steps_and_history(saved.adapter, saved.run_dir)
    return _card(
        f"{recipe.run_name}, merged",
        _metadata(recipe, saved.base, "transformers", [tag, "trl"], "finetune"),
        [
            f"{weights} ({dtype}). The adapter was trained {method}.",
            compared,
            usage,
            *_training(
                recipe, tag, saved.base, saved.run_dir, step, history, adapter=saved.adapter
            ),
        ],
    )


def _card(title: str, metadata: dict[str, Any], paragraphs: list[str]) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(**metadata)
    return "\n\n".join([f"---\n{data.to_yaml()}\n---", f"# {title}", *paragraphs]) + "\n"


def _metadata(
    recipe: Recipe | None, base: str, library: str, tags: list[str], relation: str
) -> dict[str, Any]:
    """The hub's keys. The hub refuses names of models and datasets that it does not have, so local
    ones are left out.
    """
    metadata = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": [tag for tag in tags if tag] or None,
    }
    if is_hub_name(base):
        metadata |= {"base_model": base, "base_model_relation": relation}
    if recipe is not None and (dataset := hub_name(recipe.dataset)):
        metadata["datasets"] = [dataset]
    return metadata


def _method(class_path: str, base_classes: list[str]) -> tuple[str, str]:
    """A tag and a description of the trainer's method; the tag of an unknown method is ""."""
    if class_path in METHODS:
        return METHODS[class_path]
    for base_class in base_classes:
        if base_class in METHODS:
            tag, method = METHODS[base_class]
            return tag, f"by `{class_path}`, a variant of {method.removeprefix('with ')}"
    return "", f"by `{class_path}`, a trainer that its recipe names"


def _tags(run_dir: Path) -> list[str]:
    """The tags of the run's own card. They name the method of a trainer that is not importable
    here.
    """
    from huggingface_hub import ModelCard

    card = run_dir / "README.md"
    return (ModelCard.load(card).data.tags or []) if card.is_file() else []


def _model_name(name: str) -> str:
    if is_hub_name(name):
        return f"[{name}](https://huggingface.co/{name})"
    return f"a local model (`{Path(name).name}`)"


def _usage(recipe: Recipe | None, import_line: str) -> str:
    """A section with code that loads the model and asks it a question as in training."""
    messages, tokens, template_options = [{"role": "user", "content": "What is 12 + 30?"}], 512, {}
    if recipe is not None:
        system = (recipe.dataset.system_instruction or "").strip()
        messages = with_system_message(messages, system, recipe.dataset.system_role)
        tokens = recipe.max_completion_length
        template_options = recipe.training.chat_template_kwargs or {}
    more = "".join(f", {name}={value!r}" for name, value in template_options.items())
    return f"""## Use it

```python
{import_line}
from transformers import AutoTokenizer

folder = "FOLDER_OR_REPOSITORY"
model, tokenizer = AutoModel.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
messages = {json.dumps(messages, ensure_ascii=False, indent=2)}
prompt = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{more}
)
tokens = model.generate(**prompt, max_new_tokens={tokens})[0]
print(tokenizer.decode(tokens[prompt["input_ids"].shape[1] :]))
```"""


def _training(
    recipe: Recipe,
    tag: str,
    base: str,
    run_dir: Path,
    step: int,
    history: list[dict],
    adapter: Path | None = None,
) -> list[str]:
    """The sections on training: recipe, metrics, evaluations, versions.

    With `adapter`, only evaluations of that adapter and of the model before training are listed.
    """
    settings = _table(("setting", "value"), _settings(recipe, tag, base, step).items())
    sections = [f"## Training\n\n{settings}"]
    logged = next((row for row in reversed(history) if "reward" in row), {})
    if logged:
        metrics = [
            (label, f"{logged[name]:.4g}")
            for name, label in METRICS.items()
            if isinstance(logged.get(name), int | float)
        ]
        sections.append(_table(("last logged", f"step {logged.get('step', step)}"), metrics))
    if evaluations := _evaluations(run_dir, step, adapter):
        head = ("file", "problems", "samples", "temperature", "accuracy", "format")
        sections.append(f"## Evaluation\n\n{_table(head, evaluations)}")
    if versions := read_versions(run_dir):
        known = [f"{name} {versions[name]}" for name in VERSIONS if name in versions]
        sections.append(f"## Versions\n\n{', '.join(known)}.")
    return sections


def _settings(recipe: Recipe, tag: str, base: str, step: int) -> dict[str, Any]:
    model, training, runtime = recipe.model, recipe.training, recipe.gtpo_runtime
    modules = ", ".join(model.target_modules)
    lengths = f"{recipe.max_prompt_length} and {recipe.max_completion_length}"
    settings = {
        "base model": _model_name(base),
        "LoRA": f"rank {model.lora_rank}, alpha {model.lora_alpha}, on {modules}",
        "base model in 4 bits": "on a GPU" if model.load_in_4bit else "no",
        "data": _data(recipe),
        "trainer": f"`{recipe.trainer.class_path}`",
        "rewards": ", ".join(f"`{path}`" for path in recipe.trainer.reward_funcs),
        "optimizer steps": step,
        "completions per prompt": training.num_generations,
        "longest prompt and completion (tokens)": lengths,
        "learning rate": f"{training.learning_rate} ({training.lr_scheduler_type})",
        "loss": training.loss_type,
        "division of advantages": training.scale_rewards,
        "KL weight": training.beta,
        "seed": recipe.seed,
    }
    if model.adapter:
        settings["started from"] = f"an earlier adapter (`{Path(model.adapter).name}`)"
    if tag != "grpo":
        settings["GTPO"] = (
            f"threshold {runtime.ent_threshold} nats, gamma {runtime.ent_scale},"
            f" lambda {runtime.w_raw}"
        )
    return settings


def _data(recipe: Recipe) -> str:
    section = recipe.dataset
    if section.path is not None:
        name = f"local files (`{Path(section.path).name}`)"
    else:
        name = hub_name(section) or f"`{section.name}`"
    subsets = section.subsets or ([section.subset] if section.subset else [])
    return ", ".join([name, *subsets, f"split {section.split}"])


def _evaluations(run_dir: Path, step: int, adapter: Path | None) -> list[tuple]:
    """A row for each evaluation that can be read; a warning names each other file."""
    rows = []
    for file in evaluation_files(run_dir):
        try:
            header, completions, *_ = read_evaluation(file)
            if adapter is not None and not _is_of(adapter, step, file, header):
                continue
            scores = mean_scores(completions, header["samples"])
        except (RecipeError, ValueError) as error:
            logger.warning("[GTPO] Left out of the model card: %s", error)
            continue
        accuracy, format_rate = (
            f"{scores.by_name[name].mean:.1%}" for name in ("accuracy", "format rate")
        )
        settings = (file.stem, scores.problems, header["samples"], header["temperature"])
        rows.append((*settings, accuracy, format_rate))
    return rows


def _is_of(adapter: Path, step: int, file: Path, header: dict[str, Any]) -> bool:
    """Whether an evaluation is of `adapter`, trained for `step` steps, or from before training.

    evaluate_model.py names the adapter in the header; an evaluation during training names the step.
    """
    names_adapter = Path(str(header.get("adapter"))).name == adapter.name
    return file.stem == "before" or names_adapter or header["weights"] == f"step {step}"


def _steps_and_history(adapter: Path, run_dir: Path) -> tuple[int, list[dict]]:
    """The steps and the log of an adapter's training, from the state that is saved with it."""
    state = read_state(adapter) or read_state(run_dir)
    return state.get("global_step", 0), state.get("log_history", [])


def _table(head: tuple, rows: Iterable[tuple]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
