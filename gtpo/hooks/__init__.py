"""What we attach to any `trl.GRPOTrainer`. Nothing here knows a recipe."""
