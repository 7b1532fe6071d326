"""Draw completions, grade them, and compute scores."""
