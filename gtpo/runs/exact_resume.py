"""Checkpoints from which a run goes on as if it had never stopped, for any `trl.GRPOTrainer`.

transformers 5.17.0 restores weights, optimizer, schedule, step and random generators, and skips the
data seen. What it and trl 1.13.0 leave out is kept here: TRL's step counter, the rollout under way,
metrics and losses not yet logged, the generator behind the order of later epochs, and what our
callbacks remember (those with a `resume_state`).
"""

import contextlib
import functools
import logging
from collections import deque
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device, set_seed
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import GRPOTrainer

from gtpo.recipe import Recipe
from gtpo.runs import checkpoints
from gtpo.runs.checkpoints import Checkpoint
from gtpo.runs.start import Start, within_rollout
from gtpo.system.signals import Interruption
from gtpo.system.whole_files import ASIDE, flush, remove

logger = logging.getLogger(__name__)


class ExactResume(TrainerCallback):
    """Saves `trainer`'s checkpoints whole, with all of its state, and restores that of
    `checkpoint`.

    `told` goes into each manifest. Add it after all other callbacks: what they do at the end of a
    step comes first. `changed` lets the recipe's optimizer settings and schedule take the place of
    the checkpoint's.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        run_dir: Path,
        told: dict[str, Any],
        *,
        checkpoint: Checkpoint | None = None,
        use_recipe_optimizer: bool = False,
        interruption: Interruption | None = None,
    ):
        self.trainer, self.run_dir, self.manifest = trainer, run_dir, told
        self.checkpoint, self.use_recipe_optimizer = checkpoint, use_recipe_optimizer
        self.interruption = interruption or Interruption()
        self._generator: torch.Generator | None = None  # draws the order of each epoch
        # its state, from which this epoch's order was drawn
        self._epoch_began: torch.Tensor | None = None
        self._to_restore: torch.Tensor | None = None
        for name, around in (
            ("_save_checkpoint", self._save),
            ("_get_train_sampler", self._sampler),
            ("_run_epoch", self._epoch),
            ("_load_optimizer_and_scheduler", self._load_optimizer),
        ):
            original = getattr(trainer, name)
            setattr(trainer, name, functools.wraps(original)(functools.partial(around, original)))
        trainer.add_callback(self)

    # ---- what is saved

    def _save(self, save, model, trial):
        trainer, step = self.trainer, self.trainer.state.global_step
        aside = self.run_dir / f"{ASIDE}saving"
        written = aside / f"checkpoint-{step}"
        self._on_main(lambda: remove(aside))
        trainer._get_output_dir = lambda trial=None: str(aside)
        try:
            save(model, trial)
            torch.save(self._state(), written / self._state_file())
            self._on_main(lambda: self._publish(written, step))
        except BaseException:  # on a full disk, what there is of it is in the way
            with contextlib.suppress(OSError):
                remove(aside)
            raise
        finally:
            del trainer._get_output_dir

    def _publish(self, written: Path, step: int) -> None:
        state = self.trainer.state
        completions = self.run_dir / "completions.jsonl"
        if completions.is_file():
            flush(completions)
        checkpoints.publish(
            written,
            self.run_dir / written.name,
            step=step,
            max_steps=state.max_steps,
            **self.manifest,
            within_rollout=self._rollout() is not None,
            completions=completions.stat().st_size if completions.is_file() else 0,
        )
        remove(written.parent)
        checkpoints.rotate(
            self.run_dir,
            self.trainer.args.save_total_limit,
            checkpoints.best_step(self.run_dir, state.log_history),
        )

    def _on_main(self, act) -> None:
        """The main process acts while the others wait for it."""
        self.trainer.accelerator.wait_for_everyone()
        if self.trainer.accelerator.is_main_process:
            act()
        self.trainer.accelerator.wait_for_everyone()

    def _state(self) -> dict[str, Any]:
        trainer = self.trainer
        at_epoch = trainer.state.epoch == int(trainer.state.epoch)
        return _plain(
            {
                "step": trainer._step,
                "rollout": self._rollout(),
                "metrics": trainer._metrics,
                "logs": trainer._logs,
                "step_time": trainer._current_train_step_time,
                "loss": trainer._tr_loss,
                "total_loss": trainer._total_loss_scalar,
                "last_logged": trainer._globalstep_last_logged,
                "sampler": (
                    self._generator.get_state()
                    if self._generator and at_epoch
                    else self._epoch_began
                ),
                "callbacks": {
                    _state_keys(callback)[0]: callback.resume_state()
                    for callback in self._keepers()
                },
            }
        )

    def _rollout(self) -> list[dict[str, Any]] | None:
        """The rollout under way; None where the next step draws a new one."""
        trainer = self.trainer
        if trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) == 0:
            return None
        try:
            return _plain(trainer._buffered_inputs)
        except TypeError as error:  # images, or what somebody's trainer adds
            logger.warning(
                "[GTPO] A run resumed from step %d will not go on exactly: %s",
                trainer.state.global_step,
                error,
            )
            return None

    def _keepers(self) -> list[Any]:
        return [
            callback
            for callback in self.trainer.callback_handler.callbacks
            if hasattr(callback, "resume_state")
        ]

    def _state_file(self, process: int | None = None) -> str:
        return f"resume_state_{self.trainer.accelerator.process_index if process is None else process}.pt"

    # ---- what is restored

    def on_train_begin(self, args, state, control, **kwargs):
        if self.checkpoint is None:
            return
        trainer, folder, told = self.trainer, self.checkpoint.folder, self.checkpoint.manifest
        as_many = told["processes"] == trainer.accelerator.num_processes
        saved = torch.load(
            folder / self._state_file(None if as_many else 0), map_location="cpu", weights_only=True
        )
        if not as_many:
            saved["step"] = self._micro_batches(saved["rollout"])
        trainer._step, trainer._current_train_step_time = saved["step"], saved["step_time"]
        trainer._buffered_inputs = send_to_device(saved["rollout"], trainer.accelerator.device)
        trainer._tr_loss = saved["loss"].to(trainer._tr_loss.device)
        trainer._total_loss_scalar, trainer._globalstep_last_logged = (
            saved["total_loss"],
            saved["last_logged"],
        )
        for mode, metrics in saved["metrics"].items():
            trainer._metrics[mode].update(metrics)
        _extend(trainer._logs, saved["logs"])
        self._to_restore = saved["sampler"]
        for callback in self._keepers():
            for key in _state_keys(callback):
                if (kept := saved["callbacks"].get(key)) is not None:
                    callback.restore(send_to_device(kept, trainer.accelerator.device))
                    break
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ExportableState):
                vars(callback).update(
                    state.stateful_callbacks.setdefault(type(callback).__name__, {}).get(
                        "attributes", {}
                    )
                )
        # logging_steps and save_steps are this recipe's
        state.compute_steps(args, state.max_steps)

    def _micro_batches(self, rollout) -> int:
        """TRL's counter of micro-batches after the step that the run goes on from, and generators
        for its processes: there are more or fewer of them than there were.

        Weights, optimizer, schedule, metrics and the order of the problems are the same in all
        processes, so any number can take them up; with as many completions per step the updates are
        those of the run that it was, as far as they depend on them. Sampling depends on the
        processes: each has a generator of its own. And a rollout under way is spread over them: it
        cannot be taken up. Raises RecipeError if a rollout does not begin there, for these
        processes as well as for those that were.
        """
        args, steps = self.trainer.args, self.trainer.state.global_step
        micro_batches = steps * args.gradient_accumulation_steps
        rollout_length = args.steps_per_generation * self.trainer.num_iterations
        if rollout is not None or micro_batches % rollout_length:
            raise within_rollout(self.checkpoint)
        set_seed(args.seed + steps, device_specific=True)
        return micro_batches

    def _sampler(self, get, *args):
        sampler = get(*args)
        self._generator = getattr(sampler, "generator", None)
        return sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self._generator is not None:
            if self._to_restore is not None:
                self._generator.set_state(self._to_restore)
                self._to_restore = None
            self._epoch_began = self._generator.get_state()

    def _epoch(self, run_epoch, *args, **kwargs):
        # transformers would take one more step
        if self.trainer.state.global_step >= self.trainer.state.max_steps:
            self.trainer.control.should_training_stop = True
            return
        run_epoch(*args, **kwargs)

    def _load_optimizer(self, load, checkpoint):
        optimizer, scheduler = self.trainer.optimizer, self.trainer.lr_scheduler
        ours = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        rates = list(getattr(scheduler, "base_lrs", []))
        # transformers loads onto it, and torch knows no place called cpu:0
        if self.trainer.args.device.type == "cpu":
            vars(self.trainer.args)["_setup_devices"] = torch.device("cpu")
        load(checkpoint)
        if self.use_recipe_optimizer and hasattr(scheduler, "lr_lambdas"):
            scheduler.base_lrs = rates
            for group, own, rate, factor in zip(
                optimizer.param_groups, ours, rates, scheduler.lr_lambdas, strict=True
            ):
                group.update(own, lr=rate * factor(scheduler.last_epoch))

    # ---- when somebody asks to stop

    def on_step_end(self, args, state, control, **kwargs):
        if self._anybody_asked():
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        # what is pending is in the checkpoint, and not for a last line
        if control.should_training_stop and self.interruption.requested:
            self.trainer._metrics["train"].clear()
            self.trainer.log_completions = False

    def _anybody_asked(self) -> bool:
        """Whether a process was asked to stop, so that all of them do after the same step."""
        accelerator, interruption = self.trainer.accelerator, self.interruption
        if accelerator.num_processes > 1:
            asked = accelerator.gather(
                torch.tensor([interruption.signum or 0], device=accelerator.device)
            )
            interruption.signum = asked.max().item() or None
        return interruption.requested


def resume_exactly(
    trainer: GRPOTrainer, start: Start, recipe: Recipe, interruption: Interruption
) -> None:
    """Let `trainer` save checkpoints from which its run can go on exactly, and go on from that of
    `start`, if it has one.
    """
    told = {"recipe": recipe.saved()[0], "processes": trainer.accelerator.num_processes}
    ExactResume(
        trainer,
        start.run_dir,
        told,
        checkpoint=start.checkpoint,
        use_recipe_optimizer=start.use_recipe_optimizer,
        interruption=interruption,
    )


def _state_keys(callback: Any) -> tuple[str, ...]:
    """The key of a callback's state in a checkpoint, then the keys that earlier versions wrote."""
    key = getattr(callback, "state_key", type(callback).__name__)
    return (key, *getattr(callback, "earlier_state_keys", ()))


def _plain(value: Any) -> Any:
    """`value` made of what `torch.load(weights_only=True)` reads back."""
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_plain(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if hasattr(value, "item"):  # numpy's scalars
        return value.item()
    raise TypeError(f"a {type(value).__name__} cannot be kept in a checkpoint")


def _extend(logs: dict[str, Any], saved: dict[str, Any]) -> None:
    """Put saved lists back into TRL's deques, which keep their lengths."""
    for name, values in saved.items():
        if isinstance(values, dict):
            _extend(logs[name], values)
        else:
            logs[name].extend(values)
