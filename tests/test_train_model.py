"""train_model.py end to end on a CPU: what a run leaves behind, and what it refuses.

The bits of whole runs are compared in test_resume.py, test_exactness.py and test_compat.py.
"""

import json
import os
import struct
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT, split_flags
from demo_run import demo_flags, history, run_dir, train

import train_model
from gtpo.evaluation import file as evaluation_file
from gtpo.recipe import command_line as cli
from gtpo.system.environment import NO_TELEMETRY

# ---- what a run leaves behind


HELD_OUT = ["--evaluation.path", str(ROOT / "demo/data/test.jsonl")]


@pytest.mark.slow
def test_a_run_leaves_recipe_versions_log_checkpoints_and_a_plain_peft_adapter(here, capsys):
    assert train() == 0
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
    # This is GTPO's card. TRL's card would name a base model None.
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


@pytest.mark.slow
def test_the_same_seed_gives_the_same_adapter_and_another_seed_another(here):
    weights = []
    for name, seed in (("a", "1"), ("b", "1"), ("c", "2")):
        assert train(f"--run-name {name} --model.random_seed {seed}") == 0
        weights.append((run_dir(here, name) / "adapter_model.safetensors").read_bytes())
    assert weights[0] == weights[1] != weights[2]


@pytest.mark.slow
def test_a_run_that_fails_leaves_its_traceback_in_the_log(here):
    (here / "failing_trainer.py").write_text(
        "import trl\n\nclass Failing(trl.GRPOTrainer):\n    def compute_loss(self, *args,"
        " **kwargs):\n        raise KeyError('no loss')\n"
    )
    with pytest.raises(KeyError):
        train("--trainer.class_path failing_trainer.Failing")
    assert "no loss" in (run_dir(here) / "train.log").read_text()


@pytest.mark.slow
def test_the_grpo_baseline_trains_by_its_dotted_path(here):
    baseline = "--trainer.class_path custom_trainer.original.UnslothGRPOTrainer"
    assert train(baseline, "--watch.completions false") == 0
    assert "gtpo/completion_entropy" not in history(run_dir(here))[0]
    assert not (run_dir(here) / "completions.jsonl").exists()


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["gsm8k", "hendrycks_math"])
def test_real_rows_train_through_dataset_path(here, shared_data, dataset):
    flags = [
        "--dataset.path",
        str(shared_data / dataset),
        f"--dataset-name {dataset} --dataset.split train[:40] --model.max_seq_length 432",
        "--model.max_prompt_length 400 --training.max_prompt_length 400",
    ]
    if dataset == "hendrycks_math":
        flags.append("--dataset-subset algebra geometry")
    assert train(*flags) == 0
    folder = run_dir(here)
    log = (folder / "train.log").read_text()
    assert "dropped because their prompts are longer than 400 tokens" in log
    assert (folder / "checkpoint-2").is_dir() and (folder / "adapter_model.safetensors").is_file()
    assert len([row for row in history(folder) if "reward" in row]) == 2


def test_the_adapter_of_a_4_bit_model_is_trained_in_float32(tmp_path):
    import datasets
    import torch
    import trl

    from gtpo.models.backends import Policy
    from gtpo.runs import trainers

    for make in (trl.GRPOTrainer, trainers.make_trainer):
        tokenizer = tiny.tiny_tokenizer()
        model = tiny.with_lora(tiny.tiny_model(tokenizer))
        model.is_loaded_in_4bit = True  # TRL reads this
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


# ---- rewards that fail


@pytest.mark.slow
def test_a_reward_function_that_fails_on_everything_ends_the_run_at_the_first_step(here, capsys):
    (here / "failing_reward.py").write_text(
        "def pay(completions, **kwargs):\n    raise KeyError('judge is away')\n"
    )
    assert train("--trainer.reward_funcs failing_reward.pay") == 2
    assert (
        "error: trainer.reward_funcs: 'failing_reward.pay' failed on every completion of the first"
        " rollout, it raised KeyError: 'judge is away'; the tracebacks are in runs/demo_adam1"
        in capsys.readouterr().err
    )
    file = run_dir(here) / "reward_failures.jsonl"
    last = json.loads(file.read_text().splitlines()[-1])
    assert "judge is away" in last["traceback"] and last["reference"].startswith("<reasoning>")


@pytest.mark.slow
@pytest.mark.parametrize(
    "class_path",
    ["gtpo.gtpo_training.UnslothGTPOTrainer", "custom_trainer.original.UnslothGRPOTrainer"],
)
def test_a_run_whose_rewards_fail_too_often_is_saved_and_ends_with_code_3(here, capsys, class_path):
    code = train(
        f"--trainer.class_path {class_path}",
        "--trainer.reward_funcs hostile_rewards.failing_later",
        "--training.max_steps 50 --training.per_device_train_batch_size 32",
        "--training.save_steps 50",
    )
    assert code == 3
    folder, printed = run_dir(here), capsys.readouterr()
    last_line = printed.err.splitlines()[-1]
    assert last_line.startswith(
        "stopped: Step 2: reward functions failed on 21 of the last 64 completions, "
    )
    assert last_line.endswith("; the run was stopped there, its adapter and a checkpoint are saved")
    assert f"Run directory: {folder.relative_to(here)}" in printed.out
    assert (folder / "adapter_model.safetensors").is_file()
    assert (folder / "checkpoint-2/optimizer.pt").is_file()
    assert [row["reward/cannot_judge"] for row in history(folder) if "reward" in row] == [0, 21]
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert [line["reward"] is None for line in lines] == [False] * 32 + [True] * 32


@pytest.mark.slow
def test_a_resumed_run_counts_failures_as_if_it_had_never_stopped(here):
    flags = (
        "--trainer.reward_funcs hostile_rewards.failing_on_some_texts --rewards.max_failures 1"
        " --training.max_steps 4"
    )
    logged, failures = {}, {}
    for name, resumed in (("straight", False), ("resumed", True)):
        assert train(f"--run-name {name}", flags) == 0
        folder = run_dir(here, name)
        if resumed:
            checkpoint = str(folder / "checkpoint-2")
            assert train(f"--run-name {name}", flags, "--resume", checkpoint) == 0
        logged[name] = [row["reward/cannot_judge"] for row in history(folder) if "reward" in row]
        lines = (folder / "reward_failures.jsonl").read_text().splitlines()
        failures[name] = [json.loads(line)["step"] for line in lines]
    assert logged["straight"] == logged["resumed"]
    assert 0 < logged["straight"][1] < logged["straight"][3]
    assert failures["straight"] == failures["resumed"] and len(set(failures["straight"])) > 2


# ---- held-out problems


@pytest.mark.slow
def test_held_out_problems_are_evaluated_before_and_after(here, capsys):
    assert train(*HELD_OUT, "--evaluation.limit 20") == 0
    out = capsys.readouterr().out
    assert "Before, 20 held-out problems: accuracy " in out
    assert "After,  20 held-out problems: accuracy " in out
    for name in ("before", "after"):
        evaluation = evaluation_file.read_evaluation(run_dir(here) / f"evaluation/{name}.jsonl")
        assert len(evaluation.rows) == 20
        assert evaluation.header["samples"] == 1 and evaluation.header["temperature"] == 0


@pytest.mark.slow
def test_evaluations_during_training_change_no_bit_of_it(here, capsys):
    weights, lines = {}, {}
    for name, every in (("without", "null"), ("with", "1")):
        flags = (
            f"--run-name {name} --evaluation.every {every} --evaluation.limit 6"
            " --evaluation.samples 2 --evaluation.temperature 1 --training.max_steps 3"
        )
        assert train(*HELD_OUT, flags) == 0
        folder = run_dir(here, name)
        weights[name] = (folder / "adapter_model.safetensors").read_bytes()
        lines[name] = [
            {key: value for key, value in row.items() if "time" not in key}
            for row in history(folder)
            if "reward" in row
        ]
    assert weights["with"] == weights["without"]
    assert lines["with"] == lines["without"] and len(lines["with"]) == 3
    evaluations = [row for row in history(folder) if "evaluation/accuracy" in row]
    # After the last step comes the evaluation after training.
    assert [row["step"] for row in evaluations] == [1, 2]
    metrics = ("accuracy", "format_rate", "truncation_rate", "mean_length")
    assert set(evaluations[0]) == {"step", "epoch", *(f"evaluation/{name}" for name in metrics)}
    files = sorted(path.stem for path in (folder / "evaluation").iterdir())
    assert files == ["after", "before", "step-1", "step-2"]
    assert "step    1  held-out accuracy " in capsys.readouterr().out
    assert "step    2  held-out accuracy " in (folder / "train.log").read_text()


@pytest.mark.slow
def test_an_evaluation_during_training_keeps_the_metrics_of_steps_not_logged_yet(here):
    flags = "--evaluation.limit 2 --evaluation.every 1 --training.logging_steps 2"
    assert train(*HELD_OUT, flags) == 0
    names = {"reward", "evaluation/accuracy"}
    first_lines = [sorted(names & row.keys()) for row in history(run_dir(here))][:2]
    assert first_lines == [["evaluation/accuracy"], ["reward"]]


# ---- wandb


NO_TELEMETRY_OF_WANDB = {
    name: value for name, value in NO_TELEMETRY.items() if name.startswith("WANDB_")
}


def wandb_variables(environment) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name.startswith("WANDB_")}


@pytest.mark.slow
def test_wandb_works_offline_in_the_run_directory_without_asking(here, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(here / "no-netrc"))
    monkeypatch.setenv("WANDB_PROJECT", "of-the-caller")  # the recipe wins over it
    assert train("--training.report_to wandb --wandb.project a-project --wandb.entity us") == 0
    folder = run_dir(here)
    log = (folder / "train.log").read_text()
    assert "wandb: no login found, so this run is kept offline" in log
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    records = wandb_records(file)
    run = next(record.run for record in records if record.HasField("run"))
    assert (run.project, run.display_name) == ("a-project", "demo")
    logged = {
        "/".join(item.nested_key) or item.key
        for record in records
        if record.HasField("history")
        for item in record.history.item
    }
    assert {"train/gtpo/completion_entropy", "train/reward/total_avg", "train/reward"} <= logged


@pytest.mark.slow
def test_two_runs_of_one_process_have_a_wandb_run_each_and_leave_the_environment_as_it_was(here):
    before, runs = wandb_variables(os.environ), []
    for name in ("one", "other"):
        flags = f"--run-name {name} --wandb.project {name} --training.max_steps 1"
        assert train(flags, "--training.report_to wandb") == 0
        (file,) = run_dir(here, name).glob("wandb/offline-run-*/run-*.wandb")
        records = wandb_records(file)
        runs.append(next(record.run for record in records if record.HasField("run")))
        assert wandb_variables(os.environ) == {**before, **NO_TELEMETRY_OF_WANDB}
    assert [run.project for run in runs] == ["one", "other"]
    assert runs[0].run_id != runs[1].run_id


@pytest.mark.slow
def test_a_resumed_run_continues_its_wandb_run(here, capsys, monkeypatch):
    import signal

    import trl

    calculate, rollouts = trl.GRPOTrainer._calculate_rewards, []

    def calculate_and_interrupt(self, *args):
        rollouts.append(args)
        if len(rollouts) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return calculate(self, *args)

    monkeypatch.setattr(trl.GRPOTrainer, "_calculate_rewards", calculate_and_interrupt)
    flags = "--training.report_to wandb --training.max_steps 4 --training.save_steps 100"
    assert train(flags) == 143
    folder = run_dir(here)
    assert (
        f"interrupted: checkpoint-2 is saved in {folder.relative_to(here)}; continue with --resume"
        in capsys.readouterr().err
    )
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    assert not (folder / "trainer_state.json").exists()
    (first,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    sessions = [wandb_records(first)]  # the file of the interrupted run is complete already

    assert train(flags, "--resume") == 0
    assert "after step 2 of 4" in (folder / "train.log").read_text()
    (second,) = [file for file in folder.glob("wandb/offline-run-*/run-*.wandb") if file != first]
    sessions.append(wandb_records(second))
    steps, run_ids = [], set()
    for records in sessions:
        lines = [
            {"/".join(item.nested_key) or item.key: item.value_json for item in record.history.item}
            for record in records
            if record.HasField("history")
        ]
        steps.append([line["train/global_step"] for line in lines if "train/reward" in line])
        run_ids |= {record.run.run_id for record in records if record.HasField("run")}
    assert steps == [["1", "2"], ["3", "4"]]
    assert run_ids == {json.loads((folder / "trackers.json").read_text())["wandb"]}
    assert [row["step"] for row in history(folder) if "reward" in row] == [1, 2, 3, 4]

    capsys.readouterr()
    assert train(flags, "--resume") == 0
    assert (
        "This run is finished, after 4 steps; to train further, raise training.max_steps"
        in capsys.readouterr().err
    )


def wandb_records(file) -> list:
    """The records of an offline run; the last one says that the file is complete.

    After a header of 7 bytes the file has LevelDB's log format: blocks of 32 KiB with pieces of
    records. A piece is a checksum (4 bytes), a length (2), a type (1), and its bytes.
    """
    from wandb.proto import wandb_internal_pb2

    data, place, piece, records = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        left = 32768 - place % 32768
        if left < 7:  # too small for a piece: padding
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        piece += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole record, or its last piece
            records.append(wandb_internal_pb2.Record.FromString(piece))
            piece = b""
    assert records[-1].HasField("exit")
    return records


# ---- what runs without heavy imports


def in_a_fresh_process(here, *flags: str) -> subprocess.CompletedProcess:
    """main() in a new process, which prints `HEAVY`, its heavy imports, and CUDA's variable."""
    program = (
        "import os, sys; sys.path.insert(0, sys.argv.pop(1)); import train_model; code ="
        " train_model.main(sys.argv[1:]); print('HEAVY', sorted({'torch', 'transformers', 'trl',"
        " 'datasets', 'wandb'} & sys.modules.keys()), os.environ.get('CUDA_VISIBLE_DEVICES'),"
        " file=sys.stderr); sys.exit(code)"
    )
    return subprocess.run(
        [sys.executable, "-c", program, str(ROOT), *split_flags(*flags)],
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


@pytest.mark.slow
def test_a_dry_run_prints_a_recipe_that_can_be_read_again_and_the_batch_plan(here):
    documented = str(ROOT / "tests/recipes/documented.yaml")
    run = in_a_fresh_process(
        here, documented, "--dry-run", "--cuda 3", "--env.HF_TOKEN secret-token"
    )
    # CUDA_VISIBLE_DEVICES is set, and nothing was imported before.
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


@pytest.mark.slow
def test_a_dry_run_knows_the_steps_from_a_local_file_or_from_max_steps(here):
    run = in_a_fresh_process(here, *demo_flags("--training.max_steps -1", "--dry-run"))
    assert "steps: 2000 (estimated from 2000 problems, before the length filter)" in run.stderr
    assert "steps: 2\n" in in_a_fresh_process(here, *demo_flags("--dry-run")).stderr


def test_version_prints_the_versions_of_gtpo_and_the_libraries(here):
    run = in_a_fresh_process(here, "--version")
    assert run.returncode == 0 and "HEAVY []" in run.stderr
    assert run.stdout.startswith("gtpo ") and "\ntrl 1." in run.stdout and "\nvllm " in run.stdout


# ---- refusals: exit code 2, one sentence, no traceback, nothing on disk


def refusal(here, capsys, *flags: str) -> str:
    """The one line on stderr that says why train_model.py refuses these flags."""
    assert train(*flags) == 2
    assert not (here / "runs").exists()
    lines = capsys.readouterr().err.splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    return error


# fmt: off
REFUSALS = [
    (["--dataset.path nowhere.jsonl"],
     "error: dataset.path: there is no file or folder 'nowhere.jsonl'"),
    (["--evaluation.path nowhere.jsonl"],
     "error: evaluation.path: there is no file or folder 'nowhere.jsonl'"),
    (["--training.max_prompt_length 3"],
     "error: training.max_prompt_length: 3 drops all 2000 prompts; the shortest has"),
    (["--training.per_device_train_batch_size 40000"],
     "error: dataset: 2000 problems are left, and one rollout takes 5000; lower"),
    (["--trainer.class_path reward_math.final_reward"],
     "is no subclass of trl.GRPOTrainer"),
    (["--trainer.reward_funcs os.environ"],
     "error: trainer.reward_funcs: 'os.environ' is _Environ, which cannot be called"),
    (["--model.chat_template nofile.jinja"],
     "error: model.chat_template: there is no file 'nofile.jinja', and it is no Jinja template"),
    (["--model.chat_template", "{{"],
     "error: model.chat_template: it is no Jinja template that works"),
    (["--model.chat_template", "{% if 1 %}hello{% endif %}"],
     "error: model.chat_template: it leaves out what the user says"),
    (["--model-name ./nowhere"],
     "error: model.model_name: there is no folder './nowhere'"),
    (["--model-name", str(ROOT / "recipes")],
     "has no config.json; give a model saved by transformers"),
    (["--model-name some/model"],
     "'some/model' is not in the local cache and HF_HUB_OFFLINE is set; use a local folder"),
    (["--model.backend unsloth"],
     "error: model.backend: unsloth cannot be used here, no NVIDIA GPU is visible; use transformers"
     " or auto"),
    (["--model.load_in_4bit true"],
     "error: model.load_in_4bit: true needs an NVIDIA GPU; use false"),
    (["--training.optimizer paged_adamw_8bit"],
     "error: training.optimizer: paged_adamw_8bit needs an NVIDIA GPU; use adamw_torch"),
    (["--model.target_modules no_proj"],
     "error: model.target_modules: this model has no layer named no_proj; its linear"),
    (["--model.max_seq_length 100000"],
     "error: model.max_seq_length: 100000 is more than the 8192 tokens of context"),
    (["--trainer.class_path custom_trainer.original.UnslothGRPOTrainer",
      "--training.use_liger_kernel"],
     "error: training: Liger is required"),
    (["--output_root /proc"],
     "error: output_root: /proc cannot be written to"),
]
# fmt: on


@pytest.mark.parametrize("flags, sentence", REFUSALS)
def test_what_cannot_work_is_refused_in_one_sentence(here, capsys, flags, sentence):
    assert sentence in refusal(here, capsys, *flags)


def test_a_refusal_after_the_recipe_was_read_also_names_the_flag_or_file(here, capsys):
    error = refusal(here, capsys, "--dataset.path nowhere.jsonl")
    assert error.endswith("no file or folder 'nowhere.jsonl' (set by --dataset.path)")
    own = here / "own.yaml"
    text = (ROOT / "recipes/demo.yaml").read_text()
    own.write_text(text.replace("demo/data/train.jsonl", "gone.jsonl"))
    assert train_model.main([str(own)]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.endswith(f"there is no file or folder 'gone.jsonl' (set in {own})")


@pytest.mark.slow
def test_a_missing_network_is_noticed_at_once(here, capsys, monkeypatch):
    import httpx
    import huggingface_hub

    monkeypatch.setenv("HF_HUB_OFFLINE", "0")

    def no_network(self, *args, **kwargs):
        raise httpx.ConnectError("no route")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", no_network)
    assert (
        "'some/model' is not in the local cache and the hub cannot be reached (ConnectError)"
        in refusal(here, capsys, "--model-name some/model")
    )


@pytest.mark.slow
def test_a_model_without_chat_template_is_refused_unless_the_recipe_gives_one(here, capsys):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = None
    tiny.tiny_model(tokenizer).save_pretrained("base")
    tokenizer.save_pretrained("base")
    assert "has no chat template (it is a base model); set model.chat_template" in refusal(
        here, capsys, "--model-name ./base"
    )
    (here / "chat.jinja").write_text(tiny.CHAT_TEMPLATE)
    template = "--model-name ./base --model.chat_template chat.jinja"
    assert train(template, "--model.max_seq_length 400 --training.max_prompt_length 390") == 0


def test_a_model_too_large_for_a_cpu_is_refused(here, capsys, monkeypatch):
    import psutil

    monkeypatch.setattr(
        psutil, "virtual_memory", lambda: type("Memory", (), {"available": 500_000})()
    )
    assert "GiB free and no GPU; use a smaller model or a GPU" in refusal(
        here, capsys, "--model.backend auto"
    )


@pytest.mark.slow
def test_an_existing_run_is_refused_and_only_overwritten_on_request(here, capsys):
    assert train() == 0
    marker = run_dir(here) / "marker"
    marker.touch()
    capsys.readouterr()
    assert train() == 2
    assert (
        "holds a finished run of 2 steps; choose another with --run-name, or replace it with"
        " --overwrite" in capsys.readouterr().err
    )
    assert train("--overwrite --training.max_prompt_length 3") == 2
    assert marker.exists()  # a refused run leaves it untouched
    assert train("--overwrite") == 0
    assert not marker.exists()


@pytest.mark.slow
def test_damaged_weights_and_a_reward_that_cannot_be_imported_are_refused(here, capsys):
    import shutil

    shutil.copytree(ROOT / "demo/model", "damaged")
    (here / "damaged/model.safetensors").write_bytes(b"\x08")
    assert "error: model: './damaged' cannot be loaded" in refusal(
        here, capsys, "--model-name ./damaged"
    )
    (here / "rude_reward.py").write_text(
        "import sys\n\ndef pay(completions, **kwargs):\n    return []\n\nsys.exit(0)\n"
    )
    assert "'rude_reward.pay' cannot be imported (SystemExit: 0)" in refusal(
        here, capsys, "--trainer.reward_funcs rude_reward.pay"
    )


def test_of_two_runs_in_one_directory_the_second_is_refused(here, capsys):
    from gtpo.errors import RecipeError
    from gtpo.runs import directory
    from gtpo.runs.start import Request, resolve_start

    recipe = cli.read_recipe(demo_flags())
    # Both find the directory free before either of them opens it.
    first, second = resolve_start(recipe, Request()), resolve_start(recipe, Request())
    with directory.opened(first, recipe, None):
        with pytest.raises(RecipeError, match="another process trains in .* right now"):
            with directory.opened(second, recipe, None):
                pass
        (first.run_dir / "completions.jsonl").write_text("{}\n")
    with pytest.raises(
        RecipeError,
        match="holds a run that stopped before its first checkpoint; start it again with --resume",
    ):
        with directory.opened(second, recipe, None):
            pass


@pytest.mark.slow
def test_a_folder_that_is_no_run_is_never_overwritten(here, capsys):
    folder = here / cli.read_recipe(demo_flags()).output_dir()
    folder.mkdir(parents=True)
    (folder / "thesis.tex").touch()
    assert train("--overwrite") == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert (folder / "thesis.tex").exists()
