"""Checkpoints from which a run continues as if it had never stopped, for any `trl.GRPOTrainer`.

transformers 5.17.0 restores weights, optimizer, schedule, step and random generators, and it skips
the data that the run has seen. This module keeps what transformers and trl 1.13.0 leave out:

- TRL's counter of micro-batches and the rollout under way
- metrics and losses that are not logged yet
- the generator that draws the order of later epochs
- the state of callbacks that have the methods `resume_state` and `restore`

gtpo/hooks/seams.py lists the members of both libraries that this relies on.
"""

import contextlib
import logging
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device, set_seed
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState
from trl import GRPOTrainer

from gtpo.hooks.seams import wrap
from gtpo.recipe import Recipe
from gtpo.runs import checkpoints
from gtpo.runs.checkpoints import Checkpoint
from gtpo.runs.start import Start, within_rollout_error
from gtpo.system.signals import Interruption
from gtpo.system.whole_files import ASIDE, flush, remove

logger = logging.getLogger(__name__)


class ExactResume(TrainerCallback):
    """Saves the whole state of `trainer` with each checkpoint, and restores that of `checkpoint`.

    Attach it after all other callbacks: what they do at the end of a step belongs into the
    checkpoint. `manifest` is added to the manifest of each checkpoint. With `use_recipe_optimizer`
    the optimizer settings and the schedule of `trainer` replace those of the checkpoint.
    """

    def __init__(
        self,
        trainer: GRPOTrainer,
        run_dir: Path,
        manifest: dict[str, Any],
        *,
        checkpoint: Checkpoint | None = None,
        use_recipe_optimizer: bool = False,
        interruption: Interruption | None = None,
    ):
        self.trainer, self.run_dir, self.manifest = trainer, run_dir, manifest
        self.checkpoint, self.use_recipe_optimizer = checkpoint, use_recipe_optimizer
        self.interruption = interruption or Interruption()
        self._generator: torch.Generator | None = None  # draws the order of each epoch
        self._state_at_epoch: torch.Tensor | None = None  # the generator's, as the epoch began
        self._state_to_restore: torch.Tensor | None = None  # the same, from the checkpoint
        wrap(trainer, "_save_checkpoint", self._save_whole)
        wrap(trainer, "_get_train_sampler", self._keep_generator)
        wrap(trainer, "_run_epoch", self._run_epoch_unless_done)
        wrap(trainer, "_load_optimizer_and_scheduler", self._load_optimizer)
        trainer.add_callback(self)

    # ---- save

    def _save_whole(self, save: Callable, model, trial):
        """Saves a checkpoint in a folder aside, and gives it its name when it is complete."""
        trainer, step = self.trainer, self.trainer.state.global_step
        aside = self.run_dir / f"{ASIDE}saving"
        written = aside / f"checkpoint-{step}"
        self._on_main_process(lambda: remove(aside))
        trainer._get_output_dir = lambda trial=None: str(aside)
        try:
            save(model, trial)
            torch.save(self._state(), written / self._state_file())
            self._on_main_process(lambda: self._publish(written, step))
        except BaseException:  # an incomplete checkpoint takes space on a full disk
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
        best = checkpoints.best_step(self.run_dir, state.log_history)
        checkpoints.rotate(self.run_dir, self.trainer.args.save_total_limit, best)

    def _on_main_process(self, act: Callable[[], None]) -> None:
        """Calls `act` in the main process, while the other processes wait."""
        self.trainer.accelerator.wait_for_everyone()
        if self.trainer.accelerator.is_main_process:
            act()
        self.trainer.accelerator.wait_for_everyone()

    def _state(self) -> dict[str, Any]:
        """What a file resume_state_N.pt holds: the state of this process, number N."""
        trainer = self.trainer
        between_epochs = trainer.state.epoch == int(trainer.state.epoch)
        sampler = self._state_at_epoch
        if between_epochs and self._generator:
            sampler = self._generator.get_state()
        return _plain_values(
            {
                "step": trainer._step,
                "rollout": self._rollout(),
                "metrics": trainer._metrics,
                "logs": trainer._logs,
                "step_time": trainer._current_train_step_time,
                "loss": trainer._tr_loss,
                "total_loss": trainer._total_loss_scalar,
                "last_logged": trainer._globalstep_last_logged,
                "sampler": sampler,
                "callbacks": {
                    _state_keys(callback)[0]: callback.resume_state()
                    for callback in self._callbacks_with_state()
                },
            }
        )

    def _rollout(self) -> list[dict[str, Any]] | None:
        """The rollout under way; None if the next step samples a new one."""
        trainer = self.trainer
        if trainer._step % (trainer.args.steps_per_generation * trainer.num_iterations) == 0:
            return None
        try:
            return _plain_values(trainer._buffered_inputs)
        except TypeError as error:  # images, or what a trainer of the user's adds
            logger.warning(
                "[GTPO] A run resumed from step %d will not continue exactly: %s",
                trainer.state.global_step,
                error,
            )
            return None

    def _callbacks_with_state(self) -> list[Any]:
        callbacks = self.trainer.callback_handler.callbacks
        return [callback for callback in callbacks if hasattr(callback, "resume_state")]

    def _state_file(self, process: int | None = None) -> str:
        process = self.trainer.accelerator.process_index if process is None else process
        return f"resume_state_{process}.pt"

    # ---- restore

    def on_train_begin(self, args, state, control, **kwargs):
        """Restores what transformers has not restored from the checkpoint."""
        if self.checkpoint is None:
            return
        trainer, folder = self.trainer, self.checkpoint.folder
        device = trainer.accelerator.device
        same_processes = self.checkpoint.manifest["processes"] == trainer.accelerator.num_processes
        file = folder / self._state_file(None if same_processes else 0)
        saved = torch.load(file, map_location="cpu", weights_only=True)
        if not same_processes:
            saved["step"] = self._micro_batches_for_other_processes(saved["rollout"])
        trainer._step, trainer._current_train_step_time = saved["step"], saved["step_time"]
        trainer._buffered_inputs = send_to_device(saved["rollout"], device)
        trainer._tr_loss = saved["loss"].to(trainer._tr_loss.device)
        trainer._total_loss_scalar = saved["total_loss"]
        trainer._globalstep_last_logged = saved["last_logged"]
        for mode, metrics in saved["metrics"].items():
            trainer._metrics[mode].update(metrics)
        _extend(trainer._logs, saved["logs"])
        self._state_to_restore = saved["sampler"]
        for callback in self._callbacks_with_state():
            keys = [key for key in _state_keys(callback) if key in saved["callbacks"]]
            if keys:
                callback.restore(send_to_device(saved["callbacks"][keys[0]], device))
        self._restore_exportable_callbacks(state)
        # The recipe sets logging_steps and save_steps, not the checkpoint.
        state.compute_steps(args, state.max_steps)

    def _restore_exportable_callbacks(self, state) -> None:
        """Restores the attributes of callbacks that transformers itself saves.

        transformers 5.17.0 keeps them in trainer_state.json under their class names. It fails at
        the next checkpoint if a class has no entry there, for instance a callback that is new.
        """
        for callback in self.trainer.callback_handler.callbacks:
            if not isinstance(callback, ExportableState):
                continue
            saved = state.stateful_callbacks.setdefault(type(callback).__name__, {})
            for name, value in saved.get("attributes", {}).items():
                setattr(callback, name, value)

    def _micro_batches_for_other_processes(self, rollout: list | None) -> int:
        """TRL's counter of micro-batches, if more or fewer processes continue the run.

        Weights, optimizer, schedule, metrics and the order of the problems are the same in all
        processes. So any number of processes can continue, and with as many completions per step
        the updates depend on them as before. Sampling differs: each process has a generator of its
        own, which gets a new seed here. A rollout under way is spread over its processes, and
        others cannot continue it.

        Raises RecipeError if a rollout is under way, for the earlier processes or for these.
        """
        args, steps = self.trainer.args, self.trainer.state.global_step
        micro_batches = steps * args.gradient_accumulation_steps
        rollout_length = args.steps_per_generation * self.trainer.num_iterations
        if rollout is not None or micro_batches % rollout_length:
            raise within_rollout_error(self.checkpoint)
        set_seed(args.seed + steps, device_specific=True)
        return micro_batches

    def _keep_generator(self, get_train_sampler: Callable, *args):
        sampler = get_train_sampler(*args)
        self._generator = getattr(sampler, "generator", None)
        return sampler

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Lets the sampler draw this epoch's order from the state that the checkpoint has."""
        if self._generator is not None:
            if self._state_to_restore is not None:
                self._generator.set_state(self._state_to_restore)
                self._state_to_restore = None
            self._state_at_epoch = self._generator.get_state()

    def _run_epoch_unless_done(self, run_epoch: Callable, *args, **kwargs):
        """Runs no epoch after the last step, where transformers would take one more step."""
        if self.trainer.state.global_step >= self.trainer.state.max_steps:
            self.trainer.control.should_training_stop = True
            return
        run_epoch(*args, **kwargs)

    def _load_optimizer(self, load: Callable, checkpoint):
        """Loads optimizer and schedule; with `use_recipe_optimizer` the recipe's settings win."""
        optimizer, scheduler = self.trainer.optimizer, self.trainer.lr_scheduler
        recipe_settings = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        rates = list(getattr(scheduler, "base_lrs", []))
        # transformers loads the optimizer onto this device, and torch knows no device `cpu:0`.
        if self.trainer.args.device.type == "cpu":
            vars(self.trainer.args)["_setup_devices"] = torch.device("cpu")
        load(checkpoint)
        if self.use_recipe_optimizer and hasattr(scheduler, "lr_lambdas"):
            scheduler.base_lrs = rates
            groups = zip(
                optimizer.param_groups, recipe_settings, rates, scheduler.lr_lambdas, strict=True
            )
            for group, settings, rate, factor in groups:
                group.update(settings, lr=rate * factor(scheduler.last_epoch))

    # ---- stop when a signal asks for it

    def on_step_end(self, args, state, control, **kwargs):
        """After a signal, saves a checkpoint and stops."""
        if self._any_process_was_interrupted():
            control.should_save = control.should_training_stop = True

    def on_save(self, args, state, control, **kwargs):
        """After a signal, discards the metrics that the checkpoint has."""
        # Pending metrics are in the checkpoint. They must not appear in a last log line as well.
        if control.should_training_stop and self.interruption.requested:
            self.trainer._metrics["train"].clear()
            self.trainer.log_completions = False

    def _any_process_was_interrupted(self) -> bool:
        """Whether a signal reached any process, so that all stop after the same step."""
        accelerator, interruption = self.trainer.accelerator, self.interruption
        if accelerator.num_processes > 1:
            signums = accelerator.gather(
                torch.tensor([interruption.signum or 0], device=accelerator.device)
            )
            interruption.signum = signums.max().item() or None
        return interruption.requested


def resume_exactly(
    trainer: GRPOTrainer, start: Start, recipe: Recipe, interruption: Interruption
) -> None:
    """Lets `trainer` save exact checkpoints, and continue from the checkpoint of `start` if any."""
    processes = trainer.accelerator.num_processes
    ExactResume(
        trainer,
        start.run_dir,
        {"recipe": recipe.saved()[0], "processes": processes},
        checkpoint=start.checkpoint,
        use_recipe_optimizer=start.use_recipe_optimizer,
        interruption=interruption,
    )


def _state_keys(callback: Any) -> tuple[str, ...]:
    """The key of a callback's state in resume_state_N.pt, then the keys of earlier versions."""
    key = getattr(callback, "state_key", type(callback).__name__)
    return (key, *getattr(callback, "earlier_state_keys", ()))


def _plain_values(value: Any) -> Any:
    """`value` made of the types that `torch.load(weights_only=True)` reads.

    Raises TypeError if a part of it is of another type.
    """
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {name: _plain_values(inner) for name, inner in value.items()}
    if isinstance(value, (list, tuple, deque)):
        return [_plain_values(inner) for inner in value]
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if hasattr(value, "item"):  # numpy's scalars
        return value.item()
    raise TypeError(f"a {type(value).__name__} cannot be saved in a checkpoint")


def _extend(logs: dict[str, Any], saved: dict[str, Any]) -> None:
    """Puts saved lists back into TRL's deques, which keep their maximal lengths."""
    for name, values in saved.items():
        if isinstance(values, dict):
            _extend(logs[name], values)
        else:
            logs[name].extend(values)
