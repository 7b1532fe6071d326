"""Trainers chosen by dotted path: the GRPO baseline, the released variant, and yours."""
