"""What other trainers call our keys: TRL, Unsloth, Axolotl, verl, ms-swift, OpenRLHF.

Only suggestions come from here. No such name is accepted as a key.
"""

import difflib
import re
from collections.abc import Collection

# Our key: the names that others give it, without their sections. Case does not count, and neither
# do - and _ . A name after a colon counts only in that section.
NAMES = {
    "model.model_name": (
        "model model_id model_name_or_path model_path base_model base_model_name pretrained_model"
        " pretrained_model_name_or_path pretrained hf_model llm model:name model:path model:id"
        " model:model_type training:model_init actor_model partial_pretrain"
    ),
    "model.adapter": (
        "adapter_path adapter_name_or_path lora_path lora_adapter_path lora_model_dir"
        " peft_model_id peft_path adapters"
    ),
    "model.backend": "use_unsloth framework engine",
    "model.max_seq_length": (
        "max_tokens max_new_tokens new_tokens max_completion_length max_completion_len"
        " completion_length"
        " max_response_length response_length max_gen_length generate_max_len max_output_tokens"
        " max_completion_tokens max_generated_tokens"
        " max_length sequence_len sequence_length seq_length seq_len max_seq_len"
        " max_sequence_length model_max_length max_model_len vllm_max_model_length cutoff_len"
        " context_length context_len n_ctx block_size"
    ),
    "model.lora_rank": "r rank lora_r lora_dim lora_rank peft_r peft_lora_r adapter_rank",
    "model.lora_alpha": "alpha lora_alpha peft_lora_alpha lora_scaling lora_scale",
    "model.lora_dropout": "dropout peft_lora_dropout lora_drop",
    "model.use_rslora": "rslora lora_use_rslora",
    "model.use_dora": "dora lora_use_dora peft_use_dora",
    "model.init_lora_weights": "lora_init lora_init_weights peft_init_lora_weights",
    "model.modules_to_save": "lora_modules_to_save additional_target",
    "model.target_modules": (
        "lora_target_modules lora_target lora_modules lora_target_linear target lora_layers"
    ),
    "model.load_in_4bit": (
        "load_4bit use_4bit 4bit qlora quantize quantization quant_bits quantization_bit"
        " quant_method load_in_8bit load_8bit use_8bit"
    ),
    "model.fast_inference": "use_vllm_inside vllm",
    "model.gpu_memory_utilization": (
        "gpu_mem_util vllm_gpu_util vllm_gpu_memory gpu_memory vllm_gpu_memory_utilization"
    ),
    "model.random_seed": "seed random_state manual_seed data_seed rng_seed",
    "model.chat_template": "template jinja_template chat_template_path chat_template_jinja",
    "dataset.name": (
        "dataset dataset_name datasets dataset_id dataset_name_or_path dataset_repo hf_dataset"
        " data_name prompt_data dataset:id dataset:hf_name"
    ),
    "dataset.path": (
        "data data_path dataset_path data_dir dataset_dir data_file data_files train_file"
        " train_files train_data train_path train_data_path training_data train_dataset"
        " path"
    ),
    "dataset.subset": (
        "dataset_subset dataset_config dataset_config_name subset_name config_name data_config"
        " dataset:config"
    ),
    "dataset.split": "split train_split dataset_train_split dataset_split training_split",
    "dataset.system_instruction": (
        "system_prompt system system_message sys_prompt system_text default_system"
    ),
    "dataset.question_column": (
        "prompt_column question_key prompt_key prompt_field field_instruction input_key"
        " input_column problem_column problem_key query_column text_column question_field"
        " dataset_text_field dataset:prompt dataset:question"
    ),
    "dataset.answer_column": (
        "solution_column answer_key label_key label_column target_column reference_column"
        " answer_field field_output output_column response_column ground_truth_key"
        " ground_truth_column solution_key response_key dataset:answer dataset:solution"
    ),
    "training.max_prompt_length": (
        "max_prompt_len prompt_length prompt_max_len max_input_length max_input_tokens"
        " max_prompt_tokens prompt_max_length max_source_length"
    ),
    "training.learning_rate": "lr learningrate peak_lr max_lr base_lr actor_learning_rate actor_lr",
    "training.warmup_ratio": "warmup warm_up warmup_fraction lr_warmup_ratio lr_warmup_steps_ratio",
    "training.warmup_steps": "num_warmup_steps lr_warmup_steps warmup_iters",
    "training.lr_scheduler_type": "scheduler lr_scheduler lr_schedule schedule scheduler_type",
    "training.optimizer": "opt optimizer_name optimizer_type optim_name",
    "training.adam_beta1": "beta1 adam_b1 optim_beta1",
    "training.adam_beta2": "beta2 adam_b2 optim_beta2",
    "training.adam_epsilon": "adam_eps optim_eps",
    "training.weight_decay": "wd l2 decay",
    "training.max_grad_norm": (
        "grad_clip clip_grad gradient_clipping grad_norm_clip clip_grad_norm max_norm grad_clipping"
        " max_gradient_norm grad_clip_norm"
    ),
    "training.num_generations": (
        "num_rollouts rollouts rollout_n n group_size num_completions num_return_sequences"
        " n_samples_per_prompt num_samples_per_prompt samples_per_prompt rollouts_per_prompt"
        " num_rollouts_per_prompt rollouts_per_example generations n_generations num_responses"
        " completions_per_prompt num_generation g"
    ),
    "training.per_device_train_batch_size": (
        "batch_size batchsize bs bsz train_batch_size micro_batch_size per_device_batch"
        " per_device_batch_size"
        " per_gpu_batch_size per_gpu_train_batch_size device_batch_size mini_batch_size"
        " micro_train_batch_size train_micro_batch_size_per_gpu ppo_mini_batch_size"
        " ppo_micro_batch_size ppo_micro_batch_size_per_gpu global_batch_size"
        " rollout_batch_size"
    ),
    "training.gradient_accumulation_steps": (
        "grad_accum grad_acc gradient_accumulation grad_accumulation grad_accum_steps"
        " grad_acc_steps accumulation_steps accumulate_grad_batches accum_steps ga"
        " grad_accumulation_steps"
    ),
    "training.num_train_epochs": (
        "epochs epoch num_epochs n_epochs max_epochs train_epochs total_epochs"
    ),
    "training.max_steps": (
        "steps num_steps total_steps train_steps max_train_steps num_train_steps n_steps"
        " total_training_steps max_iters iterations training_steps max_training_steps"
    ),
    "training.num_iterations": "mu ppo_epochs num_ppo_epochs updates_per_rollout",
    "training.beta": (
        "kl_coef kl_coeff kl_beta kl_weight kl_penalty init_kl_coef kl_loss_coef kl_ctrl"
        " kl_coefficient kl"
    ),
    "training.epsilon": (
        "clip_range cliprange clip_ratio clip_eps eps_clip epsilon_low clip_epsilon clip_ratio_low"
    ),
    "training.epsilon_high": "clip_ratio_high cliprange_high clip_higher eps_clip_high",
    "training.temperature": "temp sampling_temperature rollout_temperature",
    "training.top_p": "topp nucleus",
    "training.top_k": "topk",
    "training.logging_steps": (
        "log_steps log_every log_interval logging_interval log_freq print_every"
    ),
    "training.save_steps": (
        "save_every save_interval save_freq checkpoint_every checkpoint_interval ckpt_interval"
        " saves_per_epoch checkpointing_steps"
    ),
    "training.save_total_limit": "max_checkpoints keep_checkpoints max_ckpt_num",
    "training.report_to": (
        "logger loggers tracker trackers use_wandb use_tensorboard log_with wandb_mode"
    ),
    "training.gradient_checkpointing": (
        "grad_checkpointing grad_checkpoint use_gradient_checkpointing activation_checkpointing"
        " enable_gradient_checkpointing"
    ),
    "training.bf16": "dtype torch_dtype precision mixed_precision half_precision",
    "training.reward_weights": "reward_weight rewards_weights reward_func_weights",
    "training.loss_type": "loss loss_fn objective policy_loss",
    "training.scale_rewards": "normalize_rewards advantage_normalization norm_adv adv_norm",
    "trainer.class_path": "trainer trainer_class trainer_cls trainer_type algorithm algo rl_type",
    "trainer.reward_funcs": (
        "reward rewards reward_fn reward_fns reward_func reward_function reward_functions"
        " rewards_funcs reward_fun reward_model reward_module custom_reward_function"
    ),
    "rewards.seconds": "reward_timeout timeout reward_time_limit",
    "rewards.workers": "reward_workers reward_num_workers",
    "gtpo_runtime.ent_threshold": "entropy_threshold ent_thresh entropy_thr",
    "gtpo_runtime.ent_scale": "entropy_scale gamma entropy_coeff entropy_bonus entropy_beta",
    "gtpo_runtime.w_raw": "lambda conflict_weight",
    "gtpo_runtime.pad_id": "pad_token_id pad_token",
    "evaluation.path": (
        "val_file val_files eval_file eval_files test_file test_files eval_data val_data"
        " validation_file eval_path val_path test_path test_dataset val_dataset eval_dataset"
        " test_datasets"
    ),
    "evaluation.split": "eval_split test_split dataset_test_split val_split validation_split",
    "evaluation.every": (
        "eval_steps eval_every eval_interval eval_freq test_freq val_interval val_steps"
        " evaluation:steps evals_per_epoch evaluation:interval evaluation:freq"
    ),
    "evaluation.limit": (
        "eval_limit max_eval_samples num_eval_samples eval_samples eval_size val_size"
        " val_set_size evaluation:max_samples evaluation:size"
    ),
    "evaluation.batch_size": "eval_batch_size per_device_eval_batch_size val_batch_size",
    "evaluation.samples": "evaluation:n evaluation:num_samples evaluation:num_generations eval_n",
    "evaluation.temperature": "eval_temperature val_temperature",
    "run_name": (
        "name experiment_name exp_name experiment run_id run job_name wandb_name wandb_run_name"
        " wandb_run wandb:name wandb:run_name trial_name"
    ),
    "output_root": (
        "output_dir outdir out_dir output output_path save_dir save_path checkpoint_dir ckpt_dir"
        " default_local_dir work_dir workdir run_dir results_dir ckpt_path log_dir"
    ),
    "wandb.project": "wandb_project project project_name wandb:project_name",
    "wandb.entity": "wandb_entity entity wandb_org wandb_team",
    "env.CUDA_VISIBLE_DEVICES": "cuda gpu gpus gpu_id gpu_ids device devices cuda_visible_devices",
}
# What others call our sections.
SECTIONS = {
    "model": "lora peft peft_config lora_config peft_args model_args model_config actor policy",
    "dataset": "data datasets data_args dataset_args",
    "training": (
        "train grpo gtpo rl trl training_args train_args args grpo_config trainer_args sampling"
        " generation rollout optim algorithm actor_rollout_ref sampling_params generation_config"
    ),
    "trainer": "trainers",
    "rewards": "reward reward_config",
    "gtpo_runtime": "runtime constants",
    "evaluation": "eval evaluate validation val test",
    "wandb": "logging tracker tracking logger",
}
# What else the user must know about a suggested key.
NOTES = {
    "model.max_seq_length": (
        "A completion may have model.max_seq_length - training.max_prompt_length tokens"
    ),
    "model.random_seed": "training.seed is another name for it",
    "output_root": "The run directory is made in it, and is named after run_name",
}
# The name needs no note where it means the whole sequence already.
WHOLE_SEQUENCE = frozenset(
    "max_length sequence_len sequence_length seq_length seq_len max_seq_len max_sequence_length"
    " model_max_length max_model_len vllm_max_model_length cutoff_len context_length context_len"
    " n_ctx block_size".split()
)


def _plain(name: str) -> str:
    """`learningRate` and `learning-rate` as `learning_rate`."""
    name = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return name.replace("-", "_").lower()


OUR_NAME = {name: key for key, names in NAMES.items() for name in names.split()}
OUR_SECTION = {name: section for section, names in SECTIONS.items() for name in names.split()}


def our_key(key: str, known: Collection[str]) -> str | None:
    """The one of the `known` keys that others call `key`, a dotted name; None if there is none."""
    *outer, last = map(_plain, key.split("."))
    section = OUR_SECTION.get(outer[-1], outer[-1]) if outer else None
    candidates = [
        f"{section}.{last}",
        OUR_NAME.get(f"{section}:{last}"),
        OUR_NAME.get("_".join([*outer[-1:], last])),
        OUR_NAME.get(last),
        *(name for name in known if name.split(".")[-1] == last),
    ]
    return next((name for name in candidates if _is_known(name, known)), None)


def similar_key(key: str, known: Collection[str]) -> str | None:
    """As `our_key`, for names of others with a typing mistake."""
    last = _plain(key.split(".")[-1])
    names = [name for name, ours in OUR_NAME.items() if ":" not in name and _is_known(ours, known)]
    close = difflib.get_close_matches(last, names, 1, 0.8) if len(last) > 4 else []
    return OUR_NAME[close[0]] if close else None


def _is_known(name: str | None, known: Collection[str]) -> bool:
    return name in known or name == "env.CUDA_VISIBLE_DEVICES"


def note(key: str, ours: str) -> str:
    """What is different about our key, as a sentence after a space; "" if nothing is."""
    if ours not in NOTES or _plain(key.split(".")[-1]) in WHOLE_SEQUENCE:
        return ""
    return f" {NOTES[ours]}"
