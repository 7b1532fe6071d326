"""Fixtures shared by all tests. Everything runs offline, on a CPU."""

import gc
import importlib.util
import os
import shutil
import sys
import tarfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")


def split_flags(*texts: str) -> list[str]:
    """A command line as words: `split_flags("--a 1 --b 2", x)` gives `["--a", "1", "--b", "2", x]`.

    A text that begins with `--` is split at its spaces. Any other text is one word.
    """
    split = (text.split() if text.startswith("--") else [text] for text in texts)
    return [word for part in split for word in part]


def load_script(file: Path) -> ModuleType:
    """A script as a module. It imports its neighbours, as it does when it is run."""
    sys.path.insert(0, str(file.parent))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path.remove(str(file.parent))
    return module


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Leaves what the test files import out of garbage collection.

    It stays until the end, and collecting it again and again costs several CPU-seconds.
    """
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with the real GSM8K and MATH files; skips the test if it does not exist.

    GTPO_SHARED names the folder that holds data/ (default: ../shared).
    """
    folder = Path(os.environ.get("GTPO_SHARED", ROOT.parent / "shared")) / "data"
    if not folder.is_dir():
        pytest.skip(
            f"no GSM8K and MATH files under {folder}: set GTPO_SHARED to the folder that holds"
            " data/"
        )
    return folder


@pytest.fixture(scope="session")
def tiny_policy(tmp_path_factory) -> str:
    """A tiny model and its tokenizer on disk."""
    import tiny

    return tiny.save_tiny_policy(tmp_path_factory.mktemp("tiny-policy"))


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, which is the current one. Recipes and models have absolute paths."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_PROJECT", "WANDB_DIR", "WANDB_ENTITY", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory, tiny_policy) -> Path:
    """A run directory as training leaves it: recipe, two checkpoints, adapter and tokenizer.

    It is shared, so tests take their own copy, `run_dir`.
    """
    import tiny

    from gtpo.recipe.command_line import read_recipe
    from gtpo.recipe.yaml_text import write_yaml

    folder = tmp_path_factory.mktemp("runs") / "a-run"
    recipe = read_recipe(
        [str(ROOT / "recipes/demo.yaml"), "--model-name", tiny_policy, "--model.lora_rank", "4"]
    )
    for place in ("checkpoint-5", "checkpoint-10", "."):
        tiny.save_adapter(folder / place, tiny_policy)
    with (folder / "recipe.yaml").open("w") as file:
        write_yaml(recipe.saved()[0], file)
    return folder


@pytest.fixture
def run_dir(whole_run, tmp_path) -> Path:
    """A copy of `whole_run` that the test may change."""
    return Path(shutil.copytree(whole_run, tmp_path / "a-run"))


@pytest.fixture(scope="session")
def unpacked(tmp_path_factory) -> Path:
    """A folder with the runs of tests/compat, which no test changes."""
    folder = tmp_path_factory.mktemp("compat")
    for archive in (ROOT / "tests/compat").glob("*.tar.gz"):
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
    return folder
