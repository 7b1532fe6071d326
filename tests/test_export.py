"""A merged model on disk computes what base model and adapter compute, or it is not left there."""

import json
import shutil
from pathlib import Path

import psutil
import pytest
import tiny
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import save_adapter
from transformers import AutoModelForCausalLM, AutoTokenizer

import export_model
import train_model
from gtpo.models import export, fidelity
from gtpo.models.saved import find_saved

pytestmark = pytest.mark.slow  # merges and saves models

TEXT = "s:Add.\nu:How many are left?\na:seven"


def run(capsys, *words) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of export_model.py."""
    code = export_model.main([str(word) for word in words])
    return code, *capsys.readouterr()


def refusal(capsys, *words) -> str:
    """The error of an export that fails and leaves nothing beside OUT."""
    out = Path(words[1])
    before = sorted(out.parent.iterdir())
    code, stdout, stderr = run(capsys, *words)
    errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
    assert code == 2 and stdout == "" and len(errors) == 1
    assert sorted(out.parent.iterdir()) == before
    return errors[0]


def logits(model, folder) -> torch.Tensor:
    ids = AutoTokenizer.from_pretrained(folder)(TEXT, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model.float()(ids).logits


def scale_adapter(folder: Path, factor: float) -> None:
    file = folder / "adapter_model.safetensors"
    weights = load_file(file)
    for name in weights:
        weights[name] *= factor if "lora_B" in name else 1
    save_file(weights, file)


def change_json(file: Path, **values) -> dict:
    """Replace values in a JSON file; returns what it held before."""
    before = json.loads(file.read_text())
    file.write_text(json.dumps({**before, **values}))
    return before


# ---- merge


@pytest.mark.parametrize(
    "dtype, bound", [("bfloat16", 0.03), ("float16", 0.004), ("float32", 1e-5)]
)
def test_the_merged_model_is_a_transformers_model_that_computes_what_base_and_adapter_compute(
    run_dir, tiny_policy, tmp_path, capsys, dtype, bound
):
    code, out, _ = run(capsys, run_dir, tmp_path / "merged", "--dtype", dtype)
    assert code == 0 and out.endswith(f"Merged model: {tmp_path / 'merged'}\n")
    files = sorted(file.name for file in (tmp_path / "merged").iterdir())
    assert " ".join(files) == (
        "README.md chat_template.jinja config.json generation_config.json model.safetensors"
        " recipe.yaml tokenizer.json tokenizer_config.json"
    )
    weights = load_file(tmp_path / "merged/model.safetensors").values()
    assert {str(tensor.dtype) for tensor in weights} == {f"torch.{dtype}"}

    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_policy)
    untrained = logits(base, run_dir)
    adapted = logits(PeftModel.from_pretrained(base, run_dir), run_dir)
    distance = (merged - adapted).norm() / adapted.norm()
    adapters_effect = (untrained - adapted).norm() / adapted.norm()
    assert distance < bound < 0.1 < adapters_effect
    saved = find_saved(str(tmp_path / "merged"))
    assert (saved.kind, saved.adapter, saved.base) == ("base", None, str(tmp_path / "merged"))
    # It is evaluated with the problems and the system message of the training.
    assert saved.recipe.dataset == find_saved(str(run_dir)).recipe.dataset
    assert not saved.section.load_in_4bit


def test_a_checkpoint_and_an_adapter_of_no_run_can_be_merged(
    run_dir, tiny_policy, tmp_path, capsys
):
    assert run(capsys, run_dir / "checkpoint-5", tmp_path / "a")[0] == 0
    adapter = save_adapter(tmp_path / "adapter", tiny_policy)
    change_json(adapter / "adapter_config.json", base_model_name_or_path="/gone/model")
    error = refusal(capsys, adapter, tmp_path / "b")
    assert "base model: there is no folder '/gone/model'" in error
    assert run(capsys, adapter, tmp_path / "b", "--model-name", tiny_policy)[0] == 0


def test_a_base_model_with_contradicting_generation_settings_can_be_merged(
    run_dir, tiny_policy, tmp_path, capsys
):
    base = Path(shutil.copytree(tiny_policy, tmp_path / "base"))
    contradicting = {"do_sample": False, "temperature": 0.6, "top_p": 0.9}
    settings = change_json(base / "generation_config.json", **contradicting)
    assert run(capsys, run_dir, tmp_path / "merged", "--model-name", base)[0] == 0
    merged = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert merged["eos_token_id"] == settings["eos_token_id"] and "temperature" not in merged


def test_train_model_can_export(run_dir, tmp_path, capsys):
    assert train_model.main(["--export", str(run_dir), str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged/config.json").is_file()


def test_an_untrained_adapter_is_merged_and_reported_to_change_nothing(run_dir, tmp_path, capsys):
    scale_adapter(run_dir, 0.0)
    code, out, _ = run(capsys, run_dir, tmp_path / "merged")
    assert code == 0 and "the adapter changes nothing (it is untrained)" in out


def test_texts_to_compare_on_are_the_runs_completions_if_it_has_any(run_dir):
    saved, tokenizer = find_saved(str(run_dir / "checkpoint-5")), tiny.tiny_tokenizer()
    texts, description = export.sample_texts(saved, tokenizer)
    assert description == "6 fixed texts"
    assert tokenizer.decode(texts[0][0]) == "u:What is 12 + 30?\na:"
    rows = [
        {"prompt": [{"role": "user", "content": f"{i // 2}+1="}], "completion": f"{i}^"}
        for i in range(40)
    ]
    lines = ["[1]", *map(json.dumps, rows), '{"prompt": "cut']
    (run_dir / "completions.jsonl").write_text("\n".join(lines))
    texts, description = export.sample_texts(saved, tokenizer)
    assert description == "8 of the run's completions"
    assert tokenizer.decode(texts[1][0]) == "u:1+1=\na:2^"


# ---- a merge that is wrong, beyond rounding


def test_a_merge_without_the_adapter_is_refused(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "merge_adapter", lambda model: model.unload())
    error = refusal(capsys, run_dir, tmp_path / "merged")
    assert "The merge is wrong, so use the adapter itself; nothing was kept" in error


@pytest.mark.parametrize("dtype", export.DTYPES)
def test_a_merge_that_leaves_one_layer_out_is_refused(
    run_dir, tmp_path, capsys, monkeypatch, dtype
):
    def all_but_one(model):
        layer = "base_model.model.model.layers.1.mlp.down_proj.lora_B.default"
        torch.nn.init.zeros_(model.get_submodule(layer).weight)
        return model.merge_and_unload()

    monkeypatch.setattr(export, "merge_adapter", all_but_one)
    error = refusal(capsys, run_dir, tmp_path / "merged", "--dtype", dtype)
    assert "before any rounding, " in error


def test_an_adapter_on_tied_embeddings_is_refused(tmp_path, capsys):
    """peft 0.21.2 merges it into the one weight, and so changes the output layer too."""
    tokenizer = tiny.tiny_tokenizer()
    config = tiny.tiny_model(tokenizer).config
    config.tie_word_embeddings = True
    model = type(tiny.tiny_model(tokenizer))(config)
    for place in ("base", "adapter"):
        tokenizer.save_pretrained(tmp_path / place)
    model.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = get_peft_model(base, LoraConfig(target_modules=["embed_tokens"]))
    factor = "base_model.model.model.embed_tokens.lora_embedding_A"
    torch.nn.init.normal_(model.get_submodule(factor)["default"])
    model.save_pretrained(tmp_path / "adapter")
    assert "The merge is wrong" in refusal(capsys, tmp_path / "adapter", tmp_path / "merged")


def test_weights_that_get_lost_between_saving_and_loading_are_refused(
    run_dir, tmp_path, capsys, monkeypatch
):
    save_model = export.save_model

    def save_without_a_norm(model, folder, dtype, ends):
        save_model(model, folder, dtype, ends)
        file = folder / "model.safetensors"
        weights = load_file(file)
        del weights["model.norm.weight"]  # transformers makes a new one and warns
        weights["lm_head.weight"] *= 0.9
        save_file(weights, file, metadata={"format": "pt"})

    monkeypatch.setattr(export, "save_model", save_without_a_norm)
    assert "The merge is wrong" in refusal(capsys, run_dir, tmp_path / "merged")


def test_a_merge_without_the_adapter_is_refused_if_the_memory_is_too_small_for_float32(
    run_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(export, "choose_placement", lambda *_: export.Placement("bfloat16", "cpu"))
    assert run(capsys, run_dir, tmp_path / "a")[0] == 0
    monkeypatch.setattr(export, "merge_adapter", lambda model: model.unload())
    assert "rounding to bfloat16 explains" in refusal(capsys, run_dir, tmp_path / "b")


def test_an_adapter_that_gets_lost_in_rounding_is_refused_and_a_finer_type_is_named(
    run_dir, tmp_path, capsys
):
    scale_adapter(run_dir, 1e-4)
    error = refusal(capsys, run_dir, tmp_path / "merged")
    assert "of what the adapter changes is left in bfloat16" in error
    assert "--dtype float16 or float32" in error
    assert run(capsys, run_dir, tmp_path / "merged", "--dtype", "float32")[0] == 0


def test_an_adapter_that_is_not_finite_is_refused(run_dir, tmp_path, capsys):
    scale_adapter(run_dir, float("nan"))
    error = refusal(capsys, run_dir, tmp_path / "merged")
    assert "the adapter cannot be merged (NaNs detected" in error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moving_weights_changes_the_logits_about_as_much_as_rounding_them(dtype):
    tokenizer = tiny.tiny_tokenizer()
    texts = [
        tokenizer(text, return_tensors="pt")["input_ids"]
        for text in ("one and two", "three, four and five", TEXT)
    ]

    def adapted_model(seed: int):
        return tiny.with_lora(tiny.tiny_model(tokenizer, seed), seed=seed)

    for seed in range(3):
        expected = fidelity.reference_logits(adapted_model(seed), texts, dtype)
        merged = adapted_model(seed).merge_and_unload().to(dtype).float()
        comparison = fidelity.compare(expected, merged, texts)
        assert 1 / 3 < comparison.difference / comparison.rounding < 2
        assert comparison.kept == pytest.approx(1, abs=0.02)
        assert comparison.defect("any") is None


# ---- refusals before anything is loaded


def test_an_existing_folder_is_not_overwritten(run_dir, tmp_path, capsys):
    (tmp_path / "merged").mkdir()
    error = refusal(capsys, run_dir, tmp_path / "merged")
    assert "it exists already and is not overwritten" in error


def test_a_model_that_cannot_be_merged_is_refused(run_dir, tiny_policy, tmp_path, capsys):
    assert "it is a base model" in refusal(capsys, tiny_policy, tmp_path / "merged")
    assert "there is no folder" in refusal(capsys, tmp_path / "absent", tmp_path / "merged")
    base = Path(shutil.copytree(tiny_policy, tmp_path / "base"))
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    change_json(base / "config.json", quantization_config=quantization)
    error = refusal(capsys, run_dir, tmp_path / "merged", "--model-name", base)
    assert "this base model is quantised" in error
    for place in (run_dir, run_dir / "checkpoint-5", run_dir / "checkpoint-10"):
        (place / "adapter_model.safetensors").unlink()
    assert "this run has no adapter" in refusal(capsys, run_dir, tmp_path / "merged")


def test_the_precision_depends_on_the_free_memory_and_too_little_of_it_is_refused(
    run_dir, tiny_policy, tmp_path, capsys, monkeypatch
):
    memory = psutil.virtual_memory()
    weights = load_file(Path(tiny_policy) / "model.safetensors").values()
    float32_bytes = 4 * sum(weight.numel() for weight in weights)

    def set_free_memory(free: float) -> None:
        available = memory._replace(available=int(free))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: available)

    for share, dtype in ((1.3, "float32"), (1.2, "bfloat16"), (0.7, "bfloat16")):
        set_free_memory(share * float32_bytes)
        placement = export.choose_placement(
            find_saved(str(run_dir)), tmp_path / "merged", "bfloat16"
        )
        assert placement == export.Placement(dtype, "cpu")
    set_free_memory(1_000)
    assert "billion parameters in bfloat16 need" in refusal(capsys, run_dir, tmp_path / "merged")
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 1_000))
    assert "the disk has 0.0 GiB free" in refusal(capsys, run_dir, tmp_path / "merged")


# ---- the hub


class FakeApi:
    """Stands for the hub: it records all calls, and fails in the method `fails`."""

    def __init__(self):
        self.calls, self.fails = [], ""

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            if name == self.fails:
                raise OSError("the line is dead")
            return "https://huggingface.co/me/mine"

        return call


@pytest.fixture
def api(monkeypatch):
    import huggingface_hub

    fake = FakeApi()
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda *args, **kwargs: fake)
    return fake


def test_without_push_the_hub_is_not_called(run_dir, tmp_path, capsys, api):
    assert run(capsys, run_dir, tmp_path / "merged")[0] == 0
    assert api.calls == []


def test_a_push_checks_the_login_and_uploads_to_a_private_repository(
    run_dir, tmp_path, capsys, api
):
    code, out, _ = run(capsys, run_dir, tmp_path / "merged", "--push", "me/mine")
    assert code == 0 and out.endswith("Pushed to: https://huggingface.co/me/mine\n")
    login, create, upload = api.calls
    assert [login[0], create[0], upload[0]] == ["whoami", "create_repo", "upload_folder"]
    assert create[1:] == (("me/mine",), {"private": True, "exist_ok": True})
    assert upload[2]["folder_path"] == tmp_path / "merged"
    # The recipe names folders of this machine.
    assert upload[2]["ignore_patterns"] == ["recipe.yaml"]


def test_a_push_that_fails_leaves_the_merged_model(run_dir, tmp_path, capsys, api):
    api.fails = "upload_folder"
    code, _, errors = run(capsys, run_dir, tmp_path / "merged", "--push", "me/mine")
    assert code == 2 and "cannot be pushed to (the line is dead)" in errors
    assert (tmp_path / "merged/config.json").is_file()


def test_a_push_that_cannot_work_is_refused_before_merging(run_dir, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    error = refusal(capsys, run_dir, tmp_path / "merged", "--push", "no name/at/all")
    assert "is not a name on the hub" in error
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    error = refusal(capsys, run_dir, tmp_path / "merged", "--push", "me/mine")
    assert "there is no login to the hub; run `hf auth login`" in error
