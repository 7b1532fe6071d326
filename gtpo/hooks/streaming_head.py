"""Log-probs and entropies without logits: the output head goes through the tokens in chunks.

trl 1.13 keeps the logits of a whole micro-batch and several copies of them: 7 GB for 4,096 tokens
and a vocabulary of 152,000. Unsloth goes through chunks too, but with entropies, which GTPO needs,
it makes its logits twice.
"""

import contextlib
import functools
import inspect
import logging
import sys

import torch
import trl
from torch import Tensor
from torch.nn import functional as F
from trl.trainer import grpo_trainer

logger = logging.getLogger(__name__)
CHUNK = {"cpu": 2**22, "cuda": 2**27}  # logits held at a time,
LEAST = 128  # but no fewer rows than keep the matrix products busy
UNSLOTH = "unsloth_zoo.rl_replacements", "chunked_hidden_states_selective_log_softmax_recompute"


def log_probs_and_entropies(
    hidden: Tensor, weight: Tensor, ids: Tensor, rows: int | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log p(ids) and the entropies, in nats, both (...) in at least float32, of softmax(hidden
    weight^T / temperature).

    `hidden` (..., H), `weight` (V, H), `ids` (...). Gradients reach `hidden` through the log-probs;
    the entropies carry none. Two matrix products in all: d log p(y) / d hidden = (weight[y] - sum_v
    p(v) weight[v]) / temperature needs nothing from behind it, so it is computed with the
    probabilities at hand, and backward only scales it. The logits of `rows` tokens exist at a time.
    """
    log_probs, entropies = _Head.apply(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        ids.reshape(-1),
        rows or most_rows(weight),
        temperature,
    )
    return log_probs.view(ids.shape), entropies.view(ids.shape)


def most_rows(weight: Tensor) -> int:
    """How many tokens the head takes at a time, on the device of its `weight` (V, H)."""
    return max(LEAST, CHUNK.get(weight.device.type, CHUNK["cuda"]) // len(weight))


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, ids, size, temperature):
        device, ctx.dtype, ctx.temperature = hidden.device.type, hidden.dtype, temperature
        if torch.is_autocast_enabled(device):
            weight = weight.to(torch.get_autocast_dtype(device))  # once, not for each chunk
        hidden = hidden.to(weight.dtype)
        statistics = _compiled_statistics() if device == "cuda" else _statistics
        dtype = torch.promote_types(weight.dtype, torch.float32)
        log_probs, entropies = (
            torch.empty(len(ids), dtype=dtype, device=hidden.device) for _ in range(2)
        )
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        for start in range(0, len(ids), size):
            rows = slice(start, start + size)
            log_probs[rows], entropies[rows], slope = statistics(
                F.linear(hidden[rows], weight), ids[rows], temperature, slopes is not None
            )
            if slopes is not None:
                torch.mm(slope, weight, out=slopes[rows])
            del slope  # before the next logits
        ctx.save_for_backward(slopes)
        ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    def backward(ctx, gradient, _):
        (slopes,) = ctx.saved_tensors
        return (gradient.unsqueeze(1) / ctx.temperature * slopes).to(ctx.dtype), *[None] * 4


def _statistics(
    logits: Tensor, ids: Tensor, temperature: float, with_slope: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """log p(ids) and entropy, both (N,), and d log p(ids) / d (logits / temperature), (N, V) in the
    logits' dtype.

    May overwrite `logits`.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        z /= temperature
    z -= z.amax(dim=1, keepdim=True)
    p = z.exp()  # not yet divided by its sum
    total = p.sum(dim=1)
    log_probs = z.gather(1, ids.unsqueeze(1)).squeeze(1) - total.log()
    # neither term is below 0: nothing cancels
    entropies = total.log() - torch.linalg.vecdot(p, z) / total
    if not with_slope:
        return log_probs, entropies, None
    p /= total.unsqueeze(1)
    if p.is_cuda:  # compiled: one kernel, nothing more is written
        slope = (ids.unsqueeze(1) == torch.arange(p.shape[1], device=p.device)).to(p.dtype) - p
    else:
        slope = p.neg_().scatter_add_(
            1, ids.unsqueeze(1), torch.ones_like(ids, dtype=p.dtype).unsqueeze(1)
        )
    return log_probs, entropies, slope.to(logits.dtype)


@functools.cache
def _compiled_statistics():
    return torch.compile(_statistics, dynamic=True)


@contextlib.contextmanager
def streaming_in_unsloths_loss():
    """Meanwhile Unsloth's GRPO loss, where it asks for entropies too, gets both from
    `log_probs_and_entropies`.

    unsloth_zoo 2026.10.7 imports its function for that by name at each call of the loss. Where ours
    would not be the same (a head with a bias or training weights, logits that are capped or scaled,
    another device or precision), theirs stays.
    """
    module, name = sys.modules.get(UNSLOTH[0]), UNSLOTH[1]
    theirs = getattr(module, name, None)
    if theirs is None:
        yield
        return
    signature = inspect.signature(theirs)

    def ours(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        rest = {key: value for key, value in given.arguments.items() if key != "chunks"}
        hidden, weight, ids = (rest.pop(key) for key in ("hidden_states", "lm_head", "index"))
        temperature, with_entropies = rest.pop("temperature"), rest.pop("return_entropy")
        changed = [key for key, value in rest.items() if isinstance(value, Tensor) or value]
        if changed or not with_entropies or weight.requires_grad or weight.device != hidden.device:
            setattr(module, name, theirs)  # which looks itself up there
            return theirs(*args, **kwargs)
        # and so less memory than GRPO's head there, which keeps all logits
        rows = min(most_rows(weight), -(-ids.numel() // 4))
        return log_probs_and_entropies(hidden, weight, ids, rows, temperature)

    setattr(module, name, ours)
    try:
        yield
    finally:
        setattr(module, name, theirs)


class _NotPlain(Exception):
    """The model does something to its logits after the head."""


def stream_log_probs(trainer: trl.GRPOTrainer) -> "StreamingHead":
    """`trainer`'s own (GTPO's has one), or a new one."""
    return getattr(trainer, "streaming_head", None) or StreamingHead(trainer)


class StreamingHead:
    """Makes `trainer`, one of TRL's GRPO trainers, compute log-probs and entropies with
    `log_probs_and_entropies`.

    While TRL runs the model for log-probs, the head hands its hidden states through and the two
    functions that TRL applies to logits get them. Where that is not the same (a head with a bias,
    an adapter or training weights, logits that the model caps or scales afterwards, weights spread
    over devices, an entropy bonus), TRL's own path stays; `reason` says why.
    """

    def __init__(self, trainer: trl.GRPOTrainer):
        self.trainer, self._parent = trainer, trainer._get_per_token_logps_and_entropies
        self.reason = self._why_not()
        # looked at once, with the first hidden states: later ones may hold NaN, and a look waits
        # for the GPU
        self._is_plain = False
        if not self.reason:
            trainer._get_per_token_logps_and_entropies = self._log_probs

    def _why_not(self) -> str | None:
        trainer = self.trainer
        if type(trainer)._get_per_token_logps_and_entropies.__module__ != grpo_trainer.__name__:
            return "the trainer has a path of its own"
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return "the weights may be spread over devices"
        if getattr(trainer, "_entropy_bonus_enabled", False):
            return "an entropy bonus needs the entropies' gradient"
        head = self._head()
        if type(head) is not torch.nn.Linear or head.bias is not None or head.weight.requires_grad:
            return "the output head is no frozen matrix"
        return None

    def _head(self) -> torch.nn.Module | None:
        return self.trainer.accelerator.unwrap_model(self.trainer.model).get_output_embeddings()

    def _log_probs(self, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        try:
            with self._streaming(logits_to_keep):
                return self._parent(
                    model, input_ids, attention_mask, logits_to_keep, *args, **kwargs
                )
        except _NotPlain:
            self.reason = "the model changes its logits after the head"
            logger.info("[GTPO] Log-probs from whole logits: %s", self.reason)
            self.trainer._get_per_token_logps_and_entropies = self._parent
            return self._parent(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    @contextlib.contextmanager
    def _streaming(self, logits_to_keep: int):
        head, seen = self._head(), {}
        own = head.__dict__.get("forward")

        def pass_through(hidden):
            seen["hidden"] = hidden
            return hidden

        def log_probs(logits, ids):
            if not self._is_plain:
                expected = (
                    seen["hidden"].to(logits.dtype)[:, :-1][:, -logits_to_keep:]
                    / self.trainer.temperature
                )
                self._is_plain = torch.equal(logits, expected)
            if not self._is_plain:
                raise _NotPlain
            log_probs, seen["entropies"] = log_probs_and_entropies(logits, head.weight, ids)
            return log_probs

        theirs = grpo_trainer.selective_log_softmax, grpo_trainer.entropy_from_logits
        head.forward = pass_through
        grpo_trainer.selective_log_softmax, grpo_trainer.entropy_from_logits = (
            log_probs,
            lambda logits: seen["entropies"],
        )
        try:
            yield
        finally:
            grpo_trainer.selective_log_softmax, grpo_trainer.entropy_from_logits = theirs
            del head.forward
            if own is not None:
                head.forward = own
