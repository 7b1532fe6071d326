"""The sections of a recipe: every key with its type, default, bounds and one sentence. Nothing
heavy is imported here.

The string under a field is its help. `training` also accepts every option of the installed
`trl.GRPOConfig`.
"""

import logging
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    create_model,
    field_validator,
    model_validator,
)

from gtpo.errors import RecipeError
from gtpo.system.trl_options import grpo_options

logger = logging.getLogger(__name__)

DATASET_ALIASES = {
    "gsm8k": "gsm8k",
    "openai/gsm8k": "gsm8k",
    "hendrycks_math": "hendrycks_math",
    "math": "hendrycks_math",
    "EleutherAI/hendrycks_math": "hendrycks_math",
}
SYSTEM_INSTRUCTION = (
    "You are a helpful assistant for solving math problems. Given a question, first think step by"
    " step between <reasoning> and </reasoning>. Then, give the final answer between <answer> and"
    " </answer>."
)


DOTTED_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*[.:][A-Za-z_]\w*")


def as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _first_number(value: Any) -> Any:
    """`8/12` means 8, with a warning."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*(/\s*\d+\s*)+", value):
        first = value.split("/")[0].strip()
        logger.warning(
            "training.num_generations: %r names several numbers; the first, %s, is used",
            value,
            first,
        )
        return first
    return value


def _two_or_more(value: int) -> int:
    if value < 2:
        raise ValueError(f"{value} leaves no group to compare; use 2 or more")
    return value


def _dotted(value: str) -> str:
    if not DOTTED_PATH.fullmatch(value):
        raise ValueError(
            f"{value!r} is no dotted path; use one such as package.module.name or"
            " package.module:name"
        )
    return value


def _variable(name: str) -> str:
    if not name or "=" in name or "\0" in name:
        raise ValueError(
            f"{name!r} cannot be the name of an environment variable; use one such as"
            " CUDA_VISIBLE_DEVICES"
        )
    return name


def _without_nul(value: str) -> str:
    if "\0" in value:
        raise ValueError(
            "the value of an environment variable cannot contain a NUL character; leave it out"
        )
    return value


Texts = Annotated[list[str], BeforeValidator(as_list)]
DottedPath = Annotated[str, AfterValidator(_dotted)]
Generations = Annotated[int, BeforeValidator(_first_number), AfterValidator(_two_or_more)]
Trackers = Literal[
    "none", "wandb", "tensorboard", "trackio", "mlflow", "comet_ml", "swanlab", "clearml", "neptune"
]
EnvMap = dict[
    Annotated[str, AfterValidator(_variable)],
    Annotated[
        str,
        BeforeValidator(lambda value: str(value).lower() if isinstance(value, bool) else value),
        AfterValidator(_without_nul),
    ],
]
# Named here, because linters read a text inside an annotation as the name of a class.
Scheduler = grpo_options()["lr_scheduler_type"].type
Optimizer = grpo_options()["optim"].type


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        use_attribute_docstrings=True,
        coerce_numbers_to_str=True,
        protected_namespaces=(),
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and "bool" not in str(
            cls.model_fields[info.field_name].annotation
        ):
            raise ValueError(f"{str(value).lower()} is no value for this key")
        return value


class ModelSection(Section):
    model_name: str
    """Base model: a hub name, or a local folder."""
    adapter: str | None = None
    """Earlier run, checkpoint or adapter folder whose LoRA weights are trained on, as a new run;
    null for fresh ones.
    """
    backend: Literal["auto", "unsloth", "transformers"] = "auto"
    """What loads the model: auto is Unsloth where CUDA and the package are present, else
    transformers + peft.
    """
    max_seq_length: int = Field(5500, ge=2)
    """Prompt and completion together, in tokens."""
    max_prompt_length: int = Field(default_factory=lambda data: data["max_seq_length"], ge=1)
    """An upper bound on training.max_prompt_length, in tokens; it filters nothing."""
    lora_rank: int = Field(128, ge=1)
    """Rank of the LoRA adapter."""
    lora_alpha: int | float = Field(default_factory=lambda data: data["lora_rank"], gt=0)
    """LoRA scaling; the default is the rank."""
    target_modules: Texts = [
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    ]
    """Layers that get LoRA weights."""
    load_in_4bit: bool = True
    """Load the base model in 4 bits (bitsandbytes; needs a GPU)."""
    fast_inference: Literal["auto"] | bool = "auto"
    """Generate with vLLM (Unsloth only): auto is yes where vLLM is installed."""
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """Share of GPU memory given to vLLM."""
    random_seed: int = Field(3407, ge=0, lt=2**32)
    """Seed of every random generator: adapter, data order, sampling."""
    chat_template: str | None = None
    """Jinja chat template, text or file, for base models that have none."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""


class DatasetSection(Section):
    name: str | None = None
    """gsm8k, hendrycks_math (alias math), or a dotted path to a function that returns rows; may be
    left out with path.
    """
    path: str | None = None
    """A local jsonl, json or parquet file, or a folder in the hub's layout, instead of the hub."""
    subset: str | None = None
    """One configuration of the dataset (GSM8K: main)."""
    subsets: Texts | None = None
    """Hendrycks MATH: which of its subsets; all seven by default."""
    split: str = "train"
    """Which split to train on; slices such as train[:100] work."""
    system_instruction: str | None = SYSTEM_INSTRUCTION
    """System message of every prompt; null for none."""
    question_column: str | None = None
    """Column that holds the question; by default the dataset's own (question, or problem for
    MATH).
    """
    answer_column: str | None = None
    """Column that holds the answer; by default the dataset's own (answer, or solution for MATH)."""

    @property
    def kind(self) -> str:
        """Which of gtpo.data's sources: gsm8k, hendrycks_math, function (a dotted path) or file."""
        return DATASET_ALIASES.get(self.name, "function") if self.name else "file"

    @model_validator(mode="after")
    def names_a_dataset(self):
        if self.name is None and self.path is None:
            raise RecipeError(
                "dataset",
                "nothing to train on; set dataset.name (gsm8k, hendrycks_math, my_module.load) or"
                " dataset.path",
            )
        if self.kind == "function" and not DOTTED_PATH.fullmatch(self.name):
            raise RecipeError(
                "dataset.name",
                f"{self.name!r} is not known; use gsm8k, hendrycks_math, or a dotted path "
                "such as my_data.load",
            )
        return self


class DocumentedTraining(Section):
    max_prompt_length: int | None = Field(None, ge=1)
    """Longer prompts (tokens after the chat template) are dropped; half of model.max_seq_length by
    default.
    """
    learning_rate: float = Field(1e-6, gt=0)
    """Peak learning rate."""
    warmup_ratio: float = Field(0.005, ge=0, lt=1)
    """Share of the steps in which the learning rate rises."""
    lr_scheduler_type: Scheduler = "cosine"
    """How the learning rate falls after the warm-up."""
    optimizer: Optimizer = "paged_adamw_8bit"
    """Optimizer; the 8-bit and paged ones need a GPU."""
    adam_beta1: float = Field(0.999999, ge=0, lt=1)
    """Adam's decay of the gradient mean."""
    adam_beta2: float = Field(0.999999, ge=0, lt=1)
    """Adam's decay of the squared gradient."""
    weight_decay: float = Field(0.1, ge=0)
    """Decoupled weight decay."""
    max_grad_norm: float = Field(0.1, ge=0)
    """Gradients are clipped to this norm; 0 for no clipping."""
    max_skipped_steps: int | None = Field(20, ge=0)
    """Steps in a row that may be skipped because loss or gradients are not finite; then the run
    stops, saved. null for no limit.
    """
    num_generations: Generations = 8
    """Completions per prompt, the group size G."""
    per_device_train_batch_size: int = Field(1, ge=1)
    """Completions per device and micro-batch; raised (and said) where groups would not fit."""
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Micro-batches per optimizer step."""
    num_train_epochs: int | float = Field(1, gt=0)
    """Passes over the problems; training.max_steps, if set, wins."""
    num_iterations: int = Field(1, ge=1)
    """Optimizer passes over each rollout (TRL's)."""
    logging_steps: int | float = Field(1, gt=0)
    """Steps between two log lines."""
    save_steps: int | float = Field(500, gt=0)
    """Steps between two checkpoints."""
    report_to: Annotated[list[Trackers], BeforeValidator(as_list)] = ["wandb"]
    """Trackers: wandb, tensorboard, trackio or none."""
    beta: float = Field(0.0, ge=0)
    """Weight of a KL penalty. GTPO has none, so that no reference model is needed."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"] = (
        "grpo"
    )
    """How token losses are averaged; grpo is the paper's 1/G and 1/|o_i| (TRL's own default is
    dapo).
    """
    scale_rewards: Literal["none", "group", "batch"] | bool = "none"
    """Division of advantages by a standard deviation; the paper divides by none (TRL's own default
    is group).
    """

    @model_validator(mode="after")
    def counts_are_counts(self):
        least = {
            "temperature": 1e-6,
            "steps_per_generation": 1,
            "generation_batch_size": 1,
            "warmup_steps": 0,
            "save_total_limit": 1,
            "seed": 0,
        }
        for name, bound in least.items():
            if (value := self.trl_options().get(name)) is not None and value < bound:
                raise RecipeError(f"training.{name}", f"{value} is too small; use {bound} or more")
        if (seed := self.trl_options().get("seed") or 0) >= 2**32:
            raise RecipeError("training.seed", f"{seed} is too large; use less than 2**32")
        if (steps := self.trl_options().get("max_steps", -1)) != -1 and not 1 <= steps < 2**31:
            raise RecipeError(
                "training.max_steps",
                f"{steps} is no number of steps; use 1 or more, or -1 for whole epochs",
            )
        return self

    def trl_options(self) -> dict[str, Any]:
        """The given options that only TRL knows, by TRL's names."""
        return {
            name: getattr(self, name)
            for name in self.model_fields_set - DocumentedTraining.model_fields.keys()
        }


TrainingSection = create_model(
    "TrainingSection",
    __base__=DocumentedTraining,
    **{
        name: (option.type, Field(default=None, description=option.help))
        for name, option in grpo_options().items()
        if name not in DocumentedTraining.model_fields
    },
)


class TrainerSection(Section):
    class_path: DottedPath = "gtpo.gtpo_training.UnslothGTPOTrainer"
    """The trainer, by dotted path."""
    reward_funcs: Annotated[list[DottedPath], BeforeValidator(as_list), Field(min_length=1)] = [
        "reward_math.final_reward"
    ]
    """Reward functions, by dotted path; weights: training.reward_weights."""


class RewardsSection(Section):
    isolated: bool = True
    """Call reward functions in processes of their own, which can be killed; false: in ours, without
    limits of time and memory.
    """
    seconds: float = Field(30.0, gt=0)
    """Time limit for one completion; longer, and it counts as one that the function cannot
    judge.
    """
    memory: float | None = Field(4.0, gt=0)
    """Memory limit of each process, in GiB; null for none."""
    workers: int = Field(1, ge=1)
    """Processes that judge at the same time: functions beside each other, and the parts that `per`
    makes.
    """
    per: Literal["rollout", "group", "completion"] = "rollout"
    """What one call judges; group or completion shares a rollout among the workers. A function that
    compares needs its group.
    """
    max_failures: float = Field(0.2, ge=0, le=1)
    """Share of the last 100 completions that a function may fail on, beyond which the run stops,
    saved; 1 for never.
    """

    @model_validator(mode="after")
    def workers_are_processes(self):
        if self.workers > 1 and not self.isolated:
            raise RecipeError(
                "rewards.workers",
                f"{self.workers} workers are processes of their own; leave rewards.isolated at"
                " true",
            )
        return self


class RuntimeSection(Section):
    ent_threshold: float = Field(0.7, ge=0)
    """The entropy filter's threshold in nats (the paper's ln 2)."""
    ent_scale: float = Field(0.1, ge=0)
    """gamma, the weight of the entropy penalty."""
    w_raw: float = Field(2.0, ge=0)
    """lambda on the conflict tokens of completions with a positive advantage."""
    pad_id: int | None = None
    """Padding id; null for the tokenizer's. It changes no weight: the completion mask decides."""
    eps: float = Field(1e-6, gt=0)
    """The released code's log guard; only custom_trainer.released knows it."""
    torch_compile_options: dict[str, bool | int | float | str] = {}
    """Options of torch.compile on CUDA, laid over the trainer's own."""


class EvaluationSection(Section):
    path: str | None = None
    """Held-out problems, like dataset.path; evaluated before and after training."""
    split: str | None = None
    """Held-out split of the training dataset, for instance test."""
    limit: int = Field(200, ge=1)
    """How many held-out problems, from the first."""
    batch_size: int = Field(32, ge=1)
    """Completions generated at a time."""
    every: int | None = Field(None, ge=1)
    """Steps between two evaluations while training; null for none."""
    samples: int = Field(1, ge=1)
    """Completions per problem."""
    temperature: float = Field(0.0, ge=0)
    """Sampling temperature; 0 is greedy."""

    @model_validator(mode="after")
    def samples_differ_and_problems_are_named(self):
        if self.samples > 1 and self.temperature == 0:
            raise RecipeError(
                "evaluation.temperature",
                f"0 is greedy, so all {self.samples} samples would be the same; use 1.0, or 1"
                " sample",
            )
        if self.every and self.path is None and self.split is None:
            raise RecipeError(
                "evaluation.every",
                "there are no held-out problems; set evaluation.path or evaluation.split",
            )
        return self


class WatchSection(Section):
    completions: bool = True
    """Keep every training completion in the run directory's completions.jsonl."""
    tokens_every: int = Field(1, ge=1)
    """Steps between two whose completions keep their per-token lists (ids, texts, weights,
    entropies; 25 bytes a token).
    """
    show_every: int | None = Field(50, ge=1)
    """Steps between two that show a good and a bad completion on the console, from the first step
    on; null for none.
    """


class AlarmSection(Section):
    action: Literal["none", "warn", "save", "stop"] = "warn"
    """What an alarm does: warn, also save a checkpoint, or save and stop the run (exit code 3)."""
    window: int = Field(20, ge=1)
    """Log lines over which metrics are averaged; an alarm needs as many."""
    entropy_above: Literal["auto"] | Annotated[float, Field(ge=0)] | None = "auto"
    """Alarm when the mean entropy (nats) is above this; auto is gtpo_runtime.ent_threshold. null
    switches an alarm off.
    """
    entropy_rising: float | None = Field(0.2, ge=0)
    """Alarm when the mean entropy rises by more than this (nats) from one window to the next."""
    entropy_low: float | None = Field(0.1, ge=0, le=1)
    """Alarm when the mean entropy is below this share of the initial one: the policy is nearly
    deterministic.
    """
    all_filtered: float | None = Field(0.99, ge=0, le=1)
    """Alarm when GTPO's entropy filter switches off at least this share of the completions."""
    format_falling: float | None = Field(0.25, ge=0, le=1)
    """Alarm when the format rate is further than this below its best."""
    no_signal: float | None = Field(0.95, ge=0, le=1)
    """Alarm when the rewards are equal in at least this share of the groups."""
    truncated: float | None = Field(0.5, ge=0, le=1)
    """Alarm when at least this share of the completions is cut off."""
    non_finite: int | None = Field(3, ge=1)
    """Alarm when this many steps within a window have a loss or gradients that are not finite."""

    def limits(self, ent_threshold: float) -> dict[str, float | None]:
        """The threshold of each condition, None for those switched off; `ent_threshold` is what
        auto means.
        """
        limits = self.model_dump(exclude={"action", "window"})
        return {name: ent_threshold if limit == "auto" else limit for name, limit in limits.items()}


class WandbSection(Section):
    project: str = "gtpo"
    """Weights & Biases project."""
    entity: str | None = None
    """Weights & Biases user or team; null for your default."""
