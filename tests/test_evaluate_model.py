"""The verb that evaluates: from a trained run, from a base model, from files alone; and a chat in the terminal."""

import io
import json
import shutil
import sys

import pytest
from conftest import ROOT

import evaluate_model
import train_model

DEMO = [str(ROOT / "demo/model"), "--dataset", str(ROOT / "demo/data/test.jsonl"), "--system-instruction", "Reason, then answer.",
        "--max-completion-length", "36", "--limit", "6"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run directory of one step of the demo, without files of evaluations."""
    root = tmp_path_factory.mktemp("runs")
    assert train_model.main([
        str(ROOT / "recipes/demo.yaml"), "--model-name", str(ROOT / "demo/model"), "--dataset.path", str(ROOT / "demo/data/train.jsonl"),
        "--evaluation.path", str(ROOT / "demo/data/test.jsonl"), "--evaluation.limit", "4", "--training.max_steps", "1",
        "--training.per_device_train_batch_size", "8", "--output_root", str(root)]) == 0
    (folder,) = root.glob("demo_*")
    return folder


@pytest.fixture
def run_dir(trained, tmp_path, monkeypatch):
    """A copy of that run, in an empty current folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(trained, tmp_path / "run")


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def refused(capsys, *words: str) -> str:
    assert evaluate_model.main([str(word) for word in words]) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error.strip().splitlines()[-1]


def test_a_run_is_evaluated_on_what_its_recipe_held_out_with_its_base_model_beside_it(run_dir, capsys):
    assert evaluate_model.main([str(run_dir), "--samples", "2", "--base"]) == 0
    out = capsys.readouterr().out
    for text in ("accuracy", "pass@2", "maj@2", "format rate", "truncated", "mean length", "difference", "95 % bootstrap intervals"):
        assert text in out, text
    head, *rows = lines(run_dir / "evaluation/test-4x2-t1.jsonl")
    base_head, *base_rows = lines(run_dir / "evaluation/base-test-4x2-t1.jsonl")
    assert head["header"]["prompts"] == base_head["header"]["prompts"] and head["header"]["seed"] == base_head["header"]["seed"]
    assert head["header"]["weights"] != base_head["header"]["weights"]
    assert sorted((row["problem"], row["sample"]) for row in rows) == [(p, s) for p in range(4) for s in range(2)]
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in base_rows]
    assert rows[0]["prompt"][0] == {"role": "system", "content": "Reason, then answer."}  # the recipe's


def test_a_checkpoint_is_evaluated_into_a_file_of_its_own(run_dir, capsys):
    assert evaluate_model.main([str(run_dir / "checkpoint-1"), "--limit", "2"]) == 0
    assert (run_dir / "evaluation/checkpoint-1-test-2x1-t0.jsonl").is_file()


def test_the_numbers_come_from_the_file_alone(run_dir, capsys, monkeypatch):
    assert evaluate_model.main([*DEMO, "--samples", "2", "--to", "drawn.jsonl"]) == 0
    drawn = capsys.readouterr().out.split("base\n", 1)[1].split("[95")[0]
    monkeypatch.setattr("gtpo.saved.load_saved", None)  # there is no model
    assert evaluate_model.main(["--from", "drawn.jsonl"]) == 0
    again = capsys.readouterr().out.split("drawn.jsonl\n", 1)[1].split("[95")[0]
    assert [line.split() for line in drawn.splitlines()] == [line.split() for line in again.splitlines()]


def test_an_interrupted_evaluation_goes_on_where_it_stopped(run_dir, capsys, monkeypatch):
    from gtpo import evaluation

    words = [*DEMO, "--samples", "2", "--batch-size", "4"]
    assert evaluate_model.main([*words, "--to", "whole.jsonl"]) == 0
    whole, draw, calls = lines(run_dir.parent / "whole.jsonl"), evaluation._draw, []

    def interrupted(*batch):
        calls.append(batch)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(*batch)

    monkeypatch.setattr(evaluation, "_draw", interrupted)
    assert evaluate_model.main([*words, "--to", "parts.jsonl"]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err
    parts = run_dir.parent / "parts.jsonl"
    kept = parts.read_bytes()
    assert len(lines(parts)) == 1 + 4
    parts.write_bytes(kept[:-9])  # and the last line was cut
    assert evaluate_model.main([*words, "--to", "parts.jsonl"]) == 0
    assert "going on after 3 completions, the last line was cut" in capsys.readouterr().err

    def by_place(rows):
        return {(row["problem"], row["sample"]): row for row in rows[1:]}

    assert by_place(lines(parts)) == by_place(whole)
    assert len(calls) > 2


def test_a_complete_evaluation_is_not_drawn_again_unless_told_to(run_dir, capsys, monkeypatch):
    from gtpo import evaluation

    assert evaluate_model.main([*DEMO, "--limit", "2", "--to", "a.jsonl"]) == 0
    first = (run_dir.parent / "a.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "_draw", None)
        assert evaluate_model.main([*DEMO, "--limit", "2", "--to", "a.jsonl"]) == 0
    assert "is complete: nothing is drawn again" in capsys.readouterr().err
    assert evaluate_model.main([*DEMO, "--limit", "2", "--to", "a.jsonl", "--overwrite"]) == 0
    assert (run_dir.parent / "a.jsonl").read_bytes() == first  # greedy: the same once more


def test_integer_answers_are_compared_as_numbers_zero_padding_or_not(tmp_path, monkeypatch, capsys):
    from gtpo.generation import Completion

    monkeypatch.chdir(tmp_path)
    (tmp_path / "aime.jsonl").write_text('{"Problem": "2 x 36.5?", "Answer": "073"}\n{"Problem": "5?", "Answer": 5}\n')
    answers = {"2 x 36.5?": "73", "5?": "005"}
    monkeypatch.setattr("gtpo.engines.Engine.samplers", lambda *_: lambda adapter: lambda prompts, seeds: [
        Completion(f"<reasoning>\n\n</reasoning>\n<answer>{next(a for q, a in answers.items() if q in p)}</answer>", 9, False)
        for p in prompts])
    words = [str(ROOT / "demo/model"), "--dataset", "aime.jsonl", "--question-column", "Problem", "--answer-column", "Answer"]
    assert evaluate_model.main(words) == 0
    assert "accuracy      100.0 %" in capsys.readouterr().out


@pytest.mark.parametrize("dataset", ["gsm8k", "hendrycks_math"])
def test_real_sets_are_evaluated_from_local_files(dataset, shared_data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert evaluate_model.main([str(ROOT / "demo/model"), "--dataset", dataset, "--path", str(shared_data / dataset), "--limit", "2",
                                "--max-completion-length", "4"]) == 0
    (file,) = (tmp_path / "evaluation").iterdir()
    assert file.name.startswith(f"model-{dataset}-") and len(lines(file)) == 3


@pytest.mark.parametrize(("words", "sentence"), [
    (["no/such/folder"], "there is no folder 'no/such/folder'"),
    ([], "RUN_DIR_OR_MODEL: missing"),
    ([str(ROOT / "demo/model"), "--dataset", "gsm9k"], "--dataset: 'gsm9k' is not known; use gsm8k"),
    ([str(ROOT / "demo/model"), "--dataset", "gone.jsonl"], "gone.jsonl"),
    ([str(ROOT / "demo/model")], "--dataset: a model alone names no problems"),
    ([*DEMO, "--k", "8", "--samples", "4"], "--k: 8 is more than the 4 samples of each problem"),
    ([*DEMO, "--samples", "4", "--temperature", "0"], "--temperature: 0 is greedy"),
    ([*DEMO, "--samples", "0"], "'0' is not valid"),
    ([*DEMO, "--sample", "4"], "--sample: unknown; did you mean --samples?"),
    ([*DEMO, "--base"], "is a base model itself"),
    ([*DEMO, "--backend", "vllm"], "--backend: vllm cannot be used here, no NVIDIA GPU is visible"),
    ([*DEMO, "--max-completion-length", "99999"], "more than the 8192 of context"),
    (["--from", "gone.jsonl"], "gone.jsonl: cannot be read"),
    ([str(ROOT / "demo/data"), "--limit", "1"], "give a run directory, a checkpoint, an adapter or a base model"),
])
def test_what_cannot_be_done_is_one_sentence(words, sentence, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert sentence in refused(capsys, *words)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_a_run_without_an_adapter_and_a_base_model_that_does_not_fit_are_refused(run_dir, capsys):
    import tiny

    shutil.rmtree(run_dir / "checkpoint-1")
    weights = (run_dir / "adapter_model.safetensors").read_bytes()
    (run_dir / "adapter_model.safetensors").unlink()
    assert "adapter" in refused(capsys, run_dir)
    (run_dir / "adapter_model.safetensors").write_bytes(weights)
    other = tiny.save_tiny_policy(run_dir.parent / "other")
    for name in ("recipe.yaml", "adapter_config.json"):
        text = (run_dir / name).read_text().replace(str(ROOT / "demo/model"), other)
        (run_dir / name).write_text(text)
    assert "does not fit the base model" in refused(capsys, run_dir)


def test_a_file_that_is_no_evaluation_is_never_overwritten(run_dir, capsys):
    mine = run_dir.parent / "mine.jsonl"
    mine.write_text('{"not": "an evaluation"}\n')
    for more in ([], ["--overwrite"]):
        assert "mine.jsonl" in refused(capsys, *DEMO, "--to", "mine.jsonl", *more)
    assert mine.read_text() == '{"not": "an evaluation"}\n'


def chat(monkeypatch, text: str, *words: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    assert evaluate_model.main([*map(str, words), "--chat"]) == 0


def test_a_chat_answers_with_the_trained_policy_and_keeps_the_conversation(run_dir, capsys, monkeypatch):
    chat(monkeypatch, "Ann has 3 apples and gets 4 more. How many apples does Ann have now?\n", run_dir, "--temperature", "0")
    once = capsys.readouterr().out
    assert "<reasoning>" in once and "</answer>" in once
    greedy = (run_dir, "--temperature", "0", "--max-completion-length", "8")
    question = "Ann has 3 apples and gets 4 more."
    chat(monkeypatch, f"{question}\n/exit\nnever read\n", *greedy)
    once, err = capsys.readouterr()
    assert "(cut after 8 tokens)" in err and "never read" not in once
    chat(monkeypatch, f"{question}\n/reset\n{question}\n", *greedy)
    assert once.split() and capsys.readouterr().out.split() == 2 * once.split()
    asked = []
    template = type(tokenizer_of(run_dir)).apply_chat_template
    monkeypatch.setattr(type(tokenizer_of(run_dir)), "apply_chat_template", lambda self, messages, **keys: (
        asked.append([message["role"] for message in messages]), template(self, messages, **keys))[1])
    chat(monkeypatch, f"{question}\n{question}\n", *greedy)
    assert asked[-2:] == [["system", "user"], ["system", "user", "assistant", "user"]]


def tokenizer_of(run_dir):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(run_dir)


def test_a_chat_says_when_the_conversation_is_too_long(run_dir, capsys, monkeypatch):
    chat(monkeypatch, f"{'9 ' * 9000}\n/nothing\n", run_dir)
    error = capsys.readouterr().err
    assert "say less, or /reset" in error and "there is no /nothing" in error
