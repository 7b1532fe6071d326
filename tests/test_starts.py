"""How a run starts: new, over an old one, or from a checkpoint that is made in code."""

import json
import logging
from pathlib import Path

import pytest
from conftest import split_flags

from gtpo.errors import RecipeError
from gtpo.models.adapters import checkpoint_folders, checkpoint_step
from gtpo.recipe import command_line as cli
from gtpo.recipe.differences import recipe_differences
from gtpo.runs import checkpoints, directory, trackers
from gtpo.runs.start import Request, resolve_start


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A function that makes a recipe from flags. Its run directory is in the current folder."""
    monkeypatch.chdir(tmp_path)
    Path("r.yaml").write_text(
        "run_name: r\nmodel: {model_name: some/model}\ndataset: {name: gsm8k}\ntraining:"
        " {report_to: none, max_steps: 9}\n"
    )
    return lambda *flags: cli.read_recipe(["r.yaml", *split_flags(*flags)])


def begin(recipe, completions: str = "") -> Path:
    """The run directory of a run that has begun, with `completions` in completions.jsonl."""
    run_dir = Path(recipe.output_dir())
    with directory.opened(resolve_start(recipe, Request()), recipe, None):
        if completions:
            (run_dir / "completions.jsonl").write_text(completions)
    return run_dir


def checkpoint(
    run_dir: Path,
    step: int,
    recipe,
    *,
    files=("optimizer.pt", "adapter_model.safetensors"),
    **manifest,
) -> Path:
    """A new checkpoint in `run_dir`; `manifest` replaces keys of its manifest."""
    aside = run_dir / f".partial-{step}"
    aside.mkdir()
    for name in files:
        (aside / name).write_text(f"{name} of step {step}")
    completions = run_dir / "completions.jsonl"
    folder = run_dir / f"checkpoint-{step}"
    size = completions.stat().st_size if completions.is_file() else 0
    usual = {
        "step": step, "max_steps": 9, "processes": 1, "recipe": recipe.saved()[0],
        "completions": size,
    }  # fmt: skip
    checkpoints.publish(aside, folder, **{**usual, **manifest})
    return folder


def finish(run_dir: Path, steps: int = 9) -> None:
    """Writes the files of a run that ended after `steps` of 9 steps."""
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (run_dir / name).write_text("{}")
    (run_dir / "trainer_state.json").write_text(json.dumps({"global_step": steps, "max_steps": 9}))


def evaluation(run_dir: Path, name: str, step: int) -> Path:
    """A new file in the folder evaluation, with the header of an evaluation after `step`."""
    file = run_dir / f"evaluation/{name}.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps({"header": {"step": step}}) + "\n")
    return file


def refusal(recipe, request: Request) -> str:
    """The error that `resolve_start` raises."""
    with pytest.raises(RecipeError) as error:
        resolve_start(recipe, request)
    return str(error.value)


# ---- a run directory that exists


def test_a_finished_run_is_refused_with_what_would_work(recipe):
    run_dir = begin(recipe())
    checkpoint(run_dir, 9, recipe())
    finish(run_dir)
    assert (
        refusal(recipe(), Request())
        == f"run_name: the run directory {run_dir} holds a finished run of 9 steps; choose another"
        " with --run-name, or replace it with --overwrite, or train it further with --resume and"
        " more training.max_steps"
    )


def test_an_unfinished_run_is_refused_with_the_step_of_its_last_checkpoint(recipe):
    run_dir = begin(recipe())
    checkpoint(run_dir, 4, recipe())
    assert (
        "holds a run whose last checkpoint is that of step 4; continue with --resume, choose"
        in refusal(recipe(), Request())
    )


def test_a_run_without_checkpoints_is_refused_only_if_it_has_trained(recipe):
    begin(recipe())
    # There is nothing to lose, so the run starts again.
    assert resolve_start(recipe(), Request()).checkpoint is None
    begin(recipe(), completions="{}\n")
    assert "stopped before its first checkpoint; start it again with --resume" in refusal(
        recipe(), Request()
    )
    assert resolve_start(recipe(), Request(resume="")).restarts


def test_overwriting_removes_all_that_was_there(recipe):
    run_dir = begin(recipe(), completions="{}\n")
    checkpoint(run_dir, 4, recipe())
    with directory.opened(resolve_start(recipe(), Request(overwrite=True)), recipe(), None):
        assert sorted(path.name for path in run_dir.iterdir()) == [
            ".lock",
            "recipe.yaml",
            "train.log",
            "versions.json",
        ]


def test_resuming_and_overwriting_exclude_each_other(recipe):
    assert refusal(recipe(), Request(resume="", overwrite=True)).startswith(
        "--resume: needs the checkpoints that --overwrite would delete"
    )


def test_a_directory_that_cannot_be_written_to_is_refused(recipe, monkeypatch):
    Path("file").touch()
    assert refusal(recipe("--output_root file/runs"), Request()).startswith("output_root: ")


# ---- from a checkpoint


def test_resume_takes_the_last_checkpoint_and_logs_its_step(recipe, caplog):
    caplog.set_level(logging.INFO, "gtpo")
    run_dir = begin(recipe())
    for step in (2, 10, 9):  # 9 would be the last one by name
        checkpoint(run_dir, step, recipe())
    start = resolve_start(recipe(), Request(resume=""))
    assert start.checkpoint.step == 10 and start.finished_steps is None
    assert not start.use_recipe_optimizer and not start.from_another_run
    assert f"Resuming from {run_dir}/checkpoint-10, after step 10 of 9" in caplog.text


def test_resume_without_a_checkpoint_starts_from_the_beginning_and_logs_it(recipe, caplog):
    caplog.set_level(logging.INFO, "gtpo")
    assert resolve_start(recipe(), Request(resume="")).checkpoint is None
    assert "has no checkpoint yet, so the run starts from the beginning" in caplog.text


# fmt: off
DAMAGES = [
    (lambda folder: (folder / "optimizer.pt").write_text("optimizer"),
     "optimizer.pt has 9 bytes instead of 22"),
    (lambda folder: (folder / "optimizer.pt").write_text("optimizer.pt of step x"),
     "the content of optimizer.pt has changed"),
    (lambda folder: (folder / "optimizer.pt").unlink(), "optimizer.pt is missing"),
    (lambda folder: (folder / "manifest.json").unlink(), "it has no manifest.json"),
    (lambda folder: (folder / "manifest.json").write_text("{"), "its manifest.json cannot be read"),
]
# fmt: on


@pytest.mark.parametrize("damage, sentence", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_with_a_warning_and_the_one_before_used(
    recipe, caplog, damage, sentence
):
    run_dir = begin(recipe())
    checkpoint(run_dir, 2, recipe())
    damage(checkpoint(run_dir, 4, recipe()))
    assert resolve_start(recipe(), Request(resume="")).checkpoint.step == 2
    assert f"Skipped, damaged: {run_dir}/checkpoint-4: {sentence}" in caplog.text
    assert sentence in refusal(recipe(), Request(resume=str(run_dir / "checkpoint-4")))
    damage(run_dir / "checkpoint-2")
    assert "no checkpoint of this run is whole: start again with --overwrite" in refusal(
        recipe(), Request(resume="")
    )


def test_a_finished_run_resumes_only_with_more_steps(recipe):
    run_dir = begin(recipe())
    checkpoint(run_dir, 9, recipe())
    finish(run_dir)
    assert resolve_start(recipe(), Request(resume="")).finished_steps == 9
    more = resolve_start(recipe("--training.max_steps 12"), Request(resume=""))
    assert more.finished_steps is None and more.adds_steps and more.use_recipe_optimizer


def test_a_run_that_an_alarm_stopped_can_resume(recipe):
    run_dir = begin(recipe())
    checkpoint(run_dir, 5, recipe())
    finish(run_dir, steps=5)
    assert resolve_start(recipe(), Request(resume="")).finished_steps is None


def test_resume_takes_a_path_of_an_earlier_checkpoint_or_of_a_run_directory(recipe):
    run_dir = begin(recipe())
    for step in (2, 4):
        checkpoint(run_dir, step, recipe())
    assert (
        resolve_start(recipe(), Request(resume=str(run_dir / "checkpoint-2"))).checkpoint.step == 2
    )
    assert resolve_start(recipe(), Request(resume=str(run_dir))).checkpoint.step == 4
    assert refusal(recipe(), Request(resume="nowhere")).startswith(
        "--resume: nowhere: there is no such folder"
    )


def test_a_checkpoint_with_the_adapter_alone_is_refused(recipe):
    run_dir = begin(recipe())
    checkpoint(run_dir, 2, recipe(), files=["adapter_model.safetensors"])
    assert (
        "holds the adapter alone (training.save_only_model); start a new run with --model.adapter"
        in refusal(recipe(), Request(resume=""))
    )


# ---- with another recipe


def test_a_changed_recipe_is_refused_with_a_list_of_the_changes_unless_forced(recipe, caplog):
    run_dir = begin(recipe())
    checkpoint(run_dir, 2, recipe())
    other = recipe("--training.temperature 0.5", "--gtpo_runtime.w_raw 3")
    assert refusal(other, Request(resume="")).splitlines() == [
        (
            f"--resume: the recipe is not the one that {run_dir}/checkpoint-2 was trained with;"
            " undo the changes, or resume all the same with --force-resume"
        ),
        "training.temperature: not set -> 0.5",
        "gtpo_runtime.w_raw: 2.0 -> 3.0",
    ]
    start = resolve_start(other, Request(resume="", force=True))
    assert start.use_recipe_optimizer and tuple(map(str, start.forced_changes)) == (
        "training.temperature: not set -> 0.5",
        "gtpo_runtime.w_raw: 2.0 -> 3.0",
    )
    assert "Changed, and forced: gtpo_runtime.w_raw: 2.0 -> 3.0" in caplog.text


def test_another_number_of_processes_is_a_change(recipe):
    run_dir = begin(recipe())
    checkpoint(run_dir, 2, recipe(), processes=2)
    assert refusal(recipe(), Request(resume="")).endswith("processes: 2 -> 1")


def test_another_number_of_processes_cannot_continue_a_rollout_under_way(recipe):
    run_dir = begin(recipe())
    checkpoint(run_dir, 2, recipe(), processes=2, within_rollout=True)
    assert refusal(recipe(), Request(resume="", force=True)).endswith(
        "checkpoint-2 lies within a rollout, which is spread over 2 processes; use as many,"
        " or a checkpoint between two rollouts"
    )
    assert resolve_start(recipe(), Request(resume=""), processes=2).checkpoint.step == 2


HARMLESS = [
    "--training.logging_steps 5 --training.save_steps 7 --training.save_total_limit 2",
    "--training.report_to tensorboard --wandb.project x --watch.show_every 3 --alarm.action stop",
    "--env.HF_HOME x --run-name other --output_root elsewhere",
    "--training.max_steps 10",
    "--training.num_train_epochs 2",
]
CHANGES_OF_THE_POLICY = [
    "--training.max_steps 8",
    "--training.max_steps -1",
    "--training.num_train_epochs 0.5",
    "--training.learning_rate 1e-5",
    "--model.random_seed 1",
    "--dataset.split test",
    "--training.save_only_model true",
    "--training.num_generations 4",
    "--trainer.reward_funcs reward_math.formatting_penalty",
    "--model.lora_rank 4",
]


@pytest.mark.parametrize("flags", HARMLESS)
def test_a_change_that_does_not_reach_the_policy_is_harmless(recipe, flags):
    changes, harmless_changes = recipe_differences(recipe().saved()[0], recipe(flags))
    assert harmless_changes and not changes


@pytest.mark.parametrize("flags", CHANGES_OF_THE_POLICY)
def test_a_change_that_reaches_the_policy_is_not_harmless(recipe, flags):
    changes, harmless_changes = recipe_differences(recipe().saved()[0], recipe(flags))
    assert changes and not harmless_changes


def test_a_key_that_did_not_exist_when_the_checkpoint_was_saved_has_its_default(recipe):
    earlier = recipe().saved()[0]
    del earlier["gtpo_runtime"]["w_raw"], earlier["watch"]
    assert recipe_differences(earlier, recipe()) == ([], [])


# ---- what the run directory holds then


def test_what_came_after_the_checkpoint_is_removed(recipe):
    run_dir = begin(recipe(), completions="1\n")
    checkpoint(run_dir, 2, recipe())
    (run_dir / "completions.jsonl").write_text("1\n2\n3")
    for name, step in (("before", 0), ("step-2", 2), ("step-4", 4), ("after", 4)):
        evaluation(run_dir, name, step)
    (run_dir / ".partial-saving").mkdir()
    with directory.opened(resolve_start(recipe(), Request(resume="")), recipe(), None):
        assert (run_dir / "completions.jsonl").read_text() == "1\n"
        assert sorted(path.stem for path in (run_dir / "evaluation").iterdir()) == [
            "before",
            "step-2",
        ]
        assert not list(run_dir.glob(".partial-*")) and not (run_dir / "abandoned").exists()


def test_evaluations_that_a_user_made_are_never_deleted(recipe, caplog):
    run_dir = begin(recipe(), completions="1\n")
    checkpoint(run_dir, 2, recipe())
    for name in ("test-8x2-t1", "base-test-8x2-t1", "checkpoint-2-test-8x2-t1"):
        evaluation(run_dir, name, None)
    with directory.opened(resolve_start(recipe(), Request(resume="")), recipe(), None):
        stays = sorted(path.stem for path in (run_dir / "evaluation").iterdir())
        assert stays == ["base-test-8x2-t1", "checkpoint-2-test-8x2-t1"]
        assert (run_dir / "abandoned/evaluation/test-8x2-t1.jsonl").is_file()
    assert "test-8x2-t1.jsonl is moved to" in caplog.text


def test_what_later_checkpoints_have_seen_moves_to_the_folder_abandoned(recipe):
    run_dir = begin(recipe(), completions="1\n")
    checkpoint(run_dir, 2, recipe())
    (run_dir / "completions.jsonl").write_text("1\n2\n")
    checkpoint(run_dir, 4, recipe())
    evaluation(run_dir, "step-4", 4)
    with directory.opened(
        resolve_start(recipe(), Request(resume=str(run_dir / "checkpoint-2"))), recipe(), None
    ):
        assert [path.name for path in checkpoint_folders(run_dir)] == ["checkpoint-2"]
        assert checkpoints.read(run_dir / "abandoned/checkpoint-4").step == 4
        assert (run_dir / "abandoned/completions.jsonl").read_text() == "2\n"
        assert (run_dir / "abandoned/evaluation/step-4.jsonl").is_file()


def test_a_finished_run_with_more_steps_loses_its_final_files(recipe):
    run_dir = begin(recipe())
    checkpoint(run_dir, 9, recipe())
    finish(run_dir)
    evaluation(run_dir, "after", 9)
    more = recipe("--training.max_steps 12")
    with directory.opened(resolve_start(more, Request(resume="")), more, None):
        assert not any((run_dir / name).exists() for name in directory.FINAL_FILES)
        assert [path.stem for path in (run_dir / "evaluation").iterdir()] == ["step-9"]
        assert cli.read_saved(run_dir / "recipe.yaml").training.max_steps == 12


def test_evaluations_are_removed_if_a_change_makes_them_incomparable(recipe):
    run_dir = begin(recipe())
    checkpoint(run_dir, 2, recipe())
    evaluation(run_dir, "before", 0)
    other = recipe("--evaluation.limit 3")
    with directory.opened(resolve_start(other, Request(resume="", force=True)), other, None):
        assert not list((run_dir / "evaluation").iterdir())


def test_from_another_run_its_records_are_copied_and_it_stays_as_it_is(recipe):
    run_dir = begin(recipe(), completions="1\n")
    checkpoint(run_dir, 2, recipe())
    (run_dir / "completions.jsonl").write_text("1\n2\n")
    for name, step in (("before", 0), ("step-2", 2), ("step-4", 4), ("after", 9)):
        evaluation(run_dir, name, step)
    there = sorted(path.read_bytes() for path in run_dir.rglob("*") if path.is_file())
    other = recipe("--training.learning_rate 1e-5")
    with directory.opened(
        resolve_start(other, Request(resume=str(run_dir / "checkpoint-2"), force=True)), other, None
    ):
        new = Path(other.output_dir())
        assert new != run_dir and (new / "completions.jsonl").read_text() == "1\n"
        assert sorted(path.stem for path in (new / "evaluation").iterdir()) == ["before", "step-2"]
    assert sorted(path.read_bytes() for path in run_dir.rglob("*") if path.is_file()) == there


# ---- which checkpoints are kept


def test_beyond_the_limit_the_oldest_are_removed_but_not_the_best_nor_the_last(recipe):
    run_dir = begin(recipe())
    for step in (1, 2, 3, 4):
        checkpoint(run_dir, step, recipe())
    history = [
        {"step": 1, "evaluation/accuracy": 0.5},
        {"step": 2, "evaluation/accuracy": 0.7},
        {"step": 2, "reward": 3.0},
        {"step": 3, "evaluation/accuracy": 0.7 - 1e-9},
        {"step": 9, "evaluation/accuracy": 1.0},
    ]
    assert checkpoints.best_step(run_dir, history) == 2  # step 9 has no checkpoint
    checkpoints.rotate(run_dir, None, 2)
    assert len(checkpoint_folders(run_dir)) == 4
    checkpoints.rotate(run_dir, 3, 2)
    assert [checkpoint_step(folder) for folder in checkpoint_folders(run_dir)] == [2, 3, 4]
    checkpoints.rotate(run_dir, 1, 2)
    assert [checkpoint_step(folder) for folder in checkpoint_folders(run_dir)] == [2, 4]


# ---- trackers


def test_a_resumed_run_has_the_wandb_run_of_the_first_and_an_overwritten_one_has_another(
    recipe, monkeypatch
):
    import os

    names = ("WANDB_RUN_ID", "WANDB_RESUME", "TENSORBOARD_LOGGING_DIR")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    tracked, runs = recipe("--training.report_to wandb"), []
    for request in (Request(), Request(resume=""), Request(overwrite=True)):
        start = resolve_start(tracked, request)
        with trackers.tracker_run(tracked, start), directory.opened(start, tracked, None):
            runs.append([os.environ.get(name) for name in names])
            if not request.resume:
                checkpoint(start.run_dir, len(runs), tracked)
                (start.run_dir / "runs/first").mkdir(parents=True, exist_ok=True)
    ids, resume, tensorboard = zip(*runs, strict=True)
    assert ids[0] == ids[1] != ids[2] and set(resume) == {"allow"}
    assert [folder and Path(folder).name for folder in tensorboard] == [None, "first", None]
    assert "WANDB_RUN_ID" not in os.environ  # the next run in this process is another one


# ---- the command line


def test_resume_takes_a_path_or_none_and_the_recipe_of_that_run(recipe):
    assert cli.parse(["r.yaml"]).resume is None
    assert cli.parse(["r.yaml", "--resume"]).resume == ""
    assert cli.parse(["--resume", "r.yaml"]).recipe_file == "r.yaml"
    command = cli.parse(split_flags("--resume a/checkpoint-2", "r.yaml", "--training.max_steps 3"))
    assert command.resume == "a/checkpoint-2"
    assert cli.parse(["--resume=a"]).resume == "a"
    run_dir = begin(recipe())
    checkpoint(run_dir, 2, recipe())
    for path in (run_dir, run_dir / "checkpoint-2"):
        command = cli.parse(["--resume", str(path), "--force-resume"])
        assert command.recipe_file == str(run_dir / "recipe.yaml")
        assert cli.make_recipe(command) == recipe()
    with pytest.raises(RecipeError, match="--force-resume: works only with --resume; give both"):
        cli.read_recipe(["r.yaml", "--force-resume"])
