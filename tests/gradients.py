"""One optimizer step of a real trainer on the tiny policy, held against the float64 objective.

`python tests/gradients.py '[{}]'` does so, for each case of a JSON list, with the trainer Unsloth
generates, in a process of its own because Unsloth replaces trl.GRPOTrainer; tests call `compare`
and read the figures.
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


def patch_unsloth() -> None:
    """Import Unsloth without a GPU and let it generate its GRPO trainer."""
    os.environ.update(UNSLOTH_ALLOW_CPU="1", UNSLOTH_COMPILE_DISABLE="1", UNSLOTH_FORCE_FLOAT32="1")
    import unsloth

    from gtpo.models.backends import compile_options

    del os.environ["UNSLOTH_ALLOW_CPU"]
    with compile_options({"shape_padding": False, "trace.enabled": True}):
        unsloth.PatchFastRL("GRPO", unsloth.FastLanguageModel)


def letters_reward(completions, **kwargs) -> list[float]:
    """Something to disagree about: the share of vowels, in tenths, of each completion."""
    return [
        round(10 * sum(c in "aeiou" for c in text) / max(len(text), 1)) / 10 for text in completions
    ]


def make_trainer(
    class_path: str,
    folder: str,
    *,
    pad: str = "~",
    peaked: float = 1.0,
    reward=letters_reward,
    **options,
):
    """A trainer of `class_path` on the tiny policy and eight prompts of unequal length; `options`
    go to GRPOConfig.
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
    # what Unsloth's trainer calls
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
    # In float32 on a CPU; Unsloth would otherwise autocast to float16 once it has computed old log-
    # probs.
    trainer._autocast_enabled, trainer._autocast_force_float32, trainer._autocast_dtype = (
        False,
        False,
        torch.float16,
    )
    return trainer


def watch(trainer) -> dict:
    """Record the rollouts and, at each optimizer step, the gradients that the trainer is about to
    apply.
    """
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
    """`model` in float64, free of the wrapped `forward`s that Accelerate and Unsloth leave on it
    (bound to the original).
    """
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    return model.double()


def oracle_gradients(
    model, rollout, *, temperature, num_generations, weight, scale, threshold, initial, drop_id=None
):
    """d(-J)/d(LoRA) in float64, each row run alone and without padding. `drop_id`: an id that
    counts nowhere.
    """
    import reference
    import torch

    model = float64_copy(model)
    model.zero_grad()
    total = 0.0
    groups = len(rollout["advantages"]) // num_generations
    for start in range(0, len(rollout["advantages"]), num_generations):
        log_probs, ids, counted = [], [], []
        for i in range(start, start + num_generations):
            prompt = rollout["prompt_ids"][i][rollout["prompt_mask"][i].bool()]
            completion = rollout["completion_ids"][i][rollout["completion_mask"][i].bool()]
            logits = model(input_ids=torch.cat([prompt, completion]).unsqueeze(0)).logits[0]
            log_probs.append((logits[len(prompt) - 1 : -1] / temperature).log_softmax(-1))
            ids.append(completion.tolist())
            counted.append([int(token != drop_id) for token in ids[-1]])
        advantages = rollout["advantages"][start : start + num_generations].double().tolist()
        total = (
            total
            + reference.loss(
                log_probs,
                ids,
                [[1] * len(row) for row in ids],
                advantages,
                counted=counted,
                weight=weight,
                scale=scale,
                threshold=threshold,
                initial=initial,
            )
            / groups
        )
    total.backward()
    return {
        name: p.grad for name, p in model.named_parameters() if p.grad is not None
    }, total.item()


def initial_entropy(model, rollout, *, temperature, drop_id=None) -> float:
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
        real = (
            completion != drop_id
            if drop_id is not None
            else torch.ones_like(completion, dtype=torch.bool)
        )
        if real.any():
            means.append(entropy[real].mean().item())
    return sum(means) / len(means)


def relative_error(found: dict, expected: dict) -> float:
    import torch

    found = torch.cat([found[name].double().flatten() for name in expected])
    expected = torch.cat([expected[name].flatten() for name in expected])
    return ((found - expected).norm() / expected.norm()).item()


def two_steps(folder: str, class_path: str, **options) -> tuple[dict, dict]:
    """LoRA weights and log lines after two steps of `class_path` with w_raw 1, ent_scale 0 and the
    gate off.
    """
    trainer = make_trainer(
        class_path,
        folder,
        **{"max_steps": 2, "optim": "adamw_torch", "max_grad_norm": 1.0, **options},
    )
    from gtpo import gtpo_training
    from gtpo.hooks.streaming_head import stream_log_probs

    # as train_model.py does for every trainer: the same arithmetic for both
    stream_log_probs(trainer)
    saved = {name: getattr(gtpo_training, name) for name in ("W_RAW", "ENT_SCALE", "ENT_THRESHOLD")}
    vars(gtpo_training).update(W_RAW=1.0, ENT_SCALE=0.0, ENT_THRESHOLD=float("inf"))
    seen = watch(trainer)
    trainer.train()
    vars(gtpo_training).update(saved)
    return {
        n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad
    }, seen["logs"]


def distance_from_grpo(folder: str, **options) -> float:
    """Largest difference of any LoRA weight between GRPO and GTPO without lambda, gate and penalty,
    after two steps.
    """
    grpo, _ = two_steps(folder, "custom_trainer.original.UnslothGRPOTrainer", **options)
    gtpo, _ = two_steps(folder, "benchmarks.ablations.WithoutTokenWeights", **options)
    return max((grpo[name] - gtpo[name]).abs().max().item() for name in grpo)


def compare(
    folder: str,
    *,
    threshold: float = 0.7,
    pad: str = "~",
    peaked: float = 1.0,
    unsloth: bool = False,
    **options,
) -> dict:
    """Figures of one GTPO step against float64: relative gradient error, initial entropy, and how
    much was exercised.
    """
    trainer = make_trainer(
        "gtpo.gtpo_training.UnslothGTPOTrainer", folder, pad=pad, peaked=peaked, **options
    )
    from gtpo import gtpo_training
    from gtpo.hooks import streaming_head

    streamed, head = [], streaming_head.log_probs_and_entropies
    streaming_head.log_probs_and_entropies = lambda *args, **kwargs: (
        streamed.append(1) or head(*args, **kwargs)
    )
    gtpo_training.ENT_THRESHOLD = threshold  # each case states it
    before = copy.deepcopy(trainer.model)
    seen = watch(trainer)
    trainer.train()
    streaming_head.log_probs_and_entropies = head
    rollout = seen["rollouts"][0]
    temperature = trainer.args.temperature
    # Unsloth's mask leaves every pad id out, so an end token that is also the pad token does not
    # count there.
    drop_id = trainer.processing_class.pad_token_id if unsloth and pad == "^" else None
    initial = initial_entropy(before, rollout, temperature=temperature, drop_id=drop_id)
    expected, loss = oracle_gradients(
        before,
        rollout,
        temperature=temperature,
        num_generations=trainer.num_generations,
        drop_id=drop_id,
        weight=gtpo_training.W_RAW,
        scale=gtpo_training.ENT_SCALE,
        threshold=threshold,
        initial=initial,
    )
    # the steps that share the rollout average to its gradient
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
    """Unsloth's head with entropies while GTPO's loss runs: how far it is from itself, and whether
    ours stood in for it.
    """
    import torch
    from unsloth_zoo import rl_replacements

    from gtpo.hooks import streaming_head

    theirs, name = (
        rl_replacements.chunked_hidden_states_selective_log_softmax_recompute,
        streaming_head.UNSLOTH_HEAD,
    )
    torch.manual_seed(0)
    hidden, weight, ids = (
        torch.randn(3, 5, 8, requires_grad=True),
        torch.randn(50, 8),
        torch.randint(0, 50, (3, 5)),
    )
    bias, trained, upstream = (
        torch.randn(50),
        torch.randn(50, 8, requires_grad=True),
        torch.randn(3, 5),
    )

    def run(head, weight=weight, **options):
        log_probs, entropies = head(hidden, weight, ids, 4, return_entropy=True, **options)
        return [log_probs, entropies, *torch.autograd.grad((log_probs * upstream).sum(), hidden)]

    found = []
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
        with streaming_head.streaming_in_unsloths_loss():
            values = run(getattr(rl_replacements, name), **options)
            # it steps back for the whole of a loss
            replaced = getattr(rl_replacements, name) is not theirs
        assert getattr(rl_replacements, name) is theirs
        error = max((a - b).abs().max().item() for a, b in zip(values, expected, strict=True))
        found.append({"options": list(options), "ours": replaced, "error": error})
    return found


def judged(folder: str) -> dict:
    """A step with rewards some of which cannot be had, one with none at all, and one with gradients
    that are not finite.
    """
    from pathlib import Path

    import hostile_rewards

    from gtpo.hooks.nonfinite import skip_non_finite
    from gtpo.recipe.sections import RewardsSection
    from gtpo.rewards.guarded import GuardedRewards

    figures = {}
    for class_path in (
        "gtpo.gtpo_training.UnslothGTPOTrainer",
        "custom_trainer.original.UnslothGRPOTrainer",
    ):
        guarded = GuardedRewards(
            RewardsSection(max_failures=1),
            [("hostile_rewards.failing_step_by_step", hostile_rewards.failing_step_by_step)],
            seed=1,
            file=Path(folder, "failures.jsonl"),
        )
        trainer = make_trainer(class_path, folder, reward=guarded.functions, max_steps=3)
        guarded.attach(trainer)
        skipping, seen = skip_non_finite(trainer, None), watch(trainer)
        weight = next(p for p in trainer.model.parameters() if p.requires_grad)
        weight.register_hook(
            lambda gradient, trainer=trainer: (
                gradient * (1.0 if trainer.state.global_step < 2 else float("nan"))
            )
        )
        trainer.train()
        figures[class_path] = {
            "unjudged": [logs["reward/cannot_judge"] for logs in seen["logs"][:3]],
            "skipped": skipping.skipped,
            "advantages": [
                int((rollout["advantages"] != 0).sum()) for rollout in seen["rollouts"][:3]
            ],
            "largest": [
                max(g.abs().max().item() for g in step.values()) for step in seen["gradients"][:2]
            ],
            "finite": all(p.isfinite().all().item() for p in trainer.model.parameters()),
        }
    return figures


if __name__ == "__main__":
    patch_unsloth()
    import inspect

    import recordings
    import resumes
    from unsloth import FastLanguageModel

    generated = sys.modules["UnslothGRPOTrainer"].torch_compile_options
    figures = [compare(os.getcwd(), unsloth=True, **case) for case in json.loads(sys.argv[1])]
    recorded = [
        recordings.record(class_path, os.getcwd(), pad=pad)
        for class_path, pad in (
            ("gtpo.gtpo_training.UnslothGTPOTrainer", "~"),
            ("gtpo.gtpo_training.UnslothGTPOTrainer", "^"),
            ("custom_trainer.original.UnslothGRPOTrainer", "~"),
        )
    ]
    folder = pathlib.Path(tempfile.mkdtemp(dir=os.getcwd()))
    resumed = resumes.where_resumed_runs_differ(
        "gtpo.gtpo_training.UnslothGTPOTrainer", folder, steps=[1]
    )
    print(
        "FIGURES "
        + json.dumps(
            {
                "cases": figures,
                "distance_from_grpo": distance_from_grpo(os.getcwd()),
                "resumed": resumed,
                "heads": heads(),
                "judged": judged(os.getcwd()),
                "recorded": [
                    {name: run[name] for name in ("lines", "entropy_error")} for run in recorded
                ],
                "compile_options": {
                    name: generated[name]
                    for name in ("shape_padding", "trace.enabled", "max_autotune")
                },
                "from_pretrained": list(
                    inspect.signature(FastLanguageModel.from_pretrained).parameters
                ),
                "get_peft_model": list(
                    inspect.signature(FastLanguageModel.get_peft_model).parameters
                ),
            }
        )
    )
