"""Several processes with one trainer: whether they found each other, and what takes all of them
where FSDP or ZeRO-3 spreads the model.
"""

from typing import Any

from accelerate.utils import DistributedType
from transformers import Trainer

from gtpo.errors import RecipeError
from gtpo.system import processes


def is_spread(trainer: Trainer) -> bool:
    """Whether no process has the whole model."""
    state = trainer.accelerator.state
    if state.distributed_type == DistributedType.DEEPSPEED:
        return state.deepspeed_plugin.zero_stage == 3
    return state.distributed_type == DistributedType.FSDP


def check(trainer: Trainer, held_out: Any) -> None:
    """Raises RecipeError where processes do not know of each other, or one is to evaluate a model
    that it does not have.
    """
    # each would write as if it were the first
    if (found := trainer.accelerator.num_processes) != (started := processes.count()):
        raise RecipeError(
            "WORLD_SIZE",
            f"it is {started}, and accelerate found {found} process{'es' if found > 1 else ''};"
            " start with torchrun or accelerate launch, or unset WORLD_SIZE",
        )
    if held_out is not None and is_spread(trainer):
        raise RecipeError(
            "evaluation",
            "one process evaluates, and FSDP and ZeRO-3 spread the model over all; set"
            " evaluation.path and evaluation.split to null, and use evaluate_model.py when the run"
            " is finished",
        )


def whole_state(trainer: Trainer) -> dict[str, Any] | None:
    """The model's tensors put together, in the first process; None where each process has them. All
    processes have to call it.
    """
    return trainer.accelerator.get_state_dict(trainer.model_wrapped) if is_spread(trainer) else None
