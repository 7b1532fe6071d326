"""Trainers that a recipe names by dotted path: the GRPO baseline, two variants, and your own."""
