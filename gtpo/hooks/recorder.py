"""Record every training completion in an append-only file, one JSON object per line.

Works with any `trl.GRPOTrainer`: GTPO's, Unsloth's or a user's. It only looks at what passes
through four methods of the trainer, so training does not change by a bit. A line is written when a
completion is first trained on. `gtpo.hooks.completion_line` lists its keys.

Letters: N rows of all processes, B rows of a micro-batch, T completion columns, W loss columns.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOTrainer

from gtpo import shaping
from gtpo.hooks.completion_line import encoded
from gtpo.hooks.groups import compared_rewards, whole_groups
from gtpo.hooks.seams import wrap
from gtpo.hooks.turn_ends import ends_of, is_truncated


class Recorder(TrainerCallback):
    """Appends the completions that `trainer` trains on to `file`.

    A line's answer is the row's `reference_column`, and it keeps the row's `columns`. The lists
    with one entry per token are written every `tokens_every` steps. The first process gathers the
    rows of all processes and writes them. Without a `file`, `latest` still holds this process's
    rows of the last rollout.

    Entropies are those of the first pass over a rollout. A trainer may keep what its loss saw in an
    attribute `seen_by_loss`, as GTPO's does, and entropies are then read from there. Otherwise they
    come from TRL's log-prob pass. Unsloth's GRPO shows none, so they are null there.
    """

    # The key of its state in checkpoints, and the key that earlier versions wrote.
    state_key, earlier_state_keys = "recorder", ("Recorder",)

    def __init__(
        self,
        trainer: GRPOTrainer,
        file: Path | None,
        *,
        tokens_every: int = 1,
        reference_column: str = "answer",
        columns: Sequence[str] = (),
        prompt_opening: str = "",
    ):
        """`prompt_opening` is what the prompts have already written of the answer."""
        self.trainer, self.file, self.tokens_every = trainer, file, tokens_every
        self.reference_column, self.columns = reference_column, columns
        self._opening = {"prompt_opening": prompt_opening} if prompt_opening else {}
        self.rollouts = 0
        self.latest: list[dict] = []
        # A processor of a multimodal model holds its tokenizer.
        self._tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        self._token_texts = TokenTexts(self._tokenizer)
        self._ends = ends_of(trainer)
        self._rollout: dict | None = None  # the current rollout, until the loss has seen all rows
        self._passes: list[dict] = []  # what the loss saw of it, one entry per micro-batch
        self._rewards: dict = {}  # token ids of the completions, and their table of rewards
        self._entropies: Tensor | None = None  # (B, T), from TRL's log-prob pass
        wrap(trainer, "_generate_and_score_completions", self._around_generation)
        wrap(trainer, "_calculate_rewards", self._around_rewards)
        wrap(trainer, "_get_per_token_logps_and_entropies", self._around_log_probs)
        wrap(trainer, "compute_loss", self._around_loss)
        trainer.add_callback(self)

    # ---- what passes through the trainer

    def _around_generation(self, generate, inputs):
        # Read before the call: Unsloth leaves the model in training mode.
        training = self.trainer.model.training
        rollout = generate(inputs)
        if training:
            self._write()  # an earlier rollout of which the loss did not see all rows
            self._rollout = self._describe(inputs, rollout)
            # TRL shuffles this key along with the others.
            rollout["row"] = torch.arange(len(inputs), device=rollout["advantages"].device)
        return rollout

    def _around_rewards(self, calculate, inputs, prompts, completions, completion_ids_list):
        table = calculate(inputs, prompts, completions, completion_ids_list)  # (N, functions)
        self._rewards = {"ids": completion_ids_list, "table": table}
        return table

    def _around_log_probs(self, log_probs, *args, **kwargs):
        logps, entropies, *rest = log_probs(*args, **kwargs)
        self._entropies = None if entropies is None else entropies.detach()
        return logps, entropies, *rest

    def _around_loss(self, compute_loss, model, inputs, *args, **kwargs):
        self._entropies = None
        loss = compute_loss(model, inputs, *args, **kwargs)
        if self._rollout is not None and "row" in inputs:
            seen = {"entropies": self._entropies, "mask": _loss_mask(inputs), "kept": None}
            seen |= getattr(self.trainer, "seen_by_loss", None) or {}
            seen |= {"rows": inputs["row"], "step": self.trainer.state.global_step + 1}
            self._passes.append(seen)
            if sum(len(seen["rows"]) for seen in self._passes) == len(self._rollout["lines"]):
                self._write()
        return loss

    def on_train_end(self, args, state, control, **kwargs):
        """Writes the rows of a rollout that the loss has not seen as a whole."""
        self._write()

    def resume_state(self) -> dict:
        """What a checkpoint keeps: the current rollout, whose lines are not written yet."""
        rollout = self._rollout
        if rollout is not None:
            rollout = {**rollout, "lines": json.dumps(rollout["lines"], default=str)}
        return {"rollouts": self.rollouts, "rollout": rollout, "passes": self._passes}

    def restore(self, kept: dict) -> None:
        """Takes over what `resume_state` returned."""
        rollout = kept["rollout"]
        if rollout is not None:
            rollout = {**rollout, "lines": json.loads(rollout["lines"])}
        self.rollouts, self._rollout, self._passes = kept["rollouts"], rollout, kept["passes"]

    # ---- what is written

    def _describe(self, inputs: list[dict], rollout: dict[str, Tensor]) -> dict:
        """This process's rows of a rollout, with what is known of them before the loss."""
        trainer, table = self.trainer, self._rewards["table"]
        self.rollouts += 1
        size, count = trainer.num_generations, len(inputs)
        first = trainer.accelerator.process_index * count
        mine = slice(first, first + count)
        weighted = (table * trainer.reward_weights.to(table.device)).nansum(dim=1)  # (N,)
        unscored = table.isnan().all(dim=1)  # (N,)
        rewards = torch.where(unscored, torch.nan, weighted)
        compared = compared_rewards(
            table, trainer.reward_weights, size, trainer.multi_objective_aggregation
        )
        groups = whole_groups(rollout, compared, size, trainer.accelerator)
        prefix, suffix = (groups[side].sum(dim=1)[mine].tolist() for side in ("prefix", "suffix"))
        advantages, rewards = rollout["advantages"].tolist(), rewards[mine].tolist()
        table = table[mine].tolist()
        ids = [list(map(int, row)) for row in self._rewards["ids"]]
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        raw = self._tokenizer.batch_decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )
        lines = [
            {
                "rollout": self.rollouts,
                "group": (first + i) // size,
                "row": (first + i) % size,
                "prompt": row.get("prompt"),
                **self._opening,
                "completion": texts[i],
                **self._special_tokens_of(raw[i], texts[i]),
                "answer": row.get(self.reference_column),
                "columns": {name: _plain(row.get(name)) for name in self.columns},
                "reward": json_number(rewards[i]),
                "rewards": dict(
                    zip(trainer.reward_func_names, map(json_number, table[i]), strict=True)
                ),
                "advantage": json_number(advantages[i]),
                "truncated": is_truncated(ids[i], self._ends),
                "prefix": prefix[i],
                "suffix": suffix[i],
            }
            for i, row in enumerate(inputs)
        ]
        weights = rollout.get("token_weights")  # (B, T)
        return {
            "lines": lines,
            "ids": ids,
            "weights": None if weights is None else weights.cpu(),
            "width": rollout["completion_ids"].shape[1],
            "with_tokens": trainer.state.global_step % self.tokens_every == 0,
        }

    def _special_tokens_of(self, raw: str, text: str) -> dict:
        """The completion with special tokens, if it has others than the tokenizer's end at its end.

        So the lines of most runs are those of earlier versions, and no longer.
        """
        end = self._tokenizer.eos_token or ""
        return {} if raw in (text, text + end) else {"raw_completion": raw}

    def _write(self) -> None:
        """Appends the rows of the current rollout that the loss has seen, and forgets them."""
        rollout, passes, self._rollout, self._passes = self._rollout, self._passes, None, []
        if rollout is None:
            return
        lines = {}
        for seen in passes:
            rows = seen["rows"].tolist()
            for row, values in zip(rows, _values_of_rows(seen, rollout["width"]), strict=True):
                entropies = values.pop("entropies")
                lines[row] = {"step": seen["step"], **rollout["lines"][row], **values}
                if rollout["with_tokens"]:
                    lines[row] |= self._per_token(rollout, row, entropies)
        self.latest = [lines[row] for row in sorted(lines)]
        if self.file is None:
            return
        # Every process takes part in this call.
        texts = gather_object([encoded(line) for line in self.latest])
        if self.trainer.accelerator.is_main_process:
            # Each line is one write, so that a reader never sees half of one.
            with self.file.open("ab", buffering=0) as file:
                for text in texts:
                    file.write(text)

    def _per_token(self, rollout: dict, row: int, entropies: list[float] | None) -> dict:
        """The lists of a row with one entry per real token."""
        ids, weights = rollout["ids"][row], rollout["weights"]
        if weights is not None:
            weights = weights[row, : len(ids)].double().round(decimals=6).tolist()
        if entropies is not None:
            entropies = [x if math.isfinite(x) else None for x in entropies[: len(ids)]]
        return {
            "ids": ids,
            "tokens": self._token_texts(ids),
            "weights": weights,
            "entropies": entropies,
        }


class TokenTexts:
    """Returns one text per token id, so that the texts of a completion joined are the completion.

    Special tokens have their texts too. A character that is spelled by several tokens stands with
    the last of them.
    """

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}  # the text of each id decoded by itself

    def __call__(self, ids: list[int]) -> list[str]:
        for token in set(ids) - self._alone.keys():
            self._alone[token] = self._decode([token])
        texts = [self._alone[token] for token in ids]
        # A token may read differently among others. It may be a part of a character, or begin with
        # a space that SentencePiece drops at the start of a text.
        return texts if "".join(texts) == self._decode(ids) else self._one_after_another(ids)

    def _one_after_another(self, ids: list[int]) -> list[str]:
        # Tokens before `done` have their texts. The window begins one text earlier, at `start`.
        texts, start, done = [], 0, 0
        for end in range(1, len(ids) + 1):
            known, longer = self._decode(ids[start:done]), self._decode(ids[start:end])
            unfinished = longer.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids)
            texts.append("" if unfinished else longer[len(known) :])
            if not unfinished:
                start, done = done, end
        return texts

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(
            ids, skip_special_tokens=False, clean_up_tokenization_spaces=False
        )


def _loss_mask(inputs: dict[str, Tensor]) -> Tensor:
    """The completion tokens that TRL's loss counts, (B, T)."""
    return inputs["completion_mask"] * inputs.get("tool_mask", 1)


def _values_of_rows(seen: dict, width: int) -> list[dict]:
    """What the loss saw of each row of a micro-batch: `entropy`, `kept` and `entropies`.

    `entropy` is the mean over tokens in nats. `kept` is False for a filtered completion.
    `entropies` are on the completion's own `width` columns. Each is None where it is not known.
    """
    count = len(seen["rows"])
    kept = [None] * count if seen["kept"] is None else seen["kept"].tolist()
    means, entropies = [None] * count, [None] * count
    if seen["entropies"] is not None:
        means = map(json_number, shaping.mean_entropy(seen["entropies"], seen["mask"]).tolist())
        entropies = shaping.to_completion_columns(seen["entropies"], seen["mask"], width)
        # Adding 0.0 turns -0.0 into 0.0.
        entropies = (entropies.double().round(decimals=3) + 0.0).tolist()
    return [
        {"entropy": mean, "kept": keep, "entropies": row}
        for mean, keep, row in zip(means, kept, entropies, strict=True)
    ]


def _plain(value: Any) -> Any:
    """`value` as JSON has it: None for NaN and infinity, and the text of what JSON lacks."""
    return json.loads(json.dumps(value, default=str), parse_constant=lambda name: None)


def json_number(value: float) -> float | None:
    """`value` with the seven digits of float32; None for NaN and infinity, which JSON lacks."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
