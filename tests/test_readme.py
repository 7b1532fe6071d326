"""The README is a promise: its commands parse, its files exist, its names can be found, its YAML is
valid.
"""

import re
import shlex

import pytest
from conftest import ROOT
from test_saved import save_adapter

import evaluate_model
import export_model
import report_run
from gtpo import gtpo_training
from gtpo.recipe import command_line as cli
from gtpo.recipe.dotted_paths import check_dotted_path
from gtpo.recipe.keys import recipe_fields

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)


def blocks(language: str) -> list[str]:
    return [text for kind, text in BLOCKS if kind == language]


def commands(verb: str = "train_model.py") -> list[str]:
    lines = "\n".join(blocks("bash")).splitlines()
    return [line.split(" #")[0].strip() for line in lines if line.startswith(f"python {verb}")]


@pytest.mark.parametrize("command", commands())
def test_every_command_is_a_valid_recipe(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert cli.read_recipe(shlex.split(command)[2:])


@pytest.mark.parametrize("command", commands("report_run.py"))
def test_every_report_command_names_runs(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs, _, _ = report_run._parse(shlex.split(command)[2:])
    assert runs


@pytest.mark.parametrize("command", commands("evaluate_model.py"))
def test_every_evaluation_command_is_understood(command):
    asked = evaluate_model._parse(shlex.split(command)[2:])
    assert asked.target or asked.files


@pytest.mark.parametrize("command", commands("export_model.py"))
def test_every_export_command_is_understood(command):
    assert export_model.parser().parse_args(shlex.split(command)[2:]).out


def test_there_are_at_least_seven_example_commands():
    assert len(set(commands())) >= 7


def test_every_file_it_names_exists():
    tree = re.search(r"```text\n(train_model\.py .*?)```", README, re.DOTALL)[1]
    named = set(re.findall(r"^(\S+)", tree, re.MULTILINE)) | set(
        re.findall(r"gtpo/\w+\.py", README)
    )
    named |= set(
        re.findall(r"`((?:recipes|demo|gtpo|tests)/[\w/]+\.\w+|requirements[\w-]*\.txt)`", README)
    )
    assert len(named) > 20
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", ["README.md", "docs/performance.md", "docs/report.md"])
def test_its_pictures_exist_and_are_small(page):
    pictures = re.findall(r"!\[[^]]+\]\(([^)]+)\)", (ROOT / page).read_text())
    assert pictures
    for picture in pictures:
        assert 5_000 < (ROOT / page).parent.joinpath(picture).stat().st_size < 200_000, picture


def test_every_program_behind_a_figure_exists():
    programs = re.findall(
        r"^python (benchmarks/\w+\.py)", (ROOT / "docs/performance.md").read_text(), re.MULTILINE
    )
    assert len(set(programs)) >= 6
    for program in programs:
        assert (ROOT / program).exists(), program


def test_every_python_file_of_the_product_is_in_its_tree():
    for file in [*ROOT.glob("*.py"), *ROOT.glob("gtpo/*.py")]:
        if file.stem != "__init__":
            assert str(file.relative_to(ROOT)) in README, file


@pytest.mark.parametrize(
    "dotted", sorted(set(re.findall(r"`((?:gtpo|custom_trainer|reward_math)\.[\w.]+\w)`", README)))
)
def test_every_dotted_name_can_be_found(dotted):
    assert check_dotted_path("README", dotted) is None


def test_the_reference_names_every_key_and_no_other():
    reference = README.split("## Recipe reference")[1].split("\n- ")[0]
    named = set(re.findall(r"`(\w+)`", reference))
    keys = {
        path[-1]
        for path, info, section in recipe_fields()
        if section != "training" or info.default is not None or path[-1] == "max_prompt_length"
    }
    sections = {
        "env",
        "model",
        "dataset",
        "training",
        "trainer",
        "rewards",
        "gtpo_runtime",
        "evaluation",
        "watch",
        "alarm",
        "wandb",
    }
    assert keys - named == set()
    assert named - keys - sections == {"HF_TOKEN"}


def test_the_runtime_table_tells_the_constants_values():
    for name, value in re.findall(r"`([A-Z_]+)` = ([\d.e-]+)", README):
        source = (ROOT / "gtpo/gtpo_training.py").read_text()
        assert float(re.search(rf"^{name} = ([\d.e-]+)", source, re.MULTILINE)[1]) == float(
            value
        ), name
        assert hasattr(gtpo_training, name)


@pytest.mark.parametrize("text", blocks("yaml"), ids=range(len(blocks("yaml"))))
def test_every_dataset_recipe_is_valid(text, tmp_path, monkeypatch):
    (tmp_path / "my_module.py").write_text("def load():\n    return []\n")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("model: {model_name: some/model}\n" + text)
    assert cli.read_recipe(["recipe.yaml"]).dataset


def test_every_python_example_runs(monkeypatch, tmp_path, tiny_policy):
    save_adapter(tmp_path / "runs/MY_RUN", tiny_policy)
    monkeypatch.chdir(tmp_path)
    for text in blocks("python"):
        exec(compile(text, "README", "exec"), {"__name__": "example"})


def test_the_flags_and_switches_it_names_exist():
    from gtpo.recipe.keys import ALIASES, SWITCHES, key_path

    # other programs have flags of their own
    ours = re.sub(
        r"^(vllm|git|torchrun|accelerate|python llama.cpp/).*$", "", README, flags=re.MULTILINE
    )
    of_parsers = [
        flag
        for verb in (export_model, evaluate_model)
        for action in verb.parser()._actions
        for flag in action.option_strings
    ]
    for flag in set(re.findall(r"--([A-Za-z_][\w.-]*)", ours)):
        key = flag.replace("-", "_")
        known = (
            key in ALIASES or key in SWITCHES or key_path(key.split(".")) or key == "section.key"
        )
        assert (
            known or f"--{flag} " in report_run.__doc__ or f"--{flag}" in [*of_parsers, "--export"]
        ), flag
