"""Reward functions made harmless, attached to any `trl.GRPOTrainer`.

A completion that a reward function fails on is not scored: its reward is None, as where a function
returns None. A function fails when it raises, takes too long or ends its process. It also fails
when it returns NaN, infinity or a number too large for float32 statistics. gtpo.rewards.failures
says what happens then. Reward models (torch modules) are left to TRL.
"""

import asyncio
import inspect
import itertools
import logging
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
from gtpo.hooks.groups import compared_rewards, frac_without_signal
from gtpo.hooks.seams import wrap
from gtpo.recipe.sections import RewardsSection
from gtpo.rewards.failures import Failures, RewardCalls, RolloutRewards
from gtpo.rewards.pool import CannotHandOver, RewardPool
from gtpo.rewards.worker import OPENING, ContractBroken, Logged, call_reward, names

logger = logging.getLogger(__name__)


class GuardedRewards(TrainerCallback):
    """Makes reward functions harmless. A trainer gets `functions`; then this is attached to it.

    The callback logs `reward/cannot_judge`: on how many completions a function has failed so far.
    `stopped_by` is the sentence that says why it stopped the run, None if it did not.

    A function that breaks TRL's contract stops the run at once, and the run is saved. In the first
    step RecipeError is raised instead, also for a function that fails on everything. Asynchronous
    functions stay asynchronous. Without isolation only what they log is checked.
    """

    # The key of the state in a checkpoint. Earlier checkpoints have the name that the class had.
    state_key, earlier_state_keys = "rewards", ("Judges",)

    def __init__(
        self,
        section: RewardsSection,
        functions: list[tuple[str, Callable]],
        *,
        seed: int,
        file: Path,
    ):
        """`functions` come with their dotted paths; failures are appended to `file`."""
        self.section, self.seed = section, seed
        self.failures = Failures(file, section.max_failures)
        self.pool = RewardPool(section.workers, seconds=section.seconds, memory=section.memory)
        self.functions = [self._guarded(path, function) for path, function in functions]
        self.trainer: GRPOTrainer | None = None
        self.prompt_opening = ""  # what the prompt has already written of the answer
        self.stopped_by: str | None = None
        self._failed: set[int] = set()  # rows of this rollout that a function failed on
        self._not_scored: set[int] = set()  # the same rows, or all once they are too many
        self._broken: str | None = None  # how a function broke the contract
        self._metrics: dict[str, set[str]] = {}  # by function: the metrics that it has logged
        self._table: torch.Tensor | None = None  # (N, functions), of the last rollout
        self._unscored_reported = False  # whether a rollout without any reward was reported
        self._lock = threading.Lock()  # asynchronous functions are called in threads

    def attach(self, trainer: GRPOTrainer, prompt_opening: str = "") -> None:
        """Guard the table of rewards of `trainer`. Hooks that read the table come after this.

        Functions that name the argument `prompt_opening` get it. The shipped rewards do, and put it
        before each completion.
        """
        self.trainer, self.prompt_opening = trainer, prompt_opening
        wrap(trainer, "_calculate_rewards", self._calculate)
        wrap(trainer, "_generate_and_score_completions", self._generate)
        trainer.add_callback(self)

    # ---- one function, on this process's part of a rollout

    def _guarded(self, path: str, function: Callable) -> Callable:
        asynchronous = inspect.iscoroutinefunction(function)
        if isinstance(function, torch.nn.Module):
            return function
        if asynchronous and not self.section.isolated:

            async def guarded(log_metric, log_extra, **arguments):
                logged = Logged()
                if names(function, OPENING):
                    arguments.setdefault(OPENING, self.prompt_opening)
                rewards = await function(
                    **arguments, log_metric=logged.log_metric, log_extra=logged.log_extra
                )
                if logged.broken:
                    self._refuse(path, logged.broken)
                for name, value in logged.metrics:
                    log_metric(name, value)
                for name, values in logged.columns:
                    log_extra(name, values)
                return rewards

        elif asynchronous:

            async def guarded(**arguments):
                return await asyncio.to_thread(self._score, path, function, arguments)

        else:

            def guarded(**arguments):
                return self._score(path, function, arguments)

        guarded.__name__ = get_callable_name(function)  # TRL puts it into names of metrics
        return guarded

    def _score(self, path: str, function: Callable, arguments: dict) -> list[float | None]:
        """What `function` returns for TRL's `arguments`, with None where it fails."""
        log_metric, log_extra = arguments.pop("log_metric"), arguments.pop("log_extra")
        if self.section.isolated:
            arguments["trainer_state"] = _small_state(arguments["trainer_state"])
        if names(function, OPENING):
            arguments.setdefault(OPENING, self.prompt_opening)
        _check_signature(path, function, arguments)
        step, count = self.trainer.state.global_step, len(arguments["completions"])
        try:
            scored = self._calls(path, function, arguments).score(self.section.per)
        except CannotHandOver as error:
            raise RecipeError(
                "trainer.reward_funcs",
                f"{path!r} cannot be called in a process of its own, the dataset has a column "
                f"that cannot be handed over ({error}); set rewards.isolated to false",
            ) from None
        except ContractBroken as broken:
            self._refuse(path, str(broken))
            return [None] * count
        with self._lock:
            self.failures.keep(path, scored, arguments, step + 1)
            if step == 0 and scored.failed_on_everything:
                first = min(scored.failures.items())[1]["failure"]
                raise RecipeError(
                    "trainer.reward_funcs",
                    f"{path!r} failed on every completion of the first rollout, it {first}; "
                    f"the tracebacks are in {self.failures.file}",
                )
            self._failed |= scored.failures.keys()
            self._not_scored |= set(range(count)) if scored.abandoned else scored.failures.keys()
            self._log(path, scored, log_metric, log_extra)
        return scored.rewards

    def _refuse(self, path: str, clause: str) -> None:
        """Stop the run: `clause` says how a function broke the contract.

        Raises RecipeError in the first step.
        """
        sentence = f"{path!r} {clause}"
        if self.trainer.state.global_step == 0:
            raise RecipeError("trainer.reward_funcs", sentence) from None
        self._broken = sentence

    def _calls(self, path: str, function: Callable, arguments: dict) -> RewardCalls:
        """The reward calls of `function` for a rollout with these `arguments`."""
        step, count = self.trainer.state.global_step, len(arguments["completions"])
        in_all_processes = count * self.trainer.accelerator.num_processes

        def call(rows: list[int]) -> dict:
            part = {
                name: (
                    [value[row] for row in rows]
                    if isinstance(value, list) and len(value) == count
                    else value
                )
                for name, value in arguments.items()
            }
            if not self.section.isolated:
                return call_reward(function, part, len(rows))
            seed = f"{self.seed} {step} {path} {part['completions']!r}"
            return self.pool.call(path, part, seed=seed)

        return RewardCalls(
            _groups(arguments["prompts"]),
            call,
            self.pool.map if self.section.isolated else _in_turn,
            too_many=lambda failures: self.failures.too_many(failures, in_all_processes),
        )

    def _log(
        self, path: str, scored: RolloutRewards, log_metric: Callable, log_extra: Callable
    ) -> None:
        """Hand what a function logged to TRL, NaN for metrics that it logged only earlier."""
        metrics = scored.metrics()
        names = self._metrics[path] = self._metrics.get(path, set()) | metrics.keys()
        for name in sorted(names):
            log_metric(name, metrics.get(name, math.nan))
        for name, values in scored.columns().items():
            log_extra(name, values)

    # ---- all functions, in all processes

    def _calculate(self, calculate: Callable, inputs: list, *arguments) -> torch.Tensor:
        """TRL's table of rewards (N, functions) of all processes.

        The rewards of a completion that one function failed on are all NaN.
        """
        self._failed, self._not_scored, self._broken = set(), set(), None
        table, metrics = calculate(inputs, *arguments), self.trainer._pending_metrics
        here = {
            "count": len(inputs),
            "failed": len(self._failed),
            "not_scored": sorted(self._not_scored),
            "broken": self._broken,
            "last": self.failures.last if self._failed else None,
            "metrics": list(metrics),
        }
        processes = gather_object([here])
        names = {name for process in processes for name in process["metrics"]}
        for name in names - metrics.keys():
            # TRL gathers metrics, so every process must log what one process logs.
            self.trainer._log_metric(name, math.nan)
        first = 0
        for process in processes:
            table[[first + row for row in process["not_scored"]]] = torch.nan
            first += process["count"]
        self.failures.count(sum(process["failed"] for process in processes), first)
        lasts = [process["last"] for process in processes if process["last"]]
        self.failures.last = lasts[0] if lasts else self.failures.last
        if broken := [process["broken"] for process in processes if process["broken"]]:
            table[:] = torch.nan
            step = self.trainer.state.global_step + 1
            self.stopped_by = f"Step {step}: the reward function {broken[0]}"
        self._table = table
        return table

    def _generate(self, generate: Callable, inputs: list) -> dict:
        """A rollout, after which the metric of groups without signal counts those without rewards.

        trl 1.13.0 counts a group in which nothing is scored as one with a signal.
        """
        # Read before the call: Unsloth leaves the model in training mode.
        trainer, training = self.trainer, self.trainer.model.training
        rollout = generate(inputs)
        size = trainer.num_generations if training else trainer.num_generations_eval
        rewards = compared_rewards(
            self._table, trainer.reward_weights, size, trainer.multi_objective_aggregation
        )  # (N,)
        metrics = trainer._metrics["train" if training else "eval"]
        metrics["frac_reward_zero_std"][-1:] = [frac_without_signal(rewards, size)]
        if rewards.isnan().all() and not self._unscored_reported and self.stopped_by is None:
            self._unscored_reported = True
            logger.warning(
                "[GTPO] Step %d: no completion of this rollout has a reward, so nothing is learned;"
                " look at what trainer.reward_funcs return None for",
                trainer.state.global_step + 1,
            )
        return rollout

    def on_step_end(self, args, state, control, **kwargs):
        """Log the count of failures, and stop the run where there are too many."""
        failures = self.failures
        # TRL logs the mean of the list, which is exact for one value.
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
        """What a checkpoint keeps for `restore`."""
        return self.failures.state()

    def restore(self, state: dict) -> None:
        """Go on from the `resume_state` of a checkpoint."""
        self.failures.restore(state, cut=self.trainer.accelerator.is_main_process)

    def on_train_end(self, args, state, control, **kwargs):
        """End the processes of the pool."""
        self.pool.close()


def _in_turn(task: Callable, items: list) -> list:
    return [task(item) for item in items]


def _groups(prompts: list) -> list[list[int]]:
    """The rows of each group: the completions of a prompt stand together."""
    rows = range(len(prompts))
    return [list(group) for _, group in itertools.groupby(rows, key=lambda row: repr(prompts[row]))]


def _small_state(state: TrainerState) -> SimpleNamespace:
    """`state` for another process, which need not import transformers for it.

    It has the last 100 log lines only, so that calls do not grow with every step.
    """
    return SimpleNamespace(**{**vars(state), "log_history": state.log_history[-100:]})


def _check_signature(path: str, function: Callable, arguments: dict) -> None:
    """Raises RecipeError where `function` does not take TRL's `arguments`."""
    try:
        inspect.signature(function).bind(**arguments, log_metric=None, log_extra=None)
    except TypeError as error:
        raise RecipeError(
            "trainer.reward_funcs",
            f"{path!r} does not take what TRL hands over, {', '.join(arguments)} ({error}); "
            "take what you need by name, and the rest as **kwargs",
        ) from None
    except ValueError:  # some functions in C have no signature
        return
