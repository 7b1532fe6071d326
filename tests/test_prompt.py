"""The prompt as the model reads it: chat templates of many kinds, and what each needs.

The templates are those of real models, shortened. The tokenizer is one of characters, or the
demo's.
"""

import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import trl
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import evaluate_model
import train_model
from gtpo.answers.problem import with_system_message
from gtpo.errors import RecipeError
from gtpo.models import prompt
from gtpo.models.prompt import check_template, opened_thoughts, prompt_opening
from gtpo.recipe.sections import ModelSection
from gtpo.rewards.doctor import probe_completions

DEMO = str(ROOT / "demo/model")
TURNS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
HEADER = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
)
# A template, and the beginning of what is said of it with a system message; "" for nothing.
REFUSED = "dataset.system_instruction: the chat template refuses a system message ("
DROPPED = "dataset.system_instruction: the chat template leaves the system message out"
IGNORES = "model.chat_template: the template ignores add_generation_prompt"
FLAG = "training.chat_template_kwargs: the chat template needs a flag ("
WAY_ROUND = "set dataset.system_role to user, or dataset.system_instruction to null"
MERGES = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
)
LLAMA_2 = (
    MERGES + "{% for m in messages %}{% if m.role == 'user' %}<s>[INST] {% if loop.first and system"
    " %}<<SYS>>{{ system }}<</SYS>> {% endif %}{{ m.content }} [/INST]{% else %} {{ m.content"
    " }} </s>{% endif %}{% endfor %}"
)
TEMPLATES = {
    "demo": (TURNS + HEADER, ""),
    "chatml, which trims": (CHATML + "{% endif %}", ""),
    "llama 2, without a generation prompt": (LLAMA_2, ""),
    "always begins the answer": (TURNS + "<|assistant|>", ""),
    "gemma": (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
        "{% endif %}" + TURNS + HEADER,
        REFUSED + "System role not supported); " + WAY_ROUND,
    ),
    "mistral, whose turns must alternate": (
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %} {{ m.content }}</s>"
        "{% endif %}{% endfor %}",
        REFUSED + "Roles must alternate); " + WAY_ROUND,
    ),
    "fails on a system message in Python": (
        "{% if messages[0].role == 'system' %}{{ messages[0].content + 1 }}{% endif %}"
        + TURNS
        + HEADER,
        REFUSED,
    ),
    "phi 3, which drops it": (
        "{% for m in messages %}{% if m.role != 'system' %}<|{{ m.role }}|>{{ m.content }}<|end|>"
        "{% endif %}{% endfor %}" + HEADER,
        DROPPED,
    ),
    "takes the last message alone": ("<|user|>{{ messages[-1].content }}" + HEADER, DROPPED),
    "has a default system message instead": (
        MERGES + "<|system|>You are helpful.<|end|>" + TURNS + HEADER,
        DROPPED,
    ),
    "ignores the generation prompt": (TURNS, IGNORES),
    "needs a flag": (
        "{% if enable_thinking is not defined %}"
        "{{ raise_exception('enable_thinking must be set') }}{% endif %}" + TURNS + HEADER,
        FLAG + "enable_thinking must be set); set it to {enable_thinking: false}",
    ),
    "computes with a flag": (
        TURNS + "{{ 'x' + (thinking.mode) }}" + HEADER,
        "model.chat_template:",
    ),
    "prints a flag": ("{% if not thinking %}{{ a.b }}{% endif %}" + TURNS + HEADER, FLAG),
    "drops the user": ("<|system|>{{ messages[0].content }}" + HEADER, "model.chat_template: it "),
    "no template": ("{{", "model.chat_template: it is no Jinja template that works ("),
}


def tokenizer_with(template: str):
    tokenizer = tiny.tiny_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def warnings(caplog) -> list[str]:
    return [record.getMessage().removeprefix("[GTPO] ") for record in caplog.records]


@pytest.mark.parametrize("template, sentence", TEMPLATES.values(), ids=TEMPLATES)
def test_a_template_that_spoils_prompts_is_refused_with_one_sentence(template, sentence, caplog):
    tokenizer = tokenizer_with(template)
    if not sentence:
        check_template(tokenizer, "Reason, then answer.")
        assert warnings(caplog) == []
        return
    with pytest.raises(RecipeError) as refused:
        check_template(tokenizer, "Reason, then answer.")
    assert str(refused.value).startswith(sentence) and "\n" not in str(refused.value)


@pytest.mark.parametrize("name", [n for n, (_, s) in TEMPLATES.items() if WAY_ROUND[:9] in s[-70:]])
def test_without_a_system_message_such_a_template_works(name):
    check_template(tokenizer_with(TEMPLATES[name][0]), None)


@pytest.mark.parametrize("name", [n for n, (_, s) in TEMPLATES.items() if s.startswith("dataset")])
def test_in_the_users_message_the_instruction_reaches_the_model(name):
    tokenizer = tokenizer_with(TEMPLATES[name][0])
    check_template(tokenizer, "Reason, then answer.", "user")
    messages = with_system_message([{"role": "user", "content": "Q"}], "Be kind.", "user")
    assert messages == [{"role": "user", "content": "Be kind.\n\nQ"}]
    assert "Be kind.\n\nQ" in prompt.prompt_text(tokenizer, messages)


def test_a_run_that_was_trained_with_such_prompts_gets_a_warning(caplog):
    for name in ("phi 3, which drops it", "ignores the generation prompt"):
        template, sentence = TEMPLATES[name]
        check_template(tokenizer_with(template), "Reason.", strict=False)
        assert warnings(caplog)[-1].startswith(sentence)
    with pytest.raises(RecipeError, match="refuses a system message"):
        check_template(tokenizer_with(TEMPLATES["gemma"][0]), "Reason.", strict=False)


def test_what_to_add_for_the_generation_prompt_makes_the_template_work(caplog):
    with pytest.raises(RecipeError) as refused:
        check_template(tokenizer_with(TURNS), "Reason.")
    addition = re.search(r"add (\{%.*%\}) at its end", str(refused.value))[1]
    tokenizer = tokenizer_with(TURNS + addition)
    check_template(tokenizer, "Reason.")
    assert (
        prompt.generation_prompt(tokenizer, [{"role": "user", "content": "Q"}]) == "<|assistant|>"
    )


def test_a_flag_that_is_set_is_used_and_one_that_no_template_reads_gets_a_warning(caplog):
    tokenizer = tokenizer_with(TEMPLATES["needs a flag"][0])
    check_template(tokenizer, "Reason.", options={"enable_thinking": True})
    assert warnings(caplog) == []
    check_template(tokenizer, "Reason.", options={"enable_thinking": True, "thinkng": True})
    assert warnings(caplog) == [
        "training.chat_template_kwargs: the chat template does not read thinkng; it reads"
        " enable_thinking"
    ]


def test_a_system_message_of_the_row_stays_and_moves_as_ours():
    own = [{"role": "system", "content": "S"}, {"role": "user", "content": "Q"}]
    assert with_system_message(own, "Ours") == own
    assert with_system_message(own, "Ours", "user") == [{"role": "user", "content": "S\n\nQ"}]
    question = own[1:]
    assert with_system_message(question, None) == question
    assert with_system_message(question, "", "user") == question
    assert with_system_message(question, "Ours")[0] == {"role": "system", "content": "Ours"}
    assert own[1]["content"] == "Q"


# The templates of real models that TRL ships; those of vision models want lists of parts.
SHIPPED = sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))
VISION = ("idefics3", "llava_next")


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.stem)
def test_templates_of_real_models_are_refused_for_their_system_role_alone(file, caplog):
    tokenizer = tokenizer_with(file.read_text(encoding="utf-8"))
    tokenizer.bos_token = "^"
    refused = None
    try:
        check_template(tokenizer, "Reason, then answer.")
    except RecipeError as error:
        refused = str(error)
    name = file.stem.removesuffix("_training")
    if name in VISION:
        assert refused.startswith("model.chat_template: it ")
    elif name == "gemma":
        assert refused == f"{REFUSED}System role not supported); {WAY_ROUND}"
    else:
        assert refused is None
        # Every other word on thinking is in the template's text, not in its prompts.
        end = prompt.generation_prompt(tokenizer, [{"role": "user", "content": "Q"}])
        assert len(warnings(caplog)) == end.endswith("<think>\n")


# ---- what a template opens


def chatml_that_ends_in(text: str) -> str:
    return CHATML + f"{text}{{% endif %}}"


QWEN_3 = CHATML + (
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
HYBRID = CHATML + "{% if thinking %}<think>\n{% else %}</think>{% endif %}{% endif %}"
# the end of a prompt -> the opened answer, the opened thoughts
ENDS = {
    "": ("", ""),
    "<reasoning>\\n": ("<reasoning>\n", ""),
    "<reasoning>": ("<reasoning>", ""),
    "Sure. <reasoning>\\nStep 1:": ("<reasoning>\nStep 1:", ""),
    "<reasoning>\\n</reasoning>\\n<answer>": ("<reasoning>\n</reasoning>\n<answer>", ""),
    "<think>\\n": ("", "<think>\n"),
    "<think>\\n\\n</think>\\n\\n": ("", ""),
    "<think></think>": ("", ""),
    "<thought>\\n": ("", "<thought>\n"),
    "[THINK]": ("", "[THINK]"),
    "[THINK][/THINK]": ("", ""),
    "<|START_THINKING|>": ("", "<|START_THINKING|>"),
    "<|START_THINKING|><|END_THINKING|>": ("", ""),
    "<seed:think>": ("", "<seed:think>"),
    "◁think▷": ("", "◁think▷"),
    "<start_of_turn>": ("", ""),
}


@pytest.mark.parametrize("end, opened", ENDS.items(), ids=ENDS)
def test_what_the_prompt_has_begun_of_the_answer_is_found(end, opened):
    system = "First <think>, then write <reasoning> and </reasoning> and <answer>."
    messages = [{"role": "system", "content": system}, {"role": "user", "content": "<answer>?"}]
    for template in (
        CHATML + "{{ '" + end + "' }}{% endif %}",
        CHATML.replace("{% if add_generation_prompt %}", "") + "{{ '" + end + "' }}",
    ):
        tokenizer = tokenizer_with(template)
        found = prompt_opening(tokenizer, messages), opened_thoughts(tokenizer, messages)
        assert found == opened


def test_words_on_the_format_after_the_question_open_nothing():
    words = "Write <reasoning>...</reasoning><answer>...</answer>. [/INST]"
    messages = [{"role": "user", "content": "2+2=?"}]
    for content in ("m.content", "m.content | upper"):
        tokenizer = tokenizer_with(
            f"{{% for m in messages %}}[INST] {{{{ {content} }}}} {words}{{% endfor %}}"
        )
        assert prompt_opening(tokenizer, messages) == ""
    assert prompt.generation_prompt(tokenizer, [{"role": "user", "content": "a?"}]) == ""


def test_opened_thoughts_are_told_with_what_to_set(caplog):
    check_template(tokenizer_with(CHATML + "{{ '<think>\\n' }}{% endif %}"), "Reason.")
    assert warnings(caplog) == [
        "model.chat_template: the template opens <think> in the prompt, so completions begin inside"
        " it and never contain it; for rewards that look for <reasoning>, set model.chat_template"
        " to a copy of the template with <reasoning> in place of that <think>"
    ]
    caplog.clear()
    tokenizer = tokenizer_with(HYBRID)
    check_template(tokenizer, "Reason.")
    check_template(tokenizer, "Reason.", options={"thinking": False})
    assert warnings(caplog) == []
    check_template(tokenizer, "Reason.", options={"thinking": True})
    assert warnings(caplog)[0].startswith("model.chat_template: the template opens <think>")
    caplog.clear()
    on_by_default = HYBRID.replace("if thinking", "if thinking is not defined or thinking")
    check_template(tokenizer_with(on_by_default), "Reason.")
    assert warnings(caplog)[0].endswith("set training.chat_template_kwargs to {thinking: false}")
    caplog.clear()
    check_template(tokenizer_with(QWEN_3), "Reason.")
    check_template(tokenizer_with(QWEN_3), "Reason.", options={"enable_thinking": False})
    assert warnings(caplog) == []


def test_the_doctors_completions_go_on_where_the_prompt_ends():
    reference = "<reasoning>\n2+2=4\n</reasoning>\n<answer>4</answer>"
    problems = [{"prompt": [], "answer": reference, "reference": reference}]

    def first(opening: str) -> str:
        return probe_completions(problems, opening)["reference"][0]

    assert first("") == reference
    for opening in ("<reasoning>\n", "<reasoning>"):
        assert first(opening) == "2+2=4\n</reasoning>\n<answer>4</answer>"
    assert first("<reasoning>\n\n</reasoning>\n") == "<answer>4</answer>"
    assert first("<reasoning>\n</reasoning>\n<answer>") == "4</answer>"


# ---- token ids


def test_ids_beyond_the_embedding_are_told(tmp_path, caplog):
    tokenizer = tiny.tiny_tokenizer()
    tiny.tiny_model(tokenizer).save_pretrained(tmp_path)
    section, size = ModelSection(model_name=str(tmp_path)), len(tokenizer)
    prompt.check_embedding(tokenizer, section, "transformers")
    assert warnings(caplog) == [] and prompt.unreadable_ids(tokenizer, section) == {}
    tokenizer.add_tokens(["<image>", "<video>"], special_tokens=True)
    prompt.check_embedding(tokenizer, section, "transformers")
    assert warnings(caplog) == [
        f"model.model_name: the token '<image>' has the id {size}, and the embedding of"
        f" {str(tmp_path)!r} ends with {size - 1}, like 1 others; no prompt may contain it"
    ]
    unreadable = prompt.unreadable_ids(tokenizer, section)
    fine = [{"role": "user", "content": "2+2?"}]
    prompt.check_token_ids(tokenizer, unreadable, [fine, fine])
    with pytest.raises(RecipeError) as refused:
        prompt.check_token_ids(
            tokenizer, unreadable, [fine, [{"role": "user", "content": "A <video> of 2+2"}]]
        )
    assert str(refused.value) == (
        "dataset: the prompt 'A <video> of 2+2' contains the token '<video>', which the model's"
        " embedding lacks; take it out of the problem"
    )
    tokenizer.chat_template += "<image>"
    with pytest.raises(RecipeError, match="set model.chat_template to a template without it"):
        prompt.check_token_ids(tokenizer, unreadable, [fine])
    tokenizer.pad_token = "<image>"  # the kind of every recipe that adds [PAD] to Llama 2
    prompt.check_embedding(tokenizer, section, "unsloth")  # which chooses another one
    with pytest.raises(RecipeError, match="model.model_name: the token '<image>' has the id"):
        prompt.check_embedding(tokenizer, section, "transformers")


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    tiny.tiny_model(tiny.tiny_tokenizer(alphabet="0123+=? ")).save_pretrained(tmp_path)
    with pytest.raises(RecipeError, match="use the model's own tokenizer, or enlarge"):
        prompt.check_embedding(
            tiny.tiny_tokenizer(), ModelSection(model_name=str(tmp_path)), "unsloth"
        )


def test_a_prompt_with_the_padding_token_is_refused_with_unsloth_alone(tmp_path):
    tokenizer = tiny.tiny_tokenizer(pad="!")
    tiny.tiny_model(tokenizer).save_pretrained(tmp_path)
    recipe = SimpleNamespace(
        model=ModelSection(model_name=str(tmp_path)),
        dataset=SimpleNamespace(system_instruction=None),
        training=SimpleNamespace(chat_template_kwargs=None),
    )

    def problems(*questions: str) -> dict:
        return {"prompt": [[{"role": "user", "content": question}] for question in questions]}

    prompt.check_prompts(tokenizer, recipe, problems("2+2", "2!"), None, backend="transformers")
    prompt.check_prompts(tokenizer, recipe, problems("2+2"), None, backend="unsloth")
    with pytest.raises(RecipeError) as refused:
        prompt.check_prompts(tokenizer, recipe, problems("2+2", "2!"), backend="unsloth")
    assert str(refused.value) == (
        "dataset: the prompt '2!' contains the token '!', which Unsloth takes for padding; take it"
        " out of the problem"
    )
    tokenizer.chat_template = tokenizer.chat_template.replace("\n", "!")
    with pytest.raises(RecipeError, match="the chat template prints it, so set another pad_token"):
        prompt.check_prompts(tokenizer, recipe, problems("2+2"), backend="unsloth")
    tokenizer.pad_token = "^"  # it ends sequences too, so Unsloth chooses another one
    prompt.check_prompts(tokenizer, recipe, problems("2^2!"), backend="unsloth")


def test_system_messages_of_the_rows_that_the_template_leaves_out_are_told(here, capsys):
    rows = [
        {
            "prompt": [
                {"role": "system", "content": "Reason, then answer."},
                {"role": "user", "content": f"{i} + 1?"},
            ],
            "answer": str(i + 1),
        }
        for i in range(20)
    ]
    (here / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--dataset.path", "rows.jsonl", "--dataset.question_column", "prompt"]
    flags += ["--dataset.system_instruction", "null", "--evaluation.path", "null"]
    for name, check, sentence in (
        (
            "phi 3, which drops it",
            "prompt",
            "dataset: the chat template leaves the system messages",
        ),
        ("gemma", "dataset", "dataset: the chat template refuses a prompt with the roles system, "),
    ):
        model = demo_with(here / name, TEMPLATES[name][0])
        found = checks(capsys, model, *flags, code=2)[check][0]
        assert found["verdict"] == "fail" and found["sentence"].startswith(sentence)
        assert "set dataset.system_role to user" in found["sentence"]
        found = checks(capsys, model, *flags, "--dataset.system_role", "user")["prompt"][0]
        assert "Reason, then answer.\n\n0 + 1?" in found["details"]["prompt"]


# ---- the commands


def demo_with(folder, template: str) -> str:
    """The demo's model with another chat template, in `folder`."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    tokenizer.chat_template = template
    AutoModelForCausalLM.from_pretrained(DEMO).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    return tmp_path


def recipe_words(model: str, *flags: str) -> list[str]:
    problems = str(ROOT / "demo/data/test.jsonl")
    words = [str(ROOT / "recipes/demo.yaml"), "--model-name", model, "--dataset.path", problems]
    return [*words, "--evaluation.path", problems, *flags]


def checks(capsys, model: str, *flags: str, code: int = 0) -> dict[str, list[dict]]:
    """The findings of `--check --json`, by the name of their check."""
    assert train_model.main(recipe_words(model, "--check", "--json", *flags)) == code
    by_name: dict[str, list[dict]] = {}
    for finding in json.loads(capsys.readouterr().out)["checks"]:
        by_name.setdefault(finding["check"], []).append(finding)
    return by_name


def test_check_prints_the_first_prompt_as_the_model_reads_it(here, capsys):
    model = demo_with(here / "model", chatml_that_ends_in("{{ '<think>\\n' }}"))
    lengths = ["--training.max_prompt_length", "160", "--model.max_prompt_length", "160"]
    lengths += ["--model.max_seq_length", "200"]
    findings = checks(capsys, model, *lengths)
    found, template = findings["prompt"][0], findings["chat template"]
    assert [finding["verdict"] for finding in template] == ["warn", "ok"]
    assert "the template opens <think> in the prompt" in template[0]["sentence"]
    question = json.loads((ROOT / "demo/data/test.jsonl").read_text().split("\n")[0])["question"]
    tokenizer = AutoTokenizer.from_pretrained(model)
    expected = (
        f"<|im_start|>system\nReason, then answer.<|im_end|>\n<|im_start|>user\n{question}"
        "<|im_end|>\n<|im_start|>assistant\n<think>\n"
    )
    assert found["details"]["prompt"] == expected
    ids = found["details"]["ids"]
    assert tokenizer.decode(ids) == expected and f"the first has {len(ids)} tokens" in str(found)
    train_model.main(recipe_words(model, "--check", *lengths))
    assert f"\n{expected}\n" in capsys.readouterr().out


def test_check_shows_special_and_unknown_tokens_of_the_prompt(here, capsys, tiny_policy):
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy)
    messages = [{"role": "user", "content": "2 + 2 = \u263a ^"}]
    read = prompt.read_prompt(tokenizer, messages)
    assert read.text == "u:2 + 2 = ? ^\na:" and read.end == "a:"
    assert read.ids[-4] == tokenizer.eos_token_id


def test_a_refused_system_message_is_told_before_the_data_and_the_weights_are_read(here, capsys):
    model = demo_with(here / "model", TEMPLATES["gemma"][0])
    (here / "model/model.safetensors").write_bytes(b"no weights")
    assert train_model.main(recipe_words(model)) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error")]
    assert line == (
        "error: dataset.system_instruction: the chat template refuses a system message (System role"
        f" not supported); {WAY_ROUND} (set in {ROOT / 'recipes/demo.yaml'})"
    )
    assert not (here / "runs").exists()
    found = checks(capsys, model, code=2)
    assert found["chat template"][0]["verdict"] == "fail"
    assert found["chat template"][0]["sentence"] == line.removeprefix("error: ")
    for flags in (["--dataset.system_role", "user"], ["--dataset.system_instruction", "null"]):
        found = checks(capsys, model, *flags)
        assert found["chat template"][0]["verdict"] == "ok"
    assert evaluate_model.main([model, "--dataset", str(ROOT / "demo/data/test.jsonl")]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: --system-instruction: the chat template refuses a system message (System role not"
        ' supported); set --system-role to user, or --system-instruction to ""'
    )


def test_options_of_the_template_that_are_no_mapping_or_not_the_users_are_refused(here, capsys):
    for value, sentence in (
        ("hello", "'hello' is not a mapping; write one such as {enable_thinking: false}"),
        ("{tokenize: false}", "tokenize cannot be set, because every prompt is made with its own"),
    ):
        flags = ["--training.chat_template_kwargs", value, "--dry-run"]
        assert train_model.main(recipe_words(DEMO, *flags)) == 2
        assert f"training.chat_template_kwargs: {sentence}" in capsys.readouterr().err
        flags = [DEMO, "--dataset", "gsm8k", "--chat-template-kwargs", value]
        assert evaluate_model.main(flags) == 2
        assert f"--chat-template-kwargs: {sentence}" in capsys.readouterr().err


OPENS = TURNS + "{% if add_generation_prompt %}<|assistant|>{{ '<reasoning>\n' }}{% endif %}"
OWN_REWARD = """
SEEN = open("seen.txt", "a")

def own(completions, **kwargs):
    assert "prompt_opening" not in kwargs
    for completion in completions:
        print(repr(completion[0]["content"]), file=SEEN, flush=True)
    return [0.0] * len(completions)

def named(completions, prompt_opening, **kwargs):
    assert prompt_opening == "<reasoning>\\n"
    return [0.0] * len(completions)
"""


@pytest.mark.slow
def test_an_opened_reasoning_block_counts_in_training_evaluation_doctor_and_chat(
    here, capsys, monkeypatch
):
    import io

    model = demo_with(here / "model", OPENS)
    (here / "opened_rewards.py").write_text(OWN_REWARD)
    rewards = ["reward_math.final_reward", "opened_rewards.own", "opened_rewards.named"]
    flags = ["--trainer.reward_funcs", *rewards, "--run-name", "opened", "--output_root", "runs"]
    found = checks(capsys, model, *flags)
    assert [f["verdict"] for f in found["reward"]][:1] == ["ok"]
    assert set(found["reward"][0]["details"]["paid"]["reference"]) == {20}
    assert found["prompt"][0]["details"]["prompt"].endswith("<|assistant|><reasoning>\n")
    short = ["--training.max_steps", "2", "--evaluation.limit", "40"]
    assert train_model.main(recipe_words(model, *flags, *short)) == 0
    printed = capsys.readouterr()
    run_dir = re.search("Run directory: (.*)", printed.out)[1]
    lines = [json.loads(line) for line in open(f"{run_dir}/completions.jsonl")]
    paid = [line["rewards"]["final_reward"] for line in lines]
    assert max(paid) == 20 and sum(reward >= 10 for reward in paid) > len(paid) / 2
    for line in lines:
        assert line["prompt_opening"] == "<reasoning>\n" and "<reasoning>" not in line["completion"]
    seen = (here / "seen.txt").read_text()
    assert "</reasoning>" in seen and "<reasoning>" not in seen
    rows = [json.loads(line) for line in open(f"{run_dir}/evaluation/before.jsonl")]
    assert rows[0]["header"]["prompt_opening"] == "<reasoning>\n"
    assert sum(row["well_formed"] for row in rows[1:]) > 20
    assert any(row["correct"] for row in rows[1:]) and "<reasoning>" not in rows[1]["completion"]
    assert evaluate_model.main([run_dir, "--limit", "20", "--to", "again.jsonl"]) == 0
    rows = [json.loads(line) for line in open("again.jsonl")]
    assert sum(row["well_formed"] for row in rows[1:]) > 10
    question = "Tom has 7 coins and gives 1 away. How many coins does Tom have now?"
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{question}\nAnd Mia?\n"))
    capsys.readouterr()
    assert evaluate_model.main([run_dir, "--chat", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.startswith("<reasoning>\n")


@pytest.mark.slow
def test_a_model_without_a_system_role_trains_and_is_evaluated_with_it_in_the_users_message(
    here, capsys
):
    model = demo_with(here / "model", TEMPLATES["gemma"][0])
    flags = ["--dataset.system_role", "user", "--output_root", "runs", "--evaluation.limit", "4"]
    assert train_model.main(recipe_words(model, *flags, "--training.max_steps", "1")) == 0
    run_dir = re.search("Run directory: (.*)", capsys.readouterr().out)[1]
    (message,) = json.loads(open(f"{run_dir}/completions.jsonl").readline())["prompt"]
    assert message["role"] == "user" and message["content"].startswith("Reason, then answer.\n\n")
    assert evaluate_model.main([run_dir, "--limit", "4", "--to", "again.jsonl"]) == 0
    rows = [json.loads(line) for line in open("again.jsonl")]
    assert rows[1]["prompt"][0]["content"].startswith("Reason, then answer.\n\n")
    card = open(f"{run_dir}/README.md").read()
    assert "Reason, then answer.\\n\\nWhat is 12 + 30?" in card
