"""Short runs of recipes/demo.yaml: their command line, and what they leave."""

import json
from pathlib import Path

from conftest import ROOT, split_flags


def demo_flags(*more: str) -> list[str]:
    """The command line of recipes/demo.yaml with two short steps and no evaluation."""
    return split_flags(
        str(ROOT / "recipes/demo.yaml"),
        "--model-name",
        str(ROOT / "demo/model"),
        "--dataset.path",
        str(ROOT / "demo/data/train.jsonl"),
        "--evaluation.path null --training.max_steps 2 --training.save_steps 1",
        "--training.per_device_train_batch_size 8",
        *more,
    )


def train(*flags: str) -> int:
    """The exit code of train_model.py with `demo_flags`."""
    import train_model

    return train_model.main(demo_flags(*flags))


def run_dir(folder: Path, name: str = "demo") -> Path:
    """The only directory of a run with this name, under `folder`/runs."""
    (run,) = (folder / "runs").glob(f"{name}_adam1-*")
    return run


def history(folder) -> list[dict]:
    """The log lines in a run's trainer_state.json."""
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]
