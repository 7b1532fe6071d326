"""Sample completions of problems, grade them as the reward does, and write each as it comes."""

import logging
from typing import Any

from gtpo.answers import final_answer, format_score, reference_answer, same_answer
from gtpo.errors import RecipeError
from gtpo.evaluation.file import EvaluationFile
from gtpo.models.generation import SampledCompletion, Sampler, completion_seed

logger = logging.getLogger(__name__)


def rendered_prompts(problems, tokenizer, chat_template_kwargs: dict | None = None) -> list[str]:
    """Each problem's prompt after the chat template, as it is in training."""
    return [
        tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, tokenize=False, **(chat_template_kwargs or {})
        )
        for prompt in problems["prompt"]
    ]


def evaluate(
    file: EvaluationFile,
    sampler: Sampler,
    problems,
    prompts: list[str],
    *,
    batch_size: int,
    keep_bar: bool = True,
) -> list[dict[str, Any]]:
    """Draw what is missing in `file`, grade it and append it there; returns all rows.

    Prompts of like length go together, the longest first, so that what does not fit in memory shows
    at once.
    """
    from tqdm.auto import tqdm

    if not file.missing:
        return file.rows
    # stable: a problem's samples stay together
    missing = sorted(file.missing, key=lambda pair: -len(prompts[pair[0]]))
    seed = file.header["seed"]
    with (
        file,
        tqdm(
            total=len(missing) + len(file.rows),
            initial=len(file.rows),
            desc=f"evaluating {file.path.stem}",
            unit="completion",
            leave=keep_bar,
        ) as bar,
    ):
        for start in range(0, len(missing), batch_size):
            batch = missing[start : start + batch_size]
            drawn = _draw(
                sampler,
                [prompts[p] for p, _ in batch],
                [completion_seed(seed, *pair) for pair in batch],
            )
            for (problem, sample), completion in zip(batch, drawn, strict=True):
                file.append(
                    {"problem": problem, "sample": sample, **graded(problems[problem], completion)}
                )
            bar.update(len(batch))
    return file.rows


def _draw(sampler: Sampler, prompts: list[str], seeds: list[int]) -> list[SampledCompletion]:
    import torch

    try:
        return sampler(prompts, seeds)
    except torch.OutOfMemoryError:
        raise RecipeError(
            "batch_size",
            f"the GPU has no memory for {len(prompts)} completions at a time; use a smaller one,"
            " and the evaluation goes on where it stopped",
        ) from None


def graded(problem: dict[str, Any], completion: SampledCompletion) -> dict[str, Any]:
    """A completion with its verdict: correct is what the reward pays for, well formed with the
    right answer.
    """
    answer, well_formed = final_answer(completion.text), format_score(completion.text) == 10
    correct = well_formed and same_answer(answer, reference_answer(problem["answer"]))
    return {
        "prompt": problem["prompt"],
        "reference": problem["answer"],
        "completion": completion.text,
        "answer": answer,
        "correct": correct,
        "well_formed": well_formed,
        "truncated": completion.truncated,
        "tokens": completion.tokens,
    }
