"""The GTPO trainer: plugs `gtpo.shaping` into TRL's GRPO loss through the one seam TRL and Unsloth
share.

Import this module after the backend: `trl.GRPOTrainer` is Unsloth's generated class once Unsloth
has patched TRL. It knows no recipes; `UnslothGTPOTrainer` takes TRL's arguments, and the constants
below are read when they are used, so that `override_constants` (or an assignment from a notebook)
counts at any time.
"""

import copy
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import trl
from torch import Tensor
from trl.trainer.utils import split_tensor_dict

from gtpo import shaping
from gtpo.hooks.groups import conflict_fractions, whole_groups
from gtpo.hooks.nonfinite import SkipNonFiniteSteps
from gtpo.hooks.streaming_head import StreamingHead, streaming_in_unsloths_loss
from gtpo.options import refuse_conflicting_options, say_other_objectives

logger = logging.getLogger(__name__)
ENT_THRESHOLD = 0.7  # "ln 2" of the paper's gate, in nats
ENT_SCALE = 0.1  # gamma, the weight of the entropy penalty
W_RAW = 2.0  # lambda on the conflict tokens of completions with A > 0
PAD_ID = 128004  # changes no weight: the completion mask decides what is padding
EPS = 1e-6  # the released code's log guard; only the released functions read it
torch_compile_options = {
    "epilogue_fusion": True,
    "max_autotune": False,
    "shape_padding": True,
    "trace.enabled": False,
    "triton.cudagraphs": False,
}

CONSTANTS = ("ENT_THRESHOLD", "ENT_SCALE", "W_RAW", "PAD_ID", "EPS", "torch_compile_options")
STATE_FILE = "gtpo_state.json"


def override_constants(values: Mapping[str, object]) -> None:
    """Set this module's constants from `values` (any case; None leaves one as it is), cast to their
    current types.

    A mapping is laid over the current one. Raises ValueError for a name that is no constant or a
    value that cannot be cast. Says `[GTPO] Set NAME = value` for each constant set.
    """
    names = {name.lower(): name for name in CONSTANTS}
    for key, value in values.items():
        if key.lower() not in names:
            raise ValueError(
                f"gtpo_runtime.{key}: there is no such constant; use one of {', '.join(names)}"
            )
        name = names[key.lower()]
        if value is None:
            continue
        current = globals()[name]
        try:
            globals()[name] = (
                {**current, **value} if isinstance(current, dict) else type(current)(value)
            )
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"gtpo_runtime.{key}: {value!r} is not a valid {type(current).__name__}"
            ) from error
        logger.info("[GTPO] Set %s = %s", name, globals()[name])


class UnslothGTPOTrainer(trl.GRPOTrainer):
    """GRPO with conflict-aware, entropy-controlled token advantages (GTPO, arXiv 2508.03772).

    The only changes with respect to the parent: each completion token carries a weight lambda
    decided from its group, and the loss's per-token factor is delta_i (A_i - gamma <H>_i)
    lambda_{i,t} / A_i instead of an entropy mask. The parent multiplies that factor by A_i and the
    ratio, so its clipping still sees the sign of A_i; where A_i = 0 it multiplies by -1. Override
    `token_weights` or `keep` for an ablation.

    Logs `gtpo/completion_entropy`, `gtpo/initial_entropy` (nats), `gtpo/frac_filtered`,
    `gtpo/frac_conflict_tokens`, `gtpo/frac_conflict_groups` and `gtpo/skipped_steps` (optimizer
    steps skipped so far, non-finite gradients).
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        refuse_conflicting_options(self.args)
        # Both parents ask `get_high_entropy_mask` for a per-token factor when this is below 1 (trl
        # 1.13.0
        # `_compute_loss`, unsloth_zoo 2026.10.7 `grpo_accumulated_loss`); the value itself is never
        # used.
        self.args = copy.copy(self.args)  # the caller's arguments stay as they were
        self.args.top_entropy_quantile = self.top_entropy_quantile = 0.5
        self.initial_entropy: float | None = None  # <H>_ini, nats; None until measured
        self.non_finite, self.streaming_head = SkipNonFiniteSteps(self), StreamingHead(self)
        self._micro_batch: Mapping[str, Tensor] = {}  # what the hook needs beside its arguments
        # entropies, mask (B, W); completion_entropy, kept, real (B,)
        self.seen_by_loss: dict[str, Tensor] | None = None
        self._shape_tokens: Callable | None = None
        self._say_what_surprises()

    # ---- lambda: decided where groups are whole, carried by TRL through its shuffle and split

    def token_weights(self, rollout: dict[str, Tensor]) -> Tensor:
        """lambda (N, T) for whole groups of all processes: N rows, `num_generations` after each
        other per group.

        `rollout` holds `completion_ids`, `completion_mask` (real tokens), `prefix`, `suffix` (the
        conflict runs), all (N, T), and `advantages` (N,).
        """
        return shaping.token_weights(
            rollout["prefix"] | rollout["suffix"], rollout["advantages"], W_RAW
        )

    def keep(self, completion_entropy: Tensor) -> Tensor:
        """delta_i as bool (B,): which completions the entropy filter keeps."""
        return shaping.entropy_filter(completion_entropy, self.initial_entropy, ENT_THRESHOLD)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # (N, rewards)
        rewards_per_func = super()._calculate_rewards(
            inputs, prompts, completions, completion_ids_list
        )
        # One reward that cannot judge leaves the completion unjudged as a whole: TRL then sets its
        # advantage to 0.
        rewards_per_func[rewards_per_func.isnan().any(dim=1)] = torch.nan
        # (N,)
        self._rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).sum(
            dim=1
        )
        return rewards_per_func

    def _generate_and_score_completions(self, inputs):
        # before the parent: Unsloth leaves the model in training mode
        training = self.model.training
        size = self.num_generations if training else self.num_generations_eval
        rollout = super()._generate_and_score_completions(inputs)
        groups = whole_groups(rollout, self._rewards, size, self.accelerator)
        (rows, width), index = rollout["completion_ids"].shape, self.accelerator.process_index
        mine = slice(index * rows, (index + 1) * rows)
        rollout["advantages"] = groups["advantages"][mine]
        rollout["token_weights"] = self.token_weights(groups)[mine, :width]  # (B, T)
        rollout["judged"] = ~self._rewards.isnan()[mine]  # (B,)
        for name, value in zip(("tokens", "groups"), conflict_fractions(groups, size), strict=True):
            self._metrics["train" if training else "eval"][f"gtpo/frac_conflict_{name}"].append(
                value
            )
        if training and self.initial_entropy is None and self.state.global_step == 0:
            self.initial_entropy = self._measure_initial_entropy(rollout)
        return rollout

    # ---- delta and gamma: decided inside the loss, the only place where entropies exist

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = self._parent_loss(model, inputs, return_outputs, num_items_in_batch)
        self._log_entropies()
        return loss

    def _parent_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._micro_batch, self.seen_by_loss = inputs, None
        inputs = {**inputs, "advantages": _nonzero(inputs["advantages"])}
        with streaming_in_unsloths_loss():
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.seen_by_loss is None:
            # Unsloth has a second, slow loss without the seam: it would train GRPO in disguise.
            raise RuntimeError(
                "The parent's loss never asked get_high_entropy_mask for GTPO's factor; use the"
                " pinned libraries"
            )
        return loss

    @torch.no_grad()
    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """TRL's hook for a per-token loss factor, (B, W): here GTPO's shaping; `threshold` is
        ignored.
        """
        if self._shape_tokens is None:
            on_cuda = entropies.device.type == "cuda"
            compile_ = (
                torch.compile(dynamic=True, options=torch_compile_options)
                if on_cuda
                else lambda function: function
            )
            self._shape_tokens = compile_(_shape_tokens)
        ours = (self._micro_batch[name] for name in ("advantages", "judged", "token_weights"))
        factor, entropy, kept = self._shape_tokens(entropies, mask, *ours, self.keep, ENT_SCALE)
        self.seen_by_loss = {
            "entropies": entropies,
            "mask": mask,
            "completion_entropy": entropy,
            "kept": kept,
            "real": mask.bool().any(dim=1),
        }
        return factor

    @torch.no_grad()
    def _measure_initial_entropy(self, rollout: dict[str, Tensor]) -> float | None:
        """<H>_ini: the mean <H>_i in nats over the first rollout of all processes, empty
        completions left out.
        """
        # log nothing
        metrics, self._metrics = self._metrics, {mode: defaultdict(list) for mode in self._metrics}
        total = torch.zeros(2, device=self.accelerator.device)  # sum of <H>_i, completions
        for micro_batch in split_tensor_dict(rollout, self.args.steps_per_generation):
            with self.compute_loss_context_manager():
                self._parent_loss(self.model, micro_batch)
            entropy = self.seen_by_loss["completion_entropy"]
            real = self.seen_by_loss["real"] & entropy.isfinite()
            total += torch.stack([entropy[real].sum(), real.sum()])
        self._metrics = metrics
        total, count = self.accelerator.reduce(total, reduction="sum").tolist()
        return total / count if count else None

    # ---- what a person sees, and what a checkpoint keeps

    def _log_entropies(self) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        entropy, kept, real = (
            self.seen_by_loss[name] for name in ("completion_entropy", "kept", "real")
        )
        # one wait for the device
        sums = torch.stack([entropy[real].sum(), (~kept & real).sum(), real.sum()])
        entropy_sum, filtered, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        if count:
            metrics["gtpo/completion_entropy"].append(entropy_sum / count)
            metrics["gtpo/frac_filtered"].append(filtered / count)
        if self.initial_entropy is not None:
            metrics["gtpo/initial_entropy"].append(self.initial_entropy)

    def _say_what_surprises(self) -> None:
        if PAD_ID != (pad_id := getattr(self.processing_class, "pad_token_id", None)):
            logger.warning(
                "[GTPO] PAD_ID = %s differs from the tokenizer's pad id %s: nothing changes, the"
                " completion mask decides what is padding",
                PAD_ID,
                pad_id,
            )
        say_other_objectives(self.args)
        if self.accelerator.device.type == "cpu":
            logger.info("[GTPO] torch_compile_options are unused on a CPU")

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            (folder / STATE_FILE).write_text(
                json.dumps({"initial_entropy": self.initial_entropy}), encoding="utf-8"
            )

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        path = checkpoint and Path(checkpoint, STATE_FILE)
        if path and path.exists():
            self.initial_entropy = json.loads(path.read_text(encoding="utf-8"))["initial_entropy"]


def _shape_tokens(entropies, mask, advantages, judged, token_weights, keep, scale):
    """The loss factor delta_i (A_i - gamma <H>_i) lambda_{i,t} / A_i, (B, W), with <H>_i and
    delta_i, both (B,).
    """
    entropy = shaping.mean_entropy(entropies, mask)
    kept = keep(entropy)
    coefficient = shaping.shaped_advantages(advantages, entropy, kept & judged, scale) / _nonzero(
        advantages
    )
    # TRL's loss has the completion's own columns, Unsloth's has others
    in_place = token_weights.shape == mask.shape
    token_weights = token_weights if in_place else shaping.to_loss_columns(token_weights, mask)
    return coefficient.unsqueeze(1) * token_weights, entropy, kept


def _nonzero(advantages: Tensor) -> Tensor:
    """What the parent multiplies with: A_i, or -1 where A_i = 0 (a pure entropy penalty is a
    negative advantage).
    """
    return torch.where(advantages == 0, -1.0, advantages)
