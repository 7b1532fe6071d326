"""Imports point down: the table of house rules, held against the imports in the sources."""

import ast

import pytest
from conftest import ROOT

# module -> modules of ours; at the top of the file or inside functions
MAY_IMPORT = {
    "errors": set(),
    "trl_options": set(),
    "kinds": set(),
    "sections": {"kinds", "trl_options"},
    "recipe": {
        "kinds",
        "rewards_sections",
        "safe_text",
        "sections",
        "trl_options",
        "watch_sections",
    },
    "schema": {"recipe", "sections", "trl_options"},
    "mistakes": {"recipe", "schema", "sections"},
    "dotted_paths": set(),
    "yaml_text": set(),
    "safe_text": set(),
    "environment": set(),
    "console": {"processes", "safe_text"},
    "cli": {"dotted_paths", "mistakes", "recipe", "schema", "sections", "yaml_text"},
    "answers": {"spellings", "verifier"},
    "spellings": set(),
    "verifier": set(),
    "shaping": set(),
    "nonfinite": set(),
    "streaming_head": set(),
    "groups": {"shaping"},
    "options": {"trl_options"},
    "hub": {"recipe"},
    "data": {"answers", "hub", "recipe", "sections"},
    "base_model": {"hub", "recipe", "sections"},
    "adapters": {"recipe"},
    "backends": {
        "adapters",
        "base_model",
        "chat_tokenizer",
        "generation",
        "importing",
        "merging",
        "recipe",
        "sections",
        "whole_files",
    },
    "chat_tokenizer": {"base_model", "recipe", "sections"},
    "importing": set(),
    "merging": set(),
    "arguments": {"recipe", "sections", "trl_options"},
    "watch": {"alarm", "recipe", "recorder", "safe_text"},
    "alarm": set(),
    "watch_sections": {"sections"},
    "rewards_sections": {"sections"},
    "judge_call": set(),
    "judge_process": {"judge_call"},
    "verdicts": set(),
    "failures": {"safe_text", "verdicts"},
    "judges": {"failures", "judge_call", "judge_process", "recipe", "rewards_sections", "verdicts"},
    "recorder": {"groups", "shaping", "token_texts"},
    "token_texts": set(),
    "runs": {"cli", "recipe", "rewinding", "safe_text", "starts", "trackers", "whole_files"},
    "plan": {"arguments", "cli", "data", "recipe"},
    "problems": {"arguments", "cli", "data", "recipe"},
    "saved": {
        "adapters",
        "arguments",
        "backends",
        "base_model",
        "chat_tokenizer",
        "cli",
        "recipe",
        "sections",
    },
    "estimators": {"answers"},
    "scores": {"estimators", "evaluation_file", "recipe"},
    "evaluation_file": {"recipe", "whole_files"},
    "generation": {"processes", "recipe", "sections"},
    "evaluation": {"answers", "evaluation_file", "generation", "recipe"},
    "engines": {"adapters", "backends", "generation", "recipe", "saved"},
    "chat": {"generation", "safe_text"},
    "evaluation_plan": {
        "dotted_paths",
        "evaluation",
        "evaluation_file",
        "generation",
        "kinds",
        "problems",
        "recipe",
        "saved",
        "scores",
        "sections",
    },
    "held_out": {"evaluation", "evaluation_file", "generation", "interruption", "recipe", "scores"},
    "continuation": {"adapters", "chat_tokenizer", "recipe", "saved", "sections"},
    "fidelity": set(),
    "model_card": {"base_model", "data", "evaluation_file", "recipe", "scores", "whole_files"},
    "export": {
        "adapters",
        "base_model",
        "fidelity",
        "model_card",
        "recipe",
        "saved",
        "whole_files",
    },
    "completion_log": {"answers"},
    "run_record": {"completion_log", "evaluation_file", "recipe", "scores", "yaml_text"},
    "configurations": {"run_record"},
    "curves": {"configurations"},
    "conflict_view": {"completion_log", "configurations", "recipe", "run_record"},
    "summary": {"configurations", "curves", "scores"},
    "reports": {
        "configurations",
        "conflict_view",
        "curves",
        "recipe",
        "run_record",
        "scores",
        "summary",
        "whole_files",
    },
    "whole_files": set(),
    "processes": set(),
    "endings": {"console", "interruption", "processes", "recipe"},
    "interruption": {"processes"},
    "checkpoints": {"recipe", "whole_files"},
    "changes": {"recipe"},
    "other_processes": {"recipe"},
    "sharding": {"processes", "recipe"},
    "starts": {"changes", "checkpoints", "other_processes", "recipe"},
    "rewinding": {"checkpoints", "starts", "whole_files"},
    "trackers": {"recipe", "starts", "whole_files"},
    "troubles": {"checkpoints", "processes", "recipe"},
    "exact_resume": {
        "checkpoints",
        "interruption",
        "other_processes",
        "recipe",
        "starts",
        "whole_files",
    },
    "findings": {"safe_text"},
    "memory": {"merging", "recipe", "sections"},
    "room": {"arguments", "generation", "memory", "recipe", "trl_options"},
    "reward_doctor": {
        "answers",
        "cli",
        "findings",
        "judge_call",
        "judge_process",
        "rewards_sections",
        "verdicts",
    },
    "checks": {
        "arguments",
        "backends",
        "base_model",
        "chat_tokenizer",
        "cli",
        "continuation",
        "data",
        "environment",
        "findings",
        "hub",
        "imported",
        "memory",
        "problems",
        "recipe",
        "reward_doctor",
        "room",
        "trackers",
        "safe_text",
        "starts",
    },
    "preflight": {"checks", "cli", "findings", "recipe", "starts"},
    "imported": {"cli", "gtpo_training", "recipe"},
    "gtpo_training": {"shaping", "groups", "nonfinite", "options", "streaming_head"},
}
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
LIGHT = {
    "errors",
    "imported",
    "importing",
    "merging",
    "findings",
    "memory",
    "room",
    "reward_doctor",
    "checks",
    "preflight",
    "console",
    "spellings",
    "yaml_text",
    "safe_text",
    "environment",
    "trl_options",
    "sections",
    "recipe",
    "schema",
    "mistakes",
    "dotted_paths",
    "cli",
    "answers",
    "verifier",
    "data",
    "adapters",
    "backends",
    "base_model",
    "saved",
    "chat_tokenizer",
    "arguments",
    "evaluation",
    "runs",
    "hub",
    "plan",
    "kinds",
    "problems",
    "watch_sections",
    "rewards_sections",
    "judge_call",
    "judge_process",
    "verdicts",
    "failures",
    "continuation",
    "fidelity",
    "model_card",
    "export",
    "estimators",
    "scores",
    "evaluation_file",
    "generation",
    "whole_files",
    "processes",
    "endings",
    "interruption",
    "checkpoints",
    "changes",
    "other_processes",
    "starts",
    "rewinding",
    "trackers",
    "troubles",
    "engines",
    "chat",
    "evaluation_plan",
    "completion_log",
    "run_record",
    "configurations",
    "curves",
    "conflict_view",
    "summary",
    "reports",
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


def modules():
    return sorted(path for path in (ROOT / "gtpo").glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("path", modules(), ids=lambda p: p.stem)
def test_a_module_imports_only_what_lies_below_it(path):
    ours = {
        name.split(".")[1]
        for name in imports(path, top_level_only=False)
        if name.startswith("gtpo.")
    }
    ours &= {p.stem for p in modules()} - {"errors"}
    assert ours <= MAY_IMPORT[path.stem]


@pytest.mark.parametrize(
    "path",
    [p for p in modules() if p.stem in LIGHT]
    + [
        ROOT / "train_model.py",
        ROOT / "evaluate_model.py",
        ROOT / "report_run.py",
        ROOT / "export_model.py",
        ROOT / "reward_math.py",
    ],
    ids=lambda p: p.stem,
)
def test_nothing_heavy_is_imported_before_it_is_needed(path):
    assert not {name.split(".")[0] for name in imports(path, top_level_only=True)} & HEAVY


def test_rewards_import_neither_torch_nor_a_tracker():
    assert (
        not {name.split(".")[0] for name in imports(ROOT / "reward_math.py", top_level_only=False)}
        & HEAVY
    )


def test_trainers_know_no_recipe():
    for path in (ROOT / "gtpo/gtpo_training.py", *(ROOT / "custom_trainer").glob("*.py")):
        assert not {
            name
            for name in imports(path, top_level_only=False)
            if "recipe" in name or "cli" in name
        }, path.name
