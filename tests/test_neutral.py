"""The neutral variant: conflict tokens weigh nothing on both sides, everything else is GTPO."""

import pytest
import recordings
import torch


@pytest.mark.slow
def test_conflict_tokens_of_both_signs_weigh_nothing_and_all_others_one(tmp_path):
    trainer = "custom_trainer.neutral.NeutralGTPOTrainer"
    lines = recordings.record(trainer, tmp_path, peaked=4.0)["lines"]
    marked = 0
    for line in lines:
        length = len(line["ids"])
        conflicts = [
            place < line["prefix"] or place >= length - line["suffix"] for place in range(length)
        ]
        assert line["weights"] == [0.0 if conflict else 1.0 for conflict in conflicts]
        marked += sum(conflicts) * (line["advantage"] > 0)
    assert marked, "no positive completion has a conflict token, so nothing was tested"


def test_w_raw_has_no_effect(monkeypatch):
    from custom_trainer.neutral import NeutralGTPOTrainer
    from gtpo import gtpo_training

    monkeypatch.setattr(gtpo_training, "W_RAW", 7.0)
    rollout = {
        "prefix": torch.tensor([[True, False]] * 2),
        "suffix": torch.tensor([[False, False]] * 2),
        "advantages": torch.tensor([1.0, -1.0]),
    }
    assert NeutralGTPOTrainer.token_weights(None, rollout).tolist() == [[0.0, 1.0], [0.0, 1.0]]
