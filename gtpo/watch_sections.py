"""The sections of a recipe that say how a run is watched: what is recorded and shown while it trains."""

from pydantic import Field

from gtpo.sections import Section


class WatchSection(Section):
    completions: bool = True
    """Keep every training completion in the run directory's completions.jsonl."""
    tokens_every: int = Field(1, ge=1)
    """Steps between two whose completions keep their per-token lists (ids, texts, weights, entropies; 25 bytes a token)."""
