"""Log-probs and entropies without whole logits: the output head takes the tokens in chunks.

trl 1.13.0 keeps the logits of a whole micro-batch and several copies of them. That is 7 GB for
4,096 tokens and a vocabulary of 152,000. Unsloth works in chunks too, but computes its logits twice
where it needs entropies, and GTPO always needs them.

Letters: N tokens, H hidden size, V vocabulary.
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

from gtpo.hooks.seams import wrap

logger = logging.getLogger(__name__)

CHUNK = {"cpu": 2**22, "cuda": 2**27}  # logits that exist at a time, by device
LEAST = 128  # tokens per chunk at least, so that the matrix products stay efficient

UNSLOTH_MODULE = "unsloth_zoo.rl_replacements"
UNSLOTH_HEAD = "chunked_hidden_states_selective_log_softmax_recompute"


def log_probs_and_entropies(
    hidden: Tensor, weight: Tensor, ids: Tensor, rows: int | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """log p(ids) and the entropies in nats, both (...), of softmax(hidden weight^T / temperature).

    `hidden` is (..., H), `weight` is (V, H), `ids` is (...). The results are at least float32.
    Gradients reach `hidden` through the log-probs; the entropies carry none. The logits of `rows`
    tokens exist at a time.

    The gradient is d log p(y) / d hidden = (weight[y] - sum_v p(v) weight[v]) / temperature. It
    needs nothing from the layers above. So forward computes it while it has the probabilities, and
    backward only scales it. That makes two matrix products in all.
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
    """How many tokens make a chunk on the device of the head's `weight`, (V, H)."""
    return max(LEAST, CHUNK.get(weight.device.type, CHUNK["cuda"]) // len(weight))


class _Head(torch.autograd.Function):
    """The arithmetic of `log_probs_and_entropies` for `hidden`, (N, H), and `ids`, (N,)."""

    @staticmethod
    def forward(ctx, hidden, weight, ids, size, temperature):
        device, ctx.dtype, ctx.temperature = hidden.device.type, hidden.dtype, temperature
        if torch.is_autocast_enabled(device):
            weight = weight.to(torch.get_autocast_dtype(device))  # once, not for each chunk
        hidden = hidden.to(weight.dtype)
        statistics = _compiled_statistics() if device == "cuda" else _statistics
        dtype = torch.promote_types(weight.dtype, torch.float32)
        log_probs = torch.empty(len(ids), dtype=dtype, device=hidden.device)  # (N,)
        entropies = torch.empty_like(log_probs)  # (N,)
        slopes = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None  # (N, H)
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
    """log p(ids) and the entropies, both (N,), and d log p(ids) / d (logits / temperature), (N, V).

    `logits` is (N, V) and may be overwritten. The slope has the dtype of the logits.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if temperature != 1.0:
        z /= temperature
    z -= z.amax(dim=1, keepdim=True)
    p = z.exp()  # not yet divided by its sum
    total = p.sum(dim=1)
    log_probs = z.gather(1, ids.unsqueeze(1)).squeeze(1) - total.log()
    # Neither term is below 0, so nothing cancels.
    entropies = total.log() - torch.linalg.vecdot(p, z) / total
    if not with_slope:
        return log_probs, entropies, None
    p /= total.unsqueeze(1)
    if p.is_cuda:  # torch.compile makes one kernel of this, which writes nothing else
        slope = (ids.unsqueeze(1) == torch.arange(p.shape[1], device=p.device)).to(p.dtype) - p
    else:
        ones = torch.ones_like(ids, dtype=p.dtype).unsqueeze(1)
        slope = p.neg_().scatter_add_(1, ids.unsqueeze(1), ones)
    return log_probs, entropies, slope.to(logits.dtype)


@functools.cache
def _compiled_statistics():
    return torch.compile(_statistics, dynamic=True)


@contextlib.contextmanager
def streaming_in_unsloths_loss():
    """Inside, Unsloth's GRPO loss computes log-probs with entropies by `log_probs_and_entropies`.

    unsloth_zoo 2026.10.7 imports its own function by name at each call of the loss. That function
    stays where ours would compute something else. This holds for a head with a bias or with trained
    weights, and for logits that are capped or scaled. It also holds for another device or dtype.
    """
    module = sys.modules.get(UNSLOTH_MODULE)
    theirs = getattr(module, UNSLOTH_HEAD, None)
    if theirs is None:
        yield
        return
    signature = inspect.signature(theirs)

    def ours(theirs, *args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        rest = {key: value for key, value in given.arguments.items() if key != "chunks"}
        hidden, weight, ids = (rest.pop(key) for key in ("hidden_states", "lm_head", "index"))
        temperature, with_entropies = rest.pop("temperature"), rest.pop("return_entropy")
        changed = [key for key, value in rest.items() if isinstance(value, Tensor) or value]
        if changed or not with_entropies or weight.requires_grad or weight.device != hidden.device:
            undo()  # Unsloth's function looks itself up by name
            return theirs(*args, **kwargs)
        # A quarter of the tokens at most: less memory than GRPO's head, which keeps all logits.
        rows = min(most_rows(weight), -(-ids.numel() // 4))
        return log_probs_and_entropies(hidden, weight, ids, rows, temperature)

    undo = wrap(module, UNSLOTH_HEAD, ours)
    try:
        yield
    finally:
        undo()


class _LogitsChanged(Exception):
    """The model changes its logits after the head."""


def stream_log_probs(trainer: trl.GRPOTrainer) -> "StreamingHead":
    """Returns the trainer's own streaming head, or attaches a new one.

    GTPO's trainer attaches one to itself and keeps it as `streaming_head`.
    """
    return getattr(trainer, "streaming_head", None) or StreamingHead(trainer)


class StreamingHead:
    """Makes a `trl.GRPOTrainer` compute log-probs and entropies with `log_probs_and_entropies`.

    While TRL runs the model for log-probs, the output head passes its hidden states on. The two
    functions that TRL applies to logits receive them instead.

    TRL's own path stays where that would compute something else, and `reason` says why. This holds
    for a head with a bias, an adapter or trained weights, and for logits that the model caps or
    scales after the head. It also holds for weights spread over devices and for an entropy bonus.
    """

    def __init__(self, trainer: trl.GRPOTrainer):
        self.trainer = trainer
        self.reason = self._why_not()
        # Checked once, with the first hidden states. Later ones may hold NaN, and each check waits
        # for the GPU.
        self._logits_are_plain = False
        if not self.reason:
            self._undo = wrap(trainer, "_get_per_token_logps_and_entropies", self._log_probs)

    def _why_not(self) -> str | None:
        trainer = self.trainer
        if type(trainer)._get_per_token_logps_and_entropies.__module__ != grpo_trainer.__name__:
            return "the trainer has a path of its own"
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            return "the weights may be spread over devices"
        if getattr(trainer, "_entropy_bonus_enabled", False):
            return "an entropy bonus needs the gradient of the entropies"
        head = self._head()
        if type(head) is not torch.nn.Linear or head.bias is not None or head.weight.requires_grad:
            return "the output head is not a frozen matrix"
        return None

    def _head(self) -> torch.nn.Module | None:
        return self.trainer.accelerator.unwrap_model(self.trainer.model).get_output_embeddings()

    def _log_probs(self, parent, model, input_ids, attention_mask, logits_to_keep, *args, **kwargs):
        try:
            with self._streaming(logits_to_keep):
                return parent(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)
        except _LogitsChanged:
            self.reason = "the model changes its logits after the head"
            logger.info("[GTPO] Log-probs from whole logits: %s", self.reason)
            self._undo()
            return parent(model, input_ids, attention_mask, logits_to_keep, *args, **kwargs)

    @contextlib.contextmanager
    def _streaming(self, logits_to_keep: int):
        head, seen = self._head(), {}

        def pass_through(forward, hidden):
            seen["hidden"] = hidden
            return hidden

        def log_probs(selective_log_softmax, logits, ids):
            if not self._logits_are_plain:
                hidden = seen["hidden"].to(logits.dtype)
                expected = hidden[:, :-1][:, -logits_to_keep:] / self.trainer.temperature
                self._logits_are_plain = torch.equal(logits, expected)
            if not self._logits_are_plain:
                raise _LogitsChanged
            log_probs, seen["entropies"] = log_probs_and_entropies(logits, head.weight, ids)
            return log_probs

        def entropies(entropy_from_logits, logits):
            return seen["entropies"]

        with contextlib.ExitStack() as undone:
            undone.callback(wrap(head, "forward", pass_through))
            undone.callback(wrap(grpo_trainer, "selective_log_softmax", log_probs))
            undone.callback(wrap(grpo_trainer, "entropy_from_logits", entropies))
            yield
