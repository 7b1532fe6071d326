"""The GTPO trainer: `gtpo.shaping` inside TRL's GRPO loss (arXiv 2508.03772).

    J = E[ 1/G  sum_i  delta_i (A_i - gamma <H>_i) / |o_i|  sum_t  r_{i,t} lambda_{i,t} ]

Where the symbols are, all in `UnslothGTPOTrainer`:

    lambda_{i,t}  `token_weights`           decided from whole groups, before the loss; W_RAW
    delta_i       `keep`                    decided inside the loss; ENT_THRESHOLD
    gamma         `loss_factor`            applied inside the loss; ENT_SCALE
    <H>_ini       `initial_entropy`         measured once, over the first rollout
    A_i           `without_rounding`        TRL's advantages (in gtpo.hooks.groups)
    r_{i,t}, 1/G  TRL's and Unsloth's loss  unchanged, with clipping and accumulation

TRL and Unsloth share one hook for a factor per token, `get_high_entropy_mask`. GTPO's factor enters
there. Import this module after the backend: once Unsloth has patched TRL, `trl.GRPOTrainer` is the
class that Unsloth generates. No recipe is known here. The trainer takes TRL's arguments.

Letters: N rows of all processes, B rows of a micro-batch, G group size, T completion columns, W
loss columns. Entropies are in nats.
"""

import copy
import json
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
import trl
from torch import Tensor
from trl.trainer.utils import split_tensor_dict

from gtpo import shaping
from gtpo.hooks.groups import compared_rewards, conflict_fractions, whole_groups
from gtpo.hooks.nonfinite import SkipNonFiniteSteps
from gtpo.hooks.padding import keep_padding_apart, padding_apart_in_loss
from gtpo.hooks.streaming_head import StreamingHead, streaming_in_unsloths_loss
from gtpo.hooks.turn_ends import EndTurns
from gtpo.system.trl_options import REQUIRED_BY_GTPO

logger = logging.getLogger(__name__)

# The constants are read when they are used. So `override_constants`, or an assignment from a
# notebook, takes effect at any time.
ENT_THRESHOLD = 0.7  # the threshold of delta in nats, "ln 2" in the paper
ENT_SCALE = 0.1  # gamma, the weight of the entropy penalty
W_RAW = 2.0  # lambda on the conflict tokens of completions with A > 0
PAD_ID = 128004  # changes no weight: the completion mask decides what is padding
EPS = 1e-6  # guards the released code's logarithm; only the released functions read it
torch_compile_options = {
    "epilogue_fusion": True,
    "max_autotune": False,
    "shape_padding": True,
    "trace.enabled": False,
    "triton.cudagraphs": False,
}

CONSTANTS = ("ENT_THRESHOLD", "ENT_SCALE", "W_RAW", "PAD_ID", "EPS", "torch_compile_options")
STATE_FILE = "gtpo_state.json"  # of a checkpoint; holds the initial entropy
PAPER_OPTIONS = {"loss_type": "grpo", "scale_rewards": "none", "beta": 0.0}
# TRL's options that change the objective, with TRL's default, which is the paper's, and what any
# other value does.
OBJECTIVE_OPTIONS = {
    "importance_sampling_level": ("token", "a whole completion has one ratio"),
    "off_policy_mask_threshold": (None, "it drops completions that the policy has moved away from"),
    "delta": (None, "it also bounds the ratios of completions with a negative advantage"),
    "mask_truncated_completions": (False, "truncated completions teach nothing"),
    "multi_objective_aggregation": (
        "sum_then_normalize",
        "the rewards of each function are divided by their standard deviation",
    ),
}


def override_constants(values: Mapping[str, object]) -> None:
    """Sets this module's constants from `values`, cast to their current types.

    Names may have any case. None leaves a constant as it is, and a mapping is laid over the current
    one. Logs one line per constant. Raises ValueError for an unknown name and for a value that
    cannot be cast.
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


def refuse_conflicting_options(arguments: trl.GRPOConfig) -> None:
    """Raises ValueError for an option that GTPO's factor would corrupt.

    These are TRL's entropy mask, its entropy bonus, and Liger's loss.
    """
    for option, allowed in REQUIRED_BY_GTPO.items():
        value = getattr(arguments, option)
        if value != allowed:
            raise ValueError(
                f"training.{option}: {value} does not go with GTPO, which uses TRL's entropy mask"
                f" for its own factor; leave it at {allowed}, or train with custom_trainer.original"
            )


def departures_from_paper(arguments: trl.GRPOConfig) -> Iterator[str]:
    """A sentence for each option of `arguments` that changes the paper's objective."""
    bound = arguments.epsilon if arguments.epsilon_high is None else arguments.epsilon_high
    cispo_shrinks = arguments.loss_type == "cispo" and bound < 1
    if cispo_shrinks:
        yield (
            f"training.loss_type = cispo with epsilon_high = {bound} is not the paper's objective:"
            " cispo cuts every ratio at epsilon_high, so below 1 it shrinks every gradient;"
            " CISPO's authors use 5.0"
        )
    for option, value in PAPER_OPTIONS.items():
        given = getattr(arguments, option)
        if given != value and not (option == "loss_type" and cispo_shrinks):
            yield f"training.{option} = {given} is not the paper's objective ({value})"
    for option, (value, effect) in OBJECTIVE_OPTIONS.items():
        if (given := getattr(arguments, option, value)) != value:
            yield f"training.{option} = {given} is not the paper's objective: {effect}"


class GTPOConfig(trl.GRPOConfig):
    """`trl.GRPOConfig` with the paper's objective as defaults: see PAPER_OPTIONS."""

    def __init__(self, *args, **options):
        super().__init__(*args, **{**PAPER_OPTIONS, **options})


class UnslothGTPOTrainer(trl.GRPOTrainer):
    """GRPO with conflict-aware, entropy-controlled token advantages (GTPO, arXiv 2508.03772).

    There are two changes to the parent. Each completion token carries a weight lambda_{i,t}. In
    place of an entropy mask, the loss has the factor delta_i (A_i - gamma <H>_i) lambda_{i,t} / A_i
    per token. The parent multiplies that factor by A_i and by the ratio r_{i,t}. So its clipping
    still depends on the sign of A_i. Where A_i = 0 it multiplies by -1 instead.

    Override `token_weights` or `keep` for an ablation.

    Logs `gtpo/completion_entropy` and `gtpo/initial_entropy` in nats, `gtpo/frac_filtered`,
    `gtpo/frac_conflict_tokens`, `gtpo/frac_conflict_groups`, and `gtpo/skipped_steps`. The last
    counts the optimizer steps skipped so far because of non-finite losses or gradients.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        refuse_conflicting_options(self.args)
        # Below 1, both parents call `get_high_entropy_mask` for a factor per token: `_compute_loss`
        # of trl 1.13.0 and `grpo_accumulated_loss` of unsloth_zoo 2026.10.7. GTPO never uses the
        # value itself.
        self.args = copy.copy(self.args)  # the caller's arguments stay as they were
        self.args.top_entropy_quantile = self.top_entropy_quantile = 0.5
        self.initial_entropy: float | None = None  # <H>_ini in nats; None until it is measured
        self.turn_ends = EndTurns(self)
        keep_padding_apart(self)
        self.non_finite, self.streaming_head = SkipNonFiniteSteps(self), StreamingHead(self)
        self._micro_batch: Mapping[str, Tensor] = {}  # the inputs of the current loss
        # What the last loss saw, for logs and for the recorder. `entropies` and `mask` are (B, W);
        # `completion_entropy`, `kept` and `real` (has any token) are (B,).
        self.seen_by_loss: dict[str, Tensor] | None = None
        self._compiled_factor: Callable | None = None
        self._log_settings()

    # ---- lambda: decided where groups are whole; TRL shuffles and splits it with the rollout

    def token_weights(self, rollout: dict[str, Tensor]) -> Tensor:
        """lambda, (N, T), for the whole groups of all processes.

        `rollout` holds `completion_ids`, `completion_mask` (real tokens), `prefix` and `suffix`
        (the conflict runs), all (N, T), and `advantages`, (N,). The `num_generations` rows of a
        group stand after each other.
        """
        return shaping.token_weights(
            rollout["prefix"] | rollout["suffix"], rollout["advantages"], W_RAW
        )

    def keep(self, completion_entropy: Tensor) -> Tensor:
        """delta, bool (B,): which completions the entropy filter keeps, from <H>_i, (B,)."""
        return shaping.entropy_filter(completion_entropy, self.initial_entropy, ENT_THRESHOLD)

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        table = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        # (N, functions). A completion that one function cannot score counts as unscored: TRL then
        # sets its advantage to 0.
        table[table.isnan().any(dim=1)] = torch.nan
        self._reward_table = table
        return table

    def _generate_and_score_completions(self, inputs):
        # Read before the call: Unsloth leaves the model in training mode.
        training = self.model.training
        size = self.num_generations if training else self.num_generations_eval
        rollout = super()._generate_and_score_completions(inputs)
        rewards = compared_rewards(
            self._reward_table, self.reward_weights, size, self.multi_objective_aggregation
        )  # (N,)
        groups = whole_groups(rollout, rewards, size, self.accelerator)
        (rows, width), index = rollout["completion_ids"].shape, self.accelerator.process_index
        mine = slice(index * rows, (index + 1) * rows)
        rollout["advantages"] = groups["advantages"][mine]  # (B,)
        rollout["token_weights"] = self.token_weights(groups)[mine, :width]  # (B, T)
        # Whether a completion has a reward, (B,). Checkpoints hold this key, so its name stays.
        rollout["judged"] = ~rewards.isnan()[mine]
        metrics = self._metrics["train" if training else "eval"]
        for name, value in zip(("tokens", "groups"), conflict_fractions(groups, size), strict=True):
            metrics[f"gtpo/frac_conflict_{name}"].append(value)
        if training and self.initial_entropy is None and self.state.global_step == 0:
            self.initial_entropy = self._measure_initial_entropy(rollout)
        return rollout

    # ---- delta and gamma: decided inside the loss, the only place where entropies exist

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """The parent's loss of a micro-batch with GTPO's factor; logs the entropies."""
        loss = self._parent_loss(model, inputs, return_outputs, num_items_in_batch)
        self._log_entropies()
        return loss

    def _parent_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self._micro_batch, self.seen_by_loss = inputs, None
        inputs = {**inputs, "advantages": _nonzero(inputs["advantages"])}
        # The pass for the initial entropy comes here without the hooks around `compute_loss`.
        with streaming_in_unsloths_loss(), padding_apart_in_loss(self, inputs) as rows:
            loss = super().compute_loss(model, rows, return_outputs, num_items_in_batch)
        if self.seen_by_loss is None:
            # Unsloth also has a slow loss without the hook. With it GTPO would silently be GRPO.
            raise RuntimeError(
                "The parent's loss did not call get_high_entropy_mask, which returns GTPO's factor;"
                " use the pinned libraries"
            )
        return loss

    @torch.no_grad()
    def get_high_entropy_mask(self, entropies: Tensor, mask: Tensor, threshold: float) -> Tensor:
        """GTPO's factor per token, (B, W), from `entropies` and `mask`, both (B, W).

        This is TRL's hook for a factor in the loss. `threshold` is TRL's and is ignored.
        """
        if self._compiled_factor is None:
            self._compiled_factor = loss_factor
            if entropies.device.type == "cuda":
                self._compiled_factor = torch.compile(
                    loss_factor, dynamic=True, options=torch_compile_options
                )
        advantages, scored, token_weights = (
            self._micro_batch[name] for name in ("advantages", "judged", "token_weights")
        )
        factor, completion_entropy, kept = self._compiled_factor(
            entropies, mask, advantages, scored, token_weights, self.keep, ENT_SCALE
        )
        self.seen_by_loss = {
            "entropies": entropies,
            "mask": mask,
            "completion_entropy": completion_entropy,
            "kept": kept,
            "real": mask.bool().any(dim=1),
        }
        return factor

    @torch.no_grad()
    def _measure_initial_entropy(self, rollout: dict[str, Tensor]) -> float | None:
        """<H>_ini: the mean of <H>_i in nats over the first rollout of all processes.

        Completions without a token are left out; None if no completion has any.
        """
        # This pass must not log anything.
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

    # ---- what is logged, and what a checkpoint keeps

    def _log_entropies(self) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        entropy, kept, real = (
            self.seen_by_loss[name] for name in ("completion_entropy", "kept", "real")
        )
        # One tensor, so that there is one wait for the device.
        sums = torch.stack([entropy[real].sum(), (~kept & real).sum(), real.sum()])
        entropy_sum, filtered, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        if count:
            metrics["gtpo/completion_entropy"].append(entropy_sum / count)
            metrics["gtpo/frac_filtered"].append(filtered / count)
        if self.initial_entropy is not None:
            metrics["gtpo/initial_entropy"].append(self.initial_entropy)

    def _log_settings(self) -> None:
        """Logs one line for each setting that may surprise."""
        pad_id = getattr(self.processing_class, "pad_token_id", None)
        if pad_id != PAD_ID:
            logger.warning(
                "[GTPO] PAD_ID = %s differs from the tokenizer's pad id %s: nothing changes, the"
                " completion mask decides what is padding",
                PAD_ID,
                pad_id,
            )
        for sentence in departures_from_paper(self.args):
            logger.warning("[GTPO] %s", sentence)
        if self.accelerator.device.type == "cpu":
            logger.info("[GTPO] torch_compile_options are unused on a CPU")

    def _save_checkpoint(self, model, trial):
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
            state = json.dumps({"initial_entropy": self.initial_entropy})
            (folder / STATE_FILE).write_text(state, encoding="utf-8")

    def _load_optimizer_and_scheduler(self, checkpoint):
        super()._load_optimizer_and_scheduler(checkpoint)
        path = checkpoint and Path(checkpoint, STATE_FILE)
        if path and path.exists():
            self.initial_entropy = json.loads(path.read_text(encoding="utf-8"))["initial_entropy"]


def loss_factor(
    entropies: Tensor,
    mask: Tensor,
    advantages: Tensor,
    scored: Tensor,
    token_weights: Tensor,
    keep: Callable[[Tensor], Tensor],
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The factor delta_i (A_i - gamma <H>_i) lambda_{i,t} / A_i, (B, W), with <H>_i and delta_i.

    `entropies` and `mask` are (B, W), `token_weights` is (B, T). `advantages`, bool `scored`, <H>_i
    and delta_i are (B,). `scale` is gamma. An unscored completion gets 0, so it feels no entropy
    penalty either.
    """
    completion_entropy = shaping.mean_entropy(entropies, mask)
    kept = keep(completion_entropy)
    shaped = shaping.shaped_advantages(advantages, completion_entropy, kept & scored, scale)
    coefficient = shaped / _nonzero(advantages)  # (B,)
    # TRL's loss has the completion's own columns, Unsloth's has others.
    if token_weights.shape != mask.shape:
        token_weights = shaping.to_loss_columns(token_weights, mask)
    return coefficient.unsqueeze(1) * token_weights, completion_entropy, kept


def _nonzero(advantages: Tensor) -> Tensor:
    """What the parent multiplies by, (B,): A_i, or -1 where A_i = 0.

    An entropy penalty alone acts like a negative advantage.
    """
    return torch.where(advantages == 0, -1.0, advantages)
