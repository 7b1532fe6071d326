"""`model.adapter`: a new run goes on training an earlier adapter, with that adapter's shape."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from conftest import ROOT
from demo_run import demo_flags, run_dir
from safetensors.torch import load_file
from tiny import save_adapter

import train_model
from gtpo.errors import RecipeError
from gtpo.models.saved import resolve_adapter, training_tokenizer
from gtpo.recipe import command_line as cli
from gtpo.recipe.sections import ModelSection

pytestmark = pytest.mark.slow  # trains


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two steps with an adapter of rank 4 on four kinds of layers."""
    root = tmp_path_factory.mktemp("finished")
    layers = ["--model.target_modules", "q_proj", "v_proj", "up_proj", "down_proj"]
    shape = ["--model.lora_rank", "4", "--model.lora_alpha", "8", *layers]
    flags = demo_flags("--run-name", "first", *shape, "--output_root", str(root / "runs"))
    assert train_model.main(flags) == 0
    return run_dir(root, "first")


@pytest.fixture
def first(finished, here):
    """A copy of that run, in `runs` of the current folder."""
    return Path(shutil.copytree(finished, here / "runs" / finished.name))


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def second_flags(folder, *more: str) -> list[str]:
    """The demo's flags, and a recipe without LoRA keys, which would contradict the adapter's."""
    recipe = (ROOT / "recipes/demo.yaml").read_text().replace("  lora_rank: 16\n", "")
    (folder / "second.yaml").write_text(recipe)
    return ["second.yaml", *demo_flags("--run-name", "second", *more)[1:]]


def test_a_run_begins_with_the_adapters_weights_rank_alpha_and_layers(first, here):
    almost_no_training = ["--training.max_steps", "1", "--training.learning_rate", "1e-12"]
    flags = second_flags(here, "--model.adapter", str(first), *almost_no_training)
    assert train_model.main(flags) == 0
    before, after = weights(first), weights(run_dir(here, "second"))
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-10) for name in before)
    config = json.loads((run_dir(here, "second") / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    recipe = cli.read_recipe([str(run_dir(here, "second") / "recipe.yaml")])
    assert (recipe.model.lora_rank, recipe.model.lora_alpha) == (4, 8)
    assert recipe.model.adapter == str(first)
    assert resolve_adapter(recipe.model_copy(update={"run_name": "third"})).model == recipe.model


def test_a_run_can_begin_with_a_checkpoint_and_leaves_the_earlier_run_unchanged(first, here):
    files = {file: file.read_bytes() for file in first.rglob("*") if file.is_file()}
    assert train_model.main(second_flags(here, "--model.adapter", str(first / "checkpoint-1"))) == 0
    assert files == {file: file.read_bytes() for file in first.rglob("*") if file.is_file()}
    start, end = weights(first / "checkpoint-1"), weights(run_dir(here, "second"))
    moved = max((end[name] - start[name]).abs().max().item() for name in start)
    assert 0 < moved < 0.02  # two steps of at most 3e-3 each


def test_a_dry_run_shows_the_adapters_shape(first, here, capsys):
    assert train_model.main(second_flags(here, "--model.adapter", str(first), "--dry-run")) == 0
    assert "lora_rank: 4" in capsys.readouterr().out


@pytest.mark.parametrize(
    "adapter, flags, expected",
    [
        ("absent", [], "model.adapter: there is no folder 'absent'"),
        (str(ROOT / "demo/model"), [], "is a base model"),
        (str(ROOT / "demo"), [], "model.adapter: .*holds no recipe.yaml"),
        (
            "FIRST",
            ["--model.lora_rank", "8"],
            "model.lora_rank: 8 is not what the adapter .* has; leave it out, or set 4",
        ),
        ("FIRST", ["--model.lora_alpha", "4"], "model.lora_alpha: 4 is not what"),
        ("FIRST", ["--model.target_modules", "q_proj"], "model.target_modules: .* is not what"),
        (
            "FIRST/checkpoint-1",
            ["--run-name", "first"],
            "is in the run directory that this run would write",
        ),
    ],
)
def test_an_adapter_that_does_not_suit_the_recipe_is_refused_early(
    first, here, adapter, flags, expected
):
    flags = ["--model.adapter", adapter.replace("FIRST", str(first)), *flags]
    with pytest.raises(RecipeError, match=expected):
        resolve_adapter(cli.read_recipe(second_flags(here, *flags)))
    assert train_model.main(second_flags(here, "--overwrite", *flags)) == 2
    assert (first / "adapter_model.safetensors").is_file()
    assert not list((here / "runs").glob("second*"))


def test_a_base_model_that_numbers_tokens_otherwise_is_refused(first, here, capsys):
    other_base = str(ROOT / "demo/columns/model")
    flags = second_flags(here, "--model.adapter", str(first), "--model-name", other_base)
    for more in ([], ["--check"]):
        assert train_model.main([*flags, *more]) == 2
        output = "".join(capsys.readouterr())
        assert "model.adapter: " in output
        assert "its tokenizer has another vocabulary; give the model that it was trained" in output
    assert not list((here / "runs").glob("second*"))


def test_the_adapters_layers_keep_the_recipes_order(first, here):
    def resolved_layers() -> list[str]:
        recipe = cli.read_recipe(second_flags(here, "--model.adapter", str(first)))
        return resolve_adapter(recipe).model.target_modules

    assert resolved_layers() == ["down_proj", "q_proj", "up_proj", "v_proj"]
    layers = cli.read_recipe(second_flags(here)).model.target_modules
    config = json.loads((first / "adapter_config.json").read_text())
    (first / "adapter_config.json").write_text(
        json.dumps({**config, "target_modules": layers[::-1]})
    )
    assert resolved_layers() == layers


def test_training_uses_the_adapters_tokenizer_unless_a_chat_template_is_given(
    tmp_path, tiny_policy
):
    adapter = save_adapter(tmp_path / "adapter", tiny_policy)
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "adapter {{ messages[0]['content'] }}"
    tokenizer.save_pretrained(adapter)

    def source_and_template(**keys) -> tuple[str, str]:
        section = ModelSection(model_name=tiny_policy, adapter=str(adapter), **keys)
        loaded = training_tokenizer(section, "transformers")
        return loaded.name_or_path, loaded.chat_template

    given = "given {{ messages[0]['content'] }}"
    assert source_and_template() == (str(adapter), tokenizer.chat_template)
    assert source_and_template(chat_template=given) == (tiny_policy, given)
    (adapter / "tokenizer_config.json").unlink()
    assert source_and_template() == (tiny_policy, tiny.CHAT_TEMPLATE)


def test_the_same_settings_may_be_given_and_another_base_model_is_a_warning(
    first, here, tiny_policy, caplog
):
    layers = ["down_proj", "up_proj", "v_proj", "q_proj"]
    flags = ["--model.lora_rank", "4", "--model.target_modules", *layers]
    recipe = cli.read_recipe(second_flags(here, "--model.adapter", str(first), *flags))
    assert resolve_adapter(recipe).model.target_modules == layers
    assert not caplog.records
    flags = second_flags(here, "--model.adapter", str(first), "--model-name", tiny_policy)
    resolve_adapter(cli.read_recipe(flags))
    assert f"its training goes on with {tiny_policy}" in caplog.text
    assert train_model.main(flags) == 2  # its layers do not fit
    assert not list((here / "runs").glob("second*"))
