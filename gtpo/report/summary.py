"""Three questions about a configuration's runs, answered in sentences with numbers.

Did it learn? Did it stay stable? What did the conflict rule protect? docs/report.md says what
decides each answer.
"""

import math
import statistics
from collections import Counter
from typing import NamedTuple

from gtpo.evaluation.scores import score_differences
from gtpo.report.comparison import Configuration, StepWindow, best_window, windows
from gtpo.report.curves import PANELS, panel_series
from gtpo.report.run_record import ScoredEvaluation

MIN_STEPS = 10  # two windows of 5 steps; of fewer steps nothing is said
NEARLY_DETERMINISTIC = 0.1  # of the initial entropy
MAX_TEXTS = 5  # protected texts shown
PANEL = {panel.name: panel for panel in PANELS}


class Answer(NamedTuple):
    """A question with its answer: a headline and sentences."""

    question: str
    status: str  # yes, no, careful or unknown; decides the sign and colour on the page
    headline: str
    sentences: list[str]
    texts: list[tuple[str, int]] = []  # protected texts, and in how many completions


def answers(configuration: Configuration) -> list[Answer]:
    """Returns the answers to the three questions."""
    return [
        _did_it_learn(configuration),
        _did_it_stay_stable(configuration),
        _what_was_protected(configuration),
    ]


# ---- did it learn?


def _did_it_learn(configuration: Configuration) -> Answer:
    status, headline, sentences = "unknown", "too early to say", []
    if reward := _series("reward", configuration):
        first, last = windows(reward)
        if len(reward) >= MIN_STEPS:
            status, headline = _change_of_reward(first, last)
        sentences.append(
            f"The mean reward went from {first.mean:.2f} ({first.steps}) to {last.mean:.2f}"
            f" ({last.steps})."
        )
        sentences += _rates(configuration)
    if held_out := _held_out(configuration):
        gain, sentence = held_out
        sentences.append(sentence)
        if status == "yes" and gain < 0:
            status, headline = "careful", "reward yes, accuracy no"
    no_signal = _series("no_signal", configuration)
    if no_signal and (share := windows(no_signal)[1].mean) > 0.5:
        sentences.append(
            f"Near the end {share:.0%} of the groups gave no signal: all completions of a group had"
            " the same reward."
        )
    return Answer("Did it learn?", status, headline, sentences or ["No rewards were recorded."])


def _change_of_reward(first: StepWindow, last: StepWindow) -> tuple[str, str]:
    """The status and the headline; a change counts if it is over two standard errors."""
    noise = 2 * math.hypot(first.error, last.error)
    if last.mean - first.mean > noise:
        return "yes", "yes"
    if first.mean - last.mean > noise:
        return "no", "it got worse"
    return "careful", "no clear change"


def _rates(configuration: Configuration) -> list[str]:
    sentences = []
    for name, noun in (("format", "well-formed"), ("correct", "correct")):
        if series := _series(name, configuration):
            first, last = windows(series)
            sentences.append(
                f"The share of {noun} completions went from {first.mean:.0%} to {last.mean:.0%}."
            )
    return [" ".join(sentences)] if sentences else []


def _held_out(configuration: Configuration) -> tuple[float, str] | None:
    """The gain of accuracy from before to after training, and a sentence; None if not evaluated."""
    pairs = [
        (run.evaluations["before"], run.evaluations["after"])
        for run in configuration.runs
        if {"before", "after"} <= run.evaluations.keys()
    ]
    # An interrupted evaluation has fewer problems, so it cannot be compared.
    pairs = [pair for pair in pairs if pair[0].scores.problems == pair[1].scores.problems]
    if not pairs:
        return None
    accuracy_before, accuracy_after = _means(pairs, "accuracy")
    format_before, format_after = _means(pairs, "format rate")
    before, after = pairs[0]
    temperature = after.header["temperature"]
    drawn = f"temperature {temperature:g}" if temperature else "greedy"
    runs = f", means of {len(pairs)} runs" if len(pairs) > 1 else ""
    interval = _interval_of_gain(before, after) if len(pairs) == 1 else ""
    return (
        accuracy_after - accuracy_before,
        f"On {after.scores.problems} held-out problems ({drawn}{runs}), accuracy went from"
        f" {accuracy_before:.1%} to {accuracy_after:.1%}{interval}. The share of well-formed"
        f" completions went from {format_before:.1%} to {format_after:.1%}.",
    )


def _means(pairs: list[tuple[ScoredEvaluation, ScoredEvaluation]], name: str) -> list[float]:
    """The mean over runs of a score before training, and of the same score after it."""
    return [
        statistics.fmean(evaluation.scores.by_name[name].mean for evaluation in evaluations)
        for evaluations in zip(*pairs, strict=True)
    ]


def _interval_of_gain(before: ScoredEvaluation, after: ScoredEvaluation) -> str:
    samples = after.header["samples"]
    if before.header["samples"] != samples:
        return ""
    gain = score_differences(after.rows, before.rows, samples).by_name["accuracy"]
    mean, low, high = (100 * value for value in gain)
    return f" ({mean:+.1f} points, 95 % interval {low:+.1f} to {high:+.1f})"


# ---- did it stay stable?


def _did_it_stay_stable(configuration: Configuration) -> Answer:
    observations = [
        *_fall_of_reward(configuration),
        *_entropy(configuration),
        *_filter(configuration),
        *_alarms(configuration),
        *_skipped_steps(configuration),
        *_truncation(configuration),
        *_early_ends(configuration),
    ]
    question, sentences = (
        "Did it stay stable?",
        [observation.sentence for observation in observations],
    )
    worries = list(
        dict.fromkeys(observation.worry for observation in observations if observation.worry)
    )
    if worries:
        return Answer(question, "careful", "; ".join(worries), sentences)
    if not _series("entropy", configuration):
        return Answer(question, "unknown", "unknown", sentences)
    return Answer(question, "yes", "yes", sentences)


class Observation(NamedTuple):
    """A sentence about stability, and its short name if it is a reason to worry."""

    sentence: str
    worry: str = ""


def _fall_of_reward(configuration: Configuration) -> list[Observation]:
    """Finds a reward that lost over a third of its gain, and more than four standard errors."""
    reward = _series("reward", configuration)
    if len(reward) < MIN_STEPS:
        return []
    (first, last), best = windows(reward), best_window(reward)
    noise = 4 * math.hypot(best.error, last.error)
    if best.mean - last.mean <= max((best.mean - first.mean) / 3, noise):
        return []
    sentence = (
        f"The reward fell from {best.mean:.2f} at its best ({best.steps}) to {last.mean:.2f}."
    )
    return [Observation(sentence, "reward fell")]


def _entropy(configuration: Configuration) -> list[Observation]:
    entropy = _series("entropy", configuration)
    if not entropy:
        return []
    values = [value for step in entropy.values() for value in step]
    first, last = windows(entropy)
    threshold = configuration.runs[0].number("gtpo_runtime.ent_threshold", 0.7)
    sentence = (
        f"The mean entropy was between {min(values):.3f} and {max(values):.3f} nats (threshold"
        f" {threshold:g}). It went from {first.mean:.3f} ({first.steps}) to {last.mean:.3f}"
        f" ({last.steps})."
    )
    above = max(values) > threshold
    observations = [Observation(sentence, "entropy above the threshold" if above else "")]
    if first.mean > 0 and last.mean < NEARLY_DETERMINISTIC * first.mean:
        sentence = (
            f"The entropy fell to {last.mean / first.mean:.0%} of what it was: the policy hardly"
            " explores any more."
        )
        observations.append(Observation(sentence, "nearly deterministic"))
    return observations


def _filter(configuration: Configuration) -> list[Observation]:
    filtered = _series("filtered", configuration)
    if not filtered:
        return []
    share = statistics.fmean(statistics.fmean(values) for values in filtered.values())
    observations = [Observation(f"The entropy filter switched off {share:.1%} of the completions.")]
    if steps := sum(value >= 1 for values in filtered.values() for value in values):
        sentence = (
            f"In {_count(steps, 'step')} it switched off every completion, so there was no"
            " gradient."
        )
        observations.append(Observation(sentence, "filter switched off everything"))
    return observations


def _alarms(configuration: Configuration) -> list[Observation]:
    alarms = sorted(alarm for run in configuration.runs for alarm in run.alarms)
    if not alarms:
        return [Observation("No alarm was raised.")]
    worry = _count(len(alarms), "alarm")
    conditions = dict.fromkeys(alarm.condition for alarm in alarms)
    observations = []
    for condition in conditions:
        events = [alarm for alarm in alarms if alarm.condition == condition]
        name = f" ({condition.replace('_', ' ')})" if condition else ""
        times = f" {len(events)} times, first" if len(events) > 1 else ""
        evidence = f": {events[0].evidence}" if events[0].evidence else ""
        sentence = f"Alarm{name}{times} at step {events[0].step}{evidence}."
        observations.append(Observation(sentence, worry))
    return observations


def _skipped_steps(configuration: Configuration) -> list[Observation]:
    counts = [run.series("gtpo/skipped_steps") for run in configuration.runs]
    if not any(counts):
        return []
    skipped = int(sum(max(count.values(), default=0) for count in counts))
    if not skipped:
        return [Observation("No optimizer step was skipped.")]
    were = "was" if skipped == 1 else "were"
    steps = _count(skipped, "optimizer step")
    return [
        Observation(f"{steps} {were} skipped because of non-finite gradients.", "skipped steps")
    ]


def _truncation(configuration: Configuration) -> list[Observation]:
    truncated = _series("truncated", configuration)
    if not truncated or (share := windows(truncated)[1].mean) <= 0.5:
        return []
    sentence = f"Near the end {share:.0%} of the completions were cut off at the length limit."
    return [Observation(sentence, "most completions truncated")]


def _early_ends(configuration: Configuration) -> list[Observation]:
    observations = []
    for run in configuration.runs:
        steps = f"{run.last_step} of {run.max_steps}" if run.max_steps else str(run.last_step)
        which = f"The run {run.path.name}" if len(configuration.runs) > 1 else "The run"
        if not run.finished:
            sentence = f"{which} is still training or ended early. Its last known step is {steps}."
            observations.append(Observation(sentence, "not finished"))
        elif run.max_steps and run.last_step < run.max_steps:
            observations.append(
                Observation(f"{which} was stopped at step {steps}.", "stopped early")
            )
    return observations


# ---- what did the conflict rule protect?


def _what_was_protected(configuration: Configuration) -> Answer:
    question = "What did the conflict rule protect?"
    conflicts = _series("conflict", configuration)
    if not conflicts:
        sentence = "Neither conflict tokens nor completions were recorded."
        return Answer(question, "unknown", "not recorded", [sentence])
    first, last = windows(conflicts)
    share = statistics.fmean(value for values in conflicts.values() for value in values)
    sentences = [
        f"{share:.1%} of the completion tokens were in conflict: {first.mean:.1%} in {first.steps},"
        f" {last.mean:.1%} in {last.steps}."
    ]
    logs = [run.completions for run in configuration.runs]
    protected = sum(log.protected_tokens for log in logs)
    amplified = sum(log.amplified_tokens for log in logs)
    completions = sum(log.protected_completions for log in logs)
    worse = sum(log.worse for log in logs)
    has_weights = configuration.runs[0].has_token_weights
    would_have = "" if has_weights else "would have "
    if not any(log.groups for log in logs):
        sentences.append("Which tokens these were was not recorded.")
    elif protected or amplified:
        sentences.append(
            f"GTPO {would_have}protected {protected:,} tokens (weight 0) in {completions:,} of"
            f" {worse:,} completions with a negative advantage. It {would_have}amplified"
            f" {amplified:,} tokens in completions with a positive one."
        )
    else:
        sentences.append("No token had weight 0 or a weight above 1.")
    texts = _most_protected(sum((log.protected_pieces for log in logs), Counter()))
    if not has_weights:
        sentences.append("This trainer gives every token weight 1, so it protected nothing.")
        return Answer(question, "unknown", "nothing: no token weights", sentences, texts)
    if protected:
        return Answer(question, "yes", f"{protected:,} tokens", sentences, texts)
    nothing = "no tokens" if any(log.groups for log in logs) else "not recorded"
    return Answer(question, "unknown", nothing, sentences, texts)


def _most_protected(pieces: Counter[str]) -> list[tuple[str, int]]:
    """The most frequent texts, without white space and those with a tenth of the highest count."""
    highest = max(pieces.values(), default=0)
    texts = [
        (text, count)
        for text, count in pieces.most_common(8)
        if text.strip() and count > 0.1 * highest
    ]
    return texts[:MAX_TEXTS]


def _series(name: str, configuration: Configuration) -> dict[int, list[float]]:
    """The values of a panel by step, one for each run."""
    return panel_series(PANEL[name], configuration)


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
