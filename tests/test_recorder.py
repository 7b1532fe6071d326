"""The recorder: completions.jsonl holds what any trainer trained on."""

import json

import pytest
import recordings
import torch

from gtpo import shaping
from gtpo.hooks.recorder import TokenTexts

pytestmark = pytest.mark.slow  # trains

GTPO, GRPO = "gtpo.gtpo_training.UnslothGTPOTrainer", "custom_trainer.original.UnslothGRPOTrainer"


@pytest.fixture(
    scope="module",
    params=[
        GTPO,
        GRPO,
        "custom_trainer.released.ReleasedGTPOTrainer",
        "benchmarks.ablations.WithoutTokenWeights",
    ],
)
def recorded(request, tmp_path_factory):
    return request.param, recordings.record(
        request.param, tmp_path_factory.mktemp("recorded"), reward=recordings.some_unscored
    )


def test_each_completion_has_one_line_in_the_order_of_its_group(recorded):
    _, run = recorded
    assert [
        (line["step"], line["rollout"], line["group"], line["row"]) for line in run["lines"]
    ] == [(step, step, group, row) for step in (1, 2) for group in range(4) for row in range(4)]


def test_rewards_advantages_and_weights_are_those_of_the_rollout(recorded):
    class_path, run = recorded
    for start, rollout in zip((0, 16), run["rollouts"], strict=True):
        for i, line in enumerate(run["lines"][start : start + 16]):
            ids, mask = rollout["completion_ids"][i], rollout["completion_mask"][i]
            assert line["ids"] == ids[mask.bool()].tolist()
            assert line["advantage"] == pytest.approx(rollout["advantages"][i].item(), rel=1e-6)
            if class_path == GRPO:
                assert line["weights"] is None and line["kept"] is None
            else:
                weights = rollout["token_weights"][i, : len(line["ids"])]
                assert line["weights"] == pytest.approx(weights.tolist(), abs=1e-6)
                # The initial entropy is above the threshold, so the paper's gate is off.
                assert line["kept"] is ("released" not in class_path or line["entropy"] <= 0.7)


def test_what_cannot_be_scored_is_null(recorded):
    lines = recorded[1]["lines"]
    unscored = [line for line in lines if line["reward"] is None]
    assert 0 < len(unscored) < len(lines)
    for line in lines:
        is_unscored = line["completion"].startswith("a")
        assert (line["reward"] is None) == is_unscored
        assert (line["rewards"]["some_unscored"] is None) == is_unscored
    assert all(line["advantage"] == 0 for line in unscored)


def test_runs_are_the_conflict_runs_of_the_group_for_every_trainer(recorded):
    names = ("completion_ids", "completion_mask", "advantages")
    tokens_in_runs = 0
    for rollout in recorded[1]["rollouts"]:
        in_rollout = [line for line in recorded[1]["lines"] if line["rollout"] == rollout["number"]]
        for group in range(4):
            rows = slice(4 * group, 4 * group + 4)
            runs = shaping.conflict_runs(*(rollout[name][rows] for name in names))
            lines = [line for line in in_rollout if line["group"] == group]
            for side, run in zip(("prefix", "suffix"), runs, strict=True):
                assert [line[side] for line in lines] == run.sum(1).tolist()
            tokens_in_runs += sum(line["prefix"] + line["suffix"] for line in lines)
    assert tokens_in_runs > 0


def test_entropies_are_those_of_the_policy_that_sampled(recorded):
    assert recorded[1]["entropy_error"] < 6e-4  # entropies have three decimals
    for line in recorded[1]["lines"]:
        assert line["entropy"] == pytest.approx(
            sum(line["entropies"]) / len(line["entropies"]), abs=1e-3
        )


def test_texts_and_truncation_agree_with_the_ids(recorded):
    lines = recorded[1]["lines"]
    for line in lines:
        assert len(line["tokens"]) == len(line["ids"]) == len(line["entropies"])
        # `completion` has no special tokens.
        assert "".join(line["tokens"]).translate({ord("^"): "", ord("?"): ""}) == line["completion"]
        assert line["truncated"] == (line["tokens"][-1] != "^")
        assert isinstance(line["prompt"], str) and line["answer"] is None
    assert {line["truncated"] for line in lines} == {True, False}


@pytest.mark.parametrize("class_path", [GTPO, GRPO])
def test_recording_does_not_change_a_bit_of_training(tmp_path, class_path):
    options = {"optim": "adamw_torch", "max_steps": 2, "num_iterations": 2}
    adapters = [
        recordings.record(class_path, tmp_path, record=record, **options)["adapter"]
        for record in (True, False)
    ]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])


@pytest.mark.parametrize("class_path", [GTPO, GRPO])
def test_a_rollout_over_several_steps_and_iterations_is_recorded_once(tmp_path, class_path):
    lines = recordings.record(
        class_path,
        tmp_path,
        steps_per_generation=4,
        per_device_train_batch_size=4,
        num_iterations=2,
        max_steps=6,
    )["lines"]
    assert [(line["rollout"], line["group"], line["row"]) for line in lines] == [
        (rollout, group, row) for rollout in (1, 2) for group in range(4) for row in range(4)
    ]
    # Steps 3 and 4 train on the first rollout again.
    for rollout, steps in ((1, {1, 2}), (2, {5, 6})):
        assert {line["step"] for line in lines if line["rollout"] == rollout} == steps


def test_the_rows_of_an_unfinished_rollout_that_were_trained_on_are_recorded(tmp_path):
    lines = recordings.record(
        GTPO, tmp_path, steps_per_generation=4, per_device_train_batch_size=4, max_steps=1
    )["lines"]
    assert len(lines) == 8 and {line["step"] for line in lines} == {1}


def test_per_token_lists_can_be_left_out_of_some_steps(tmp_path):
    lines = recordings.record(GTPO, tmp_path, max_steps=3, tokens_every=2)["lines"]
    assert {line["step"] for line in lines if "ids" in line} == {1, 3}
    assert {line["step"] for line in lines if "entropy" in line and "prefix" in line} == {1, 2, 3}
    per_token = {"ids", "tokens", "weights", "entropies"}
    assert all((per_token <= line.keys()) == (line["step"] != 2) for line in lines)


def test_rounding_between_equal_rewards_makes_no_conflicts_when_it_is_divided(tmp_path):
    def third(completions, **kwargs):
        return [1 / 3 if "a" in text else 1 / 3 + 1e-8 for text in completions]

    run = recordings.record(GRPO, tmp_path, scale_rewards="group", reward=third)
    assert all(line["prefix"] == line["suffix"] == 0 for line in run["lines"])


def test_truncated_completions_that_the_loss_masks_keep_their_tokens(tmp_path):
    lines = recordings.record(GTPO, tmp_path, mask_truncated_completions=True)["lines"]
    truncated = [line for line in lines if line["truncated"]]
    assert truncated and all(len(line["ids"]) == 7 and line["entropy"] == 0 for line in truncated)


def test_lines_have_the_keys_of_the_schema_in_its_order(recorded):
    from gtpo.hooks.completion_line import CompletionLine

    optional = {"prompt_opening", "raw_completion"}  # only where there is something in them
    for line in recorded[1]["lines"]:
        keys = [name for name in CompletionLine.model_fields if name in line.keys() | optional]
        assert [name for name in keys if name in line] == list(line)
        assert CompletionLine.model_fields.keys() - optional <= line.keys()
        CompletionLine.model_validate(line, strict=True)


def test_a_key_that_the_schema_does_not_have_is_not_written():
    from gtpo.hooks.completion_line import encoded

    with pytest.raises(ValueError, match="entropie: not a key of CompletionLine"):
        encoded({"step": 1, "entropie": 0.1})


def test_a_line_stays_one_line_whatever_the_policy_writes(tmp_path):
    from gtpo.hooks.completion_line import encoded
    from gtpo.hooks.recorder import json_number

    values = {"completion": "a\u2028b\u2029c\x85d\ne\x00\u4e2d", "prompt": "half a pair: \ud83d"}
    line = encoded({**values, "reward": json_number(float("inf"))}).decode()
    assert len(line.splitlines()) == 1 and "\u4e2d" in line
    assert json.loads(line) == {**values, "reward": None}


# ---- the text of tokens


def tokenizer_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_token_texts_add_up_where_one_character_is_several_tokens():
    from conftest import ROOT

    tokenizer = tokenizer_of(ROOT / "demo/model")  # byte-level
    text = "7+5=12 é\u4e2d\U0001f600 end"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    texts = TokenTexts(tokenizer)(ids)
    assert len(texts) == len(ids) and "".join(texts) == text + tokenizer.eos_token
    assert "" in texts and "\U0001f600" in texts  # a character stands with its last token
    # These ids end inside a character.
    assert "".join(TokenTexts(tokenizer)(ids[:-6])) == tokenizer.decode(ids[:-6])


def test_token_texts_keep_the_space_that_sentencepiece_drops_at_the_start_of_a_text():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"\u2581one": 0, "\u2581two": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer, words.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    assert tokenizer.decode([1]) == "two"  # without its space
    assert TokenTexts(tokenizer)([0, 1, 1]) == ["one", " two", " two"]
