"""Let no one in: hostile recipes, models, adapters and texts; and no secret in anything that a run
leaves behind.
"""

import ast
import importlib.metadata
import json
import logging
import os
import re
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
    """The sentence for a recipe text and flags; fails if it is accepted."""
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
def test_a_recipe_makes_no_objects(tmp_path, monkeypatch, tag):
    monkeypatch.chdir(tmp_path)
    assert "could not determine a constructor for the tag" in refusal(
        tmp_path, f"{MINIMAL}run_name: {tag}\n"
    )
    assert not (tmp_path / "made").exists()


def test_aliases_that_would_fill_the_memory_are_refused(tmp_path):
    bomb = "training:\n  generation_kwargs:\n    a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
        f"    a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)
    )
    assert "more than 20000 values once its aliases are written out" in refusal(
        tmp_path, MINIMAL + bomb
    )
    assert "more than 20000 values" in refusal(
        tmp_path, MINIMAL, "--training.generation_kwargs", bomb.partition("kwargs:")[2]
    )


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
    said = refusal(tmp_path, f"{MINIMAL}training: {{generation_kwargs: {{a: {value}}}}}\n")
    assert said.startswith("bad.yaml") and sentence in said


def test_a_recipe_file_that_never_ends_is_not_read_to_its_end():
    with pytest.raises(RecipeError, match="it has more than 128 KiB; a recipe is a short text"):
        cli.read_recipe(["/dev/zero"])


def test_a_flag_that_is_no_text_is_refused():
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
def test_what_cannot_be_an_environment_variable_is_refused_without_showing_its_value(
    tmp_path, env, sentence
):
    said = refusal(tmp_path, f"{MINIMAL}env: {json.dumps(env)}\n")
    assert said.startswith(sentence) and "top-secret" not in said


def test_a_repeated_key_is_refused_without_showing_its_value(tmp_path):
    said = refusal(tmp_path, f"{MINIMAL}env:\n  MY_TOKEN: top-secret\n  MY_TOKEN: top-secret\n")
    assert 'found duplicate key "MY_TOKEN"' in said and "top-secret" not in said


def test_a_huge_value_is_shown_shortened(tmp_path):
    said = refusal(tmp_path, f"{MINIMAL}training: {{learning_rate: [{'a,' * 9000}]}}\n")
    assert said.startswith("training.learning_rate: ['a', 'a'") and len(said) < 400


def test_what_is_read_is_what_was_written(tmp_path):
    values = {
        "a": ["1e-6", 1e-6, None, True, "no", "2024-01-01", "\x85 é 𝄞"],
        "b": {"c": {"d": []}},
    }
    with (tmp_path / "values.yaml").open("w", encoding="utf-8") as file:
        yaml_text.write_yaml(values, file)
    assert yaml_text.parse_yaml(yaml_text.read_yaml_file(tmp_path / "values.yaml")) == values


# ---- dotted paths


def test_a_module_beside_the_recipe_stands_in_for_no_installed_one(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "colorsys.py").write_text("raise SystemExit('the wrong module')\n")
    (tmp_path / "reward_math.py").write_text("raise SystemExit('the wrong module')\n")
    (tmp_path / "r.yaml").write_text(
        f"{MINIMAL}trainer: {{reward_funcs: [reward_math.final_reward, colorsys.rgb_to_hls]}}\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = cli.read_recipe(["r.yaml"])
    assert [
        trainers.load_callable("x", path).__module__ for path in recipe.trainer.reward_funcs
    ] == [
        "reward_math",
        "colorsys",
    ]


def test_a_text_by_dotted_path_never_becomes_the_name_of_a_model_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "texts.py").write_text(
        "name = 'owner/reward-model'\nlater = str('owner/reward-model')\n"
    )
    monkeypatch.chdir(tmp_path)
    assert "'texts.name' is a str, which cannot be called" in refusal(
        tmp_path, MINIMAL, "--trainer.reward_funcs", "texts.name"
    )
    with pytest.raises(RecipeError, match="'texts.later' is str, which cannot be called"):
        trainers.load_callable("trainer.reward_funcs", "texts.later")


@pytest.mark.parametrize(
    "path",
    ["owner/model", "https://hub/x.y", "../../etc.passwd", "a..b", "os.system('x')", "é.x", ".x"],
)
def test_a_dotted_path_is_made_of_names_and_dots(tmp_path, path):
    assert "is not a dotted path" in refusal(tmp_path, MINIMAL, "--trainer.reward_funcs", path)


# ---- models and adapters


@pytest.fixture
def remote_code(tmp_path, tiny_policy):
    """A model whose own Python code leaves a file behind when it runs."""
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


def test_code_that_comes_with_a_model_runs_only_if_the_recipe_says_so_and_then_it_is_said(
    remote_code, tmp_path, monkeypatch, caplog, capsys
):
    from gtpo.models.backends import load_policy
    from gtpo.models.tokenizer import load_tokenizer
    from gtpo.recipe.sections import ModelSection

    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules")
    )
    monkeypatch.setattr(sys, "path", list(sys.path))
    for trust in (False, True):
        section = ModelSection(
            model_name=str(remote_code),
            load_in_4bit=False,
            max_seq_length=64,
            lora_rank=2,
            trust_remote_code=trust,
        )
        said = (
            f"[GTPO] model.trust_remote_code: Python code that comes with '{remote_code}' will"
            " be run"
        )
        keys = {"seed": 0, "precision": "float32", "gradient_checkpointing": False}
        if trust:
            load_policy(section, load_tokenizer(section, "transformers"), "transformers", **keys)
        else:
            with pytest.raises(
                RecipeError,
                match=(
                    "model.trust_remote_code: .*/remote' comes with Python code of its own, which"
                    " runs only if"
                ),
            ):
                load_policy(
                    section, load_tokenizer(section, "transformers"), "transformers", **keys
                )
        assert (tmp_path / "ran").exists() == trust and (said in caplog.text) == trust
    # transformers asks where nobody said yes or no
    assert "Do you wish to run" not in capsys.readouterr().out
    assert Recipe.model_validate(yaml_text.parse_yaml(MINIMAL)).model.trust_remote_code is False


def test_weights_that_could_run_code_are_refused(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        RecipeError,
        match=(
            "has its weights in pytorch_model.bin, which could run code when it is loaded; use a"
            " model in safetensors"
        ),
    ):
        check_model(str(tmp_path))
    (tmp_path / adapters.CONFIG).write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.bin").touch()
    with pytest.raises(
        RecipeError,
        match=(
            "there is no adapter_model.safetensors; adapter_model.bin is not read, because it"
            " could run code"
        ),
    ):
        adapters.read_config(tmp_path)


def test_what_a_checkpoint_holds_beside_safetensors_is_loaded_as_weights_only():
    """transformers 5.17.0, to which optimizer.pt, scheduler.pt and rng_state.pth are left."""
    package = Path(importlib.metadata.distribution("transformers").locate_file("transformers"))
    calls = [
        node
        for node in ast.walk(ast.parse((package / "trainer.py").read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "pickle.load")
    ]
    assert len(calls) > 5
    for call in calls:
        assert {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}.get(
            "weights_only"
        ) == "True", ast.unparse(call)


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
def test_control_characters_are_shown_and_not_sent(text, shown):
    assert safe_text.printable(text) == shown


def test_secrets_are_replaced_by_their_look_and_by_the_environment():
    environment = {
        "MY_API_KEY": "plain-words-only",
        "SHORT_KEY": "abc",
        "OMP_KEY": "12345678",
        "PATH": "/usr/local/bin",
    }
    said = (
        "plain-words-only abc 12345678 /usr/local/bin hf_abcdefghijklmnopqrst"
        " sk-proj-abcdefghij0123456789 hf_internal_testing/tiny-model"
    )
    assert (
        safe_text.without_secrets(said, environment)
        == "[secret] abc 12345678 /usr/local/bin [secret] [secret] hf_internal_testing/tiny-model"
    )


def test_an_error_on_the_console_shows_neither_control_characters_nor_tokens(tmp_path, capsys):
    (tmp_path / "r.yaml").write_text(
        MINIMAL + r'"a\e[31m": hf_abcdefghijklmnopqrst' + "\nrun_name: [hf_abcdefghijklmnopqrst]\n"
    )
    assert train_model.main([str(tmp_path / "r.yaml")]) == 2
    said = capsys.readouterr().err
    assert (
        r"a\x1b[31m: unknown key" in said
        and "run_name: ['[secret]']" in said
        and "hf_abc" not in said
        and "\x1b" not in said
    )


def test_the_table_of_completions_shows_control_characters_and_does_not_send_them(capsys):
    from gtpo.runs.progress import escape_completions_table

    class Trainer:
        _logs = {
            "prompt": deque(["p\x1b[1m"], 4),
            "completion": deque(["c\x1b[2J"], 4),
            "extra": defaultdict(deque, found=deque(["\x07", 5])),
        }

        def log(self, logs):
            print(
                logs,
                [*self._logs["prompt"], *self._logs["completion"], *self._logs["extra"]["found"]],
            )

    trainer = Trainer()
    escape_completions_table(trainer)
    trainer.log({"a": 1})
    assert (
        capsys.readouterr().out.splitlines(keepends=True)[-1]
        == r"{'a': 1} ['p\\x1b[1m', 'c\\x1b[2J', '\\x07', 5]" + "\n"
    )
    assert trainer._logs["prompt"].maxlen == 4


# ---- secrets


def test_what_looks_like_a_token_is_saved_nowhere_in_a_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text(
        MINIMAL
        + "training: {generation_kwargs: {a: [{b: 'x hf_abcdefghijklmnopqrst'}]}}\nwandb: {entity:"
        " us}\n"
    )
    values, left_out = cli.read_recipe([str(tmp_path / "r.yaml")]).saved()
    assert (
        values["training"]["generation_kwargs"] == {"a": [{"b": "x [secret]"}]}
        and values["wandb"]["entity"] == "us"
    )
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
    logging.getLogger("gtpo.mine").warning("asking with %s\\x1b[31m", os.environ)
    logging.getLogger("gtpo.mine").warning("telemetry off: %s", constants.HF_HUB_DISABLE_TELEMETRY)
    return [0.0] * len(completions)
"""


def test_no_secret_is_in_anything_that_a_run_and_its_report_leave_behind(tmp_path, monkeypatch):
    """A real run with wandb, offline, whose recipe with tokens is an uncommitted change, and whose
    reward logs them.
    """

    def git(*words):
        subprocess.run(
            ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
            cwd=tmp_path,
            check=True,
            capture_output=True,
        )

    git("init")
    text = (ROOT / "recipes/demo.yaml").read_text()
    (tmp_path / "r.yaml").write_text(text)
    git("add", "."), git("commit", "-m", "recipe")
    (tmp_path / "r.yaml").write_text(
        text.replace(
            "env:\n",
            "env:\n"
            + "".join(f"  {name}: {TOKENS[name]}\n" for name in ("HF_TOKEN", "MY_PASSWORD")),
        )
    )
    (tmp_path / "my_reward.py").write_text(REWARD)
    variables = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "offline",
        "WANDB_SAVE_CODE": "true",
        **{n: TOKENS[n] for n in ("OPENAI_API_KEY", "WANDB_API_KEY")},
    }
    for name in environment.NO_TELEMETRY:
        variables.pop(name, None)
    run = subprocess.run(
        [
            sys.executable,
            str(ROOT / "train_model.py"),
            "r.yaml",
            "--model-name",
            str(ROOT / "demo/model"),
            "--dataset.path",
            str(ROOT / "demo/data/train.jsonl"),
            "--evaluation.path",
            str(ROOT / "demo/data/test.jsonl"),
            "--evaluation.limit",
            "2",
            "--training.max_steps",
            "1",
            "--training.per_device_train_batch_size",
            "8",
            "--training.save_steps",
            "1",
            "--training.report_to",
            "wandb",
            "--trainer.reward_funcs",
            "my_reward.pay",
            "reward_math.final_reward",
            f"--env.CLI_TOKEN={TOKENS['CLI_TOKEN']}",
            "--env.GH_TOKEN",
            TOKENS["GH_TOKEN"],
        ],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (folder,) = (tmp_path / "runs").iterdir()
    assert report_run.main([str(folder)]) == 0
    log = (folder / "train.log").read_text()
    assert (
        "asking with environ(" in log
        and "[secret]" in log
        and r"\\x1b" not in log
        and r"\x1b[31m" in log
        and "telemetry off: True" in log
    )
    assert "Not saved with the recipe: HF_TOKEN, MY_PASSWORD, CLI_TOKEN, GH_TOKEN" in log
    files = [
        file
        for file in tmp_path.rglob("*")
        if file.is_file() and file.name != "r.yaml" and ".git" not in file.parts
    ]
    assert {
        "recipe.yaml",
        "train.log",
        "README.md",
        "versions.json",
        "completions.jsonl",
        "report.html",
        "before.jsonl",
    } <= {f.name for f in files}
    assert [f for f in files if f.suffix == ".wandb"]
    found = {
        (file.name, name)
        for file in files
        for name, token in TOKENS.items()
        if token.encode() in file.read_bytes()
    }
    assert found == set()
    assert not [name for name, token in TOKENS.items() if token in run.stderr + run.stdout]


def test_telemetry_is_off_unless_somebody_says_otherwise():
    variables = {"DO_NOT_TRACK": "0"}
    environment.set_environment({"HF_HUB_DISABLE_TELEMETRY": "0", "A": "b"}, variables)
    assert (
        variables["DO_NOT_TRACK"] == "0"
        and variables["HF_HUB_DISABLE_TELEMETRY"] == "0"
        and variables["A"] == "b"
    )
    assert (
        variables["UNSLOTH_DISABLE_STATISTICS"] == "1" and variables["VLLM_NO_USAGE_STATS"] == "1"
    )
    assert not re.search(
        r"requests|httpx|urllib\.request|socket",
        "".join(p.read_text() for p in ROOT.glob("gtpo/*.py") if p.stem != "hub"),
    )


def test_a_log_line_and_its_traceback_are_safe():
    try:
        raise ValueError("\x1b[31m hf_abcdefghijklmnopqrst")
    except ValueError:
        record = logging.LogRecord("a", logging.ERROR, "f", 1, "%s", ("\x07",), sys.exc_info())
    said = safe_text.SafeFormatter("%(message)s").format(record)
    assert said.startswith("\\x07\nTraceback") and said.endswith("ValueError: \\x1b[31m [secret]")
