"""The recipe as a whole: the rules that span sections, where a run is kept, and what of a recipe
may be saved.
"""

import os
import re
from typing import Any

from pydantic import Field, model_validator

from gtpo.errors import RecipeError
from gtpo.recipe.sections import (
    AlarmSection,
    DatasetSection,
    DocumentedTraining,
    EnvMap,
    EvaluationSection,
    ModelSection,
    RewardsSection,
    RuntimeSection,
    Section,
    TrainerSection,
    TrainingSection,
    WandbSection,
    WatchSection,
)
from gtpo.system.safe_text import hide, is_secret
from gtpo.system.trl_options import REQUIRED_BY_GTPO

TWO_NAMES = (  # documented key, TRL's own name for it
    ("training.optimizer", "training.optim"),
    ("training.warmup_ratio", "training.warmup_steps"),
    ("model.random_seed", "training.seed"),
)
DERIVED = {  # TRL's options that a recipe decides elsewhere
    "max_completion_length": "it is model.max_seq_length - training.max_prompt_length; set those",
    "output_dir": "the run directory is named after the run; set output_root or run_name",
    "run_name": "set run_name at the top of the recipe",
    "trust_remote_code": "set model.trust_remote_code",
    "hub_token": "a recipe is no place for a token; set the environment variable HF_TOKEN",
    "resume_from_checkpoint": "give --resume, or --resume CHECKPOINT, on the command line",
    "restore_callback_states_from_checkpoint": "--resume restores them",
    "ignore_data_skip": "--resume goes on with the data that was not seen yet",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint as it is",
    "parallelism_config": "it is no plain value; use accelerate's configuration file",
}


class Recipe(Section):
    """A validated run description: schema defaults < YAML < command line."""

    run_name: str = Field("GTPO", min_length=1)
    """Name of the run; first part of its directory and the tracker's name."""
    output_root: str = "."
    """Where the run directory is made."""
    env: EnvMap = {}
    """Environment variables, set before torch is imported, for instance CUDA_VISIBLE_DEVICES."""
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
        """Longest prompt in tokens; by default half the sequence, within
        model.max_prompt_length.
        """
        default = min(self.model.max_seq_length // 2, self.model.max_prompt_length)
        return self.training.max_prompt_length or default

    @property
    def max_completion_length(self) -> int:
        return self.model.max_seq_length - self.max_prompt_length

    @property
    def seed(self) -> int:
        """The seed of every random generator: model.random_seed, or training.seed where that is
        given.
        """
        return self.training.trl_options().get("seed", self.model.random_seed)

    def output_dir(self) -> str:
        """The run directory: its name tells the settings that matter most apart."""
        t = self.training
        warmup = t.warmup_steps if "warmup_steps" in t.model_fields_set else t.warmup_ratio
        name = (
            f"{self.run_name}_adam1-{t.adam_beta1}_adam2-{t.adam_beta2}_wd-{t.weight_decay}_gen{t.num_generations}"
            f"_acc-{t.gradient_accumulation_steps}_wu{warmup}_len{self.model.max_seq_length}_lr{t.learning_rate}"
            f"_BetaKL{t.beta}"
        )
        return os.path.join(
            os.path.normpath(self.output_root), re.sub(r"[/\\\0-\x1f\x7f]", "-", name)
        )

    def saved(self) -> tuple[dict[str, Any], list[str]]:
        """The recipe as plain values that give the same recipe again, and the names of the secrets
        left out.
        """
        values = self.model_dump(mode="json")
        given = self.training.trl_options()
        for name in (
            values["training"].keys() - DocumentedTraining.model_fields.keys() - given.keys()
        ):
            del values["training"][name]
        if "warmup_steps" in given:
            del values["training"]["warmup_ratio"]
        if "optim" in given:
            del values["training"]["optimizer"]
        secrets = [name for name, value in self.env.items() if is_secret(name, value)]
        values["env"] = {name: value for name, value in self.env.items() if name not in secrets}
        hidden: list[str] = []
        return hide(values, hidden), secrets + hidden

    # ---- rules across keys and sections; each raises one sentence

    @model_validator(mode="after")
    def derived_options_are_not_given(self):
        for name in sorted(self.training.trl_options().keys() & DERIVED.keys()):
            raise RecipeError(f"training.{name}", f"it cannot be set here; {DERIVED[name]}")
        return self

    @model_validator(mode="after")
    def one_name_per_setting(self):
        for documented, trl_name in TWO_NAMES:
            if all(
                key in getattr(self, section).model_fields_set
                for section, key in (documented.split("."), trl_name.split("."))
            ):
                raise RecipeError(
                    documented,
                    f"given together with {trl_name}, which is the same setting; keep one",
                )
        return self

    @model_validator(mode="after")
    def prompts_fit_in_the_sequence(self):
        sequence, bound, prompt = (
            self.model.max_seq_length,
            self.model.max_prompt_length,
            self.max_prompt_length,
        )
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
        weights = self.training.reward_weights
        if weights is not None and len(weights) != len(self.trainer.reward_funcs):
            raise RecipeError(
                "training.reward_weights",
                f"{len(weights)} weights for {len(self.trainer.reward_funcs)} "
                "trainer.reward_funcs; give one for each",
            )
        return self

    @model_validator(mode="after")
    def the_entropy_mask_is_free_for_gtpo(self):
        if self.trainer.class_path.startswith(("gtpo.", "custom_trainer.released")):
            for name in sorted(self.training.trl_options().keys() & REQUIRED_BY_GTPO.keys()):
                if getattr(self.training, name) != REQUIRED_BY_GTPO[name]:
                    raise RecipeError(
                        f"training.{name}",
                        "it does not go with GTPO, which uses TRL's entropy mask for its own"
                        " factor; leave it out, or use custom_trainer.original.UnslothGRPOTrainer",
                    )
        return self

    @model_validator(mode="after")
    def a_vllm_server_is_asked_by_trl_alone(self):
        given = self.training.trl_options()
        if given.get("vllm_mode") != "server":
            return self
        if not given.get("use_vllm"):
            raise RecipeError(
                "training.vllm_mode",
                "a server is not asked without training.use_vllm; set that to true",
            )
        if self.model.backend != "transformers":
            raise RecipeError(
                "training.vllm_mode",
                f"server goes with model.backend transformers, not {self.model.backend}: Unsloth"
                " generates with a vLLM of its own in each process",
            )
        return self

    @model_validator(mode="after")
    def known_datasets_have_the_split(self):
        base = self.dataset.split.split("[")[0]
        if self.dataset.path is None and self.dataset.kind in ("gsm8k", "hendrycks_math"):
            for key, split in (
                ("dataset.split", base),
                ("evaluation.split", self.evaluation.split or "test"),
            ):
                if split.split("[")[0] not in ("train", "test"):
                    raise RecipeError(
                        key, f"{self.dataset.name} has no split {split!r}; it has train and test"
                    )
        return self
