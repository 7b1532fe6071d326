"""Real faults, injected: what is killed, stopped, filled or damaged loses nothing. `make soak` does
more rounds of it.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import time

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

FAULTS = [
    "sigkill",
    "sigterm",
    "second_ctrl_c",
    "truncated",
    "disk_full",
    "no_memory",
    "tracker_dies",
    "no_network",
]


@pytest.fixture(scope="module")
def soak() -> dict[str, list[str]]:
    """What a short soak says of each fault: how many were injected, steps repeated, losses."""
    command = [
        sys.executable,
        "reliability/soak.py",
        "--rounds",
        "2",
        "--steps",
        "5",
        "--seed",
        "1",
    ]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    lines = {
        line.split()[0]: line.split()
        for line in done.stdout.splitlines()
        if line.split()[:1] and line.split()[0] in FAULTS
    }
    assert lines.keys() == {*FAULTS}, done.stdout + done.stderr
    return {**lines, "all": done.stdout.splitlines()}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_nothing_is_lost_by(soak, fault):
    assert int(soak[fault][1]) >= 1 and soak[fault][-1] == "none", "\n".join(soak["all"])


# ---- files


def test_a_file_or_folder_that_is_not_written_to_its_end_leaves_the_old_one_as_it_was(tmp_path):
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
    assert [path.name for path in tmp_path.iterdir()] == ["a"] and (
        tmp_path / "a"
    ).read_text() == "old"


def test_a_folder_takes_the_place_of_another(tmp_path):
    for text in ("old", "new"):
        with written_aside(tmp_path / "folder") as aside:
            aside.mkdir()
            (aside / text).touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["folder", "new"]


def test_what_a_crash_left_aside_is_removed_and_an_old_folder_without_a_successor_comes_back(
    tmp_path,
):
    for name in (".partial-a", ".partial-old-b", ".partial-old-c", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    remove_leftovers(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]
    assert (tmp_path / "b/.partial-old-b").exists() and (tmp_path / "c/c").exists()


# ---- signals


def test_a_signal_with_nothing_to_save_ends_the_run_there_and_else_is_noted():
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    for signum, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        with pytest.raises(Interrupted) as stopped, Interruption().handling_signals():
            os.kill(os.getpid(), signum)
        assert stopped.value.exit_code == code
        with Interruption().handling_signals() as interruption:
            with interruption.deferred():
                os.kill(os.getpid(), signum)
                # at the same time: the launcher's, and the terminal's
                os.kill(os.getpid(), signum)
            assert interruption.requested
            with pytest.raises(Interrupted, match="saved"):
                interruption.raise_if_requested("saved")
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_signal_does_not_overtake_an_error_on_its_way_out():
    """torchrun sends SIGTERM to those that fail because another process has died."""
    with Interruption().handling_signals() as interruption, pytest.raises(ZeroDivisionError):
        try:
            with interruption.deferred():
                raise ZeroDivisionError
        finally:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
    assert not interruption.requested


def test_a_signal_that_a_library_mistakes_for_an_error_of_its_own_stays_a_signal():
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
            raise ZeroDivisionError  # in a step that has been finished all the same


# ---- one sentence


RECIPE = (
    "model: {model_name: some/model}\ndataset: {name: gsm8k}\ntraining:"
    " {per_device_train_batch_size: 8, gradient_checkpointing: false}\n"
)


def sentence(tmp_path, error: Exception, *, checkpoint: bool = True) -> str:
    (tmp_path / "r.yaml").write_text(RECIPE)
    recipe = cli.read_recipe([str(tmp_path / "r.yaml")])
    if checkpoint:
        (tmp_path / "checkpoint-7").mkdir(exist_ok=True)
    with pytest.raises(RecipeError) as told, endings.explained(recipe, tmp_path):
        raise error
    return str(told.value)


def test_too_little_memory_names_the_keys_that_help(tmp_path):
    import torch

    with pytest.raises(RuntimeError) as real:
        torch.empty(2**50)
    cuda = torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of ..."
    )
    for error, device in (
        (real.value, "this machine"),
        (MemoryError(), "this machine"),
        (cuda, "the GPU"),
    ):
        told = sentence(tmp_path, error)
        assert told.startswith(f"memory: {device} has too little for this recipe (")
        assert (
            "Lower training.per_device_train_batch_size (now 8; raise gradient_accumulation_steps"
            " by as much), model.max_seq_length (now 5500) or training.num_generations (now 8), or"
            " set training.gradient_checkpointing to true. Everything up to checkpoint-7 is saved:"
            " continue with --resume --force-resume" in told
        )


def test_a_disk_that_cannot_be_written_to_is_told_by_its_file_whichever_library_wrote(tmp_path):
    import torch
    from safetensors import SafetensorError

    full = OSError(errno.ENOSPC, "No space left on device", "/runs/completions.jsonl")
    assert (
        sentence(tmp_path, full, checkpoint=False)
        == "/runs/completions.jsonl: cannot be written (No space left on device); free some"
        " space, or change the permissions. There is no checkpoint yet: start again with --resume"
    )
    read_only = OSError(errno.EROFS, "Read-only file system", "/runs/x")
    assert "Everything up to checkpoint-7 is saved: continue with --resume" in sentence(
        tmp_path, read_only
    )
    assert "No space left on device (os error 28)" in sentence(
        tmp_path,
        SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        ),
    )
    if os.path.exists("/dev/full"):
        with pytest.raises(RuntimeError) as real:
            torch.save({"a": torch.zeros(10**6)}, "/dev/full")
        assert f"{tmp_path}: cannot be written (" in sentence(tmp_path, real.value)


def test_an_error_of_the_code_stays_an_error(tmp_path):
    for error in (
        KeyError("x"),
        FileNotFoundError(errno.ENOENT, "No such file", "x"),
        RuntimeError("shapes differ"),
    ):
        with pytest.raises(type(error)), endings.explained(None, tmp_path):
            raise error


def test_a_tracker_that_fails_is_told_once_and_left_out(caplog):
    calls = []
    callback = type(
        "WandbCallback", (), {"__module__": "transformers.integrations.integration_utils"}
    )()
    for event in TRACKER_EVENTS:
        setattr(
            callback,
            event,
            lambda *args, event=event, **kwargs: (
                calls.append(event) or (_ for _ in ()).throw(OSError("gone\nfor good"))
            ),
        )
    other = type("Console", (), {"on_log": lambda self: calls.append("console")})()
    trainer = type(
        "Trainer", (), {"callback_handler": type("Handler", (), {"callbacks": [callback, other]})}
    )
    trackers.shield_trackers(trainer)
    with pytest.raises(OSError):
        callback.on_train_begin()
    callback.on_log()
    callback.on_log()
    callback.on_save()
    other.on_log()
    assert calls == ["on_train_begin", "on_log", "console"]
    assert [record.getMessage() for record in caplog.records] == [
        "[GTPO] wandb fails (OSError: gone); the run continues without it, and the run directory has"
        " everything"
    ]


def test_a_checkpoint_is_not_there_before_it_is_whole(tmp_path, monkeypatch):
    written = tmp_path / ".partial-saving/checkpoint-3"
    written.mkdir(parents=True)
    (written / "optimizer.pt").write_text("x")

    def out_of_room(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched, pytest.raises(OSError):
        patched.setattr(json, "dumps", out_of_room)
        checkpoints.publish(written, tmp_path / "checkpoint-3", step=3)
    assert checkpoint_folders(tmp_path) == []
    checkpoints.publish(written, tmp_path / "checkpoint-3", step=3)
    assert checkpoints.read(tmp_path / "checkpoint-3").step == 3
