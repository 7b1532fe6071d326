"""Steps with a non-finite loss or gradient are skipped, and too many of them end the run."""

import itertools
import logging

import gradients
import pytest
import torch
from transformers import TrainerCallback

from gtpo.hooks.nonfinite import SkipNonFiniteSteps, skip_non_finite

pytestmark = pytest.mark.slow  # trains

TRAINERS = ["gtpo.gtpo_training.UnslothGTPOTrainer", "custom_trainer.original.UnslothGRPOTrainer"]


class Poison:
    """Changes the losses of some steps; keeps the weights after each step."""

    def __init__(self, trainer, steps, change):
        self.trainer = trainer
        self.after = [self.weights()]
        parent = type(trainer).compute_loss

        def changed(model, inputs, *args, **kwargs):  # inside what SkipNonFiniteSteps wraps
            loss = parent(trainer, model, inputs, *args, **kwargs)
            in_step = trainer.model.training and trainer.state.global_step + 1 in steps
            return change(loss) if in_step else loss

        trainer.compute_loss = changed
        poison = self

        class KeepWeights(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                poison.after.append(poison.weights())

        trainer.add_callback(KeepWeights())

    def weights(self) -> torch.Tensor:
        trained = [p for p in self.trainer.model.parameters() if p.requires_grad]
        return torch.cat([p.detach().flatten().clone() for p in trained])


def poisoned(folder, class_path, steps, change, limit=None, **options):
    """A trainer whose losses in `steps` are changed, with its poison, its guard and its record."""
    trainer = gradients.make_trainer(
        class_path,
        str(folder),
        **{"optim": "adamw_torch", "weight_decay": 0.1, "max_steps": 3, **options},
    )
    # GTPO's trainer has a guard already. A new one is attached outside the poison.
    for callback in list(trainer.callback_handler.callbacks):
        if isinstance(callback, SkipNonFiniteSteps):
            trainer.remove_callback(callback)
            trainer.non_finite = None
    poison = Poison(trainer, steps, change)
    return trainer, poison, skip_non_finite(trainer, limit), gradients.record_steps(trainer)


@pytest.mark.parametrize("class_path", TRAINERS)
@pytest.mark.parametrize(
    "change",
    [lambda loss: loss * float("nan"), lambda loss: loss + torch.inf],
    ids=["gradients", "loss alone"],
)
def test_the_step_is_skipped_counted_and_logged_and_training_goes_on(
    tmp_path, caplog, class_path, change
):
    trainer, poison, skipping, seen = poisoned(tmp_path, class_path, {2}, change)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    changed = [not torch.equal(before, after) for before, after in itertools.pairwise(poison.after)]
    assert changed == [True, False, True]  # no update, no decay, no momentum
    assert [logs["gtpo/skipped_steps"] for logs in seen["logs"][:3]] == [0, 1, 1]
    assert skipping.skipped == 1
    assert "Step 2 skipped" in caplog.text and skipping.stopped_by is None


def test_gtpos_trainer_has_a_guard_of_its_own_and_gets_no_second_one(tmp_path):
    trainer = gradients.make_trainer(TRAINERS[0], str(tmp_path), optim="adamw_torch")
    assert skip_non_finite(trainer, 5) is trainer.non_finite and trainer.non_finite.limit == 5
    assert sum(isinstance(c, SkipNonFiniteSteps) for c in trainer.callback_handler.callbacks) == 1
    parent = trainer._parent_loss
    trainer._parent_loss = lambda *args: (
        parent(*args) * (float("nan") if torch.is_grad_enabled() else 1.0)
    )
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    trainer.train()
    assert trainer.non_finite.skipped == 1
    assert all(torch.equal(p, before[n]) for n, p in trainer.model.named_parameters())


@pytest.mark.parametrize("class_path", TRAINERS)
def test_past_the_limit_in_a_row_the_run_stops_with_a_checkpoint_of_the_last_good_state(
    tmp_path, class_path
):
    trainer, poison, skipping, seen = poisoned(
        tmp_path,
        class_path,
        {2, 4, 5, 6, 7},
        lambda loss: loss * float("nan"),
        limit=2,
        max_steps=9,
    )
    trainer.train()
    assert trainer.state.global_step == 6
    assert skipping.stopped_by.startswith(
        "Step 6: 3 steps in a row, more than training.max_skipped_steps (2)"
    )
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-6/adapter_model.safetensors")
    saved_weights = torch.cat([tensor.flatten() for tensor in saved.values()])
    assert poison.after[3].isfinite().all()
    assert torch.equal(saved_weights.sort().values, poison.after[3].sort().values)
    assert trainer.state.log_history[5]["gtpo/skipped_steps"] == 4


def test_weights_that_are_not_finite_are_never_saved_and_stop_the_run(tmp_path):
    trainer, poison, skipping, seen = poisoned(
        tmp_path, TRAINERS[1], set(), None, max_steps=9, save_strategy="steps", save_steps=1
    )

    class Overflow(TrainerCallback):  # as with too large a learning rate
        def on_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step == 1:
                next(p for p in trainer.model.parameters() if p.requires_grad).data.fill_(torch.inf)

    trainer.add_callback(Overflow())
    trainer.train()
    assert skipping.poisoned and skipping.stopped_by.startswith(
        "Step 2: the weights are not finite any more and are not saved"
    )
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]


def test_the_count_survives_a_checkpoint_and_the_count_in_a_row_starts_again(tmp_path):
    trainer, _, skipping, _ = poisoned(
        tmp_path, TRAINERS[1], {1, 2}, lambda loss: loss * float("nan"), limit=1
    )
    trainer.train()
    resumed, _, again, _ = poisoned(tmp_path, TRAINERS[1], set(), None)
    again.restore(skipping.resume_state())
    assert skipping.stopped_by and (again.skipped, again.in_a_row) == (2, 0)
