"""Evaluations on the demo's model and problems: drawing, grading, the file and the scores."""

import json
import sys
import types

import datasets
import pytest
import torch
from conftest import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

import reward_math
from gtpo.data import load_problems
from gtpo.errors import RecipeError
from gtpo.evaluation import draw, scores
from gtpo.evaluation import file as evaluation_file
from gtpo.evaluation import plan as evaluation_plan
from gtpo.evaluation.file import EvaluationFile
from gtpo.models import generation
from gtpo.models.backends import Policy
from gtpo.models.generation import SampledCompletion, Sampling, completion_seed, policy_sampler
from gtpo.recipe.sections import DatasetSection

GREEDY, SAMPLED = Sampling(0.0, 1.0, 1, 36), Sampling(1.0, 1.0, 1, 36)
RIGHT = "<reasoning>\n1\n</reasoning>\n<answer>{}</answer>"


@pytest.fixture(scope="module")
def policy() -> Policy:
    model, tokenizer = (
        kind.from_pretrained(ROOT / "demo/model") for kind in (AutoModelForCausalLM, AutoTokenizer)
    )
    return Policy(model.train(), tokenizer, "transformers")


@pytest.fixture(scope="module")
def problems(policy):
    section = DatasetSection(
        path=str(ROOT / "demo/data/test.jsonl"), system_instruction="Reason, then answer."
    )
    return load_problems(section, policy.tokenizer, 60, 0, shuffle=False).select(range(12))


@pytest.fixture(scope="module")
def prompts(policy, problems) -> list[str]:
    return draw.rendered_prompts(problems, policy.tokenizer)


def header(problems, prompts, sampling=SAMPLED, samples=2, weights="w") -> dict:
    return evaluation_file.make_header(problems, prompts, sampling, samples, weights, model="demo")


# ---- drawing


def test_a_completion_does_not_depend_on_its_batch_and_leaves_the_random_generators_alone(
    policy, prompts
):
    seeds = [completion_seed(1, problem, 0) for problem in range(len(prompts))]
    before = torch.get_rng_state()
    together = policy_sampler(policy, SAMPLED)(prompts, seeds)
    sampler = policy_sampler(policy, SAMPLED)
    alone = [sampler([prompt], [seed])[0] for prompt, seed in zip(prompts, seeds, strict=True)]
    assert together == alone
    assert torch.equal(torch.get_rng_state(), before) and policy.model.training


@pytest.mark.slow
def test_draws_follow_the_policy_at_the_temperature(policy, prompts):
    n, (prompt,) = 4000, prompts[3:4]
    drawn = policy_sampler(policy, Sampling(1.5, 1.0, 1, 1))(
        [prompt] * n, [completion_seed(7, 0, i) for i in range(n)]
    )
    ids = policy.tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad(), policy.generating() as model:
        expected = (model(**ids).logits[0, -1] / 1.5).softmax(-1)
    likely, token = expected.max(-1)
    share = sum(completion.text == policy.tokenizer.decode(token) for completion in drawn) / n
    assert 0.5 < likely < 0.99
    assert share == pytest.approx(likely.item(), abs=4 * (likely * (1 - likely) / n).sqrt().item())


def test_another_sample_or_seed_draws_another_completion_and_the_same_ones_repeat_it(
    policy, prompts
):
    sampler = policy_sampler(policy, Sampling(3.0, 1.0, 1, 10))
    first, again, other_sample, other_seed = (
        sampler(prompts[:1], [completion_seed(seed, 0, sample)])[0].text
        for seed, sample in ((1, 0), (1, 0), (1, 1), (2, 0))
    )
    assert first == again and len({first, other_sample, other_seed}) == 3


def test_greedy_completions_are_those_of_plain_generate(policy, prompts):
    drawn = policy_sampler(policy, GREEDY)(prompts, [0] * len(prompts))
    batch = policy.tokenizer(
        prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
    )
    with policy.generating() as model:
        ids = model.generate(**batch, max_new_tokens=36, do_sample=False)[
            :, batch["input_ids"].shape[1] :
        ]
    assert [c.text for c in drawn] == policy.tokenizer.batch_decode(ids, skip_special_tokens=True)
    assert [c.tokens for c in drawn] == (ids != policy.tokenizer.pad_token_id).sum(1).tolist()


def test_the_generation_config_of_a_model_is_ignored_as_in_training(policy, prompts):
    expected = policy_sampler(policy, GREEDY)(prompts, [0] * 12)
    own = {"repetition_penalty": 5.0, "top_k": 3, "do_sample": True, "num_beams": 4}
    config = policy.model.generation_config
    config.update(**own)
    try:
        assert policy_sampler(policy, GREEDY)(prompts, [0] * 12) == expected
    finally:
        config.update(**dict.fromkeys(own))


def test_top_p_keeps_the_likeliest_tokens(policy, prompts):
    seeds = [completion_seed(3, 0, i) for i in range(50)]
    narrow = policy_sampler(policy, Sampling(3.0, 0.01, 1, 36))(prompts[:1] * 50, seeds)
    assert set(narrow) == set(policy_sampler(policy, GREEDY)(prompts[:1], [0]))
    assert len(set(policy_sampler(policy, Sampling(3.0, 1.0, 1, 36))(prompts[:1] * 50, seeds))) > 10


def test_a_completion_without_an_end_is_truncated_and_counts_its_tokens(policy, prompts):
    whole, cut = (
        policy_sampler(policy, Sampling(0.0, 1.0, 1, length))(prompts[:1], [0])[0]
        for length in (36, 5)
    )
    assert not whole.truncated and whole.tokens > 5
    assert cut.truncated and cut.tokens == 5 and whole.text.startswith(cut.text)


def test_the_adapter_can_be_switched_off(policy, prompts):
    import tiny

    tuned = Policy(
        tiny.with_lora(AutoModelForCausalLM.from_pretrained(ROOT / "demo/model")),
        policy.tokenizer,
        "transformers",
    )
    for name, parameter in tuned.model.named_parameters():
        if "lora_B" in name:
            parameter.data *= 20
    base = policy_sampler(policy, GREEDY)(prompts, [0] * 12)
    assert policy_sampler(tuned, GREEDY, adapter=False)(prompts, [0] * 12) == base
    assert policy_sampler(tuned, GREEDY)(prompts, [0] * 12) != base


def test_vllm_gets_the_same_seeds_and_end_token(policy, prompts, monkeypatch, tmp_path):
    """vLLM needs a GPU. The stand-in has the signatures of vllm 0.31.0."""
    calls = {}

    class LLM:
        def __init__(
            self,
            model,
            *,
            tokenizer=None,
            trust_remote_code=False,
            quantization=None,
            seed=0,
            enable_lora=False,
            max_lora_rank=16,
            max_model_len=None,
        ):
            calls["llm"] = locals()

        def generate(self, prompts, sampling_params=None, *, use_tqdm=True, lora_request=None):
            calls["requests"] = list(zip(prompts, sampling_params, strict=True))
            calls["lora"] = lora_request
            end = policy.tokenizer.eos_token_id
            ids = [*policy.tokenizer.encode("<answer>6</answer>", add_special_tokens=False), end]
            return [
                types.SimpleNamespace(
                    outputs=[types.SimpleNamespace(token_ids=tuple(ids if i else ids[:2]))]
                )
                for i in range(len(prompts))
            ]

    vllm = types.SimpleNamespace(LLM=LLM, SamplingParams=lambda **given: given)
    lora = types.SimpleNamespace(LoRARequest=lambda name, number, path: (name, number, path))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.lora.request", lora)
    sampler = generation.vllm_samplers(
        "base/model", policy.tokenizer, SAMPLED, max_length=96, adapter=tmp_path, rank=20
    )
    cut, whole = sampler(True)(prompts[:2], [5, 6])
    assert cut.truncated and cut.tokens == 2
    assert whole == SampledCompletion("<answer>6</answer>", 4, False)
    assert calls["llm"]["max_model_len"] == 96
    assert calls["llm"]["max_lora_rank"] == 32
    assert calls["llm"]["enable_lora"]
    (prompt, parameters), _ = calls["requests"]
    assert policy.tokenizer.decode(prompt["prompt_token_ids"]) == prompts[0]
    assert parameters["seed"] == 5
    assert parameters["max_tokens"] == 36
    assert parameters["temperature"] == 1.0
    assert parameters["ignore_eos"]
    assert parameters["stop_token_ids"] == [policy.tokenizer.eos_token_id]
    assert calls["lora"] == ("adapter", 1, str(tmp_path))
    sampler(False)(prompts[:2], [5, 6])
    assert calls["lora"] is None


# ---- grading


@pytest.mark.parametrize(
    "text, reference",
    [
        (RIGHT.format("1/2"), RIGHT.format("0.5")),
        (RIGHT.format("0.5"), RIGHT.format("2")),
        ("<answer>2</answer>", RIGHT.format("2")),
        ("", RIGHT.format("2")),
        (RIGHT.format("73"), RIGHT.format("073")),
        (RIGHT.format("2") * 2, RIGHT.format("2")),
        (
            RIGHT.format("5"),
            "<reasoning>\nfirst <answer>4</answer>, no\n</reasoning>\n<answer>5</answer>",
        ),
        (RIGHT.format(""), RIGHT.format("")),
    ],
)
def test_a_completion_is_graded_as_the_reward_grades_it(text, reference):
    row = draw.graded_row(
        {"prompt": [], "answer": "", "reference": reference}, SampledCompletion(text, 1, False)
    )
    (reward,) = reward_math.final_reward([text], [reference])
    assert row["correct"] == (reward == 20) and row["well_formed"] == (reward >= 10)


# ---- the file


def run(path, problems, prompts, sampler, **settings):
    file = EvaluationFile(path, header(problems, prompts, **settings))
    return draw.evaluate(file, sampler, problems, prompts, batch_size=5)


def test_an_interrupted_evaluation_keeps_its_completions_and_continues_with_the_same_draws(
    policy, problems, prompts, tmp_path
):
    whole = run(tmp_path / "whole.jsonl", problems, prompts, policy_sampler(policy, SAMPLED))
    batches = []

    def interrupted(texts, seeds):
        if len(batches) == 2:
            raise KeyboardInterrupt
        batches.append(seeds)
        return policy_sampler(policy, SAMPLED)(texts, seeds)

    path = tmp_path / "cut.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(path, problems, prompts, interrupted)
    assert len(evaluation_file.read_evaluation(path).rows) == 10

    def counted(texts, seeds):
        batches.append(seeds)
        return policy_sampler(policy, SAMPLED)(texts, seeds)

    assert run(path, problems, prompts, counted) == whole
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    drawn = [seed for batch in batches for seed in batch]
    assert len(drawn) == len(set(drawn)) == 24  # no completion was drawn twice
    assert run(path, problems, prompts, None) == whole  # without a sampler: nothing is left to draw


def test_a_file_has_a_header_and_the_same_keys_for_every_completion(
    policy, problems, prompts, tmp_path
):
    run(tmp_path / "e.jsonl", problems, prompts, policy_sampler(policy, SAMPLED))
    first, *lines = map(json.loads, (tmp_path / "e.jsonl").read_text().splitlines())
    assert first["header"]["problems"] == 12
    assert first["header"]["samples"] == 2
    assert first["header"]["model"] == "demo"
    assert len(lines) == 24 and all(set(line) == set(evaluation_file.ROW) for line in lines)
    line = lines[0]
    assert line["prompt"] == problems[line["problem"]]["prompt"]
    assert line["reference"] == problems[line["problem"]]["reference"]


@pytest.fixture
def whole_file(policy, problems, prompts, tmp_path):
    path = tmp_path / "e.jsonl"
    run(path, problems, prompts, policy_sampler(policy, GREEDY), sampling=GREEDY, samples=1)
    return path


@pytest.mark.parametrize("cut", [2, 30])
def test_an_incomplete_last_line_is_left_out_and_drawn_again(
    policy, problems, prompts, whole_file, cut
):
    content = whole_file.read_bytes()
    whole_file.write_bytes(content[:-cut])
    evaluation = evaluation_file.read_evaluation(whole_file)
    assert evaluation.cut and len(evaluation.rows) == 11
    run(whole_file, problems, prompts, policy_sampler(policy, GREEDY), sampling=GREEDY, samples=1)
    assert whole_file.read_bytes() == content


def test_a_missing_line_end_loses_nothing(policy, problems, prompts, whole_file):
    content = whole_file.read_bytes()
    whole_file.write_bytes(b"\n".join(content.splitlines()[:-1]))
    evaluation = evaluation_file.read_evaluation(whole_file)
    assert not evaluation.cut and len(evaluation.rows) == 11
    run(whole_file, problems, prompts, policy_sampler(policy, GREEDY), sampling=GREEDY, samples=1)
    assert whole_file.read_bytes() == content


def without_line(lines, number):
    return lines[: number - 1] + lines[number:]


def with_line(lines, number, line):
    return [*lines[: number - 1], line, *lines[number:]]


def with_text(lines, number, old, new):
    return with_line(lines, number, lines[number - 1].replace(old, new))


# fmt: off
@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda lines: with_line(lines, 4, lines[3][:40]),
         "line 4: this is not a completion; the file is damaged: restore it"),
        (lambda lines: [*lines[:4], lines[3], *lines[4:]],
         "line 5: problem .*, sample 0 appears twice"),
        (lambda lines: with_text(lines, 3, '"tokens": ', '"tokens": "many", "x": '),
         "line 3: 'tokens' is missing or has the wrong type"),
        (lambda lines: with_text(lines, 3, '"correct": ', '"correct": 1, "x": '),
         "line 3: 'correct' is missing or has the wrong type"),
        (lambda lines: with_text(lines, 3, '"sample": 0', '"sample": 7'),
         "line 3: problem .*, sample 7 is beyond the 12 x 1"),
        (lambda lines: without_line(lines, 1),
         "the first line is not the header of an evaluation"),
        (lambda lines: with_text(lines, 1, '"problems": 12', '"problems": "12"'),
         "the first line is not the header"),
        (lambda lines: with_line(lines, 1, "\0\0"), "the first line is not the header"),
        (lambda lines: [], "the file is empty"),
    ],
)
# fmt: on
def test_a_file_with_other_damage_is_refused_in_one_sentence_and_stays_as_it_is(
    problems, prompts, whole_file, damage, sentence
):
    whole_file.write_text(
        "".join(line + "\n" for line in damage(whole_file.read_text().splitlines()))
    )
    content = whole_file.read_bytes()
    for use in (
        lambda: evaluation_file.read_evaluation(whole_file),
        lambda: run(whole_file, problems, prompts, None, sampling=GREEDY, samples=1),
    ):
        with pytest.raises(RecipeError, match=sentence) as error:
            use()
        assert "\n" not in str(error.value)
    assert whole_file.read_bytes() == content


@pytest.mark.parametrize(
    "change, sentence",
    [
        (
            {"samples": 3, "sampling": SAMPLED},
            "samples 1, temperature 0.0; name another file with --to, or replace",
        ),
        ({"sampling": GREEDY._replace(seed=2)}, "holds an evaluation with seed 1;"),
        ({"weights": "others"}, "holds an evaluation with other weights;"),
    ],
)
def test_a_file_with_other_settings_is_refused(problems, prompts, whole_file, change, sentence):
    content = whole_file.read_bytes()
    with pytest.raises(RecipeError, match=sentence):
        run(whole_file, problems, prompts, None, **{"sampling": GREEDY, "samples": 1, **change})
    with pytest.raises(RecipeError, match="other problems, prompts or references"):
        run(whole_file, problems, [*prompts[:-1], "another"], None, sampling=GREEDY, samples=1)
    assert whole_file.read_bytes() == content


def test_a_second_evaluation_into_the_same_file_is_refused(problems, prompts, tmp_path):
    one, other = (EvaluationFile(tmp_path / "e.jsonl", header(problems, prompts)) for _ in range(2))
    graded = draw.graded_row(problems[0], SampledCompletion("", 1, True))
    row = {"problem": 0, "sample": 0, **graded}
    with one:
        with (
            pytest.raises(RecipeError, match="another evaluation writes to it at the same time"),
            other,
        ):
            other.append(row)
        one.append(row)
    assert len(evaluation_file.read_evaluation(tmp_path / "e.jsonl").rows) == 1


def test_other_weights_in_the_same_folder_have_another_fingerprint(tmp_path):
    content = bytearray(5_000_000)
    (tmp_path / "model.safetensors").write_bytes(content)
    before = evaluation_plan.weights_fingerprint(tmp_path)
    assert evaluation_plan.weights_fingerprint(tmp_path) == before
    content[::1000] = b"\1" * len(content[::1000])
    (tmp_path / "model.safetensors").write_bytes(content)
    assert evaluation_plan.weights_fingerprint(tmp_path) != before


def test_a_lack_of_gpu_memory_is_an_error_that_names_the_remedy(problems, prompts, tmp_path):
    def exhausted(texts, seeds):
        raise torch.OutOfMemoryError("2 GiB")

    with pytest.raises(
        RecipeError, match="no memory for 5 completions at a time; use a smaller value"
    ):
        run(tmp_path / "e.jsonl", problems, prompts, exhausted)


# ---- the scores


def row(problem: int, sample: int, answer: str | None, grade: str, tokens: int = 10) -> dict:
    """`grade`: + correct, - wrong, f not well formed, t not well formed and truncated."""
    return {
        "problem": problem,
        "sample": sample,
        "answer": answer,
        "correct": grade == "+",
        "well_formed": grade in "+-",
        "truncated": grade == "t",
        "tokens": tokens,
    }


def means_of(result: scores.Scores) -> dict[str, float]:
    return {name: score.mean for name, score in result.by_name.items()}


def test_scores_are_means_over_problems():
    rows = [row(0, 0, "1", "+"), row(0, 1, "1", "-", 30), row(1, 1, None, "t"), row(1, 0, "5", "f")]
    result = scores.scores_with_intervals(rows, 2, [1, 2])
    assert means_of(result) == {
        "accuracy": 0.25,
        "pass@1": 0.25,
        "pass@2": 0.5,
        "maj@1": 0.5,
        "maj@2": 0.5,
        "format rate": 0.5,
        "truncated": 0.25,
        "mean length": 15.0,
    }
    assert result.problems == 2
    assert result.by_name["accuracy"].low == 0.0
    assert result.by_name["accuracy"].high == 0.5


def test_mean_scores_need_no_resampling(monkeypatch):
    rows = [row(0, 0, "1", "+"), row(0, 1, "1", "-", 30), row(1, 1, None, "t"), row(1, 0, "5", "f")]
    expected = means_of(scores.scores_with_intervals(rows, 2))
    monkeypatch.delattr(scores, "intervals")
    result = scores.mean_scores(rows, 2)
    assert means_of(result) == expected
    assert result.problems == 2
    assert str(result) == "accuracy 25.0%, format 50.0%"


def test_a_completion_that_is_not_well_formed_has_no_vote():
    rows = [row(0, 0, "5", "f"), row(0, 1, "5", "f"), row(0, 2, "7", "+")]
    assert scores.scores_with_intervals(rows, 3, [3]).by_name["maj@3"].mean == 1.0


def test_only_problems_with_all_samples_count():
    rows = [row(0, 0, "1", "+"), row(0, 1, "1", "+"), row(1, 0, "1", "-")]
    assert scores.scores_with_intervals(rows, 2).problems == 1
    assert scores.scores_with_intervals(rows, 2).by_name["accuracy"].mean == 1.0
    with pytest.raises(ValueError, match="no problem has all its samples"):
        scores.scores_with_intervals(rows[2:], 2)


def test_differences_are_taken_problem_by_problem():
    hard = [i % 2 for i in range(40)]
    base = [row(i, 0, "1", "-" if h or i < 4 else "+") for i, h in enumerate(hard)]
    ours = [row(i, 0, "1", "-" if h else "+") for i, h in enumerate(hard)]
    difference = scores.score_differences(ours, base, 1)
    assert difference.problems == 40 and difference.by_name["accuracy"].mean == pytest.approx(0.05)
    # No problem got worse. Separate intervals would not show that.
    assert difference.by_name["accuracy"].low >= 0
    separate = scores.scores_with_intervals(ours, 1).by_name["accuracy"]
    assert separate.low < scores.mean_scores(base, 1).by_name["accuracy"].mean


def test_the_table_shows_every_score_with_its_interval_and_differences_with_signs():
    rows = [row(i, 0, "1", "+") for i in range(3)]
    trained = scores.scores_with_intervals(rows, 1, [1])
    difference = scores.score_differences(rows, rows, 1, [1])
    text = scores.table({"trained": trained, "difference": difference})
    assert "accuracy      100.0 % [100.0, 100.0]" in text and "+0.0 % [+0.0, +0.0]" in text
    names = [line.split("  ")[0] for line in text.splitlines()[1:]]
    assert names == ["accuracy", "pass@1", "maj@1", "format rate", "truncated", "mean length"]


def test_problems_of_gsm8k_and_math_are_evaluated(policy, shared_data, tmp_path):
    for name in ("gsm8k", "hendrycks_math"):
        section = DatasetSection(name=name, path=str(shared_data / name), split="test[:2]")
        problems = load_problems(section, policy.tokenizer, 2000, 0, shuffle=False)
        assert isinstance(problems, datasets.Dataset)
        texts = draw.rendered_prompts(problems, policy.tokenizer)
        first_answer = SampledCompletion(problems[0]["reference"], 9, False)

        def sampler(prompts, seeds, completion=first_answer):
            return [completion] * len(prompts)

        path = tmp_path / f"{name}.jsonl"
        rows = run(path, problems, texts, sampler, sampling=GREEDY, samples=1)
        assert [row["correct"] for row in rows if row["problem"] == 0] == [True]
