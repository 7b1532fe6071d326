"""Evaluate the recipe's held-out problems before, during and after training."""

import logging
from pathlib import Path

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from gtpo.evaluation.draw import evaluate, rendered_prompts
from gtpo.evaluation.file import EvaluationFile, make_header, turn_ends_note
from gtpo.evaluation.scores import Scores, mean_scores
from gtpo.models.generation import Sampling, policy_sampler
from gtpo.models.prompt import prompt_opening
from gtpo.recipe import Recipe
from gtpo.system.console import LOG_FILE_ONLY
from gtpo.system.signals import Interrupted, Interruption

logger = logging.getLogger(LOG_FILE_ONLY)  # tqdm.write shows its lines on the terminal

METRICS = {  # score -> metric
    "accuracy": "evaluation/accuracy",
    "format rate": "evaluation/format_rate",
    "truncated": "evaluation/truncation_rate",
    "mean length": "evaluation/mean_length",  # tokens
}


class HeldOut(TrainerCallback):
    """Evaluates a policy on held-out problems into `run_dir`/evaluation.

    As a callback it does so every `evaluation.every` steps and logs METRICS. Training is not
    changed: completions have their own random generators, the model gets its mode back, and the
    trainer's metrics are not touched.
    """

    state_key, earlier_state_keys = "held_out", ("HeldOut",)  # in checkpoints

    def __init__(
        self,
        recipe: Recipe,
        policy,
        problems,
        run_dir: Path,
        trainer: Trainer,
        interruption: Interruption | None = None,
    ):
        self.section, self.policy, self.problems = recipe.evaluation, policy, problems
        self.folder, self.trainer = run_dir / "evaluation", trainer
        self.interruption = interruption or Interruption()
        self.sampling = Sampling(
            temperature=recipe.evaluation.temperature,
            top_p=1.0,
            seed=recipe.seed,
            max_completion_length=recipe.max_completion_length,
        )
        self.prompts = rendered_prompts(
            problems, policy.tokenizer, recipe.training.chat_template_kwargs
        )
        self.notes = {
            "model": recipe.model.model_name,
            "run": run_dir.name,
            "backend": policy.backend,
            "split": recipe.evaluation.split,
            "dataset": recipe.evaluation.path or recipe.dataset.name or recipe.dataset.path,
            "prompt_opening": prompt_opening(
                policy.tokenizer, problems[0]["prompt"], recipe.training.chat_template_kwargs
            ),
            **turn_ends_note(policy.tokenizer),
        }
        # The step whose evaluation was interrupted; None if none was.
        self.pending: int | None = None

    def evaluate(self, name: str) -> Scores:
        """Returns the policy's mean scores; its completions go to evaluation/`name`.jsonl."""
        step = self.trainer.state.global_step
        header = make_header(
            self.problems,
            self.prompts,
            self.sampling,
            self.section.samples,
            weights=f"step {step}",
            **self.notes,
            step=step,
        )
        sampler = policy_sampler(self.policy, self.sampling)

        def sampler_that_can_stop(prompts, seeds):
            self.interruption.raise_if_requested("the evaluation continues with --resume")
            return sampler(prompts, seeds)

        rows = evaluate(
            EvaluationFile(self.folder / f"{name}.jsonl", header),
            sampler_that_can_stop,
            self.problems,
            self.prompts,
            batch_size=self.section.batch_size,
            keep_bar=name in ("before", "after"),
        )
        return mean_scores(rows, self.section.samples)

    def on_step_end(self, args, state, control, **kwargs):
        """Evaluates after the steps that the recipe names."""
        if not self.section.every or state.global_step % self.section.every:
            return
        if state.global_step >= state.max_steps:
            return  # the evaluation after training follows
        try:
            self._evaluate_step(state, control)
        except Interrupted:  # the checkpoint comes first; `restore` evaluates later
            self.pending = state.global_step

    def _evaluate_step(self, state, control):
        should_log = control.should_log
        scores = self.evaluate(f"step-{state.global_step}")
        # trainer.log would also log TRL's metrics of the current step, which is not complete, and
        # then forget them.
        Trainer.log(
            self.trainer,
            {metric: scores.by_name[score].mean for score, metric in METRICS.items()},
        )
        control.should_log = should_log  # logging sets it to False
        length = scores.by_name["mean length"].mean
        self.say(f"step {state.global_step:>4}  held-out {scores}, {length:.0f} tokens")

    def resume_state(self) -> dict:
        """Returns what a checkpoint keeps: the step whose evaluation was interrupted."""
        return {"pending": self.pending}

    def restore(self, state: dict) -> None:
        """Repeats an evaluation that was interrupted.

        Its line comes before the other lines of its step, as if it had not been interrupted.
        """
        if state["pending"] is None:
            return
        history = self.trainer.state.log_history
        steps = [line["step"] for line in history]
        place = steps.index(state["pending"]) if state["pending"] in steps else len(steps)
        self._evaluate_step(self.trainer.state, self.trainer.control)
        history.insert(place, history.pop())

    @staticmethod
    def say(line: str) -> None:
        """Shows a line above the progress bar and writes it to the log file."""
        tqdm.write(line)
        logger.info(line)
