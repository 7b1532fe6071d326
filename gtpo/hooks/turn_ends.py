"""Where a completion ends: at the first of the ids that end an assistant's turn.

trl 1.13.0 knows one such id, the tokenizer's end token, and takes the padding token for another.
Many models end a turn with a third. This hook lets a trainer generate up to any of the ids, drops
what follows the first of them, and corrects what TRL counts and masks as truncated.

`gtpo.models.tokenizer` decides the ids once per run, and keeps them with the tokenizer.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from gtpo.hooks.seams import wrap

if TYPE_CHECKING:  # models import this module before the backend has patched TRL
    from trl import GRPOTrainer

KEY = "turn_ends"  # of tokenizer_config.json; it is absent where the end token alone ends a turn
# Keys of generation_kwargs that name ids: transformers' name, and that of vLLM.
ID_KEYS = ("eos_token_id", "stop_token_ids")
# The share of all completions that are truncated and hold an end of a turn that ends nothing.
END_INSIDE = "completions/turn_end_inside"


def turn_ends(tokenizer) -> tuple[int, ...]:
    """The ids that end a turn: those kept with the tokenizer, else its end token alone."""
    kept = getattr(tokenizer, "init_kwargs", {}).get(KEY)
    if kept:
        return tuple(kept)
    return () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)


def given_ends(generation_kwargs: Mapping[str, Any] | None) -> tuple[int, ...]:
    """The ids that TRL's option `generation_kwargs` names as ends; none if it names none."""
    given = (generation_kwargs or {}).get
    values = [given(key) for key in ID_KEYS if given(key) is not None]
    ids = [value if isinstance(value, Sequence) else [value] for value in values]
    return tuple(dict.fromkeys(token for several in ids for token in several))


def ends_of(trainer: "GRPOTrainer") -> tuple[int, ...]:
    """The ids that end a turn for `trainer`: those of its tokenizer and of its options."""
    given = trainer.args.generation_kwargs
    given = given_ends(given if isinstance(given, Mapping) else None)
    return tuple(dict.fromkeys((*given, *turn_ends(_tokenizer(trainer)))))


def up_to_end(ids: Sequence[int], ends: Sequence[int]) -> Sequence[int]:
    """`ids` up to the first end, which is included. What follows is padding, whatever its id."""
    length = next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))
    return ids[:length]


def is_truncated(ids: Sequence[int], ends: Sequence[int]) -> bool:
    """Whether a completion, cut by `up_to_end`, has no end."""
    return not len(ids) or ids[-1] not in ends


def end_turns(trainer: "GRPOTrainer", unheeded: Sequence[str] = ()) -> "EndTurns":
    """Returns the trainer's own hook, or attaches a new one; it counts the texts `unheeded`.

    GTPO's trainer attaches a hook to itself and keeps it as `turn_ends`.
    """
    hook = getattr(trainer, "turn_ends", None) or EndTurns(trainer)
    hook.unheeded = tuple(unheeded)
    return hook


class EndTurns:
    """Lets completions of `trainer` end at any of its ids, `ends`.

    `unheeded` holds texts with which a turn may end too, although they end no completion. Where
    there are any, the metric END_INSIDE counts truncated completions that hold one.
    """

    def __init__(self, trainer: "GRPOTrainer"):
        self.trainer, self.tokenizer, self.ends = trainer, _tokenizer(trainer), ends_of(trainer)
        self.unheeded: tuple[str, ...] = ()
        self._masks_truncated = trainer.mask_truncated_completions
        self._set_generation()
        wrap(trainer, "_generate_single_turn", self._around_turn)
        wrap(trainer, "_generate", self._around_generate)

    def _set_generation(self) -> None:
        trainer = self.trainer
        if not trainer.use_vllm:
            ends = self.ends[0] if len(self.ends) == 1 else list(self.ends)
            for key in ID_KEYS:
                vars(trainer.generation_config).pop(key, None)
                trainer.generation_kwargs.pop(key, None)
            trainer.generation_config.eos_token_id = ends or None
            trainer.generation_kwargs["eos_token_id"] = ends or None
        elif getattr(trainer, "vllm_generation", None) is not None:
            given = trainer.vllm_generation.generation_kwargs
            given = {name: value for name, value in given.items() if name not in ID_KEYS}
            # vLLM itself would also end at the ids of the model's generation_config.
            ends = {"ignore_eos": True, "stop_token_ids": list(self.ends)}
            trainer.vllm_generation.generation_kwargs = given | ends

    def _around_turn(self, generate: Callable, *args, **kwargs):
        completions, log_probs = generate(*args, **kwargs)
        completions = [up_to_end(ids, self.ends) for ids in completions]
        if log_probs is not None:
            pairs = zip(completions, log_probs, strict=True)
            log_probs = [values[: len(ids)] for ids, values in pairs]
        return completions, log_probs

    def _around_generate(self, generate: Callable, *args, **kwargs):
        trainer = self.trainer
        mode = "train" if trainer.model.training else "eval"
        trainer.mask_truncated_completions = self._masks_truncated
        prompts, ids, tool_mask, *rest = generate(*args, **kwargs)
        truncated = [is_truncated(row, self.ends) for row in ids]
        self._correct_metrics(trainer._metrics[mode], ids, tool_mask, truncated)
        tokenizer = self.tokenizer
        by_trl = [row[-1] not in (tokenizer.eos_token_id, tokenizer.pad_token_id) for row in ids]
        if self._masks_truncated and truncated != by_trl:
            # TRL multiplies its mask by this one, which otherwise marks the output of tools.
            trainer.mask_truncated_completions = False
            rows = tool_mask or [[1] * len(row) for row in ids]
            tool_mask = [
                [0] * len(row) if cut else row for row, cut in zip(rows, truncated, strict=True)
            ]
        return prompts, ids, tool_mask, *rest

    def _correct_metrics(
        self,
        metrics: dict[str, list[float]],
        ids: list[list[int]],
        tool_mask: list[list[int]] | None,
        truncated: list[bool],
    ) -> None:
        """Puts our figures in place of those that TRL has just appended.

        All processes take part, with completions of their own.
        """
        import torch

        lengths = [sum(row) for row in tool_mask] if tool_mask else [len(row) for row in ids]
        inside = [
            cut and self._has_unheeded_end(row) for row, cut in zip(ids, truncated, strict=True)
        ]
        rows = torch.tensor(
            [lengths, truncated, inside],
            dtype=torch.float32,
            device=self.trainer.accelerator.device,
        )
        lengths, truncated, inside = self.trainer.accelerator.gather(rows.T.contiguous()).T
        ended = lengths[truncated == 0]
        ended = ended if len(ended) else torch.zeros(1)
        figures = {
            "clipped_ratio": truncated.mean(),
            "mean_terminated_length": ended.mean(),
            "min_terminated_length": ended.min(),
            "max_terminated_length": ended.max(),
        }
        for name, value in figures.items():
            metrics[f"completions/{name}"][-1] = value.item()
        if self.unheeded:
            metrics[END_INSIDE].append(inside.mean().item())

    def _has_unheeded_end(self, ids: list[int]) -> bool:
        if not self.unheeded:
            return False
        text = self.tokenizer.decode(ids, skip_special_tokens=False)
        return any(end in text for end in self.unheeded)


def _tokenizer(trainer: "GRPOTrainer"):
    """The tokenizer of `trainer`, also where a processor holds it."""
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
