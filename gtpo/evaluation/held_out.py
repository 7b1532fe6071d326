"""The recipe's held-out problems, evaluated before, while and after a run trains."""

import logging
from pathlib import Path

from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from gtpo.evaluation.draw import evaluate, rendered_prompts
from gtpo.evaluation.file import EvaluationFile, make_header
from gtpo.evaluation.scores import Scores, means
from gtpo.models.generation import Sampling, policy_sampler
from gtpo.recipe import Recipe
from gtpo.system.console import LOG_FILE_ONLY
from gtpo.system.signals import Interrupted, Interruption

# Its lines are on the terminal already.
logger = logging.getLogger(LOG_FILE_ONLY)

METRICS = {
    "accuracy": "accuracy",
    "format rate": "format_rate",
    "truncated": "truncation_rate",
    "mean length": "mean_length",
}


class HeldOut(TrainerCallback):
    """Evaluates a policy on held-out problems into `run_dir`/evaluation; as a callback, every
    `evaluation.every` steps.

    Training goes on as if nothing had been: completions are drawn with generators of their own, the
    model gets its mode back, and no metric of the trainer is touched. Logs evaluation/accuracy,
    evaluation/format_rate, evaluation/truncation_rate and evaluation/mean_length (tokens).
    """

    # in checkpoints
    state_key, earlier_state_keys = "held_out", ("HeldOut",)

    def __init__(
        self,
        recipe: Recipe,
        policy,
        problems,
        run_dir: Path,
        trainer: Trainer,
        interruption: Interruption | None = None,
    ):
        self.section, self.problems, self.folder, self.trainer = (
            recipe.evaluation,
            problems,
            run_dir / "evaluation",
            trainer,
        )
        self.sampling = Sampling(
            recipe.evaluation.temperature, 1.0, recipe.seed, recipe.max_completion_length
        )
        self.prompts = rendered_prompts(
            problems, policy.tokenizer, recipe.training.chat_template_kwargs
        )
        self.told = {
            "model": recipe.model.model_name,
            "run": run_dir.name,
            "backend": policy.backend,
            "split": recipe.evaluation.split,
            "dataset": recipe.evaluation.path or recipe.dataset.name or recipe.dataset.path,
        }
        self.policy, self.interruption = policy, interruption or Interruption()
        # the step whose evaluation was cut short, because somebody asked to stop
        self.pending: int | None = None

    def evaluate(self, name: str) -> Scores:
        """The mean scores of the policy as it is now; its completions go to
        evaluation/`name`.jsonl.
        """
        told = {**self.told, "step": self.trainer.state.global_step}
        file = EvaluationFile(
            self.folder / f"{name}.jsonl",
            make_header(
                self.problems,
                self.prompts,
                self.sampling,
                self.section.samples,
                weights=f"step {told['step']}",
                **told,
            ),
        )
        draw = policy_sampler(self.policy, self.sampling)

        def draw_unless_asked_to_stop(prompts, seeds):
            self.interruption.raise_if_requested("the evaluation goes on with --resume")
            return draw(prompts, seeds)

        rows = evaluate(
            file,
            draw_unless_asked_to_stop,
            self.problems,
            self.prompts,
            batch_size=self.section.batch_size,
            keep_bar=name in ("before", "after"),
        )
        return means(rows, self.section.samples)

    def on_step_end(self, args, state, control, **kwargs):
        if (
            not self.section.every
            or state.global_step % self.section.every
            or state.global_step >= state.max_steps
        ):
            return  # after the last step comes the evaluation after training
        try:
            self._evaluate_step(state, control)
        except Interrupted:  # the checkpoint comes first
            self.pending = state.global_step

    def _evaluate_step(self, state, control):
        should_log = control.should_log
        found = self.evaluate(f"step-{state.global_step}")
        # Not trainer.log, which would log, and forget, TRL's metrics of a step that is not logged
        # yet.
        Trainer.log(
            self.trainer,
            {f"evaluation/{name}": found.scores[score].mean for score, name in METRICS.items()},
        )
        control.should_log = should_log  # which logging switches off
        self.say(
            f"step {state.global_step:>4}  held-out {found}, {found.scores['mean length'].mean:.0f}"
            " tokens"
        )

    def resume_state(self) -> dict:
        return {"pending": self.pending}

    def restore(self, kept: dict) -> None:
        """Make up for an evaluation that was cut short; its line comes before those of the same
        step.
        """
        if kept["pending"] is None:
            return
        history = self.trainer.state.log_history
        place = next(
            (i for i, line in enumerate(history) if line["step"] == kept["pending"]), len(history)
        )
        self._evaluate_step(self.trainer.state, self.trainer.control)
        history.insert(place, history.pop())

    @staticmethod
    def say(line: str) -> None:
        tqdm.write(line)
        logger.info(line)
