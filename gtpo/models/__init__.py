"""Models on disk and in memory: find, load, generate, export."""
