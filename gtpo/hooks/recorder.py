"""Every training completion in an append-only file, one JSON object a line, whatever the trainer
and the tracker.

Works on any `trl.GRPOTrainer`, ours, Unsloth's or a user's, and changes nothing of its training: it
looks at what passes through four of the trainer's methods. A line is written when a completion is
first trained on; the README lists its keys.
"""

import functools
import json
import math
from pathlib import Path

import torch
from accelerate.utils import gather_object
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOTrainer

from gtpo import shaping
from gtpo.hooks.completion_line import encoded
from gtpo.hooks.groups import whole_groups
from gtpo.hooks.token_texts import TokenTexts


class Recorder(TrainerCallback):
    """Appends the completions that `trainer` trains on to `file`; the per-token lists every
    `tokens_every` steps.

    A rollout spread over processes is gathered and written by the first of them. Entropies are
    those of the first pass over the rollout. A trainer that keeps what its loss saw in
    `seen_by_loss` (GTPO's) is asked for them; of any other, TRL's loss shows them and Unsloth's
    does not: null there. `latest` is this process's part of the last rollout, all there is without
    a file.
    """

    # in checkpoints
    state_key, earlier_state_keys = "recorder", ("Recorder",)

    def __init__(self, trainer: GRPOTrainer, file: Path | None, *, tokens_every: int = 1):
        self.trainer, self.file, self.tokens_every = trainer, file, tokens_every
        self.rollouts = 0
        self.latest: list[dict] = []
        # a processor has one
        self._tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        self._token_texts = TokenTexts(self._tokenizer)
        # the rollout under way, until all of its rows were seen
        self._rollout: dict | None = None
        self._passes: list[dict] = []  # what the loss saw of it, a micro-batch each
        self._judged: dict = {}  # what the reward functions saw and said
        self._entropies: Tensor | None = None  # (B, T), where the parent shows them
        for name, around in (
            ("_generate_and_score_completions", self._generate),
            ("_calculate_rewards", self._judge),
            ("_get_per_token_logps_and_entropies", self._look),
            ("compute_loss", self._loss),
        ):
            original = getattr(trainer, name)
            setattr(trainer, name, functools.wraps(original)(functools.partial(around, original)))
        trainer.add_callback(self)

    # ---- what passes by

    def _generate(self, generate, inputs):
        # before the parent: Unsloth leaves the model in training mode
        training = self.trainer.model.training
        rollout = generate(inputs)
        if training:
            self._write()  # a rollout that was not seen to its end
            self._rollout = self._described(inputs, rollout)
            # rides through TRL's shuffle
            rollout["row"] = torch.arange(len(inputs), device=rollout["advantages"].device)
        return rollout

    def _judge(self, calculate, inputs, prompts, completions, completion_ids_list):
        # (N, rewards), of all processes
        table = calculate(inputs, prompts, completions, completion_ids_list)
        self._judged = {"ids": completion_ids_list, "table": table}
        return table

    def _look(self, look, *args, **kwargs):
        logps, entropies, *rest = look(*args, **kwargs)
        self._entropies = None if entropies is None else entropies.detach()
        return logps, entropies, *rest

    def _loss(self, compute_loss, model, inputs, *args, **kwargs):
        self._entropies = None
        loss = compute_loss(model, inputs, *args, **kwargs)
        if self._rollout is not None and "row" in inputs:
            seen = {"entropies": self._entropies, "mask": _mask(inputs), "kept": None}
            seen |= getattr(self.trainer, "seen_by_loss", None) or {}
            self._passes.append(
                {**seen, "rows": inputs["row"], "step": self.trainer.state.global_step + 1}
            )
            if sum(len(seen["rows"]) for seen in self._passes) == len(self._rollout["lines"]):
                self._write()
        return loss

    def on_train_end(self, args, state, control, **kwargs):
        self._write()

    def resume_state(self) -> dict:
        """What a checkpoint has to keep: the rollout under way, whose lines are not written yet."""
        rollout = self._rollout and {
            **self._rollout,
            "lines": json.dumps(self._rollout["lines"], default=str),
        }
        return {"rollouts": self.rollouts, "rollout": rollout, "passes": self._passes}

    def restore(self, kept: dict) -> None:
        rollout = kept["rollout"]
        self._rollout = rollout and {**rollout, "lines": json.loads(rollout["lines"])}
        self.rollouts, self._passes = kept["rollouts"], kept["passes"]

    # ---- what is written

    def _described(self, inputs: list[dict], rollout: dict[str, Tensor]) -> dict:
        """This process's rows of a rollout, as far as they are known before the loss."""
        trainer, table = self.trainer, self._judged["table"]
        self.rollouts += 1
        size, count, first = (
            trainer.num_generations,
            len(inputs),
            trainer.accelerator.process_index * len(inputs),
        )
        mine = slice(first, first + count)
        judged = ~table.isnan().all(dim=1)
        # (N,)
        rewards = torch.where(
            judged, (table * trainer.reward_weights.to(table.device)).nansum(dim=1), torch.nan
        )
        groups = whole_groups(
            {**rollout, "advantages": _signal(rollout["advantages"], rewards, mine, size)},
            rewards,
            size,
            trainer.accelerator,
        )
        prefix, suffix = (groups[side].sum(dim=1)[mine].tolist() for side in ("prefix", "suffix"))
        advantages, rewards, table = (
            rollout["advantages"].tolist(),
            rewards[mine].tolist(),
            table[mine].tolist(),
        )
        ids = [list(map(int, row)) for row in self._judged["ids"]]
        ends = {self._tokenizer.eos_token_id, self._tokenizer.pad_token_id}
        texts = self._tokenizer.batch_decode(ids, skip_special_tokens=True)
        lines = [
            {
                "rollout": self.rollouts,
                "group": (first + i) // size,
                "row": (first + i) % size,
                "prompt": row.get("prompt"),
                "completion": texts[i],
                "answer": row.get("answer"),
                "reward": _number(rewards[i]),
                "rewards": dict(
                    zip(trainer.reward_func_names, map(_number, table[i]), strict=True)
                ),
                "advantage": _number(advantages[i]),
                "truncated": not ids[i] or ids[i][-1] not in ends,
                "prefix": prefix[i],
                "suffix": suffix[i],
            }
            for i, row in enumerate(inputs)
        ]
        weights = rollout.get("token_weights")
        return {
            "lines": lines,
            "ids": ids,
            "weights": None if weights is None else weights.cpu(),
            "width": rollout["completion_ids"].shape[1],
            "with_tokens": trainer.state.global_step % self.tokens_every == 0,
        }

    def _write(self) -> None:
        """Append the rows of the rollout under way that the loss has seen, and be done with it."""
        rollout, passes, self._rollout, self._passes = self._rollout, self._passes, None, []
        if rollout is None:
            return
        lines = {}
        for seen in passes:
            rows = seen["rows"].tolist()
            for row, line in zip(rows, _of_the_loss(seen, rollout["width"]), strict=True):
                entropies = line.pop("entropies")
                lines[row] = {"step": seen["step"], **rollout["lines"][row], **line}
                if rollout["with_tokens"]:
                    lines[row] |= self._tokens(rollout, row, entropies)
        self.latest = [lines[row] for row in sorted(lines)]
        if self.file is None:
            return
        # all processes meet here
        texts = gather_object([encoded(line) for line in self.latest])
        if self.trainer.accelerator.is_main_process:
            # each line in one piece, also for somebody who reads meanwhile
            with self.file.open("ab", buffering=0) as file:
                for text in texts:
                    file.write(text)

    def _tokens(self, rollout: dict, row: int, entropies: list[float] | None) -> dict:
        """The lists with one entry per real token."""
        ids, weights = rollout["ids"][row], rollout["weights"]
        return {
            "ids": ids,
            "tokens": self._token_texts(ids),
            "weights": (
                None
                if weights is None
                else weights[row, : len(ids)].double().round(decimals=6).tolist()
            ),
            "entropies": (
                None
                if entropies is None
                else [x if math.isfinite(x) else None for x in entropies[: len(ids)]]
            ),
        }


def _mask(inputs: dict[str, Tensor]) -> Tensor:
    """Which completion tokens TRL's loss counts, (B, T)."""
    return inputs["completion_mask"] * inputs.get("tool_mask", 1)


def _signal(advantages: Tensor, rewards: Tensor, mine: slice, size: int) -> Tensor:
    """`advantages` with 0 in groups of equal rewards, where a division by their spread leaves
    magnified rounding.
    """
    groups = rewards.view(-1, size)
    # of the judged ones
    spread = groups.nan_to_num(-torch.inf).amax(dim=1) - groups.nan_to_num(torch.inf).amin(dim=1)
    largest = groups.nan_to_num(0.0).abs().amax(dim=1).clamp(min=1.0)
    return torch.where((spread > 1e-6 * largest).repeat_interleave(size)[mine], advantages, 0.0)


def _of_the_loss(seen: dict, width: int) -> list[dict]:
    """Per row: mean entropy and kept or filtered; and the entropies of its tokens, None where they
    are not known.
    """
    count = len(seen["rows"])
    kept = [None] * count if seen["kept"] is None else seen["kept"].tolist()
    means, entropies = [None] * count, [None] * count
    if seen["entropies"] is not None:
        means = map(_number, shaping.mean_entropy(seen["entropies"], seen["mask"]).tolist())
        entropies = shaping.to_completion_columns(seen["entropies"], seen["mask"], width)
        entropies = (entropies.double().round(decimals=3) + 0.0).tolist()  # no -0.0
    return [
        {"entropy": mean, "kept": keep, "entropies": row}
        for mean, keep, row in zip(means, kept, entropies, strict=True)
    ]


def _number(value: float) -> float | None:
    """`value` with the digits that float32 has; None where it is no number that JSON knows."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
