"""Skip the optimizer steps that a non-finite loss or gradient would poison, count them, and stop a
run that has no others.
"""

import functools
import logging

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

logger = logging.getLogger(__name__)


def skip_non_finite(trainer: Trainer, limit: int | None) -> "SkipNonFiniteSteps":
    """`trainer`'s own (GTPO's has one, so that it needs no recipe), or a new one, with this
    limit.
    """
    own = getattr(trainer, "non_finite", None) or SkipNonFiniteSteps(trainer)
    own.limit = limit
    return own


class SkipNonFiniteSteps(TrainerCallback):
    """Drops the gradients of an optimizer step whose losses or gradients are not finite, so that
    nothing is updated.

    For any of TRL's trainers. Logs `gtpo/skipped_steps`, their number so far. More than `limit` in
    a row (None: never) stop the run with a checkpoint: of the last good state, since weights and
    optimizer have not moved. No checkpoint is made of weights that are not finite; they stop the
    run, and `poisoned` is true. `stopped_by` is the sentence of what stopped it. With DeepSpeed,
    whose engine steps on its own, a step is counted but not prevented.
    """

    # in checkpoints
    state_key, earlier_state_keys = "non_finite", ("SkipNonFiniteSteps",)

    def __init__(self, trainer: Trainer, limit: int | None = None):
        self.trainer, self.limit = trainer, limit
        self.skipped = self.in_a_row = 0
        self.poisoned = False
        self.stopped_by: str | None = None
        # tensors, so that no micro-batch waits for the device
        self._finite_losses: list[Tensor] = []
        compute_loss = trainer.compute_loss
        trainer.compute_loss = functools.wraps(compute_loss)(
            lambda *args, **kwargs: self._saw(compute_loss(*args, **kwargs))
        )
        trainer.add_callback(self)

    def _saw(self, loss: Tensor) -> Tensor:
        if self.trainer.model.training:
            self._finite_losses.append(loss.detach().isfinite())
        return loss

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        parameters, scaler = list(self.trainer.model.parameters()), self.trainer.accelerator.scaler
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self._finite(gradients, self._finite_losses):
            self.in_a_row = 0
        else:
            self.skipped += 1
            self.in_a_row += 1
            logger.warning(
                "[GTPO] Step %d skipped: its loss or gradients are not finite (%d skipped so far)",
                state.global_step + 1,
                self.skipped,
            )
            # it has not looked yet: an infinity makes it skip
            if scaler is not None and not args.max_grad_norm:
                gradients[0].fill_(torch.inf)
            else:
                for parameter in parameters:
                    # optimizers pass over a parameter without gradient: no decay, no momentum
                    parameter.grad = None
        self._finite_losses.clear()

    def on_step_end(self, args, state, control, **kwargs):
        # the mean of one value: exact
        self.trainer._metrics["train"]["gtpo/skipped_steps"] = [float(self.skipped)]
        if self.limit is not None and self.in_a_row > self.limit:
            self.stopped_by = (
                f"Step {state.global_step}: {self.in_a_row} steps in a row had a loss or gradients"
                f" that are not finite, more than training.max_skipped_steps ({self.limit}); lower"
                " training.learning_rate, or use bf16 instead of fp16"
            )
            self.in_a_row = 0  # a resumed run begins to count again
            control.should_log = control.should_save = control.should_training_stop = True
        if not self._finite(
            [p.detach() for p in self.trainer.model.parameters() if p.requires_grad]
        ):
            self.poisoned = True
            self.stopped_by = (
                f"Step {state.global_step}: the weights are not finite any more, and nothing of"
                " them is saved; go on from the last checkpoint with --resume, --force-resume and"
                " a lower training.learning_rate"
            )
            control.should_save, control.should_log, control.should_training_stop = (
                False,
                True,
                True,
            )

    def _finite(self, tensors: list[Tensor], others: list[Tensor] = []) -> bool:
        """Whether `tensors` and all `others` (verdicts) are finite, in every process: all of them
        skip, or none does.
        """
        accelerator = self.trainer.accelerator
        finite = torch.stack(
            [torch.ones((), dtype=torch.bool, device=accelerator.device), *others]
        ).all()
        if tensors:
            norm = torch.nn.utils.get_total_norm(tensors)
            # of FSDP's pieces, of all processes
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            finite = finite & norm.isfinite().to(finite.device)
        return bool(accelerator.gather(finite.reshape(1)).all())

    def resume_state(self) -> dict:
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def restore(self, kept: dict) -> None:
        self.skipped, self.in_a_row = kept["skipped"], kept["in_a_row"]
