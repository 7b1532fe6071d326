"""What an earlier commit wrote still works. tests/compat/README.md says how it was made."""

import importlib
import importlib.metadata
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from gtpo.recipe import command_line
from reliability.resume_proof import differences, outcome

pytestmark = pytest.mark.slow  # trains and starts processes

FILES = ROOT / "tests/compat"
RECIPES = json.loads((FILES / "recipes.json").read_text(encoding="utf-8"))
MADE_WITH = {"torch": "2.13.0", "transformers": "5.17.0", "trl": "1.13.0", "peft": "0.21.2"}


@pytest.fixture
def run_dir(unpacked, tmp_path):
    """Copies a run into a directory of the test's own: `run_dir("finished")`."""

    def copied(name: str) -> Path:
        (run,) = unpacked.glob(f"{name}_*")
        return Path(shutil.copytree(run, tmp_path / "compat" / run.name))

    return copied


def in_new_process(*words) -> subprocess.CompletedProcess:
    """Runs Python in the repository, as a user does, and requires exit code 0."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture
def verb(capsys, monkeypatch):
    """Runs a verb in this process and in the repository, and requires exit code 0.

    `verb("report_run", run)` returns what it printed, as `out` and `err`.
    """
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", list(sys.path))  # recipes extend it

    def run(name: str, *arguments, stdin: str = ""):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        code = importlib.import_module(name).main([str(word) for word in arguments])
        printed = capsys.readouterr()
        assert code == 0, printed.err[-3000:]
        return printed

    return run


def resume_flags(run: Path, *flags) -> list:
    return [run / "recipe.yaml", "--resume", "--output_root", run.parent, *flags]


def same_bits_are_expected() -> str | None:
    """Why this machine need not repeat the recorded bits; None where it must."""
    for library, version in MADE_WITH.items():
        installed = importlib.metadata.version(library).partition("+")[0]
        if installed != version:
            return f"the run was made with {library} {version}, and {installed} is installed"
    probe = in_new_process("tests/compat/probe.py").stdout.strip()
    if probe != (FILES / "probe.txt").read_text().strip():
        return "this machine gives other bits than the one that made the run (compat/probe.py)"
    return None


@pytest.mark.parametrize("file", RECIPES)
def test_recipes_keep_their_values_and_their_run_directory(file, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPES[file]["text"], encoding="utf-8")
    recipe = command_line.read_recipe([str(path)])
    assert recipe.output_dir() == RECIPES[file]["run_directory"]
    now, then = recipe.saved()[0], RECIPES[file]["resolved"]
    for section, values in then.items():
        if isinstance(values, dict):
            assert now[section].items() >= values.items()
        else:
            assert now[section] == values


def test_a_run_interrupted_within_a_rollout_goes_on_bit_for_bit(run_dir, unpacked, tmp_path):
    run = run_dir("interrupted")
    in_new_process("train_model.py", *resume_flags(run))
    reason = same_bits_are_expected()
    if reason:
        pytest.skip(f"the run resumed; its bits were not compared: {reason}")
    (tmp_path / "straight").mkdir()
    shutil.copytree(unpacked / "straight", tmp_path / "straight/run")
    resumed, straight = outcome(run.parent), outcome(tmp_path / "straight")
    for result in (resumed, straight):
        # Callbacks keep their state under other names now. The values must be the same.
        callbacks = result["resume_state_0.pt"].pop("callbacks")
        result["callbacks"] = sorted(callbacks.values(), key=lambda state: sorted(state))
        result["state"].pop("stateful_callbacks")
        # Headers of evaluations have the version of the grading rules since then.
        for name in [name for name in result if name.startswith("evaluation/")]:
            result[name] = result[name].replace(b'"grading": 2, ', b"")
    # Lines of completions have further keys since then.
    earlier, now = (
        [json.loads(line) for line in result.pop("completions.jsonl").splitlines()]
        for result in (straight, resumed)
    )
    assert [{key: line[key] for key in earlier[0]} for line in now] == earlier
    assert differences(straight, resumed) == []


def test_a_finished_run_says_so_and_trains_on(verb, run_dir):
    run = run_dir("finished")
    adapter = (run / "adapter_model.safetensors").read_bytes()
    assert "finished" in verb("train_model", *resume_flags(run)).err
    assert (run / "adapter_model.safetensors").read_bytes() == adapter
    verb("train_model", *resume_flags(run, "--training.max_steps", "8"))
    assert json.loads((run / "trainer_state.json").read_text())["global_step"] == 8
    assert (run / "adapter_model.safetensors").read_bytes() != adapter


def test_a_new_run_starts_from_its_adapter(verb, run_dir, tmp_path):
    run = run_dir("finished")
    verb(
        "train_model",
        run / "recipe.yaml",
        *("--model.adapter", run / "checkpoint-3", "--run-name", "second"),
        *("--output_root", tmp_path, "--training.max_steps", "1"),
    )
    assert list(tmp_path.glob("second_*/adapter_model.safetensors"))


def test_a_complete_evaluation_is_read_and_not_drawn_again(verb, run_dir):
    run = run_dir("finished")
    file = run / "evaluation/test-8x2-t1.jsonl"
    before = file.read_bytes()
    evaluated = verb("evaluate_model", run, "--samples", "2", "--limit", "8")
    assert file.read_bytes() == before
    assert "format rate   93.8 %" in evaluated.out
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "after.jsonl",
        "before.jsonl",
        "test-8x2-t1.jsonl",
    ]


def test_its_evaluations_are_counted_and_compared_without_a_model(verb, run_dir):
    folder = run_dir("finished") / "evaluation"
    counted = verb("evaluate_model", "--from", folder / "test-8x2-t1.jsonl", "--k", "1", "2")
    assert "pass@2" in counted.out
    compared = verb("evaluate_model", "--from", folder / "before.jsonl", folder / "after.jsonl")
    assert "62.5 %" in compared.out


def test_a_new_evaluation_and_a_chat_use_its_adapter(verb, run_dir, tmp_path):
    run = run_dir("interrupted")
    target = tmp_path / "new.jsonl"
    verb("evaluate_model", run, "--limit", "4", "--to", target)
    assert len(target.read_text().splitlines()) == 5
    said = verb("evaluate_model", run / "checkpoint-3", "--chat", stdin="What is 1 + 2?\n/exit\n")
    assert said.out.strip()


@pytest.mark.parametrize("name", ["finished", "interrupted"])
def test_its_report_shows_its_steps_and_completions(name, verb, run_dir):
    run = run_dir(name)
    verb("report_run", run)
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "shells" in page
    assert (run / "curves.png").stat().st_size > 10_000


def test_two_of_its_runs_are_compared(verb, run_dir, tmp_path):
    runs = [run_dir("finished"), run_dir("interrupted")]
    verb("report_run", *runs, "--out", tmp_path / "both")
    assert (tmp_path / "both/report.html").is_file()


def test_its_adapter_is_merged(verb, run_dir, tmp_path):
    verb("export_model", run_dir("finished"), tmp_path / "merged", "--dtype", "float32")
    assert (tmp_path / "merged/model.safetensors").is_file()
