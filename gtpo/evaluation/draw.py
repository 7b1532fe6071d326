"""Draw completions of problems, grade them as the reward does, and append each to a file."""

import logging
from typing import Any

from gtpo.answers import CannotCompare, final_answer, format_score, reference_answer, same_answer
from gtpo.errors import RecipeError
from gtpo.evaluation.file import EvaluationFile
from gtpo.models.generation import SampledCompletion, Sampler, completion_seed
from gtpo.models.prompt import prompt_text

logger = logging.getLogger(__name__)


def rendered_prompts(problems, tokenizer, chat_template_kwargs: dict | None = None) -> list[str]:
    """Returns each problem's prompt as text after the chat template, as in training."""
    return [prompt_text(tokenizer, prompt, chat_template_kwargs) for prompt in problems["prompt"]]


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

    What the prompts have already written of the answer is graded too: `file.header` says it.
    Prompts of similar length share a batch. The longest come first, so that a lack of memory shows
    at once. Raises RecipeError if a batch does not fit in the GPU's memory.
    """
    from tqdm.auto import tqdm

    if not file.missing:
        return file.rows
    # The sort is stable: a problem's samples stay together.
    missing = sorted(file.missing, key=lambda pair: -len(prompts[pair[0]]))
    seed, opening = file.header["seed"], file.header.get("prompt_opening", "")
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
                row = graded_row(problems[problem], completion, opening)
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


def graded_row(
    problem: dict[str, Any], completion: SampledCompletion, prompt_opening: str = ""
) -> dict[str, Any]:
    """Returns a completion's row of the file, without the numbers of its problem and sample.

    It is graded after `prompt_opening`, which the prompt has already written of the answer.
    A completion is correct if the reward pays for it: it is well formed and its answer is right.
    """
    text = prompt_opening + completion.text
    answer, well_formed = final_answer(text), format_score(text) == 10
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
