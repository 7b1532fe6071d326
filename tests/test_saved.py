"""Runs, checkpoints, adapters and base models are found, loaded as trained, or refused."""

import json
import logging
import shutil
import struct
from pathlib import Path

import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from gtpo.errors import RecipeError
from gtpo.models.saved import find_saved, load_saved

TEXT = "How many are left?"


def remove_adapter(folder: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (folder / name).unlink()


def logits(policy) -> torch.Tensor:
    with torch.no_grad():
        return policy.model(policy.tokenizer(TEXT, return_tensors="pt")["input_ids"]).logits


def refusal(target, **options) -> str:
    """The error of `find_saved`, which is a single line."""
    with pytest.raises(RecipeError) as error:
        find_saved(str(target), **options)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- find


def test_a_run_has_an_adapter_a_base_model_and_a_recipe(run_dir, tiny_policy):
    saved = find_saved(str(run_dir))
    assert (saved.kind, saved.base) == ("run", tiny_policy)
    assert saved.adapter == saved.run_dir == run_dir
    assert saved.recipe.run_name == "demo" and saved.section.max_seq_length == 96


def test_an_unfinished_run_has_the_adapter_of_its_newest_checkpoint(run_dir, caplog):
    remove_adapter(run_dir)
    with caplog.at_level(logging.WARNING):
        assert find_saved(str(run_dir)).adapter == run_dir / "checkpoint-10"
    assert "did not finish: its newest checkpoint, checkpoint-10, is used" in caplog.text


def test_a_checkpoint_that_was_cut_off_is_skipped_with_a_warning(run_dir, caplog):
    remove_adapter(run_dir)
    weights = run_dir / "checkpoint-10/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        assert find_saved(str(run_dir)).adapter == run_dir / "checkpoint-5"
    assert "checkpoint-10: the adapter is damaged" in caplog.text


def test_a_checkpoint_has_the_recipe_of_its_run(run_dir, tiny_policy, monkeypatch):
    saved = find_saved(str(run_dir / "checkpoint-5"))
    assert (saved.kind, saved.base) == ("checkpoint", tiny_policy)
    assert (saved.adapter, saved.run_dir) == (run_dir / "checkpoint-5", run_dir)
    monkeypatch.chdir(run_dir / "checkpoint-5")
    assert find_saved(".").recipe == saved.recipe


def test_an_adapter_of_no_run_names_its_base_model_itself(tmp_path, tiny_policy):
    saved = find_saved(str(tiny.save_adapter(tmp_path / "adapter", tiny_policy)))
    assert (saved.kind, saved.base) == ("adapter", tiny_policy)
    assert saved.recipe is None and saved.run_dir is None


def test_a_base_model_is_a_folder_or_a_hub_name(tiny_policy, tmp_path, monkeypatch):
    from huggingface_hub import constants

    saved = find_saved(tiny_policy)
    assert (saved.kind, saved.base, saved.adapter) == ("base", tiny_policy, None)
    (tmp_path / "models--owner--name/snapshots").mkdir(parents=True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert find_saved("owner/name").base == "owner/name"


def test_a_run_is_found_although_its_reward_function_no_longer_exists(run_dir):
    recipe = (run_dir / "recipe.yaml").read_text()
    (run_dir / "recipe.yaml").write_text(recipe.replace("reward_math.final_reward", "gone.reward"))
    assert find_saved(str(run_dir)).recipe.trainer.reward_funcs == ["gone.reward"]


def test_a_relative_base_model_counts_from_the_current_directory(run_dir, tiny_policy, monkeypatch):
    text = (run_dir / "recipe.yaml").read_text()
    (run_dir / "recipe.yaml").write_text(text.replace(tiny_policy, Path(tiny_policy).name))
    monkeypatch.chdir(Path(tiny_policy).parent)
    assert find_saved(str(run_dir)).base == Path(tiny_policy).name
    monkeypatch.chdir(run_dir)
    assert "a relative folder counts from the directory where it was trained" in refusal(run_dir)
    assert find_saved(str(run_dir), base=tiny_policy).base == tiny_policy


# ---- load


@pytest.mark.parametrize("place", [".", "checkpoint-5"])
def test_the_loaded_model_computes_what_peft_computes(run_dir, tiny_policy, place):
    saved = find_saved(str(run_dir / place))
    policy = load_saved(saved)
    expected = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_policy), saved.adapter
    )
    ids = policy.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(tiny_policy)(ids).logits
    assert torch.equal(logits(policy), expected(ids).logits)
    assert not torch.allclose(logits(policy), base, atol=0.1)
    assert torch.equal(logits(load_saved(saved, adapter=False)), base)
    assert not policy.model.training and policy.backend == "transformers"


def test_a_trainable_model_trains_its_lora_weights_and_no_others(run_dir):
    policy = load_saved(find_saved(str(run_dir)), trainable=True)
    names = [name for name, parameter in policy.model.named_parameters() if parameter.requires_grad]
    # two factors, for seven kinds of layers, in two blocks
    assert policy.model.training and len(names) == 2 * 7 * 2
    assert all("lora_" in name for name in names)


def test_the_tokenizer_and_chat_template_that_are_saved_with_the_adapter_are_used(
    run_dir, tiny_policy
):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = "mine {{ messages[0]['content'] }}"
    tokenizer.save_pretrained(run_dir)
    saved, given = find_saved(str(run_dir)), "given {{ messages[0]['content'] }}"
    assert load_saved(saved).tokenizer.chat_template == tokenizer.chat_template
    assert load_saved(saved, chat_template=given).tokenizer.chat_template == given
    assert load_saved(find_saved(tiny_policy)).tokenizer.chat_template == tiny.CHAT_TEMPLATE
    (run_dir / "tokenizer_config.json").unlink()
    assert load_saved(saved).tokenizer.chat_template == tiny.CHAT_TEMPLATE


def test_an_adapter_on_the_embeddings_can_be_loaded(tmp_path, tiny_policy):
    model = AutoModelForCausalLM.from_pretrained(tiny_policy)
    adapted = get_peft_model(
        model, LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"], task_type="CAUSAL_LM")
    )
    torch.nn.init.normal_(
        adapted.get_submodule("base_model.model.model.embed_tokens.lora_embedding_A")["default"]
    )
    adapted.save_pretrained(tmp_path / "adapter")
    policy = load_saved(find_saved(str(tmp_path / "adapter")))
    ids = policy.tokenizer(TEXT, return_tensors="pt")["input_ids"]
    assert torch.equal(logits(policy), adapted.eval()(ids).logits)


def test_a_model_without_a_recipe_is_loaded_within_its_context(tiny_policy):
    # That is shorter than the default of model.max_seq_length.
    assert load_saved(find_saved(tiny_policy)).model.config.max_position_embeddings == 2048
    with pytest.raises(
        RecipeError, match="model.max_seq_length: 4000 is more than the 2048 tokens"
    ):
        load_saved(find_saved(tiny_policy), max_seq_length=4000, max_prompt_length=4000)


def test_a_run_that_was_trained_with_unsloth_loads_without_a_gpu(run_dir):
    text = (run_dir / "recipe.yaml").read_text()
    (run_dir / "recipe.yaml").write_text(
        text.replace("backend: transformers", "backend: unsloth").replace(
            "load_in_4bit: false", "load_in_4bit: true"
        )
    )
    assert load_saved(find_saved(str(run_dir))).backend == "transformers"


# ---- refusals


def test_a_missing_folder_and_one_without_a_model_are_refused(tmp_path):
    assert "there is no folder" in refusal(tmp_path / "absent")
    assert "holds no recipe.yaml, adapter_config.json or config.json" in refusal(tmp_path)
    (tmp_path / "file").touch()
    assert "it is a file" in refusal(tmp_path / "file")
    error = refusal("runs/mistyped")
    assert "'runs/mistyped' is not in the local cache" in error
    assert error.endswith("use a local folder (there is none called 'runs/mistyped' here)")


def test_a_run_without_an_adapter_is_refused(run_dir):
    for place in (run_dir, run_dir / "checkpoint-5", run_dir / "checkpoint-10"):
        remove_adapter(place)
    assert "this run has no adapter" in refusal(run_dir)


def test_a_damaged_recipe_or_adapter_is_refused(run_dir):
    weights = run_dir / "checkpoint-5/adapter_model.safetensors"
    weights.write_bytes(struct.pack("<Q", 10**12) + b"{")
    assert "checkpoint-5: the adapter is damaged" in refusal(run_dir / "checkpoint-5")
    weights.rename(weights.with_suffix(".bin"))
    assert "there is no adapter_model.safetensors" in refusal(run_dir / "checkpoint-5")
    (run_dir / "checkpoint-10/adapter_config.json").write_text('{"peft_type": "IA3"}')
    assert "is not that of a LoRA adapter" in refusal(run_dir / "checkpoint-10")
    (run_dir / "recipe.yaml").write_text("model: {model_nam: x}\n")
    with pytest.raises(RecipeError, match="recipe.yaml; did you mean model.model_name"):
        find_saved(str(run_dir))


def test_an_adapter_without_a_base_model_is_refused(tmp_path, tiny_policy):
    folder = tiny.save_adapter(tmp_path / "adapter", tiny_policy)
    config = json.loads((folder / "adapter_config.json").read_text())
    for base, expected in (
        (None, "names no base model"),
        ("/gone/model", "base model: there is no folder '/gone/model'"),
    ):
        (folder / "adapter_config.json").write_text(
            json.dumps({**config, "base_model_name_or_path": base})
        )
        assert expected in refusal(folder)


def misfit(saved) -> str:
    """The error of `load_saved` about a base model that does not fit, which is a single line."""
    with pytest.raises(RecipeError) as error:
        load_saved(saved)
    sentence = str(error.value)
    assert "does not fit the base model" in sentence and "\n" not in sentence
    return sentence


def test_a_base_model_of_other_shapes_is_refused(run_dir, tmp_path):
    wide = tmp_path / "wide"
    tokenizer = tiny.tiny_tokenizer()
    config = tiny.tiny_model(tokenizer).config
    config.hidden_size, config.head_dim = 32, 16
    type(tiny.tiny_model(tokenizer))(config).save_pretrained(wide)
    tokenizer.save_pretrained(wide)
    assert "down_proj is (16, 4) in the adapter and (32, 4) in the model" in misfit(
        find_saved(str(run_dir), base=str(wide))
    )


EXTRA = "the adapter has weights for model.layers.1.mlp.down_proj, which the model does not have"
MISSING = "the adapter has no weights for model.layers.2.mlp.down_proj"


@pytest.mark.parametrize("layers, expected", [(1, EXTRA), (3, MISSING)])
def test_a_base_model_with_other_layers_is_refused(run_dir, tmp_path, layers, expected):
    tokenizer = tiny.tiny_tokenizer()
    config = tiny.tiny_model(tokenizer).config
    config.num_hidden_layers, config.layer_types = layers, None
    type(tiny.tiny_model(tokenizer))(config).save_pretrained(tmp_path / "other")
    assert expected in misfit(find_saved(str(run_dir), base=str(tmp_path / "other")))


def test_a_base_model_with_another_vocabulary_is_refused(run_dir, tmp_path):
    base = tiny.save_tiny_policy(
        tmp_path / "other", alphabet="abc" + "".join(chr(i) for i in range(200, 292)) + "\n"
    )
    assert "its tokenizer has another vocabulary" in misfit(find_saved(str(run_dir), base=base))


def test_a_base_model_without_its_weights_is_refused(run_dir, tiny_policy, tmp_path):
    base = Path(shutil.copytree(tiny_policy, tmp_path / "base"))
    (base / "model.safetensors").unlink()
    with pytest.raises(RecipeError, match="cannot be loaded"):
        load_saved(find_saved(str(run_dir), base=str(base)))


def test_weights_with_other_names_are_refused_instead_of_ignored(run_dir):
    file = run_dir / "adapter_model.safetensors"
    weights = load_file(file)
    save_file({name.replace("q_proj", "query"): weights[name] for name in weights}, file)
    error = misfit(find_saved(str(run_dir)))
    assert "which the model does not have" in error or "has no weights for" in error
