"""Own data: what rewards get of a row, how references are found, conversations, and the hub."""

import json
import logging
import os
import shutil
import subprocess
import sys

import pytest
import tiny
from conftest import ROOT
from demo_run import demo_flags, run_dir
from hub_server import serving

import reward_math
import train_model
from gtpo import data
from gtpo.answers import format_reference, reference_answer
from gtpo.answers.references import how_found
from gtpo.data import RESERVED, gsm8k_reference, math_reference
from gtpo.errors import RecipeError
from gtpo.evaluation.file import make_header
from gtpo.models.generation import Sampling
from gtpo.recipe import Recipe
from gtpo.recipe.sections import DatasetSection

SUMS = [(f"What is {a} + {b}?", a + b) for a in range(2, 5) for b in range(2, 5)]


@pytest.fixture(scope="module")
def tokenizer():
    return tiny.tiny_tokenizer()


@pytest.fixture
def load(tmp_path, tokenizer, caplog):
    """The problems of rows in a file, in their order. What was logged is in `caplog`."""

    def loading(rows: list[dict], **keys):
        file = tmp_path / "mine.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        section = DatasetSection(**{"path": str(file), "system_instruction": None, **keys})
        data.check_source(section)
        with caplog.at_level(logging.INFO):
            return data.load_problems(section, tokenizer, 10_000, 0, shuffle=False)

    return loading


def column(problems, name: str) -> list:
    return list(problems[name])


def user(text: str) -> dict:
    return {"role": "user", "content": text}


# ---- what rewards get


def test_rewards_get_the_bare_answer_the_reference_and_every_other_column(load):
    rows = [
        {"question": q, "answer": a, "topic": "sums", "level": i} for i, (q, a) in enumerate(SUMS)
    ]
    problems = load(rows)
    assert column(problems, "answer") == [str(a) for _, a in SUMS]
    assert problems[0]["reference"] == format_reference("", "4")
    assert column(problems, "topic") == ["sums"] * 9 and column(problems, "level") == list(range(9))
    assert column(problems, "question") == [q for q, _ in SUMS]


@pytest.mark.parametrize(
    "value, text",
    [(4, "4"), (4.0, "4"), (2.5, "2.5"), ("4.0", "4.0"), (True, "True"), ("1,200", "1,200"),
     (-7, "-7"), (2**70, str(2**70)), ("x = 2 or x = 5", "x = 2 or x = 5"), ("007", "007")],
)  # fmt: skip
def test_an_answer_is_text_whatever_its_type(load, value, text):
    assert column(load([{"question": "?", "answer": value}]), "answer") == [text]


def test_answers_of_several_types_stay_what_they_are(load):
    values = [4, "1/2", 2.5, "4"]
    problems = load([{"question": "?", "answer": value} for value in values])
    assert column(problems, "answer") == ["4", "1/2", "2.5", "4"]


def test_a_column_of_a_reserved_name_is_renamed_with_one_line(load, caplog):
    others = sorted(RESERVED - {"prompt", "answer"})
    row = {"problem": "?", "solution": "4", "prompt": "p", "answer": 5, "column_prompt": 6}
    problems = load(
        [row | {name: name for name in others}], question_column="problem", answer_column="solution"
    )
    assert problems[0]["prompt"] == [user("?")] and problems[0]["answer"] == "4"
    assert problems[0]["column_answer"] == 5 and problems[0]["column_prompt"] == 6
    assert problems[0]["column_column_prompt"] == "p"
    for name in others:
        assert problems[0][f"column_{name}"] == name
        line = (
            f"Dataset: the column {name!r} reaches rewards as 'column_{name}', because GTPO or TRL"
        )
        assert caplog.text.count(line) == 1
    assert set(problems.column_names) & RESERVED == {"prompt", "answer", "reference"}


def test_every_name_that_trl_reads_from_a_row_or_hands_to_rewards_is_reserved():
    import inspect
    import re

    from trl import GRPOTrainer

    source = inspect.getsource(GRPOTrainer._generate_and_score_completions)
    read = set(re.findall(r"(?:x|example)(?:\.get\(|\[)\"(\w+)\"", source))
    source = inspect.getsource(GRPOTrainer._calculate_rewards)
    handed = set(re.findall(r'reward_kwargs\["(\w+)"\]', source))
    skipped = set(re.findall(r"key not in \[([^]]*)\]", source)[0].replace('"', "").split(", "))
    assert {"prompt", "image", "images", "environment"} <= read and "trainer_state" in handed
    assert read | handed | skipped | {"prompts", "completions"} <= RESERVED


def test_shipped_rewards_take_bare_and_formatted_answers():
    formatted = format_reference("2+2", "4")
    completions = [[{"role": "assistant", "content": formatted}], "4"]
    for reward in (reward_math.final_reward, reward_math.released_reward):
        assert reward(completions, ["4"] * 2) == reward(completions, [formatted] * 2) == [20.0, 0.0]
    assert reference_answer("4") == reference_answer(formatted) == "4"


# ---- how references are found


@pytest.mark.parametrize(
    "text, answer, how",
    [
        ("work\n#### 7", "7", "after ####"),
        ("so \\boxed{8}", "8", "boxed"),
        ("<reasoning>\nw\n</reasoning>\n<answer>9</answer>", "9", "tagged"),
        ("<think>w</think> <answer> \\boxed{9} </answer>", "9", "tagged"),
        ("<answer>1</answer>, no: <answer>2</answer>.", "2", "tagged"),
        ("1,200", "1,200", "as a number"),
        ("-3/4", "-3/4", "as a number"),
        ("x = 2 or x = 5", "x = 2 or x = 5", "as the whole text"),
        ("That makes 4 in total.", "That makes 4 in total.", "as a whole sentence"),
    ],
)
def test_a_reference_is_found_in_one_of_these_ways(load, caplog, text, answer, how):
    problems = load([{"question": "?", "answer": text}])
    assert column(problems, "answer") == [answer]
    assert column(problems, "reference")[0].endswith(f"</reasoning>\n<answer>{answer}</answer>")
    assert f"references found: 1 {how}\n" in caplog.text


def test_references_that_carry_our_tags_are_kept_as_they_are(load):
    reference = format_reference("2 + 2 = 4", "4")
    rows = [{"question": "?", "answer": reference}]
    assert column(load(rows), "reference") == [reference]
    assert column(load(rows, name="gsm8k"), "reference") == [reference]


def test_one_line_counts_the_ways_and_most_last_words_get_a_warning(load, caplog):
    texts = ["That makes 4 in total.", "I get 5.", "#### 6"]
    load([{"question": str(i), "answer": text} for i, text in enumerate(texts)], name="gsm8k")
    assert "Dataset: references found: 2 as the last word, 1 after ####" in caplog.text
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert warning.getMessage() == (
        "[GTPO] Dataset: nothing marks the answer in 2 of 3 references, so the last word was taken,"
        " for example 'total.'; put answers after ####, in \\boxed{} or in <answer> tags, or name a"
        " column that holds them alone"
    )
    caplog.clear()
    load([{"question": "?", "answer": text} for text in ("#### 1", "x total.")], name="gsm8k")
    assert not [record for record in caplog.records if record.levelno == logging.WARNING]


@pytest.mark.slow
def test_the_real_datasets_are_found_by_their_marks(shared_data):
    for pattern, key, read, how in (
        ("gsm8k/*.jsonl", "answer", gsm8k_reference, "after ####"),
        ("hendrycks_math/*/*.jsonl", "solution", math_reference, "boxed"),
    ):
        for file in shared_data.glob(pattern):
            for line in file.read_text().splitlines():
                text = json.loads(line)[key]
                assert how_found(text, read(text)) == how


# ---- duplicates, and problems that are held out and trained on


def test_duplicates_are_counted(load, caplog):
    rows = [("1+1?", "2"), (" 1+1? ", "2"), ("1+1?", "3"), ("2+2?", "4")]
    load([{"question": q, "answer": a} for q, a in rows])
    line = "Dataset: 2 of 4 problems repeat an earlier question; 1 questions have several answers"
    assert line in caplog.text
    caplog.clear()
    load([{"question": "1", "answer": "1"}, {"question": "2", "answer": "1"}])
    assert "repeat" not in caplog.text


def recipe(**sections) -> Recipe:
    training = {"per_device_train_batch_size": 2, "num_generations": 2}
    return Recipe.model_validate({"model": {"model_name": "x"}, "training": training, **sections})


def write_sums(path, question: str, answer: str, sums=SUMS) -> str:
    path.write_text("".join(json.dumps({question: q, answer: a}) + "\n" for q, a in sums))
    return str(path)


def test_held_out_problems_have_columns_of_their_own_and_those_trained_on_are_counted(
    tmp_path, tokenizer, caplog
):
    made = recipe(
        dataset={"path": write_sums(tmp_path / "a.jsonl", "question", "answer")},
        evaluation={
            "path": write_sums(tmp_path / "b.jsonl", "q", "a", [*SUMS[:3], ("new?", 1)]),
            "question_column": "q",
            "answer_column": "a",
        },
    )
    with caplog.at_level(logging.INFO):
        problems = data.load_training_problems(made, tokenizer, 1)
        held_out = data.load_held_out_problems(made, tokenizer, problems)
    assert column(held_out, "answer") == ["4", "5", "6", "1"]
    assert held_out.column_names == ["prompt", "answer", "reference"]
    assert "Held-out problems: 3 of 4 are also trained on" in caplog.text
    wrong = recipe(
        dataset={"path": str(tmp_path / "a.jsonl")}, evaluation={"path": str(tmp_path / "b.jsonl")}
    )
    sentence = (
        "evaluation: no column .* .set evaluation.question_column and evaluation.answer_column"
    )
    with pytest.raises(RecipeError, match=sentence):
        data.check_held_out_source(wrong)


def test_the_fingerprint_of_an_evaluation_is_that_of_the_formatted_reference(load):
    import hashlib

    problems = load([{"question": q, "answer": a} for q, a in SUMS])
    references = [format_reference("", str(a)) for _, a in SUMS]
    expected = hashlib.blake2b(repr((["p"] * 9, references)).encode(), digest_size=8).hexdigest()
    header = make_header(problems, ["p"] * 9, Sampling(0.0, 1.0, 1, 10), 1, weights="w")
    assert header["prompts"] == expected


def test_recorded_columns_must_exist(tmp_path, tokenizer):
    path = write_sums(tmp_path / "a.jsonl", "question", "answer")
    made = recipe(dataset={"path": path}, watch={"columns": ["question", "topic"]})
    with pytest.raises(RecipeError, match="watch.columns: there is no column 'topic'; there are"):
        data.load_training_problems(made, tokenizer, 1)


# ---- conversations, and columns inside columns


CHAT = [user("2+2?"), {"role": "assistant", "content": "4"}, user("And 3+3?")]
ANSWERED = [*CHAT, {"role": "assistant", "content": "6"}]


def test_a_conversation_that_ends_with_the_user_is_the_prompt(load):
    (problem,) = load([{"prompt": CHAT, "solution": "so \\boxed{6}"}],
                      question_column="prompt", answer_column="solution",
                      system_instruction="Think.")  # fmt: skip
    assert problem["prompt"] == [{"role": "system", "content": "Think."}, *CHAT]
    assert problem["answer"] == "6" and problem["solution"] == "so \\boxed{6}"


@pytest.mark.parametrize(
    "answer_column", [None, "messages", "messages.3.content", "messages.-1.content"]
)
def test_the_last_message_of_the_assistant_is_the_answer(load, answer_column):
    (problem,) = load(
        [{"messages": ANSWERED}], question_column="messages", answer_column=answer_column
    )
    assert problem["prompt"] == CHAT and problem["answer"] == "6"
    assert problem["messages"] == ANSWERED


def test_a_message_of_the_assistant_at_the_end_of_a_prompt_is_left_out_with_one_line(load, caplog):
    (problem,) = load([{"prompt": ANSWERED, "answer": "6"}], question_column="prompt")
    assert problem["prompt"] == CHAT
    assert "1 prompts end with a message of the assistant, which is left out" in caplog.text


def test_a_system_message_of_the_row_stays_with_one_line(load, caplog):
    own = [{"role": "system", "content": "Own."}, *CHAT]
    rows = [{"prompt": own, "answer": "6"}, {"prompt": CHAT, "answer": "6"}]
    problems = load(rows, question_column="prompt", system_instruction="Ours.")
    assert [prompt[0]["content"] for prompt in problems["prompt"]] == ["Own.", "Ours."]
    assert "1 prompts have a system message of their own" in caplog.text


def test_other_forms_of_messages_are_read(load):
    sharegpt = [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]
    parts = [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}]
    extra = [{"role": "user", "content": "2+2?", "name": None, "tool_calls": None}]
    for value in (sharegpt, parts, extra):
        (problem,) = load([{"c": value, "answer": "4"}], question_column="c")
        assert problem["prompt"] == [user("2+2?")] and problem["answer"] == "4"


@pytest.mark.parametrize(
    "value, sentence",
    [
        ([user("a"), {"role": "tool", "content": "b"}], "ends with a message of the role 'tool'"),
        ([{"role": "user", "content": None}], "has a message without a role and a text"),
        ([{"content": "a"}], "has a message without a role and a text"),
        (["a"], "holds values that are neither text nor numbers"),
        ({"a": 1}, "holds values that are neither text nor numbers"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_refused_with_its_row(load, value, sentence):
    rows = [{"prompt": [user("a")], "answer": "1"}, {"prompt": value, "answer": "1"}]
    with pytest.raises(RecipeError) as caught:
        load(rows, question_column="prompt")
    assert sentence in str(caught.value) and "(row 2)" in str(caught.value)


def test_a_template_that_refuses_a_conversation_is_one_sentence(load, tokenizer, monkeypatch):
    refusing = "{% if messages|length > 1 %}{{ raise_exception('One at a time') }}{% endif %}"
    monkeypatch.setattr(tokenizer, "chat_template", refusing)
    sentence = "the chat template refuses a prompt with the roles user, assistant, user .One at a"
    with pytest.raises(RecipeError, match=sentence):
        load([{"prompt": CHAT, "answer": "6"}], question_column="prompt")


def test_a_dotted_name_is_a_column_inside_a_column(load):
    rows = [
        {"prompt": [user(q)], "reward_model": {"style": "rule", "ground_truth": str(a)}}
        for q, a in SUMS
    ]
    keys = {"question_column": "prompt", "answer_column": "reward_model.ground_truth"}
    problems = load(rows, **keys)
    assert column(problems, "answer") == [str(a) for _, a in SUMS]
    assert problems[0]["reward_model"] == {"style": "rule", "ground_truth": "4"}
    dotted = load([{"a.b": "1?", "a": {"b": "no"}, "c": {"d": ["2", "3"]}}],
                  question_column="a.b", answer_column="c.d.1")  # fmt: skip
    assert dotted[0]["prompt"] == [user("1?")] and dotted[0]["answer"] == "3"
    with pytest.raises(RecipeError, match="no column 'reward_model.truth'; this dataset has prompt,"
                       " reward_model, reward_model.style, reward_model.ground_truth"):  # fmt: skip
        load(rows, **{**keys, "answer_column": "reward_model.truth"})


# ---- the hub


LOOK = """
import json, sys
from gtpo import data
from gtpo.errors import RecipeError
from gtpo.recipe.sections import DatasetSection

for keys in json.loads(sys.argv[1]):
    section = DatasetSection(question_column="task.text", answer_column="result", **keys)
    try:
        data.check_source(section)
        assert not {"torch", "trl", "transformers"} & sys.modules.keys()
        rows = data._load_rows(section)
        print(len(rows), rows[0]["task"]["text"])
    except RecipeError as error:
        print(error)
"""
CONFIGURATIONS = "['easy', 'hard']"
COLUMNS = "(set dataset.question_column and dataset.answer_column)"
WANTED = [
    ({"name": "some/sums"}, "9 What is 2 + 2?"),
    ({"name": "some/sums", "split": "test[:1]"}, "1 What is 2 + 2?"),
    (
        {"name": "some/sums", "split": "dev"},
        "dataset.split: 'some/sums' has no split 'dev'; it has train, test",
    ),
    ({"name": "some/levels", "subset": "hard"}, "4 What is 2 + 2?"),
    ({"name": "some/levels", "subsets": ["easy", "hard"]}, "6 What is 2 + 2?"),
    (
        {"name": "some/levels"},
        "dataset.subset: 'some/levels' has several; Please pick one among the available configs:"
        f" {CONFIGURATIONS}",
    ),
    (
        {"name": "some/levels", "subset": "x"},
        "dataset.subset: 'some/levels' cannot be read (BuilderConfig 'x' not found. Available:"
        f" {CONFIGURATIONS})",
    ),
    (
        {"name": "some/texts"},
        f"dataset: no column 'task.text'; this dataset has text, result {COLUMNS}",
    ),
]


def ask_hub(home, address: str, *, offline: bool) -> list[str]:
    environment = {
        **os.environ,
        "HF_ENDPOINT": address,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": str(int(offline)),
        "HF_HUB_DISABLE_XET": "1",
        "PYTHONPATH": str(ROOT),
    }
    words = [sys.executable, "-c", LOOK, json.dumps([keys for keys, _ in WANTED])]
    result = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200)
    assert result.returncode == 0, result.stderr
    return result.stdout.splitlines()


@pytest.mark.slow
def test_any_dataset_of_the_hub_is_read_online_from_the_cache_and_from_a_downloaded_copy(tmp_path):
    def write(name: str, sums, *, texts: bool = False):
        file = tmp_path / "hub" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [{"text": q} if texts else {"task": {"text": q}} for q, _ in sums]
        lines = (json.dumps(row | {"result": a}) for row, (_, a) in zip(rows, sums, strict=True))
        file.write_text("\n".join(lines) + "\n")

    write("some/sums/train.jsonl", SUMS)
    write("some/sums/test.jsonl", SUMS[:2])
    write("some/texts/train.jsonl", SUMS, texts=True)
    for level, count in (("easy", 2), ("hard", 4)):
        write(f"some/levels/{level}/train.jsonl", SUMS[:count])
    (tmp_path / "hub/some/levels/README.md").write_text(
        "---\nconfigs:\n"
        "- {config_name: easy, data_files: easy/train.jsonl}\n"
        "- {config_name: hard, data_files: hard/train.jsonl}\n---\n"
    )
    expected = [line for _, line in WANTED]
    home = tmp_path / "home"
    with serving(tmp_path / "hub") as (address, _):
        assert ask_hub(home, address, offline=False) == expected
    assert ask_hub(home, address, offline=True) == expected
    shutil.rmtree(home / "datasets")  # a copy that `hf download` made is all that is left
    assert ask_hub(home, address, offline=True) == expected


def test_a_name_of_the_hub_and_a_path_are_told_apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine").mkdir()
    for name in ("data/mine", "data/other.jsonl"):
        with pytest.raises(RecipeError, match="looks like a file; set dataset.path to it"):
            data.check_source(DatasetSection(name=name))
    with pytest.raises(
        RecipeError,
        match="there is no file or folder 'openai/gsm8k'; a dataset of the hub is set by",
    ):
        data.check_source(DatasetSection(path="openai/gsm8k"))


# ---- inputs from public reports of other trainers and of the library datasets


def test_mixed_types_inside_conversations_and_columns_are_no_obstacle(load):
    # axolotl issue 3590: the system message is a text, and the user's is a list of parts
    parts = [{"type": "text", "text": "1+1?"}]
    messages = [{"role": "system", "content": "S"}, {"role": "user", "content": parts}]
    (problem,) = load([{"messages": messages, "answer": "2"}], question_column="messages")
    assert problem["prompt"] == [{"role": "system", "content": "S"}, user("1+1?")]
    assert problem["messages"] == messages
    # axolotl pull request 3136: a tool's argument is a text here and a number there
    calls = [[{"arguments": {"time": time}}] for time in ("2025", 1690876800)]
    problems = load([{"question": "?", "answer": 1, "calls": call} for call in calls])
    assert column(problems, "calls") == calls
    # alpaca-lora issue 239: a column holds texts, numbers and lists
    values = ["", 5, []]
    problems = load([{"question": "?", "answer": 1, "input": value} for value in values])
    assert column(problems, "input") == values


def test_a_message_whose_content_is_an_object_is_refused_with_its_row(load):
    # ms-swift issue 8326
    rows = [
        {"messages": [{"role": "user", "content": content}], "answer": "2"}
        for content in ("1+1?", {"text": "1+1?"})
    ]
    with pytest.raises(RecipeError, match="a message without a role and a text; .* .row 2."):
        load(rows, question_column="messages")


def test_a_folder_in_brackets_and_a_hidden_one_are_read(tmp_path, tokenizer):
    # datasets issues 7468 and 6073
    for name in ("[D_DATA]/test", "a/.d/train"):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "train.json").write_text('[{"question": "1+1?", "answer": "2"}]')
        section = DatasetSection(path=str(folder))
        data.check_source(section)
        assert len(data.load_problems(section, tokenizer, 10_000, 0)) == 1


def test_a_function_may_return_rows_of_mixed_types(tmp_path, tokenizer, monkeypatch):
    source = "def load():\n    return [{'question': '?', 'answer': a} for a in (4, '1/2', None)]\n"
    (tmp_path / "mixed_rows.py").write_text(source)
    monkeypatch.syspath_prepend(tmp_path)
    problems = data.load_problems(DatasetSection(name="mixed_rows.load"), tokenizer, 10_000, 0)
    assert sorted(problems["answer"]) == ["1/2", "4"]


# ---- a whole run


REWARDS = """
from gtpo.answers import reference_answer


def text(completion):
    return completion[-1]["content"]


def by_topic(completions, topic, difficulty, **kwargs):
    assert set(topic) == {"sums"} and kwargs["column_image"] == ["i"] * len(completions)
    return [float(level) for level in difficulty]


def exact(completions, answer, **kwargs):
    found = [text(c).split("<answer>")[-1].split("</answer>")[0].strip() for c in completions]
    return [2.0 if f == str(a) else 0.0 for f, a in zip(found, answer)]


def as_before(completions, answer, reference, **kwargs):
    assert [reference_answer(r) for r in reference] == [reference_answer(a) for a in answer]
    return exact(completions, [reference_answer(a) for a in answer])
"""


def own_run(here, *flags: str) -> list[str]:
    (here / "user_rewards.py").write_text(REWARDS)
    lines = (
        {"question": q, "answer": a, "topic": "sums", "difficulty": i % 5, "image": "i"}
        | {"odd": float("nan")}
        for i, (q, a) in enumerate(SUMS)
    )
    (here / "columns.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return demo_flags(
        "--dataset.name null --dataset.path columns.jsonl --training.save_strategy no",
        "--training.num_generations 4",
        "--trainer.reward_funcs user_rewards.by_topic user_rewards.exact user_rewards.as_before",
        *flags,
    )


@pytest.mark.slow
def test_a_run_hands_columns_to_its_rewards_and_records_those_that_are_asked_for(here, monkeypatch):
    monkeypatch.syspath_prepend(here)
    flags = own_run(
        here, "--watch.columns difficulty answer odd", "--evaluation.path columns.jsonl"
    )
    assert train_model.main(flags) == 0
    folder = run_dir(here)
    lines = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    assert len(lines) == 16
    for line in lines:
        answer = line["columns"]["answer"]
        assert line["answer"] == format_reference("", answer)
        assert line["rewards"]["by_topic"] == float(line["columns"]["difficulty"])
        assert line["rewards"]["exact"] == line["rewards"]["as_before"]
        assert line["columns"].keys() == {"difficulty", "answer", "odd"}
        assert line["columns"]["odd"] is None
    log = (folder / "train.log").read_text()
    for sentence in (
        "Dataset: references found: 9 as a number",
        "Dataset: the column 'image' reaches rewards as 'column_image'",
        "Held-out problems: 9 of 9 are also trained on",
    ):
        assert log.count(sentence) == 1, sentence


@pytest.mark.slow
def test_the_doctor_pays_the_reference_of_own_rewards(here, monkeypatch, capsys):
    monkeypatch.syspath_prepend(here)
    assert train_model.main(own_run(here, "--check")) == 0
    assert "user_rewards.exact pays: reference 2, empty 0, truncated 0" in capsys.readouterr().out
