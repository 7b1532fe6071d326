"""Run directories made without training; conflict runs and weights come from gtpo.shaping."""

import json
from pathlib import Path

import torch

from gtpo import shaping
from gtpo.recipe.yaml_text import write_yaml

RECIPE = {
    "run_name": "small",
    "model": {"model_name": "some/model", "random_seed": 1},
    "dataset": {"name": "gsm8k"},
    "training": {"learning_rate": 1e-4, "report_to": ["none"]},
    "trainer": {"class_path": "gtpo.gtpo_training.UnslothGTPOTrainer"},
}
# fmt: off
RIGHT = ["<reasoning>", "\n", "2+2", "=4", "\n", "</reasoning>", "\n",
         "<answer>", "4", "</answer>", "<end>"]
WRONG = ["<reasoning>", "\n", "2+2", "=5", "\n", "</reasoning>", "\n",
         "<answer>", "5", "</answer>", "<end>"]
# fmt: on


def group(
    rows: list[tuple[list[str], float]],
    *,
    step: int = 1,
    number: int = 0,
    weight: float | None = 2.0,
    rollout: int | None = None,
    **more,
) -> list[dict]:
    """One group as lines of completions.jsonl; a row has tokens and a reward.

    `weight` is None for a trainer without token weights.
    """
    rewards = torch.tensor([reward for _, reward in rows])
    advantages = rewards - rewards.mean()
    width = max(len(tokens) for tokens, _ in rows)
    mask = torch.tensor([[i < len(tokens) for i in range(width)] for tokens, _ in rows])
    ids = torch.tensor(
        [[_id(tokens[i]) if i < len(tokens) else 0 for i in range(width)] for tokens, _ in rows]
    )
    prefix, suffix = shaping.conflict_runs(ids, mask, advantages)
    weights = None if weight is None else shaping.token_weights(prefix | suffix, advantages, weight)
    return [
        {
            "step": step,
            "rollout": step if rollout is None else rollout,
            "group": number,
            "row": row,
            "prompt": [{"role": "user", "content": "What is 2+2?"}],
            "completion": "".join(tokens).removesuffix("<end>"),
            "answer": "<answer>4</answer>",
            "reward": reward,
            "rewards": {"final_reward": reward},
            "advantage": advantages[row].item(),
            "entropy": 0.25,
            "kept": None if weight is None else True,
            "truncated": False,
            "ids": [_id(token) for token in tokens],
            "tokens": tokens,
            "weights": None if weights is None else weights[row, : len(tokens)].tolist(),
            "entropies": [round(0.001 * (i + 1), 3) for i in range(len(tokens))],
            "prefix": int(prefix[row].sum()),
            "suffix": int(suffix[row].sum()),
            **more,
        }
        for row, (tokens, reward) in enumerate(rows)
    ]


def _id(token: str) -> int:
    return hash(token) % 2**31  # stable within one process


def write_run(
    folder: Path,
    lines: list[dict] = (),
    history: list[dict] = (),
    *,
    recipe: dict | None = None,
    max_steps: int | None = None,
    checkpoint: int | None = None,
) -> Path:
    """A run directory; with `checkpoint`, of a run that has not finished.

    `recipe` has values that replace those of RECIPE.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sections = {
        name: {**RECIPE.get(name, {}), **values} if isinstance(values, dict) else values
        for name, values in (recipe or {}).items()
    }
    with (folder / "recipe.yaml").open("w", encoding="utf-8") as file:
        write_yaml({**RECIPE, **sections}, file)
    (folder / "versions.json").write_text(
        json.dumps({"gtpo": "0.1.0", "commit": "abc", "torch": "2"})
    )
    if lines:
        (folder / "completions.jsonl").write_text(
            "".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8"
        )
    if history:
        place = folder / f"checkpoint-{checkpoint}" if checkpoint else folder
        place.mkdir(exist_ok=True)
        state = {"log_history": list(history), "max_steps": max_steps or history[-1]["step"]}
        (place / "trainer_state.json").write_text(json.dumps(state))
    return folder


def rising(steps: int, **changes) -> list[dict]:
    """A log history of a run that learns; `changes` maps metrics to functions of the step.

    In a metric's name, `__` stands for `/`.
    """
    metrics = {
        "reward": lambda s: 5 + 10 * s / steps,
        "reward/formatting_avg": lambda s: 8,
        "reward/correctness_avg": lambda s: 5,
        "gtpo/completion_entropy": lambda s: 0.4 - 0.1 * s / steps,
        "gtpo/frac_conflict_tokens": lambda s: 0.3,
        "gtpo/frac_filtered": lambda s: 0.0,
        "gtpo/skipped_steps": lambda s: 0.0,
        "completions/mean_length": lambda s: 12,
        "completions/clipped_ratio": lambda s: 0.0,
        "grad_norm": lambda s: 1 / s,
        "step_time": lambda s: 0.5,
        "frac_reward_zero_std": lambda s: 0.1,
        **{name.replace("__", "/"): value for name, value in changes.items()},
    }
    return [
        {"step": s, **{name: value(s) for name, value in metrics.items()}}
        for s in range(1, steps + 1)
    ]


def write_evaluation(file: Path, correct: list[list[bool]], **settings) -> None:
    """Writes an evaluation file; `correct` has a list of samples per problem."""
    header = {
        "problems": len(correct),
        "samples": len(correct[0]),
        "temperature": 0.0,
        "top_p": 1.0,
        "seed": 1,
        "max_completion_length": 9,
        "weights": "w",
        "prompts": "p",
        **settings,
    }
    rows = [
        {
            "problem": problem,
            "sample": sample,
            "prompt": [],
            "reference": "4",
            "completion": RIGHT[0],
            "answer": "4" if right else "5",
            "correct": right,
            "well_formed": True,
            "truncated": False,
            "tokens": 11,
        }
        for problem, row in enumerate(correct)
        for sample, right in enumerate(row)
    ]
    file.parent.mkdir(exist_ok=True)
    file.write_text(
        "".join(json.dumps(line) + "\n" for line in [{"header": header}, *rows]), encoding="utf-8"
    )
