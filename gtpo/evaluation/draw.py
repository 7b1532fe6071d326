"""Draw completions of problems, grade them as the reward does, and append each to a file."""

import logging
from typing import Any

from gtpo.answers import CannotCompare, final_answer, format_score, reference_answer, same_answer
from gtpo.errors import RecipeError
from gtpo.evaluation.file import EvaluationFile
from gtpo.models.generation import SampledCompletion, Sampler, completion_seed

logger = logging.getLogger(__name__)


def rendered_prompts(problems, tokenizer, chat_template_kwargs: dict | None = None) -> list[str]:
    """Returns each problem's prompt as text after the chat template, as in training."""
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
    """Draws the completions that `file` lacks, grades and appends them; returns all rows.

    Prompts of similar length share a batch. The longest come first, so that a lack of memory shows
    at once. Raises RecipeError if a batch does not fit in the GPU's memory.
    """
    from tqdm.auto import tqdm

    if not file.missing:
        return file.rows
    # The sort is stable: a problem's samples stay together.
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
            batch_prompts = [prompts[problem] for problem, _ in batch]
            seeds = [completion_seed(seed, problem, sample) for problem, sample in batch]
            completions = _draw(sampler, batch_prompts, seeds)
            for (problem, sample), completion in zip(batch, completions, strict=True):
                row = graded_row(problems[problem], completion)
                file.append({"problem": problem, "sample": sample, **row})
            bar.update(len(batch))
    return file.rows


def _draw(sampler: Sampler, prompts: list[str], seeds: list[int]) -> list[SampledCompletion]:
    import torch

    try:
        return sampler(prompts, seeds)
    except torch.OutOfMemoryError:
        raise RecipeError(
            "evaluation.batch_size",
            f"the GPU has no memory for {len(prompts)} completions at a time; use a smaller value,"
            " and the evaluation continues where it stopped",
        ) from None


def _is_right(answer: str, reference: str) -> bool:
    try:
        return same_answer(answer, reference)
    except CannotCompare as error:
        logger.warning("[GTPO] Not graded, so counted as wrong: %r (%s)", answer, error)
        return False


def graded_row(problem: dict[str, Any], completion: SampledCompletion) -> dict[str, Any]:
    """Returns a completion's row of the file, without the numbers of its problem and sample.

    A completion is correct if the reward pays for it: it is well formed and its answer is right.
    """
    answer, well_formed = final_answer(completion.text), format_score(completion.text) == 10
    reference = problem.get("reference", problem["answer"])
    correct = well_formed and _is_right(answer, reference_answer(reference))
    return {
        "prompt": problem["prompt"],
        "reference": reference,
        "completion": completion.text,
        "answer": answer,
        "correct": correct,
        "well_formed": well_formed,
        "truncated": completion.truncated,
        "tokens": completion.tokens,
    }
