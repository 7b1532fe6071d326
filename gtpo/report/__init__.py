"""What people read about a run: report pages, curves and model cards."""
