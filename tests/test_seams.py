"""What the trainer relies on in trl 1.13.0; each test fails the day it stops being true."""

import gradients
import pytest
import torch
import trl

GRPO = "custom_trainer.original.UnslothGRPOTrainer"


def trainer_with_hook(folder, hook, **options):
    trainer = gradients.make_trainer(GRPO, str(folder), top_entropy_quantile=0.5, **options)
    trainer.get_high_entropy_mask = hook
    return trainer


def test_the_hook_is_called_with_detached_two_dimensional_tensors_inside_the_loss(tmp_path):
    calls = []

    def hook(entropies, mask, threshold):
        calls.append((entropies.shape, mask.shape, entropies.requires_grad))
        return torch.ones_like(entropies)

    trainer_with_hook(tmp_path, hook).train()
    assert calls == [((8, 7), (8, 7), False)] * 2  # one call per micro-batch


@pytest.mark.parametrize("factor", [0.0, 2.0])
def test_the_hooks_result_multiplies_the_policy_term(tmp_path, factor):
    gradients_by_factor = {}
    for value in (1.0, factor):
        trainer = trainer_with_hook(
            tmp_path, lambda entropies, mask, threshold, v=value: torch.full_like(entropies, v)
        )
        seen = gradients.watch(trainer)
        trainer.train()
        gradients_by_factor[value] = seen["gradients"][0]
    for name, gradient in gradients_by_factor[1.0].items():
        assert torch.allclose(gradients_by_factor[factor][name], factor * gradient, atol=1e-7)


def test_an_extra_key_of_the_rollout_survives_shuffle_and_split(tmp_path):
    trainer = gradients.make_trainer(GRPO, str(tmp_path), gradient_accumulation_steps=2)
    generate, loss, seen = trainer._generate_and_score_completions, trainer.compute_loss, []

    def generate_with_tag(inputs):
        rollout = generate(inputs)
        # a (B, T) key that can be recognised
        rollout["tag"] = rollout["completion_ids"].double() * 3
        return rollout

    trainer._generate_and_score_completions = generate_with_tag
    trainer.compute_loss = lambda model, inputs, *a, **k: (
        seen.append(inputs),
        loss(model, inputs, *a, **k),
    )[1]
    trainer.train()
    assert len(seen) == 2 and all(
        torch.equal(batch["tag"], batch["completion_ids"].double() * 3) for batch in seen
    )


def test_advantages_arrive_one_dimensional(tmp_path):
    trainer = gradients.make_trainer(GRPO, str(tmp_path))
    seen = gradients.watch(trainer)
    trainer.train()
    assert seen["rollouts"][0]["advantages"].shape == (16,)


def test_the_schema_knows_every_option_of_the_installed_grpo_config():
    import dataclasses

    from gtpo.system.trl_options import grpo_options

    installed = {f.name: f for f in dataclasses.fields(trl.GRPOConfig) if f.init}
    assert installed.keys() <= grpo_options().keys()
    for name, default in (
        ("temperature", "1.0"),
        ("num_generations", "8"),
        ("beta", "0.0"),
        ("epsilon", "0.2"),
    ):
        assert grpo_options()[name].default == default == str(installed[name].default)


def test_trl_leaves_a_completion_that_no_reward_judged_out_of_its_groups_mean(tmp_path):
    rewards = iter([[None, 1.0, 3.0, 5.0] * 4])
    trainer = gradients.make_trainer(
        GRPO, str(tmp_path), reward=lambda completions, **kwargs: next(rewards)
    )
    seen = gradients.watch(trainer)
    trainer.train()
    assert seen["rollouts"][0]["advantages"][:4].tolist() == [0.0, -2.0, 0.0, 2.0]
