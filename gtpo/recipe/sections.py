"""The sections of a recipe: every key with its type, default, bounds and description.

The string under a field is its help text. The section `training` also accepts every option of the
installed `trl.GRPOConfig`. This file imports neither torch nor TRL.
"""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
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

# Arguments of apply_chat_template that trl 1.13.0 and GTPO give themselves.
OPTIONS_OF_PROMPTS = {
    *("conversation", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
    *("return_assistant_tokens_mask", "tokenizer_kwargs"),
}

# ---- types of values


HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name
DOTTED_PATH = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*[.:][A-Za-z_]\w*")


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _first_number(value: Any) -> Any:
    """The 8 of `8/12`, with a warning; any other value as it is."""
    if isinstance(value, str) and re.fullmatch(r"\s*\d+\s*(/\s*\d+\s*)+", value):
        first = value.split("/")[0].strip()
        logger.warning(
            "training.num_generations: %r names several numbers; the first, %s, is used",
            value,
            first,
        )
        return first
    return value


def _check_group_size(value: int) -> int:
    if value < 2:
        raise ValueError(f"{value} leaves no group to compare; use 2 or more")
    return value


def _check_dotted_path(value: str) -> str:
    if not DOTTED_PATH.fullmatch(value):
        raise ValueError(
            f"{value!r} is not a dotted path; use one such as package.module.name or"
            " package.module:name"
        )
    return value


def _check_variable_name(name: str) -> str:
    if not name or "=" in name or "\0" in name:
        raise ValueError(
            f"{name!r} cannot be the name of an environment variable; use one such as"
            " CUDA_VISIBLE_DEVICES"
        )
    return name


def _check_variable_value(value: str) -> str:
    if "\0" in value:
        raise ValueError(
            "the value of an environment variable cannot contain a NUL character; leave it out"
        )
    return value


def check_template_options(options: Any) -> None:
    """Raises RecipeError if `training.chat_template_kwargs` is no mapping, or sets what we set."""
    key = "training.chat_template_kwargs"
    if options is not None and not isinstance(options, dict):
        raise RecipeError(
            key, f"{options!r} is not a mapping; write one such as {{enable_thinking: false}}"
        )
    if taken := sorted(OPTIONS_OF_PROMPTS & (options or {}).keys()):
        raise RecipeError(
            key,
            f"{', '.join(taken)} cannot be set, because every prompt is made with its own value;"
            " leave it out",
        )


def _boolean_as_text(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value


TextList = Annotated[list[str], BeforeValidator(_as_list)]
DottedPath = Annotated[str, AfterValidator(_check_dotted_path)]
GroupSize = Annotated[int, BeforeValidator(_first_number), AfterValidator(_check_group_size)]
Tracker = Literal[
    "none", "wandb", "tensorboard", "trackio", "mlflow", "comet_ml", "swanlab", "clearml", "neptune"
]
VariableName = Annotated[str, AfterValidator(_check_variable_name)]
VariableValue = Annotated[
    str, BeforeValidator(_boolean_as_text), AfterValidator(_check_variable_value)
]
# These types have names because linters read a string inside an annotation as a class name.
Scheduler = grpo_options()["lr_scheduler_type"].type
Optimizer = grpo_options()["optim"].type


@dataclass(frozen=True)
class SameAs:
    """A default that is the value of another key of the same section."""

    key: str

    def __call__(self, section: Mapping[str, Any]) -> Any:
        return section[self.key]


# ---- sections


class Section(BaseModel):
    """A mapping whose keys are all known; values are converted where that loses nothing."""

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
    def booleans_are_not_numbers(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true and false where pydantic would read them as 1 and 0."""
        annotation = str(cls.model_fields[info.field_name].annotation)
        if isinstance(value, bool) and "bool" not in annotation:
            raise ValueError(f"{str(value).lower()} is not a valid value for this key")
        return value


class ModelSection(Section):
    """The base model, its LoRA adapter and its lengths."""

    model_name: str
    """The base model: a name on the hub, or a local folder."""
    adapter: str | None = None
    """An earlier run, checkpoint or adapter folder. The new run trains its LoRA weights further.
    null starts from new LoRA weights.
    """
    backend: Literal["auto", "unsloth", "transformers"] = "auto"
    """The library that loads the model. auto uses Unsloth if it is installed and there is a CUDA
    GPU, and transformers with peft otherwise.
    """
    max_seq_length: int = Field(5500, ge=2)
    """The maximum length of prompt and completion together, in tokens."""
    max_prompt_length: int = Field(default_factory=SameAs("max_seq_length"), ge=1)
    """An upper bound on training.max_prompt_length, in tokens. It drops no prompts by itself."""
    lora_rank: int = Field(128, ge=1)
    """The rank of the LoRA adapter."""
    lora_alpha: int | float = Field(default_factory=SameAs("lora_rank"), gt=0)
    """The scaling factor alpha of the LoRA adapter."""
    target_modules: TextList = [
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    ]
    """The layers that get LoRA weights, by the last part of their names, or all-linear."""
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    """The dropout before the LoRA weights, while training."""
    use_rslora: bool = False
    """Scale the adapter by alpha / sqrt(rank) instead of alpha / rank (rank-stabilised LoRA)."""
    use_dora: bool = False
    """Train the magnitudes of the weights too (weight-decomposed LoRA, DoRA)."""
    init_lora_weights: bool | Literal["gaussian"] = True
    """How new LoRA weights begin. true and gaussian begin as the base model. false does not."""
    modules_to_save: TextList | None = None
    """Layers to train whole and to save with the adapter, for example lm_head."""
    load_in_4bit: bool = True
    """Load the base model in 4 bits with bitsandbytes. This needs a GPU."""
    fast_inference: Literal["auto"] | bool = "auto"
    """Generate completions with vLLM inside Unsloth. auto does so if vLLM is installed."""
    gpu_memory_utilization: float = Field(0.4, gt=0, le=1)
    """The share of the GPU memory that vLLM may use."""
    random_seed: int = Field(3407, ge=0, lt=2**32)
    """The seed of every random generator: new LoRA weights, data order and sampling."""
    chat_template: str | None = None
    """A chat template in Jinja, or a file with one, for base models that have none."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Leave it off unless you trust its author."""


class DatasetSection(Section):
    """The problems to train on, and how a row becomes a prompt."""

    name: str | None = None
    """gsm8k, hendrycks_math (or math), a dataset of the hub as owner/name, or the dotted path of a
    function that returns rows. Not needed with dataset.path.
    """
    path: str | None = None
    """A local jsonl, json, csv, tsv or parquet file (also .gz), or a folder in the hub's layout. It
    is read instead of the dataset on the hub.
    """
    subset: str | None = None
    """One configuration of the dataset, for example main for GSM8K."""
    subsets: TextList | None = None
    """Several configurations, put together. null uses all seven of Hendrycks MATH."""
    split: str = "train"
    """The split to train on. Slices such as train[:100] work."""
    system_instruction: str | None = SYSTEM_INSTRUCTION
    """The system message of every prompt. null leaves it out."""
    system_role: Literal["system", "user"] = "system"
    """Where a system message stands. user puts its text at the start of the user's message, for
    chat templates without a role for it.
    """
    question_column: str | None = None
    """The column with the question: texts, or lists of messages. A dotted name such as a.b is the
    entry b of the column a. null uses the dataset's own: question, or problem for MATH.
    """
    answer_column: str | None = None
    """The column with the answer. It may be dotted, too. null uses the dataset's own: answer, or
    solution for MATH. Without such a column, it is the last message of a conversation.
    """

    @property
    def kind(self) -> str:
        """How the rows are read: gsm8k, hendrycks_math, hub (any other dataset there), function (a
        dotted path) or file.
        """
        if self.name is None:
            return "file"
        default = "hub" if HUB_NAME.fullmatch(self.name) else "function"
        return DATASET_ALIASES.get(self.name, default)

    @model_validator(mode="after")
    def dataset_is_named(self):
        """Refuse a section without a dataset, and a name that cannot be one."""
        if self.name is None and self.path is None:
            raise RecipeError(
                "dataset",
                "there is no dataset to train on; set dataset.name (gsm8k, hendrycks_math,"
                " owner/name, my_module.load) or dataset.path",
            )
        if self.kind == "function" and not DOTTED_PATH.fullmatch(self.name):
            raise RecipeError(
                "dataset.name",
                f"{self.name!r} is not known; use gsm8k, hendrycks_math, a dataset of the hub as"
                " owner/name, or a dotted path such as my_data.load",
            )
        return self


class DocumentedTraining(Section):
    """The keys of `training` that GTPO describes itself, with GTPO's defaults."""

    max_prompt_length: int | None = Field(None, ge=1)
    """The maximum prompt length in tokens, after the chat template. Problems with longer prompts
    are dropped. null is half of model.max_seq_length, and at most model.max_prompt_length.
    """
    learning_rate: float = Field(1e-6, gt=0)
    """The highest learning rate, reached at the end of the warm-up."""
    warmup_ratio: float = Field(0.005, ge=0, lt=1)
    """The share of the steps during which the learning rate rises from 0."""
    lr_scheduler_type: Scheduler = "cosine"
    """The shape of the learning rate's decay after the warm-up."""
    optimizer: Optimizer = "paged_adamw_8bit"
    """The optimizer. Those with 4bit, 8bit, 32bit, bnb or paged in their names need a GPU."""
    adam_beta1: float = Field(0.999999, ge=0, lt=1)
    """Adam's decay rate for the running mean of the gradient."""
    adam_beta2: float = Field(0.999999, ge=0, lt=1)
    """Adam's decay rate for the running mean of the squared gradient."""
    weight_decay: float = Field(0.1, ge=0)
    """The weight decay, decoupled from the gradient as in AdamW."""
    max_grad_norm: float = Field(0.1, ge=0)
    """The norm to which gradients are clipped. 0 turns clipping off."""
    max_skipped_steps: int | None = Field(20, ge=0)
    """How many steps in a row may be skipped because the loss or a gradient is not finite. Then the
    run saves a checkpoint and stops. null sets no limit.
    """
    num_generations: GroupSize = 8
    """The number of completions per prompt: the group size G."""
    per_device_train_batch_size: int = Field(1, ge=1)
    """Completions per device and micro-batch. It is raised, with a warning, until whole groups fit
    into a batch.
    """
    gradient_accumulation_steps: int = Field(1, ge=1)
    """Micro-batches per optimizer step."""
    num_train_epochs: int | float = Field(1, gt=0)
    """Passes over the problems. training.max_steps takes precedence if it is set."""
    num_iterations: int = Field(1, ge=1)
    """Optimization passes over each rollout."""
    logging_steps: int | float = Field(1, gt=0)
    """Steps between two log lines. A number below 1 is a share of the run."""
    save_steps: int | float = Field(500, gt=0)
    """Steps between two checkpoints. A number below 1 is a share of the run."""
    report_to: Annotated[list[Tracker], BeforeValidator(_as_list)] = ["wandb"]
    """The experiment trackers. Without a login, wandb stays offline."""
    beta: float = Field(0.0, ge=0)
    """The weight of a KL penalty. GTPO uses none, so no reference model is loaded."""
    loss_type: Literal["grpo", "bnpo", "dr_grpo", "dapo", "luspo", "cispo", "sapo", "vespo"] = (
        "grpo"
    )
    """How token losses are averaged. grpo is the paper's: the mean over a completion's tokens, then
    over completions. TRL's own default is dapo.
    """
    scale_rewards: Literal["none", "group", "batch"] | bool = "none"
    """Whether advantages are divided by the rewards' standard deviation. The paper does not divide.
    TRL's own default is group.
    """

    @model_validator(mode="after")
    def trl_options_are_in_range(self):
        """Refuse values of TRL's options that TRL itself would accept, or refuse only later."""
        lower_bounds = {
            "temperature": 1e-6,
            "steps_per_generation": 1,
            "generation_batch_size": 1,
            "warmup_steps": 0,
            "save_total_limit": 1,
            "seed": 0,
        }
        given = self.trl_options()
        for name, bound in lower_bounds.items():
            if (value := given.get(name)) is not None and value < bound:
                raise RecipeError(f"training.{name}", f"{value} is too small; use {bound} or more")
        check_template_options(given.get("chat_template_kwargs"))
        if (seed := given.get("seed") or 0) >= 2**32:
            raise RecipeError("training.seed", f"{seed} is too large; use less than 2**32")
        if (steps := given.get("max_steps", -1)) != -1 and not 1 <= steps < 2**31:
            raise RecipeError(
                "training.max_steps",
                f"{steps} is not a number of steps; use 1 or more, or -1 for whole epochs",
            )
        return self

    def trl_options(self) -> dict[str, Any]:
        """The options that the recipe sets and that only TRL describes, by TRL's names."""
        names = self.model_fields_set - DocumentedTraining.model_fields.keys()
        return {name: getattr(self, name) for name in names}


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
    """The trainer and the reward functions."""

    class_path: DottedPath = "gtpo.gtpo_training.UnslothGTPOTrainer"
    """The dotted path of the trainer class, a subclass of trl.GRPOTrainer."""
    reward_funcs: Annotated[list[DottedPath], BeforeValidator(_as_list), Field(min_length=1)] = [
        "reward_math.final_reward"
    ]
    """The dotted paths of the reward functions. training.reward_weights weights them."""


class RewardsSection(Section):
    """How reward functions are called, and when a run gives up on them."""

    isolated: bool = True
    """Call reward functions in separate processes, which can be stopped. false calls them in the
    training process, without limits of time and memory.
    """
    seconds: float = Field(30.0, gt=0)
    """The time limit for one completion. A completion that takes longer gets no reward."""
    memory: float | None = Field(4.0, gt=0)
    """The memory limit of each reward process, in GiB. null sets no limit."""
    workers: int = Field(1, ge=1)
    """The number of reward processes that work at the same time. They run different functions, and
    the parts of a rollout that rewards.per makes, in parallel.
    """
    per: Literal["rollout", "group", "completion"] = "rollout"
    """What one reward call gets. group and completion spread a rollout over the workers. A function
    that compares completions needs its whole group.
    """
    max_failures: float = Field(0.2, ge=0, le=1)
    """The share of the last 100 completions on which a function may fail. Above it the run saves a
    checkpoint and stops. 1 never stops the run.
    """

    @model_validator(mode="after")
    def workers_need_processes(self):
        """Refuse several workers without processes to run them in."""
        if self.workers > 1 and not self.isolated:
            raise RecipeError(
                "rewards.workers",
                f"{self.workers} workers need processes of their own; set rewards.isolated to true",
            )
        return self


class RuntimeSection(Section):
    """The constants of GTPO's trainers, as in gtpo/gtpo_training.py."""

    ent_threshold: float = Field(0.7, ge=0)
    """The threshold of the entropy filter, in nats. The paper uses ln 2, about 0.69."""
    ent_scale: float = Field(0.1, ge=0)
    """gamma, the weight of the entropy penalty."""
    w_raw: float = Field(2.0, ge=0)
    """lambda, the weight of conflict tokens in completions with a positive advantage."""
    pad_id: int | None = None
    """The id of the padding token. null uses the tokenizer's. It changes no token weight, because
    the completion mask decides.
    """
    eps: float = Field(1e-6, gt=0)
    """The constant that keeps logarithms finite in the released code. Only custom_trainer.released
    uses it.
    """
    torch_compile_options: dict[str, bool | int | float | str] = {}
    """Options of torch.compile on CUDA. They override the trainer's own."""


class EvaluationSection(Section):
    """The held-out problems: evaluated before, during and after training."""

    path: str | None = None
    """A file or folder with held-out problems, as in dataset.path. They are evaluated before and
    after training.
    """
    split: str | None = None
    """The split with the held-out problems, for example test."""
    question_column: str | None = None
    """The column with the questions of the held-out problems. null is that of the dataset."""
    answer_column: str | None = None
    """The column with the answers of the held-out problems. null is that of the dataset."""
    limit: int = Field(200, ge=1)
    """How many held-out problems to use, counted from the first."""
    batch_size: int = Field(32, ge=1)
    """Completions generated at the same time."""
    every: int | None = Field(None, ge=1)
    """Steps between two evaluations during training. null evaluates only before and after."""
    samples: int = Field(1, ge=1)
    """Completions per problem."""
    temperature: float = Field(0.0, ge=0)
    """The sampling temperature. 0 is greedy decoding."""

    @model_validator(mode="after")
    def samples_differ_and_problems_are_named(self):
        """Refuse several greedy samples, and evaluations without held-out problems."""
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
    """What a run records of its completions, and what it shows."""

    completions: bool = True
    """Write every training completion to completions.jsonl in the run directory."""
    columns: TextList = []
    """Columns of the data that completions.jsonl keeps with each completion, by the names that
    rewards see.
    """
    tokens_every: int = Field(1, ge=1)
    """Every this many steps, completions.jsonl keeps per-token lists: ids, texts, weights and
    entropies. They take 25 bytes per token.
    """
    show_every: int | None = Field(50, ge=1)
    """Every this many steps, the console shows a good and a bad completion, beginning with the
    first step. null shows none.
    """


class AlarmSection(Section):
    """The collapse alarm: its conditions, and what it does. null turns a condition off."""

    action: Literal["none", "warn", "save", "stop"] = "warn"
    """What an alarm does. warn prints it, save also saves a checkpoint, and stop also ends the run
    with exit code 3.
    """
    window: int = Field(20, ge=1)
    """The number of log lines over which metrics are averaged. No alarm comes before that many."""
    entropy_above: Literal["auto"] | Annotated[float, Field(ge=0)] | None = "auto"
    """Alarm if the mean entropy (nats) is above this value. auto uses gtpo_runtime.ent_threshold.
    null turns this alarm off, as it does for the alarms below.
    """
    entropy_rising: float | None = Field(0.2, ge=0)
    """Alarm if the mean entropy rises by more than this (nats) from one window to the next."""
    entropy_low: float | None = Field(0.1, ge=0, le=1)
    """Alarm if the mean entropy is below this share of the initial entropy. The policy is then
    nearly deterministic.
    """
    all_filtered: float | None = Field(0.99, ge=0, le=1)
    """Alarm if GTPO's entropy filter drops at least this share of the completions."""
    format_falling: float | None = Field(0.25, ge=0, le=1)
    """Alarm if the share of well-formed completions is more than this below its highest value."""
    no_signal: float | None = Field(0.95, ge=0, le=1)
    """Alarm if all rewards are equal or missing in at least this share of the groups."""
    truncated: float | None = Field(0.5, ge=0, le=1)
    """Alarm if at least this share of the completions reaches the maximum length."""
    non_finite: int | None = Field(3, ge=1)
    """Alarm if the loss or a gradient is not finite in this many steps of a window."""

    def limits(self, ent_threshold: float) -> dict[str, float | None]:
        """The threshold of each condition, or None if it is off; auto becomes `ent_threshold`."""
        limits = self.model_dump(exclude={"action", "window"})
        return {name: ent_threshold if limit == "auto" else limit for name, limit in limits.items()}


class WandbSection(Section):
    """Weights & Biases."""

    project: str = "gtpo"
    """The Weights & Biases project."""
    entity: str | None = None
    """The Weights & Biases user or team. null uses your default."""
