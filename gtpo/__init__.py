"""GTPO: Group-relative Trajectory-based Policy Optimization (arXiv 2508.03772) for LoRA adapters.

Open `gtpo/shaping.py` for the algorithm, `gtpo/gtpo_training.py` for the trainer, `train_model.py`
for a run. This file imports nothing: Unsloth must be imported before TRL, and only the verbs know
when.
"""

__version__ = "0.1.0"
