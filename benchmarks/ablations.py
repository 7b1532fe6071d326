"""Ablations as users would write them: small classes, chosen by dotted path.

compare.py trains them.
"""

import torch

from gtpo.gtpo_training import UnslothGTPOTrainer


class WithoutTokenWeights(UnslothGTPOTrainer):
    """GTPO with lambda = 1 everywhere."""

    def token_weights(self, rollout):
        """(B, T) ones."""
        return torch.ones_like(rollout["completion_ids"], dtype=torch.float32)
