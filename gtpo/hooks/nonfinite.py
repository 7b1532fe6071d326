"""Skip optimizer steps with a non-finite loss or gradient, and stop a run that has only those."""

import logging

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from gtpo.hooks.seams import wrap

logger = logging.getLogger(__name__)


def skip_non_finite(trainer: Trainer, limit: int | None) -> "SkipNonFiniteSteps":
    """Returns the trainer's own guard with this `limit`, or attaches a new one.

    GTPO's trainer attaches a guard to itself and keeps it as `non_finite`.
    """
    guard = getattr(trainer, "non_finite", None) or SkipNonFiniteSteps(trainer)
    guard.limit = limit
    return guard


class SkipNonFiniteSteps(TrainerCallback):
    """Drops the gradients of an optimizer step whose losses or gradients are not finite.

    Nothing is updated in such a step. Works with any trainer of TRL. Logs `gtpo/skipped_steps`, the
    number of skipped steps so far.

    More than `limit` skipped steps in a row stop the run with a checkpoint; None never stops it.
    That checkpoint holds the last good state, because weights and optimizer have not moved. Weights
    that are not finite are never saved: they stop the run and set `poisoned`. `stopped_by` is the
    sentence that says why the run was stopped. DeepSpeed's engine steps by itself, so there a step
    is counted but not prevented.
    """

    # The key of its state in checkpoints, and the key that earlier versions wrote.
    state_key, earlier_state_keys = "non_finite", ("SkipNonFiniteSteps",)

    def __init__(self, trainer: Trainer, limit: int | None = None):
        self.trainer, self.limit = trainer, limit
        self.skipped = self.in_a_row = 0
        self.poisoned = False
        self.stopped_by: str | None = None
        # Bool tensors of the micro-batches: reading them at once would wait for the device.
        self.finite_losses: list[Tensor] = []
        wrap(trainer, "compute_loss", self._compute_loss)
        trainer.add_callback(self)

    def _compute_loss(self, compute_loss, *args, **kwargs) -> Tensor:
        loss = compute_loss(*args, **kwargs)
        if self.trainer.model.training:
            self.finite_losses.append(loss.detach().isfinite())
        return loss

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        """Drops all gradients if a loss or a gradient of this step is not finite."""
        parameters, scaler = list(self.trainer.model.parameters()), self.trainer.accelerator.scaler
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self._all_finite(gradients, self.finite_losses):
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
            logger.warning(
                "[GTPO] Step %d skipped: its loss or gradients are not finite (%d skipped so far)",
                state.global_step + 1,
                self.skipped,
            )
            if scaler is not None and not args.max_grad_norm:
                # Without clipping, torch 2.13.0's GradScaler has not looked at the gradients yet.
                # An infinity makes it skip the step.
                gradients[0].fill_(torch.inf)
            else:
                # Optimizers pass over a parameter without a gradient: no decay and no momentum.
                for parameter in parameters:
                    parameter.grad = None
        self.finite_losses.clear()

    def on_step_end(self, args, state, control, **kwargs):
        """Logs the skipped steps; stops the run at the limit or if weights are not finite."""
        # TRL logs the mean of this list; the mean of one value is exact.
        self.trainer._metrics["train"]["gtpo/skipped_steps"] = [float(self.skipped)]
        if self.limit is not None and self.in_a_row > self.limit:
            self.stopped_by = (
                f"Step {state.global_step}: {self.in_a_row} steps in a row, more than"
                f" training.max_skipped_steps ({self.limit}), had a non-finite loss or"
                " gradient; lower training.learning_rate, or use bf16 instead of fp16"
            )
            self.in_a_row = 0  # a resumed run counts from 0
            control.should_log = control.should_save = control.should_training_stop = True
        trained = [p.detach() for p in self.trainer.model.parameters() if p.requires_grad]
        if not self._all_finite(trained):
            self.poisoned = True
            self.stopped_by = (
                f"Step {state.global_step}: the weights are not finite any more and are not saved;"
                " resume from the last checkpoint with --resume, --force-resume and a lower"
                " training.learning_rate"
            )
            control.should_save = False
            control.should_log = control.should_training_stop = True

    def _all_finite(self, tensors: list[Tensor], finite_losses: list[Tensor] | None = None) -> bool:
        """Whether all `tensors` and losses are finite, in every process.

        `finite_losses` says of each loss whether it is finite, (), bool. All processes get the same
        answer, so either all of them skip a step or none does.
        """
        accelerator = self.trainer.accelerator
        start = torch.ones((), dtype=torch.bool, device=accelerator.device)
        finite = torch.stack([start, *(finite_losses or [])]).all()
        if tensors:
            norm = torch.nn.utils.get_total_norm(tensors)
            # Under FSDP the norm is spread over the processes.
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            finite = finite & norm.isfinite().to(finite.device)
        return bool(accelerator.gather(finite.reshape(1)).all())

    def resume_state(self) -> dict:
        """What a checkpoint keeps of this guard."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, kept: dict) -> None:
        """Takes over what `resume_state` returned."""
        self.skipped, self.in_a_row = kept["skipped"], kept["in_a_row"]
