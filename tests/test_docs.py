"""README and docs are a promise: commands parse, examples run, and every name exists."""

import importlib.util
import json
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from conftest import ROOT, load_script
from prose import sentences, words
from ruamel.yaml import YAML

import evaluate_model
import export_model
import report_run
from gtpo.recipe import command_line as cli
from gtpo.recipe.dotted_paths import check_dotted_path
from gtpo.recipe.keys import ALIASES, SWITCHES, key_path, recipe_fields

PAGES = ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"] + sorted(
    str(page.relative_to(ROOT)) for page in [*ROOT.glob("docs/*.md"), ROOT / "docs/gpu/README.md"]
)
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in PAGES}
# The names of old modules in the changelog exist no more.
ALL = "\n".join(text for page, text in TEXTS.items() if page != "CHANGELOG.md")
WRITTEN = re.sub(r"<!-- (\w+) -->.*?<!-- /\1 -->", "", ALL, flags=re.DOTALL)  # by hand
# Sections that the first documentation of GTPO had: people look for them by these names.
SECTIONS = [
    "Quick start", "Files and flow", "Recipe reference", "Training and the command line",
    "Dataset recipes", "Trainers and rewards", "Runtime knobs", "More example commands",
    "Outputs and logging", "Reproducibility", "TL;DR", "Citation",
]  # fmt: skip
RECIPE_SECTIONS = {path[0] for path, _, _ in recipe_fields() if len(path) > 1}
# Flags of launchers, servers and of programs that no test parses.
FLAGS_OF_OTHERS = {
    "shutdown-timeout", "max-restarts", "max-lora-rank", "no-deps", "chat-template",
    "nnodes", "nproc_per_node", "rdzv_backend", "rdzv_endpoint",
}  # fmt: skip


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXTS[page], re.MULTILINE | re.DOTALL)


def commands(verb: str) -> list:
    """(page, arguments) of each command of a page that runs `verb`, also under a launcher."""
    params = []
    for page in PAGES:
        lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
        for line in lines:
            if verb in (words := shlex.split(line, comments=True)):
                arguments = words[words.index(verb) + 1 :]
                params.append(pytest.param(page, arguments, id=f"{page}: {' '.join(arguments)}"))
    return params


def lay_out(page: str, folder: Path, monkeypatch) -> None:
    """Makes `folder` the current directory, with our files and the page's own.

    A block of a page that begins with `# NAME` is the file NAME.
    """
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", sys.path[:])  # the command line adds folders to it
    for name in ("config.yaml", "recipes", "demo"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "my_module.py").write_text("def load():\n    return []\n")
    for text in blocks(page, "yaml") + blocks(page, "python"):
        if name := re.match(r"# (\w+\.\w+)\n", text):
            (folder / name[1]).write_text(text)
    (folder / "runs/MY_RUN").mkdir(parents=True)
    shutil.copy(ROOT / "recipes/gsm8k_qwen3b.yaml", folder / "runs/MY_RUN/recipe.yaml")


# ---- commands


@pytest.mark.parametrize("page, arguments", commands("train_model.py"))
def test_every_training_command_is_a_valid_recipe(page, arguments, tmp_path, monkeypatch):
    lay_out(page, tmp_path, monkeypatch)
    if "--export" in arguments:
        assert export_model.parser().parse_args([a for a in arguments if a != "--export"]).out
    else:
        assert cli.read_recipe(arguments)


@pytest.mark.parametrize("page, arguments", commands("report_run.py"))
def test_every_report_command_names_runs(page, arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    runs, _, _ = report_run.parse_arguments(arguments)
    assert runs


@pytest.mark.parametrize("page, arguments", commands("evaluate_model.py"))
def test_every_evaluation_command_is_understood(page, arguments):
    parsed = evaluate_model.parse_flags(arguments)
    assert parsed.target or parsed.files


@pytest.mark.parametrize("page, arguments", commands("export_model.py"))
def test_every_export_command_is_understood(page, arguments):
    assert export_model.parser().parse_args(arguments).out


def test_there_are_at_least_seven_different_training_commands():
    assert len({tuple(command.values[1]) for command in commands("train_model.py")}) >= 7


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text()
    workflow = (ROOT / ".github/workflows/checks.yml").read_text()
    for target in re.findall(r"(?:^|`|run: )make ([\w-]+)", ALL + workflow, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


# ---- examples


@pytest.mark.parametrize(
    "page, text", [(page, text) for page in PAGES for text in blocks(page, "yaml")]
)
def test_every_recipe_is_valid(page, text, tmp_path, monkeypatch):
    lay_out(page, tmp_path, monkeypatch)
    values = YAML(typ="safe").load(text)
    values.setdefault("model", {}).setdefault("model_name", "some/model")
    values.setdefault("dataset", {"name": "gsm8k"})
    with (tmp_path / "recipe.yaml").open("w") as file:
        YAML(typ="safe").dump(values, file)
    assert cli.read_recipe(["recipe.yaml"])


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_every_python_example_runs(page, monkeypatch, tmp_path, tiny_policy):
    from tiny import save_adapter

    lay_out(page, tmp_path, monkeypatch)
    save_adapter(tmp_path / "runs/MY_RUN", tiny_policy)
    for text in blocks(page, "python"):
        exec(compile(text, page, "exec"), {"__name__": "example"})


def test_the_readmes_rewards_are_what_they_say():
    own, readme = {}, blocks("README.md", "python")
    exec(compile(readme[1], "README.md", "exec"), own)
    right, wrong = (
        f"<reasoning>\n\n</reasoning>\n<answer>{answer}</answer>" for answer in ("42", "43")
    )
    completions = [[{"role": "assistant", "content": text}] for text in (right, wrong, "42")]
    assert own["correct"](completions, [right] * 3) == [1, 0, 0]


@pytest.mark.slow
def test_the_readmes_recipe_passes_its_check_and_trains(tmp_path, monkeypatch, capsys):
    import train_model

    lay_out("README.md", tmp_path, monkeypatch)
    (tmp_path / "data").mkdir()
    problem = re.search(r"`(\{\"question.*?\})`", TEXTS["README.md"])[1]
    other = problem.replace("30", "31").replace("42", "43")
    for name in ("mine", "held_out"):
        (tmp_path / f"data/{name}.jsonl").write_text(f"{problem}\n{other}\n" * 4)
    flags = "--model.model_name demo/model --model.backend transformers --model.load_in_4bit false "
    flags += "--model.max_seq_length 96 --training.max_prompt_length 60 --training.max_steps 1 "
    flags += "--training.optimizer adamw_torch --output_root out"
    # The tiny model has a short context, and was taught with this sentence.
    system = ["--dataset.system_instruction", "Reason, then answer."]
    arguments = ["mine.yaml", *flags.split(), *system]
    assert train_model.main([*arguments, "--check", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["checks"]
    assert [check["verdict"] for check in checks if check["check"] == "reward"] == ["ok"]
    assert train_model.main(arguments) == 0
    assert list(tmp_path.glob("out/MINE*/adapter_model.safetensors"))


# ---- names


def test_every_file_that_is_named_exists():
    folders = "recipes|demo|gtpo|tests|docs|benchmarks|reliability|custom_trainer|\\.github"
    named = set(re.findall(rf"\b(?:{folders})/[\w/.-]+\.\w+", ALL))
    named |= set(re.findall(r"(?<!/)\b(?:requirements[\w-]*\.txt|[a-z]+_model\.py)", ALL))
    assert len(named) > 40
    assert [name for name in sorted(named) if not (ROOT / name).exists()] == []


def test_every_path_in_the_readmes_tree_exists():
    tree = TEXTS["README.md"].split("## Files and flow")[1].split("```text\n")[1].split("```")[0]
    named = re.findall(r"(?:^|\s{2,})([\w/]+(?:\.\w+|/))(?=\s|$)", tree, re.MULTILINE)
    assert len(named) >= 12
    assert [name for name in named if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    "dotted",
    sorted(set(re.findall(r"`((?:gtpo|custom_trainer|reward_math)(?:\.(?!py\b)\w+)+)`", ALL))),
)
def test_every_dotted_name_can_be_found(dotted):
    parent, _, _ = dotted.rpartition(".")
    if importlib.util.find_spec(parent) and hasattr(importlib.util.find_spec(parent), "loader"):
        is_module = (ROOT / f"{dotted.replace('.', '/')}.py").exists()
        is_wing = (ROOT / dotted.replace(".", "/") / "__init__.py").exists()
        assert is_module or is_wing or check_dotted_path("docs", dotted) is None, dotted


def test_every_key_that_is_named_exists():
    sections = "|".join(RECIPE_SECTIONS)
    named = set(re.findall(rf"`(?:--)?((?:{sections})\.[a-z_][\w.]*)", WRITTEN))
    assert len(named) > 30
    assert [name for name in sorted(named) if not key_path(name.split("."))] == []


def test_every_section_of_a_recipe_is_explained():
    table = TEXTS["docs/recipes.md"].split("## Sections")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) >= RECIPE_SECTIONS


def test_the_recipe_reference_names_every_key():
    reference = TEXTS["docs/recipe_reference.md"]
    ours = [
        path[-1]
        for path, info, section in recipe_fields()
        if section != "training" or info.default is not None or path[-1] == "max_prompt_length"
    ]
    assert [key for key in ours if key not in reference] == []


def test_the_runtime_table_says_the_values_of_the_constants():
    named = re.findall(r"`([A-Z_]+)` = ([\d.e-]+)", TEXTS["docs/variants.md"])
    assert len(named) == 4
    source = (ROOT / "gtpo/gtpo_training.py").read_text()
    for name, value in named:
        assigned = re.search(rf"^{name} = ([\d.e-]+)", source, re.MULTILINE)[1]
        assert float(assigned) == float(value), name


def test_the_alarm_table_names_every_condition():
    table = TEXTS["docs/outputs.md"].split("## The collapse alarm")[1].split("\n## ")[0]
    conditions = {path[1] for path, _, _ in recipe_fields() if path[0] == "alarm"} - {
        "action",
        "window",
    }
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == conditions


def test_every_flag_that_is_named_exists():
    # Lines that run another program have that program's flags.
    others = (
        r"^(?:vllm|git|pip|torchrun|accelerate|VLLM_|python (?:llama|benchmarks|reliability)).*$"
    )
    ours = re.sub(others, "", ALL, flags=re.MULTILINE)
    ours += "\n".join(" ".join(command.values[1]) for command in commands("train_model.py"))
    of_parsers = {
        flag
        for parser in (export_model.parser(), evaluate_model.parser())
        for action in parser._actions
        for flag in action.option_strings
    }
    programs = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("reliability/*.py")]
    sources = "\n".join(
        program.read_text()
        for program in [*programs, ROOT / "tests/injected.py", ROOT / "Makefile"]
    )
    unknown = []
    for flag in sorted(set(re.findall(r"(?<![\w-])--([A-Za-z_][\w.-]*\w)", ours))):
        key = flag.replace("-", "_")
        known = key in ALIASES or key in SWITCHES or key_path(key.split("."))
        known = known or key in ("section.key", "export") or f"--{flag}" in of_parsers
        known = known or f"--{flag} " in report_run.__doc__ or f'"--{flag}"' in sources
        if not known and flag not in FLAGS_OF_OTHERS:
            unknown.append(flag)
    assert unknown == []


def test_the_page_on_architecture_lists_every_module_and_every_seam():
    tables = load_script(ROOT / "docs/tables.py")
    page = TEXTS["docs/architecture.md"]
    assert set(tables.WINGS) == {file.parent.name for file in ROOT.glob("gtpo/*/__init__.py")}
    assert tables.with_tables(page) == page, "run: python docs/tables.py"


# ---- links and pictures


def anchors(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"^```.*?^```", "", (ROOT / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    plain = [re.sub(r"[^\w\s-]", "", heading.lower()).strip() for heading in headings]
    return {re.sub(r"\s+", "-", heading) for heading in plain}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page):
    links = re.findall(r"\]\(([^)\s]+)\)|(?:src|srcset)=\"([^\"]+)\"", TEXTS[page])
    for link in (first or second for first, second in links):
        if link.startswith("http"):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(str(target.resolve().relative_to(ROOT))), link


def test_pictures_are_small():
    pictures = {
        (ROOT / page).parent / picture
        for page in PAGES
        for picture in re.findall(r"!\[[^]]+\]\(([^)]+)\)", TEXTS[page])
    }
    assert len(pictures) > 10
    for picture in pictures:
        assert 5_000 < picture.stat().st_size < 300_000, picture


def test_the_site_has_every_page_in_its_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    for page in PAGES:
        if page.startswith("docs/"):
            assert page.removeprefix("docs/") in navigation, page


# ---- prose


def test_the_readme_has_at_most_1200_words():
    assert len(TEXTS["README.md"].split()) <= 1200


@pytest.mark.parametrize("page", [page for page in PAGES if page != "docs/recipe_reference.md"])
def test_sentences_have_at_most_25_words(page):
    assert [text for text in sentences(TEXTS[page]) if len(words(text)) > 25] == []


def test_long_sentences_are_found():
    long, short = "One " + "word " * 25 + "more.", "It is `one two three` ([link](x)). So it is."
    assert [len(words(text)) for text in sentences(f"# A title\n\n{long}\n{short}")] == [
        2,
        27,
        4,
        3,
    ]


def test_cells_and_items_are_sentences_and_code_is_none():
    page = "| a b | c |\n|---|---|\n| One. Two. | |\n```\ncode\n```\n- item\n  goes on"
    texts = [text.strip() for text in sentences(page)]
    assert texts == ["a b", "c", "One.", "Two.", "item goes on"]


@pytest.mark.parametrize("section", SECTIONS)
def test_the_readme_has_or_links_each_section_by_its_name(section):
    headings = re.findall(r"^#+ (.*)$", TEXTS["README.md"], re.MULTILINE)
    if section in headings:
        return
    link = re.search(rf"\[{re.escape(section)}\]\((docs/\w+\.md)(?:#\S+)?\)", TEXTS["README.md"])
    assert link, section
    assert section in re.findall(r"^#+ (.*)$", TEXTS[link[1]], re.MULTILINE)


@pytest.mark.parametrize("page", sorted(set(PAGES) - {"CHANGELOG.md"}))
def test_a_page_begins_with_an_example(page):
    assert re.search(
        r"^```|^!\[|^<picture>", "\n".join(TEXTS[page].splitlines()[:14]), re.MULTILINE
    )
