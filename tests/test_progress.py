"""What the terminal shows while a run trains."""

import logging
import sys

import demo_run
import pytest

from gtpo.runs.progress import SHOWN_LENGTH, good_and_bad, legend, progress_line
from gtpo.system import console

LOGS = {
    "reward": 15.837,
    "reward/format_rate": 0.861,
    "reward/correct_rate": 0.7,
    "gtpo/completion_entropy": 0.0571,
    "entropy": 9.0,
    "gtpo/frac_conflict_tokens": 0.55,
    "gtpo/frac_filtered": 0.0,
    "frac_reward_zero_std": 0.25,
    "loss": 0.1,
    "completions/mean_length": 15.2,
    "completions/clipped_ratio": 0.02,
    "step_time": 0.24,
}


def test_the_line_has_every_important_metric():
    assert (
        progress_line(7, 100, LOGS, 0.7, seconds_left=3725)
        == "step   7/100  reward 15.84  format 86%  correct 70%  entropy 0.057 < 0.7  conflict 55% "
        " filtered  0%  no signal 25%  length  15  truncated 2%  s/step 0.2  left 1:02:05"
    )


def test_metrics_that_are_not_logged_are_left_out():
    logs = {
        name: value
        for name, value in LOGS.items()
        if not name.startswith(("gtpo/", "reward/", "step_time"))
    }
    line = progress_line(100, 100, {**logs, "frac_reward_zero_std": None}, 0.7, seconds_left=0)
    assert (
        line
        == "step 100/100  reward 15.84  entropy 9.000 > 0.7  length  15  truncated 2%  left 00:00"
    )
    assert "filtered" in legend(LOGS) and "filtered" not in legend(logs)


def line(group: int, reward: float | None, completion: str, **more) -> dict:
    """A line of completions.jsonl."""
    return {
        "rollout": 1,
        "group": group,
        "reward": reward,
        "advantage": 1.0,
        "entropy": 0.5,
        "kept": True,
        "prompt": f"p{group}",
        "completion": completion,
        **more,
    }


def test_the_good_and_the_bad_completion_come_from_the_group_whose_rewards_differ_most():
    lines = [
        line(0, 9, "a"),
        line(0, 10, "b"),
        line(1, 1, "c\nd", kept=False, advantage=-4),
        line(1, 7.5, "e"),
        line(1, None, "f"),
    ]
    assert good_and_bad(lines) == [
        "    prompt: p1",
        "    good, reward 7.5, advantage +1, entropy 0.500: e",
        "    bad,  reward 1, advantage -4, entropy 0.500, filtered: c\\nd",
    ]


def test_equal_rewards_show_one_completion_and_no_rewards_show_none():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "how many?"}]
    assert good_and_bad(
        [line(0, 3, text, prompt=messages, entropy=None, kept=None) for text in "ab"]
    ) == ["    prompt: how many?", "    all of its group alike, reward 3, advantage +1: b"]
    assert good_and_bad([line(0, None, "a")]) == good_and_bad([]) == []


def test_a_completion_cannot_break_the_terminal_and_a_long_one_keeps_its_ends():
    _, hostile = good_and_bad([line(0, 3, "\x1b[2J\r\u202eé\x00")])
    assert hostile.endswith(": \\x1b[2J\\r\\u202eé\\x00") and hostile.isprintable()
    _, long = good_and_bad([line(0, 3, "start" + "x" * 9000 + "<answer>7</answer>")])
    assert ": startxxx" in long and " ... xxx" in long and long.endswith("<answer>7</answer>")
    assert len(long) < SHOWN_LENGTH + 80


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, steps, shown",
    [
        ("--watch.show_every 3", [1, 2, 3, 4, 5], [1, 4]),
        (
            "--watch.show_every 3 --training.logging_steps 2 --watch.completions false",
            [2, 4, 5],
            [2, 4],
        ),
        ("--watch.show_every null", [1, 2, 3, 4, 5], []),
    ],
)
def test_a_run_explains_its_columns_and_has_a_line_per_logging_step_and_some_completions(
    here, capsys, flags, steps, shown
):
    assert demo_run.train("--training.max_steps 5 --training.save_steps 100", flags) == 0
    captured = capsys.readouterr()
    lines = [text.rpartition("\r")[2] for text in captured.out.splitlines()]
    first = next(i for i, text in enumerate(lines) if text.startswith("step "))
    assert lines[first - 1].startswith("Columns: format: ")
    assert [int(text[5:].split("/")[0]) for text in lines if text.startswith("step ")] == steps
    prompts = [i for i, text in enumerate(lines) if text.startswith("    prompt: ")]
    assert [int(lines[i - 1][5:].split("/")[0]) for i in prompts] == shown  # each after its line
    assert "5/5" in captured.err  # the progress bar has its own stream
    log = (demo_run.run_dir(here) / "train.log").read_text()
    assert log.count("Columns: ") == 1 and log.count("    prompt: ") == len(shown)


def test_a_message_stands_above_the_progress_bar_and_not_in_it(capsys):
    from tqdm import tqdm

    with console.log_to_console(), tqdm(total=3, file=sys.stderr) as bar:
        bar.update(1)
        logging.getLogger("gtpo.hooks.alarm").warning("Alarm!")
        console.print_ending(
            "stopped", RuntimeError("It raised \x1b[31m hf_abcdefghijklmnopqrst\nSaved.")
        )
    # The bar was removed from the line before each message.
    lines = {text.rpartition("\r")[2] for text in capsys.readouterr().err.split("\n")}
    assert {"Alarm!", r"stopped: It raised \x1b[31m [secret]", "stopped: Saved."} <= lines
