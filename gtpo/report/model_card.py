"""The model card of an adapter or a merged model: what it is, how it was trained, what came out,
how to load it.

Written from the recipe and the run directory's files. No path of this machine, no environment and
no secret is in it.
"""

import json
import logging
import os
from pathlib import Path

from gtpo.data import DATASETS
from gtpo.errors import RecipeError
from gtpo.evaluation.file import read_evaluation
from gtpo.evaluation.scores import mean_scores
from gtpo.models.base_model import is_hub_name
from gtpo.recipe import Recipe
from gtpo.system.whole_files import write_whole

logger = logging.getLogger(__name__)

GTPO = (
    "**GTPO** (Group-relative Trajectory-based Policy Optimization, [arXiv"
    " 2508.03772](https://arxiv.org/abs/2508.03772))"
)
GRPO = (
    "**GRPO** (Group Relative Policy Optimization, [arXiv"
    " 2402.03300](https://arxiv.org/abs/2402.03300))"
)
METHODS = {  # trainer, or one that it inherits from -> tag, sentence
    "gtpo.gtpo_training.UnslothGTPOTrainer": ("gtpo", f"with {GTPO}"),
    "custom_trainer.released.ReleasedGTPOTrainer": (
        "gtpo",
        f"with {GTPO}, computed as in its authors' released code",
    ),
    "custom_trainer.original.UnslothGRPOTrainer": (
        "grpo",
        f"with {GRPO}, the baseline that GTPO is compared with",
    ),
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
    write_whole(Path(folder) / "README.md", card)


def describe_saves(model, trainer, recipe: Recipe, run_dir: Path) -> None:
    """Let every save of `model`, a PeftModel, write this card: peft's own names a folder and is
    empty otherwise.
    """
    model.create_or_update_model_card = lambda folder: write(
        folder, adapter_card(recipe, run_dir, trainer)
    )


def adapter_card(recipe: Recipe, run_dir: Path, trainer) -> str:
    """The card of the adapter as `trainer` has made it so far."""
    ancestors = [f"{kind.__module__}.{kind.__name__}" for kind in type(trainer).__mro__[1:]]
    tag, method = _method(recipe.trainer.class_path, ancestors)
    state, base = trainer.state, recipe.model.model_name
    about = f"A LoRA adapter for {_model_name(base)}, trained {method}."
    return _card(
        recipe.run_name,
        _metadata(recipe, base, "peft", [tag, "lora", "trl"], "adapter"),
        [
            about,
            _usage(recipe, "from peft import AutoPeftModelForCausalLM as AutoModel"),
            *_training(recipe, tag, base, run_dir, state.global_step, state.log_history),
        ],
    )


def merged_card(saved, dtype: str, fidelity: str) -> str:
    """The card of the weights merged from `saved`, with what the comparison with the adapter
    found.
    """
    recipe, title, tags, story = saved.recipe, "Merged model", [], []
    about = (
        f"The weights of {_model_name(saved.base)} with a LoRA adapter merged into them ({dtype})"
    )
    if recipe is None:
        about += "; how the adapter was trained is not recorded with it."
    else:
        title = f"{recipe.run_name}, merged"
        told = _tags(saved.run_dir)
        tag, method = _method(
            recipe.trainer.class_path, [name for name, (tag, _) in METHODS.items() if tag in told]
        )
        tags, about = [tag, "trl"], f"{about}. The adapter was trained {method}."
        step, history = _logged(saved.adapter, saved.run_dir)
        story = _training(recipe, tag, saved.base, saved.run_dir, step, history, of=saved.adapter)
    compared = f"Held against base model and adapter after merging: {fidelity}."
    if recipe is not None and recipe.model.load_in_4bit:
        compared += (
            " The recipe loads the base model in 4 bits; merged into, and compared on, is the one"
            " in 16 bits."
        )
    return _card(
        title,
        _metadata(recipe, saved.base, "transformers", tags, "finetune"),
        [
            about,
            compared,
            _usage(recipe, "from transformers import AutoModelForCausalLM as AutoModel"),
            *story,
        ],
    )


def _card(title: str, metadata: dict, paragraphs: list[str]) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(**metadata)
    return "\n\n".join([f"---\n{data.to_yaml()}\n---", f"# {title}", *paragraphs]) + "\n"


def _metadata(
    recipe: Recipe | None, base: str, library: str, tags: list[str], relation: str
) -> dict:
    """The hub's keys; base models and datasets only where they are the hub's: it refuses others."""
    found = {
        "library_name": library,
        "pipeline_tag": "text-generation",
        "tags": [tag for tag in tags if tag] or None,
    }
    if is_hub_name(base):
        found |= {"base_model": base, "base_model_relation": relation}
    if recipe is not None and recipe.dataset.path is None and recipe.dataset.kind in DATASETS:
        found["datasets"] = [DATASETS[recipe.dataset.kind].hub_name]
    return found


def _method(class_path: str, ancestors: list[str]) -> tuple[str, str]:
    """A tag and how it was trained: by a trainer known by name, or by one derived from such a
    one.
    """
    if class_path in METHODS:
        return METHODS[class_path]
    for ancestor in ancestors:
        if ancestor in METHODS:
            tag, method = METHODS[ancestor]
            return tag, f"by `{class_path}`, a variant of {method.removeprefix('with ')}"
    return "", f"by `{class_path}`, a trainer that its recipe names"


def _tags(run_dir: Path) -> list[str]:
    """The tags of the run's own card, which was written where the trainer's class was at hand."""
    from huggingface_hub import ModelCard

    card = run_dir / "README.md"
    return (ModelCard.load(card).data.tags or []) if card.is_file() else []


def _model_name(name: str) -> str:
    if is_hub_name(name):
        return f"[{name}](https://huggingface.co/{name})"
    return f"a local model (`{Path(name).name}`)"


def _usage(recipe: Recipe | None, imported: str) -> str:
    messages, tokens = [{"role": "user", "content": "What is 12 + 30?"}], 512
    if recipe is not None:
        system, tokens = recipe.dataset.system_instruction, recipe.max_completion_length
        messages = ([{"role": "system", "content": system.strip()}] if system else []) + messages
    template = recipe.training.chat_template_kwargs if recipe is not None else None
    more = "".join(f", {name}={value!r}" for name, value in (template or {}).items())
    return f"""## Use it

```python
{imported}
from transformers import AutoTokenizer

model, tokenizer = AutoModel.from_pretrained("FOLDER_OR_REPOSITORY"), AutoTokenizer.from_pretrained("FOLDER_OR_REPOSITORY")
messages = {json.dumps(messages, ensure_ascii=False, indent=2)}
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"{more})
print(tokenizer.decode(model.generate(**prompt, max_new_tokens={tokens})[0, prompt["input_ids"].shape[1]:]))
```"""


def _training(
    recipe: Recipe,
    tag: str,
    base: str,
    run_dir: Path,
    step: int,
    history: list[dict],
    of: Path | None = None,
) -> list[str]:
    """The sections on training: recipe, metrics, evaluation (of the adapter `of` at that step
    alone, if one is given), versions.
    """
    model, training = recipe.model, recipe.training
    values = {
        "base model": _model_name(base),
        "LoRA": (
            f"rank {model.lora_rank}, alpha {model.lora_alpha}, on"
            f" {', '.join(model.target_modules)}"
        ),
        "base model in 4 bits": "where there is a GPU" if model.load_in_4bit else "no",
        "data": _data(recipe),
        "trainer": f"`{recipe.trainer.class_path}`",
        "rewards": ", ".join(f"`{path}`" for path in recipe.trainer.reward_funcs),
        "optimizer steps": step,
        "completions per prompt": training.num_generations,
        "longest prompt and completion (tokens)": (
            f"{recipe.max_prompt_length} and {recipe.max_completion_length}"
        ),
        "learning rate": f"{training.learning_rate} ({training.lr_scheduler_type})",
        "loss": training.loss_type,
        "division of advantages": training.scale_rewards,
        "KL weight": training.beta,
        "seed": recipe.seed,
    }
    if model.adapter:
        values["started from"] = f"an earlier adapter (`{Path(model.adapter).name}`)"
    if tag != "grpo":
        runtime = recipe.gtpo_runtime
        values["GTPO"] = (
            f"threshold {runtime.ent_threshold} nats, gamma {runtime.ent_scale}, lambda"
            f" {runtime.w_raw}"
        )
    sections = ["## Training\n\n" + _table(("setting", "value"), values.items())]
    logged = next((row for row in reversed(history) if "reward" in row), {})
    if logged:
        rows = [
            (label, f"{logged[name]:.4g}")
            for name, label in METRICS.items()
            if isinstance(logged.get(name), int | float)
        ]
        sections.append(_table(("logged last", f"step {logged.get('step', step)}"), rows))
    if evaluations := _evaluations(run_dir, step, of):
        head = ("file", "problems", "samples", "temperature", "accuracy", "format")
        sections.append("## Evaluation\n\n" + _table(head, evaluations))
    versions = run_dir / "versions.json"
    if versions.is_file():
        told = json.loads(versions.read_text(encoding="utf-8"))
        sections.append(
            "## Versions\n\n"
            + ", ".join(f"{name} {told[name]}" for name in VERSIONS if name in told)
            + "."
        )
    return sections


def _data(recipe: Recipe) -> str:
    section = recipe.dataset
    if section.path is not None:
        name = f"local files (`{Path(section.path).name}`)"
    else:
        name = DATASETS[section.kind].hub_name if section.kind in DATASETS else f"`{section.name}`"
    subsets = section.subsets or ([section.subset] if section.subset else [])
    return ", ".join([name, *subsets, f"split {section.split}"])


def _evaluations(run_dir: Path, step: int, of: Path | None) -> list[tuple]:
    rows = []
    for file in sorted((run_dir / "evaluation").glob("*.jsonl"), key=os.path.getmtime):
        try:
            header, completions, *_ = read_evaluation(file)
            # evaluate_model.py's; those of the training name a step
            theirs = Path(str(header.get("adapter"))).name
            if (
                of is not None
                and file.stem != "before"
                and theirs != of.name
                and header["weights"] != f"step {step}"
            ):
                continue
            found = mean_scores(completions, header["samples"])
        except (RecipeError, ValueError) as error:
            logger.warning("[GTPO] Left out of the model card: %s", error)
            continue
        accuracy, form = (f"{found.by_name[name].mean:.1%}" for name in ("accuracy", "format rate"))
        rows.append(
            (file.stem, found.problems, header["samples"], header["temperature"], accuracy, form)
        )
    return rows


def _logged(adapter: Path, run_dir: Path) -> tuple[int, list[dict]]:
    """Steps and log of an adapter's training, from the state that was saved with it."""
    for folder in (adapter, run_dir):
        if (folder / "trainer_state.json").is_file():
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
            return state["global_step"], state["log_history"]
    return 0, []


def _table(head: tuple, rows) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(str(cell) for cell in line)} |" for line in lines)
