"""A variant of ours: conflict tokens are left alone on both sides, so that their net push is
exactly zero.

GTPO's weights, 2 and 0, turn the nearly balanced pushes on a shared token into a steady push
upwards, which makes the completions more alike and the policy more certain (docs/results.md). Here
a conflict token is neither rewarded nor punished: the format is spared as in GTPO, without that
push.
"""

from torch import Tensor

from gtpo import gtpo_training, shaping


class NeutralGTPOTrainer(gtpo_training.UnslothGTPOTrainer):
    """The only change: lambda is 0 on the conflict tokens of positive completions too, whatever
    W_RAW says.
    """

    def token_weights(self, rollout: dict[str, Tensor]) -> Tensor:
        return shaping.token_weights(
            rollout["prefix"] | rollout["suffix"], rollout["advantages"], 0.0
        )
