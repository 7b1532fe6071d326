"""Real faults: what is killed, stopped, filled up or damaged loses nothing.

`make soak` injects more of them.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from conftest import ROOT

from gtpo.errors import RecipeError
from gtpo.hooks.seams import TRACKER_EVENTS
from gtpo.models.adapters import checkpoint_folders
from gtpo.recipe import command_line as cli
from gtpo.runs import checkpoints, endings, trackers
from gtpo.system.signals import Interrupted, Interruption
from gtpo.system.whole_files import (
    files_written_aside,
    remove_leftovers,
    write_whole,
    written_aside,
)

FAULTS = (
    "sigkill", "sigterm", "second_ctrl_c", "truncated", "disk_full", "no_memory", "tracker_dies",
    "no_network",
)  # fmt: skip


@pytest.fixture(scope="module")
def soak() -> dict[str, list[str]]:
    """The words of the line that a short soak prints about each fault.

    The second word is the number of injected faults, the last one lists the losses. The key "all"
    has all lines.
    """
    done = subprocess.run(
        [sys.executable, "reliability/soak.py", *"--rounds 2 --steps 5 --seed 1".split()],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    by_fault = {row[0]: row for row in rows if row and row[0] in FAULTS}
    assert by_fault.keys() == {*FAULTS}, done.stdout + done.stderr
    return {**by_fault, "all": done.stdout.splitlines()}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost(soak, fault):
    assert int(soak[fault][1]) >= 1 and soak[fault][-1] == "none", "\n".join(soak["all"])


# ---- files


def test_an_incomplete_file_or_folder_leaves_the_old_one_as_it_was(tmp_path):
    write_whole(tmp_path / "a", "old")
    for path in (tmp_path / "a", tmp_path / "folder"):
        with pytest.raises(KeyError), written_aside(path) as aside:
            if path.name == "folder":
                aside.mkdir()
                aside = aside / "x"
            aside.write_text("half")
            raise KeyError
    with pytest.raises(KeyError), files_written_aside(tmp_path) as aside:
        (aside / "a").write_text("half")
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_complete_folder_replaces_the_old_one(tmp_path):
    for text in ("old", "new"):
        with written_aside(tmp_path / "folder") as aside:
            aside.mkdir()
            (aside / text).touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new"]


def test_leftovers_of_a_crash_are_removed_and_an_old_folder_without_a_new_one_is_restored(tmp_path):
    for name in (".partial-a", ".partial-old-b", ".partial-old-c", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
    assert (tmp_path / "b/.partial-old-b").exists() and (tmp_path / "c/c").exists()


# ---- signals


def test_a_signal_ends_a_run_at_once_unless_it_is_deferred():
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    for signum, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with pytest.raises(Interrupted) as stopped, Interruption().handling_signals():
            os.kill(os.getpid(), signum)
        assert stopped.value.exit_code == code
        with Interruption().handling_signals() as interruption:
            with interruption.deferred():
                os.kill(os.getpid(), signum)
                # The launcher and the terminal both send one.
                os.kill(os.getpid(), signum)
            assert interruption.requested
            with pytest.raises(Interrupted, match="saved"):
                interruption.raise_if_requested("saved")
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_an_error_that_ends_the_run_is_not_replaced_by_a_signal():
    """torchrun sends SIGTERM to processes that fail because another one has died."""
    with Interruption().handling_signals() as interruption, pytest.raises(ZeroDivisionError):
        try:
            with interruption.deferred():
                raise ZeroDivisionError
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
    assert not interruption.requested


def test_a_signal_that_a_library_turns_into_an_error_stays_a_signal():
    def lazy_import():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        except BaseException as error:
            raise ModuleNotFoundError("Could not import module") from error

    with Interruption().handling_signals() as interruption:
        with pytest.raises(ZeroDivisionError), interruption.unwrapped():
            raise ZeroDivisionError
        with (
            pytest.raises(Interrupted, match="nothing is lost") as stopped,
            interruption.unwrapped(),
        ):
            lazy_import()
        assert stopped.value.exit_code == 143
        with pytest.raises(ZeroDivisionError), interruption.unwrapped(), interruption.deferred():
            raise ZeroDivisionError  # a step ends with its own error


# ---- errors of the machine as one sentence


RECIPE = (
    "model: {model_name: some/model}\ndataset: {name: gsm8k}\ntraining:"
    " {per_device_train_batch_size: 8, gradient_checkpointing: false}\n"
)


def sentence(tmp_path, error: Exception, *, checkpoint: bool = True) -> str:
    """What a run says that ends with `error`, with or without a checkpoint."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    recipe = cli.read_recipe([str(tmp_path / "r.yaml")])
    if checkpoint:
        (tmp_path / "checkpoint-7").mkdir(exist_ok=True)
    with pytest.raises(RecipeError) as raised, endings.explained(recipe, tmp_path):
        raise error
    return str(raised.value)


def test_too_little_memory_names_the_keys_that_save_some(tmp_path):
    import torch

    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50)
    cuda = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
    )
    cases = (real.value, "this machine"), (MemoryError(), "this machine"), (cuda, "the GPU")
    for error, device in cases:
        text = sentence(tmp_path, error)
        assert text.startswith(f"memory: {device} has too little for this recipe (")
        assert (
            "Lower training.per_device_train_batch_size (now 8; raise gradient_accumulation_steps"
            " by as much), model.max_seq_length (now 5500) or training.num_generations (now 8), or"
            " set training.gradient_checkpointing to true. Everything up to checkpoint-7 is saved:"
            " continue with --resume --force-resume" in text
        )


def test_a_disk_that_cannot_be_written_to_is_reported_for_every_library_that_writes(tmp_path):
    import torch
    from safetensors import SafetensorError

    full = OSError(errno.ENOSPC, "No space left on device", "/runs/completions.jsonl")
    assert (
        sentence(tmp_path, full, checkpoint=False)
        == "/runs/completions.jsonl: cannot be written (No space left on device); free some"
        " space, or change the permissions. There is no checkpoint yet: start again with --resume"
    )
    read_only = OSError(errno.EROFS, "Read-only file system", "/runs/x")
    saved = "Everything up to checkpoint-7 is saved: continue with --resume"
    assert saved in sentence(tmp_path, read_only)
    reason = "No space left on device (os error 28)"
    safetensors_error = SafetensorError(f"Error while serializing: I/O error: {reason}")
    assert reason in sentence(tmp_path, safetensors_error)
    if os.path.exists("/dev/full"):
        with pytest.raises(RuntimeError) as real:
            torch.save({"a": torch.zeros(10**6)}, "/dev/full")
        assert f"{tmp_path}: cannot be written (" in sentence(tmp_path, real.value)


def test_an_error_in_the_code_stays_that_error(tmp_path):
    missing = FileNotFoundError(errno.ENOENT, "No such file", "x")
    for error in (KeyError("x"), missing, RuntimeError("shapes differ")):
        with pytest.raises(type(error)), endings.explained(None, tmp_path):
            raise error


# ---- trackers and checkpoints


def test_a_tracker_that_fails_is_reported_once_and_not_called_again(caplog):
    calls = []

    def failing(event: str):
        def call(*args, **kwargs):
            calls.append(event)
            raise OSError("gone\nfor good")

        return call

    module = {"__module__": "transformers.integrations.integration_utils"}
    tracker = type("WandbCallback", (), module)()
    for event in TRACKER_EVENTS:
        setattr(tracker, event, failing(event))
    console = SimpleNamespace(on_log=lambda: calls.append("console"))
    handler = SimpleNamespace(callbacks=[tracker, console])
    trackers.shield_trackers(SimpleNamespace(callback_handler=handler))
    with pytest.raises(OSError):
        tracker.on_train_begin()
    tracker.on_log()
    tracker.on_log()
    tracker.on_save()
    console.on_log()
    assert calls == ["on_train_begin", "on_log", "console"]
    assert [record.getMessage() for record in caplog.records] == [
        "[GTPO] wandb fails (OSError: gone); the run continues without it, and the run directory"
        " has everything"
    ]


def test_wandb_log_is_shielded_again_in_the_next_run_of_a_process(monkeypatch, caplog):
    def failing_log(*args):
        raise OSError("gone")

    wandb = SimpleNamespace(run=object(), log=failing_log)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    module = {"__module__": "transformers.integrations.integration_utils"}
    for _ in range(2):  # the program's own wandb run stays open
        tracker = type("WandbCallback", (), module)()
        for event in TRACKER_EVENTS:
            setattr(tracker, event, lambda *args: None)
        handler = SimpleNamespace(callbacks=[tracker])
        trackers.shield_trackers(SimpleNamespace(callback_handler=handler))
        tracker.on_train_begin()
        wandb.log({"reward": 1})
    assert caplog.text.count("wandb fails (OSError: gone)") == 2


def test_a_checkpoint_has_no_name_before_it_is_whole(tmp_path, monkeypatch):
    written = tmp_path / ".partial-saving/checkpoint-3"
    written.mkdir(parents=True)
    (written / "optimizer.pt").write_text("x")

    def disk_full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(json, "dumps", disk_full)
        checkpoints.publish(written, tmp_path / "checkpoint-3", step=3)
    assert checkpoint_folders(tmp_path) == []
    checkpoints.publish(written, tmp_path / "checkpoint-3", step=3)
    assert checkpoints.read(tmp_path / "checkpoint-3").step == 3
