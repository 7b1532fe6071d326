"""Keep padding apart from tokens in Unsloth's trainer, which takes every padding id for padding.

unsloth 2026.10.7 and unsloth_zoo 2026.10.7 drop and repack a row at each id that equals the
tokenizer's `pad_token_id`. So a token that was sampled, or that stands in a prompt, would not count
where it has this id. For many models that is the end of a turn. The masks of TRL say what is
padding. By them, padding gets an id that stands nowhere in the rows, for the time of a call.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from trl import GRPOTrainer

from gtpo.hooks.seams import wrap


def keep_padding_apart(trainer: GRPOTrainer) -> None:
    """Attaches the hook to a trainer that Unsloth has generated; leaves others alone.

    GTPO's trainer attaches it to itself. A second call does nothing.
    """
    if not _is_unsloths(trainer) or getattr(trainer, "keeps_padding_apart", False):
        return
    trainer.keeps_padding_apart = True

    def around_loss(compute_loss: Callable, model, inputs, *args, **kwargs):
        with padding_apart_in_loss(trainer, inputs) as rows:
            return compute_loss(model, rows, *args, **kwargs)

    def around_log_probs(log_probs: Callable, model, input_ids, attention_mask, *args, **kwargs):
        with padding_apart(trainer, (input_ids, attention_mask)) as (rows,):
            return log_probs(model, rows, attention_mask, *args, **kwargs)

    wrap(trainer, "compute_loss", around_loss)
    wrap(trainer, "_get_per_token_logps_and_entropies", around_log_probs)


@contextlib.contextmanager
def padding_apart_in_loss(
    trainer: GRPOTrainer, inputs: dict[str, Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Yields the inputs of a loss; inside, their padding is kept apart if Unsloth computes it."""
    if not _is_unsloths(trainer):
        yield inputs
        return
    names = ("prompt", "completion")
    pairs = [(inputs[f"{name}_ids"], inputs[f"{name}_mask"]) for name in names]
    with padding_apart(trainer, *pairs) as (prompts, completions):
        yield {**inputs, "prompt_ids": prompts, "completion_ids": completions}


@contextlib.contextmanager
def padding_apart(trainer: GRPOTrainer, *pairs: tuple[Tensor, Tensor]) -> Iterator[list[Tensor]]:
    """Yields the ids of each pair (ids, mask), both (B, T), with padding that no token has.

    Inside, the `pad_token_id` of `trainer.processing_class` is that of this padding. Where no token
    has the id of the padding anyway, nothing changes.
    """
    processing_class = trainer.processing_class
    pad_id = processing_class.pad_token_id
    if not any(((ids == pad_id) & mask.bool()).any() for ids, mask in pairs):
        yield [ids for ids, _ in pairs]
        return
    spare = _absent_id([ids for ids, _ in pairs])
    trainer.processing_class = _WithPadding(processing_class, spare)
    try:
        yield [ids.masked_fill(~mask.bool(), spare) for ids, mask in pairs]
    finally:
        trainer.processing_class = processing_class


class _WithPadding:
    """A tokenizer or processor with another `pad_token_id`."""

    def __init__(self, processing_class, pad_token_id: int):
        self._processing_class, self.pad_token_id = processing_class, pad_token_id

    def __getattr__(self, name: str):
        return getattr(self._processing_class, name)


def _absent_id(rows: list[Tensor]) -> int:
    """The smallest id that stands nowhere in `rows`."""
    present = torch.cat([ids.flatten() for ids in rows]).unique()  # sorted
    gaps = present != torch.arange(len(present), device=present.device)
    return int(gaps.int().argmax()) if gaps.any() else len(present)


def _is_unsloths(trainer: GRPOTrainer) -> bool:
    """Whether `PatchFastRL` has generated a class of `trainer`, in a module of that name."""
    return any(cls.__module__ == "UnslothGRPOTrainer" for cls in type(trainer).__mro__)
