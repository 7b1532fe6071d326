"""The sections of a recipe that say how a run is watched: what is recorded and shown of it, and
when to raise an alarm.
"""

from typing import Annotated, Literal

from pydantic import Field

from gtpo.recipe.sections import Section


class WatchSection(Section):
    completions: bool = True
    """Keep every training completion in the run directory's completions.jsonl."""
    tokens_every: int = Field(1, ge=1)
    """Steps between two whose completions keep their per-token lists (ids, texts, weights,
    entropies; 25 bytes a token).
    """
    show_every: int | None = Field(50, ge=1)
    """Steps between two that show a good and a bad completion on the console, from the first step
    on; null for none.
    """


class AlarmSection(Section):
    action: Literal["none", "warn", "save", "stop"] = "warn"
    """What an alarm does: warn, also save a checkpoint, or save and stop the run (exit code 3)."""
    window: int = Field(20, ge=1)
    """Log lines over which metrics are averaged; an alarm needs as many."""
    entropy_above: Literal["auto"] | Annotated[float, Field(ge=0)] | None = "auto"
    """Alarm when the mean entropy (nats) is above this; auto is gtpo_runtime.ent_threshold. null
    switches an alarm off.
    """
    entropy_rising: float | None = Field(0.2, ge=0)
    """Alarm when the mean entropy rises by more than this (nats) from one window to the next."""
    entropy_low: float | None = Field(0.1, ge=0, le=1)
    """Alarm when the mean entropy is below this share of the initial one: the policy is nearly
    deterministic.
    """
    all_filtered: float | None = Field(0.99, ge=0, le=1)
    """Alarm when GTPO's entropy filter switches off at least this share of the completions."""
    format_falling: float | None = Field(0.25, ge=0, le=1)
    """Alarm when the format rate is further than this below its best."""
    no_signal: float | None = Field(0.95, ge=0, le=1)
    """Alarm when the rewards are equal in at least this share of the groups."""
    truncated: float | None = Field(0.5, ge=0, le=1)
    """Alarm when at least this share of the completions is cut off."""
    non_finite: int | None = Field(3, ge=1)
    """Alarm when this many steps within a window have a loss or gradients that are not finite."""

    def limits(self, ent_threshold: float) -> dict[str, float | None]:
        """The threshold of each condition, None for those switched off; `ent_threshold` is what
        auto means.
        """
        limits = self.model_dump(exclude={"action", "window"})
        return {name: ent_threshold if limit == "auto" else limit for name, limit in limits.items()}
