"""torchrun and accelerate launch with train_model.py: two processes on a CPU."""

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

pytestmark = pytest.mark.slow  # starts several processes

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
ACCELERATE = [
    *(sys.executable, "-m", "accelerate.commands.launch"),
    *("--config_file", str(ROOT / "recipes/accelerate/ddp.yaml")),
    *("--num_processes", "2"),
]
DEMO = [
    *("--training.max_steps", "6"),
    *("--training.save_steps", "2"),
    *("--evaluation.limit", "4"),
    *("--training.per_device_train_batch_size", "16"),
]


def start(launcher: list[str], folder, *flags: str, env: dict | None = None) -> subprocess.Popen:
    """Starts the demo in `folder`; its stdout and stderr go to the files out and err there."""
    out, err = (folder / name for name in ("out", "err"))
    program = [str(ROOT / "train_model.py"), "recipes/demo.yaml"]
    return subprocess.Popen(
        [*launcher, *program, "--output_root", str(folder / "runs"), *DEMO, *flags],
        cwd=ROOT,
        stdout=out.open("w"),
        stderr=err.open("w"),
        env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})},
    )


def signal_one_process(run: subprocess.Popen, folder, signum: int) -> tuple[int, list[str]]:
    """Sends a signal to the second process after step 3.

    Returns the exit code of the launcher, and the ids of both processes.
    """
    try:
        for _ in range(3000):
            at_step_3 = re.search(r"^step 3/6", (folder / "out").read_text(), re.MULTILINE)
            if at_step_3 or run.poll() is not None:
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


def printed_lines(folder) -> tuple[list[str], list[str]]:
    """The lines on stdout and stderr, as they look after a progress bar has overwritten them."""
    return tuple(
        [line.split("\r")[-1] for line in (folder / name).read_text().split("\n")]
        for name in ("out", "err")
    )


def errors(folder) -> list[str]:
    return re.findall(r"error: .*", (folder / "err").read_text())


def have_ended(processes: list[str]) -> bool:
    return not any(os.path.exists(f"/proc/{process}") for process in processes)


@pytest.fixture(scope="module")
def killed_and_resumed(tmp_path_factory) -> dict:
    """A run that loses one of its processes after step 3, and the same run resumed."""
    killed, resumed = tmp_path_factory.mktemp("killed"), tmp_path_factory.mktemp("resumed")
    code, children = signal_one_process(start(TORCHRUN, killed), killed, signal.SIGKILL)
    (run_dir,) = (killed / "runs").iterdir()
    last_whole = checkpoints.last_whole(run_dir)
    resumed.joinpath("runs").symlink_to(killed / "runs")
    return {
        "killed": killed,
        "resumed": resumed,
        "code": code,
        "children": children,
        "last_whole": last_whole,
        "run_dir": run_dir,
        "resumed_code": start(ACCELERATE, resumed, "--resume").wait(timeout=300),
    }


def test_a_killed_process_ends_the_other_and_the_last_checkpoint_is_whole(killed_and_resumed):
    run, checkpoint = killed_and_resumed, killed_and_resumed["last_whole"]
    assert run["code"] != 0 and have_ended(run["children"])
    assert checkpoint.step >= 2 and checkpoint.manifest["processes"] == 2
    (sentence,) = errors(run["killed"])
    assert sentence.startswith("error: processes: another process of this run has ended")
    assert f"Everything up to checkpoint-{checkpoint.step} is saved: continue with" in sentence
    assert sentence.endswith("--resume")
    # The only traceback is torchrun's own.
    before_traceback = (run["killed"] / "err").read_text().split("Traceback")[0]
    assert "in main\n" not in before_traceback


def test_one_process_prints_and_writes(killed_and_resumed):
    run, run_dir = killed_and_resumed, killed_and_resumed["run_dir"]
    out, err = printed_lines(run["resumed"])
    assert run["resumed_code"] == 0, err[-20:]
    steps = [line.split()[1] for line in out if line.startswith("step ")]
    assert steps == [f"{step}/6" for step in range(run["last_whole"].step + 1, 7)]
    assert len([line for line in out if line.startswith("Run directory: ")]) == 1
    assert len([line for line in err if "Backend: transformers" in line]) == 1
    assert not [line for line in err if "Warning" in line or "[rank1]" in line]
    lines = [json.loads(line) for line in (run_dir / "completions.jsonl").read_text().splitlines()]
    assert [(line["step"], line["group"], line["row"]) for line in lines] == [
        (step, group, row) for step in range(1, 7) for group in range(4) for row in range(8)
    ]
    assert json.loads((run_dir / "trainer_state.json").read_text())["global_step"] == 6


def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path):
    flags = ("--model.target_modules", "nope")
    run = start([*TORCHRUN, "--shutdown-timeout", "3"], tmp_path, *flags)
    assert run.wait(timeout=300) == 1  # torchrun's own, whatever the processes ended with
    (sentence,) = errors(tmp_path)
    assert sentence.startswith("error: model.target_modules: this model has no layer named nope")
    text = (tmp_path / "err").read_text()
    assert re.search(r"exitcode  : 2 ", text)  # in torchrun's report
    assert text.count("Traceback (most recent call last)") == 1  # torchrun's own
    assert not list(tmp_path.glob("runs/*/*"))


def test_a_process_that_hangs_ends_all_after_ddp_timeout(tmp_path):
    flags = ("--training.ddp_timeout", "5", "--evaluation.path", "null")
    run = start([*TORCHRUN, "--shutdown-timeout", "2"], tmp_path, *flags)
    code, children = signal_one_process(run, tmp_path, signal.SIGSTOP)
    assert code == 1 and have_ended(children)
    (sentence,) = errors(tmp_path)
    assert "did not answer within training.ddp_timeout" in sentence
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert checkpoints.last_whole(run_dir).step >= 2


REWARD_OF_THE_FIRST_PROCESS = """
import os
if os.environ.get('RANK') == '1':
    raise ImportError('not on this machine')
def reward(completions, **kwargs):
    return [0.0 for _ in completions]
"""


def test_an_error_of_one_process_before_they_connect_ends_the_other(tmp_path):
    """The first process waits for the second at that point, and does not notice signals."""
    (tmp_path / "of_one.py").write_text(REWARD_OF_THE_FIRST_PROCESS)
    run = start(
        [*TORCHRUN, "--shutdown-timeout", "3"],
        tmp_path,
        *("--trainer.reward_funcs", "of_one.reward"),
        env={"PYTHONPATH": str(tmp_path)},
    )
    assert run.wait(timeout=300) == 1
    (sentence,) = errors(tmp_path)
    assert "not on this machine" in sentence


def test_the_check_is_printed_once_for_both_processes(tmp_path):
    assert start(TORCHRUN, tmp_path, "--check").wait(timeout=300) == 0
    out, _ = printed_lines(tmp_path)
    assert len([line for line in out if line.startswith("Ready")]) == 1
    assert len([line for line in out if " recipe " in line]) == 1
    assert "4 prompts x 8 completions per optimizer step" in out[0]
