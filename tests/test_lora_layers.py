"""Which layers get LoRA weights, and the options of LoRA: trained, evaluated, merged, continued."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from demo_run import demo_flags, run_dir
from mixtures import save_model
from safetensors.torch import load_file

import evaluate_model
import export_model
import train_model
from gtpo.errors import RecipeError
from gtpo.models.backends import add_lora, check_layers, lora_config
from gtpo.recipe.sections import ModelSection

HELD_OUT = ("--dataset", str(ROOT / "demo/data/test.jsonl"), "--limit", "2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns the folder of a model of tests/mixtures.py, made once."""
    folders = {}

    def folder(name: str) -> str:
        if name not in folders:
            folders[name] = save_model(tmp_path_factory.mktemp(name), name)
        return folders[name]

    return folder


def loaded(folder: str):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def config(folder: str, **options):
    return lora_config(ModelSection(model_name=folder, lora_rank=4, **options), None)


def test_absent_layers_are_named_with_the_linear_layers_that_exist(saved, caplog):
    folder = saved("fused")
    check_layers(loaded(folder), config(folder))
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "no layer named gate_proj, k_proj, q_proj, up_proj, v_proj" in warning
    assert "its linear layers are o_proj, qkv_proj, gate_up_proj, down_proj" in warning


def test_layers_of_which_none_exists_are_refused(saved):
    folder = saved("fused")
    with pytest.raises(
        RecipeError, match="model.target_modules: this model has no layer named c_a"
    ):
        add_lora(loaded(folder), config(folder, target_modules=["c_attn"]))


@pytest.mark.parametrize("name", ["experts", "tied"])
def test_layers_that_exist_raise_no_warning_in_experts_either(name, saved, caplog, recwarn):
    folder = saved(name)
    add_lora(loaded(folder), config(folder))
    assert not caplog.records
    assert not [warning for warning in recwarn if "pattern" in str(warning.message)]


def test_all_linear_means_every_linear_layer_but_the_output_layer(saved):
    folder = saved("fused")
    model = add_lora(loaded(folder), config(folder, target_modules="all-linear"))
    layers = {name.split(".lora_A")[0].rpartition(".")[2] for name in names(model, "lora_A")}
    assert layers == {"o_proj", "qkv_proj", "gate_up_proj", "down_proj"}


def names(model, part: str) -> list[str]:
    return [name for name, _ in model.named_parameters() if part in name]


def test_modules_to_save_that_cannot_be_kept_are_refused(saved):
    with pytest.raises(RecipeError, match="model.modules_to_save: this model has no module named"):
        folder = saved("fused")
        add_lora(loaded(folder), config(folder, modules_to_save=["score"]))
    with pytest.raises(RecipeError, match="model.modules_to_save: lm_head: this model shares"):
        folder = saved("tied")
        add_lora(loaded(folder), config(folder, modules_to_save=["lm_head"]))


@pytest.mark.slow
def test_a_mixture_of_experts_trains_evaluates_exports_and_continues(saved, here):
    model = ["--model-name", saved("experts"), "--model.lora_rank", "4"]
    flags = demo_flags("--run-name", "experts", *model, "--evaluation.path", "null")
    assert train_model.main(flags) == 0
    run = run_dir(here, "experts")
    assert any(".experts." in name for name in load_file(run / "adapter_model.safetensors"))
    assert evaluate_model.main([str(run), *HELD_OUT]) == 0
    assert export_model.main([str(run), "merged", "--dtype", "float32"]) == 0
    assert evaluate_model.main(["merged", *HELD_OUT]) == 0
    again = demo_flags("--run-name", "second", *model, "--evaluation.path", "null")
    assert train_model.main([*again, "--model.adapter", str(run)]) == 0


OPTIONS = {
    "use_rslora": ["true"],
    "use_dora": ["true"],
    "lora_dropout": ["0.1"],
    "init_lora_weights": ["gaussian"],
    "modules_to_save": ["embed_tokens", "lm_head"],
    "target_modules": ["all-linear"],
}


@pytest.mark.slow
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_of_lora_trains_evaluates_and_exports(option, here):
    lora = [f"--model.{option}", *OPTIONS[option]]
    flags = demo_flags("--run-name", option, *lora, "--evaluation.path", "null")
    assert train_model.main(flags) == 0
    run = run_dir(here, option)
    assert evaluate_model.main([str(run), *HELD_OUT]) == 0
    assert export_model.main([str(run), f"merged_{option}", "--dtype", "float32"]) == 0
    if option == "modules_to_save":
        head = load_file(run / "adapter_model.safetensors")["base_model.model.lm_head.weight"]
        base = load_file(ROOT / "demo/model/model.safetensors")["lm_head.weight"]
        assert not head.equal(base)  # it is trained, although log-probs are streamed elsewhere


@pytest.mark.slow
def test_a_continued_run_has_the_earlier_options_of_lora(here):
    flags = demo_flags("--run-name", "first", "--model.use_rslora", "true")
    assert train_model.main([*flags, "--evaluation.path", "null"]) == 0
    first = run_dir(here, "first")
    again = demo_flags("--run-name", "second", "--evaluation.path", "null")
    assert train_model.main([*again, "--model.adapter", str(first)]) == 0
    second = json.loads(Path(run_dir(here, "second"), "adapter_config.json").read_text())
    assert second["use_rslora"] is True
