"""The GRPO baseline: TRL's trainer (or the one Unsloth generates from it) under the name recipes
use.
"""

import trl


class UnslothGRPOTrainer(trl.GRPOTrainer):
    """GRPO, unchanged: the baseline to compare GTPO with. Knows neither token weights nor the
    entropy filter.
    """
