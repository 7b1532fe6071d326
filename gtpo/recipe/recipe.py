"""The recipe as a whole: rules across sections, the run directory's name, and what may be saved."""

import json
import os
import re
from typing import Any

from pydantic import Field, model_validator

from gtpo.errors import RecipeError
from gtpo.recipe.sections import (
    AlarmSection,
    DatasetSection,
    DocumentedTraining,
    EvaluationSection,
    ModelSection,
    RewardsSection,
    RuntimeSection,
    Section,
    TrainerSection,
    TrainingSection,
    VariableName,
    VariableValue,
    WandbSection,
    WatchSection,
)
from gtpo.system.safe_text import hide, is_secret
from gtpo.system.trl_options import REQUIRED_BY_GTPO

# A key of GTPO's, and TRL's name for the same setting.
TWO_NAMES = (
    ("training.optimizer", "training.optim"),
    ("training.warmup_ratio", "training.warmup_steps"),
    ("model.random_seed", "training.seed"),
)
# TRL's options that follow from other keys, with what to do instead.
DERIVED = {
    "max_completion_length": (
        "it is model.max_seq_length - training.max_prompt_length; set those two"
    ),
    "output_dir": "the run directory is named after the run; set output_root or run_name",
    "run_name": "set run_name at the top of the recipe",
    "trust_remote_code": "set model.trust_remote_code",
    "hub_token": "a recipe must not contain a token; set the environment variable HF_TOKEN",
    "resume_from_checkpoint": "give --resume, or --resume CHECKPOINT, on the command line",
    "restore_callback_states_from_checkpoint": "--resume restores them",
    "ignore_data_skip": "--resume continues with the data that was not used yet",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint without it",
    "parallelism_config": "it is not a plain value; use accelerate's configuration file",
}


# Keys of training.generation_kwargs that end completions: by a text, and by the id of a token.
STOP_TEXTS = {"stop_strings", "stop"}
STOP_IDS = {"eos_token_id", "stop_token_ids"}


class Recipe(Section):
    """A validated description of a run, from the defaults, the YAML file and the command line."""

    run_name: str = Field("GTPO", min_length=1)
    """The name of the run. It begins the name of the run directory, and trackers show it."""
    output_root: str = "."
    """The folder in which the run directory is created."""
    env: dict[VariableName, VariableValue] = {}
    """Environment variables, for example CUDA_VISIBLE_DEVICES. They are set before torch is
    imported.
    """
    model: ModelSection
    dataset: DatasetSection
    training: TrainingSection = TrainingSection()
    trainer: TrainerSection = TrainerSection()
    rewards: RewardsSection = RewardsSection()
    gtpo_runtime: RuntimeSection = RuntimeSection()
    evaluation: EvaluationSection = EvaluationSection()
    watch: WatchSection = WatchSection()
    alarm: AlarmSection = AlarmSection()
    wandb: WandbSection = WandbSection()

    @property
    def max_prompt_length(self) -> int:
        """The maximum prompt length in tokens.

        By default it is half of model.max_seq_length, and at most model.max_prompt_length.
        """
        default = min(self.model.max_seq_length // 2, self.model.max_prompt_length)
        return self.training.max_prompt_length or default

    @property
    def max_completion_length(self) -> int:
        """The maximum completion length in tokens: what the prompt leaves of the sequence."""
        return self.model.max_seq_length - self.max_prompt_length

    @property
    def seed(self) -> int:
        """The seed of every random generator: training.seed if it is given, else
        model.random_seed.
        """
        return self.training.trl_options().get("seed", self.model.random_seed)

    def output_dir(self) -> str:
        """The path of the run directory, whose name contains the most important settings."""
        t = self.training
        warmup = t.warmup_steps if "warmup_steps" in t.model_fields_set else t.warmup_ratio
        name = (
            f"{self.run_name}_adam1-{t.adam_beta1}_adam2-{t.adam_beta2}_wd-{t.weight_decay}"
            f"_gen{t.num_generations}_acc-{t.gradient_accumulation_steps}_wu{warmup}"
            f"_len{self.model.max_seq_length}_lr{t.learning_rate}_BetaKL{t.beta}"
        )
        safe_name = re.sub(r"[/\\\0-\x1f\x7f]", "-", name)
        return os.path.join(os.path.normpath(self.output_root), safe_name)

    def saved(self) -> tuple[dict[str, Any], list[str]]:
        """Plain values that give the same recipe again, and the names of the secrets left out."""
        values = self.model_dump(mode="json")
        given = self.training.trl_options()
        training = values["training"]
        for name in training.keys() - DocumentedTraining.model_fields.keys() - given.keys():
            del training[name]
        if "warmup_steps" in given:
            del training["warmup_ratio"]
        if "optim" in given:
            del training["optimizer"]
        secrets = [name for name, value in self.env.items() if is_secret(name, value)]
        values["env"] = {name: value for name, value in self.env.items() if name not in secrets}
        values, hidden = hide(values)
        return values, secrets + hidden

    # ---- rules across keys and sections; each raises one RecipeError

    @model_validator(mode="after")
    def derived_options_are_not_given(self):
        """Refuse TRL's options that follow from other keys."""
        for name in sorted(self.training.trl_options().keys() & DERIVED.keys()):
            raise RecipeError(f"training.{name}", f"it cannot be set here; {DERIVED[name]}")
        return self

    @model_validator(mode="after")
    def one_name_per_setting(self):
        """Refuse a setting that is given under both of its names."""
        for documented, trl_name in TWO_NAMES:
            if self._is_given(documented) and self._is_given(trl_name):
                raise RecipeError(
                    documented,
                    f"given together with {trl_name}, which is the same setting; keep one",
                )
        return self

    def _is_given(self, dotted_key: str) -> bool:
        section, key = dotted_key.split(".")
        return key in getattr(self, section).model_fields_set

    @model_validator(mode="after")
    def prompts_fit_in_the_sequence(self):
        """Refuse prompt lengths that leave no token for a completion."""
        sequence = self.model.max_seq_length
        bound, prompt = self.model.max_prompt_length, self.max_prompt_length
        if bound > sequence:
            raise RecipeError(
                "model.max_prompt_length",
                f"{bound} is larger than model.max_seq_length ({sequence}); use at most {sequence}",
            )
        if prompt > bound:
            raise RecipeError(
                "training.max_prompt_length",
                f"{prompt} is larger than model.max_prompt_length ({bound}); use at most {bound}",
            )
        if self.max_completion_length < 1:
            raise RecipeError(
                "training.max_prompt_length",
                f"{prompt} leaves {self.max_completion_length} of "
                f"model.max_seq_length ({sequence}) for completions; use at most {sequence - 1}",
            )
        return self

    @model_validator(mode="after")
    def reward_weights_match_the_rewards(self):
        """Refuse a number of weights that is not the number of reward functions."""
        weights, functions = self.training.reward_weights, self.trainer.reward_funcs
        if weights is not None and len(weights) != len(functions):
            raise RecipeError(
                "training.reward_weights",
                f"{len(weights)} weights for {len(functions)} trainer.reward_funcs;"
                " give one for each",
            )
        return self

    @model_validator(mode="after")
    def gtpo_has_the_entropy_mask(self):
        """Refuse options that use the entropy mask of TRL, where the trainer is GTPO's."""
        if self.trainer.class_path.startswith(("gtpo.", "custom_trainer.released")):
            for name in sorted(self.training.trl_options().keys() & REQUIRED_BY_GTPO.keys()):
                if getattr(self.training, name) != REQUIRED_BY_GTPO[name]:
                    raise RecipeError(
                        f"training.{name}",
                        "it cannot be combined with GTPO, which uses TRL's entropy mask for its"
                        " own factor; leave it out, or use"
                        " custom_trainer.original.UnslothGRPOTrainer",
                    )
        return self

    @model_validator(mode="after")
    def a_vllm_server_needs_transformers(self):
        """Refuse a vLLM server that nothing would use."""
        given = self.training.trl_options()
        if given.get("vllm_mode") != "server":
            return self
        if not given.get("use_vllm"):
            raise RecipeError(
                "training.vllm_mode",
                "a server is not used without training.use_vllm; set that to true",
            )
        if self.model.backend != "transformers":
            raise RecipeError(
                "training.vllm_mode",
                "server needs model.backend transformers, not"
                f" {self.model.backend}: Unsloth generates with its own vLLM in each process",
            )
        return self

    @model_validator(mode="after")
    def completions_end_at_ids(self):
        """Refuse ends of completions that TRL cannot use: texts, and what is no id."""
        key, options = "training.generation_kwargs", self.training.trl_options()
        given = options.get("generation_kwargs")
        if isinstance(given, str):
            try:
                given = json.loads(given)
            except ValueError:
                return self  # TRL refuses it
        if not isinstance(given, dict):
            return self
        for name in STOP_TEXTS & given.keys():
            if given[name]:
                raise RecipeError(
                    key,
                    f"{name} does not work: TRL ends completions at ids of tokens alone; leave it"
                    " out, or give ids with eos_token_id",
                )
        for name in sorted(STOP_IDS & given.keys()):
            ids = given[name] if isinstance(given[name], list) else [given[name]]
            if given[name] is not None and not (ids and all(map(_is_token_id, ids))):
                raise RecipeError(
                    key, f"{name} {given[name]!r} names no tokens; use an id, or a list of ids"
                )
        return self

    @model_validator(mode="after")
    def known_datasets_have_the_split(self):
        """Refuse splits that GSM8K and Hendrycks MATH do not have on the hub."""
        if self.dataset.path is not None or self.dataset.kind not in ("gsm8k", "hendrycks_math"):
            return self
        splits = {
            "dataset.split": self.dataset.split,
            "evaluation.split": self.evaluation.split or "test",
        }
        for key, split in splits.items():
            name = split.partition("[")[0]  # without a slice such as [:100]
            if name not in ("train", "test"):
                raise RecipeError(
                    key, f"{self.dataset.name} has no split {name!r}; it has train and test"
                )
        return self


def _is_token_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
