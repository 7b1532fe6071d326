"""Hostile recipes, models, adapters and texts do no harm, and a run leaves no secret behind."""

import ast
import importlib.metadata
import json
import logging
import os
import shutil
import subprocess
import sys
from collections import defaultdict, deque
from pathlib import Path

import pytest
from conftest import ROOT

import report_run
import train_model
from gtpo.errors import RecipeError
from gtpo.models import adapters
from gtpo.models.base_model import check_model
from gtpo.recipe import Recipe, yaml_text
from gtpo.recipe import command_line as cli
from gtpo.runs import trainers
from gtpo.system import environment, safe_text

MINIMAL = "model: {model_name: some/model}\ndataset: {name: gsm8k}\n"


def refusal(folder: Path, text: str, *flags: str) -> str:
    """The sentences for a recipe text and flags; fails if the recipe is accepted."""
    (folder / "bad.yaml").write_text(text, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(RecipeError) as caught:
        cli.read_recipe([str(folder / "bad.yaml"), *flags])
    return str(caught.value).replace(f"{folder}/", "")


# ---- recipes


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.system ['touch made']",
        "!!python/name:os.system x",
        "!!python/module:os x",
        "!!python/object/new:subprocess.Popen [['touch', 'made']]",
        "!custom x",
    ],
)
def test_a_recipe_creates_no_python_objects(tmp_path, monkeypatch, tag):
    monkeypatch.chdir(tmp_path)
    assert "could not determine a constructor for the tag" in refusal(
        tmp_path, f"{MINIMAL}run_name: {tag}\n"
    )
    assert not (tmp_path / "made").exists()


def test_aliases_that_would_fill_the_memory_are_refused(tmp_path):
    bomb = "    a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"    a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    in_recipe = refusal(tmp_path, f"{MINIMAL}training:\n  generation_kwargs:\n{bomb}")
    assert "more than 20000 values once its aliases are written out" in in_recipe
    in_flag = refusal(tmp_path, MINIMAL, "--training.generation_kwargs", f"\n{bomb}")
    assert "more than 20000 values" in in_flag


def test_an_alias_of_itself_is_refused(tmp_path):
    assert "it is nested too deeply" in refusal(
        tmp_path, f"{MINIMAL}training: {{generation_kwargs: {{a: &a [*a]}}}}\n"
    )


@pytest.mark.parametrize(
    "value, sentence",
    [
        ("2024-02-30", "day"),
        ("2024-02-03", "2024-02-03 is read as a date, which no key takes; put it in quotes"),
        ("!!set {a}", "it contains a set; use texts, numbers, lists and mappings"),
        ("!!binary aGk=", "it contains a bytes"),
        ("!!int abc", "invalid literal"),
        ("9" * 5000, "4300 digits"),
        ("!!bool maybe", "maybe"),
        (r'"\ud800"', r"'\ud800' is not text that UTF-8 can hold"),
        ("{[a]: b}", "it contains a tuple"),
    ],
)
def test_values_that_are_not_plain_are_refused_with_a_sentence(tmp_path, value, sentence):
    refused = refusal(tmp_path, f"{MINIMAL}training: {{generation_kwargs: {{a: {value}}}}}\n")
    assert refused.startswith("bad.yaml") and sentence in refused


def test_a_recipe_file_that_never_ends_is_not_read_to_its_end():
    with pytest.raises(RecipeError, match="it has more than 128 KiB; a recipe is a short text"):
        cli.read_recipe(["/dev/zero"])


def test_a_flag_that_is_not_text_is_refused():
    with pytest.raises(RecipeError, match=r"--run_name: '\\udcff' is not text that UTF-8 can hold"):
        cli.read_recipe([str(ROOT / "config.yaml"), "--run-name", os.fsdecode(b"\xff")])


@pytest.mark.parametrize(
    "env, sentence",
    [
        ({"A=B": "c"}, "env: 'A=B' cannot be the name of an environment variable"),
        ({"": "c"}, "env: '' cannot be the name"),
        ({"A": "b\0"}, "env: the value of an environment variable cannot contain a NUL"),
        (
            {"MY_TOKEN": ["top-secret"]},
            "env: the value of MY_TOKEN in bad.yaml is not valid; it should be text",
        ),
    ],
)
def test_an_invalid_environment_variable_is_refused_without_showing_its_value(
    tmp_path, env, sentence
):
    refused = refusal(tmp_path, f"{MINIMAL}env: {json.dumps(env)}\n")
    assert refused.startswith(sentence) and "top-secret" not in refused


def test_a_repeated_key_is_refused_without_showing_its_value(tmp_path):
    line = "  MY_TOKEN: top-secret\n"
    refused = refusal(tmp_path, f"{MINIMAL}env:\n{line}{line}")
    assert 'found duplicate key "MY_TOKEN"' in refused and "top-secret" not in refused


@pytest.mark.slow  # thousands of pairs, or seconds of work
def test_a_huge_value_is_shortened_in_the_sentence(tmp_path):
    refused = refusal(tmp_path, f"{MINIMAL}training: {{learning_rate: [{'a,' * 9000}]}}\n")
    assert refused.startswith("training.learning_rate: ['a', 'a'") and len(refused) < 400


def test_written_values_are_read_back_unchanged(tmp_path):
    values = {
        "a": ["1e-6", 1e-6, None, True, "no", "2024-01-01", "\x85 é 𝄞"],
        "b": {"c": {"d": []}},
    }
    with (tmp_path / "values.yaml").open("w", encoding="utf-8") as file:
        yaml_text.write_yaml(values, file)
    assert yaml_text.parse_yaml(yaml_text.read_yaml_file(tmp_path / "values.yaml")) == values


# ---- dotted paths


def test_a_module_beside_the_recipe_does_not_replace_an_installed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "colorsys.py").write_text("raise SystemExit('the wrong module')\n")
    (tmp_path / "reward_math.py").write_text("raise SystemExit('the wrong module')\n")
    (tmp_path / "r.yaml").write_text(
        f"{MINIMAL}trainer: {{reward_funcs: [reward_math.final_reward, colorsys.rgb_to_hls]}}\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = cli.read_recipe(["r.yaml"])
    functions = [trainers.load_callable("x", path) for path in recipe.trainer.reward_funcs]
    assert [function.__module__ for function in functions] == ["reward_math", "colorsys"]


def test_a_dotted_path_to_a_text_is_not_used_as_the_name_of_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "texts.py").write_text(
        "name = 'owner/reward-model'\nlater = str('owner/reward-model')\n"
    )
    monkeypatch.chdir(tmp_path)
    refused = refusal(tmp_path, MINIMAL, "--trainer.reward_funcs", "texts.name")
    assert "'texts.name' is a str, which cannot be called" in refused
    with pytest.raises(RecipeError, match="'texts.later' is str, which cannot be called"):
        trainers.load_callable("trainer.reward_funcs", "texts.later")


@pytest.mark.parametrize(
    "path",
    ["owner/model", "https://hub/x.y", "../../etc.passwd", "a..b", "os.system('x')", "é.x", ".x"],
)
def test_a_dotted_path_consists_of_names_and_dots(tmp_path, path):
    assert "is not a dotted path" in refusal(tmp_path, MINIMAL, "--trainer.reward_funcs", path)


# ---- models and adapters


@pytest.fixture
def remote_code(tmp_path, tiny_policy):
    """A model with Python code of its own, which creates the file `ran` when it runs."""
    folder = tmp_path / "remote"
    shutil.copytree(tiny_policy, folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "own",
        "architectures": ["Own"],
        "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import LlamaConfig,"
        " LlamaForCausalLM\nclass OwnConfig(LlamaConfig):\n    model_type = 'own'\nclass"
        " Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    return folder


def test_code_that_comes_with_a_model_runs_only_if_the_recipe_permits_it_and_with_a_warning(
    remote_code, tmp_path, monkeypatch, caplog, capsys
):
    from gtpo.models.backends import load_policy
    from gtpo.models.tokenizer import load_tokenizer
    from gtpo.recipe.sections import ModelSection

    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.setattr(sys, "path", list(sys.path))

    def load(trust: bool):
        section = ModelSection(
            model_name=str(remote_code),
            load_in_4bit=False,
            max_seq_length=64,
            lora_rank=2,
            trust_remote_code=trust,
        )
        tokenizer = load_tokenizer(section, "transformers")
        options = {"seed": 0, "precision": "float32", "gradient_checkpointing": False}
        load_policy(section, tokenizer, "transformers", **options)

    warning = f"Python code that comes with '{remote_code}' will be run"
    refused = "model.trust_remote_code: .*/remote' comes with Python code of its own, which runs"
    with pytest.raises(RecipeError, match=f"{refused} only if"):
        load(trust=False)
    assert not (tmp_path / "ran").exists() and warning not in caplog.text
    load(trust=True)
    assert (tmp_path / "ran").exists()
    assert f"[GTPO] model.trust_remote_code: {warning}" in caplog.text
    # transformers asks the user if neither true nor false is passed to it.
    assert "Do you wish to run" not in capsys.readouterr().out
    assert Recipe.model_validate(yaml_text.parse_yaml(MINIMAL)).model.trust_remote_code is False


def test_weights_that_could_run_code_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    base = "has its weights in pytorch_model.bin, which could run code when it is loaded; use a"
    with pytest.raises(RecipeError, match=f"{base} model in safetensors"):
        check_model(str(tmp_path))
    (tmp_path / adapters.CONFIG).write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").touch()
    adapter = "adapter_model.bin is not read, because it could run code; give an adapter in"
    with pytest.raises(RecipeError, match=f"{adapter} safetensors"):
        adapters.read_config(tmp_path)


def test_transformers_loads_the_other_files_of_a_checkpoint_as_weights_only():
    """transformers 5.17.0 loads optimizer.pt, scheduler.pt and rng_state.pth."""
    package = Path(importlib.metadata.distribution("transformers").locate_file("transformers"))
    calls = [
        node
        for node in ast.walk(ast.parse((package / "trainer.py").read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load")
    ]
    assert len(calls) > 5
    for call in calls:
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("weights_only") == "True", ast.unparse(call)


# ---- texts


@pytest.mark.parametrize(
    "text, shown",
    [
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("a\rb\x08c", r"a\rb\x08c"),
        ("\x9b31m\x7f", r"\x9b31m\x7f"),
        ("abc\u202edef\u2066", r"abc\u202edef\u2066"),
        ("\ud800", r"\ud800"),
        ("a\n\tb é 𝄞 中", "a\n\tb é 𝄞 中"),
        ("", ""),
    ],
)
def test_control_characters_are_shown_as_escapes(text, shown):
    assert safe_text.printable(text) == shown


def test_tokens_and_the_secrets_of_the_environment_are_replaced():
    environment = {
        "MY_API_KEY": "plain-words-only",
        "SHORT_KEY": "abc",
        "OMP_KEY": "12345678",
        "PATH": "/usr/local/bin",
    }
    text = (
        "plain-words-only abc 12345678 /usr/local/bin hf_abcdefghijklmnopqrst"
        " sk-proj-abcdefghij0123456789 hf_internal_testing/tiny-model"
    )
    assert (
        safe_text.without_secrets(text, environment)
        == "[secret] abc 12345678 /usr/local/bin [secret] [secret] hf_internal_testing/tiny-model"
    )


def test_an_error_on_the_console_shows_neither_control_characters_nor_tokens(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(
        MINIMAL + r'"a\e[31m": hf_abcdefghijklmnopqrst' + "\nrun_name: [hf_abcdefghijklmnopqrst]\n"
    )
    assert train_model.main([str(tmp_path / "r.yaml")]) == 2
    error = capsys.readouterr().err
    assert r"a\x1b[31m: unknown key" in error and "run_name: ['[secret]']" in error
    assert "hf_abc" not in error and "\x1b" not in error


def test_the_table_of_completions_shows_control_characters_as_escapes(capsys):
    from gtpo.runs.progress import escape_completions_table

    class Trainer:
        _logs = {
            "prompt": deque(["p\x1b[1m"], 4),
            "completion": deque(["c\x1b[2J"], 4),
            "extra": defaultdict(deque, column=deque(["\x07", 5])),
        }

        def log(self, logs):
            extra = self._logs["extra"]["column"]
            print(logs, [*self._logs["prompt"], *self._logs["completion"], *extra])

    trainer = Trainer()
    escape_completions_table(trainer)
    trainer.log({"a": 1})
    last_line = capsys.readouterr().out.splitlines(keepends=True)[-1]
    assert last_line == r"{'a': 1} ['p\\x1b[1m', 'c\\x1b[2J', '\\x07', 5]" + "\n"
    assert trainer._logs["prompt"].maxlen == 4


# ---- secrets


def test_no_token_is_saved_in_any_key_of_a_recipe(tmp_path):
    training = "training: {generation_kwargs: {a: [{b: 'x hf_abcdefghijklmnopqrst'}]}}\n"
    (tmp_path / "r.yaml").write_text(f"{MINIMAL}{training}wandb: {{entity: us}}\n")
    values, left_out = cli.read_recipe([str(tmp_path / "r.yaml")]).saved()
    assert values["training"]["generation_kwargs"] == {"a": [{"b": "x [secret]"}]}
    assert values["wandb"]["entity"] == "us"
    assert left_out == ["training.generation_kwargs.a.b"]


TOKENS = {
    "HF_TOKEN": "hf_OfTheRecipeOfTheRecipeOfTheRec",
    "MY_PASSWORD": "password-of-the-recipe",
    "OPENAI_API_KEY": "sk-of-the-environment-123",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
    "CLI_TOKEN": "token-of-the-command-line",
    "GH_TOKEN": "ghp_OfTheCommandLine123456",
}
REWARD = """
import logging, os
from huggingface_hub import constants

def pay(completions, **kwargs):
    logging.getLogger("gtpo.mine").warning("environment: %s\\x1b[31m", os.environ)
    logging.getLogger("gtpo.mine").warning("telemetry off: %s", constants.HF_HUB_DISABLE_TELEMETRY)
    return [0.0] * len(completions)
"""
LEFT_BEHIND = {
    *("recipe.yaml", "train.log", "README.md", "versions.json"),
    *("completions.jsonl", "report.html", "before.jsonl"),
}


@pytest.mark.slow
def test_a_run_and_its_report_leave_no_secret_behind(tmp_path, monkeypatch):
    """A real run with wandb, offline.

    The recipe with tokens is an uncommitted change, and the reward function logs all tokens.
    """

    def git(*words):
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    text = (ROOT / "recipes/demo.yaml").read_text()
    (tmp_path / "r.yaml").write_text(text)
    git("init")
    git("add", ".")
    git("commit", "-m", "recipe")
    env = "".join(f"  {name}: {TOKENS[name]}\n" for name in ("HF_TOKEN", "MY_PASSWORD"))
    (tmp_path / "r.yaml").write_text(text.replace("env:\n", f"env:\n{env}"))
    (tmp_path / "my_reward.py").write_text(REWARD)
    variables = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "WANDB_SAVE_CODE": "true",
        **{name: TOKENS[name] for name in ("OPENAI_API_KEY", "WANDB_API_KEY")},
    }
    for name in environment.NO_TELEMETRY:
        variables.pop(name, None)
    flags = [
        *("--model-name", str(ROOT / "demo/model")),
        *("--dataset.path", str(ROOT / "demo/data/train.jsonl")),
        *("--evaluation.path", str(ROOT / "demo/data/test.jsonl")),
        *("--evaluation.limit", "2"),
        *("--training.max_steps", "1"),
        *("--training.per_device_train_batch_size", "8"),
        *("--training.save_steps", "1"),
        *("--training.report_to", "wandb"),
        *("--trainer.reward_funcs", "my_reward.pay", "reward_math.final_reward"),
        f"--env.CLI_TOKEN={TOKENS['CLI_TOKEN']}",
        *("--env.GH_TOKEN", TOKENS["GH_TOKEN"]),
    ]
    run = subprocess.run(
        [sys.executable, str(ROOT / "train_model.py"), "r.yaml", *flags],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert report_run.main([str(run_dir)]) == 0
    log = (run_dir / "train.log").read_text()
    assert "environment: environ(" in log and "[secret]" in log
    assert r"\\x1b" not in log and r"\x1b[31m" in log
    assert "telemetry off: True" in log
    assert "Not saved with the recipe: HF_TOKEN, MY_PASSWORD, CLI_TOKEN, GH_TOKEN" in log
    files = [
        file
        for file in tmp_path.rglob("*")
        if file.is_file() and file.name != "r.yaml" and ".git" not in file.parts
    ]
    assert LEFT_BEHIND <= {file.name for file in files}
    assert [file for file in files if file.suffix == ".wandb"]
    tokens_in_files = {
        (file.name, name)
        for file in files
        for name, token in TOKENS.items()
        if token.encode() in file.read_bytes()
    }
    assert tokens_in_files == set()
    assert not [name for name, token in TOKENS.items() if token in run.stderr + run.stdout]


def test_a_log_line_and_its_traceback_are_safe():
    try:
        raise ValueError("\x1b[31m hf_abcdefghijklmnopqrst")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "f", 1, "%s", ("\x07",), sys.exc_info())
    text = safe_text.SafeFormatter("%(message)s").format(record)
    assert text.startswith("\\x07\nTraceback") and text.endswith("ValueError: \\x1b[31m [secret]")
