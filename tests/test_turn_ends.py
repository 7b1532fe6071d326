"""Where an answer ends: decided once, kept, and used by all that generate, count or grade."""

import json
import logging
import shutil
from pathlib import Path

import gradients
import pytest
import tiny
import torch
from conftest import ROOT
from test_alarm import alarm_of, raised
from transformers import AutoTokenizer, GenerationConfig
from turn_end_models import (
    DEMO,
    END,
    OTHER,
    remove_kept_ends,
    save_model_with_two_ends,
    write_recipe,
)

import evaluate_model
import train_model
from gtpo.errors import RecipeError
from gtpo.evaluation.file import EvaluationFile, turn_ends_note
from gtpo.hooks.turn_ends import (
    END_INSIDE,
    EndTurns,
    end_turns,
    given_ends,
    turn_ends,
    up_to_end,
)
from gtpo.models import generation
from gtpo.models.tokenizer import (
    agree_on_turn_ends,
    prepare_tokenizer,
    restore_end,
    template_end,
    turn_end_rule,
    unheeded_ends,
)
from gtpo.recipe.command_line import read_recipe
from gtpo.recipe.sections import ModelSection, TrainingSection

USER, SYSTEM, ASSISTANT = 470, 469, 471  # special tokens of the demo
BODY = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
PROMPT = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
LAST = "{% if m.role == 'assistant' and loop.last and not add_generation_prompt %}"


@pytest.fixture
def tokenizer():
    """The demo's tokenizer with a second special token, <|endoftext|>, as its end and padding."""
    made = AutoTokenizer.from_pretrained(DEMO)
    made.add_tokens(["<|endoftext|>"], special_tokens=True)
    made.eos_token = made.pad_token = "<|endoftext|>"
    return made


@pytest.fixture(scope="module")
def two_ends(tmp_path_factory) -> str:
    return save_model_with_two_ends(tmp_path_factory.mktemp("two-ends"))


def section_of(folder, ends) -> ModelSection:
    """A base model in `folder` whose generation_config names `ends`; None for no such file."""
    if ends is not None:
        GenerationConfig(eos_token_id=ends).save_pretrained(folder)
    return ModelSection(model_name=str(folder))


# ---- what the chat template says


@pytest.mark.parametrize(
    "template, token, text, next_turn",
    [
        (BODY + "<|end|>{% endfor %}" + PROMPT, END, None, None),
        (BODY + "<|end|>\n{% endfor %}" + PROMPT, END, None, None),
        (BODY + "\n<|end|>{% endfor %}", END, None, None),  # Mistral's space, and no prompt
        # Phi-3.5: the text ends with another token than the turn
        (BODY + "<|end|>\n{% endfor %}{% if not add_generation_prompt %}<|endoftext|>{% endif %}",
         END, None, None),
        # gpt-oss: only the last message ends so
        (BODY + LAST + "<|endoftext|>{% else %}<|end|>{% endif %}{% endfor %}", OTHER, None, None),
        # GLM-4: a turn ends where the next one begins
        (BODY + "{% endfor %}" + PROMPT, None, None, USER),
        # ChatML on a base model without the token
        (BODY + "<|im_end|>\n{% endfor %}", None, "<|im_end|>", None),
        (BODY + "</s>{% endfor %}", None, "</s>", None),
        (tiny.CHAT_TEMPLATE, None, None, None),
        ("{{ messages[0].content }}", None, None, None),
        ("{{ raise_exception('no') }}", None, None, None),
    ],
)  # fmt: skip
def test_the_end_is_what_the_template_puts_after_an_assistants_message(
    tokenizer, template, token, text, next_turn
):
    tokenizer.chat_template = template
    assert template_end(tokenizer) == (token, text, next_turn)


def test_the_template_gets_the_recipes_arguments(tokenizer):
    tokenizer.chat_template = (
        BODY + "{% if short %}<|end|>{% else %}<|endoftext|>{% endif %}{% endfor %}"
    )
    assert template_end(tokenizer).token == OTHER
    assert template_end(tokenizer, {"short": True}).token == END


# ---- the three sources


@pytest.mark.parametrize(
    "configured, own, ids, doubt",
    [
        ([END, OTHER], "<|endoftext|>", (END, OTHER), None),  # Phi-3.5, Gemma-3
        (END, "<|endoftext|>", (END, OTHER), None),
        ([END, OTHER], "<|end|>", (END, OTHER), None),  # Qwen2.5: padding is the other end
        (END, "<|end|>", (END,), None),
        (None, "<|end|>", (END,), None),  # no generation_config, no config
        # a base model with a template of another
        (OTHER, "<|endoftext|>", (END, OTHER), "the chat template names '<|end|>' (468), "
         "generation_config names '<|endoftext|>' (476), the tokenizer names"),
        (None, "<|endoftext|>", (END, OTHER), "the chat template names '<|end|>' (468), the tok"),
        # 2 is LlamaConfig's default, and a letter here
        (2, "<|end|>", (END,), "generation_config also names '#' (2), which is no special token"),
        ([2, END], "<|endoftext|>", (END, OTHER), "also names '#' (2)"),
        (9999, "<|end|>", (END,), "generation_config also names"),
        (OTHER, "<|end|>", (END, OTHER), "generation_config names '<|endoftext|>' (476)"),
    ],
)  # fmt: skip
def test_a_turn_ends_with_all_that_the_sources_name(
    tokenizer, tmp_path, configured, own, ids, doubt
):
    tokenizer.eos_token = own
    rule = turn_end_rule(tokenizer, section_of(tmp_path, configured))
    assert rule.ids == ids
    assert (rule.doubt is None) == (doubt is None) and (doubt or "") in (rule.doubt or "")


def test_a_turn_that_ends_where_the_next_begins_needs_generation_config_to_say_so(
    tokenizer, tmp_path
):
    tokenizer.chat_template = BODY + "{% endfor %}" + PROMPT
    assert turn_end_rule(tokenizer, section_of(tmp_path, None)) == ((OTHER,), None, None)
    rule = turn_end_rule(tokenizer, section_of(tmp_path, [OTHER, USER]))
    assert rule == ((USER, OTHER), None, None)


def test_an_end_that_is_no_token_is_said_and_counted_as_unheeded(tokenizer, tmp_path):
    tokenizer.chat_template = BODY + "<|im_end|>{% endfor %}"
    section = section_of(tmp_path, OTHER)
    rule = turn_end_rule(tokenizer, section)
    assert rule.ids == (OTHER,) and "'<|im_end|>', which is no token" in rule.doubt
    assert unheeded_ends(tokenizer, section) == ("<|im_end|>",)


def test_without_a_generation_config_the_models_config_counts(tokenizer, tmp_path, two_ends):
    shutil.copytree(two_ends, tmp_path / "model")
    (tmp_path / "model/generation_config.json").unlink()
    config = tmp_path / "model/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": [END, USER]}))
    rule = turn_end_rule(tokenizer, ModelSection(model_name=str(tmp_path / "model")))
    assert rule == ((END, USER, OTHER), None, None)


# ---- agreed on once, said in one line, kept with the tokenizer


def said(caplog, tokenizer, section, training=None, **options) -> str:
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="gtpo"):
        agree_on_turn_ends(tokenizer, section, training, **options)
    lines = [r.getMessage() for r in caplog.records if "turn ends" in r.getMessage()]
    assert len(lines) == 1
    return lines[0]


BOTH = "'<|end|>' (468) or '<|endoftext|>' (476)"


def test_the_ends_are_kept_wherever_the_tokenizer_is_saved(tokenizer, tmp_path, caplog):
    line = said(caplog, tokenizer, section_of(tmp_path, [END, OTHER]))
    assert line == f"[GTPO] A turn ends with {BOTH}"
    tokenizer.save_pretrained(tmp_path / "saved")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert turn_ends(loaded) == (END, OTHER)
    # Another generation_config changes nothing any more, and a line says so.
    line = said(caplog, loaded, section_of(tmp_path / "other", [OTHER]))
    assert turn_ends(loaded) == (END, OTHER) and line == f"[GTPO] A turn ends with {BOTH}"
    line = said(caplog, loaded, section_of(tmp_path / "other", [OTHER, USER]))
    assert turn_ends(loaded) == (END, OTHER)
    assert "which the tokenizer keeps; by today's rule it would end with" in line


def test_where_the_sources_agree_nothing_is_written(tmp_path, caplog):
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    line = said(caplog, tokenizer, ModelSection(model_name=DEMO))
    assert line == "[GTPO] A turn ends with '<|end|>' (468)" and turn_ends(tokenizer) == (END,)
    tokenizer.save_pretrained(tmp_path)
    assert "turn_ends" not in json.loads((tmp_path / "tokenizer_config.json").read_text())


def test_a_disagreement_is_a_warning(tokenizer, tmp_path, caplog):
    line = said(caplog, tokenizer, section_of(tmp_path, OTHER))
    assert line.startswith(f"[GTPO] A turn ends with {BOTH}, but the chat template names")
    assert caplog.records[-1].levelno == logging.WARNING


@pytest.mark.parametrize(
    "given, ids",
    [
        ({"eos_token_id": [END, OTHER]}, (END, OTHER)),
        ({"eos_token_id": USER}, (USER, OTHER)),  # the tokenizer's own end always ends
        ({"stop_token_ids": [USER]}, (USER, OTHER)),
        ('{"eos_token_id": [470]}', (USER, OTHER)),
        ({"eos_token_id": None, "top_k": 3}, (END, OTHER)),
    ],
)
def test_ends_in_the_recipe_come_first(tokenizer, tmp_path, caplog, given, ids):
    training = TrainingSection(generation_kwargs=given)
    said(caplog, tokenizer, section_of(tmp_path, [END, OTHER]), training)
    assert turn_ends(tokenizer) == ids


def test_an_id_that_is_no_token_is_refused(tokenizer, tmp_path):
    training = TrainingSection(generation_kwargs={"eos_token_id": [END, 477]})
    with pytest.raises(RecipeError, match="eos_token_id 477 is no token: this tokenizer has 477"):
        agree_on_turn_ends(tokenizer, section_of(tmp_path, END), training)


def test_a_checkpoint_without_ends_means_its_tokenizers_end(tokenizer, tmp_path, caplog):
    tokenizer.save_pretrained(tmp_path / "checkpoint")
    today = AutoTokenizer.from_pretrained(DEMO)
    today.add_tokens(["<|endoftext|>"], special_tokens=True)  # with another end than then
    kept = restore_end(today, tmp_path / "checkpoint")
    assert kept == (OTHER,) and today.eos_token_id == OTHER
    section = section_of(tmp_path, [END, OTHER])
    line = said(caplog, today, section, kept=kept, keeper="the checkpoint")
    assert line == (
        "[GTPO] A turn ends with '<|endoftext|>' (476), which the checkpoint keeps;"
        f" by today's rule it would end with {BOTH}"
    )
    assert turn_ends(today) == (OTHER,) and unheeded_ends(today, section) == ("<|end|>",)
    assert restore_end(today, tmp_path / "nothing") is None


def test_on_unsloth_no_end_is_padding_if_there_is_another_token(tokenizer, tmp_path):
    tokenizer.add_tokens(["<|vision_pad|>"], special_tokens=True)
    section = section_of(tmp_path, [END, OTHER])
    prepare_tokenizer(tokenizer, section, "transformers")
    agree_on_turn_ends(tokenizer, section, backend="transformers")
    assert tokenizer.pad_token == "<|endoftext|>"
    agree_on_turn_ends(tokenizer, section, backend="unsloth")
    assert tokenizer.pad_token == "<|vision_pad|>"


def test_a_tokenizer_without_an_end_token_takes_the_templates(tokenizer):
    tokenizer.eos_token = None
    prepare_tokenizer(tokenizer, ModelSection(model_name="m"), "transformers")
    assert tokenizer.eos_token == "<|end|>"
    plain = tiny.tiny_tokenizer()
    plain.eos_token = None
    with pytest.raises(RecipeError, match="has no end-of-sequence token"):
        prepare_tokenizer(plain, ModelSection(model_name="m"), "transformers")


# ---- what an end does to a completion


def test_what_follows_the_first_end_is_padding(tokenizer):
    assert up_to_end([5, END, OTHER, OTHER], (END, OTHER)) == [5, END]
    assert up_to_end([5, OTHER, END], (END, OTHER)) == [5, OTHER]
    assert up_to_end((5, 6), (END,)) == (5, 6) and up_to_end([], (END,)) == []
    assert given_ends({"eos_token_id": [2, 3], "stop_token_ids": [3, 4]}) == (2, 3, 4)
    tokenizer.init_kwargs["turn_ends"] = [END, OTHER]
    text = tokenizer.encode("12")
    decoded = generation.decoded_completion([*text, END, OTHER, OTHER], tokenizer)
    assert decoded == ("12", len(text) + 1, False)
    assert generation.decoded_completion(text, tokenizer) == ("12", len(text), True)


def test_an_end_of_the_template_does_not_stand_in_the_text(tokenizer, tmp_path, caplog):
    """Some tokenizers have it as an added token that is not special."""
    tokenizer.add_tokens(["<|fin|>"])
    tokenizer.chat_template = BODY + "<|fin|>{% endfor %}"
    fin = tokenizer.convert_tokens_to_ids("<|fin|>")
    ids = [*tokenizer.encode("12"), fin]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "12<|fin|>"
    said(caplog, tokenizer, section_of(tmp_path, [fin]))
    assert turn_ends(tokenizer) == (fin, OTHER)
    tokenizer.save_pretrained(tmp_path / "saved")
    for one in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "saved")):
        assert generation.decoded_completion(ids, one) == ("12", len(ids), False)
        assert one.encode("1<|fin|>2") == [*one.encode("1"), fin, *one.encode("2")]


def test_an_end_that_the_recipe_chose_stands_in_the_text(tokenizer, tmp_path, caplog):
    """</answer> is a token of the demo, and a reward looks for it."""
    end = tokenizer.convert_tokens_to_ids("</answer>")
    training = TrainingSection(generation_kwargs={"eos_token_id": end})
    said(caplog, tokenizer, section_of(tmp_path, END), training)
    ids = [*tokenizer.encode("12"), end, END]
    assert generation.decoded_completion(ids, tokenizer).text == "12</answer>"


def test_evaluation_and_chat_generate_up_to_any_end(tokenizer):
    sampling = generation.Sampling(1.0, 1.0, 0, 8)
    tokenizer.init_kwargs["turn_ends"] = [END, OTHER]
    options = generation.generate_options(tokenizer, sampling, [1], "cpu")
    assert options["generation_config"].eos_token_id == [END, OTHER]


def test_an_evaluation_with_other_ends_is_not_continued(tokenizer, tmp_path):
    header = {"problems": 1, "weights": "w", "prompts": "p", "samples": 1, "temperature": 0.0}
    header |= {"top_p": 1.0, "seed": 1, "max_completion_length": 8}
    file = tmp_path / "one.jsonl"
    file.write_text(json.dumps({"header": header}) + "\n")
    assert EvaluationFile(file, {**header, **turn_ends_note(tokenizer)}).missing == [(0, 0)]
    tokenizer.init_kwargs["turn_ends"] = [END, OTHER]
    with pytest.raises(RecipeError, match="an evaluation with other ends of a turn"):
        EvaluationFile(file, {**header, **turn_ends_note(tokenizer)})
    file.write_text(json.dumps({"header": {**header, "turn_ends": "damaged"}}) + "\n")
    assert EvaluationFile(file, header).missing == [(0, 0)]


# ---- the recipe


@pytest.mark.parametrize(
    "given, sentence",
    [
        (
            '{stop_strings: ["</answer>"]}',
            "stop_strings does not work: TRL ends completions at ids",
        ),
        ('{stop: "</answer>"}', "stop does not work"),
        ("{eos_token_id: [468, -1]}", r"eos_token_id \[468, -1\] names no tokens"),
        ("{eos_token_id: []}", "names no tokens"),
        ("{eos_token_id: '<|end|>'}", "names no tokens; use an id, or a list of ids"),
        ("{eos_token_id: true}", "names no tokens"),
        ("{eos_token_id: [[468]]}", "names no tokens"),
        ("{stop_token_ids: 1.5}", "names no tokens"),
    ],
)
def test_ends_that_trl_cannot_use_are_refused_with_the_recipe(given, sentence):
    words = [str(ROOT / "recipes/demo.yaml"), "--training.generation_kwargs", given]
    with pytest.raises(RecipeError, match=sentence) as error:
        read_recipe(words)
    assert error.value.key == "training.generation_kwargs"


@pytest.mark.parametrize(
    "given", ["{eos_token_id: [468, 467]}", "{stop_strings: null}", "{top_k: 3}"]
)
def test_other_generation_kwargs_are_taken(given):
    read_recipe([str(ROOT / "recipes/demo.yaml"), "--training.generation_kwargs", given])


# ---- the alarm


def test_the_alarm_advises_no_longer_sequence_where_the_turn_has_ended():
    cut = {"completions/clipped_ratio": 0.8}
    ((_, name, longer),) = raised(
        alarm_of(), (10, {END_INSIDE: 0.0}), (9, {**cut, END_INSIDE: 0.1})
    )
    assert name == "truncated" and "raise model.max_seq_length" in longer
    ((_, name, ended),) = raised(alarm_of(), (10, {END_INSIDE: 0.0}), (9, {**cut, END_INSIDE: 0.7}))
    assert name == "truncated" and "max_seq_length" not in ended
    assert "the end of the turn stands inside" in ended and "eos_token_id" in ended


# ---- the trainer


def rollouts(folder, class_path, pad="~", rows=None, **options) -> tuple[list[dict], dict, list]:
    """Rollouts, the first log line, and gradients of one step of a trainer on the tiny policy.

    `rows` are sampled ids; what they lack in width is filled with padding, as `generate` does.
    """
    trainer = gradients.make_trainer(class_path, str(folder), pad=pad, **options)
    end_turns(trainer)
    if rows is not None:
        width = max(map(len, rows))
        filled = [
            [*row, *[trainer.processing_class.pad_token_id] * (width - len(row))] for row in rows
        ]

        def generate(input_ids, **kwargs):
            count = len(input_ids) // len(filled)
            return torch.cat([input_ids, torch.tensor(filled * count)], dim=1)

        trainer.model.generate = generate
    seen = gradients.record_steps(trainer)
    trainer.train()
    return seen["rollouts"], seen["logs"][0], seen["gradients"]


GTPO, GRPO = gradients.GTPO, gradients.GRPO
A, B, C = 2, 3, 4  # tokens of the tiny policy; its end is 1, and its padding 0
# C ends a turn too. The last row is cut off, and the third goes on after its end.
ROWS = [[A, B, 1], [A, C], [C, A, C, 1], [A, B, A, B]]
CUT = [[A, B, 1], [A, C], [C], [A, B, A, B]]
ENDS = {"eos_token_id": [C, 1]}


@pytest.mark.slow
@pytest.mark.parametrize("class_path", [GTPO, GRPO])
@pytest.mark.parametrize("pad", ["~", "^"])
def test_the_first_end_counts_and_padding_never_does(tmp_path, class_path, pad):
    (rollout, *_), log, _ = rollouts(tmp_path, class_path, pad, ROWS, generation_kwargs=ENDS)
    pad_id = 0 if pad == "~" else 1
    pairs = zip(rollout["completion_ids"], rollout["completion_mask"].bool(), strict=True)
    real, padding = zip(
        *[(ids[mask].tolist(), ids[~mask].tolist()) for ids, mask in pairs], strict=True
    )
    assert sorted(real) == sorted(CUT * 4)
    assert {token for ids in padding for token in ids} == {pad_id}
    assert log["completions/clipped_ratio"] == 0.25
    figures = [log[f"completions/{name}_terminated_length"] for name in ("mean", "min", "max")]
    assert figures == [2.0, 1.0, 3.0] and log["completions/mean_length"] == 2.5


@pytest.mark.slow
@pytest.mark.parametrize("pad", ["~", "^"])
def test_the_gradient_is_that_of_the_completions_up_to_their_ends(tmp_path, pad):
    """The float64 objective runs each completion alone, so no padding can enter it."""
    ends = {"eos_token_id": [C, 1], "suppress_tokens": [0]}
    found = gradients.compare(str(tmp_path), pad=pad, generation_kwargs=ends)
    assert found["gradient_error"] < 1e-5 and len(found["lengths"]) > 1
    assert found["initial_entropy"] == pytest.approx(found["initial_entropy_float64"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("class_path", [GTPO, GRPO])
def test_what_is_masked_as_truncated_has_none_of_the_ends(tmp_path, class_path):
    options = {"generation_kwargs": ENDS, "mask_truncated_completions": True}
    (rollout, *_), _, masked = rollouts(tmp_path / "masked", class_path, rows=ROWS, **options)
    counted = rollout["completion_mask"] * rollout.get("tool_mask", 1)
    ended = [mask.sum().item() < 4 for mask in rollout["completion_mask"]]
    assert [bool(mask.any()) for mask in counted] == ended and 0 < sum(ended) < 16
    # TRL's own verdict is right where the tokenizer's end alone ends a turn, and it stays.
    rows = [[A, B, 1], [A, 1], [1], [A, B, A, B]]
    (rollout, *_), *_ = rollouts(
        tmp_path / "plain", class_path, rows=rows, mask_truncated_completions=True
    )
    assert "tool_mask" not in rollout
    assert sorted(set(rollout["completion_mask"].sum(1).tolist())) == [0, 1, 2, 3]


@pytest.mark.slow
def test_padding_that_is_sampled_last_is_no_end(tmp_path):
    """TRL takes it for one."""
    rows = [[A, B, 1], [A, B, 0], [A, 1], [B, B, 1]]
    _, log, _ = rollouts(tmp_path, GTPO, rows=rows)
    assert log["completions/clipped_ratio"] == 0.25


@pytest.mark.slow
def test_ends_that_end_nothing_are_counted_inside_truncated_completions(tmp_path):
    trainer = gradients.make_trainer(GTPO, str(tmp_path))
    assert end_turns(trainer, ["bc"]) is trainer.turn_ends
    rows = [[A, B, C, 1], [A, B, C, A], [A, A, A, A], [B, C, A, B]]
    trainer._generate_single_turn = lambda prompts, *args, **kwargs: (rows * 4, None)
    seen = gradients.record_steps(trainer)
    trainer.train()
    assert seen["logs"][0]["completions/clipped_ratio"] == 0.75
    assert seen["logs"][0][END_INSIDE] == 0.5


def test_vllm_ends_at_the_same_ids_and_no_others():
    """TRL's vLLM backend takes its own names, and knows no `eos_token_id`."""
    from types import SimpleNamespace

    made = EndTurns.__new__(EndTurns)
    kwargs = {"eos_token_id": [C], "stop_token_ids": [9], "top_k": 3}
    made.trainer = SimpleNamespace(
        use_vllm=True, vllm_generation=SimpleNamespace(generation_kwargs=kwargs)
    )
    made.ends = (C, 1)
    made._set_generation()
    assert made.trainer.vllm_generation.generation_kwargs == {
        "top_k": 3,
        "ignore_eos": True,
        "stop_token_ids": [C, 1],
    }


# ---- whole runs


@pytest.fixture(scope="module")
def trained(tmp_path_factory, two_ends) -> Path:
    """The folder of a run of two steps on the model with two ends, and of its model."""
    folder = tmp_path_factory.mktemp("trained")
    shutil.copytree(two_ends, folder / "model")
    recipe = write_recipe(folder, str(folder / "model"))
    assert train_model.main([recipe]) == 0
    return folder


def run_dir_in(folder: Path) -> Path:
    (run_dir,) = (folder / "runs").iterdir()
    return run_dir


def lines_of(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "completions.jsonl").open()]


@pytest.mark.slow
def test_a_model_that_ends_its_turn_with_another_token_trains(trained):
    run_dir = run_dir_in(trained)
    lines = lines_of(run_dir)
    assert len(lines) == 16 and not any(line["truncated"] for line in lines)
    for line in lines:
        assert line["ids"][-1] == END and OTHER not in line["ids"]
        assert line["raw_completion"] == line["completion"] + "<|end|>"
        assert len(line["weights"]) == len(line["entropies"]) == len(line["ids"])
    assert any(line["reward"] > 0 for line in lines)
    for folder in (run_dir, run_dir / "checkpoint-1"):
        assert turn_ends(AutoTokenizer.from_pretrained(folder)) == (END, OTHER)


@pytest.mark.slow
def test_the_workaround_trains_as_the_rule_does(trained, tmp_path):
    """Up to now, it trained on a padding token that `generate` had put after the end."""
    recipe = write_recipe(tmp_path, str(trained / "model"))
    given = f"{{eos_token_id: [{END}, {OTHER}]}}"
    assert train_model.main([recipe, "--training.generation_kwargs", given]) == 0
    weights = [
        (run_dir_in(folder) / "adapter_model.safetensors").read_bytes()
        for folder in (trained, tmp_path)
    ]
    assert weights[0] == weights[1]
    assert all(line["ids"][-1] == END for line in lines_of(run_dir_in(tmp_path)))


def resumed(folder: Path, caplog, *words) -> tuple[list[dict], str]:
    """The completions of a resumed run's last step, and what was said about ends."""
    caplog.clear()
    shutil.rmtree(run_dir_in(folder) / "checkpoint-2")
    recipe = write_recipe(folder, str(folder / "model"))
    with caplog.at_level(logging.INFO, logger="gtpo"):
        assert train_model.main([recipe, "--resume", *words]) == 0
    said = [r.getMessage() for r in caplog.records if "A turn ends with" in r.getMessage()]
    assert len(said) == 1
    return [line for line in lines_of(run_dir_in(folder)) if line["step"] == 2], said[0]


@pytest.fixture
def moved(two_ends, tmp_path) -> Path:
    """A run of two steps that a test may change, in a folder of its own."""
    shutil.copytree(two_ends, tmp_path / "model")
    assert train_model.main([write_recipe(tmp_path, str(tmp_path / "model"))]) == 0
    return tmp_path


@pytest.mark.slow
def test_on_resume_the_checkpoints_ends_win(moved, caplog):
    straight = [line for line in lines_of(run_dir_in(moved)) if line["step"] == 2]
    tokenizer = AutoTokenizer.from_pretrained(moved / "model")
    tokenizer.eos_token = "<|user|>"  # an author corrects the files of the model
    tokenizer.save_pretrained(moved / "model")
    GenerationConfig(eos_token_id=[USER]).save_pretrained(moved / "model")
    lines, said = resumed(moved, caplog)
    assert lines == straight
    assert f"ends with {BOTH}, which the checkpoint keeps; by today's rule" in said


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version_ends_as_it_did(moved, caplog):
    remove_kept_ends(run_dir_in(moved) / "checkpoint-1")
    lines, said = resumed(moved, caplog)
    assert said.startswith("[GTPO] A turn ends with '<|endoftext|>' (476), which the checkpoint k")
    assert all(line["truncated"] and "<|end|>" in line["raw_completion"] for line in lines)
    state = json.loads((run_dir_in(moved) / "trainer_state.json").read_text())
    last = [line for line in state["log_history"] if "reward" in line][-1]
    assert last[END_INSIDE] == last["completions/clipped_ratio"] == 1.0


@pytest.mark.slow
def test_a_forced_change_of_the_recipes_ends_is_used(moved, caplog):
    given = f"{{eos_token_id: [{OTHER}]}}"
    words = ["--training.generation_kwargs", given, "--force-resume"]
    lines, said = resumed(moved, caplog, *words)
    assert said == "[GTPO] A turn ends with '<|endoftext|>' (476), by training.generation_kwargs"
    assert all(line["truncated"] for line in lines)


@pytest.mark.slow
def test_evaluation_and_export_end_where_training_ended(trained, tmp_path, capsys):
    from gtpo.models.export import export
    from gtpo.models.saved import find_saved

    run_dir, out = run_dir_in(trained), tmp_path / "merged"
    export(find_saved(str(run_dir)), out, dtype="float32")
    assert GenerationConfig.from_pretrained(out).eos_token_id == [END, OTHER]
    assert turn_ends(AutoTokenizer.from_pretrained(out)) == (END, OTHER)
    rows = {}
    for target in (run_dir, out, trained / "model"):
        file = tmp_path / f"{target.name[:6]}.jsonl"
        words = ["--path", str(ROOT / "demo/data/test.jsonl"), "--limit", "20", "--to", str(file)]
        words += ["--system-instruction", "Reason, then answer."]
        assert evaluate_model.main([str(target), *words]) == 0
        rows[target] = [json.loads(line) for line in file.open()][1:]
        assert not any(row["truncated"] for row in rows[target])
        assert any(row["well_formed"] for row in rows[target])
    assert rows[run_dir] == rows[out]
    capsys.readouterr()


@pytest.mark.slow
def test_an_old_run_is_evaluated_and_exported_with_the_end_it_had(moved, tmp_path, caplog):
    from gtpo.models.export import export
    from gtpo.models.saved import find_saved, load_saved

    run_dir = run_dir_in(moved)
    config = run_dir / "tokenizer_config.json"
    values = json.loads(config.read_text())
    del values["turn_ends"]
    config.write_text(json.dumps(values))
    with caplog.at_level(logging.INFO, logger="gtpo"):
        policy = load_saved(find_saved(str(run_dir)))
    assert turn_ends(policy.tokenizer) == (OTHER,)
    assert "(476), which this run keeps; by today's rule" in caplog.text
    export(find_saved(str(run_dir)), tmp_path / "merged", dtype="float32")
    merged = load_saved(find_saved(str(tmp_path / "merged")))
    assert turn_ends(merged.tokenizer) == (OTHER,)
    assert merged.model.generation_config.eos_token_id in (OTHER, [OTHER])


@pytest.mark.slow
def test_a_check_says_where_the_ends_do_not_agree(two_ends, tmp_path, capsys):
    shutil.copytree(two_ends, tmp_path / "model")
    recipe = write_recipe(tmp_path, str(tmp_path / "model"))
    assert train_model.main([recipe, "--check"]) == 0
    table = capsys.readouterr().out
    assert f"a turn ends with {BOTH}; padding is" in table and "warn  tokenizer" not in table
    GenerationConfig(eos_token_id=OTHER).save_pretrained(tmp_path / "model")
    assert train_model.main([recipe, "--check"]) == 0
    assert f"warn  tokenizer      A turn ends with {BOTH}, but the chat" in capsys.readouterr().out
