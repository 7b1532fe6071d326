"""Train a tiny policy with a recorder, and read what it wrote."""

import copy
import json
import os
from pathlib import Path

import gradients


def some_unscored(completions, **kwargs) -> list[float | None]:
    """The usual reward of the tests, and None for a completion that begins with an a."""
    rewards = gradients.letters_reward(completions)
    return [
        None if text.startswith("a") else reward
        for text, reward in zip(completions, rewards, strict=True)
    ]


def record(
    class_path: str, folder, *, record: bool = True, tokens_every: int = 1, **options
) -> dict:
    """The lines, rollouts and adapter of a short run, and the error of its recorded entropies.

    The error is the largest distance from the policy's own entropies in the first rollout.
    """
    file = Path(folder, "completions.jsonl")
    if record and int(os.environ.get("RANK", "0")) == 0:
        file.unlink(missing_ok=True)
    trainer = gradients.make_trainer(class_path, str(folder), **{"max_steps": 2, **options})
    before = copy.deepcopy(trainer.model)
    seen = gradients.record_steps(trainer)
    if record:
        from gtpo.hooks.recorder import Recorder

        Recorder(trainer, file, tokens_every=tokens_every)
    trainer.train()
    trainer.accelerator.wait_for_everyone()
    lines = [json.loads(line) for line in file.read_text().splitlines()] if record else []
    first = [line for line in lines if line["step"] == 1 and "ids" in line]
    return {
        "lines": lines,
        "rollouts": [{**rollout, "number": i} for i, rollout in enumerate(seen["rollouts"], 1)],
        "adapter": {
            n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad
        },
        "entropy_error": max((entropy_error(before, trainer, line) for line in first), default=0.0),
    }


def entropy_error(model, trainer, line: dict) -> float:
    """The largest distance of a line's entropies from those of `model`.

    `model` runs in float64 on this completion alone.
    """
    import torch

    model = gradients.float64_copy(model)
    prompt = trainer.processing_class(line["prompt"], add_special_tokens=False)["input_ids"]
    ids = torch.tensor([prompt + line["ids"]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(prompt) - 1 : -1]
    log_probs = (logits / trainer.args.temperature).log_softmax(-1)
    expected = -(log_probs.exp() * log_probs).sum(-1)
    pairs = [
        (x, y)
        for x, y in zip(line["entropies"] or [], expected.tolist(), strict=bool(line["entropies"]))
        if x is not None
    ]
    return max((abs(x - y) for x, y in pairs), default=0.0)
