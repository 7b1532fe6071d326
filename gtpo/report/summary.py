"""A newcomer's three questions about a configuration's runs, answered in plain sentences with
numbers from their records.
"""

import math
import statistics
from collections import Counter
from typing import NamedTuple

from gtpo.evaluation.scores import score_differences
from gtpo.report.comparison import Configuration, best_window, windows
from gtpo.report.curves import PANELS, panel_series

FEW_STEPS = 10  # two windows
NEARLY_DETERMINISTIC = 0.1  # of the initial entropy
PANEL = {panel.name: panel for panel in PANELS}


class Answer(NamedTuple):
    question: str
    verdict: str  # yes, no, careful, or unknown: the page's sign and colour
    word: str  # the verdict as a person says it
    sentences: list[str]
    texts: list[tuple[str, int]] = []  # protected texts, and in how many completions


def answers(configuration: Configuration) -> list[Answer]:
    return [
        _did_it_learn(configuration),
        _did_it_stay_stable(configuration),
        _what_was_protected(configuration),
    ]


def _did_it_learn(configuration: Configuration) -> Answer:
    question, told = "Did it learn?", []
    verdict, word = "unknown", "too early to say"
    reward = panel_series(PANEL["reward"], configuration)
    if reward:
        first, last = windows(reward)
        if len(reward) >= FEW_STEPS:
            noise = 2 * math.hypot(first.error, last.error)
            verdict, word = (
                ("yes", "yes")
                if last.mean - first.mean > noise
                else (
                    ("no", "it got worse")
                    if first.mean - last.mean > noise
                    else ("careful", "no clear change")
                )
            )
        told.append(
            f"The mean reward went from {first.mean:.2f} ({first.steps}) to {last.mean:.2f}"
            f" ({last.steps})."
        )
        told += _shares(configuration)
    if held_out := _held_out(configuration):
        gain, sentence = held_out
        told.append(sentence)
        if verdict == "yes" and gain < 0:
            verdict, word = "careful", "reward yes, accuracy no"
    no_signal = panel_series(PANEL["no_signal"], configuration)
    if no_signal and (share := windows(no_signal)[1].mean) > 0.5:
        told.append(
            f"Near the end {share:.0%} of the groups had no signal: all their completions earned"
            " the same reward."
        )
    return Answer(question, verdict, word, told or ["No rewards were recorded."])


def _held_out(configuration: Configuration) -> tuple[float, str] | None:
    """By how much accuracy rose from before to after training, and that as a sentence."""
    pairs = [
        (run.evaluations["before"], run.evaluations["after"])
        for run in configuration.runs
        if {"before", "after"} <= run.evaluations.keys()
    ]
    # one may have been cut
    pairs = [pair for pair in pairs if pair[0].scores.problems == pair[1].scores.problems]
    if not pairs:
        return None
    accuracy, format_rate = (
        [
            statistics.fmean(pair[when].scores.by_name[name].mean for pair in pairs)
            for when in (0, 1)
        ]
        for name in ("accuracy", "format rate")
    )
    after = pairs[0][1]
    how = (
        "greedy"
        if not after.header["temperature"]
        else f"at temperature {after.header['temperature']:g}"
    )
    among = f", means of {len(pairs)} runs" if len(pairs) > 1 else ""
    sure = ""
    if len(pairs) == 1 and pairs[0][0].header["samples"] == after.header["samples"]:
        change = score_differences(after.rows, pairs[0][0].rows, after.header["samples"]).by_name[
            "accuracy"
        ]
        sure = (
            f" ({100 * change.mean:+.1f} points, 95 % interval {100 * change.low:+.1f} to"
            f" {100 * change.high:+.1f})"
        )
    return (
        accuracy[1] - accuracy[0],
        (
            f"On {after.scores.problems} held-out problems ({how}{among}), accuracy went from"
            f" {accuracy[0]:.1%} to {accuracy[1]:.1%}{sure}, format from {format_rate[0]:.1%} to"
            f" {format_rate[1]:.1%}."
        ),
    )


def _shares(configuration: Configuration) -> list[str]:
    parts = []
    for name, text in (("format", "well-formed completions went"), ("correct", "correct ones")):
        if series := panel_series(PANEL[name], configuration):
            first, last = windows(series)
            parts.append(f"{text} from {first.mean:.0%} to {last.mean:.0%}")
    return [f"Meanwhile {', '.join(parts)}."] if parts else []


def _did_it_stay_stable(configuration: Configuration) -> Answer:
    worries: list[str] = []
    told = _fall(configuration, worries)
    entropy = panel_series(PANEL["entropy"], configuration)
    threshold = configuration.runs[0].number("gtpo_runtime.ent_threshold", 0.7)
    if entropy:
        values = [value for step in entropy.values() for value in step]
        first, last = windows(entropy)
        told.append(
            f"Mean entropy lay between {min(values):.3f} and {max(values):.3f} nats (threshold"
            f" {threshold:g}); it went from {first.mean:.3f} ({first.steps}) to {last.mean:.3f}"
            f" ({last.steps})."
        )
        if max(values) > threshold:
            worries.append("entropy above the threshold")
        if first.mean > 0 and last.mean < NEARLY_DETERMINISTIC * first.mean:
            worries.append("nearly deterministic")
            told.append(
                f"Entropy fell to {last.mean / first.mean:.0%} of what it was: the policy hardly"
                " explores."
            )
    if filtered := panel_series(PANEL["filtered"], configuration):
        shares = [statistics.fmean(values) for values in filtered.values()]
        everything = sum(value >= 1 for values in filtered.values() for value in values)
        told.append(
            f"The entropy filter switched off {statistics.fmean(shares):.1%} of the completions."
        )
        if everything:
            worries.append("filter switched off everything")
            told.append(
                f"In {_count(everything, 'step')} it switched off every completion: no gradient at"
                " all."
            )
    told += _alarms(configuration, worries)
    if any(counts := [run.series("gtpo/skipped_steps") for run in configuration.runs]):
        skipped = int(sum(max(count.values(), default=0) for count in counts))
        told.append(
            f"{_count(skipped, 'optimizer step')} skipped for non-finite gradients."
            if skipped
            else "No optimizer step was skipped."
        )
        worries += ["skipped steps"] * (skipped > 0)
    truncated = panel_series(PANEL["truncated"], configuration)
    if truncated and (share := windows(truncated)[1].mean) > 0.5:
        worries.append("most completions truncated")
        told.append(f"{share:.0%} of the last completions were cut off at the length limit.")
    told += _ends(configuration, worries)
    if not entropy and not worries:
        return Answer("Did it stay stable?", "unknown", "unknown", told)
    worries = list(dict.fromkeys(worries))
    return Answer(
        "Did it stay stable?", "careful" if worries else "yes", "; ".join(worries) or "yes", told
    )


def _fall(configuration: Configuration, worries: list[str]) -> list[str]:
    """Whether the reward lost more than a third of its gain, and more than noise (four standard
    errors) explains.
    """
    reward = panel_series(PANEL["reward"], configuration)
    if len(reward) < FEW_STEPS:
        return []
    (first, last), best = windows(reward), best_window(reward)
    if best.mean - last.mean <= max(
        (best.mean - first.mean) / 3, 4 * math.hypot(best.error, last.error)
    ):
        return []
    worries.append("reward fell")
    return [f"The reward fell from {best.mean:.2f} at its best ({best.steps}) to {last.mean:.2f}."]


def _ends(configuration: Configuration, worries: list[str]) -> list[str]:
    told = []
    for run in configuration.runs:
        of = f" of {run.max_steps}" if run.max_steps else ""
        which = f"The run {run.path.name}" if len(configuration.runs) > 1 else "The run"
        if not run.finished:
            worries.append("not finished")
            told.append(
                f"{which} is still going or ended early: step {run.last_step}{of} is the last one"
                " known."
            )
        elif run.max_steps and run.last_step < run.max_steps:
            worries.append("stopped early")
            told.append(f"{which} was stopped at step {run.last_step}{of}.")
    return told


def _alarms(configuration: Configuration, worries: list[str]) -> list[str]:
    alarms = [alarm for run in configuration.runs for alarm in run.alarms]
    if not alarms:
        return ["No alarm was raised."]
    worries.append(_count(len(alarms), "alarm"))
    kinds: dict[str, list[tuple[int, str]]] = {}
    for step, condition, evidence in sorted(alarms):
        kinds.setdefault(condition, []).append((step, evidence))
    return [_alarm(condition, times) for condition, times in kinds.items()]


def _alarm(condition: str, times: list[tuple[int, str]]) -> str:
    step, evidence = times[0]
    name = f" ({condition.replace('_', ' ')})" if condition else ""
    often = f" {len(times)} times, first" if len(times) > 1 else ""
    return f"Alarm{name}{often} at step {step}{f': {evidence}' if evidence else ''}."


def _what_was_protected(configuration: Configuration) -> Answer:
    question = "What did the conflict rule protect?"
    series = panel_series(PANEL["conflict"], configuration)
    if not series:
        return Answer(
            question,
            "unknown",
            "not recorded",
            ["Neither conflict tokens nor completions were recorded."],
        )
    first, last = windows(series)
    share = statistics.fmean(value for values in series.values() for value in values)
    told = [
        f"{share:.1%} of the completion tokens were in conflict: {first.mean:.1%} in {first.steps},"
        f" {last.mean:.1%} in {last.steps}."
    ]
    logs = [run.completions for run in configuration.runs]
    tokens, times = (
        sum(log.protected_tokens for log in logs),
        sum(log.protected_completions for log in logs),
    )
    amplified, worse = sum(log.amplified_tokens for log in logs), sum(log.worse for log in logs)
    pieces = sum((log.pieces for log in logs), Counter())
    most = max(pieces.values(), default=0)
    texts = [
        (text, count)
        for text, count in pieces.most_common(8)
        if text.strip() and count > 0.1 * most
    ][:5]
    weighted = configuration.runs[0].has_token_weights
    would = "" if weighted else "would have "
    if not any(log.groups for log in logs):
        told.append("Which tokens they were is not recorded.")
    elif tokens or amplified:
        told.append(
            f"GTPO {would}protected {tokens:,} tokens (weight 0) in {times:,} of {worse:,}"
            f" completions with a negative advantage, and {would}amplified {amplified:,} in better"
            " ones."
        )
    else:
        told.append("No token had a weight other than 1.")
    if not weighted:
        told.append("This trainer weighs every token 1, so it protected nothing.")
        return Answer(question, "unknown", "nothing: no token weights", told, texts)
    return Answer(
        question,
        "yes" if tokens else "unknown",
        f"{tokens:,} tokens" if tokens else "see below",
        told,
        texts,
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
