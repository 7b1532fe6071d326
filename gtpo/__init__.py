"""GTPO: Group-relative Trajectory-based Policy Optimization (arXiv 2508.03772) for LoRA adapters.

Which door to open: `gtpo.shaping` is the method as tensor functions, `gtpo.gtpo_training` is the
trainer, `gtpo.data` reads datasets, and `gtpo.preflight` checks a recipe. A whole run is
`train_model.py`. Each wing (folder) says in its first line what it does. In a script of your own,
`gtpo.GTPOTrainer` takes the place of `trl.GRPOTrainer`, and `gtpo.GTPOConfig` that of
`trl.GRPOConfig`. Both load TRL when they are first used, because Unsloth must be imported before
it. So importing `gtpo` imports nothing heavy.
"""

__version__ = "0.1.0"


def __getattr__(name: str):
    """`GTPOTrainer` and `GTPOConfig`, imported at their first use."""
    if name == "GTPOTrainer":
        from gtpo.gtpo_training import UnslothGTPOTrainer

        return UnslothGTPOTrainer
    if name == "GTPOConfig":
        from gtpo.gtpo_training import GTPOConfig

        return GTPOConfig
    raise AttributeError(f"module 'gtpo' has no attribute {name!r}")
