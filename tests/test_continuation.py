"""A new run that starts from an earlier adapter: the same weights, the adapter's own shape,
refusals before anything is loaded.
"""

# ruff: noqa: F401, F811 (fixtures are imported by name and then requested as arguments)

import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from test_train_model import demo_flags, here, run_dir

import train_model
from gtpo.errors import RecipeError
from gtpo.models.saved import resolve_adapter
from gtpo.recipe import command_line as cli


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps with an adapter of rank 4 on four kinds of layers."""
    root = tmp_path_factory.mktemp("finished")
    flags = demo_flags(
        "--run-name",
        "first",
        "--model.lora_rank",
        "4",
        "--model.lora_alpha",
        "8",
        "--model.target_modules",
        "q_proj",
        "v_proj",
        "up_proj",
        "down_proj",
        "--output_root",
        str(root / "runs"),
    )
    assert train_model.main(flags) == 0
    return run_dir(root, "first")


@pytest.fixture
def first(finished, here):
    """That run, under the current folder's runs."""
    return Path(shutil.copytree(finished, here / "runs" / finished.name))


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def second_flags(folder, *more: str) -> list[str]:
    """The demo's flags without its LoRA keys, which would contradict the adapter's."""
    recipe = (ROOT / "recipes/demo.yaml").read_text().replace("  lora_rank: 16\n", "")
    (folder / "second.yaml").write_text(recipe)
    return ["second.yaml", *demo_flags("--run-name", "second", *more)[1:]]


def test_a_run_goes_on_from_the_adapters_weights_with_its_rank_alpha_and_layers(first, here):
    flags = second_flags(
        here,
        "--model.adapter",
        str(first),
        "--training.max_steps",
        "1",
        "--training.learning_rate",
        "1e-12",
    )
    assert train_model.main(flags) == 0
    before, after = weights(first), weights(run_dir(here, "second"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-10) for name in before)
    config = json.loads((run_dir(here, "second") / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    recipe = cli.read_recipe([str(run_dir(here, "second") / "recipe.yaml")])
    assert (recipe.model.lora_rank, recipe.model.lora_alpha, recipe.model.adapter) == (
        4,
        8,
        str(first),
    )
    assert resolve_adapter(recipe.model_copy(update={"run_name": "third"})).model == recipe.model


def test_from_a_checkpoint_it_trains_on_and_leaves_the_earlier_run_as_it_was(first, here):
    files = {file: file.read_bytes() for file in first.rglob("*") if file.is_file()}
    assert train_model.main(second_flags(here, "--model.adapter", str(first / "checkpoint-1"))) == 0
    assert files == {file: file.read_bytes() for file in first.rglob("*") if file.is_file()}
    start, end = weights(first / "checkpoint-1"), weights(run_dir(here, "second"))
    moved = max((end[name] - start[name]).abs().max().item() for name in start)
    assert 0 < moved < 0.02  # two steps of at most 3e-3 each


def test_the_plan_shows_the_adapters_shape(first, here, capsys):
    assert train_model.main(second_flags(here, "--model.adapter", str(first), "--dry-run")) == 0
    assert "lora_rank: 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--model.adapter", "absent"], "model.adapter: there is no folder 'absent'"),
        (["--model.adapter", str(ROOT / "demo/model")], "is a base model"),
        (["--model.adapter", str(ROOT / "demo")], "model.adapter: .*holds no recipe.yaml"),
        (
            ["--model.adapter", "FIRST", "--model.lora_rank", "8"],
            "model.lora_rank: 8 is not what the adapter .* has; leave it out, or set 4",
        ),
        (
            ["--model.adapter", "FIRST", "--model.lora_alpha", "4"],
            "model.lora_alpha: 4 is not what",
        ),
        (
            ["--model.adapter", "FIRST", "--model.target_modules", "q_proj"],
            "model.target_modules: .* is not what",
        ),
        (
            ["--model.adapter", "FIRST/checkpoint-1", "--run-name", "first"],
            "is in the run directory that this run would write",
        ),
    ],
)
def test_what_cannot_be_continued_is_refused_early(first, here, flags, expected):
    flags = [flag.replace("FIRST", str(first)) for flag in flags]
    with pytest.raises(RecipeError, match=expected):
        resolve_adapter(cli.read_recipe(second_flags(here, *flags)))
    assert train_model.main(second_flags(here, "--overwrite", *flags)) == 2
    assert (first / "adapter_model.safetensors").is_file() and not list(
        (here / "runs").glob("second*")
    )


def test_a_base_model_that_numbers_tokens_otherwise_is_refused(first, here, capsys):
    flags = second_flags(
        here, "--model.adapter", str(first), "--model-name", str(ROOT / "demo/columns/model")
    )
    for more in ([], ["--check"]):
        assert train_model.main([*flags, *more]) == 2
        told = capsys.readouterr()
        assert (
            "model.adapter: " in told.err + told.out
            and "its tokenizer has another vocabulary; give the model that it was trained on"
            in told.err + told.out
        )
    assert not list((here / "runs").glob("second*"))


def test_layers_keep_the_recipes_order(first, here):
    flags = ["--model.adapter", str(first)]
    assert resolve_adapter(
        cli.read_recipe(second_flags(here, *flags))
    ).model.target_modules == sorted(["q_proj", "v_proj", "up_proj", "down_proj"])
    config = json.loads((first / "adapter_config.json").read_text())
    section = cli.read_recipe(second_flags(here)).model
    (first / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": list(reversed(section.target_modules))})
    )
    assert (
        resolve_adapter(cli.read_recipe(second_flags(here, *flags))).model.target_modules
        == section.target_modules
    )


def test_the_same_settings_may_be_given_and_another_base_is_said(first, here, tiny_policy, caplog):
    flags = [
        "--model.adapter",
        str(first),
        "--model.lora_rank",
        "4",
        "--model.target_modules",
        "down_proj",
        "up_proj",
        "v_proj",
        "q_proj",
    ]
    assert resolve_adapter(cli.read_recipe(second_flags(here, *flags))).model.target_modules == [
        "down_proj",
        "up_proj",
        "v_proj",
        "q_proj",
    ]
    assert not caplog.records
    flags = second_flags(here, "--model.adapter", str(first), "--model-name", tiny_policy)
    resolve_adapter(cli.read_recipe(flags))
    assert f"its training goes on with {tiny_policy}" in caplog.text
    assert train_model.main(flags) == 2  # its layers do not fit
    assert not list((here / "runs").glob("second*"))
