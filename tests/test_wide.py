"""Runs beyond one GPU, as far as a CPU can test them.

These are accelerate's configuration files, vLLM as a server, which process prints, and the recipes
for small cards.
"""

import importlib.util
import os
import re
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from conftest import ROOT
from injected import launched

from gtpo.errors import RecipeError
from gtpo.recipe import command_line as cli
from gtpo.system import processes

CONFIGURATIONS = sorted((ROOT / "recipes/accelerate").glob("*.yaml"))
SERVER = [
    *("--training.use_vllm", "true"),
    *("--training.vllm_mode", "server"),
    *("--training.vllm_server_base_url", "http://10.0.0.7:8000"),
]
DEMO = str(ROOT / "recipes/demo.yaml")


@pytest.mark.parametrize("file", CONFIGURATIONS, ids=lambda f: f.stem)
def test_accelerate_reads_its_configuration_files_as_intended(file, monkeypatch):
    arguments, environment = launched(str(file))
    assert arguments.num_processes == 8 and environment["ACCELERATE_MIXED_PRECISION"] == "no"
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if file.stem == "ddp":
        assert arguments.multi_gpu
    elif file.stem == "fsdp":
        from accelerate.utils import FullyShardedDataParallelPlugin

        plugin = FullyShardedDataParallelPlugin()
        assert arguments.use_fsdp and plugin.fsdp_version == 2
        assert plugin.state_dict_type.name == "FULL_STATE_DICT" and plugin.reshard_after_forward
        assert not plugin.activation_checkpointing and not plugin.cpu_ram_efficient_loading
    else:
        from accelerate.utils import DeepSpeedPlugin

        plugin, stage = DeepSpeedPlugin(), int(file.stem[-1])
        assert arguments.use_deepspeed and plugin.zero_stage == stage
        config = plugin.deepspeed_config
        # transformers fills in the values of the recipe.
        assert config["gradient_accumulation_steps"] == config["gradient_clipping"] == "auto"
        whole_adapter = config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
        assert whole_adapter == (stage == 3)


def test_there_is_a_configuration_for_each_engine():
    engines = ["ddp", "deepspeed_zero2", "deepspeed_zero3", "fsdp"]
    assert [file.stem for file in CONFIGURATIONS] == engines


@pytest.fixture
def vllm_is_installed(monkeypatch):
    """The package vllm seems to be installed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: name == "vllm" or find(name, *rest)
    )


def test_the_options_of_a_vllm_server_reach_trl(tmp_path, vllm_is_installed):
    from gtpo.runs.arguments import training_arguments

    recipe = cli.read_recipe([DEMO, *SERVER, "--training.vllm_server_timeout", "5"])
    arguments = training_arguments(recipe, str(tmp_path))
    assert arguments.use_vllm and arguments.vllm_mode == "server"
    assert arguments.vllm_server_base_url == "http://10.0.0.7:8000"
    assert arguments.vllm_server_timeout == 5 and arguments.vllm_importance_sampling_correction


NEEDS_TRANSFORMERS = "server needs model.backend transformers, not"


@pytest.mark.parametrize(
    "flags, sentence",
    [
        (SERVER[2:], "a server is not used without training.use_vllm; set that to true"),
        (
            [*SERVER, "--model.backend", "unsloth"],
            f"{NEEDS_TRANSFORMERS} unsloth: Unsloth generates",
        ),
        ([*SERVER, "--model.backend", "auto"], f"{NEEDS_TRANSFORMERS} auto: Unsloth generates"),
    ],
)
def test_a_server_that_nothing_would_use_is_refused(flags, sentence):
    with pytest.raises(RecipeError) as error:
        cli.read_recipe([DEMO, *flags])
    assert str(error.value).startswith(f"training.vllm_mode: {sentence}")


def test_without_vllm_a_server_is_refused_in_one_sentence(tmp_path, capsys, monkeypatch):
    import train_model

    monkeypatch.chdir(ROOT)
    flags = ["--output_root", str(tmp_path), "--evaluation.path", "null"]
    assert train_model.main([DEMO, *SERVER, *flags]) == 2
    lines = capsys.readouterr().err.splitlines()
    (error,) = [line for line in lines if line.startswith("error: ")]
    assert error.startswith("error: training.use_vllm: the package vllm is not installed")
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_split_over_processes_is_not_evaluated_by_one_of_them():
    from accelerate.utils import DistributedType

    from gtpo.runs import trainers

    def trainer(kind, stage=0):
        state = SimpleNamespace(
            distributed_type=kind, deepspeed_plugin=SimpleNamespace(zero_stage=stage)
        )
        return SimpleNamespace(accelerator=SimpleNamespace(state=state, num_processes=1))

    for split in (trainer(DistributedType.FSDP), trainer(DistributedType.DEEPSPEED, 3)):
        with pytest.raises(RecipeError, match="evaluation: one process evaluates"):
            trainers.check_processes(split, object())
        trainers.check_processes(split, None)
    for whole in (
        trainer(DistributedType.DEEPSPEED, 2),
        trainer(DistributedType.MULTI_GPU),
        trainer(DistributedType.NO),
    ):
        trainers.check_processes(whole, object())


@pytest.mark.slow
def test_processes_that_accelerate_does_not_connect_end_with_a_sentence(monkeypatch):
    from gtpo.runs import trainers

    monkeypatch.setenv("WORLD_SIZE", "8")
    trainer = SimpleNamespace(accelerator=SimpleNamespace(num_processes=1))
    sentence = "it is 8, and accelerate found 1 process; start with torchrun or accelerate launch"
    with pytest.raises(RecipeError, match=f"WORLD_SIZE: {sentence}"):
        trainers.check_processes(trainer, None)


@pytest.mark.parametrize("several", [False, True])
def test_vllm_inside_unsloth_is_for_one_process(monkeypatch, vllm_is_installed, several):
    from gtpo.models.generation import unsloth_uses_vllm
    from gtpo.recipe.sections import ModelSection

    monkeypatch.setenv("WORLD_SIZE", "2" if several else "1")
    auto, yes, no = (
        ModelSection(model_name="model", fast_inference=value) for value in ("auto", True, False)
    )
    assert unsloth_uses_vllm(auto) is not several and not unsloth_uses_vllm(no)
    if not several:
        assert unsloth_uses_vllm(yes)
        return
    sentence = "true is for one process, and there are 2; use auto or false, or a vLLM server"
    with pytest.raises(RecipeError, match=f"model.fast_inference: {sentence}"):
        unsloth_uses_vllm(yes)


@pytest.fixture
def second_of_two(monkeypatch):
    """This process is the second that torchrun started; returns the store of torchrun's agent."""
    from torch.distributed import TCPStore

    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(processes, "GRACE", 0.0)
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(agent.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RUN_ID": "a",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    processes.agent_store.cache_clear()
    yield agent
    processes.agent_store.cache_clear()


@pytest.mark.slow
def test_the_other_processes_end_after_the_first(second_of_two, monkeypatch):
    waiting = threading.Thread(target=processes.wait_for_first, daemon=True)
    waiting.start()
    waiting.join(timeout=1)
    assert waiting.is_alive()
    monkeypatch.setenv("RANK", "0")
    processes.wait_for_first()
    waiting.join(timeout=30)
    assert not waiting.is_alive()


@pytest.mark.slow
def test_each_sentence_is_printed_once_and_a_loss_only_if_nothing_was(second_of_two, monkeypatch):
    assert [processes.is_first_to_say(text) for text in ("bad", "bad", "worse")] == [
        True,
        False,
        True,
    ]
    assert not processes.is_first_to_say("lost", if_nobody_spoke=True)
    # In torchrun's next attempt nothing was printed yet.
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert [
        processes.is_first_to_say(text, if_nobody_spoke=True) for text in ("lost", "lost too")
    ] == [True, False]


def test_one_process_prints_and_the_others_keep_quiet(monkeypatch, capsys):
    for rank, printed in (("0", "hello\n"), ("1", "")):
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("RANK", rank)
        for name in processes.QUIET:
            monkeypatch.delenv(name, raising=False)
        with processes.only_first_prints():
            print("hello")
            quiet = {name: os.environ.get(name) for name in processes.QUIET}
        assert capsys.readouterr().out == printed
        assert quiet == (processes.QUIET if rank == "1" else dict.fromkeys(processes.QUIET))
    for name in processes.QUIET:
        os.environ.pop(name, None)


# The shapes of the models in the recipes for small cards.
SHAPES = {
    "t4": (
        "Qwen2Config",
        {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 11_008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
            "architectures": ["Qwen2ForCausalLM"],
        },
    ),
    "card_24gb": (
        "LlamaConfig",
        {
            "vocab_size": 128_256,
            "hidden_size": 4096,
            "intermediate_size": 14_336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "architectures": ["LlamaForCausalLM"],
        },
    ),
}


@pytest.mark.parametrize("name, gib", [("t4", 14.6), ("card_24gb", 22.0)])
def test_the_recipes_for_small_cards_quote_the_memory_estimate_and_fit(
    name, gib, tmp_path, monkeypatch
):
    import torch
    import transformers

    from gtpo.models.backends import lora_config
    from gtpo.runs import memory

    kind, values = SHAPES[name]
    getattr(transformers, kind)(max_position_embeddings=32_768, **values).save_pretrained(tmp_path)
    file = ROOT / f"recipes/{name}.yaml"
    recipe = cli.read_recipe([str(file), "--model-name", str(tmp_path)])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(memory, "free_memory", lambda cuda: (int(gib * 2**30), "the card"))
    size = memory.model_size(recipe.model, lora_config(recipe.model, None))
    sentence = memory.check_memory(
        recipe,
        size,
        backend="unsloth",
        processes=1,
        longest_prompt=recipe.max_prompt_length,
        optimizer_bytes=memory.optimizer_bytes(recipe.training.optimizer),
    )
    assert f"#   {sentence.split(', and the card')[0]}\n" in file.read_text(), sentence


@pytest.mark.parametrize("name", ["t4", "card_24gb", "t4_grpo", "card_24gb_grpo"])
def test_the_recipes_for_small_cards_train_on_one_prompt_per_step(name, capsys):
    import train_model

    assert train_model.main([str(ROOT / f"recipes/{name}.yaml"), "--dry-run"]) == 0
    assert "1 prompt x 8 completions per optimizer step" in capsys.readouterr().err


def test_the_page_on_scaling_quotes_the_estimate_and_names_files_that_exist():
    page = (ROOT / "docs/scaling.md").read_text()
    printed = subprocess.run(
        [sys.executable, "benchmarks/paper_estimate.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert f"```text\n{printed}```\n" in page
    named = set(re.findall(r"(?:recipes|tests|benchmarks|gtpo|docs)/[\w/]+\.(?:py|yaml|md)", page))
    assert len(named) > 8 and all((ROOT / name).exists() for name in named), named
