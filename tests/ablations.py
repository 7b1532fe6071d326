"""Variants as a user would write them: five lines, chosen by dotted path."""

import torch

from gtpo.gtpo_training import UnslothGTPOTrainer


class WithoutTokenWeights(UnslothGTPOTrainer):
    """GTPO with lambda = 1 everywhere."""

    def token_weights(self, rollout):
        return torch.ones_like(rollout["completion_ids"], dtype=torch.float32)
