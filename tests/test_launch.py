"""What a user types: torchrun and accelerate launch with train_model.py, two processes on a CPU."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT

from gtpo.runs import checkpoints

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    sys.executable,
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    str(ROOT / "recipes/accelerate/ddp.yaml"),
    "--num_processes",
    "2",
]
DEMO = [
    "--training.max_steps",
    "6",
    "--training.save_steps",
    "2",
    "--evaluation.limit",
    "4",
    "--training.per_device_train_batch_size",
    "16",
]


def start(launcher: list[str], folder, *flags: str, env: dict | None = None) -> subprocess.Popen:
    out, err = (folder / name for name in ("out", "err"))
    return subprocess.Popen(
        [
            *launcher,
            str(ROOT / "train_model.py"),
            "recipes/demo.yaml",
            "--output_root",
            str(folder / "runs"),
            *DEMO,
            *flags,
        ],
        cwd=ROOT,
        stdout=out.open("w"),
        stderr=err.open("w"),
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )


def signalled(run: subprocess.Popen, folder, signum: int) -> tuple[int, list[str]]:
    """The exit code of `run`, one of whose processes gets a signal after its third step; and the
    processes.
    """
    try:
        for _ in range(3000):
            if (
                re.search(r"^step 3/6", (folder / "out").read_text(), re.MULTILINE)
                or run.poll() is not None
            ):
                break
            time.sleep(0.1)
        children = subprocess.run(
            ["pgrep", "-P", str(run.pid)], capture_output=True, text=True
        ).stdout.split()
        assert len(children) == 2, (folder / "err").read_text()[-3000:]
        os.kill(int(children[1]), signum)
        return run.wait(timeout=120), children
    finally:
        run.kill()


def said(folder) -> tuple[list[str], list[str]]:
    """The lines on stdout and stderr; progress bars draw over theirs."""
    return tuple(
        [line.split("\r")[-1] for line in (folder / name).read_text().split("\n")]
        for name in ("out", "err")
    )


def errors(folder) -> list[str]:
    return re.findall(r"error: .*", (folder / "err").read_text())


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory) -> dict:
    """A run one of whose processes is killed after step 3, and that run resumed."""
    first, second = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("resumed")
    code, children = signalled(start(TORCHRUN, first), first, signal.SIGKILL)
    (run_dir,) = (first / "runs").iterdir()
    whole = checkpoints.last_whole(run_dir)
    second.joinpath("runs").symlink_to(first / "runs")
    resumed = start(ACCELERATE, second, "--resume").wait(timeout=300)
    return {
        "first": first,
        "second": second,
        "code": code,
        "children": children,
        "whole": whole,
        "run_dir": run_dir,
        "resumed": resumed,
    }


def test_a_killed_process_ends_the_other_and_the_last_checkpoint_is_whole(killed_and_resumed):
    found = killed_and_resumed
    assert found["code"] != 0 and not any(
        os.path.exists(f"/proc/{child}") for child in found["children"]
    )
    assert found["whole"].step >= 2 and found["whole"].manifest["processes"] == 2
    (sentence,) = errors(found["first"])
    assert sentence.startswith("error: processes: another process of this run has ended")
    assert (
        f"Everything up to checkpoint-{found['whole'].step} is saved: continue with --resume"
        in sentence
    )
    # the only traceback is torchrun's own
    assert "in main\n" not in (found["first"] / "err").read_text().split("Traceback")[0]


def test_one_process_prints_and_writes(killed_and_resumed):
    out, err = said(killed_and_resumed["second"])
    assert killed_and_resumed["resumed"] == 0, err[-20:]
    steps = [line.split()[1] for line in out if line.startswith("step ")]
    assert steps == [f"{step}/6" for step in range(killed_and_resumed["whole"].step + 1, 7)]
    assert len([line for line in out if line.startswith("Run directory: ")]) == 1
    assert len([line for line in err if "Backend: transformers" in line]) == 1
    assert not [line for line in err if "Warning" in line or "[rank1]" in line]
    run_dir = killed_and_resumed["run_dir"]
    lines = [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]
    assert [(line["step"], line["group"], line["row"]) for line in lines] == [
        (step, group, row) for step in range(1, 7) for group in range(4) for row in range(8)
    ]
    assert json.loads((run_dir / "trainer_state.json").read_text())["global_step"] == 6


def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path):
    run = start([*TORCHRUN, "--shutdown-timeout", "3"], tmp_path, "--model.target_modules", "nope")
    assert run.wait(timeout=300) == 1  # torchrun's own, whatever ended the processes
    (told,) = errors(tmp_path)
    assert told.startswith("error: model.target_modules: ['nope'] does not fit this model")
    text = (tmp_path / "err").read_text()
    # torchrun's own
    assert (
        re.search(r"exitcode  : 2 ", text) and text.count("Traceback (most recent call last)") == 1
    )
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_process_that_hangs_ends_all_after_ddp_timeout(tmp_path):
    run = start(
        [*TORCHRUN, "--shutdown-timeout", "2"],
        tmp_path,
        "--training.ddp_timeout",
        "5",
        "--evaluation.path",
        "null",
    )
    code, children = signalled(run, tmp_path, signal.SIGSTOP)
    assert code == 1 and not any(os.path.exists(f"/proc/{child}") for child in children)
    (sentence,) = errors(tmp_path)
    assert "did not answer within training.ddp_timeout" in sentence
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert checkpoints.last_whole(run_dir).step >= 2


def test_what_fails_in_one_process_alone_ends_the_other(tmp_path):
    """Before the processes meet: the first waits there, and hears no signal."""
    (tmp_path / "of_one.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n    raise ImportError('not on this"
        " machine')\ndef reward(completions, **kwargs):\n    return [0.0 for _ in completions]\n"
    )
    run = start(
        [*TORCHRUN, "--shutdown-timeout", "3"],
        tmp_path,
        "--trainer.reward_funcs",
        "of_one.reward",
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert run.wait(timeout=300) == 1
    (told,) = errors(tmp_path)
    assert "not on this machine" in told


def test_help_and_check_are_said_once(tmp_path):
    assert start(TORCHRUN, tmp_path, "--check").wait(timeout=300) == 0
    out, _ = said(tmp_path)
    assert [line for line in out if line.startswith("Ready")] and len(
        [line for line in out if " recipe " in line]
    ) == 1
    assert (
        "8 prompts x 8" not in out[0] and "4 prompts x 8 completions per optimizer step" in out[0]
    )
