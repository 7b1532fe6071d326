"""The main job, end to end on a CPU: recipe in, trained adapter out; and every way it refuses."""

import json
import os
import struct
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT

import train_model
from gtpo.evaluation import file as evaluation_file
from gtpo.recipe import command_line as cli
from gtpo.system.environment import NO_TELEMETRY


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current folder; recipes and models are named from the repository."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_PROJECT", "WANDB_DIR", "WANDB_ENTITY", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def demo_flags(*more: str) -> list[str]:
    """recipes/demo.yaml from another folder, two short steps without evaluation."""
    return [
        str(ROOT / "recipes/demo.yaml"),
        "--model-name",
        str(ROOT / "demo/model"),
        "--dataset.path",
        str(ROOT / "demo/data/train.jsonl"),
        "--evaluation.path",
        "null",
        "--training.max_steps",
        "2",
        "--training.per_device_train_batch_size",
        "8",
        "--training.save_steps",
        "1",
        *more,
    ]


def run_dir(here, name="demo"):
    (found,) = (here / "runs").glob(f"{name}_adam1-*")
    return found


def history(folder) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_a_run_leaves_recipe_versions_log_checkpoints_and_a_plain_peft_adapter(here, capsys):
    assert train_model.main(demo_flags()) == 0
    folder = run_dir(here)
    assert capsys.readouterr().out.strip().endswith(f"Run directory: {folder.relative_to(here)}")
    assert (
        folder.name == "demo_adam1-0.9_adam2-0.999_wd-0.0_gen8_acc-1_wu0.05_len96_lr0.003_BetaKL0.0"
    )
    for name in (
        "recipe.yaml",
        "versions.json",
        "train.log",
        "trainer_state.json",
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "checkpoint-1/gtpo_state.json",
        "checkpoint-2/optimizer.pt",
    ):
        assert (folder / name).is_file(), name

    saved = cli.read_recipe([str(folder / "recipe.yaml")])
    assert saved == cli.read_recipe(demo_flags())
    versions = json.loads((folder / "versions.json").read_text())
    assert versions["trl"] and versions["commit"] != "" and versions["python"]
    log = (folder / "train.log").read_text()
    assert "step 1/2  reward" in log
    # peft's card; TRL's would name a base model None
    assert "None" not in (folder / "README.md").read_text()
    for line in (
        "[GTPO] Backend: transformers + peft on CPU",
        "[GTPO] Set ENT_THRESHOLD = 0.7",
        "[GTPO] Set PAD_ID = 467",
        "2000 problems; 0 of 2000 dropped",
        "torch_compile_options are unused on a CPU",
    ):
        assert line in log, line

    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert [(line["step"], line["row"]) for line in lines] == [
        (step, row) for step in (1, 2) for row in range(8)
    ]
    assert lines[0]["prompt"][0]["role"] == "system" and lines[0]["answer"].startswith(
        "<reasoning>"
    )
    assert lines[0]["rewards"].keys() == {"final_reward"} and lines[0]["tokens"][0] == "<reasoning>"

    metrics = history(folder)[0]
    for name in (
        "gtpo/completion_entropy",
        "gtpo/initial_entropy",
        "gtpo/frac_filtered",
        "gtpo/frac_conflict_tokens",
        "gtpo/frac_conflict_groups",
        "reward/formatting_avg",
        "reward/correctness_avg",
        "reward/total_avg",
        "reward",
    ):
        assert isinstance(metrics[name], float), name

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(ROOT / "demo/model")
    ids = AutoTokenizer.from_pretrained(folder)("How many are left?", return_tensors="pt")[
        "input_ids"
    ]
    before = base(ids).logits.detach()
    trained = PeftModel.from_pretrained(base, folder)
    assert not torch.equal(trained(ids).logits, before)


def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(here):
    weights = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert train_model.main(demo_flags("--run-name", name, "--model.random_seed", seed)) == 0
        weights.append((run_dir(here, name) / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


def test_a_run_that_fails_leaves_its_traceback_in_the_log(here):
    (here / "failing_trainer.py").write_text(
        "import trl\n\nclass Failing(trl.GRPOTrainer):\n    def compute_loss(self, *args,"
        " **kwargs):\n        raise KeyError('no loss')\n"
    )
    with pytest.raises(KeyError):
        train_model.main(demo_flags("--trainer.class_path", "failing_trainer.Failing"))
    assert "no loss" in (run_dir(here) / "train.log").read_text()


def test_a_reward_function_that_fails_on_everything_is_told_at_the_first_step(here, capsys):
    (here / "failing_reward.py").write_text(
        "def pay(completions, **kwargs):\n    raise KeyError('judge is away')\n"
    )
    assert train_model.main(demo_flags("--trainer.reward_funcs", "failing_reward.pay")) == 2
    assert (
        "error: trainer.reward_funcs: 'failing_reward.pay' failed on every completion of the first"
        " rollout, it raised KeyError: 'judge is away'; the tracebacks are in runs/demo_adam1"
        in capsys.readouterr().err
    )
    lines = [
        json.loads(line)
        for line in (run_dir(here) / "reward_failures.jsonl").read_text().splitlines()
    ]
    assert "judge is away" in lines[-1]["traceback"] and lines[-1]["answer"].startswith(
        "<reasoning>"
    )


@pytest.mark.parametrize(
    "class_path",
    ["gtpo.gtpo_training.UnslothGTPOTrainer", "custom_trainer.original.UnslothGRPOTrainer"],
)
def test_a_run_whose_rewards_fail_too_often_stops_saved_with_an_exit_code_of_its_own(
    here, capsys, class_path
):
    flags = demo_flags(
        "--trainer.class_path",
        class_path,
        "--trainer.reward_funcs",
        "hostile_rewards.failing_later",
        "--training.max_steps",
        "50",
        "--training.per_device_train_batch_size",
        "32",
        "--training.save_steps",
        "50",
    )
    assert train_model.main(flags) == 3
    folder = run_dir(here)
    said = capsys.readouterr()
    assert said.err.splitlines()[-1].startswith(
        "stopped: Step 2: reward functions failed on 21 of the last 64 completions, "
    )
    assert said.err.rstrip().endswith(
        "; the run was stopped there, its adapter and a checkpoint are saved"
    )
    assert f"Run directory: {folder.relative_to(here)}" in said.out
    assert (folder / "adapter_model.safetensors").is_file() and (
        folder / "checkpoint-2/optimizer.pt"
    ).is_file()
    assert [row["reward/cannot_judge"] for row in history(folder) if "reward" in row] == [0, 21]
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert [line["reward"] is None for line in lines] == [False] * 32 + [True] * 32


def test_a_resumed_run_counts_failures_as_if_it_had_never_stopped(here):
    flags = [
        "--trainer.reward_funcs",
        "hostile_rewards.failing_on_some_texts",
        "--rewards.max_failures",
        "1",
        "--training.max_steps",
        "4",
    ]
    logged, failures = {}, {}
    for name, resumed in (("straight", False), ("resumed", True)):
        assert train_model.main(demo_flags("--run-name", name, *flags)) == 0
        folder = run_dir(here, name)
        if resumed:
            assert (
                train_model.main(
                    demo_flags("--run-name", name, *flags, "--resume", str(folder / "checkpoint-2"))
                )
                == 0
            )
        logged[name] = [row["reward/cannot_judge"] for row in history(folder) if "reward" in row]
        failures[name] = [
            json.loads(line)["step"]
            for line in (folder / "reward_failures.jsonl").read_text().splitlines()
        ]
    assert (
        logged["straight"] == logged["resumed"]
        and 0 < logged["straight"][1] < logged["straight"][3]
    )
    assert failures["straight"] == failures["resumed"] and len(set(failures["straight"])) > 2


def test_the_adapter_of_a_4_bit_model_is_trained_in_float32(tmp_path):
    import datasets
    import torch
    import trl

    from gtpo.models.backends import Policy
    from gtpo.runs import trainers

    for make in (trl.GRPOTrainer, trainers.make_trainer):
        tokenizer = tiny.tiny_tokenizer()
        model = tiny.with_lora(tiny.tiny_model(tokenizer))
        model.is_loaded_in_4bit = True  # what TRL looks at
        arguments = trl.GRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"
        )
        problems = datasets.Dataset.from_list([{"prompt": "a"}])
        if make is trl.GRPOTrainer:
            trainer = make(
                model=model,
                reward_funcs=[len],
                args=arguments,
                train_dataset=problems,
                processing_class=tokenizer,
            )
        else:
            trainer = make(
                trl.GRPOTrainer,
                Policy(model, tokenizer, "transformers"),
                [len],
                arguments,
                problems,
            )
        dtypes = {p.dtype for p in trainer.model.parameters() if p.requires_grad}
        assert dtypes == ({torch.bfloat16} if make is trl.GRPOTrainer else {torch.float32})


def test_held_out_problems_are_evaluated_before_and_after(here, capsys):
    assert (
        train_model.main(
            demo_flags(
                "--evaluation.path", str(ROOT / "demo/data/test.jsonl"), "--evaluation.limit", "20"
            )
        )
        == 0
    )
    out = capsys.readouterr().out
    assert (
        "Before, 20 held-out problems: accuracy " in out
        and "After,  20 held-out problems: accuracy " in out
    )
    for name in ("before", "after"):
        held = evaluation_file.read_evaluation(run_dir(here) / f"evaluation/{name}.jsonl")
        assert (
            len(held.rows) == 20 and held.header["samples"] == 1 and held.header["temperature"] == 0
        )


def test_evaluating_while_it_trains_leaves_the_training_as_it_is_bit_for_bit(here, capsys):
    weights, rewards = {}, {}
    for name, every in (("without", "null"), ("with", "1")):
        assert (
            train_model.main(
                demo_flags(
                    "--run-name",
                    name,
                    "--evaluation.path",
                    str(ROOT / "demo/data/test.jsonl"),
                    "--evaluation.limit",
                    "6",
                    "--evaluation.every",
                    every,
                    "--evaluation.samples",
                    "2",
                    "--evaluation.temperature",
                    "1",
                    "--training.max_steps",
                    "3",
                )
            )
            == 0
        )
        folder = run_dir(here, name)
        weights[name] = (folder / "adapter_model.safetensors").read_bytes()
        timeless = [
            {k: v for k, v in row.items() if "time" not in k}
            for row in history(folder)
            if "reward" in row
        ]
        rewards[name] = timeless
    assert (
        weights["with"] == weights["without"]
        and rewards["with"] == rewards["without"]
        and len(rewards["with"]) == 3
    )
    found = [row for row in history(folder) if "evaluation/accuracy" in row]
    # after the last step comes the evaluation after training
    assert [row["step"] for row in found] == [1, 2]
    assert set(found[0]) == {
        "step",
        "epoch",
        *(f"evaluation/{n}" for n in ("accuracy", "format_rate", "truncation_rate", "mean_length")),
    }
    assert sorted(p.stem for p in (folder / "evaluation").iterdir()) == [
        "after",
        "before",
        "step-1",
        "step-2",
    ]
    assert (
        "step    1  held-out accuracy " in capsys.readouterr().out
        and "step    2  held-out accuracy " in (folder / "train.log").read_text()
    )


def test_an_evaluation_while_it_trains_keeps_the_metrics_of_steps_not_logged_yet(here):
    assert (
        train_model.main(
            demo_flags(
                "--evaluation.path",
                str(ROOT / "demo/data/test.jsonl"),
                "--evaluation.limit",
                "2",
                "--evaluation.every",
                "1",
                "--training.logging_steps",
                "2",
            )
        )
        == 0
    )
    assert [
        sorted({"reward", "evaluation/accuracy"} & row.keys()) for row in history(run_dir(here))
    ][:2] == [["evaluation/accuracy"], ["reward"]]


def test_the_grpo_baseline_trains_by_its_dotted_path(here):
    assert (
        train_model.main(
            demo_flags(
                "--trainer.class_path",
                "custom_trainer.original.UnslothGRPOTrainer",
                "--watch.completions",
                "false",
            )
        )
        == 0
    )
    assert "gtpo/completion_entropy" not in history(run_dir(here))[0]
    assert not (run_dir(here) / "completions.jsonl").exists()


@pytest.mark.parametrize("dataset", ["gsm8k", "hendrycks_math"])
def test_real_rows_train_through_dataset_path(here, shared_data, dataset):
    more = ["--dataset-subset", "algebra", "geometry"] if dataset == "hendrycks_math" else []
    assert (
        train_model.main(
            demo_flags(
                "--dataset-name",
                dataset,
                "--dataset.path",
                str(shared_data / dataset),
                "--dataset.split",
                "train[:40]",
                *more,
                "--model.max_seq_length",
                "432",
                "--model.max_prompt_length",
                "400",
                "--training.max_prompt_length",
                "400",
            )
        )
        == 0
    )
    folder = run_dir(here)
    assert (
        "dropped because their prompts are longer than 400 tokens"
        in (folder / "train.log").read_text()
    )
    assert (folder / "checkpoint-2").is_dir() and (folder / "adapter_model.safetensors").is_file()
    assert len([row for row in history(folder) if "reward" in row]) == 2


def test_wandb_works_offline_in_the_run_directory_without_asking(here, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(here / "no-netrc"))
    monkeypatch.setenv("WANDB_PROJECT", "of-the-caller")  # the recipe beats it
    assert (
        train_model.main(
            demo_flags(
                "--training.report_to",
                "wandb",
                "--wandb.project",
                "a-project",
                "--wandb.entity",
                "us",
            )
        )
        == 0
    )
    folder = run_dir(here)
    assert (
        "wandb: no login found, so this run is kept offline" in (folder / "train.log").read_text()
    )
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    records = wandb_records(file)
    assert [r.run.project for r in records if r.HasField("run")][0] == "a-project"
    assert [r.run.display_name for r in records if r.HasField("run")][0] == "demo"
    logged = {
        "/".join(item.nested_key) or item.key
        for r in records
        if r.HasField("history")
        for item in r.history.item
    }
    assert {"train/gtpo/completion_entropy", "train/reward/total_avg", "train/reward"} <= logged


def test_two_runs_of_one_process_have_a_wandb_run_each_and_leave_the_environment_as_it_was(here):
    before, seen = dict(os.environ), []
    for name in ("one", "other"):
        assert (
            train_model.main(
                demo_flags(
                    "--training.report_to",
                    "wandb",
                    "--wandb.project",
                    name,
                    "--run-name",
                    name,
                    "--training.max_steps",
                    "1",
                )
            )
            == 0
        )
        (file,) = run_dir(here, name).glob("wandb/offline-run-*/run-*.wandb")
        seen.append(
            [(r.run.project, r.run.run_id) for r in wandb_records(file) if r.HasField("run")][0]
        )
        assert {name: value for name, value in os.environ.items() if name.startswith("WANDB_")} == {
            **{name: value for name, value in before.items() if name.startswith("WANDB_")},
            **NO_TELEMETRY_OF_WANDB,
        }
    assert [project for project, _ in seen] == ["one", "other"] and seen[0][1] != seen[1][1]


NO_TELEMETRY_OF_WANDB = {
    name: value for name, value in NO_TELEMETRY.items() if name.startswith("WANDB_")
}


def test_an_interrupted_run_goes_on_in_the_same_wandb_run(here, capsys, monkeypatch):
    import signal

    import trl

    judge, rollouts = trl.GRPOTrainer._calculate_rewards, []

    def judge_and_interrupt(self, *args):
        rollouts.append(args)
        if len(rollouts) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return judge(self, *args)

    monkeypatch.setattr(trl.GRPOTrainer, "_calculate_rewards", judge_and_interrupt)
    flags = demo_flags(
        "--training.report_to", "wandb", "--training.max_steps", "4", "--training.save_steps", "100"
    )
    assert train_model.main(flags) == 143
    folder = run_dir(here)
    assert (
        f"interrupted: checkpoint-2 is saved in {folder.relative_to(here)}; continue with --resume"
        in capsys.readouterr().err
    )
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"] and not (
        folder / "trainer_state.json"
    ).exists()
    (first,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    sessions = [wandb_records(first)]  # written to its end
    assert train_model.main([*flags, "--resume"]) == 0
    assert "after step 2 of 4" in (folder / "train.log").read_text()
    (second,) = [file for file in folder.glob("wandb/offline-run-*/run-*.wandb") if file != first]
    sessions.append(wandb_records(second))
    lines = [
        [
            {"/".join(item.nested_key) or item.key: item.value_json for item in r.history.item}
            for r in records
            if r.HasField("history")
        ]
        for records in sessions
    ]
    assert [
        [line["train/global_step"] for line in session if "train/reward" in line]
        for session in lines
    ] == [["1", "2"], ["3", "4"]]
    (one,), (other,) = [
        {r.run.run_id for r in records if r.HasField("run")} for records in sessions
    ]
    assert one == other == json.loads((folder / "trackers.json").read_text())["wandb"]
    assert [row["step"] for row in history(folder) if "reward" in row] == [1, 2, 3, 4]
    capsys.readouterr()
    assert train_model.main([*flags, "--resume"]) == 0
    assert (
        "This run is finished, after 4 steps; to train further, raise training.max_steps"
        in capsys.readouterr().err
    )


def wandb_records(file) -> list:
    """The records of an offline run, which is on disk to its end as soon as ours has ended."""
    records = parsed(file.read_bytes())
    assert records[-1].HasField("exit")
    return records


def parsed(data: bytes) -> list:
    """A 7-byte header, then LevelDB's log format: 32 KiB blocks of (crc, length, type, bytes)."""
    from wandb.proto import wandb_internal_pb2

    place, piece, records = 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # too small for a record: padding
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        piece += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            records.append(wandb_internal_pb2.Record.FromString(piece))
            piece = b""
    return records


# ---- what needs nothing heavy


def in_a_fresh_process(here, *flags: str) -> subprocess.CompletedProcess:
    """main() in a process that then says which heavy modules were imported, and what the GPU
    variable is.
    """
    program = (
        "import os, sys; sys.path.insert(0, sys.argv.pop(1)); import train_model; code ="
        " train_model.main(sys.argv[1:]); print('HEAVY', sorted({'torch', 'transformers', 'trl',"
        " 'datasets', 'wandb'} & sys.modules.keys()), os.environ.get('CUDA_VISIBLE_DEVICES'),"
        " file=sys.stderr); sys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", program, str(ROOT), *flags],
        cwd=here,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_lists_every_key_and_imports_nothing_heavy(here):
    run = in_a_fresh_process(here, "--help")
    assert run.returncode == 0 and "HEAVY [] None" in run.stderr
    for text in (
        "--training.learning_rate  (float; 1e-06)",
        "The highest learning rate, reached at the end of the warm-up.",
        "--model-name",
        "--dry-run",
        "--training.temperature  (float; 1.0)",
        "--gtpo_runtime.ent_threshold  (float; 0.7)",
        "--env",
    ):
        assert text in run.stdout, text


def test_a_dry_run_prints_a_recipe_that_can_be_fed_back_and_the_plan(here):
    documented = str(ROOT / "tests/recipes/documented.yaml")
    run = in_a_fresh_process(
        here, documented, "--dry-run", "--cuda", "3", "--env.HF_TOKEN", "secret-token"
    )
    # set, and nothing imported before it
    assert run.returncode == 0 and "HEAVY [] 3" in run.stderr
    (here / "again.yaml").write_text(run.stdout)
    assert cli.read_recipe(["again.yaml"]) == cli.read_recipe([documented, "--cuda", "3"])
    assert (
        "secret-token" not in run.stdout + run.stderr
        and "secrets left out of the recipe above: HF_TOKEN" in run.stderr
    )
    for text in (
        "1 prompt x 8 completions per optimizer step",
        "max_completion_length: 1500 tokens",
        "raised from 1 to 8",
        "run directory: ./GTPO_LLAMA8B_MATH_adam1-0.999999",
    ):
        assert text in run.stderr, text
    assert [p.name for p in here.iterdir()] == ["again.yaml"]


def test_a_dry_run_knows_the_steps_where_a_local_file_or_max_steps_tells(here):
    run = in_a_fresh_process(here, *demo_flags("--training.max_steps", "-1", "--dry-run"))
    assert "steps: 2000 (estimated from 2000 problems, before the length filter)" in run.stderr
    assert "steps: 2\n" in in_a_fresh_process(here, *demo_flags("--dry-run")).stderr


def test_version_prints_ours_and_the_libraries(here):
    run = in_a_fresh_process(here, "--version")
    assert run.returncode == 0 and "HEAVY []" in run.stderr
    assert run.stdout.startswith("gtpo ") and "\ntrl 1." in run.stdout and "\nvllm " in run.stdout


# ---- refusals: exit code 2, one sentence, no traceback, nothing on disk


def refusal(here, capsys, *flags: str) -> str:
    assert train_model.main(demo_flags(*flags)) == 2
    assert not (here / "runs").exists()
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(error) == 1
    return error[0]


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (
            ["--dataset.path", "nowhere.jsonl"],
            "error: dataset.path: there is no file or folder 'nowhere.jsonl'",
        ),
        (
            ["--training.max_prompt_length", "3"],
            "error: training.max_prompt_length: 3 drops all 2000 prompts; the shortest has",
        ),
        (
            ["--evaluation.path", "nowhere.jsonl"],
            "error: evaluation.path: there is no file or folder 'nowhere.jsonl'",
        ),
        (
            ["--training.per_device_train_batch_size", "40000"],
            "error: dataset: 2000 problems are left, and one rollout takes 5000; lower",
        ),
        (["--trainer.class_path", "reward_math.final_reward"], "is no subclass of trl.GRPOTrainer"),
        (
            ["--model.chat_template", "nofile.jinja"],
            (
                "error: model.chat_template: there is no file 'nofile.jinja', and it is no Jinja"
                " template"
            ),
        ),
        (
            ["--model.chat_template", "{{"],
            "error: model.chat_template: it is no Jinja template that works",
        ),
        (
            ["--model.chat_template", "{% if 1 %}hello{% endif %}"],
            "error: model.chat_template: it leaves out what the user says",
        ),
        (["--model-name", "./nowhere"], "error: model.model_name: there is no folder './nowhere'"),
        (
            ["--model-name", str(ROOT / "recipes")],
            "has no config.json; give a model saved by transformers",
        ),
        (
            ["--model-name", "some/model"],
            "'some/model' is not in the local cache and HF_HUB_OFFLINE is set; use a local folder",
        ),
        (
            ["--model.backend", "unsloth"],
            (
                "error: model.backend: unsloth cannot be used here, no NVIDIA GPU is visible; use"
                " transformers or auto"
            ),
        ),
        (
            ["--model.load_in_4bit", "true"],
            "error: model.load_in_4bit: true needs an NVIDIA GPU; use false",
        ),
        (
            ["--training.optimizer", "paged_adamw_8bit"],
            "error: training.optimizer: paged_adamw_8bit needs an NVIDIA GPU; use adamw_torch",
        ),
        (
            ["--model.target_modules", "no_proj"],
            "error: model.target_modules: ['no_proj'] does not fit this model",
        ),
        (
            ["--model.max_seq_length", "100000"],
            "error: model.max_seq_length: 100000 is more than the 8192 tokens of context",
        ),
        (
            ["--trainer.reward_funcs", "os.environ"],
            "error: trainer.reward_funcs: 'os.environ' is _Environ, which cannot be called",
        ),
        (
            [
                "--trainer.class_path",
                "custom_trainer.original.UnslothGRPOTrainer",
                "--training.use_liger_kernel",
            ],
            "error: training: Liger is required",
        ),
        (["--output_root", "/proc"], "error: output_root: /proc cannot be written to"),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(here, capsys, flags, sentence):
    assert sentence in refusal(here, capsys, *flags)


def test_a_missing_network_is_noticed_after_a_short_look(here, capsys, monkeypatch):
    import httpx
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def no_network(self, *args, **kwargs):
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    assert (
        "'some/model' is not in the local cache and the hub cannot be reached (ConnectError)"
        in refusal(here, capsys, "--model-name", "some/model")
    )


def test_a_model_without_chat_template_is_refused_unless_the_recipe_gives_one(here, capsys):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = None
    tiny.tiny_model(tokenizer).save_pretrained("base")
    tokenizer.save_pretrained("base")
    assert "has no chat template (it is a base model); set model.chat_template" in refusal(
        here, capsys, "--model-name", "./base"
    )
    (here / "chat.jinja").write_text(tiny.CHAT_TEMPLATE)
    assert (
        train_model.main(
            demo_flags(
                "--model-name",
                "./base",
                "--model.chat_template",
                "chat.jinja",
                "--model.max_seq_length",
                "400",
                "--training.max_prompt_length",
                "390",
            )
        )
        == 0
    )


def test_a_model_too_large_for_a_cpu_is_refused(here, capsys, monkeypatch):
    import psutil

    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: type("Memory", (), {"available": 500_000})()
    )
    assert "GiB free; use a smaller model, or a machine with an NVIDIA GPU" in refusal(
        here, capsys, "--model.backend", "auto"
    )


def test_an_existing_run_is_refused_kept_and_overwritten_only_on_request(here, capsys):
    assert train_model.main(demo_flags()) == 0
    marker = run_dir(here) / "marker"
    marker.touch()
    capsys.readouterr()
    assert train_model.main(demo_flags()) == 2
    assert (
        "holds a finished run of 2 steps; choose another with --run-name, or replace it with"
        " --overwrite" in capsys.readouterr().err
    )
    assert train_model.main(demo_flags("--overwrite", "--training.max_prompt_length", "3")) == 2
    assert marker.exists()  # a refused run has not touched it
    assert train_model.main(demo_flags("--overwrite")) == 0
    assert not marker.exists()


def test_damaged_weights_and_a_reward_that_cannot_be_imported_are_refused(here, capsys):
    import shutil

    shutil.copytree(ROOT / "demo/model", "damaged")
    (here / "damaged/model.safetensors").write_bytes(b"\x08")
    assert "error: model: './damaged' cannot be loaded" in refusal(
        here, capsys, "--model-name", "./damaged"
    )
    (here / "rude_reward.py").write_text(
        "import sys\n\ndef pay(completions, **kwargs):\n    return []\n\nsys.exit(0)\n"
    )
    assert "'rude_reward.pay' cannot be imported (SystemExit: 0)" in refusal(
        here, capsys, "--trainer.reward_funcs", "rude_reward.pay"
    )


def test_of_two_runs_at_once_with_one_name_the_second_is_told(here, capsys):
    from gtpo.errors import RecipeError
    from gtpo.runs import directory as runs
    from gtpo.runs.start import Request, resolve_start

    recipe = cli.read_recipe(demo_flags())
    # both looked at the same time
    first, second = resolve_start(recipe, Request()), resolve_start(recipe, Request())
    with runs.opened(first, recipe, None):
        with pytest.raises(RecipeError, match="another process trains in .* right now"):
            with runs.opened(second, recipe, None):
                pass
        (first.run_dir / "completions.jsonl").write_text("{}\n")
    with pytest.raises(
        RecipeError,
        match="holds a run that stopped before its first checkpoint; start it again with --resume",
    ):
        with runs.opened(second, recipe, None):
            pass


def test_a_folder_that_is_no_run_is_never_overwritten(here, capsys):
    folder = here / cli.read_recipe(demo_flags()).output_dir()
    folder.mkdir(parents=True)
    (folder / "thesis.tex").touch()
    assert train_model.main(demo_flags("--overwrite")) == 2
    assert (
        "is no run directory of ours" in capsys.readouterr().err
        and (folder / "thesis.tex").exists()
    )
