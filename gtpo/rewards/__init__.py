"""Calling reward functions that may misbehave."""
