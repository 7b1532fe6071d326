"""The embedded demo: its problems, its tokenizer, its imperfect model, and the script itself."""

import json
import re
from pathlib import Path

import pytest
import torch
from conftest import load_script
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).parents[1] / "demo"
TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
COMPLETION = re.compile(r"<reasoning>\n.+\n</reasoning>\n<answer>(\d+)</answer>", re.DOTALL)


@pytest.fixture(scope="module")
def make_demo():
    return load_script(DEMO / "make_demo.py")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO / "model")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(DEMO / "model")


@pytest.fixture(scope="module")
def remade(make_demo, tmp_path_factory):
    """A folder with a demo that is made with a short warm start, and the losses of that."""
    out, threads = tmp_path_factory.mktemp("demo"), torch.get_num_threads()
    losses = make_demo.make_demo(out, steps=20)
    torch.set_num_threads(threads)
    return out, losses


def problems(split: str) -> list[dict[str, str]]:
    """The shipped problems of a split."""
    text = (DEMO / "data" / f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def tensor_shapes(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as tensors:
        return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}


def test_questions_are_distinct_and_the_test_questions_are_held_out():
    train = [problem["question"] for problem in problems("train")]
    test = [problem["question"] for problem in problems("test")]
    assert (len(train), len(test)) == (2000, 200)
    assert len({*train, *test}) == 2200


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_step_of_the_reasoning_is_right_and_leads_to_the_answer(split):
    for problem in problems(split):
        *steps, last = problem["answer"].split("\n")
        result = None
        for step in steps:
            left, sign, right, total = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)", step).groups()
            assert int(left) + (int(right) if sign == "+" else -int(right)) == int(total)
            assert result in (None, left), "a step begins with the result before it"
            result = total
        assert last == f"#### {result}"


def test_the_reasoning_uses_the_numbers_of_the_question_in_their_order():
    for problem in problems("test"):
        # 4+8=12 and 12-2=10 have the operands 4, 8, 12, 2.
        operands = re.findall(r"\d+(?=[+=-])", problem["answer"])
        assert operands[:2] + operands[3:] == re.findall(r"\d+", problem["question"])


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  two spaces, a tab\t, \r\n a line end\n\n",
        "naïve Ωmega 数学 \U0001f600 \u202e\x00\x7f",
        r"\boxed{\frac{-1}{2}} costs $1,234.50, 007 and 100% of 3²",
        "x</answer><answer> <|user|> <reasoning ></reasoning>",
        "".join(map(chr, range(0x250))),
    ],
)
def test_any_text_survives_the_tokenizer(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_every_tag_and_every_number_up_to_99_is_one_token(tokenizer):
    for text in [*TAGS, *map(str, range(100))]:
        assert len(tokenizer.encode(text)) == 1, text
        assert len(tokenizer.encode(f"a{text}=")) == 3, text


def test_tags_survive_decoding_without_special_tokens_and_the_end_token_does_not(tokenizer):
    text = "<reasoning>\n7+5=12\n</reasoning>\n<answer>12</answer>"
    ids = tokenizer.encode(text + tokenizer.eos_token)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_pad_and_end_tokens_differ_and_the_model_knows_both(tokenizer, model):
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    for config in (model.config, model.generation_config):
        assert (config.pad_token_id, config.eos_token_id) == (
            tokenizer.pad_token_id,
            tokenizer.eos_token_id,
        )
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


def test_long_prompts_fit_and_give_finite_logits(tokenizer, model):
    assert tokenizer.model_max_length >= 2048 and model.config.max_position_embeddings >= 2048
    with torch.no_grad():
        logits = model(torch.arange(2048).remainder(len(tokenizer))[None], logits_to_keep=1).logits
    assert logits.isfinite().all()


def test_chat_template_renders_each_role_and_the_generation_prompt(tokenizer):
    messages = [{"role": role, "content": role[0]} for role in ("system", "user", "assistant")]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert text == "<|system|>s<|end|><|user|>u<|end|><|assistant|>a<|end|>"
    prompt = tokenizer.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert text.startswith(prompt) and prompt.endswith("<|assistant|>")


def test_the_shipped_model_answers_some_held_out_problems_and_fails_others(
    make_demo, tokenizer, model
):
    held_out = problems("test")

    def rendered(problem: dict[str, str]) -> str:
        messages = [
            {"role": "system", "content": make_demo.SYSTEM_PROMPT},
            {"role": "user", "content": problem["question"]},
        ]
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    batch = tokenizer(
        [rendered(problem) for problem in held_out], return_tensors="pt", padding=True
    )
    ids = model.generate(**batch, max_new_tokens=36, do_sample=False)
    drawn = ids[:, batch["input_ids"].shape[1] :]
    completions = tokenizer.batch_decode(drawn, skip_special_tokens=True)
    well_formed = right = 0
    for problem, completion in zip(held_out, completions, strict=True):
        match = COMPLETION.fullmatch(completion)
        well_formed += match is not None
        right += match is not None and match[1] == problem["answer"].split()[-1]
    assert 0.3 <= right / len(held_out) <= 0.6
    assert 0.7 <= well_formed / len(held_out) <= 0.95


@pytest.mark.slow
def test_the_script_writes_the_shipped_problems_and_tokenizer_byte_for_byte(remade):
    out, _ = remade
    names = "data/train.jsonl data/test.jsonl model/tokenizer.json model/chat_template.jinja"
    for name in names.split():
        assert (out / name).read_bytes() == (DEMO / name).read_bytes(), name
    for name in ["tokenizer_config.json", "config.json", "generation_config.json"]:
        written = json.loads((out / "model" / name).read_bytes())
        assert written == json.loads((DEMO / "model" / name).read_bytes()), name


@pytest.mark.slow
def test_the_script_writes_a_model_of_the_shipped_shape_and_its_loss_falls(remade):
    out, losses = remade
    assert len(losses) == 20 and losses[-1] < 0.8 * losses[0]
    written, shipped = (
        {path.name for path in (folder / "model").iterdir()} for folder in (out, DEMO)
    )
    assert written == shipped
    assert tensor_shapes(out / "model") == tensor_shapes(DEMO / "model")


def test_the_demo_is_small():
    files = [path for path in DEMO.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) < 5_000_000
