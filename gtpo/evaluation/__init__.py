"""Sample completions, grade them, count."""
