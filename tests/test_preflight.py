"""`--check` and `--dry-run`: mistakes are found early, with a sentence each.

The model's weights are never loaded.
"""

import importlib.util
import json
import os
import shutil
import sys

import pytest
from conftest import ROOT

import train_model
from gtpo import preflight
from gtpo.preflight import Check
from gtpo.recipe import command_line as cli
from gtpo.runs.start import Request
from gtpo.system.console import Finding, conclusion, finding_line


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty current directory. The import path and the environment are restored afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = dict(os.environ)
    yield tmp_path
    os.environ.clear()
    os.environ.update(before)


def check_demo(*flags: str) -> list[str]:
    """The words of `--check` on the demo, with its files by absolute paths."""
    test_problems = str(ROOT / "demo/data/test.jsonl")
    words = [str(ROOT / "recipes/demo.yaml"), "--model-name", str(ROOT / "demo/model")]
    words += ["--dataset.path", test_problems, "--evaluation.path", test_problems]
    return [*words, "--check", *flags]


def findings(capsys, *flags: str, code: int) -> dict[str, list[dict]]:
    """The findings of `--check --json` on the demo, by the name of their check."""
    assert train_model.main(check_demo("--json", *flags)) == code
    report = json.loads(capsys.readouterr().out)
    assert report["ready"] == (code == 0)
    by_name: dict[str, list[dict]] = {}
    for finding in report["checks"]:
        by_name.setdefault(finding["check"], []).append(finding)
    return by_name


def verdicts(by_name: dict[str, list[dict]]) -> dict[str, str]:
    """`ok`, `warn fail` and so on, by the name of the check."""
    return {
        name: " ".join(finding["verdict"] for finding in several)
        for name, several in by_name.items()
    }


def failed(by_name: dict[str, list[dict]]) -> set[str]:
    return {name for name, verdict in verdicts(by_name).items() if verdict.endswith("fail")}


def test_the_demo_is_ready_and_its_weights_are_not_needed(here, capsys):
    model = here / "model"
    shutil.copytree(ROOT / "demo/model", model)
    (model / "model.safetensors").write_bytes(b"no weights")
    assert train_model.main(check_demo("--model-name", str(model))) == 0
    text = capsys.readouterr().out
    table, _, shown = text.partition("---- the first prompt, as the model reads it\n")
    lines = table.splitlines()
    prompt, ruler, last = shown.splitlines()
    assert prompt.startswith("<|system|>Reason, then answer.<|end|><|user|>")
    assert prompt.endswith("<|end|><|assistant|>") and ruler == "----"
    assert last == f"Ready: {len(lines)} ok."
    for line in lines:
        verdict, name, sentence = line[:6], line[6:19], line[19:]
        assert verdict == "ok    " and name.strip()
        assert sentence.startswith("  ") and sentence[2] != " "
    assert ", ".join(line[6:19].strip() for line in lines) == (
        "recipe, run directory, trackers, model files, data files, hub token, backend, trainer,"
        " tokenizer, chat template, dataset, held-out, prompt, options, reward, model, memory, disk"
    )
    for expected in (
        "8 prompts x 8 completions per optimizer step, each completion of at most 36 tokens",
        "trackers       none",
        "not needed: the model is a local folder",
        "gtpo.gtpo_training.UnslothGTPOTrainer, with the optimizer adamw_torch",
        "200 problems; 0 of 200 dropped because their prompts are longer than 60 tokens; the"
        " longest prompt that is left has ",
        "reward_math.final_reward pays: reference 20, empty 0, truncated 1.5, wrong but containing"
        " 10, another row's 10",
        "192,320 parameters in the base model, 47,104 in the adapter",
        "at worst 1.",
        "3 checkpoints of ",
    ):
        assert expected in text, expected
    assert not (here / "runs").exists() and "\x1b" not in text


def test_all_failures_are_reported_and_checks_that_need_a_failed_one_are_not_run(here, capsys):
    (here / "runs").write_text("")
    (here / "checked_code.py").write_text(
        "print('noise')\nimport trl\nclass NoTrainer: pass\ndef pay(completions, **kwargs): raise"
        " KeyError('judge is away')\n"
    )
    results = findings(
        capsys,
        "--trainer.class_path=checked_code.NoTrainer",
        "--trainer.reward_funcs",
        "checked_code.pay",
        "reward_math.released_reward",
        "--output_root=runs/a",
        "--training.max_prompt_length=31",
        "--model.load_in_4bit=true",
        "--training.optimizer=adamw_8bit",
        "--model.target_modules=nothing",
        "--evaluation.split=nothing",
        code=2,
    )
    assert verdicts(results) == {
        "recipe": "ok",
        "run directory": "fail",
        "trackers": "ok",
        "model files": "ok",
        "data files": "fail",
        "hub token": "ok",
        "backend": "ok",
        "trainer": "fail",
        "tokenizer": "ok",
        "chat template": "ok",
        "dataset": "ok",
        "held-out": "fail",
        "prompt": "ok",
        "options": "warn",
        "reward": "fail warn",
        "model": "fail",
        "memory": "warn",
        "disk": "warn",
    }
    assert (
        "'checked_code.NoTrainer' is no subclass of trl.GRPOTrainer"
        in results["trainer"][0]["sentence"]
    )
    assert "KeyError: 'judge is away', checked_code.py line 4" in results["reward"][0]["sentence"]
    assert results["reward"][1]["details"]["paid"]["wrong but containing"] == [20] * 8
    assert "this model has no layer named nothing" in results["model"][0]["sentence"]
    assert results["options"][0]["sentence"] == "not checked, because 'trainer' above did not pass"
    assert results["memory"][0]["sentence"] == "not checked, because 'model' above did not pass"


def test_a_setting_that_this_machine_replaces_is_a_warning(here, capsys):
    results = findings(
        capsys,
        "--model.backend=auto",
        "--training.optimizer=adamw_8bit",
        "--training.per_device_train_batch_size=3",
        "--training.max_prompt_length=28",
        "--training.report_to=wandb",
        code=0,
    )
    assert verdicts(results)["trainer"] == "warn warn ok"
    raised, optimizer, _ = [finding["sentence"] for finding in results["trainer"]]
    assert raised.startswith("training.per_device_train_batch_size raised from 3 to 8 completions")
    assert "adamw_8bit needs an NVIDIA GPU; adamw_torch is used instead" in optimizer
    assert verdicts(results)["dataset"] == "warn ok"
    assert "the length filter drops " in results["dataset"][0]["sentence"]
    assert results["trackers"][-1]["sentence"] == "wandb (offline)"


# flags, the check that fails, and how its sentence begins
LATE_MISTAKES = [
    (
        ["--training.report_to", "mlflow"],
        "trackers",
        "training.report_to: the package mlflow is not installed; run: pip install mlflow, or use"
        " none",
    ),
    (
        ["--training.use_vllm", "true"],
        "trainer",
        "training.use_vllm: the package vllm is not installed",
    ),
    (
        ["--training.save_strategy", "best"],
        "options",
        "training: `args.metric_for_best_model` must be provided",
    ),
    (
        ["--training.fsdp", "full_shard"],
        "options",
        "training: Using fsdp only works in distributed training.",
    ),
    (
        ["--training.seed=-1"],
        "recipe",
        "training.seed: -1 is too small; use 0 or more",
    ),
    (
        ["--training.seed", str(2**32)],
        "recipe",
        "training.seed: 4294967296 is too large; use less than 2**32",
    ),
    (
        ["--dataset.split", "train[5:3]"],
        "dataset",
        "dataset: no row of 'train[5:3]' has a question and an answer; choose another split or"
        " path",
    ),
    (
        ["--evaluation.split", "train[5:3]"],
        "held-out",
        "evaluation: no row of 'train[5:3]' has a question and an answer",
    ),
    (
        ["--evaluation.path", "nowhere"],
        "held-out",
        "evaluation.path: there is no file or folder 'nowhere'",
    ),
]


@pytest.mark.parametrize("flags, name, sentence", LATE_MISTAKES)
def test_a_mistake_that_a_run_would_find_only_with_the_model_in_memory_fails_here(
    here, capsys, flags, name, sentence
):
    if "vllm" in sentence and importlib.util.find_spec("vllm"):
        pytest.skip("vllm is installed")
    results = findings(capsys, *flags, code=2)
    assert results[name][-1]["sentence"].startswith(sentence)
    assert failed(results) <= {name, "data files"}


def test_rewards_that_pay_the_reference_no_more_than_nothing_fail(here, capsys):
    (here / "paying_little.py").write_text(
        "def short(completions, **kwargs):\n"
        "    return [-len(c[0]['content']) / 1000 for c in completions]\n"
        "def wants_a_box(completions, **kwargs):\n"
        "    return [float('boxed' in c[0]['content']) for c in completions]\n"
    )
    results = findings(capsys, "--trainer.reward_funcs", "paying_little.wants_a_box", code=2)
    assert failed(results) == {"reward"}
    sentence = results["reward"][-1]["sentence"]
    assert "pays the reference answers no more than an empty completion" in sentence
    for place in ("dataset.answer_column", "<reasoning>", "trainer.reward_funcs"):
        assert place in sentence
    rewards = ["--trainer.reward_funcs", "reward_math.final_reward", "paying_little.short"]
    results = findings(capsys, *rewards, code=0)
    assert [result["verdict"] for result in results["reward"]] == ["ok", "warn", "ok"]


def test_a_length_filter_that_drops_every_prompt_is_refused_as_a_run_refuses_it(here, capsys):
    results = findings(capsys, "--training.max_prompt_length", "5", code=2)
    sentence = "training.max_prompt_length: 5 drops all 200 prompts; the shortest has "
    assert results["dataset"][-1]["sentence"].startswith(sentence)
    assert failed(results) == {"dataset", "held-out"}


def test_a_bad_recipe_is_one_failure_per_mistake_and_nothing_else(here, capsys):
    results = findings(capsys, "--training.learning_rate", "fast", "--modle", "x", code=2)
    assert verdicts(results) == {"recipe": "fail fail"}
    assert train_model.main(check_demo("--check=1")) == 2
    assert train_model.main([str(ROOT / "recipes/demo.yaml"), "--json"]) == 2
    assert "--json: works only with --check" in capsys.readouterr().err


def test_without_the_model_the_checks_that_do_not_need_it_still_run(here, capsys):
    results = findings(capsys, "--model-name", str(here), code=2)
    assert failed(results) == {"model files"}
    not_checked = [
        name for name, (first, *_) in results.items() if first["sentence"].startswith("not checked")
    ]
    assert ", ".join(not_checked) == (
        "tokenizer, chat template, dataset, held-out, prompt, options, rewards, model, memory, disk"
    )


def test_no_secret_is_in_the_findings(here, capsys):
    (here / "mine.py").write_text(
        "import os\ndef pay(completions, **kwargs): raise KeyError(os.environ['MY_TOKEN'] +"
        " '\\x1b[31m')\n"
    )
    flags = ["--trainer.reward_funcs", "mine.pay", "--env.MY_TOKEN", "the-secret-of-the-recipe"]
    results = findings(capsys, *flags, code=2)
    assert "[secret]" in results["reward"][0]["sentence"]
    assert "the-secret" not in json.dumps(results) and "\\u001b" not in json.dumps(results)


def test_an_unexpected_error_is_a_failure_and_the_other_checks_go_on(monkeypatch):
    def explode(facts):
        raise ZeroDivisionError("of a library")

    def pass_(facts):
        return "fine"

    checks = (
        Check("first", (), pass_),
        Check("second", (), explode),
        Check("third", ("first",), pass_),
        Check("fourth", ("second", "first"), pass_),
        Check("fifth", ("fourth", "second"), pass_),
    )
    monkeypatch.setattr(preflight, "CHECKS", checks)
    results = list(preflight.findings(preflight.Facts(cli.CommandLine(), Request(), 1)))
    assert [f"{finding.check} {finding.verdict}: {finding.sentence}" for finding in results] == [
        "first ok: fine",
        "second fail: ZeroDivisionError: of a library",
        "third ok: fine",
        "fourth warn: not checked, because 'second' above did not pass",
        "fifth warn: not checked, because 'fourth' and 'second' above did not pass",
    ]


def test_a_check_needs_only_checks_that_come_before_it():
    names = [check.name for check in preflight.CHECKS]
    for i, check in enumerate(preflight.CHECKS):
        assert set(check.needs) <= set(names[:i]), check.name


def test_a_line_is_coloured_on_a_terminal_only():
    finding = Finding("warn", "disk", "little\x1b[2J\nroom")
    assert finding_line(finding, colour=False) == "warn  disk           little\\x1b[2J room"
    assert (
        finding_line(finding, colour=True)
        == "\x1b[33mwarn\x1b[0m  disk           little\\x1b[2J room"
    )
    assert (
        conclusion([finding, finding, Finding("fail", "a", "b"), Finding("ok", "a", "b")])
        == "Not ready: 1 ok, 2 warnings, 1 failure."
    )
