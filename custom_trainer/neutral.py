"""A variant that is not in the paper: conflict tokens get no push at all, on either side.

GTPO's weights, 2 and 0, turn the nearly balanced pushes on a shared token into a steady push
upwards. That push makes completions more alike and the policy more certain (docs/results.md). Here
a conflict token is neither rewarded nor punished. Shared formatting is spared as in GTPO, without
the push.
"""

from torch import Tensor

from gtpo import gtpo_training, shaping


class NeutralGTPOTrainer(gtpo_training.UnslothGTPOTrainer):
    """The only change: lambda is 0 on the conflict tokens of positive completions too.

    W_RAW has no effect.
    """

    def token_weights(self, rollout: dict[str, Tensor]) -> Tensor:
        """lambda, (N, T): 0 on conflict tokens, 1 elsewhere."""
        return shaping.token_weights(
            rollout["prefix"] | rollout["suffix"], rollout["advantages"], 0.0
        )
