"""`evaluate_model.py` on a run of the demo, its checkpoint and its base model, and its errors."""

import io
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from conftest import ROOT

import evaluate_model
import train_model
from gtpo.evaluation import file as evaluation_file
from gtpo.models import generation

pytestmark = pytest.mark.slow  # trains

TEST = str(ROOT / "demo/data/test.jsonl")
BASE = str(ROOT / "demo/model")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run of the demo, twelve steps long, in a folder of its own."""
    root = tmp_path_factory.mktemp("trained")
    flags = [
        *("--model-name", BASE, "--dataset.path", str(ROOT / "demo/data/train.jsonl")),
        *("--evaluation.path", TEST, "--evaluation.limit", "40", "--output_root", str(root)),
        *("--training.max_steps", "12", "--training.save_steps", "6"),
    ]
    assert train_model.main([str(ROOT / "recipes/demo.yaml"), *flags]) == 0
    (folder,) = root.iterdir()
    return folder


@pytest.fixture
def run_dir(trained, tmp_path, monkeypatch) -> str:
    """A copy of that run in the current folder."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(trained, tmp_path / "run").name


def evaluate(capsys, *flags: str) -> str:
    assert evaluate_model.main([str(flag) for flag in flags]) == 0
    return capsys.readouterr().out


def error_of(capsys, *flags: str) -> str:
    assert evaluate_model.main([str(flag) for flag in flags]) == 2
    captured = capsys.readouterr()
    (sentence,) = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert captured.out == "" and "Traceback" not in captured.err
    return sentence


def contents(folder: Path) -> dict:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- evaluations


def test_a_run_is_evaluated_on_its_held_out_problems_beside_its_base_model(run_dir, capsys):
    out = evaluate(capsys, run_dir, "--k", "1", "4", "--base")
    rates = ("accuracy", "pass@1", "pass@4", "maj@1", "maj@4", "format rate", "truncated")
    for name in (*rates, "mean length"):
        assert f"\n{name} " in out
    # evaluation.limit is 40, and the training's temperature is 1
    assert "40 problems x 4, temperature 1, seed 3407" in out
    for title in ("trained", "base", "difference"):
        assert title in out
    trained, base = (
        evaluation_file.read_evaluation(Path(run_dir, f"evaluation/{name}test-40x4-t1.jsonl"))
        for name in ("", "base-")
    )
    ours, theirs = (sum(row["correct"] for row in e.rows) / 160 for e in (trained, base))
    assert len(trained.rows) == 160
    assert ours > theirs + 0.1  # it learnt
    assert f"{100 * ours:.1f} % [" in out
    assert f"{100 * theirs:.1f} % [" in out
    assert f"+{100 * (ours - theirs):.1f} % [+" in out
    assert trained.header["adapter"] == run_dir
    assert base.header["adapter"] is None
    assert trained.header["prompts"] == base.header["prompts"]
    assert trained.header["weights"] != base.header["weights"]


def test_by_default_a_run_gets_one_greedy_sample_as_in_the_evaluation_after_training(
    run_dir, capsys
):
    out = evaluate(capsys, run_dir)
    rows = evaluation_file.read_evaluation(Path(run_dir, "evaluation/test-40x1-t0.jsonl")).rows
    assert rows == evaluation_file.read_evaluation(Path(run_dir, "evaluation/after.jsonl")).rows
    assert "pass@" not in out and "\nCompletions: run/evaluation/test-40x1-t0.jsonl" in out


def test_the_same_command_and_from_print_the_same_scores_without_a_model(
    run_dir, capsys, monkeypatch
):
    first = evaluate(capsys, run_dir, "--samples", "3", "--limit", "8")
    monkeypatch.setattr("gtpo.evaluation.engines.load_saved", None)  # no model can be loaded
    assert evaluate_model.main([run_dir, "--samples", "3", "--limit", "8"]) == 0
    again = capsys.readouterr()
    assert again.out == first and "is complete, so nothing is drawn" in again.err
    alone = evaluate(capsys, "--from", f"{run_dir}/evaluation/test-8x3-t1.jsonl")
    assert alone.splitlines()[2:] == [
        line for line in first.splitlines()[2:] if not line.startswith("Completions")
    ]


def test_an_interrupted_evaluation_continues_where_it_stopped(run_dir, capsys, monkeypatch):
    flags = [run_dir, "--samples", "2", "--limit", "10", "--batch-size", "5"]
    whole = evaluate(capsys, *flags, "--to", "whole.jsonl")
    drawn, policy_sampler = [], generation.policy_sampler

    def interrupted_once(policy, sampling, **options):
        sampler = policy_sampler(policy, sampling, **options)

        def sample(prompts, seeds):
            if len(drawn) == 10:
                drawn.append(None)
                raise KeyboardInterrupt
            drawn.extend(seeds)
            return sampler(prompts, seeds)

        return sample

    monkeypatch.setattr("gtpo.evaluation.engines.policy_sampler", interrupted_once)
    assert evaluate_model.main(flags) == 130
    assert (
        "interrupted: drawn completions are kept; the same command continues"
        in capsys.readouterr().err
    )
    assert evaluate_model.main(flags) == 0
    printed = capsys.readouterr()
    assert "continuing after 10 completions" in printed.err
    assert printed.out.splitlines()[1:-1] == whole.splitlines()[1:-1]
    file = Path(run_dir, "evaluation/test-10x2-t1.jsonl")
    assert file.read_bytes() == Path("whole.jsonl").read_bytes()
    assert len(drawn) - 1 == len(set(drawn) - {None}) == 20


def test_a_single_file_is_every_split_and_takes_slices(run_dir, capsys):
    for split, file in (("test[:5]", "first.jsonl"), ("train[3:8]", "others.jsonl")):
        out = evaluate(capsys, run_dir, "--split", split, "--to", file)
        assert "5 problems x 1" in out
    rows = [
        sorted(evaluation_file.read_evaluation(Path(name)).rows, key=lambda row: row["problem"])
        for name in ("first.jsonl", "others.jsonl")
    ]
    first, others = ([row["prompt"] for row in own] for own in rows)
    assert first[3:] == others[:2] and not set(map(str, first[:3])) & set(map(str, others))


def test_an_adapter_with_another_config_counts_as_other_weights(run_dir, capsys):
    shutil.copytree(
        f"{run_dir}/checkpoint-12", "adapter", ignore=shutil.ignore_patterns("optimizer*")
    )
    flags = ["adapter", "--dataset", TEST, "--limit", "4", "--to", "four.jsonl"]
    flags += ["--system-instruction", "Reason, then answer."]
    evaluate(capsys, *flags)
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    config["lora_alpha"] *= 4
    Path("adapter/adapter_config.json").write_text(json.dumps(config))
    assert "four.jsonl: holds an evaluation with other weights" in error_of(capsys, *flags)


@pytest.mark.parametrize("damage", [{"temperature": "hot"}, {"prompts": [1]}, {"seed": None}])
def test_a_header_with_a_value_of_the_wrong_type_is_refused(run_dir, capsys, damage):
    lines = Path(run_dir, "evaluation/after.jsonl").read_text().splitlines(keepends=True)
    header = json.loads(lines[0])["header"]
    Path("damaged.jsonl").write_text(
        "".join([json.dumps({"header": {**header, **damage}}) + "\n", *lines[1:]])
    )
    assert "damaged.jsonl: the first line is not the header of an evaluation" in error_of(
        capsys, "--from", "damaged.jsonl"
    )


def test_a_line_that_is_nested_too_deeply_is_damage(run_dir, capsys):
    lines = Path(run_dir, "evaluation/after.jsonl").read_text().splitlines(keepends=True)
    Path("deep.jsonl").write_text("".join([lines[0], "[" * 200_000 + "\n", *lines[1:]]))
    assert "deep.jsonl, line 2: this is not a completion; the file is damaged" in error_of(
        capsys, "--from", "deep.jsonl"
    )


def test_a_file_with_an_incomplete_last_line_is_refused_by_from_and_continued_by_its_command(
    run_dir, capsys
):
    flags = [run_dir, "--limit", "6"]
    whole = evaluate(capsys, *flags)
    file = Path(run_dir, "evaluation/test-6x1-t0.jsonl")
    content = file.read_bytes()
    file.write_bytes(content[:-40])
    assert (
        "test-6x1-t0.jsonl: its last line is incomplete; run the command that wrote the file again"
        in error_of(capsys, "--from", file)
    )
    assert file.read_bytes() == content[:-40]  # reading changes nothing
    assert evaluate_model.main(flags) == 0
    again = capsys.readouterr()
    assert "continuing after 5 completions; the last line was incomplete" in again.err
    assert again.out == whole
    assert file.read_bytes() == content


def test_a_checkpoint_an_adapter_and_a_base_model_have_evaluation_files_of_their_own(
    run_dir, capsys
):
    evaluate(capsys, f"{run_dir}/checkpoint-6", "--limit", "4")
    assert Path(run_dir, "evaluation/checkpoint-6-test-4x1-t0.jsonl").is_file()
    shutil.move(f"{run_dir}/checkpoint-12", "adapter")
    flags = ["--dataset", TEST, "--limit", "4", "--system-instruction", "Reason, then answer."]
    evaluate(capsys, "adapter", *flags, "--base")
    out = evaluate(capsys, BASE, *flags)
    assert "\n              model\n" in out and "trained" not in out
    names = sorted(path.name for path in Path("evaluation").iterdir())
    assert names == [
        "adapter-test-4x1-t0.jsonl",
        "base-adapter-test-4x1-t0.jsonl",
        "model-test-4x1-t0.jsonl",
    ]
    base, alone = (evaluation_file.read_evaluation(Path("evaluation", name)) for name in names[1:])
    assert base.rows == alone.rows and base.header["prompts"] == alone.header["prompts"]


def test_other_weights_in_the_same_folder_are_refused_unless_overwrite_is_given(run_dir, capsys):
    evaluate(capsys, run_dir, "--limit", "4")
    file = Path(run_dir, "evaluation/test-4x1-t0.jsonl")
    shutil.copy(f"{run_dir}/checkpoint-6/adapter_model.safetensors", run_dir)
    content = file.read_bytes()
    assert (
        "holds an evaluation with other weights; name another file with --to, or replace this one"
        " with --overwrite" in error_of(capsys, run_dir, "--limit", "4")
    )
    assert file.read_bytes() == content
    evaluate(capsys, run_dir, "--limit", "4", "--overwrite")
    assert file.read_bytes() != content and len(evaluation_file.read_evaluation(file).rows) == 4


def test_integer_answers_with_zero_padding_as_in_aime_are_graded(run_dir, capsys, monkeypatch):
    answers = {"073": "73", "204": "0204", "005": "50"}  # reference -> the model's answer
    rows = [{"problem": f"What is {reference}?", "solution": reference} for reference in answers]
    Path("aime.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def sampler_with_answers(policy, sampling, **options):
        return lambda prompts, seeds: [
            generation.SampledCompletion(
                f"<reasoning>\n\n</reasoning>\n<answer>{answer}</answer>", 9, False
            )
            for prompt in prompts
            for reference, answer in answers.items()
            if f"What is {reference}?" in prompt
        ]

    monkeypatch.setattr("gtpo.evaluation.engines.policy_sampler", sampler_with_answers)
    columns = ["--question-column", "problem", "--answer-column", "solution"]
    flags = ["--dataset", "aime.jsonl", *columns, "--max-prompt-length", "100"]
    out = evaluate(capsys, run_dir, *flags)
    rows = evaluation_file.read_evaluation(Path(run_dir, "evaluation/aime-3x1-t0.jsonl")).rows
    correct = {row["answer"]: row["correct"] for row in rows}
    assert correct == {"73": True, "0204": True, "50": False}
    assert "\naccuracy      66.7 % [" in out


# fmt: off
@pytest.mark.parametrize(
    "flags, problems, name",
    [
        ("--dataset gsm8k --path {data}/gsm8k --split test[:3]", 3, "gsm8k-test-3-3x1-t0"),
        ("--dataset math --path {data}/hendrycks_math --subset algebra --limit 2", 2,
         "hendrycks_math-algebra-test-2x1-t0"),
    ],
)
# fmt: on
def test_gsm8k_and_math_are_evaluated_from_local_folders(
    run_dir, capsys, shared_data, flags, problems, name
):
    flags = [flag.format(data=shared_data) for flag in flags.split()]
    lengths = ["--max-prompt-length", "700", "--max-completion-length", "8"]
    out = evaluate(capsys, run_dir, *flags, *lengths)
    assert f"{problems} problems x 1" in out
    rows = evaluation_file.read_evaluation(Path(run_dir, f"evaluation/{name}.jsonl")).rows
    assert len(rows) == problems and all(row["tokens"] <= 8 for row in rows)


def test_problems_of_a_function_are_evaluated(run_dir, capsys):
    row = {"question": "Tom has 7 coins and gives 1 away. How many?", "answer": "6"}
    Path("my_problems.py").write_text(f"def load():\n    return [{row}]\n")
    assert "1 problems x 1" in evaluate(capsys, run_dir, "--dataset", "my_problems.load")


def test_two_files_are_compared_problem_by_problem(run_dir, capsys):
    before, after, other = (
        f"{run_dir}/evaluation/{name}.jsonl" for name in ("before", "after", "test-3x1-t0")
    )
    out = evaluate(capsys, "--from", after, before)
    assert out.splitlines()[2].split() == ["after", "before", "difference"]
    evaluate(capsys, run_dir, "--limit", "3")
    error = error_of(capsys, "--from", after, other)
    assert "they are of different problems, so they cannot be compared" in error


# ---- chat


def chat(capsys, monkeypatch, lines: str, *flags: str):
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert evaluate_model.main([*flags, "--chat"]) == 0
    return capsys.readouterr()


def test_a_line_with_invalid_bytes_is_answered(run_dir, capsys, monkeypatch):
    flags = [run_dir, "--max-completion-length", "4"]
    assert "\n" in chat(capsys, monkeypatch, "caf\udce9 hi\udcff\n", *flags).out


def test_a_conversation_is_kept_until_it_is_reset(run_dir, capsys, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    conversations, original = [], PreTrainedTokenizerBase.apply_chat_template

    def apply_chat_template(self, messages, **options):
        conversations.append(messages)
        return original(self, messages, **options)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", apply_chat_template)
    question = "Tom has 7 coins and gives 1 away. How many coins does Tom have now?"
    lines = f"{question}\n\nAnd Mia?\n/what\n/reset\n{question}\n/exit\nnever"
    printed = chat(capsys, monkeypatch, lines, run_dir, "--temperature", "0")
    # The template may be asked more than once for a line.
    first, second, third = [messages for messages, _ in itertools.groupby(conversations)][-3:]
    assert [m["role"] for m in first] == ["system", "user"]
    assert first[0]["content"] == "Reason, then answer."
    assert [m["role"] for m in second] == ["system", "user", "assistant", "user"]
    assert second[:2] == first
    assert third == first and "never" not in str(conversations)
    assert printed.out.count("<answer>6</answer>") == 2 and second[2]["content"] in printed.out
    assert "there is no /what; /reset starts a new conversation" in printed.err


def test_a_line_longer_than_the_context_is_refused_and_the_conversation_continues(
    run_dir, capsys, monkeypatch
):
    long = "Tom has 7 coins. " * 900
    lines = f"{long}\nTom has 7 coins and gives 1 away. How many?\n"
    printed = chat(capsys, monkeypatch, lines, run_dir)
    assert (
        "tokens with this line, and the model takes 4096: write less, or use /reset" in printed.err
    )
    assert "<answer>" in printed.out


def test_control_characters_of_the_model_do_not_reach_the_terminal(run_dir, capsys, monkeypatch):
    from transformers import PreTrainedTokenizerBase

    decode = PreTrainedTokenizerBase.decode
    monkeypatch.setattr(
        PreTrainedTokenizerBase,
        "decode",
        lambda self, *args, **options: "\x1b[2J" + decode(self, *args, **options),
    )
    printed = chat(capsys, monkeypatch, "Tom has 7 coins", run_dir)
    assert r"\x1b[2J" in printed.out and "\x1b" not in printed.out


def test_a_truncated_answer_is_marked_and_the_end_of_input_ends_the_chat(
    capsys, monkeypatch, tmp_path
):
    printed = chat(
        capsys,
        monkeypatch,
        "Tom has 7 coins",
        BASE,
        "--max-completion-length",
        "3",
        "--system-instruction",
        "",
    )
    assert "(cut off after 3 tokens)" in printed.err


# ---- errors


# fmt: off
@pytest.mark.parametrize(
    "flags, sentence",
    [
        (["--k", "8", "--samples", "4"],
         "--k: 8 is more than the 4 samples of each problem; use at most 4, or evaluate with more"
         " --samples"),
        (["--samples", "4", "--temperature", "0"],
         "--temperature: 0 is greedy, so all 4 samples of a problem would be the same"),
        (["--dataset", "gsm9k"],
         "--dataset: 'gsm9k' is not known; use gsm8k, hendrycks_math, an existing file or folder,"
         " or a dotted path"),
        (["--dataset", "nowhere.jsonl"], "--dataset: there is no file or folder 'nowhere.jsonl'"),
        (["--dataset", "gsm8k"], "use local files through --path"),
        (["--dataset", "gsm8k", "--path", "nowhere"],
         "--path: there is no file or folder 'nowhere'"),
        (["--chat", "--backend", "vllm"],
         "--backend: vllm cannot chat; use auto, unsloth or transformers"),
        (["--from", "nowhere.jsonl"], "--from: run has no effect here; leave it out"),
        (["--dataset", TEST, "--answer-column", "target"],
         "no column 'target'; this dataset has question, answer (set --question-column and"
         " --answer-column)"),
        (["--max-prompt-length", "3"],
         "--max-prompt-length: 3 drops all 200 prompts; the shortest has"),
        (["--max-completion-length", "9000"],
         "--max-completion-length: prompts of 60 and completions of 9000 tokens exceed the context"
         " of"),
        (["--backend", "vllm"],
         "--backend: vllm cannot be used here, no NVIDIA GPU is visible; use auto or transformers"),
        (["--backend", "unsloth"],
         "--backend: unsloth cannot be used here, no NVIDIA GPU is visible"),
        (["--backend", "tgi"], "--backend: invalid choice: 'tgi'"),
        (["--tempreature", "1"], "--tempreature: unknown; did you mean --temperature?"),
        (["--k", "none"], "--k: 'none' is not valid; use a whole number, 1 or more"),
        (["--top-p", "2"], "--top-p: '2' is not valid; use a number, 1e-06 to 1"),
        (["--temperature", "nan"], "--temperature: 'nan' is not valid"),
        (["again"], "again: unknown; --help lists the flags"),
        (["--to", "run/recipe.yaml", "--overwrite"],
         "run/recipe.yaml: the first line is not the header of an evaluation"),
        (["--chat", "--k", "2"], "--chat: --k has no effect here; leave it out"),
    ],
)
# fmt: on
def test_invalid_flags_are_refused_in_one_sentence_and_nothing_is_written(
    run_dir, capsys, flags, sentence
):
    before = contents(Path())
    assert sentence in error_of(capsys, run_dir, *flags)
    assert contents(Path()) == before


# fmt: off
@pytest.mark.parametrize(
    "flags, sentence",
    [
        ([],
         "RUN_DIR_OR_MODEL: missing; give a run directory, checkpoint, adapter or base model, or"
         " --from FILE"),
        (["./nowhere"], "there is no folder './nowhere'"),
        ([str(ROOT / "recipes")],
         "the folder holds no recipe.yaml, adapter_config.json or config.json"),
        ([BASE],
         "--dataset: a model alone names no problems; use gsm8k, hendrycks_math, or a file with"
         " questions and answers"),
        ([BASE, "--dataset", TEST, "--base"], "is a base model itself; leave it out"),
        (["--from", "nowhere.jsonl"],
         "nowhere.jsonl: cannot be read (No such file or directory); give an evaluation file"),
        (["--from", TEST], "the first line is not the header of an evaluation"),
        (["--from", "run/evaluation/after.jsonl", "--k", "2"],
         "--k: 2 is more than the 1 sample of each problem"),
        (["--from", "run/evaluation/after.jsonl", "--samples", "2"],
         "--from: --samples has no effect here; leave it out"),
    ],
)
# fmt: on
def test_invalid_targets_and_files_are_refused(run_dir, capsys, flags, sentence):
    assert sentence in error_of(capsys, *flags)


def test_a_run_without_an_adapter_is_refused(run_dir, capsys):
    for folder in ("", "checkpoint-6", "checkpoint-12"):
        Path(run_dir, folder, "adapter_model.safetensors").unlink()
    assert "this run has no adapter" in error_of(capsys, run_dir)


def test_a_base_model_that_does_not_fit_the_adapter_is_refused(run_dir, capsys):
    recipe = Path(run_dir, "recipe.yaml")
    other = tiny.save_tiny_policy("other")
    recipe.write_text(recipe.read_text().replace(BASE, other))
    assert "does not fit the base model 'other'" in error_of(capsys, run_dir)


def test_a_damaged_file_is_refused_and_stays_as_it_is(run_dir, capsys):
    evaluate(capsys, run_dir, "--limit", "4")
    file = Path(run_dir, "evaluation/test-4x1-t0.jsonl")
    lines = file.read_text().splitlines()
    file.write_text("\n".join([*lines[:2], lines[2][:30], *lines[3:]]))
    damaged = file.read_bytes()
    for flags in ([run_dir, "--limit", "4"], ["--from", str(file)]):
        assert (
            "line 3: this is not a completion; the file is damaged: restore it, or move it away"
            in error_of(capsys, *flags)
        )
    assert file.read_bytes() == damaged


def test_a_file_that_is_not_an_evaluation_is_never_overwritten(run_dir, capsys):
    mine = Path("mine.jsonl")
    mine.write_text('{"not": "an evaluation"}\n')
    for more in ([], ["--overwrite"]):
        assert "mine.jsonl" in error_of(capsys, run_dir, "--to", "mine.jsonl", *more)
    assert mine.read_text() == '{"not": "an evaluation"}\n'


def test_help_and_errors_import_no_heavy_library(tmp_path):
    program = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import evaluate_model\ntry:"
        " evaluate_model.main(sys.argv[1:])\nexcept SystemExit: pass\nprint('HEAVY',"
        " sorted({'torch', 'transformers', 'trl', 'datasets', 'peft'} & sys.modules.keys()))"
    )
    for flags in (["--help"], ["--nonsense"], ["--from", "nowhere.jsonl"], [str(ROOT / "recipes")]):
        run = subprocess.run(
            [sys.executable, "-c", program, str(ROOT), *flags],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=120,
        )
        assert "HEAVY []" in run.stdout, run.stderr
