"""A merged model on disk computes what base model and adapter compute, or it is not left there."""

# ruff: noqa: F401, F811 (fixtures are imported by name and then requested as arguments)

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_saved import run_dir, save_adapter, whole_run
from transformers import AutoModelForCausalLM, AutoTokenizer

import export_model
import train_model
from gtpo.models import export, fidelity
from gtpo.models.saved import find_saved

TEXT = "s:Add.\nu:How many are left?\na:seven"


def run(capsys, *words) -> tuple[int, str, str]:
    code = export_model.main([str(word) for word in words])
    return code, *capsys.readouterr()


def refusal(capsys, *words) -> str:
    """What an export that fails says; nothing may be left beside OUT."""
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
    weights = {
        name: tensor * (factor if "lora_B" in name else 1)
        for name, tensor in load_file(file).items()
    }
    save_file(weights, file)


# ---- merged


@pytest.mark.parametrize(
    "dtype, bound", [("bfloat16", 0.03), ("float16", 0.004), ("float32", 1e-5)]
)
def test_the_merged_model_is_plain_transformers_and_computes_what_base_and_adapter_do(
    run_dir, tiny_policy, tmp_path, capsys, dtype, bound
):
    code, out, _ = run(capsys, run_dir, tmp_path / "merged", "--dtype", dtype)
    assert code == 0 and out.endswith(f"Merged model: {tmp_path / 'merged'}\n")
    files = {file.name for file in (tmp_path / "merged").iterdir()}
    assert files == {
        "README.md",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert {
        str(tensor.dtype) for tensor in load_file(tmp_path / "merged/model.safetensors").values()
    } == {f"torch.{dtype}"}

    merged = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), tmp_path / "merged")
    base = AutoModelForCausalLM.from_pretrained(tiny_policy)
    untrained = logits(base, run_dir)
    adapted = logits(PeftModel.from_pretrained(base, run_dir), run_dir)
    assert (
        (merged - adapted).norm() / adapted.norm()
        < bound
        < 0.1
        < (untrained - adapted).norm() / adapted.norm()
    )
    saved = find_saved(str(tmp_path / "merged"))
    assert (saved.kind, saved.adapter, saved.base) == ("base", None, str(tmp_path / "merged"))
    # asked as in training
    assert (
        saved.recipe.dataset == find_saved(str(run_dir)).recipe.dataset
        and not saved.section.load_in_4bit
    )


def test_a_checkpoint_and_a_plain_adapter_are_merged_too(run_dir, tiny_policy, tmp_path, capsys):
    assert run(capsys, run_dir / "checkpoint-5", tmp_path / "a")[0] == 0
    adapter = save_adapter(tmp_path / "adapter", tiny_policy)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "/gone/model"})
    )
    assert "base model: there is no folder '/gone/model'" in refusal(
        capsys, adapter, tmp_path / "b"
    )
    assert run(capsys, adapter, tmp_path / "b", "--model-name", tiny_policy)[0] == 0


def test_a_base_model_whose_generation_settings_contradict_each_other_is_merged(
    run_dir, tiny_policy, tmp_path, capsys
):
    base = Path(shutil.copytree(tiny_policy, tmp_path / "base"))
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(
        json.dumps({**settings, "do_sample": False, "temperature": 0.6, "top_p": 0.9})
    )
    assert run(capsys, run_dir, tmp_path / "merged", "--model-name", base)[0] == 0
    merged = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert merged["eos_token_id"] == settings["eos_token_id"] and "temperature" not in merged


def test_train_model_exports_too(run_dir, tmp_path, capsys):
    assert train_model.main(["--export", str(run_dir), str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged/config.json").is_file()


def test_an_untrained_adapter_is_merged_and_said_to_change_nothing(run_dir, tmp_path, capsys):
    scale_adapter(run_dir, 0.0)
    code, out, _ = run(capsys, run_dir, tmp_path / "merged")
    assert code == 0 and "the adapter changes nothing (it is untrained)" in out


def test_texts_are_the_runs_own_completions_where_there_are_any(run_dir, caplog):
    saved, tokenizer = find_saved(str(run_dir / "checkpoint-5")), tiny.tiny_tokenizer()
    texts, whence = export.sample_texts(saved, tokenizer)
    assert whence == "6 fixed texts" and tokenizer.decode(texts[0][0]) == "u:What is 12 + 30?\na:"
    rows = [
        {"prompt": [{"role": "user", "content": f"{i // 2}+1="}], "completion": f"{i}^"}
        for i in range(40)
    ]
    lines = ["[1]", *map(json.dumps, rows), '{"prompt": "cut']
    (run_dir / "completions.jsonl").write_text("\n".join(lines))
    texts, whence = export.sample_texts(saved, tokenizer)
    assert (
        whence == "8 of the run's completions" and tokenizer.decode(texts[1][0]) == "u:1+1=\na:2^"
    )


# ---- beyond rounding


def test_a_merge_without_the_adapter_is_refused(run_dir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "merge_adapter", lambda model: model.unload())
    assert "the merge is wrong, so use the adapter itself; nothing was kept" in refusal(
        capsys, run_dir, tmp_path / "merged"
    )


@pytest.mark.parametrize("dtype", export.DTYPES)
def test_a_merge_that_leaves_one_layer_out_is_refused(
    run_dir, tmp_path, capsys, monkeypatch, dtype
):
    def all_but_one(model):
        torch.nn.init.zeros_(
            model.get_submodule(
                "base_model.model.model.layers.1.mlp.down_proj.lora_B.default"
            ).weight
        )
        return model.merge_and_unload()

    monkeypatch.setattr(export, "merge_adapter", all_but_one)
    assert "before any rounding, " in refusal(
        capsys, run_dir, tmp_path / "merged", "--dtype", dtype
    )


def test_an_adapter_on_tied_embeddings_which_peft_adds_to_the_output_too_is_refused(
    tmp_path, capsys
):
    from peft import LoraConfig, get_peft_model

    tokenizer = tiny.tiny_tokenizer()
    config = tiny.tiny_model(tokenizer).config
    config.tie_word_embeddings = True
    model = type(tiny.tiny_model(tokenizer))(config)
    for place in ("base", "adapter"):
        tokenizer.save_pretrained(tmp_path / place)
    model.save_pretrained(tmp_path / "base")
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        LoraConfig(target_modules=["embed_tokens"]),
    )
    torch.nn.init.normal_(
        model.get_submodule("base_model.model.model.embed_tokens.lora_embedding_A")["default"]
    )
    model.save_pretrained(tmp_path / "adapter")
    assert "the merge is wrong" in refusal(capsys, tmp_path / "adapter", tmp_path / "merged")


def test_what_gets_lost_between_saving_and_loading_is_refused(
    run_dir, tmp_path, capsys, monkeypatch
):
    save = export.save_model

    def save_without_a_norm(model, folder, dtype):
        save(model, folder, dtype)
        weights = load_file(folder / "model.safetensors")
        del weights["model.norm.weight"]  # transformers makes a new one and warns
        save_file(
            {
                name: tensor * 0.9 if "lm_head" in name else tensor
                for name, tensor in weights.items()
            },
            folder / "model.safetensors",
            metadata={"format": "pt"},
        )

    monkeypatch.setattr(export, "save_model", save_without_a_norm)
    assert "the merge is wrong" in refusal(capsys, run_dir, tmp_path / "merged")


def test_a_layer_that_is_lost_on_the_way_is_found_without_the_room_for_float32_too(
    run_dir, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(export, "choose_placement", lambda *_: export.Placement("bfloat16", "cpu"))
    assert run(capsys, run_dir, tmp_path / "a")[0] == 0
    monkeypatch.setattr(export, "merge_adapter", lambda model: model.unload())
    assert "rounding to bfloat16 explains" in refusal(capsys, run_dir, tmp_path / "b")


def test_an_adapter_that_rounding_would_swallow_is_refused_with_a_finer_type(
    run_dir, tmp_path, capsys
):
    scale_adapter(run_dir, 1e-4)
    refused = refusal(capsys, run_dir, tmp_path / "merged")
    assert (
        "of what the adapter changes is left in bfloat16" in refused
        and "--dtype float16 or float32" in refused
    )
    assert run(capsys, run_dir, tmp_path / "merged", "--dtype", "float32")[0] == 0


def test_an_adapter_that_is_not_finite_is_refused(run_dir, tmp_path, capsys):
    scale_adapter(run_dir, float("nan"))
    assert "the adapter cannot be merged (NaNs detected" in refusal(
        capsys, run_dir, tmp_path / "merged"
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_moving_weights_does_to_the_logits_what_rounding_them_does(dtype):
    tokenizer = tiny.tiny_tokenizer()
    texts = [
        tokenizer(text, return_tensors="pt")["input_ids"]
        for text in ("one and two", "three, four and five", TEXT)
    ]
    for seed in range(3):
        expected = fidelity.reference_logits(
            tiny.with_lora(tiny.tiny_model(tokenizer, seed), seed=seed), texts, dtype
        )
        merged = (
            tiny.with_lora(tiny.tiny_model(tokenizer, seed), seed=seed)
            .merge_and_unload()
            .to(dtype)
            .float()
        )
        found = fidelity.compare(expected, merged, texts)
        assert 1 / 3 < found.difference / found.rounding < 2
        assert found.kept == pytest.approx(1, abs=0.02) and found.defect("any") is None


# ---- refused before anything is loaded


def test_what_is_there_already_is_not_overwritten(run_dir, tmp_path, capsys):
    (tmp_path / "merged").mkdir()
    assert "it exists already and is not overwritten" in refusal(
        capsys, run_dir, tmp_path / "merged"
    )


def test_what_cannot_be_merged_is_refused(run_dir, tiny_policy, tmp_path, capsys):
    assert "it is a base model" in refusal(capsys, tiny_policy, tmp_path / "merged")
    assert "there is no folder" in refusal(capsys, tmp_path / "absent", tmp_path / "merged")
    base = Path(shutil.copytree(tiny_policy, tmp_path / "base"))
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps(
            {
                **config,
                "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True},
            }
        )
    )
    assert "this base model is quantised" in refusal(
        capsys, run_dir, tmp_path / "merged", "--model-name", base
    )
    for place in (run_dir, run_dir / "checkpoint-5", run_dir / "checkpoint-10"):
        (place / "adapter_model.safetensors").unlink()
    assert "this run has no adapter" in refusal(capsys, run_dir, tmp_path / "merged")


def test_a_machine_without_room_is_told_how_much_is_missing(
    run_dir, tiny_policy, tmp_path, capsys, monkeypatch
):
    import psutil

    room, needed = (
        psutil.virtual_memory(),
        4 * sum(w.numel() for w in load_file(Path(tiny_policy) / "model.safetensors").values()),
    )
    for share, computing in ((1.3, "float32"), (1.2, "bfloat16"), (0.7, "bfloat16")):
        monkeypatch.setattr(
            psutil,
            "virtual_memory",
            lambda share=share: room._replace(available=int(share * needed)),
        )
        assert export.choose_placement(
            find_saved(str(run_dir)), tmp_path / "merged", "bfloat16"
        ) == export.Placement(computing, "cpu")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: room._replace(available=1_000))
    assert "billion parameters in bfloat16 need" in refusal(capsys, run_dir, tmp_path / "merged")
    monkeypatch.undo()
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(0, 0, 1_000))
    assert "the disk has 0.0 GiB free" in refusal(capsys, run_dir, tmp_path / "merged")


# ---- the hub


class FakeApi:
    """Keeps what is asked of the hub."""

    calls: list = []

    def __init__(self, fails: str = ""):
        self.fails = fails

    def __getattr__(self, name):
        def call(*args, **kwargs):
            FakeApi.calls.append((name, args, kwargs))
            if name == self.fails:
                raise OSError("the line is dead")
            return "https://huggingface.co/me/mine"

        return call


@pytest.fixture
def api(monkeypatch):
    import huggingface_hub

    fake = FakeApi()
    monkeypatch.setattr(FakeApi, "calls", [])
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda *args, **kwargs: fake)
    return fake


def test_nothing_is_asked_of_the_hub_unasked(run_dir, tmp_path, capsys, api):
    assert run(capsys, run_dir, tmp_path / "merged")[0] == 0
    assert FakeApi.calls == []


def test_a_push_looks_first_then_uploads_to_a_private_repository(run_dir, tmp_path, capsys, api):
    code, out, _ = run(capsys, run_dir, tmp_path / "merged", "--push", "me/mine")
    assert code == 0 and out.endswith("Pushed to: https://huggingface.co/me/mine\n")
    assert [name for name, _, _ in FakeApi.calls] == ["whoami", "create_repo", "upload_folder"]
    assert FakeApi.calls[1][1:] == (("me/mine",), {"private": True, "exist_ok": True})
    assert FakeApi.calls[2][2]["folder_path"] == tmp_path / "merged"
    # folders of this machine are in it
    assert FakeApi.calls[2][2]["ignore_patterns"] == ["recipe.yaml"]


def test_a_push_that_fails_leaves_the_merged_model(run_dir, tmp_path, capsys, api):
    api.fails = "upload_folder"
    code, _, errors = run(capsys, run_dir, tmp_path / "merged", "--push", "me/mine")
    assert (
        code == 2
        and "cannot be pushed to (the line is dead)" in errors
        and (tmp_path / "merged/config.json").is_file()
    )


def test_a_push_that_cannot_work_is_refused_before_merging(run_dir, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    assert "is not a name on the hub" in refusal(
        capsys, run_dir, tmp_path / "merged", "--push", "no name/at/all"
    )
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    assert "there is no login to the hub; run `hf auth login`" in refusal(
        capsys, run_dir, tmp_path / "merged", "--push", "me/mine"
    )
