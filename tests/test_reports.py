"""Reports without a browser: reading a run directory, the summary, and the files written."""

import json
import random
import re
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from run_on_disk import RIGHT, WRONG, group, rising, write_evaluation, write_run

import report_run
from gtpo.errors import RecipeError
from gtpo.report import curves
from gtpo.report import page as reports
from gtpo.report.comparison import configurations, differing_keys
from gtpo.report.completion_log import CompletionLog, RecordedCompletion
from gtpo.report.conflict_view import choose_steps, conflict_view
from gtpo.report.run_record import AlarmEvent, RunRecord, read_run
from gtpo.report.summary import Answer, answers

TWO = [(RIGHT, 20.0), (WRONG, 10.0)]
ONE_CURVE = [{"step": 1, "reward": 1.0}]  # drawn quickly


def record_of(folder, *lines_and_history, **more) -> RunRecord:
    return read_run(write_run(folder, *lines_and_history, **more))


def log_of(tmp_path, lines) -> CompletionLog:
    return record_of(tmp_path / "run", lines).completions


def labels(runs: list[RunRecord]) -> list[str]:
    return [configuration.label for configuration in configurations(runs)]


def answers_of(record: RunRecord) -> dict[str, Answer]:
    """The three answers of one run by short names of the questions."""
    questions = ("learn", "stable", "protected")
    return dict(zip(questions, answers(configurations([record])[0]), strict=True))


# ---- the completions file


def test_protected_texts_are_counted_once_per_completion(tmp_path):
    log = log_of(tmp_path, group([(RIGHT, 20.0), (WRONG, 10.0), (WRONG, 10.0)]))
    assert dict(log.protected_pieces) == {"<reasoning>\n": 2, "2+2": 2, "</answer><end>": 2}
    assert (log.protected_completions, log.worse) == (2, 2)
    assert (log.protected_tokens, log.amplified_tokens) == (10, 5)


def test_consecutive_tags_are_one_text(tmp_path):
    longer = [*RIGHT[:-3], "4", "!", "</answer>", "<end>"]
    log = log_of(tmp_path, group([(RIGHT, 20.0), (longer, 3.0)]))
    assert log.protected_pieces["</reasoning>\n<answer>"] == 1


def test_an_incomplete_last_line_is_left_out_and_counted(tmp_path):
    run = write_run(tmp_path / "run", group(TWO))
    whole = (run / "completions.jsonl").read_text()
    (run / "completions.jsonl").write_text(whole + whole[:200])
    log = CompletionLog(run / "completions.jsonl")
    assert (log.completions, log.unreadable) == (2, 1)


BAD_TOKENS = '{"step": 1, "group": 0, "row": 0, "tokens": 7}'


@pytest.mark.parametrize(
    "line", ["[]", "null", "{}", '{"step": "x"}', "\x00", BAD_TOKENS, "{" * 5000]
)
def test_a_line_that_is_not_a_completion_is_left_out(tmp_path, line):
    run = write_run(tmp_path / "run", group(TWO))
    with (run / "completions.jsonl").open("a") as file:
        file.write(line + "\n")
    log = CompletionLog(run / "completions.jsonl")
    assert (log.completions, log.unreadable) == (2, 1)


def test_steps_that_a_resumed_run_repeats_replace_the_earlier_ones(tmp_path):
    lines = []
    for step in (1, 2, 3):
        lines += group([(RIGHT, 20.0), (WRONG, 0.0)], step=step)
    for step in (2, 3):
        lines += group([(RIGHT, 20.0), (WRONG, 18.0)], step=step, rollout=step - 1)
    log = log_of(tmp_path, lines)
    rewards = {step: values["reward"] for step, values in log.averages().items()}
    assert rewards == {1: 10.0, 2: 19.0, 3: 19.0}
    assert [group.step for group in log.groups] == [1, 2, 3]


def test_a_group_whose_rows_are_trained_on_at_two_steps_is_one_group(tmp_path):
    lines = group([(RIGHT, 20.0), (WRONG, 10.0), (RIGHT, 20.0)], step=2)
    lines[1]["step"] = 1
    log = log_of(tmp_path, lines)
    assert [(group.step, len(log.read(group))) for group in log.groups] == [(1, 3)]


def test_weights_that_gtpo_would_have_used_are_those_that_it_uses():
    for rewards in ((20.0, 10.0, 10.0), (1.0, 1.0, 4.0), (3.0, 3.0, 3.0)):
        rows = list(zip((RIGHT, WRONG, RIGHT[:4]), rewards, strict=True))
        theirs = group(rows, weight=3.0)
        for line, other in zip(theirs, group(rows, weight=None), strict=True):
            assert RecordedCompletion(**other).weights is None
            assert RecordedCompletion(**other).token_weights(3.0) == line["weights"]


def test_per_token_lists_of_different_lengths_are_not_shown():
    line = group(TWO)[0]
    assert RecordedCompletion(**{**line, "tokens": line["tokens"][1:]}).ids is None
    assert RecordedCompletion(**{**line, "entropies": [0.1]}).entropies is None
    assert RecordedCompletion(**{**line, "prefix": 99, "suffix": -1}).conflicts == len(RIGHT)


@pytest.mark.slow
@pytest.mark.parametrize("nonsense", [float("nan"), float("inf"), "9" * 5000, -0.0, 10**30, None])
def test_values_that_are_not_finite_numbers_do_not_stop_a_report(tmp_path, nonsense):
    lines = group(TWO)
    lines[0] |= {
        "reward": nonsense,
        "advantage": nonsense,
        "entropy": nonsense,
        "rewards": {"r": nonsense},
        "weights": [nonsense] * len(RIGHT),
        "entropies": [nonsense] * len(RIGHT),
    }
    history = [
        {"step": step, "reward": nonsense, "gtpo/completion_entropy": nonsense, "grad_norm": 1.0}
        for step in range(1, 9)
    ]
    run = write_run(
        tmp_path / "run",
        lines,
        history,
        max_steps=nonsense,
        recipe={"gtpo_runtime": {"ent_threshold": "high"}},
    )
    page = reports.render([read_run(run)], []).decode()
    assert json.loads(data_of(page), parse_constant=pytest.fail)["runs"]


# ---- runs that ended early


def test_a_run_without_a_final_state_reports_from_its_newest_readable_checkpoint(tmp_path):
    run = write_run(tmp_path / "run", history=rising(4), checkpoint=4, max_steps=10)
    (run / "checkpoint-10").mkdir()
    (run / "checkpoint-10" / "trainer_state.json").write_text('{"log_history": [{"st')
    record = read_run(run)
    assert not record.finished
    assert (record.last_step, record.max_steps) == (4, 10)
    assert record.state_file.parent.name == "checkpoint-4"
    assert "Its last known step is 4 of 10" in " ".join(answers_of(record)["stable"].sentences)


def test_metrics_after_the_checkpoint_come_from_the_completions(tmp_path):
    lines = [line for step in (1, 2, 3) for line in group(TWO, step=step)]
    record = record_of(tmp_path / "run", lines, [{"step": 1, "reward": 7.0}], checkpoint=1)
    assert record.series("reward") == {1: 7.0, 2: 15.0, 3: 15.0}
    shares = record.series("gtpo/frac_conflict_tokens")
    assert shares == dict.fromkeys((1, 2, 3), pytest.approx(10 / 22))


@pytest.mark.slow
def test_a_run_with_only_completions_has_a_report(tmp_path):
    run = write_run(tmp_path / "run", group(TWO))
    assert report_run.main([str(run)]) == 0
    assert "Metrics from completions.jsonl alone" in (run / "report.html").read_text()


# ---- several runs


def test_runs_that_differ_in_seed_and_name_are_one_configuration(tmp_path):
    runs = [
        record_of(
            tmp_path / f"s{seed}",
            history=[{"step": 1, "reward": float(seed)}],
            recipe={"run_name": f"s{seed}", "model": {"random_seed": seed}},
        )
        for seed in (1, 2, 3)
    ]
    (configuration,) = configurations(runs)
    assert configuration.label == "s1 (3 seeds)"
    assert configuration.runs == runs
    assert configuration.series("reward") == {1: [1.0, 2.0, 3.0]}
    assert differing_keys(runs) == {"run_name": ["s1", "s2", "s3"], "model.random_seed": [1, 2, 3]}


def test_runs_with_the_same_seed_are_called_runs_and_not_seeds(tmp_path):
    runs = [
        record_of(tmp_path / name, history=ONE_CURVE, recipe={"run_name": name}) for name in "ab"
    ]
    assert labels(runs) == ["a (2 runs)"]


def test_keys_without_influence_on_the_policy_make_no_configuration(tmp_path):
    recipes = [{}, {"training": {"logging_steps": 5}}, {"rewards": {"seconds": 9}}]
    runs = [
        record_of(tmp_path / str(i), history=ONE_CURVE, recipe=recipe)
        for i, recipe in enumerate(recipes)
    ]
    assert labels(runs) == ["small (3 runs)"]


def test_the_legend_names_what_differs_between_recipes(tmp_path):
    recipes = [
        {},
        {"trainer": {"class_path": "custom_trainer.original.UnslothGRPOTrainer"}},
        {"training": {"learning_rate": 5e-4}},
    ]
    runs = [
        record_of(tmp_path / str(i), history=rising(3), recipe=recipe)
        for i, recipe in enumerate(recipes)
    ]
    assert labels(runs) == [
        "UnslothGTPOTrainer, learning_rate 0.0001",
        "UnslothGRPOTrainer, learning_rate 0.0001",
        "UnslothGTPOTrainer, learning_rate 0.0005",
    ]


def test_curves_of_seeds_have_their_mean_and_one_standard_deviation(tmp_path):
    assert curves.line_points({1: [1.0, 3.0], 2: [5.0]}, max_points=10) == (
        [1, 2],
        [2.0, 5.0],
        [pytest.approx(2 - 2**0.5), 5.0],
        [pytest.approx(2 + 2**0.5), 5.0],
    )
    thousand = {step: [float(step)] for step in range(1, 1001)}
    steps, means, _, _ = curves.line_points(thousand, max_points=100)
    assert (len(steps), steps[0], means[-1]) == (100, 5.5, 995.5)


@pytest.mark.slow
def test_every_metric_has_a_panel_and_the_entropy_its_threshold(tmp_path):
    history = rising(30, evaluation__accuracy=lambda s: 0.5)
    recipe = {"gtpo_runtime": {"ent_threshold": 0.65}}
    run = record_of(tmp_path / "run", history=history, recipe=recipe)
    svgs = curves.inline_svgs(configurations([run]))
    assert set(svgs) == {panel.name for panel in curves.PANELS}
    assert [name for name, svg in svgs.items() if "threshold 0.65" in svg] == ["entropy"]
    for svg in svgs.values():
        assert "var(--series-0)" in svg and not re.search(r"#[0-9a-f]{6}|https?:", svg)


@pytest.mark.slow
def test_entropy_falling_towards_zero_is_drawn_on_a_log_scale(tmp_path):
    for name, last, scale in (("falls", 0.01, True), ("stays", 0.3, False)):
        history = rising(30, gtpo__completion_entropy=lambda s, last=last: 0.4 if s < 20 else last)
        run = record_of(tmp_path / name, history=history)
        assert ("log scale" in curves.inline_svgs(configurations([run]))["entropy"]) == scale


# ---- the summary


@pytest.mark.parametrize(
    ("steps", "reward", "headline"),
    [
        (40, lambda s: 5 + s, "yes"),
        (40, lambda s: 50 - s, "it got worse"),
        (40, lambda s: 5 + s % 2, "no clear change"),
        (3, lambda s: 5 + s, "too early to say"),
    ],
)
def test_a_rising_reward_is_learning_and_a_falling_one_is_not(tmp_path, steps, reward, headline):
    run = record_of(tmp_path / "run", history=rising(steps, reward=reward))
    assert answers_of(run)["learn"].headline == headline


def test_the_summary_has_the_numbers(tmp_path):
    run = write_run(tmp_path / "run", [*group(TWO, step=1), *group(TWO, step=40)], rising(40))
    for name, right in (("before", 1), ("after", 3)):
        write_evaluation(run / "evaluation" / f"{name}.jsonl", [[i < right] for i in range(4)])
    learn, stable, protected = answers_of(read_run(run)).values()
    assert learn.sentences[:3] == [
        "The mean reward went from 5.75 (steps 1 to 5) to 14.50 (steps 36 to 40).",
        "The share of well-formed completions went from 100% to 100%. The share of correct"
        " completions went from 50% to 50%.",
        "On 4 held-out problems (greedy), accuracy went from 25.0% to 75.0% (+50.0 points, 95 %"
        " interval +0.0 to +100.0). The share of well-formed completions went from 100.0% to"
        " 100.0%.",
    ]
    assert stable.headline == "yes"
    assert "between 0.300 and 0.398 nats (threshold 0.7)" in stable.sentences[0]
    assert protected.sentences[1] == (
        "GTPO protected 10 tokens (weight 0) in 2 of 2 completions with a negative advantage. It"
        " amplified 10 tokens in completions with a positive one."
    )
    assert protected.texts[0] == ("<reasoning>\n", 2)


@pytest.mark.parametrize(
    ("changes", "worry"),
    [
        ({"reward": lambda s: 5 + s % 2 + (s if s < 30 else 0)}, "reward fell"),
        ({"gtpo__completion_entropy": lambda s: 0.4 if s < 20 else 0.01}, "nearly deterministic"),
        ({"gtpo__completion_entropy": lambda s: 0.02 * s}, "entropy above the threshold"),
        ({"gtpo__frac_filtered": lambda s: float(s > 30)}, "filter switched off everything"),
        ({"gtpo__skipped_steps": lambda s: s // 10}, "skipped steps"),
        ({"completions__clipped_ratio": lambda s: s / 40}, "most completions truncated"),
        ({"alarm__low_entropy": lambda s: 0.001 if s in (7, 9) else None}, "2 alarms"),
    ],
)
def test_a_reason_to_worry_is_named(tmp_path, changes, worry):
    history = [
        {name: value for name, value in entry.items() if value is not None}
        for entry in rising(40, **changes)
    ]
    stable = answers_of(read_run(write_run(tmp_path / "run", history=history)))["stable"]
    assert (stable.status, stable.headline) == ("careful", worry)


@pytest.mark.slow
def test_alarms_are_listed_with_their_evidence_and_drawn(tmp_path):
    history = rising(30)
    for step, condition in ((12, "entropy_low"), (12, "truncated"), (20, "entropy_low")):
        history[step - 1][f"alarm/{condition}"] = 1.0
    run = write_run(tmp_path / "run", history=history[:25], checkpoint=25)
    alarms = [
        (12, "the mean entropy is 0.001"),
        (12, "90% are cut off"),
        (20, "still low"),
        (27, "after the checkpoint"),
    ]
    (run / "train.log").write_text(
        "".join(
            f"WARNING gtpo.hooks.alarm: [GTPO] Alarm at step {step}: {text}\n"
            for step, text in alarms
        )
    )
    stable = answers_of(read_run(run))["stable"]
    assert stable.headline == "4 alarms; not finished"
    assert [sentence for sentence in stable.sentences if sentence.startswith("Alarm")] == [
        "Alarm (entropy low) 2 times, first at step 12: the mean entropy is 0.001.",
        "Alarm (truncated) at step 12: 90% are cut off.",
        "Alarm at step 27: after the checkpoint.",
    ]
    assert report_run.main([str(run)]) == 0
    assert "Vertical dotted lines are alarms." in (run / "report.html").read_text()


def test_without_token_weights_the_report_says_what_gtpo_would_have_protected(tmp_path):
    run = write_run(tmp_path / "run", group(TWO, weight=None))
    protected = answers_of(read_run(run))["protected"]
    assert protected.headline == "nothing: no token weights"
    assert protected.sentences[1].startswith("GTPO would have protected 5 tokens")


# ---- the conflict view's data


def test_the_first_the_middle_the_last_and_the_steps_with_most_conflicts_are_shown(tmp_path):
    alike = [(RIGHT, 20.0), ([*RIGHT[:-2], "!", "<end>"], 3.0)]
    lines = []
    for step in range(1, 12):
        lines += group(alike if step in (4, 8) else TWO, step=step)
    record = record_of(tmp_path / "run", lines)
    assert list(choose_steps(record, [])) == [1, 4, 6, 8, 11]
    assert list(choose_steps(record, [2])) == [1, 2, 4, 6, 8, 11]
    record.alarms.append(AlarmEvent(9, "truncated", ""))
    assert choose_steps(record, [])[9].startswith("first alarm")
    with pytest.raises(RecipeError, match="--steps: 99 is not in .*, which has steps 1 to 11"):
        choose_steps(record, [99])


def test_both_ends_of_a_completion_that_is_too_long_are_shown(tmp_path):
    long = ["<start>", *(f"w{i}" for i in range(30_000)), "<end>"]
    record = record_of(tmp_path / "run", group([(long, 1.0), (["<start>", "<end>"], 0.0)]))
    view = conflict_view(configurations([record]), [], size=10**7)
    row = view["runs"][0]["steps"][0]["groups"][0]["rows"][0]
    assert (row["length"], row["head"], len(row["tokens"])) == (30_002, 6_000, 12_000)
    shown = [view["tokens"][row["tokens"][i]] for i in (0, 5_999, 6_000, -1)]
    assert shown == ["<start>", "w5998", "w24001", "<end>"]
    assert row["weights"] == [[2.0, 1], [1.0, 30_000], [2.0, 1]]


def test_steps_without_recorded_tokens_are_not_chosen(tmp_path):
    lines = [line for step in range(1, 10) for line in group(TWO, step=step)]
    for line in lines:
        if line["step"] % 4 != 1:
            for name in ("ids", "tokens", "weights", "entropies"):
                del line[name]
    assert list(choose_steps(record_of(tmp_path / "run", lines), [])) == [1, 5, 9]


@pytest.mark.slow
def test_a_huge_completions_file_still_makes_a_page_below_five_megabytes(tmp_path):
    torch.manual_seed(0)
    words = [f"word{i} " for i in range(50_000)]

    def tokens():
        drawn = torch.randint(len(words), (2500,)).tolist()
        return ["<reasoning>", *(words[i] for i in drawn), "</answer>"]

    lines = []
    for step in range(1, 6):
        for number in range(2):
            rows = [(tokens(), float(row % 2)) for row in range(16)]
            lines += group(rows, step=step, number=number)
    run = write_run(tmp_path / "run", lines)
    assert (run / "completions.jsonl").stat().st_size > 10_000_000
    assert report_run.main([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert len(page.encode()) < 5_000_000
    (view,) = json.loads(data_of(page))["runs"]
    assert [step["step"] for step in view["steps"]] == [1, 2, 3, 5]


# ---- the page


def data_of(page: str) -> str:
    script = r'<script type="application/json" id="view">(.*?)</script>'
    return re.search(script, page, re.DOTALL)[1]


@pytest.mark.slow
def test_texts_of_a_model_cannot_become_elements_of_the_page(tmp_path):
    evil = "</script><script>alert(1)</script><!--<img src=x onerror=alert(1)>\"'&amp;\u2028\ud800"
    lines = group(
        [([*RIGHT, evil], 20.0), ([*WRONG, evil], 10.0)],
        prompt=[{"role": evil, "content": evil}],
        answer=evil,
        completion=evil,
    )
    run = write_run(tmp_path / "run", lines, ONE_CURVE, recipe={"run_name": "x<b>&"})
    # some JSON parsers refuse half of a surrogate pair
    text = (run / "completions.jsonl").read_text().replace("\\ud800", "")
    (run / "completions.jsonl").write_text(text)
    assert report_run.main([str(run)]) == 0
    page = (run / "report.html").read_text()
    assert page.count("<script") == 2 == page.count("</script")
    assert "<img" not in page
    assert "<b>" not in page
    shown = json.loads(data_of(page))["runs"][0]["steps"][0]["groups"][0]
    assert shown["reference"] == evil.replace("\ud800", "")


@pytest.mark.slow
def test_the_page_forbids_the_browser_to_fetch_anything(tmp_path):
    run = write_run(tmp_path / "run", group(TWO), ONE_CURVE)
    report_run.main([str(run)])
    page = (run / "report.html").read_text()
    assert "default-src 'none'" in page
    outside = r"""(?:src|href)=["'](?!data:|#)|url\(|@import"""
    assert not re.search(outside, page.replace('clip-path="url(#', ""))


@pytest.mark.slow  # thousands of pairs, or seconds of work
def test_a_report_replaces_a_report_and_nothing_else(tmp_path, capsys):
    run = write_run(tmp_path / "run", history=ONE_CURVE)
    assert report_run.main([str(run)]) == 0
    first = (run / "report.html").read_bytes()
    assert report_run.main([str(run)]) == 0
    assert (run / "report.html").read_bytes() == first
    for name in ("report.html", "curves.png"):
        kept = (run / name).read_bytes()
        (run / name).write_text("mine")
        assert report_run.main([str(run)]) == 2
        assert f"{name}: exists and is not a report" in capsys.readouterr().err
        assert (run / name).read_text() == "mine"
        (run / name).write_bytes(kept)
    of_the_run = {"recipe.yaml", "trainer_state.json", "versions.json"}
    assert {path.name for path in run.iterdir()} == {*of_the_run, "curves.png", "report.html"}


@pytest.mark.slow
def test_a_report_of_several_runs_goes_into_a_folder_of_its_own(tmp_path, monkeypatch):
    runs = [str(write_run(tmp_path / name, history=ONE_CURVE)) for name in "ab"]
    monkeypatch.chdir(tmp_path)
    assert report_run.main(runs) == 0 and report_run.main([*runs, "--out", "other"]) == 0
    assert report_run.main([*runs, "--out", "deep/er/page.html"]) == 0
    for page, picture in (
        ("report/report.html", "report/curves.png"),
        ("other/report.html", "other/curves.png"),
        ("deep/er/page.html", "deep/er/page.png"),
    ):
        assert (tmp_path / page).read_text().startswith("<!DOCTYPE html>")
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_a_recipe_and_its_flags_name_the_run_directory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    flags = ["recipes/demo.yaml", "--output_root", str(tmp_path), "--training.max_steps", "3"]
    assert report_run.main(flags) == 2
    error = rf"error: ({tmp_path}/demo_\S+): there is no such run directory"
    run = re.search(error, capsys.readouterr().err)[1]
    write_run(tmp_path / run, history=ONE_CURVE)
    assert report_run.main([*flags, "--out", str(tmp_path / "out")]) == 0
    assert f"Report: {tmp_path / 'out' / 'report.html'}" in capsys.readouterr().out


def test_the_table_of_evaluations_has_intervals_and_is_in_order(tmp_path):
    run = write_run(tmp_path / "run", history=ONE_CURVE)
    for name in ("mine", "after", "step-100", "step-20", "before"):
        write_evaluation(run / "evaluation" / f"{name}.jsonl", [[True], [False]])
    several = [[True, False], [False, False]]
    write_evaluation(run / "evaluation" / "many.jsonl", several, temperature=0.7)
    assert report_run.main([str(run)]) == 0
    table = (run / "report.html").read_text().split('id="evaluation"')[1].split("</table>")[0]
    rows = [
        re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row)
        for row in re.findall(r"<tr>(.*?)</tr>", table)
    ]
    names = [row[0] for row in rows[1:]]
    assert names == ["before", "step-20", "step-100", "after", "many", "mine"]
    many = dict(zip(rows[0], rows[5], strict=True))
    assert many["accuracy"] == "25.0 % [0.0, 50.0]"
    assert many["pass@2"] == "50.0 % [0.0, 100.0]"
    assert many["temperature"] == "0.7"
    assert dict(zip(rows[0], rows[1], strict=True))["pass@2"] == "-"


def test_a_damaged_evaluation_is_left_out_with_a_note(tmp_path):
    run = write_run(tmp_path / "run", history=ONE_CURVE)
    write_evaluation(run / "evaluation" / "cut.jsonl", [[True], [True]])
    cut = run / "evaluation" / "cut.jsonl"
    cut.write_text(cut.read_text()[:-20])
    (run / "evaluation" / "other.jsonl").write_text('{"a": 1}\n')
    record = read_run(run)
    assert list(record.evaluations) == ["cut"]
    assert record.evaluations["cut"].scores.problems == 1
    assert len(record.notes) == 2
    assert "cut.jsonl: the last line is incomplete and is left out" in record.notes[0]
    assert "other.jsonl: the first line is not the header of an evaluation" in record.notes[1]


def test_evaluations_of_different_numbers_of_problems_are_not_compared(tmp_path):
    run = write_run(tmp_path / "run", history=rising(40))
    for name in ("before", "after"):
        write_evaluation(run / "evaluation" / f"{name}.jsonl", [[True]] * 4)
    assert "held-out problems" in " ".join(answers_of(read_run(run))["learn"].sentences)
    cut = run / "evaluation" / "after.jsonl"
    cut.write_text(cut.read_text()[:-20])
    assert "held-out problems" not in " ".join(answers_of(read_run(run))["learn"].sentences)


@pytest.mark.parametrize("steps", [6, 12, 20])
def test_noise_is_seldom_called_learning_or_a_fall(tmp_path, steps):
    draw, headlines, falls = random.Random(steps), [], 0
    for i in range(60):
        history = rising(steps, reward=lambda s: 10 + draw.gauss(0, 1))
        learn, stable, _ = answers_of(record_of(tmp_path / f"run-{i}", history=history)).values()
        headlines.append(learn.headline)
        falls += "reward fell" in stable.headline
    assert headlines.count("too early to say" if steps < 10 else "no clear change") >= 45
    assert falls <= 10


def loaded_modules(flags: list[str], names: set[str]) -> subprocess.CompletedProcess:
    """Runs report_run.py; the last line of its output is those of the modules that it imports."""
    code = f"import sys, report_run; report_run.main({flags}); print({names} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)


@pytest.mark.slow
def test_a_report_loads_no_model(tmp_path):
    run = write_run(tmp_path / "run", group(TWO), ONE_CURVE)
    done = loaded_modules([str(run)], {"torch", "transformers", "trl"})
    assert done.stdout.endswith("set()\n")


@pytest.mark.slow
def test_help_needs_neither_matplotlib_nor_jinja2():
    done = loaded_modules(["--help"], {"matplotlib", "jinja2"})
    assert "--steps" in done.stdout
    assert done.stdout.endswith("set()\n")


# ---- errors


# fmt: off
@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "RUN: missing; use: python report_run.py RUN [RUN ...]"),
        (["missing"],
         "missing: there is no such run directory; give the one that train_model.py printed last"),
        (["empty"], "empty: is not a run directory (it has no recipe.yaml)"),
        (["run/checkpoint-3"],
         "run/checkpoint-3: is not a run directory (it has no recipe.yaml); give "),
        (["new"], "new: there is nothing to report yet"),
        (["broken"], "broken/recipe.yaml: is not a recipe"),
        (["run", "--outt", "x"], "--outt: unknown flag; use --out and --steps"),
        (["run", "--out"], "--out: needs a value"),
        (["run", "--out", "file"], "--out: file is a file; give a folder"),
        (["run", "--out", "file/deeper"], "file/deeper: cannot be written to"),
        (["run", "--steps"], "--steps: needs numbers"),
        (["nothing.yaml"], "nothing.yaml: there is no such recipe file"),
    ],
)
# fmt: on
def test_an_error_is_one_sentence_and_exit_code_2(tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    write_run(tmp_path / "new")
    write_run(tmp_path / "broken", history=rising(3))
    (tmp_path / "broken" / "recipe.yaml").write_text("- a list")
    write_run(tmp_path / "run", history=rising(3), checkpoint=3)
    before = sorted(tmp_path.rglob("*"))
    assert report_run.main(words) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {sentence}")
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
