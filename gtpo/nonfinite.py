"""Skip the optimizer steps that a non-finite loss or gradient would poison, count them, and say so."""

import logging

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

logger = logging.getLogger(__name__)


class SkipNonFiniteSteps(TrainerCallback):
    """Drops the gradients of an optimizer step whose losses or gradients are not finite, so that nothing is updated.

    The trainer reports each micro-batch's loss with `saw`. `skipped` counts the steps so far. With DeepSpeed, whose
    engine steps on its own, a step is counted but not prevented.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.skipped = 0
        self._finite_losses: list[Tensor] = []  # tensors, so that no micro-batch waits for the device

    def saw(self, loss: Tensor) -> None:
        self._finite_losses.append(loss.detach().isfinite())

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        trainer, accelerator = self.trainer, self.trainer.accelerator
        finite = torch.stack([torch.ones((), dtype=torch.bool, device=accelerator.device), *self._finite_losses]).all()
        self._finite_losses.clear()
        gradients = [p.grad for p in trainer.model.parameters() if p.grad is not None]
        if gradients:
            finite = finite & torch.nn.utils.get_total_norm(gradients).isfinite().to(finite.device)
        if accelerator.gather(finite.reshape(1)).all():  # every process skips, or none does
            return
        self.skipped += 1
        logger.warning("[GTPO] Step %d skipped: its loss or gradients are not finite (%d skipped so far)",
                       state.global_step + 1, self.skipped)
        if accelerator.scaler is not None and not args.max_grad_norm:  # it has not looked yet: an infinity makes it skip
            gradients[0].fill_(torch.inf)
            return
        for parameter in trainer.model.parameters():
            parameter.grad = None  # optimizers pass over a parameter without gradient: no decay, no momentum
