"""The model cards of runs and merged models: the method, the numbers, and nothing private."""

import json
import re
from types import SimpleNamespace

import pytest
from conftest import ROOT
from demo_run import demo_flags, run_dir
from huggingface_hub import ModelCard
from run_on_disk import write_evaluation

import export_model
import train_model
from custom_trainer.original import UnslothGRPOTrainer
from custom_trainer.released import ReleasedGTPOTrainer
from gtpo.gtpo_training import UnslothGTPOTrainer
from gtpo.recipe import command_line as cli
from gtpo.report import model_card


class MyTrainer(UnslothGTPOTrainer):
    """A user's variant of GTPO."""


class MyBaseline(UnslothGRPOTrainer):
    """A user's variant of the baseline."""


def card_of(recipe, trainer: type, folder, history=()) -> str:
    made = object.__new__(trainer)  # a card uses its class and its state alone
    made.state = SimpleNamespace(global_step=7, log_history=list(history))
    return model_card.adapter_card(recipe, folder, made)


def recipe_with(*flags: str):
    return cli.read_recipe([str(ROOT / "recipes/gsm8k_qwen3b.yaml"), *flags])


@pytest.mark.slow
def test_a_run_and_each_of_its_checkpoints_have_a_card(here, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "x" * 8)
    held_out = ["--evaluation.path", str(ROOT / "demo/data/test.jsonl"), "--evaluation.limit", "8"]
    secret = ["--env.HF_TOKEN", "hf_secretsecretsecretsecret"]
    assert train_model.main(demo_flags(*held_out, *secret)) == 0
    folder = run_dir(here)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "library_name": "peft",
        "pipeline_tag": "text-generation",
        "tags": ["gtpo", "lora", "trl"],
    }
    assert (
        "**GTPO** (Group-relative Trajectory-based Policy Optimization, [arXiv 2508.03772]"
        in card.text
    )
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    last = [row for row in history if "reward" in row][-1]
    for text in (
        "| reward | " + f"{last['reward']:.4g}",
        "| before | 8 | 1 | 0.0 |",
        "| after | 8 | 1 | 0.0 |",
        "rank 16, alpha 16",
        "threshold 0.7 nats, gamma 0.1, lambda 2.0",
        "local files (`train.jsonl`), split train",
        "| optimizer steps | 2 |",
    ):
        assert text in card.text, text
    early = (folder / "checkpoint-1/README.md").read_text()
    assert "| optimizer steps | 1 |" in early
    assert "GTPO" in early
    assert "More Information Needed" not in early
    assert export_model.main([str(folder), str(here / "merged")]) == 0
    for place in (folder, folder / "checkpoint-2", here / "merged"):
        text = (place / "README.md").read_text()
        for private in ("GRPO", "None", str(ROOT), str(here), "hf_secret", "xxxxxxxx", "HF_TOKEN"):
            assert private not in text, (place, private)

    for place in (folder, here / "merged"):
        (code,) = re.findall(r"```python\n(.*?)```", (place / "README.md").read_text(), re.DOTALL)
        exec(compile(code.replace("FOLDER_OR_REPOSITORY", str(place)), "card", "exec"), {})
    merged = ModelCard.load(here / "merged/README.md")
    assert merged.data.library_name == "transformers"
    assert "| after | 8 |" in merged.text
    assert "rounding alone" in merged.text


# fmt: off
@pytest.mark.parametrize(
    "path, trainer, tag, expected",
    [
        ("gtpo.gtpo_training.UnslothGTPOTrainer", UnslothGTPOTrainer, "gtpo",
         "trained with **GTPO** ("),
        ("custom_trainer.released.ReleasedGTPOTrainer", ReleasedGTPOTrainer, "gtpo",
         "computed as in its authors' released code"),
        ("custom_trainer.original.UnslothGRPOTrainer", UnslothGRPOTrainer, "grpo",
         "trained with **GRPO** ("),
        ("test_model_card.MyTrainer", MyTrainer, "gtpo",
         "by `test_model_card.MyTrainer`, a variant of **GTPO** ("),
        ("test_model_card.MyBaseline", MyBaseline, "grpo",
         "by `test_model_card.MyBaseline`, a variant of **GRPO** ("),
    ],
)
# fmt: on
def test_the_method_is_named(tmp_path, path, trainer, tag, expected):
    text = card_of(recipe_with("--trainer.class_path", path), trainer, tmp_path)
    assert expected in text and ModelCard(text).data.tags[0] == tag
    assert ("gamma 0.1" in text) == (tag == "gtpo")
    if tag == "gtpo":
        assert "GRPO" not in text


def test_only_names_on_the_hub_are_metadata(tmp_path):
    data = ModelCard(card_of(recipe_with(), UnslothGTPOTrainer, tmp_path)).data
    assert (data.base_model, data.base_model_relation) == ("Qwen/Qwen2.5-3B-Instruct", "adapter")
    assert data.datasets == ["openai/gsm8k"]
    for base in (str(tmp_path), "../model", "~/model"):
        local = recipe_with("--model-name", base, "--dataset.path", str(tmp_path / "mine.jsonl"))
        text = card_of(local, UnslothGTPOTrainer, tmp_path)
        data = ModelCard(text).data
        assert data.base_model is None
        assert data.datasets is None
        assert str(tmp_path.parent) not in text


def test_a_merged_variant_has_the_method_of_its_run_s_card(tmp_path):
    recipe = recipe_with("--trainer.class_path", "test_model_card.MyTrainer")
    (tmp_path / "README.md").write_text(card_of(recipe, MyTrainer, tmp_path))
    saved = SimpleNamespace(
        recipe=recipe, base="Qwen/Qwen2.5-3B-Instruct", adapter=tmp_path, run_dir=tmp_path
    )
    text = model_card.merged_card(saved, "bfloat16", "as good as equal")
    assert "a variant of **GTPO**" in text
    assert "Compared with base model and adapter after merging: as good as equal." in text
    assert (
        "The adapter was trained on the base model in 4 bits. It was merged into the base model in"
        " 16 bits and compared with that." in text
    )
    assert ModelCard(text).data.base_model_relation == "finetune"
    (tmp_path / "README.md").unlink()
    text = model_card.merged_card(saved, "bfloat16", "")
    assert "by `test_model_card.MyTrainer`, a trainer that its recipe names" in text


def test_a_merged_checkpoint_has_no_evaluations_of_other_adapters(tmp_path):
    run, evaluations = tmp_path / "run", tmp_path / "run/evaluation"
    for folder, step in ((run, 12), (run / "checkpoint-6", 6)):
        folder.mkdir(exist_ok=True, parents=True)
        state = json.dumps({"global_step": step, "log_history": []})
        (folder / "trainer_state.json").write_text(state)
    for name, header in (
        ("before", {"weights": "step 0"}),
        ("step-6", {"weights": "step 6"}),
        ("after", {"weights": "step 12"}),
        ("base-test", {"adapter": None}),
        ("test", {"adapter": str(run)}),
        ("checkpoint-6-test", {"adapter": str(run / "checkpoint-6")}),
    ):
        write_evaluation(evaluations / f"{name}.jsonl", [[True]], **header)
    listed = {}
    for adapter in (run, run / "checkpoint-6"):
        saved = SimpleNamespace(recipe=recipe_with(), base="a/b", adapter=adapter, run_dir=run)
        text = model_card.merged_card(saved, "bfloat16", "equal")
        listed[adapter.name] = set(re.findall(r"^\| (\S+) \| 1 \| 1 \|", text, re.MULTILINE))
    assert listed == {
        "run": {"before", "after", "test"},
        "checkpoint-6": {"before", "step-6", "checkpoint-6-test"},
    }


def test_an_adapter_without_a_recipe_claims_no_method(tmp_path):
    saved = SimpleNamespace(recipe=None, base="owner/name", adapter=tmp_path, run_dir=None)
    text = model_card.merged_card(saved, "float16", "equal")
    assert "The files do not say how the adapter was trained." in text and "GTPO" not in text
    assert ModelCard(text).data.tags is None


def test_a_damaged_evaluation_is_left_out_with_a_warning(tmp_path, caplog):
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation/after.jsonl").write_text("{\n")
    assert "## Evaluation" not in card_of(recipe_with(), UnslothGTPOTrainer, tmp_path)
    assert "Left out of the model card: " in caplog.text
