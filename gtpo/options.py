"""Which of TRL's options do not go with GTPO, and which make it optimise something else than the
paper.
"""

import logging

from trl import GRPOConfig

from gtpo.system.trl_options import REQUIRED_BY_GTPO

logger = logging.getLogger(__name__)

PAPER = {"loss_type": "grpo", "scale_rewards": "none", "beta": 0.0}


def refuse_conflicting_options(arguments: GRPOConfig) -> None:
    """Raises ValueError if `arguments` use what GTPO's factor would corrupt: the entropy mask, its
    bonus, or Liger.
    """
    for option, allowed in REQUIRED_BY_GTPO.items():
        value = getattr(arguments, option)
        if value != allowed:
            raise ValueError(
                f"training.{option}: {value} does not go with GTPO, which uses TRL's entropy mask"
                f" for its own factor; leave it at {allowed}, or train with custom_trainer.original"
            )


def say_other_objectives(arguments: GRPOConfig) -> None:
    """One line for each option that departs from the paper's objective."""
    for option, value in PAPER.items():
        if getattr(arguments, option) != value:
            logger.warning(
                "[GTPO] training.%s = %s is not the paper's objective (%s)",
                option,
                getattr(arguments, option),
                value,
            )
