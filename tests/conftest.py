"""Fixtures shared by all tests. Everything runs offline, on a CPU."""

import gc
import os
import sys
from pathlib import Path

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
