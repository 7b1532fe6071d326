"""How gtpo/ is divided: its size, its public names, and what importing it brings in.

`make lint` checks which part may import which; the rules stand in pyproject.toml.
"""

import importlib
import json
import subprocess
import sys

import pytest
from conftest import ROOT

HEAVY = [
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
]
# A run imports these once it has begun, so they may import what a run needs anyway.
IN_A_RUN = [
    "gtpo.shaping",
    "gtpo.gtpo_training",
    "gtpo.hooks",
    "gtpo.runs.exact_resume",
    "gtpo.runs.progress",
    "gtpo.runs.trainers",
    "gtpo.report.curves",
    "gtpo.report.page",
    "gtpo.evaluation.held_out",
    "gtpo.rewards.guarded",
]
COMMANDS = ["train_model", "evaluate_model", "report_run", "export_model"]
# Recipes, notebooks and scripts of users contain these paths.
PUBLIC = {
    "gtpo.shaping": [
        "conflict_runs",
        "conflict_tokens",
        "token_weights",
        "mean_entropy",
        "entropy_filter",
        "shaped_advantages",
        "to_loss_columns",
        "to_completion_columns",
    ],
    "gtpo.gtpo_training": [
        "UnslothGTPOTrainer",
        "override_constants",
        "CONSTANTS",
        "STATE_FILE",
        "ENT_THRESHOLD",
        "ENT_SCALE",
        "W_RAW",
        "PAD_ID",
        "EPS",
        "torch_compile_options",
    ],
    "gtpo.answers": [
        "boxed_answer",
        "gsm8k_answer",
        "final_answer",
        "reference_answer",
        "format_reference",
        "format_score",
        "same_answer",
    ],
    "gtpo.recipe": ["Recipe", "RecipeError"],
    "gtpo.errors": ["RecipeError"],
    "gtpo.runs.start": ["Request"],
    "reward_math": [
        "final_reward",
        "released_reward",
        "formatting_penalty",
        "scaled_adaptive_reward_func",
        "PERFECT_FORMAT",
        "CORRECT",
    ],
    "custom_trainer.original": ["UnslothGRPOTrainer"],
    "custom_trainer.neutral": ["NeutralGTPOTrainer"],
    "custom_trainer.released": ["ReleasedGTPOTrainer", "released_conflicts", "released_loss"],
    "train_model": ["train", "main"],
}


def modules() -> list[str]:
    """The dotted names of all modules of gtpo/."""
    paths = (path.relative_to(ROOT).with_suffix("") for path in (ROOT / "gtpo").rglob("*.py"))
    return sorted(".".join(path.parts).removesuffix(".__init__") for path in paths)


def heavy_imports(code: str) -> list[str]:
    """The heavy packages that a new process has imported after it ran `code`."""
    code = f"{code}\nimport json, sys\nprint(json.dumps([m for m in {HEAVY} if m in sys.modules]))"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def test_the_folder_has_16_entries_at_most_and_no_wing_more_than_11_modules():
    entries = [path for path in (ROOT / "gtpo").iterdir() if path.name != "__pycache__"]
    assert len([path for path in entries if path.name != "__main__.py"]) <= 16
    for wing in entries:
        assert len(list(wing.glob("*.py"))) <= 11, wing


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_stay_where_they_are(module):
    for name in PUBLIC[module]:
        assert hasattr(importlib.import_module(module), name), name


@pytest.mark.slow
def test_modules_import_nothing_heavy_before_it_is_needed():
    light = [name for name in modules() if not name.startswith(tuple(IN_A_RUN))]
    assert len(light) > 40
    assert heavy_imports("\n".join(f"import {name}" for name in light + COMMANDS)) == []


def test_rewards_import_neither_torch_nor_a_tracker():
    assert heavy_imports("import reward_math") == []


@pytest.mark.parametrize("arguments, code", [(["--help"], 0), (["--no-such-flag", "1"], 2)])
def test_help_and_mistakes_import_nothing_heavy(arguments, code):
    lines = [f"import sys, {', '.join(COMMANDS)}"]
    for command in COMMANDS:
        lines += [
            f"try:\n    code = {command}.main({arguments})",
            "except SystemExit as error:\n    code = error.code",
            f"assert code == {code}, ({command!r}, code)",
        ]
    assert heavy_imports("\n".join(lines)) == []


def test_a_mistake_in_a_recipe_imports_nothing_heavy(tmp_path):
    (tmp_path / "r.yaml").write_text("model: {model_nam: x}\ntraining: {learning_rate: fast}\n")
    code = f"import train_model\nassert train_model.main([{str(tmp_path / 'r.yaml')!r}]) == 2"
    assert heavy_imports(code) == []
