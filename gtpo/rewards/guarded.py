"""Reward functions that cannot hurt: a completion that one of them fails on is one that it cannot
judge, TRL's None.

To fail is to raise, to take too long, to end the process, or to return NaN, infinity or what
float32 statistics cannot hold. gtpo.rewards.failures has the rules, gtpo.rewards.pool the processes,
gtpo.rewards.failure_file what is kept of it. Reward models (torch modules) are TRL's own.
"""

import asyncio
import inspect
import itertools
import math
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate.utils import gather_object
from transformers import TrainerCallback, TrainerState
from trl import GRPOTrainer
from trl.trainer.utils import get_callable_name

from gtpo.errors import RecipeError
from gtpo.recipe.sections import RewardsSection
from gtpo.rewards.failure_file import Failures
from gtpo.rewards.failures import ContractBroken, Settling
from gtpo.rewards.pool import CannotHandOver, RewardPool
from gtpo.rewards.worker import call_reward


class GuardedRewards(TrainerCallback):
    """Reward functions made harmless, as `functions` for a trainer, which they are to be `attach`ed
    to afterwards.

    Logs `reward/cannot_judge`, the completions so far that a function failed on. `stopped_by` is
    the sentence of what stopped the run. Functions that break TRL's contract stop it at once: with
    a RecipeError in the first step (also where they fail on everything), later saved. Asynchronous
    ones stay asynchronous; not isolated, they are left as they are.
    """

    # What checkpoints call its state; earlier ones used the name that the class had.
    state_key, earlier_state_keys = "rewards", ("Judges",)

    def __init__(
        self,
        section: RewardsSection,
        functions: list[tuple[str, Callable]],
        *,
        seed: int,
        file: Path,
    ):
        """`functions` with their dotted paths; failures are appended to `file`."""
        self.section, self.seed = section, seed
        self.failures = Failures(file, section.max_failures)
        self.pool = RewardPool(section.workers, seconds=section.seconds, memory=section.memory)
        self.functions = [self._guarded(path, function) for path, function in functions]
        self.trainer: GRPOTrainer | None = None
        self.stopped_by: str | None = None
        self._failed: set[int] = set()  # rows of the rollout under way that a function failed on
        self._unjudged: set[int] = set()  # these, or all of them once they are too many
        self._broken: str | None = None  # how a function broke the contract
        self._logs: dict[str, set[str]] = {}  # the metrics that each function has logged
        self._lock = threading.Lock()  # asynchronous functions judge in threads

    def attach(self, trainer: GRPOTrainer) -> None:
        """Before anything else that looks at the trainer's table of rewards."""
        self.trainer = trainer
        calculate = trainer._calculate_rewards
        trainer._calculate_rewards = lambda inputs, *arguments: self._calculate(
            calculate, inputs, *arguments
        )
        trainer.add_callback(self)

    # ---- one function on this process's part of a rollout

    def _guarded(self, path: str, function: Callable) -> Callable:
        asynchronous = inspect.iscoroutinefunction(function)
        if isinstance(function, torch.nn.Module) or asynchronous and not self.section.isolated:
            return function
        if asynchronous:

            async def guarded(**handed):
                return await asyncio.to_thread(self._judge, path, function, handed)

        else:

            def guarded(**handed):
                return self._judge(path, function, handed)

        guarded.__name__ = get_callable_name(function)  # which TRL puts into names of metrics
        return guarded

    def _judge(self, path: str, function: Callable, handed: dict) -> list[float | None]:
        log_metric, log_extra = handed.pop("log_metric"), handed.pop("log_extra")
        if self.section.isolated:
            handed["trainer_state"] = _plain(handed["trainer_state"])
        _check_signature(path, function, handed)
        step, count = self.trainer.state.global_step, len(handed["completions"])
        everywhere = count * self.trainer.accelerator.num_processes

        def ask(rows: list[int]) -> dict:
            arguments = {
                name: (
                    [value[row] for row in rows]
                    if isinstance(value, list) and len(value) == count
                    else value
                )
                for name, value in handed.items()
            }
            if not self.section.isolated:
                return call_reward(function, arguments, len(rows))
            return self.pool.call(
                path, arguments, seed=f"{self.seed} {step} {path} {arguments['completions']!r}"
            )

        settling = Settling(
            _groups(handed["prompts"]),
            ask,
            self.pool.map if self.section.isolated else _in_turn,
            give_up=lambda failures: self.failures.too_many(failures, everywhere),
        )
        try:
            verdict = settling.verdict(self.section.per)
        except CannotHandOver as error:
            raise RecipeError(
                "trainer.reward_funcs",
                f"{path!r} cannot be called in a process of its own, the dataset has a column "
                f"that cannot be handed over ({error}); set rewards.isolated to false",
            ) from None
        except ContractBroken as broken:
            sentence = f"{path!r} {broken}; return a list with a number or None for each completion"
            if step == 0:
                raise RecipeError("trainer.reward_funcs", f"{sentence}") from None
            self._broken = sentence
            return [None] * count
        with self._lock:
            self.failures.keep(path, verdict, handed, step + 1)
            if step == 0 and verdict.nothing_judged:
                raise RecipeError(
                    "trainer.reward_funcs",
                    f"{path!r} failed on every completion of the first rollout, it"
                    f" {min(verdict.failures.items())[1]['failure']}; the tracebacks are in"
                    f" {self.failures.file}",
                )
            self._failed |= verdict.failures.keys()
            self._unjudged |= set(range(count)) if verdict.abandoned else verdict.failures.keys()
            metrics = verdict.metrics()
            known = self._logs[path] = self._logs.get(path, set()) | metrics.keys()
            for name in sorted(known):
                log_metric(name, metrics.get(name, math.nan))
            for name, values in verdict.columns().items():
                log_extra(name, values)
        return verdict.rewards

    # ---- all functions, in all processes

    def _calculate(self, calculate: Callable, inputs: list, *arguments) -> torch.Tensor:
        """TRL's rewards (N, functions) of all processes; a completion that one function failed on
        has none of any.
        """
        self._failed, self._unjudged, self._broken = set(), set(), None
        table, metrics = calculate(inputs, *arguments), self.trainer._pending_metrics
        told = gather_object(
            [
                {
                    "count": len(inputs),
                    "failed": len(self._failed),
                    "unjudged": sorted(self._unjudged),
                    "broken": self._broken,
                    "last": self.failures.last if self._failed else None,
                    "metrics": list(metrics),
                }
            ]
        )  # one of each process
        for name in {name for one in told for name in one["metrics"]} - metrics.keys():
            # TRL gathers: what one process logs, all must
            self.trainer._log_metric(name, math.nan)
        first = 0
        for one in told:
            table[[first + row for row in one["unjudged"]]] = torch.nan
            first += one["count"]
        self.failures.count(sum(one["failed"] for one in told), first)
        self.failures.last = next((one["last"] for one in told if one["last"]), self.failures.last)
        if broken := next((one["broken"] for one in told if one["broken"]), None):
            table[:] = torch.nan
            self.stopped_by = (
                f"Step {self.trainer.state.global_step + 1}: the reward function {broken}"
            )
        return table

    def on_step_end(self, args, state, control, **kwargs):
        failures = self.failures
        # the mean of one value: exact
        self.trainer._metrics["train"]["reward/cannot_judge"] = [float(failures.total)]
        if self.stopped_by is None and failures.too_many():
            failed, completions = failures.window()
            self.stopped_by = (
                f"Step {state.global_step}: reward functions failed on {failed} of the last"
                f" {completions} completions, more than rewards.max_failures allows; the last of"
                f" them: {failures.last} ({failures.file.name})"
            )
            failures.recent = []  # a resumed run begins to count again
        if self.stopped_by:
            control.should_log = control.should_save = control.should_training_stop = True

    def resume_state(self) -> dict:
        return self.failures.state()

    def restore(self, kept: dict) -> None:
        self.failures.restore(kept, cut=self.trainer.accelerator.is_main_process)

    def on_train_end(self, args, state, control, **kwargs):
        self.pool.close()


def _in_turn(task: Callable, items: list) -> list:
    return [task(item) for item in items]


def _groups(prompts: list) -> list[list[int]]:
    """The rows of each group: the completions of a prompt stand together."""
    return [
        list(rows)
        for _, rows in itertools.groupby(range(len(prompts)), key=lambda row: repr(prompts[row]))
    ]


def _plain(state: TrainerState) -> SimpleNamespace:
    """`state` for another process: without transformers, which that would import, and not longer
    with every step.
    """
    return SimpleNamespace(**{**vars(state), "log_history": state.log_history[-100:]})


def _check_signature(path: str, function: Callable, handed: dict) -> None:
    try:
        inspect.signature(function).bind(**handed, log_metric=None, log_extra=None)
    except TypeError as error:
        raise RecipeError(
            "trainer.reward_funcs",
            f"{path!r} does not take what TRL hands over, {', '.join(handed)} ({error}); "
            "take what you need by name, and the rest as **kwargs",
        ) from None
    except ValueError:  # some functions in C have no signature
        return
