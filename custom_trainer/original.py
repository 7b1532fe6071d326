"""The GRPO baseline under the name that recipes use: TRL's trainer, or Unsloth's version of it."""

import trl


class UnslothGRPOTrainer(trl.GRPOTrainer):
    """GRPO unchanged, to compare GTPO with: it has no token weights and no entropy filter."""
