"""Compare one optimizer step of a real trainer on the tiny policy with the float64 objective.

Tests call `compare` and read its figures. `python tests/gradients.py '[{}]'` prints them for the
trainer that Unsloth generates, for each case of a JSON list. It runs in a process of its own,
because Unsloth replaces `trl.GRPOTrainer`.
"""

import copy
import json
import os
import pathlib
import sys
import tempfile
import types

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT, os.path.dirname(os.path.abspath(__file__))]


GTPO, GRPO = "gtpo.gtpo_training.UnslothGTPOTrainer", "custom_trainer.original.UnslothGRPOTrainer"


def patch_unsloth() -> None:
    """Imports Unsloth without a GPU and lets it generate its GRPO trainer."""
    os.environ.update(UNSLOTH_ALLOW_CPU="1", UNSLOTH_COMPILE_DISABLE="1", UNSLOTH_FORCE_FLOAT32="1")
    import unsloth

    from gtpo.models.backends import compile_options

    del os.environ["UNSLOTH_ALLOW_CPU"]
    with compile_options({"shape_padding": False, "trace.enabled": True}):
        unsloth.PatchFastRL("GRPO", unsloth.FastLanguageModel)


def letters_reward(completions, **kwargs) -> list[float]:
    """The share of vowels in each completion, in tenths: it differs within a group."""

    def share(text: str) -> float:
        return sum(letter in "aeiou" for letter in text) / max(len(text), 1)

    return [round(10 * share(text)) / 10 for text in completions]


def make_trainer(
    class_path: str,
    folder: str,
    *,
    pad: str = "~",
    peaked: float = 1.0,
    reward=letters_reward,
    **options,
):
    """A trainer of `class_path` on the tiny policy and eight prompts of unequal length.

    `options` go to GRPOConfig. `peaked` scales the head's weights, which lowers the entropy.
    """
    import datasets
    import tiny
    import torch
    import trl

    from gtpo.recipe.dotted_paths import load_object

    trainer_class = load_object(class_path)
    tokenizer = tiny.tiny_tokenizer(pad=pad, alphabet="abcdefgh \n:u")
    model = tiny.with_lora(tiny.tiny_model(tokenizer))
    model.base_model.model.lm_head.weight.data *= peaked
    # Unsloth's trainer calls these two.
    model.for_training = model.for_inference = lambda *args, **kwargs: None
    never = [i for i in {0, tokenizer.pad_token_id} if i != tokenizer.eos_token_id]
    arguments = trl.GRPOConfig(
        **{
            "output_dir": folder,
            "use_cpu": True,
            "bf16": False,
            "fp16": False,
            "report_to": "none",
            "seed": 3,
            "loss_type": "grpo",
            "scale_rewards": "none",
            "beta": 0.0,
            "temperature": 0.9,
            "learning_rate": 1e-2,
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 2,
            "max_steps": 1,
            "max_completion_length": 7,
            "max_grad_norm": 0.0,
            "lr_scheduler_type": "constant",
            "warmup_steps": 0,
            "optim": "sgd",
            "weight_decay": 0.0,
            "logging_steps": 1,
            "save_strategy": "no",
            "gradient_checkpointing": False,
            "disable_tqdm": True,
            "generation_kwargs": {"suppress_tokens": never},
            **options,
        }
    )
    prompts = ["a", "bcd", "ab ab ab", "hg", "fedcba", "c" * 11, "abcabcabcabca", "e"]
    trainer = trainer_class(
        model=model,
        args=arguments,
        processing_class=tokenizer,
        reward_funcs=reward if isinstance(reward, list) else [reward],
        train_dataset=datasets.Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
    )
    # Float32 on a CPU. Otherwise Unsloth autocasts to float16 once it has old log-probs.
    trainer._autocast_enabled = trainer._autocast_force_float32 = False
    trainer._autocast_dtype = torch.float16
    return trainer


def record_steps(trainer) -> dict:
    """Records the rollouts, the log lines, and the gradients before each optimizer step."""
    from transformers import TrainerCallback

    seen = {"rollouts": [], "gradients": [], "logs": []}
    generate = trainer._generate_and_score_completions

    def recorded(self, inputs):
        rollout = generate(inputs)
        seen["rollouts"].append({k: v.clone() for k, v in rollout.items() if hasattr(v, "clone")})
        return rollout

    class Record(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            seen["gradients"].append(
                {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
            )

        def on_log(self, args, state, control, logs=None, **kwargs):
            seen["logs"].append(dict(logs))

    trainer._generate_and_score_completions = types.MethodType(recorded, trainer)
    trainer.add_callback(Record())
    return seen


def float64_copy(model):
    """A copy of `model` in float64.

    accelerate and Unsloth leave wrapped `forward` methods on a model, which are bound to the
    original. The copy has none.
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    return model.double()


def oracle_gradients(
    model, rollout, *, temperature, num_generations, weight, scale, threshold, initial
):
    """d(-J)/d(LoRA) in float64 by parameter name, and -J.

    Each row runs alone and without padding.
    """
    import reference
    import torch

    model = float64_copy(model)
    model.zero_grad()
    total = 0.0
    groups = len(rollout["advantages"]) // num_generations
    for start in range(0, len(rollout["advantages"]), num_generations):
        log_probs, ids = [], []
        for i in range(start, start + num_generations):
            prompt = rollout["prompt_ids"][i][rollout["prompt_mask"][i].bool()]
            completion = rollout["completion_ids"][i][rollout["completion_mask"][i].bool()]
            logits = model(input_ids=torch.cat([prompt, completion]).unsqueeze(0)).logits[0]
            log_probs.append((logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1))
            ids.append(completion.tolist())
        advantages = rollout["advantages"][start : start + num_generations].double().tolist()
        loss = reference.loss(
            log_probs,
            ids,
            [[1] * len(row) for row in ids],
            advantages,
            weight=weight,
            scale=scale,
            threshold=threshold,
            initial=initial,
        )
        total = total + loss / groups
    total.backward()
    gradients_by_name = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return gradients_by_name, total.item()


def initial_entropy(model, rollout, *, temperature) -> float:
    """The mean over completions of their mean token entropy, in float64."""
    import reference
    import torch

    model = float64_copy(model)
    means = []
    for i in range(len(rollout["advantages"])):
        prompt = rollout["prompt_ids"][i][rollout["prompt_mask"][i].bool()]
        completion = rollout["completion_ids"][i][rollout["completion_mask"][i].bool()]
        with torch.no_grad():
            logits = model(input_ids=torch.cat([prompt, completion]).unsqueeze(0)).logits[0]
        entropy = reference.entropy((logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1))
        if len(completion):
            means.append(entropy.mean().item())
    return sum(means) / len(means)


def relative_error(computed: dict, expected: dict) -> float:
    """The distance of two dictionaries of tensors, relative to the length of the second."""
    import torch

    computed = torch.cat([computed[name].double().flatten() for name in expected])
    expected = torch.cat([expected[name].flatten() for name in expected])
    return ((computed - expected).norm() / expected.norm()).item()


def two_steps(folder: str, class_path: str, **options) -> tuple[dict, dict]:
    """LoRA weights and log lines after two steps of `class_path`.

    W_RAW is 1, ENT_SCALE is 0, and the gate keeps everything.
    """
    options = {"max_steps": 2, "optim": "adamw_torch", "max_grad_norm": 1.0, **options}
    trainer = make_trainer(class_path, folder, **options)
    from gtpo import gtpo_training
    from gtpo.hooks.streaming_head import stream_log_probs

    # As train_model.py does for every trainer, so that both have the same arithmetic.
    stream_log_probs(trainer)
    saved = {name: getattr(gtpo_training, name) for name in ("W_RAW", "ENT_SCALE", "ENT_THRESHOLD")}
    vars(gtpo_training).update(W_RAW=1.0, ENT_SCALE=0.0, ENT_THRESHOLD=float("inf"))
    seen = record_steps(trainer)
    trainer.train()
    vars(gtpo_training).update(saved)
    trained = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad}
    return {name: p.detach().clone() for name, p in trained.items()}, seen["logs"]


def distance_from_grpo(folder: str, **options) -> float:
    """The largest difference between the LoRA weights of GRPO and of GTPO after two steps.

    GTPO has no lambda, no gate and no penalty here.
    """
    grpo, _ = two_steps(folder, GRPO, **options)
    gtpo, _ = two_steps(folder, "benchmarks.ablations.WithoutTokenWeights", **options)
    return max((grpo[name] - gtpo[name]).abs().max().item() for name in grpo)


def compare(
    folder: str,
    *,
    threshold: float = 0.7,
    pad: str = "~",
    peaked: float = 1.0,
    **options,
) -> dict:
    """Figures of one GTPO step and of the float64 objective, and of what the step contained."""
    trainer = make_trainer(GTPO, folder, pad=pad, peaked=peaked, **options)
    from gtpo import gtpo_training
    from gtpo.hooks import streaming_head

    streamed, head = [], streaming_head.log_probs_and_entropies

    def counted_head(*args, **kwargs):
        streamed.append(1)
        return head(*args, **kwargs)

    streaming_head.log_probs_and_entropies = counted_head
    gtpo_training.ENT_THRESHOLD = threshold  # no test puts it back, so each case sets it
    before = copy.deepcopy(trainer.model)
    seen = record_steps(trainer)
    trainer.train()
    streaming_head.log_probs_and_entropies = head
    rollout = seen["rollouts"][0]
    temperature = trainer.args.temperature
    initial = initial_entropy(before, rollout, temperature=temperature)
    expected, loss = oracle_gradients(
        before,
        rollout,
        temperature=temperature,
        num_generations=trainer.num_generations,
        weight=gtpo_training.W_RAW,
        scale=gtpo_training.ENT_SCALE,
        threshold=threshold,
        initial=initial,
    )
    # The mean over the steps that share the rollout is the gradient of the rollout.
    logs, steps = seen["logs"][0], seen["gradients"]
    gradient = {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}
    return {
        "class": str(type(trainer).__mro__[1]),
        "streamed": len(streamed),
        "gradient_error": relative_error(gradient, expected),
        "initial_entropy": trainer.initial_entropy,
        "initial_entropy_float64": initial,
        "filtered": logs["gtpo/frac_filtered"],
        "conflicts": logs["gtpo/frac_conflict_tokens"],
        "groups": len(rollout["advantages"]) // trainer.num_generations,
        "loss": logs["loss"],
        "loss_float64": loss,
        "prompt_lengths": rollout["prompt_mask"].sum(1).unique().tolist(),
        "lengths": rollout["completion_mask"].sum(1).unique().tolist(),
        "signs": rollout["advantages"].sign().unique().tolist(),
    }


def heads() -> list[dict]:
    """Unsloth's head with entropies, called inside and outside `streaming_in_unsloths_loss`.

    For each set of options: the largest difference, and whether our head was used inside.
    """
    import torch
    from unsloth_zoo import rl_replacements

    from gtpo.hooks.streaming_head import UNSLOTH_HEAD, streaming_in_unsloths_loss

    theirs = getattr(rl_replacements, UNSLOTH_HEAD)
    torch.manual_seed(0)
    hidden, weight = torch.randn(3, 5, 8, requires_grad=True), torch.randn(50, 8)
    ids = torch.randint(0, 50, (3, 5))
    bias, trained = torch.randn(50), torch.randn(50, 8, requires_grad=True)
    upstream = torch.randn(3, 5)

    def run(head, weight=weight, **options):
        log_probs, entropies = head(hidden, weight, ids, 4, return_entropy=True, **options)
        return [log_probs, entropies, *torch.autograd.grad((log_probs * upstream).sum(), hidden)]

    rows = []
    for options in (
        {},
        {"temperature": 0.7},
        {"logit_softcapping": 5.0},
        {"logit_scale_multiply": 2.0},
        {"logit_scale_divide": 2.0},
        {"lm_head_bias": bias},
        {"fp32_lm_head": True},
        {"max_rows_per_chunk": 2},
        {"weight": trained},
    ):
        expected = run(theirs, **options)
        with streaming_in_unsloths_loss():
            values = run(getattr(rl_replacements, UNSLOTH_HEAD), **options)
            # Where our head does not fit, it steps back until the end of the loss.
            ours = getattr(rl_replacements, UNSLOTH_HEAD) is not theirs
        assert getattr(rl_replacements, UNSLOTH_HEAD) is theirs
        error = max((a - b).abs().max().item() for a, b in zip(values, expected, strict=True))
        rows.append({"options": list(options), "ours": ours, "error": error})
    return rows


def failures(folder: str) -> dict:
    """Figures of three steps: some rewards fail, all rewards fail, gradients are not finite."""
    from pathlib import Path

    import hostile_rewards

    from gtpo.hooks.nonfinite import skip_non_finite
    from gtpo.recipe.sections import RewardsSection
    from gtpo.rewards.guarded import GuardedRewards

    figures = {}
    for class_path in (GTPO, GRPO):
        guarded = GuardedRewards(
            RewardsSection(max_failures=1),
            [("hostile_rewards.failing_step_by_step", hostile_rewards.failing_step_by_step)],
            seed=1,
            file=Path(folder, "failures.jsonl"),
        )
        trainer = make_trainer(class_path, folder, reward=guarded.functions, max_steps=3)
        guarded.attach(trainer)
        skipping, seen = skip_non_finite(trainer, None), record_steps(trainer)
        weight = next(p for p in trainer.model.parameters() if p.requires_grad)

        def in_the_third_step_nan(gradient, trainer=trainer):
            return gradient * (1.0 if trainer.state.global_step < 2 else float("nan"))

        weight.register_hook(in_the_third_step_nan)
        trainer.train()
        rollouts, steps = seen["rollouts"][:3], seen["gradients"][:2]
        figures[class_path] = {
            "cannot_judge": [logs["reward/cannot_judge"] for logs in seen["logs"][:3]],
            "skipped": skipping.skipped,
            "advantages": [int((rollout["advantages"] != 0).sum()) for rollout in rollouts],
            "largest": [max(g.abs().max().item() for g in step.values()) for step in steps],
            "finite": all(p.isfinite().all().item() for p in trainer.model.parameters()),
        }
    return figures


def main(cases: list[dict]) -> dict:
    """The figures of all that is done with the trainer that Unsloth generates."""
    import inspect

    import recordings
    import resumes
    from unsloth import FastLanguageModel

    here = os.getcwd()
    compile_options = sys.modules["UnslothGRPOTrainer"].torch_compile_options
    compared = [compare(here, **case) for case in cases]
    recorded = [
        recordings.record(class_path, here, pad=pad)
        for class_path, pad in ((GTPO, "~"), (GTPO, "^"), (GRPO, "~"))
    ]
    folder = pathlib.Path(tempfile.mkdtemp(dir=here))
    resumed = resumes.where_resumed_runs_differ(GTPO, folder, steps=[1])
    options = ("shape_padding", "trace.enabled", "max_autotune")
    return {
        "cases": compared,
        "distance_from_grpo": distance_from_grpo(here),
        "resumed": resumed,
        "heads": heads(),
        "failures": failures(here),
        "recorded": [{name: run[name] for name in ("lines", "entropy_error")} for run in recorded],
        "compile_options": {name: compile_options[name] for name in options},
        "from_pretrained": list(inspect.signature(FastLanguageModel.from_pretrained).parameters),
        "get_peft_model": list(inspect.signature(FastLanguageModel.get_peft_model).parameters),
    }


if __name__ == "__main__":
    patch_unsloth()
    print("FIGURES " + json.dumps(main(json.loads(sys.argv[1]))))
