"""Recipes: the documented one and every shipped one are valid, and each mistake gets a sentence."""

import io
import logging
import re
import textwrap

import pytest
from conftest import ROOT

import train_model
from gtpo.errors import RecipeError
from gtpo.recipe import Recipe, dialects, keys
from gtpo.recipe import command_line as cli
from gtpo.recipe.dotted_paths import load_object
from gtpo.recipe.yaml_text import write_yaml

DOCUMENTED = str(ROOT / "tests/recipes/documented.yaml")
MINIMAL = "model: {model_name: some/model}\ndataset: {name: gsm8k}\n"


def read(*flags: str, recipe: str = DOCUMENTED) -> Recipe:
    return cli.read_recipe([recipe, *flags])


@pytest.fixture
def refused(tmp_path):
    """Returns the sentences for a recipe text and flags; fails if the recipe is accepted."""

    def refuse(text: str, *flags: str) -> list[str]:
        (tmp_path / "bad.yaml").write_text(textwrap.dedent(text))
        with pytest.raises(RecipeError) as caught:
            cli.read_recipe([str(tmp_path / "bad.yaml"), *flags])
        return [line.replace(f"{tmp_path}/", "") for line in str(caught.value).splitlines()]

    return refuse


def test_the_documented_recipe_is_read_as_it_is_written():
    recipe = read()
    model, dataset, training = recipe.model, recipe.dataset, recipe.training
    runtime = recipe.gtpo_runtime
    assert recipe.env == {"CUDA_VISIBLE_DEVICES": "5"}
    assert model.model_name == "meta-llama/meta-Llama-3.1-8B-Instruct"
    assert (model.max_seq_length, recipe.max_prompt_length) == (5500, 4000)
    assert recipe.max_completion_length == 1500
    assert (model.lora_rank, model.lora_alpha, model.random_seed) == (128, 128, 3407)
    assert dataset.kind == "hendrycks_math" and len(dataset.subsets) == 7
    assert dataset.system_instruction == (
        "You are a helpful assistant for solving math problems. Given a question, first think step"
        " by step between <reasoning> and </reasoning>. Then, give the final answer between"
        " <answer> and </answer>.\n"
    )
    assert (training.learning_rate, training.adam_beta1) == (1e-6, 0.999999)
    assert training.num_generations == 8
    assert training.optimizer == "paged_adamw_8bit" and training.report_to == ["wandb"]
    assert recipe.trainer.reward_funcs == ["reward_math.final_reward"]
    assert (runtime.ent_threshold, runtime.ent_scale, runtime.w_raw) == (0.7, 0.1, 2.0)
    assert (runtime.pad_id, runtime.eps) == (128004, 1e-6)
    assert runtime.torch_compile_options["trace.enabled"] is False
    assert len(runtime.torch_compile_options) == 5


def test_the_run_directory_has_the_documented_name():
    assert read().output_dir() == (
        "./GTPO_LLAMA8B_MATH_adam1-0.999999_adam2-0.999999_wd-0.1_gen8_acc-1_wu0.005_len5500"
        "_lr1e-06_BetaKL0.0"
    )
    recipe = read("--run-name", "a/b\\c", "--output_root", "out/")
    assert recipe.output_dir().startswith("out/a-b-c_adam1-")


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


GTPO_RECIPES = [f for f in sorted(ROOT.glob("recipes/*.yaml")) if not f.stem.endswith("_grpo")]


@pytest.mark.parametrize("file", GTPO_RECIPES, ids=lambda f: f.name)
def test_each_recipe_has_a_grpo_baseline_that_differs_in_the_trainer_alone(file):
    gtpo, grpo = (
        cli.read_recipe([str(path)]).model_dump(exclude={"run_name"})
        for path in (file, file.with_name(f"{file.stem}_grpo.yaml"))
    )
    assert gtpo.pop("trainer")["class_path"] == "gtpo.gtpo_training.UnslothGTPOTrainer"
    assert grpo.pop("trainer")["class_path"] == "custom_trainer.original.UnslothGRPOTrainer"
    assert gtpo == grpo


# ---- flags


def test_flags_beat_the_file_and_the_file_beats_the_defaults(tmp_path):
    file = tmp_path / "r.yaml"
    file.write_text(MINIMAL + "training: {learning_rate: 2e-6}\n")
    training = read("--training.weight_decay", "0.5", recipe=str(file)).training
    assert (training.weight_decay, training.learning_rate, training.beta) == (0.5, 2e-6, 0.0)
    training = read("--training.learning_rate=3e-6", recipe=str(file)).training
    assert training.learning_rate == 3e-6


def test_short_flags_mean_their_long_forms():
    recipe = read(
        *("--model-name", "x/y"),
        *("--dataset_split", "test"),
        *("--cuda", "7"),
        *("--run-name", "r"),
        *("--dataset-subset", "algebra"),
        *("--dataset-subset", "geometry"),
    )
    assert (recipe.model.model_name, recipe.dataset.split, recipe.run_name) == ("x/y", "test", "r")
    assert recipe.env == {"CUDA_VISIBLE_DEVICES": "7"}
    assert recipe.dataset.subsets == ["algebra", "geometry"]


def test_a_recipe_with_subsets_of_math_can_be_switched_to_gsm8k():
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
        *("--gtpo-runtime.torch-compile-options.trace.enabled", "true"),
        *("--gtpo_runtime.torch_compile_options.epilogue_fusion", "false"),
    ).gtpo_runtime.torch_compile_options
    assert options["trace.enabled"] is True
    assert options["epilogue_fusion"] is False
    assert options["shape_padding"] is True


def test_every_option_of_trl_is_accepted_by_its_own_name_and_type():
    given = read(
        *("--training.temperature", "0.7"),
        "--training.max_steps=-1",
        *("--training.bf16", "false"),
        *("--training.generation_kwargs", "{top_k: 5}"),
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
def test_num_generations_is_a_number_text_or_the_first_of_several(tmp_path, caplog, given, used):
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


# ---- the help and the page of the docs


def test_the_help_describes_every_switch_short_flag_and_key_within_100_columns():
    text = keys.help_text()
    assert max(map(len, text.splitlines())) <= 100
    for name in [*keys.SWITCHES, *keys.ALIASES]:
        assert f"\n  --{name.replace('_', '-')} " in text
    for key in keys.describe_keys():
        assert f"\n  --{key.key} " in text


def test_every_key_of_ours_has_a_type_a_default_and_a_sentence():
    for key in keys.describe_keys():
        if not key.only_trl:
            assert key.type and key.default and key.text.endswith("."), key


def test_a_default_that_follows_another_key_is_named():
    described = {key.key: key for key in keys.describe_keys()}
    assert described["model.lora_alpha"].default == "the value of lora_rank"
    assert described["model.model_name"].default == "required"
    assert described["training.temperature"].default == "1.0"
    assert described["training.output_dir"].text.startswith("Cannot be set: ")


def test_the_recipe_reference_is_current():
    page = (ROOT / "docs/recipe_reference.md").read_text(encoding="utf-8")
    assert page == keys.reference_page() + "\n", (
        "run: python -m gtpo.recipe.keys > docs/recipe_reference.md"
    )


# ---- what is saved


def test_secrets_never_reach_a_saved_recipe(tmp_path):
    env = (
        'env: {HF_TOKEN: abc, WANDB_API_KEY: def, TOKENIZERS_PARALLELISM: "false",'
        " AWS_SECRET_ACCESS_KEY: x, NOTE: hf_abcdefghijklmnopqrstuv, A: b}\n"
    )
    (tmp_path / "r.yaml").write_text(MINIMAL + env)
    values, secrets = read(recipe=str(tmp_path / "r.yaml")).saved()
    assert values["env"] == {"TOKENIZERS_PARALLELISM": "false", "A": "b"}
    assert sorted(secrets) == ["AWS_SECRET_ACCESS_KEY", "HF_TOKEN", "NOTE", "WANDB_API_KEY"]
    stream = io.StringIO()
    write_yaml(values, stream)
    assert not re.search("abc|def$", stream.getvalue())


# ---- mistakes: where, what was given, what would work


def test_all_unknown_keys_are_reported_at_once_with_source_and_nearest_name(refused):
    sentences = refused(
        """
        modle: {a: 1}
        model: {model_name: x, lora_rnk: 8}
        dataset: {name: gsm8k}
        training: {temprature: 1}
        """,
        *("--training.max_stepps", "3"),
        *("--modle-name", "y"),
        *("--completely_else", "1"),
    )
    assert sentences == [
        "--training.max_stepps: unknown flag; did you mean --training.max_steps?",
        "--modle-name: unknown flag; did you mean --model_name?",
        "--completely_else: unknown flag; --help lists the known ones",
        "model.lora_rnk: unknown key in bad.yaml; did you mean model.lora_rank?",
        "training.temprature: unknown key in bad.yaml; did you mean training.temperature?",
        "modle: unknown key in bad.yaml; did you mean model?",
    ]


# values of one key: section, key, value, the sentence after "section.key: "
WRONG_VALUES = [
    (
        *("training", "learning_rate", "fast"),
        "'fast' in bad.yaml is not valid; it should be a number",
    ),
    ("training", "learning_rate", "true", "true is not a valid value for this key"),
    (
        *("training", "learning_rate", ".nan"),
        "nan in bad.yaml is not valid; it should be a finite number",
    ),
    (
        *("training", "max_steps", "0"),
        "0 is not a number of steps; use 1 or more, or -1 for whole epochs",
    ),
    ("training", "temperature", "0", "0.0 is too small; use 1e-06 or more"),
    ("training", "num_generations", "1", "1 leaves no group to compare; use 2 or more"),
    (
        *("training", "report_to", "wandbb"),
        "'wandbb' in bad.yaml is not valid; did you mean 'wandb'?",
    ),
    (
        *("training", "lr_scheduler_type", "cosin"),
        "'cosin' in bad.yaml is not valid; did you mean 'cosine'?",
    ),
    (
        *("training", "max_completion_length", "5"),
        "it cannot be set here; it is model.max_seq_length - training.max_prompt_length; set those"
        " two",
    ),
    (
        *("training", "output_dir", "x"),
        "it cannot be set here; the run directory is named after the run; set output_root or"
        " run_name",
    ),
    (
        *("training", "resume_from_checkpoint", "x"),
        "it cannot be set here; give --resume, or --resume CHECKPOINT, on the command line",
    ),
    (
        *("training", "max_prompt_length", "6000"),
        "6000 is larger than model.max_prompt_length (5500); use at most 5500",
    ),
    (
        *("training", "max_prompt_length", "5500"),
        "5500 leaves 0 of model.max_seq_length (5500) for completions; use at most 5499",
    ),
    (
        *("training", "reward_weights", "[1, 2]"),
        "2 weights for 1 trainer.reward_funcs; give one for each",
    ),
    (
        *("training", "top_entropy_quantile", "0.2"),
        "it cannot be combined with GTPO, which uses TRL's entropy mask for its own factor; leave"
        " it out, or use custom_trainer.original.UnslothGRPOTrainer",
    ),
    (
        *("trainer", "class_path", "5"),
        "'5' is not a dotted path; use one such as package.module.name or package.module:name",
    ),
    (
        *("evaluation", "every", "5"),
        "there are no held-out problems; set evaluation.path or evaluation.split",
    ),
]


@pytest.mark.parametrize("section, key, value, sentence", WRONG_VALUES, ids=lambda _: None)
def test_a_wrong_value_gets_one_sentence(refused, section, key, value, sentence):
    text = f"{MINIMAL}{section}: {{{key}: {value}}}"
    source = "" if "bad.yaml" in sentence else " (set in bad.yaml)"
    assert refused(text) == [f"{section}.{key}: {sentence}{source}"]


# whole recipes, and the sentence for each
A_RECIPE_IS = "a recipe is a mapping with at least the sections model and dataset"
NOT_YAML = "this is not valid YAML for a recipe"
WRONG_RECIPES = [
    (
        MINIMAL + "run_name: ''",
        "run_name: '' in bad.yaml is not valid; it should be text that is not empty",
    ),
    (
        MINIMAL + "training: 5",
        "training: 5 in bad.yaml is not valid; it should be a section with keys of its own",
    ),
    (MINIMAL + "env: [a]", "env: ['a'] in bad.yaml is not valid; it should be a mapping"),
    (
        MINIMAL + "evaluation: {samples: 4}",
        "evaluation.temperature: 0 is greedy, so all 4 samples would be the same; use 1.0, or 1"
        " sample",
    ),
    (
        MINIMAL + "training: {optimizer: adamw_torch, optim: sgd}",
        "training.optimizer: given together with training.optim, which is the same setting; keep"
        " one (set in bad.yaml)",
    ),
    (
        MINIMAL + "training: {warmup_ratio: 0.1, warmup_steps: 5}",
        "training.warmup_ratio: given together with training.warmup_steps, which is the same"
        " setting; keep one (set in bad.yaml)",
    ),
    (
        "model: {model_name: x}\ndataset: {name: gsm9k}",
        "dataset.name: 'gsm9k' is not known; use gsm8k, hendrycks_math, a dataset of the hub as"
        " owner/name, or a dotted path such as my_data.load (set in bad.yaml)",
    ),
    (
        "model: {model_name: x}\ndataset: {split: train}",
        "dataset: there is no dataset to train on; set dataset.name (gsm8k, hendrycks_math,"
        " owner/name, my_module.load) or dataset.path (set in bad.yaml)",
    ),
    (
        "model: {model_name: x}\ndataset: {name: math, split: validation}",
        "dataset.split: math has no split 'validation'; it has train and test (set in bad.yaml)",
    ),
    ("dataset: {name: gsm8k}", "model: missing; set it in bad.yaml"),
    (
        "model: {model_name: x, max_prompt_length: 9000}\ndataset: {name: gsm8k}",
        "model.max_prompt_length: 9000 is larger than model.max_seq_length (5500); use at most"
        " 5500 (set in bad.yaml)",
    ),
    ("- a\n- b", f"bad.yaml: contains a list; {A_RECIPE_IS}"),
    ("", f"bad.yaml: is empty; {A_RECIPE_IS}"),
    (
        "model: {a: 1}\nmodel: {b: 2}",
        f'bad.yaml, line 2: {NOT_YAML} (while constructing a mapping found duplicate key "model")',
    ),
    (
        "model: [1\nb: 2",
        f"bad.yaml, line 2: {NOT_YAML} (while parsing a flow sequence expected ',' or ']', but got"
        " ':')",
    ),
    ("[" * 3000 + "]" * 3000, f"bad.yaml: {NOT_YAML} (it is nested too deeply)"),
]


@pytest.mark.parametrize("text, sentence", WRONG_RECIPES, ids=lambda _: None)
def test_a_wrong_recipe_gets_one_sentence(refused, text, sentence):
    assert refused(text) == [sentence]


def test_a_mistake_on_the_command_line_is_reported_as_such(refused):
    assert refused(MINIMAL, "--model.load_in_4bit", "maybe") == [
        "model.load_in_4bit: 'maybe' from --model.load_in_4bit is not valid; it should be true or"
        " false"
    ]
    assert refused(MINIMAL, "--dry-run=false") == [
        "--dry-run: takes no value; give it alone, or leave it out"
    ]
    assert refused(MINIMAL, "--model", "x")[0].startswith(
        "--model: unknown flag; it is a section, use --model.<key> <value>, for example"
        " --model.model_name"
    )
    assert refused(MINIMAL, "--model.lora_rank") == ["--model.lora_rank: needs a value"]
    assert refused(MINIMAL, "--training.seed", "1", "--model.random_seed", "2") == [
        "model.random_seed: given together with training.seed, which is the same setting; keep one"
        " (set by --model.random_seed; training.seed is set by --training.seed)"
    ]
    assert refused(MINIMAL, "--force-resume", "--json") == [
        "--force-resume: works only with --resume; give both",
        "--json: works only with --check; give both",
    ]


def test_a_missing_file_a_folder_and_two_files_have_different_sentences(tmp_path):
    for argv, sentence in [
        (["nowhere.yaml"], "nowhere.yaml: there is no such recipe file"),
        ([str(tmp_path)], "cannot be read as a recipe"),
        ([DOCUMENTED, "more.yaml"], "more.yaml: neither a flag nor the value of a flag"),
    ]:
        with pytest.raises(RecipeError, match=sentence):
            cli.read_recipe(argv)


def test_a_sentence_says_which_file_or_flag_each_value_comes_from(refused):
    assert refused(MINIMAL, "--training.num-generations", "1") == [
        "training.num_generations: 1 leaves no group to compare; use 2 or more"
        " (set by --training.num-generations)"
    ]
    text = MINIMAL + "training: {max_prompt_length: 50}"
    assert refused(text, "--model.max_seq_length", "50") == [
        "training.max_prompt_length: 50 leaves 0 of model.max_seq_length (50) for completions;"
        " use at most 49 (set in bad.yaml; model.max_seq_length is set by --model.max_seq_length)"
    ]
    assert refused(MINIMAL + "rewards: {workers: 2, isolated: no}") == [
        "rewards.workers: 2 workers need processes of their own; set rewards.isolated to true"
        " (set in bad.yaml)"
    ]


# ---- names that other trainers use

DIALECTS = {
    "model": "model.model_name",
    "model_name_or_path": "model.model_name",
    "base_model": "model.model_name",
    "r": "model.lora_rank",
    "lora_r": "model.lora_rank",
    "alpha": "model.lora_alpha",
    "lora_target": "model.target_modules",
    "max_tokens": "model.max_seq_length",
    "max_new_tokens": "model.max_seq_length",
    "max_completion_length": "model.max_seq_length",
    "sequence_len": "model.max_seq_length",
    "seed": "model.random_seed",
    "lr": "training.learning_rate",
    "learningRate": "training.learning_rate",
    "batch_size": "training.per_device_train_batch_size",
    "micro_batch_size": "training.per_device_train_batch_size",
    "grad_accum": "training.gradient_accumulation_steps",
    "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs",
    "steps": "training.max_steps",
    "num_rollouts": "training.num_generations",
    "kl_coef": "training.beta",
    "clip_ratio": "training.epsilon",
    "temperature": "training.temperature",
    "save_freq": "training.save_steps",
    "output_dir": "output_root",
    "experiment_name": "run_name",
    "wandb_project": "wandb.project",
    "system_prompt": "dataset.system_instruction",
    "train_files": "dataset.path",
    "val_files": "evaluation.path",
    "reward_fn": "trainer.reward_funcs",
    "bach_size": "training.per_device_train_batch_size",
}


@pytest.mark.parametrize("name, key", DIALECTS.items())
def test_a_name_of_another_trainer_leads_to_our_key_from_wherever_it_stands(refused, name, key):
    if name != "model":  # which is a section of ours
        assert f"did you mean {key}?" in refused(f"{MINIMAL}{name}: 1")[0]
        assert f"did you mean --{key}?" in refused(MINIMAL, f"--{name}", "1")[0]
    section = MINIMAL if key.startswith("model.") else MINIMAL + "training: {"
    if key.startswith("model."):
        section = MINIMAL.replace("some/model", "some/model, ").replace("}\nd", f"{name}: 1}}\nd")
        assert f"did you mean {key}?" in refused(section)[0]
    elif f"training.{name}" not in keys.key_names():
        assert f"did you mean {key}?" in refused(f"{section}{name}: 1}}")[0]
        assert f"did you mean --{key}?" in refused(MINIMAL, f"--training.{name}", "1")[0]


@pytest.mark.parametrize("ours", [key for key in dialects.NAMES if not key.startswith("env.")])
def test_the_names_of_others_lead_to_keys_that_exist(ours):
    assert ours in keys.key_names()


def test_a_name_of_others_stands_for_one_key():
    names = [name for names in dialects.NAMES.values() for name in names.split()]
    assert sorted(set(names)) == sorted(names)


def test_a_section_of_another_trainer_is_explained_key_by_key(refused):
    assert refused(MINIMAL + "lora: {r: 8, lora_alpha: 16, bias: none}\n") == [
        "lora: unknown key in bad.yaml; of its keys, r is model.lora_rank, lora_alpha is"
        " model.lora_alpha"
    ]
    assert refused(MINIMAL + "trl: {beta: 0.1, max_completion_length: 512}\n") == [
        "trl: unknown key in bad.yaml; of its keys, beta is training.beta, max_completion_length is"
        " model.max_seq_length"
    ]
    assert refused("model: Qwen/Qwen2.5-3B\ndataset: {name: gsm8k}")[0].endswith(
        "it should be a section with keys of its own; did you mean model.model_name?"
    )


def test_an_option_that_follows_from_others_says_what_to_set(refused):
    assert refused(MINIMAL, "--resume-from-checkpoint", "x") == [
        "--resume-from-checkpoint: unknown flag; give --resume, or --resume CHECKPOINT, on the"
        " command line"
    ]
    assert refused(MINIMAL, "--config", "x") == [
        "--config: unknown flag; name the recipe file without a flag: python train_model.py"
        " recipe.yaml"
    ]


# ---- without a recipe file


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--training.max_steps", "3"],
        ["--check", "--json"],
        ["--dry-run"],
        ["--overwrite"],
        ["--resume"],
        ["--resume", "no-such-run"],
        ["--lr", "1e-5"],
        ["--trainer.reward_funcs", "a.b", "config.yaml"],
    ],
    ids=" ".join,
)
def test_without_a_recipe_file_the_usage_is_printed_and_the_exit_code_is_2(capsys, words):
    assert train_model.main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and "usage: python train_model.py recipe.yaml [--section.key value ...]" in err
    assert "python train_model.py config.yaml" in err
    hints = {"no-such-run": "no recipe.yaml", "--lr": "training.learning_rate", "a.b": "put config"}
    for word, hint in hints.items():
        assert (hint in err) == (word in words)


def test_a_recipe_file_after_an_unknown_flag_is_still_the_recipe_file():
    assert cli.parse(["--lr", "1e-5", "config.yaml"]).recipe_file == "config.yaml"
    with pytest.raises(RecipeError, match="recipe file: none is named"):
        cli.read_recipe([])


# ---- dotted paths

NOT_A_PATH = "is not a dotted path; use one such as package.module.name or package.module:name"
NO_CALL = "which cannot be called; name a function or class"
NO_REWRD = "module 'reward_math' has no 'final_rewrd'; it has final_reward"
NO_MODULE = (
    "names module 'no_such_module', but there is no module 'no_such_module' here or installed"
)


@pytest.mark.parametrize(
    "dotted, sentence",
    [
        ("no_such_module.reward", NO_MODULE),
        ("gtpo.no_such.reward", "there is no module 'gtpo.no_such' here or installed"),
        ("reward_math.final_rewrd", NO_REWRD),
        ("reward_math:final_rewrd", NO_REWRD),
        ("gtpo.recipe.sections.DATASET_ALIASES", f"is a collection, {NO_CALL}"),
        ("gtpo.gtpo_training.ENT_SCALE", f"is a float, {NO_CALL}"),
        ("gtpo.recipe.batch", "is a module; name a function or class in it"),
        ("not a path", f"'not a path' {NOT_A_PATH}"),
        ("reward", f"'reward' {NOT_A_PATH}"),
    ],
)
def test_a_wrong_dotted_path_gets_a_sentence(dotted, sentence):
    with pytest.raises(RecipeError) as caught:
        read("--trainer.reward_funcs", dotted)
    assert sentence in str(caught.value)


@pytest.mark.parametrize(
    "dotted", ["reward_math:final_reward", "trl.rewards.accuracy_reward", "math.sqrt", "json.dumps"]
)
def test_a_dotted_path_that_only_the_import_can_check_is_accepted(dotted):
    assert read("--trainer.reward_funcs", dotted).trainer.reward_funcs == [dotted]


def test_modules_beside_the_recipe_and_in_the_current_folder_can_be_imported(tmp_path, monkeypatch):
    beside = tmp_path / "beside"
    beside.mkdir()
    (beside / "my_reward_beside.py").write_text(
        "def pay(completions, **kwargs):\n    return [0.0] * len(completions)\n"
    )
    (tmp_path / "my_reward_here.py").write_text(
        "pay = lambda completions, **kwargs: [0.0] * len(completions)\n"
    )
    (beside / "r.yaml").write_text(
        MINIMAL + "trainer: {reward_funcs: [my_reward_beside.pay, my_reward_here.pay]}\n"
    )
    monkeypatch.chdir(tmp_path)
    recipe = cli.read_recipe(["beside/r.yaml"])
    assert [load_object(path)(["x"]) for path in recipe.trainer.reward_funcs] == [[0.0], [0.0]]


def test_a_module_with_a_syntax_error_is_reported_with_its_line(tmp_path, monkeypatch):
    (tmp_path / "broken_reward.py").write_text("x = 1\ndef pay(:\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RecipeError, match="broken_reward.py, line 2 is not valid Python"):
        read("--trainer.reward_funcs", "broken_reward.pay")
