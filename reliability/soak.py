"""Injects faults into runs and checks that nothing is lost.

Run `python reliability/soak.py [--rounds 20] [--seed 0] [--faults ...]`. Every fault is a real one,
injected into a run of the embedded demo's model: a kill, a stop, a full disk, a damaged file.
Afterwards --resume continues the run, which must equal a run without faults bit for bit. Prints a
table, and exits with 1 if anything was lost. Needs Linux. The full disk is a small tmpfs where the
user may mount one, and otherwise a limit on the size of files.
"""

import argparse
import contextlib
import os
import random
import re
import resource
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT)]

from gtpo.models.adapters import checkpoint_folders, checkpoint_step
from gtpo.recipe import RecipeError
from gtpo.runs import checkpoints
from reliability import training_processes
from reliability.resume_proof import CASES, EVERY, differences, flags, outcome

TOTAL_LIMIT = "--training.save_total_limit"
VARIANTS = [  # settings that the rounds alternate between
    ["--training.save_steps", "1", TOTAL_LIMIT, "2"],
    [
        *["--training.save_steps", "3", *CASES["steps_per_generation_iterations"]],
        *[*EVERY, "2", TOTAL_LIMIT, "1"],
    ],
    [
        *["--training.save_steps", "2", *CASES["grpo_steps_per_generation"]],
        *["--training.logging_steps", "3"],
    ],
]


@dataclass
class Result:
    """What happened in the rounds of one fault."""

    rounds: int = 0
    faults: int = 0  # injected; a run may end before one
    steps_lost: list[int] = field(default_factory=list)  # steps trained but in no checkpoint
    losses: list[str] = field(default_factory=list)  # what should not have happened


class Soak:
    """Runs with faults: a method per fault takes a number of rounds and returns a Result."""

    def __init__(self, scratch: Path, dice: random.Random, steps: int):
        self.scratch, self.dice, self.steps, self.number = scratch, dice, steps, 0
        self._whole_runs: dict[int, tuple[dict, float]] = {}

    def whole_run(self, variant: int) -> tuple[dict, float]:
        """The outcome of a run without faults, and the seconds it takes."""
        if variant not in self._whole_runs:
            folder, began = self.scratch / f"straight{variant}", time.monotonic()
            log = self.scratch / "straight.txt"
            if training_processes.run(flags(folder, self.steps, VARIANTS[variant]), log):
                raise SystemExit(log.read_text()[-3000:])
            self._whole_runs[variant] = outcome(folder), time.monotonic() - began
        return self._whole_runs[variant]

    def new(self, variant: int, more: list[str] = ()) -> tuple[list[str], Path, Path]:
        """The arguments of a new run, its folder, and the file for its output."""
        self.number += 1
        folder = self.scratch / f"run{self.number}"
        argv = [*flags(folder, self.steps, VARIANTS[variant]), *more]
        return argv, folder, self.scratch / f"run{self.number}.txt"

    def finish(
        self, argv: list[str], folder: Path, log: Path, variant: int, result: Result
    ) -> None:
        """Resumes the run to its end, and adds what differs from a whole run to the losses."""
        if code := training_processes.run([*argv, "--resume"], log):
            result.losses.append(unexpected(log, code))
        else:
            self.compare(folder, log, variant, result)

    def compare(self, folder: Path, log: Path, variant: int, result: Result) -> None:
        """Adds what differs between a finished run and a whole run to the losses."""
        paths = differences(self.whole_run(variant)[0], outcome(folder))
        result.losses += [f"{log}: {path}" for path in paths]

    def checkpoint_bytes(self) -> int:
        """The size of a checkpoint."""
        self.whole_run(0)
        (run_dir,) = (self.scratch / "straight0").glob("demo*")
        return sum(file.stat().st_size for file in checkpoint_folders(run_dir)[-1].iterdir())

    # ---- the faults

    def sigkill(self, rounds: int) -> Result:
        """SIGKILL at random moments, repeatedly within a run."""
        result = Result(rounds)
        while result.faults < rounds:
            variant = result.faults % len(VARIANTS)
            argv, folder, log = self.new(variant)
            while result.faults < rounds:
                process = training_processes.TrainingProcess([*argv, "--resume"], log)
                time.sleep(self.dice.uniform(0, self.whole_run(variant)[1]))
                process.kill(signal.SIGKILL)
                if process.wait() == 0:
                    break
                result.faults += 1
                result.steps_lost.append(steps_lost(folder))
                if result.steps_lost[-1] > int(VARIANTS[variant][1]):
                    result.losses.append(f"{log}: {result.steps_lost[-1]} steps lost")
            self.finish(argv, folder, log, variant, result)
        return result

    def sigterm(self, rounds: int) -> Result:
        """SIGTERM or Ctrl-C at random moments.

        The run must save a checkpoint of the current step and exit with the documented code.
        """
        result = Result(rounds)
        while result.faults < rounds:
            variant = result.faults % len(VARIANTS)
            signum = (signal.SIGTERM, signal.SIGINT)[result.faults % 2]
            argv, folder, log = self.new(variant)
            for _ in range(3):  # within one run, unless it ends before
                began = log.read_text().count("Backend") if log.is_file() else 0
                process = training_processes.TrainingProcess([*argv, "--resume"], log)
                wait_until(lambda p=process, n=began: p.output.count("Backend") > n, process)
                time.sleep(self.dice.uniform(0, self.whole_run(variant)[1]))
                process.kill(signum)
                code = process.wait()
                if code == 0:
                    break
                result.faults += 1
                if code != 128 + signum:
                    result.losses.append(unexpected(log, f"{code} after signal {signum}"))
                result.steps_lost.append(steps_lost(folder))
                if result.steps_lost[-1]:
                    result.losses.append(f"{log}: {result.steps_lost[-1]} steps lost")
            self.finish(argv, folder, log, variant, result)
        return result

    def second_ctrl_c(self, rounds: int) -> Result:
        """A second Ctrl-C, which ends the process at once."""
        result = Result(rounds)
        for i in range(rounds):
            variant = i % len(VARIANTS)
            argv, folder, log = self.new(variant)
            process = training_processes.TrainingProcess(argv, log, before=slow_rewards)
            wait_until(lambda p=process: SLOW_REWARDS_BEGIN in p.output)
            process.kill(signal.SIGINT)
            time.sleep(1.3)
            process.kill(signal.SIGINT)
            began, code = time.monotonic(), process.wait()
            seconds = time.monotonic() - began
            result.faults += 1
            if code != -signal.SIGINT or seconds > 5:
                result.losses.append(f"{log}: exit code {code} after {seconds:.1f} s")
            self.finish(argv, folder, log, variant, result)
        return result

    def truncated(self, rounds: int) -> Result:
        """The end of a file in the last checkpoint is cut off; the run uses the one before."""
        result = Result(rounds)
        for _ in range(rounds):
            argv, folder, log = self.new(0)
            process = training_processes.TrainingProcess(argv, log)
            wait_until(lambda f=folder: len(list(f.glob("*/checkpoint-*"))) > 1, process)
            process.kill(signal.SIGKILL)
            process.wait()
            last = checkpoint_folders(next(folder.iterdir()))[-1]
            file = self.dice.choice(sorted(file for file in last.iterdir() if file.stat().st_size))
            os.truncate(file, self.dice.randrange(file.stat().st_size))
            result.faults += 1
            result.steps_lost.append(steps_lost(folder))
            self.finish(argv, folder, log, 0, result)
            if f"Skipped, damaged: {last}" not in log.read_text():
                result.losses.append(f"{log}: does not say that {file} is damaged")
        return result

    def disk_full(self, rounds: int) -> Result:
        """A disk without space for another checkpoint.

        The run must fail with one sentence and leave the earlier checkpoints whole. With more
        space, it must go on.
        """
        result = Result(rounds)
        for _ in range(rounds):
            argv, folder, log = self.new(0, [TOTAL_LIMIT, "100"])
            size = int(self.dice.uniform(1.5, self.steps - 1) * self.checkpoint_bytes())
            with small_disk(folder, size) as (limit, enlarge):
                code = training_processes.run(argv, log, before=limit)
                result.faults += 1
                lines = log.read_text().splitlines()
                errors = [line for line in lines if line.startswith("error: ")]
                as_expected = code == 2 and len(errors) == 1 and "cannot be written" in errors[0]
                if not as_expected or "Traceback" in log.read_text():
                    result.losses.append(unexpected(log, code))
                for checkpoint in checkpoint_folders(next(folder.glob("demo*"))):
                    if problem(checkpoint):
                        result.losses.append(f"{log}: {checkpoint} is damaged")
                result.steps_lost.append(steps_lost(folder))
                enlarge()
                self.finish(argv, folder, log, 0, result)
        return result

    def no_memory(self, rounds: int) -> Result:
        """An allocation that the machine refuses; the error must name the keys that help."""
        keys = (
            "training.per_device_train_batch_size",
            "model.max_seq_length",
            "training.num_generations",
        )
        result = Result(rounds)
        for i in range(rounds):
            variant = i % len(VARIANTS)
            argv, folder, log = self.new(variant)
            step = self.dice.randrange(2, self.steps)
            code = training_processes.run(argv, log, before=lambda step=step: greedy_rewards(step))
            result.faults += 1
            text = log.read_text()
            if code != 2 or "Traceback" in text or not all(key in text for key in keys):
                result.losses.append(unexpected(log, code))
            result.steps_lost.append(steps_lost(folder))
            self.finish(argv, folder, log, variant, result)
        return result

    def tracker_dies(self, rounds: int) -> Result:
        """wandb's own process is killed while the run logs to it; the run must go on."""
        result = Result(rounds)
        for _ in range(rounds):
            argv, folder, log = self.new(0, ["--training.report_to", "wandb"])
            code = training_processes.run(argv, log, before=kill_wandb)
            result.faults += WANDB_KILLED in log.read_text()
            if code or "wandb fails" not in log.read_text():
                result.losses.append(unexpected(log, code))
            else:
                self.compare(folder, log, 0, result)
        return result

    def no_network(self, rounds: int) -> Result:
        """wandb cannot reach its server when the run begins.

        The run must fail with one sentence. Without wandb, it must start.
        """
        result = Result(rounds)
        for _ in range(rounds):
            argv, folder, log = self.new(0)
            with_wandb = [*argv, "--training.report_to", "wandb"]
            code = training_processes.run(with_wandb, log, before=online_without_network)
            result.faults += 1
            text = log.read_text()
            if code != 2 or "Traceback" in text or "WANDB_MODE=offline" not in text:
                result.losses.append(unexpected(log, code))
            self.finish(argv, folder, log, 0, result)
        return result


FAULTS = [
    *("sigkill", "sigterm", "second_ctrl_c", "truncated"),
    *("disk_full", "no_memory", "tracker_dies", "no_network"),
]


def unexpected(log: Path, code: int | str) -> str:
    """One loss: an unexpected exit code, with the end of the output."""
    return f"{log}: exit code {code}: {log.read_text()[-1500:]}"


def steps_lost(folder: Path) -> int:
    """The number of steps trained after the last whole checkpoint, read from completions.jsonl."""
    run_dir = next((path for path in folder.glob("demo*") if path.is_dir()), None)
    if run_dir is None:
        return 0
    whole = [checkpoint_step(path) for path in checkpoint_folders(run_dir) if not problem(path)]
    completions = run_dir / "completions.jsonl"
    text = completions.read_text() if completions.is_file() else ""
    steps = [int(step) for step in re.findall(r'^\{"step": (\d+)', text, re.MULTILINE)]
    return max(0, max(steps, default=0) - max(whole, default=0))


def problem(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        checkpoints.read(checkpoint)
    except RecipeError as error:
        return str(error)


def wait_until(
    condition, process: training_processes.TrainingProcess | None = None, seconds: float = 300
) -> None:
    """Waits until `condition()` is true; raises TimeoutError with the output of `process`."""
    for _ in range(int(seconds / 0.005)):
        if condition():
            return
        time.sleep(0.005)
    raise TimeoutError(process and process.output)


@contextlib.contextmanager
def small_disk(folder: Path, size: int):
    """Makes `folder` on a disk of `size` bytes.

    Yields what a run has to call before it begins, or None, and a function that enlarges the disk.
    """
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        limits = (size // 10, resource.RLIM_INFINITY)
        yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits), lambda: None
        return
    enlarge = ["mount", "-o", "remount,size=200m", str(folder)]
    try:
        yield None, lambda: subprocess.run(enlarge, check=True)
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# ---- changes to a run, made in its process before it begins

SLOW_REWARDS_BEGIN = "The rewards of step 2 begin"
WANDB_KILLED = "wandb's process is killed"


def _before_rewards(act) -> None:
    """Calls `act` with the trainer before the rewards of each rollout."""
    import trl

    calculate_rewards = trl.GRPOTrainer._calculate_rewards

    def act_and_calculate(self, *args):
        act(self)
        return calculate_rewards(self, *args)

    trl.GRPOTrainer._calculate_rewards = act_and_calculate


def slow_rewards() -> None:
    """Makes rewards take a minute from step 2 on."""

    def act(trainer):
        if trainer.state.global_step >= 1:
            print(SLOW_REWARDS_BEGIN, flush=True)
            time.sleep(60)

    _before_rewards(act)


def greedy_rewards(step: int) -> None:
    """Makes the rewards of `step` allocate more memory than any machine has."""
    import torch

    _before_rewards(lambda trainer: trainer.state.global_step >= step - 1 and torch.empty(2**50))


def kill_wandb() -> None:
    """Kills wandb's process in step 3."""

    def act(trainer):
        if trainer.state.global_step == 2:
            import psutil

            for child in psutil.Process().children(recursive=True):
                if "wandb" in child.name():
                    print(WANDB_KILLED, flush=True)
                    child.kill()

    _before_rewards(act)


def online_without_network() -> None:
    """Lets wandb look for a server that does not exist."""
    os.environ.update(
        WANDB_MODE="online",
        WANDB_API_KEY="0" * 40,
        WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_INIT_TIMEOUT="3",
    )


def main() -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds",
        type=int,
        default=20,
        help="rounds of sigkill; other faults get a quarter (default: 20)",
    )
    parser.add_argument("--steps", type=int, default=10, help="steps of each run (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="*", default=FAULTS, choices=FAULTS)
    options = parser.parse_args()
    training_processes.prepare()
    lost = 0
    print(f"{'fault':14} {'injected':>8} {'steps repeated':>15} {'losses':>7}")
    with tempfile.TemporaryDirectory() as scratch:
        soak = Soak(Path(scratch), random.Random(options.seed), options.steps)
        for name in options.faults:
            rounds = options.rounds if name == "sigkill" else max(1, options.rounds // 4)
            result = getattr(soak, name)(rounds)
            lost += len(result.losses)
            steps, losses = result.steps_lost, len(result.losses) or "none"
            repeated = f"{sum(steps)} (most {max(steps)})" if steps else "-"
            print(f"{name:14} {result.faults:8} {repeated:>15} {losses:>7}", flush=True)
            for loss in result.losses[:10]:
                print("   ", loss)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
