"""The section of a recipe that says how reward functions are called, and when to give up on
them.
"""

from typing import Literal

from pydantic import Field, model_validator

from gtpo.errors import RecipeError
from gtpo.recipe.sections import Section


class RewardsSection(Section):
    isolated: bool = True
    """Call reward functions in processes of their own, which can be killed; false: in ours, without
    limits of time and memory.
    """
    seconds: float = Field(30.0, gt=0)
    """Time limit for one completion; longer, and it counts as one that the function cannot
    judge.
    """
    memory: float | None = Field(4.0, gt=0)
    """Memory limit of each process, in GiB; null for none."""
    workers: int = Field(1, ge=1)
    """Processes that judge at the same time: functions beside each other, and the parts that `per`
    makes.
    """
    per: Literal["rollout", "group", "completion"] = "rollout"
    """What one call judges; group or completion shares a rollout among the workers. A function that
    compares needs its group.
    """
    max_failures: float = Field(0.2, ge=0, le=1)
    """Share of the last 100 completions that a function may fail on, beyond which the run stops,
    saved; 1 for never.
    """

    @model_validator(mode="after")
    def workers_are_processes(self):
        if self.workers > 1 and not self.isolated:
            raise RecipeError(
                "rewards.workers",
                f"{self.workers} workers are processes of their own; leave rewards.isolated at"
                " true",
            )
        return self
