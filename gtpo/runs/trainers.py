"""What a recipe names by dotted path, imported: the trainer and the rewards. Only after the
backend, which patches TRL.
"""

from typing import Any

from gtpo.errors import RecipeError
from gtpo.recipe import Recipe
from gtpo.recipe.dotted_paths import load_object
from gtpo.system import processes


def trainer_class(recipe: Recipe):
    """The trainer that the recipe names; raises RecipeError if it cannot be imported or is none."""
    import trl

    found = load("trainer.class_path", recipe.trainer.class_path)
    if not (isinstance(found, type) and issubclass(found, trl.GRPOTrainer)):
        raise RecipeError(
            "trainer.class_path",
            f"{recipe.trainer.class_path!r} is no subclass of trl.GRPOTrainer; use "
            "gtpo.gtpo_training.UnslothGTPOTrainer, or a subclass of it",
        )
    return found


def set_constants(recipe: Recipe, tokenizer) -> None:
    """Let GTPO's trainers have the constants that the recipe gives."""
    from gtpo.gtpo_training import override_constants

    constants = recipe.gtpo_runtime.model_dump()
    if constants["pad_id"] is None:
        constants["pad_id"] = tokenizer.pad_token_id
    override_constants(constants)


def made_trainer(made_by, model, tokenizer, rewards: list, arguments, problems):
    """A trainer of the class `made_by`; raises RecipeError with what TRL says of options that do
    not fit.
    """
    try:
        return made_by(
            model=model,
            reward_funcs=rewards,
            args=arguments,
            train_dataset=problems,
            processing_class=tokenizer,
        )
    # the last: no vLLM server
    except (ValueError, TypeError, ImportError, NotImplementedError, ConnectionError) as error:
        raise RecipeError("training", f"{' '.join(str(error).split())}") from error


def try_options(recipe: Recipe, arguments, tokenizer, problems) -> None:
    """Make the trainer of `recipe` with a model of no size, to hear what TRL says of its options as
    a whole; raises RecipeError.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=8,
            intermediate_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
        )
    )
    model = get_peft_model(
        model, LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    set_constants(recipe, tokenizer)
    rewards = [
        lambda completions, **kwargs: [0.0] * len(completions) for _ in recipe.trainer.reward_funcs
    ]
    made_trainer(trainer_class(recipe), model, tokenizer, rewards, arguments, problems)


def load(key: str, dotted: str):
    """The function or class at `dotted`; raises RecipeError, beginning with `key`, if it cannot be
    imported or called.
    """
    try:
        found = load_object(dotted)
    # somebody's code: whatever it raises, the recipe is where it was named
    except (Exception, SystemExit) as error:
        raise RecipeError(
            key, f"{dotted!r} cannot be imported ({type(error).__name__}: {error})"
        ) from error
    if not callable(found):
        raise RecipeError(
            key,
            f"{dotted!r} is {type(found).__name__}, which cannot be called; name a function or"
            " class",
        )
    return found


# ---- several processes with one trainer


def is_spread(trainer) -> bool:
    """Whether no process has the whole model."""
    from accelerate.utils import DistributedType

    state = trainer.accelerator.state
    if state.distributed_type == DistributedType.DEEPSPEED:
        return state.deepspeed_plugin.zero_stage == 3
    return state.distributed_type == DistributedType.FSDP


def check_processes(trainer, held_out: Any) -> None:
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


def whole_state(trainer) -> dict[str, Any] | None:
    """The model's tensors put together, in the first process; None where each process has them. All
    processes have to call it.
    """
    return trainer.accelerator.get_state_dict(trainer.model_wrapped) if is_spread(trainer) else None
