"""What a run leaves for people: pages, curves, model cards."""
