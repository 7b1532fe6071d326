"""Kill, stop, fill and damage runs, and see that nothing is lost: `python reliability/soak.py
[--rounds 20] [--seed 0] [--faults ...]`.

Every fault is a real one, injected into a run of the embedded demo's model. Afterwards the run goes
on with --resume, and must end with the bits of a run that nothing happened to. Prints a table; exit
code 1 if anything was lost. Runs on Linux; the full disk is a small tmpfs where the user may mount
one, else a limit on the size of files.
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

from gtpo.models.adapters import checkpoint_folders, checkpoint_step  # noqa: E402
from gtpo.recipe import RecipeError  # noqa: E402
from gtpo.runs import checkpoints  # noqa: E402
from reliability import training_processes  # noqa: E402
from reliability.resume_proof import CASES, EVERY, differences, flags, outcome  # noqa: E402

VARIED = [  # what the rounds take turns with
    ["--training.save_steps", "1", "--training.save_total_limit", "2"],
    [
        "--training.save_steps",
        "3",
        *CASES["steps_per_generation_iterations"],
        *EVERY,
        "2",
        "--training.save_total_limit",
        "1",
    ],
    [
        "--training.save_steps",
        "2",
        *CASES["grpo_steps_per_generation"],
        "--training.logging_steps",
        "3",
    ],
]


@dataclass
class Found:
    """What became of the rounds of a fault."""

    rounds: int = 0
    faults: int = 0  # that were injected: a run may end before one
    steps_lost: list[int] = field(default_factory=list)  # trained, and not in a checkpoint
    losses: list[str] = field(default_factory=list)  # what should not have happened


class Soak:
    def __init__(self, scratch: Path, dice: random.Random, steps: int):
        self.scratch, self.dice, self.steps, self.number = scratch, dice, steps, 0
        self._straight: dict[int, tuple[dict, float]] = {}

    def straight(self, varied: int) -> tuple[dict, float]:
        """The outcome of a run that nothing happens to, and the seconds it takes."""
        if varied not in self._straight:
            folder, began = self.scratch / f"straight{varied}", time.monotonic()
            if training_processes.run(
                flags(folder, self.steps, VARIED[varied]), self.scratch / "straight.txt"
            ):
                raise SystemExit((self.scratch / "straight.txt").read_text()[-3000:])
            self._straight[varied] = outcome(folder), time.monotonic() - began
        return self._straight[varied]

    def new(self, varied: int, more: list[str] = ()) -> tuple[list[str], Path, Path]:
        """Words of a new run, its folder, and the file for what it says."""
        self.number += 1
        folder = self.scratch / f"run{self.number}"
        return (
            [*flags(folder, self.steps, VARIED[varied]), *more],
            folder,
            self.scratch / f"run{self.number}.txt",
        )

    def ends_well(
        self, argv: list[str], folder: Path, said: Path, varied: int, found: Found
    ) -> None:
        """Let the run go on to its end, and compare."""
        code = training_processes.run([*argv, "--resume"], said)
        if code:
            found.losses.append(f"{said}: exit code {code}: {said.read_text()[-1500:]}")
        else:
            found.losses += [
                f"{said}: {place}"
                for place in differences(self.straight(varied)[0], outcome(folder))
            ]

    def checkpoint_bytes(self) -> int:
        self.straight(0)
        (run_dir,) = (self.scratch / "straight0").glob("demo*")
        return sum(file.stat().st_size for file in checkpoint_folders(run_dir)[-1].iterdir())

    # ---- the faults, each in a number of rounds

    def sigkill(self, rounds: int) -> Found:
        """SIGKILL at random moments, again and again within a run."""
        found = Found(rounds)
        while found.faults < rounds:
            varied = found.faults % len(VARIED)
            argv, folder, said = self.new(varied)
            while found.faults < rounds:
                worker = training_processes.Worker([*argv, "--resume"], said)
                time.sleep(self.dice.uniform(0, self.straight(varied)[1]))
                worker.kill(signal.SIGKILL)
                if worker.wait() == 0:
                    break
                found.faults += 1
                found.steps_lost.append(steps_lost(folder))
                if found.steps_lost[-1] > int(VARIED[varied][1]):
                    found.losses.append(f"{said}: {found.steps_lost[-1]} steps lost")
            self.ends_well(argv, folder, said, varied, found)
        return found

    def sigterm(self, rounds: int) -> Found:
        """SIGTERM or Ctrl-C at random moments: a checkpoint of the step under way, and a documented
        exit code.
        """
        found = Found(rounds)
        while found.faults < rounds:
            varied, signum = (
                found.faults % len(VARIED),
                (signal.SIGTERM, signal.SIGINT)[found.faults % 2],
            )
            argv, folder, said = self.new(varied)
            for _ in range(3):  # within one run, if it does not end before
                began = said.read_text().count("Backend") if said.is_file() else 0
                worker = training_processes.Worker([*argv, "--resume"], said)
                wait_for(lambda: worker.said.count("Backend") > began, worker)
                time.sleep(self.dice.uniform(0, self.straight(varied)[1]))
                worker.kill(signum)
                code = worker.wait()
                if code == 0:
                    break
                found.faults += 1
                if code != 128 + signum:
                    found.losses.append(
                        f"{said}: exit code {code} after signal {signum}:"
                        f" {said.read_text()[-1500:]}"
                    )
                found.steps_lost.append(steps_lost(folder))
                if found.steps_lost[-1]:
                    found.losses.append(f"{said}: {found.steps_lost[-1]} steps lost")
            self.ends_well(argv, folder, said, varied, found)
        return found

    def second_ctrl_c(self, rounds: int) -> Found:
        """A second Ctrl-C ends the process at once."""
        found = Found(rounds)
        for i in range(rounds):
            argv, folder, said = self.new(i % len(VARIED))
            worker = training_processes.Worker(argv, said, before=slow_rewards)
            wait_for(lambda: "Step 2 judges" in worker.said)
            worker.kill(signal.SIGINT)
            time.sleep(1.3)
            worker.kill(signal.SIGINT)
            began, code = time.monotonic(), worker.wait()
            found.faults += 1
            if code != -signal.SIGINT or time.monotonic() - began > 5:
                found.losses.append(
                    f"{said}: exit code {code} after {time.monotonic() - began:.1f} s"
                )
            self.ends_well(argv, folder, said, i % len(VARIED), found)
        return found

    def truncated(self, rounds: int) -> Found:
        """The last checkpoint loses the end of a file: the one before is used."""
        found = Found(rounds)
        for i in range(rounds):
            argv, folder, said = self.new(0)
            worker = training_processes.Worker(argv, said)
            wait_for(lambda: len(list(folder.glob("*/checkpoint-*"))) > 1, worker)
            worker.kill(signal.SIGKILL)
            worker.wait()
            last = checkpoint_folders(next(folder.iterdir()))[-1]
            file = self.dice.choice(sorted(file for file in last.iterdir() if file.stat().st_size))
            os.truncate(file, self.dice.randrange(file.stat().st_size))
            found.faults += 1
            found.steps_lost.append(steps_lost(folder))
            self.ends_well(argv, folder, said, 0, found)
            if f"Skipped, damaged: {last}" not in said.read_text():
                found.losses.append(f"{said}: does not say that {file} is damaged")
        return found

    def disk_full(self, rounds: int) -> Found:
        """No room for one more checkpoint: one sentence, the earlier ones whole; with room, the run
        goes on.
        """
        found = Found(rounds)
        for _ in range(rounds):
            argv, folder, said = self.new(0, ["--training.save_total_limit", "100"])
            with small_disk(
                folder, int(self.dice.uniform(1.5, self.steps - 1) * self.checkpoint_bytes())
            ) as (limit, make_room):
                code = training_processes.run(argv, said, before=limit)
                found.faults += 1
                errors = [
                    line for line in said.read_text().splitlines() if line.startswith("error: ")
                ]
                if (
                    code != 2
                    or len(errors) != 1
                    or "cannot be written" not in errors[0]
                    or "Traceback" in said.read_text()
                ):
                    found.losses.append(f"{said}: exit code {code}: {said.read_text()[-1500:]}")
                damaged = [
                    folder
                    for folder in checkpoint_folders(next(folder.glob("demo*")))
                    if problem(folder)
                ]
                found.losses += [f"{said}: {folder} is damaged" for folder in damaged]
                found.steps_lost.append(steps_lost(folder))
                make_room()
                self.ends_well(argv, folder, said, 0, found)
        return found

    def no_memory(self, rounds: int) -> Found:
        """An allocation that the machine refuses: one sentence with the keys that help."""
        found = Found(rounds)
        for i in range(rounds):
            argv, folder, said = self.new(i % len(VARIED))
            step = self.dice.randrange(2, self.steps)
            code = training_processes.run(argv, said, before=lambda step=step: greedy_rewards(step))
            found.faults += 1
            keys = (
                "training.per_device_train_batch_size",
                "model.max_seq_length",
                "training.num_generations",
                "continue with --resume",
            )
            if (
                code != 2
                or "Traceback" in said.read_text()
                or not all(key in said.read_text() for key in keys[:3])
            ):
                found.losses.append(f"{said}: exit code {code}: {said.read_text()[-1500:]}")
            found.steps_lost.append(steps_lost(folder))
            self.ends_well(argv, folder, said, i % len(VARIED), found)
        return found

    def tracker_dies(self, rounds: int) -> Found:
        """wandb's own process is killed while the run logs to it: the run goes on."""
        found = Found(rounds)
        for _ in range(rounds):
            argv, folder, said = self.new(0, ["--training.report_to", "wandb"])
            code = training_processes.run(argv, said, before=kill_wandb)
            found.faults += "wandb's process is killed" in said.read_text()
            if code or "wandb fails" not in said.read_text():
                found.losses.append(f"{said}: exit code {code}: {said.read_text()[-1500:]}")
            else:
                found.losses += [
                    f"{said}: {place}"
                    for place in differences(self.straight(0)[0], outcome(folder))
                ]
        return found

    def no_network(self, rounds: int) -> Found:
        """wandb cannot reach its server when the run begins: one sentence; without it, the run
        starts.
        """
        found = Found(rounds)
        for _ in range(rounds):
            argv, folder, said = self.new(0)
            code = training_processes.run(
                [*argv, "--training.report_to", "wandb"], said, before=online_without_network
            )
            found.faults += 1
            if (
                code != 2
                or "Traceback" in said.read_text()
                or "WANDB_MODE=offline" not in said.read_text()
            ):
                found.losses.append(f"{said}: exit code {code}: {said.read_text()[-1500:]}")
            self.ends_well(argv, folder, said, 0, found)
        return found


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


def steps_lost(folder: Path) -> int:
    """How many steps were trained after the last whole checkpoint, as far as completions tell."""
    run_dir = next((path for path in folder.glob("demo*") if path.is_dir()), None)
    if run_dir is None:
        return 0
    whole = [
        checkpoint_step(folder) for folder in checkpoint_folders(run_dir) if not problem(folder)
    ]
    completions = run_dir / "completions.jsonl"
    steps = (
        re.findall(r'^\{"step": (\d+)', completions.read_text(), re.MULTILINE)
        if completions.is_file()
        else []
    )
    return max(0, max(map(int, steps), default=0) - max(whole, default=0))


def problem(folder: Path) -> str | None:
    try:
        checkpoints.read(folder)
    except RecipeError as error:
        return str(error)


def wait_for(seen, worker: training_processes.Worker | None = None, seconds: float = 300) -> None:
    for _ in range(int(seconds / 0.005)):
        if seen():
            return
        time.sleep(0.005)
    raise TimeoutError(worker and worker.said)


@contextlib.contextmanager
def small_disk(folder: Path, size: int):
    """`folder` on a disk of that size: what a run has to do before it begins, and a function that
    makes room.
    """
    folder.mkdir()
    mounted = (
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True
        ).returncode
        == 0
    )
    if not mounted:
        yield (
            lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 10, resource.RLIM_INFINITY)),
            lambda: None,
        )
        return
    try:
        yield (
            None,
            lambda: subprocess.run(["mount", "-o", "remount,size=200m", str(folder)], check=True),
        )
    finally:
        subprocess.run(["umount", str(folder)], check=True)


# ---- what is done to a run, in its process


def _around_rewards(act) -> None:
    """Let `act` see the trainer before each rollout is judged."""
    import trl

    judge = trl.GRPOTrainer._calculate_rewards

    def judged(self, *args):
        act(self)
        return judge(self, *args)

    trl.GRPOTrainer._calculate_rewards = judged


def slow_rewards() -> None:
    def act(trainer):
        if trainer.state.global_step >= 1:
            print("Step 2 judges", flush=True)
            time.sleep(60)

    _around_rewards(act)


def greedy_rewards(step: int) -> None:
    import torch

    _around_rewards(lambda trainer: trainer.state.global_step >= step - 1 and torch.empty(2**50))


def kill_wandb() -> None:
    def act(trainer):
        if trainer.state.global_step == 2:
            import psutil

            for child in psutil.Process().children(recursive=True):
                if "wandb" in child.name():
                    print("wandb's process is killed", flush=True)
                    child.kill()

    _around_rewards(act)


def online_without_network() -> None:
    os.environ.update(
        WANDB_MODE="online",
        WANDB_API_KEY="0" * 40,
        WANDB_BASE_URL="http://127.0.0.1:9",
        WANDB_INIT_TIMEOUT="3",
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--rounds", type=int, default=20, help="of SIGKILL; the other faults get a quarter as many"
    )
    parser.add_argument("--steps", type=int, default=10, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--faults", nargs="*", default=FAULTS, choices=FAULTS)
    options = parser.parse_args()
    training_processes.prepare()
    lost = 0
    print(f"{'fault':14} {'injected':>8} {'steps repeated':>15} {'losses':>7}")
    with tempfile.TemporaryDirectory() as scratch:
        soak = Soak(Path(scratch), random.Random(options.seed), options.steps)
        for name in options.faults:
            found = getattr(soak, name)(
                options.rounds if name == "sigkill" else max(1, options.rounds // 4)
            )
            lost += len(found.losses)
            repeated = (
                f"{sum(found.steps_lost)} (most {max(found.steps_lost)})"
                if found.steps_lost
                else "-"
            )
            print(
                f"{name:14} {found.faults:8} {repeated:>15} {len(found.losses) or 'none':>7}",
                flush=True,
            )
            for loss in found.losses[:10]:
                print("   ", loss)
    return 1 if lost else 0


if __name__ == "__main__":
    sys.exit(main())
