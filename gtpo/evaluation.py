"""Sample one completion per held-out problem, grade it as the reward does, and say how many are right."""

import json
from pathlib import Path
from typing import NamedTuple

from gtpo.answers import final_answer, format_score, same_answer


class Verdict(NamedTuple):
    """Shares of the evaluated problems, 0 to 1."""

    problems: int
    accuracy: float  # well formed and right, as the reward demands
    format_rate: float  # exactly one reasoning block, then exactly one answer block

    def __str__(self) -> str:
        return f"accuracy {self.accuracy:.1%}, format {self.format_rate:.1%}"


def evaluate(policy, problems, *, max_completion_length: int, batch_size: int, file: Path,
             chat_template_kwargs: dict | None = None) -> Verdict:
    """Greedy completions of all `problems`, each written to `file` (JSON lines) with its verdict."""
    from tqdm.auto import tqdm

    file.parent.mkdir(parents=True, exist_ok=True)
    right = formed = 0
    order = sorted(range(len(problems)), key=lambda i: len(str(problems[i]["prompt"])))  # alike lengths pad least
    with file.open("w", encoding="utf-8") as lines, tqdm(total=len(order), desc=f"evaluating {file.stem}", unit="problem") as bar:
        for start in range(0, len(order), batch_size):
            batch = [problems[i] for i in order[start : start + batch_size]]
            for problem, completion in zip(batch, complete(
                policy, [p["prompt"] for p in batch], max_completion_length, chat_template_kwargs or {}
            ), strict=True):
                well_formed = format_score(completion) == 10
                answer = final_answer(completion)
                correct = well_formed and same_answer(answer or "", final_answer(problem["answer"]) or "")
                right, formed = right + correct, formed + well_formed
                print(json.dumps({"prompt": problem["prompt"], "reference": problem["answer"], "completion": completion,
                                  "well_formed": well_formed, "correct": correct}, ensure_ascii=False), file=lines)
            bar.update(len(batch))
    return Verdict(len(order), right / len(order), formed / len(order))


def complete(policy, prompts: list[list[dict]], max_completion_length: int, chat_template_kwargs: dict) -> list[str]:
    """The greedy completion of each prompt, as the reward sees it: decoded, without special tokens."""
    import torch

    tokenizer = policy.tokenizer
    texts = [tokenizer.apply_chat_template(p, add_generation_prompt=True, tokenize=False, **chat_template_kwargs) for p in prompts]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    with torch.no_grad(), policy.generating() as model:
        ids = model.generate(
            **{k: v.to(model.device) for k, v in inputs.items() if k in ("input_ids", "attention_mask")},
            max_new_tokens=max_completion_length, do_sample=False, temperature=None, top_p=None, top_k=None,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
        )
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
