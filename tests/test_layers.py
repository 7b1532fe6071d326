"""What may be imported where: nothing heavy before it is needed, and no recipe in a trainer."""

import ast

import pytest
from conftest import ROOT

HEAVY = {
    "torch",
    "transformers",
    "trl",
    "unsloth",
    "peft",
    "datasets",
    "wandb",
    "matplotlib",
    "math_verify",
    "jinja2",
    "selenium",
}
VERBS = ["train_model.py", "evaluate_model.py", "report_run.py", "export_model.py"]
# These are imported when a run has begun, so they may import what a run needs anyway.
IN_A_RUN = {
    "shaping.py",
    "gtpo_training.py",
    "options.py",
    "runs/exact_resume.py",
    "runs/progress.py",
    "report/curves.py",
    "report/page.py",
    "evaluation/held_out.py",
    "rewards/guarded.py",
}


def imports(path, top_level_only: bool) -> set[str]:
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def light_files():
    ours = [path.relative_to(ROOT / "gtpo") for path in (ROOT / "gtpo").rglob("*.py")]
    light = [p for p in ours if str(p) not in IN_A_RUN and p.parts[0] != "hooks"]
    return sorted([ROOT / "gtpo" / path for path in light] + [ROOT / name for name in VERBS])


@pytest.mark.parametrize("path", light_files(), ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_heavy_is_imported_before_it_is_needed(path):
    assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & HEAVY


def test_rewards_import_neither_torch_nor_a_tracker():
    found = imports(ROOT / "reward_math.py", top_level_only=False)
    assert not {name.split(".")[0] for name in found} & HEAVY


def test_trainers_know_no_recipe():
    trainers = (ROOT / "gtpo/gtpo_training.py", *(ROOT / "custom_trainer").glob("*.py"))
    for path in trainers:
        assert not {name for name in imports(path, top_level_only=False) if "recipe" in name}, path
