"""The sections of a recipe: every key with its type, default, bounds and one sentence. Nothing
heavy is imported here.

The string under a field is its help. `training` also accepts every option of the installed
`trl.GRPOConfig`.
"""

from typing import Annotated, Any, Literal

from pydantic import (
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
from gtpo.recipe.kinds import DOTTED_PATH, DottedPath, Generations, Texts, Trackers, listed
from gtpo.system.trl_options import grpo_options

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
    report_to: Annotated[list[Trackers], BeforeValidator(listed)] = ["wandb"]
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
    reward_funcs: Annotated[list[DottedPath], BeforeValidator(listed), Field(min_length=1)] = [
        "reward_math.final_reward"
    ]
    """Reward functions, by dotted path; weights: training.reward_weights."""


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


class WandbSection(Section):
    project: str = "gtpo"
    """Weights & Biases project."""
    entity: str | None = None
    """Weights & Biases user or team; null for your default."""
