"""What can be attached to any `trl.GRPOTrainer`. Nothing here knows a recipe."""
