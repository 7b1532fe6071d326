"""What a recipe may say: the documented one verbatim, every shipped one, and every way to get it
wrong.
"""

import io
import logging
import re
import textwrap

import pytest
from conftest import ROOT

from gtpo.errors import RecipeError
from gtpo.recipe import Recipe
from gtpo.recipe import command_line as cli
from gtpo.recipe.dotted_paths import load_object
from gtpo.recipe.yaml_text import write_yaml

DOCUMENTED = str(ROOT / "tests/recipes/documented.yaml")
MINIMAL = "model: {model_name: some/model}\ndataset: {name: gsm8k}\n"


def read(*flags: str, recipe: str = DOCUMENTED) -> Recipe:
    return cli.read_recipe([recipe, *flags])


@pytest.fixture
def refused(tmp_path):
    """The sentences for a recipe text and flags; fails if it is accepted."""

    def refuse(text: str, *flags: str) -> list[str]:
        (tmp_path / "bad.yaml").write_text(textwrap.dedent(text))
        with pytest.raises(RecipeError) as caught:
            cli.read_recipe([str(tmp_path / "bad.yaml"), *flags])
        return [line.replace(f"{tmp_path}/", "") for line in str(caught.value).splitlines()]

    return refuse


def test_the_documented_recipe_loads_verbatim_and_means_what_it_says():
    recipe = read()
    assert recipe.env == {"CUDA_VISIBLE_DEVICES": "5"}
    assert recipe.model.model_name == "meta-llama/meta-Llama-3.1-8B-Instruct"
    assert (
        recipe.model.max_seq_length,
        recipe.max_prompt_length,
        recipe.max_completion_length,
    ) == (5500, 4000, 1500)
    assert (recipe.model.lora_rank, recipe.model.lora_alpha, recipe.model.random_seed) == (
        128,
        128,
        3407,
    )
    assert recipe.dataset.kind == "hendrycks_math" and len(recipe.dataset.subsets) == 7
    assert (
        recipe.dataset.system_instruction
        == "You are a helpful assistant for solving math problems. Given a question, first think"
        " step by step between <reasoning> and </reasoning>. Then, give the final answer between"
        " <answer> and </answer>.\n"
    )
    training = recipe.training
    assert (training.learning_rate, training.adam_beta1, training.num_generations) == (
        1e-6,
        0.999999,
        8,
    )
    assert training.optimizer == "paged_adamw_8bit" and training.report_to == ["wandb"]
    assert recipe.trainer.reward_funcs == ["reward_math.final_reward"]
    runtime = recipe.gtpo_runtime
    assert (
        runtime.ent_threshold,
        runtime.ent_scale,
        runtime.w_raw,
        runtime.pad_id,
        runtime.eps,
    ) == (0.7, 0.1, 2.0, 128004, 1e-6)
    assert (
        runtime.torch_compile_options["trace.enabled"] is False
        and len(runtime.torch_compile_options) == 5
    )


def test_the_run_directory_has_the_documented_name():
    assert (
        read().output_dir()
        == "./GTPO_LLAMA8B_MATH_adam1-0.999999_adam2-0.999999_wd-0.1_gen8_acc-1_wu0.005_len5500_lr1e-06_BetaKL0.0"
    )
    assert (
        read("--run-name", "a/b\\c", "--output_root", "out/")
        .output_dir()
        .startswith("out/a-b-c_adam1-")
    )


def test_config_yaml_is_the_documented_recipe_without_a_gpu_number():
    documented, ours = (cli.read_recipe([file]) for file in (DOCUMENTED, str(ROOT / "config.yaml")))
    assert ours.env == {}
    assert ours.model_dump(exclude={"env"}) == documented.model_dump(exclude={"env"})


@pytest.mark.parametrize(
    "file", sorted([*ROOT.glob("recipes/*.yaml"), ROOT / "config.yaml"]), ids=lambda f: f.name
)
def test_every_shipped_recipe_is_valid_and_comes_back_from_its_saved_form(file, tmp_path):
    recipe = cli.read_recipe([str(file)])
    values, _ = recipe.saved()
    with (tmp_path / "saved.yaml").open("w") as stream:
        write_yaml(values, stream)
    assert cli.read_recipe([str(tmp_path / "saved.yaml")]).saved() == recipe.saved()


def test_only_the_llama_recipes_name_a_padding_id():
    for file in ROOT.glob("recipes/*.yaml"):
        pad_id = cli.read_recipe([str(file)]).gtpo_runtime.pad_id
        assert pad_id == (128004 if "llama" in file.name else None), file.name


@pytest.mark.parametrize(
    "gtpo, grpo",
    [
        (f, f.with_name(f"{f.stem}_grpo.yaml"))
        for f in sorted(ROOT.glob("recipes/*.yaml"))
        if not f.stem.endswith("_grpo")
    ],
    ids=lambda f: f.name,
)
def test_each_recipe_has_a_grpo_baseline_that_differs_in_the_trainer_alone(gtpo, grpo):
    ours, baseline = (
        cli.read_recipe([str(file)]).model_dump(exclude={"run_name"}) for file in (gtpo, grpo)
    )
    assert baseline.pop("trainer")["class_path"] == "custom_trainer.original.UnslothGRPOTrainer"
    assert ours.pop("trainer")["class_path"] == "gtpo.gtpo_training.UnslothGTPOTrainer"
    assert ours == baseline


# ---- flags


def test_flags_beat_the_file_and_the_file_beats_the_defaults(tmp_path):
    (tmp_path / "r.yaml").write_text(MINIMAL + "training: {learning_rate: 2e-6}\n")
    recipe = read("--training.weight_decay", "0.5", recipe=str(tmp_path / "r.yaml"))
    assert (recipe.training.weight_decay, recipe.training.learning_rate, recipe.training.beta) == (
        0.5,
        2e-6,
        0.0,
    )
    assert (
        read(
            "--training.learning_rate=3e-6", recipe=str(tmp_path / "r.yaml")
        ).training.learning_rate
        == 3e-6
    )


def test_short_flags_mean_their_long_forms():
    recipe = read(
        "--model-name",
        "x/y",
        "--dataset_split",
        "test",
        "--cuda",
        "7",
        "--run-name",
        "r",
        "--dataset-subset",
        "algebra",
        "--dataset-subset",
        "geometry",
    )
    assert (
        recipe.model.model_name == "x/y"
        and recipe.dataset.split == "test"
        and recipe.run_name == "r"
    )
    assert recipe.env == {"CUDA_VISIBLE_DEVICES": "7"} and recipe.dataset.subsets == [
        "algebra",
        "geometry",
    ]


def test_gsm8k_over_a_recipe_with_math_subsets_simply_works():
    assert read("--dataset-name", "gsm8k").dataset.kind == "gsm8k"
    recipe = read("--dataset-name", "gsm8k", "--dataset-subset", "socratic", "ignored")
    assert recipe.dataset.subset == "socratic"


@pytest.mark.parametrize(
    "name, kind",
    [
        ("math", "hendrycks_math"),
        ("EleutherAI/hendrycks_math", "hendrycks_math"),
        ("openai/gsm8k", "gsm8k"),
        ("gtpo.data.load_problems", "function"),
    ],
)
def test_datasets_have_aliases(name, kind):
    assert read("--dataset-name", name).dataset.kind == kind


def test_lists_are_written_with_spaces_or_brackets():
    for words in (["q_proj", "v_proj"], ["[q_proj, v_proj]"]):
        assert read("--model.target_modules", *words).model.target_modules == ["q_proj", "v_proj"]
    assert read("--training.reward_weights", "0.5").training.reward_weights == [0.5]


def test_map_keys_may_contain_a_dot_and_hyphens_equal_underscores():
    options = read(
        "--gtpo-runtime.torch-compile-options.trace.enabled",
        "true",
        "--gtpo_runtime.torch_compile_options.epilogue_fusion",
        "false",
    ).gtpo_runtime.torch_compile_options
    assert (
        options["trace.enabled"] is True
        and options["epilogue_fusion"] is False
        and options["shape_padding"] is True
    )


def test_every_option_of_trl_is_taken_by_its_own_name_and_type():
    given = read(
        "--training.temperature",
        "0.7",
        "--training.max_steps=-1",
        "--training.bf16",
        "false",
        "--training.generation_kwargs",
        "{top_k: 5}",
        "--training.log_completions",
    ).training.trl_options()
    assert given == {
        "temperature": 0.7,
        "max_steps": -1,
        "bf16": False,
        "generation_kwargs": {"top_k": 5},
        "log_completions": True,
    }


def test_text_stays_text_and_null_is_null():
    assert read("--run-name", "007").run_name == "007"
    assert read("--env.MY_FLAG", "0.10").env["MY_FLAG"] == "0.10"
    assert read("--gtpo_runtime.pad_id", "null").gtpo_runtime.pad_id is None


def test_flags_are_never_abbreviated():
    with pytest.raises(RecipeError, match="--training.learning: unknown flag"):
        read("--training.learning", "1")


@pytest.mark.parametrize("given, used", [("8", 8), ('"8"', 8), ('"8/12"', 8), ("4 / 8", 4)])
def test_num_generations_takes_a_number_text_or_the_first_of_several(tmp_path, caplog, given, used):
    (tmp_path / "r.yaml").write_text(MINIMAL + f"training: {{num_generations: {given}}}\n")
    with caplog.at_level(logging.WARNING):
        assert read(recipe=str(tmp_path / "r.yaml")).training.num_generations == used
    assert ("names several numbers" in caplog.text) == ("/" in given)


def test_numbers_like_1e_6_are_numbers_and_words_like_no_are_words(tmp_path):
    (tmp_path / "r.yaml").write_text(
        MINIMAL + "run_name: no\ntraining: {learning_rate: 1e-6, epsilon: 1e-1}\n"
    )
    recipe = read(recipe=str(tmp_path / "r.yaml"))
    assert recipe.run_name == "no" and recipe.training.epsilon == 0.1


def test_a_section_whose_lines_are_all_commented_out_has_its_defaults(tmp_path):
    (tmp_path / "r.yaml").write_text(MINIMAL + "env:\n  # A: b\ntraining:\n")
    assert read(recipe=str(tmp_path / "r.yaml")).training.num_generations == 8


# ---- what is saved


def test_secrets_never_reach_a_saved_recipe(tmp_path):
    (tmp_path / "r.yaml").write_text(
        MINIMAL
        + textwrap.dedent("""
        env: {HF_TOKEN: abc, WANDB_API_KEY: def, TOKENIZERS_PARALLELISM: "false", AWS_SECRET_ACCESS_KEY: x, NOTE: hf_abcdefghijklmnopqrstuv, A: b}
        """)
    )
    values, secrets = read(recipe=str(tmp_path / "r.yaml")).saved()
    assert values["env"] == {"TOKENIZERS_PARALLELISM": "false", "A": "b"}
    assert sorted(secrets) == ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "NOTE", "WANDB_API_KEY"]
    stream = io.StringIO()
    write_yaml(values, stream)
    assert not re.search("abc|def$", stream.getvalue())


# ---- mistakes: where, what was given, what would work


def test_all_unknown_keys_are_told_at_once_with_their_source_and_the_nearest_name(refused):
    told = refused(
        """
        modle: {a: 1}
        model: {model_name: x, lora_rnk: 8}
        dataset: {name: gsm8k}
        training: {temprature: 1}
        """,
        "--training.max_stepps",
        "3",
        "--modle-name",
        "y",
        "--completely_else",
        "1",
    )
    assert told == [
        "--training.max_stepps: unknown flag; did you mean --training.max_steps?",
        "--modle-name: unknown flag; did you mean --model_name?",
        "--completely_else: unknown flag; --help lists the known ones",
        "model.lora_rnk: unknown key in bad.yaml; did you mean model.lora_rank?",
        "training.temprature: unknown key in bad.yaml; did you mean training.temperature?",
        "modle: unknown key in bad.yaml; did you mean model?",
    ]


@pytest.mark.parametrize(
    "text, sentence",
    [
        (
            MINIMAL + "training: {learning_rate: fast}",
            "training.learning_rate: 'fast' in bad.yaml is not valid; it should be a number",
        ),
        (
            MINIMAL + "training: {learning_rate: true}",
            "training.learning_rate: true is no value for this key",
        ),
        (
            MINIMAL + "training: {learning_rate: .nan}",
            "training.learning_rate: nan in bad.yaml is not valid; it should be a finite number",
        ),
        (
            MINIMAL + "training: {max_steps: 0}",
            "training.max_steps: 0 is no number of steps; use 1 or more, or -1 for whole epochs",
        ),
        (
            MINIMAL + "training: {temperature: 0}",
            "training.temperature: 0.0 is too small; use 1e-06 or more",
        ),
        (
            MINIMAL + "trainer: {class_path: 5}",
            (
                "trainer.class_path: '5' is no dotted path; use one such as package.module.name or"
                " package.module:name"
            ),
        ),
        (
            MINIMAL + "run_name: ''",
            "run_name: '' in bad.yaml is not valid; it should be text that is not empty",
        ),
        (
            "[" * 3000 + "]" * 3000,
            "bad.yaml: this is not valid YAML for a recipe (it is nested too deeply)",
        ),
        (
            MINIMAL + "training: {num_generations: 1}",
            "training.num_generations: 1 leaves no group to compare; use 2 or more",
        ),
        (
            MINIMAL + "evaluation: {every: 5}",
            (
                "evaluation.every: there are no held-out problems; set evaluation.path or"
                " evaluation.split"
            ),
        ),
        (
            MINIMAL + "evaluation: {samples: 4}",
            (
                "evaluation.temperature: 0 is greedy, so all 4 samples would be the same; use 1.0,"
                " or 1 sample"
            ),
        ),
        (
            MINIMAL + "training: 5",
            "training: 5 in bad.yaml is not valid; it should be a section with keys of its own",
        ),
        (MINIMAL + "env: [a]", "env: ['a'] in bad.yaml is not valid; it should be a mapping"),
        (
            MINIMAL + "training: {report_to: wandbb}",
            "training.report_to: 'wandbb' in bad.yaml is not valid; did you mean 'wandb'?",
        ),
        (
            MINIMAL + "training: {lr_scheduler_type: cosin}",
            "training.lr_scheduler_type: 'cosin' in bad.yaml is not valid; did you mean 'cosine'?",
        ),
        (
            MINIMAL + "training: {optimizer: adamw_torch, optim: sgd}",
            (
                "training.optimizer: given together with training.optim, which is the same setting;"
                " keep one"
            ),
        ),
        (
            MINIMAL + "training: {warmup_ratio: 0.1, warmup_steps: 5}",
            (
                "training.warmup_ratio: given together with training.warmup_steps, which is the"
                " same setting; keep one"
            ),
        ),
        (
            MINIMAL + "training: {max_completion_length: 5}",
            (
                "training.max_completion_length: it cannot be set here; it is model.max_seq_length"
                " - training.max_prompt_length; set those"
            ),
        ),
        (
            MINIMAL + "training: {output_dir: x}",
            (
                "training.output_dir: it cannot be set here; the run directory is named after the"
                " run; set output_root or run_name"
            ),
        ),
        (
            MINIMAL + "training: {resume_from_checkpoint: x}",
            (
                "training.resume_from_checkpoint: it cannot be set here; give --resume, or --resume"
                " CHECKPOINT, on the command line"
            ),
        ),
        (
            MINIMAL + "training: {max_prompt_length: 6000}",
            (
                "training.max_prompt_length: 6000 is larger than model.max_prompt_length (5500);"
                " use at most 5500"
            ),
        ),
        (
            MINIMAL + "training: {max_prompt_length: 5500}",
            (
                "training.max_prompt_length: 5500 leaves 0 of model.max_seq_length (5500) for"
                " completions; use at most 5499"
            ),
        ),
        (
            MINIMAL + "training: {reward_weights: [1, 2]}",
            "training.reward_weights: 2 weights for 1 trainer.reward_funcs; give one for each",
        ),
        (
            MINIMAL + "training: {top_entropy_quantile: 0.2}",
            (
                "training.top_entropy_quantile: it does not go with GTPO, which uses TRL's entropy"
                " mask for its own factor; leave it out, or use"
                " custom_trainer.original.UnslothGRPOTrainer"
            ),
        ),
        (
            "model: {model_name: x}\ndataset: {name: gsm9k}",
            (
                "dataset.name: 'gsm9k' is not known; use gsm8k, hendrycks_math, or a dotted path"
                " such as my_data.load"
            ),
        ),
        (
            "model: {model_name: x}\ndataset: {split: train}",
            (
                "dataset: nothing to train on; set dataset.name (gsm8k, hendrycks_math,"
                " my_module.load) or dataset.path"
            ),
        ),
        (
            "model: {model_name: x}\ndataset: {name: math, split: validation}",
            "dataset.split: math has no split 'validation'; it has train and test",
        ),
        ("dataset: {name: gsm8k}", "model: missing; set it in bad.yaml"),
        (
            "model: {model_name: x, max_prompt_length: 9000}\ndataset: {name: gsm8k}",
            (
                "model.max_prompt_length: 9000 is larger than model.max_seq_length (5500); use at"
                " most 5500"
            ),
        ),
        (
            "- a\n- b",
            (
                "bad.yaml: holds a list; a recipe is a mapping with at least the sections model and"
                " dataset"
            ),
        ),
        (
            "",
            (
                "bad.yaml: is empty; a recipe is a mapping with at least the sections model and"
                " dataset"
            ),
        ),
        (
            "model: {a: 1}\nmodel: {b: 2}",
            (
                "bad.yaml, line 2: this is not valid YAML for a recipe (while constructing a"
                ' mapping found duplicate key "model")'
            ),
        ),
        (
            "model: [1\nb: 2",
            (
                "bad.yaml, line 2: this is not valid YAML for a recipe (while parsing a flow"
                " sequence expected ',' or ']', but got ':')"
            ),
        ),
    ],
    ids=lambda value: None,
)
def test_a_mistake_is_one_sentence(refused, text, sentence):
    assert refused(text) == [sentence]


def test_a_wrong_value_on_the_command_line_is_told_as_such(refused):
    assert refused(MINIMAL, "--model.load_in_4bit", "maybe") == [
        "model.load_in_4bit: 'maybe' on the command line is not valid; it should be true or false"
    ]
    assert refused(MINIMAL, "--dry-run=false") == [
        "--dry-run: takes no value; give it alone, or leave it out"
    ]
    assert refused(MINIMAL, "--model", "x")[0].startswith(
        "--model: unknown flag; it is a section, use --model.<key> <value>"
    )
    assert refused(MINIMAL, "--model.lora_rank") == ["--model.lora_rank: needs a value"]
    assert refused(MINIMAL, "--training.seed", "1", "--model.random_seed", "2") == [
        "model.random_seed: given together with training.seed, which is the same setting; keep one"
    ]


def test_a_missing_file_a_folder_and_two_files_are_told_apart(tmp_path):
    for argv, sentence in [
        (["nowhere.yaml"], "nowhere.yaml: there is no such recipe file"),
        ([str(tmp_path)], "cannot be read as a recipe"),
        ([DOCUMENTED, "more.yaml"], "more.yaml: neither a flag nor a value that a flag takes"),
    ]:
        with pytest.raises(RecipeError, match=sentence):
            cli.read_recipe(argv)


@pytest.mark.parametrize(
    "dotted, sentence",
    [
        (
            "no_such_module.reward",
            (
                "names module 'no_such_module', but there is no module 'no_such_module' here or"
                " installed"
            ),
        ),
        ("gtpo.no_such.reward", "there is no module 'gtpo.no_such' here or installed"),
        (
            "reward_math.final_rewrd",
            "module 'reward_math' has no 'final_rewrd'; it has final_reward",
        ),
        (
            "reward_math:final_rewrd",
            "module 'reward_math' has no 'final_rewrd'; it has final_reward",
        ),
        (
            "gtpo.runs.directory.LIBRARIES",
            "is a collection, which cannot be called; name a function or class",
        ),
        (
            "gtpo.gtpo_training.ENT_SCALE",
            "is a float, which cannot be called; name a function or class",
        ),
        ("gtpo.shaping", "is a module; name a function or class in it"),
        (
            "not a path",
            (
                "'not a path' is no dotted path; use one such as package.module.name or"
                " package.module:name"
            ),
        ),
        (
            "reward",
            (
                "'reward' is no dotted path; use one such as package.module.name or"
                " package.module:name"
            ),
        ),
    ],
)
def test_a_wrong_dotted_path_says_what_is_wrong_with_it(dotted, sentence):
    with pytest.raises(RecipeError) as caught:
        read("--trainer.reward_funcs", dotted)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "dotted", ["reward_math:final_reward", "trl.rewards.accuracy_reward", "math.sqrt", "json.dumps"]
)
def test_paths_that_only_the_import_can_judge_are_let_through(dotted):
    assert read("--trainer.reward_funcs", dotted).trainer.reward_funcs == [dotted]


def test_a_module_beside_the_recipe_or_in_the_current_folder_is_found(tmp_path, monkeypatch):
    (tmp_path / "beside").mkdir()
    (tmp_path / "beside" / "my_reward_beside.py").write_text(
        "def pay(completions, **kwargs):\n    return [0.0] * len(completions)\n"
    )
    (tmp_path / "my_reward_here.py").write_text(
        "pay = lambda completions, **kwargs: [0.0] * len(completions)\n"
    )
    (tmp_path / "beside" / "r.yaml").write_text(
        MINIMAL + "trainer: {reward_funcs: [my_reward_beside.pay, my_reward_here.pay]}\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = cli.read_recipe(["beside/r.yaml"])
    assert [load_object(path)(["x"]) for path in recipe.trainer.reward_funcs] == [[0.0], [0.0]]


def test_a_module_with_a_syntax_error_is_told_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text("x = 1\ndef pay(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="broken_reward.py, line 2 is not valid Python"):
        read("--trainer.reward_funcs", "broken_reward.pay")
