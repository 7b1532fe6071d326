"""What is set before large libraries are imported, and imports without garbage collection."""

import ast
import gc
import subprocess
import sys

import pytest
from conftest import ROOT

from gtpo.system.environment import garbage_collection_off, set_environment


def test_telemetry_is_off_unless_the_environment_or_the_recipe_says_otherwise():
    variables = {"DO_NOT_TRACK": "0"}
    set_environment({"HF_HUB_DISABLE_TELEMETRY": "0", "A": "b"}, variables)
    assert variables["DO_NOT_TRACK"] == "0"
    assert variables["HF_HUB_DISABLE_TELEMETRY"] == "0" and variables["A"] == "b"
    assert variables["UNSLOTH_DISABLE_STATISTICS"] == "1"
    assert variables["VLLM_NO_USAGE_STATS"] == "1"


def test_nothing_but_the_hub_opens_a_connection():
    for file in ROOT.glob("gtpo/**/*.py"):
        modules = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                modules.add(node.module)
        if file.stem != "hub":
            assert not modules & {"requests", "httpx", "urllib.request", "socket"}, file


def test_the_collector_is_off_inside_and_as_it_was_afterwards():
    with pytest.raises(ImportError), garbage_collection_off():
        assert not gc.isenabled()
        raise ImportError
    assert gc.isenabled()
    gc.disable()
    try:
        with garbage_collection_off():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


PROGRAM = """
{first}
import gc
from gtpo.system.environment import garbage_collection_off
with garbage_collection_off():
    import email
print(gc.get_freeze_count() > 0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("first, frozen", [("import json", True), ("import torch", False)])
def test_objects_are_frozen_only_if_none_of_them_can_be_a_tensor(first, frozen):
    printed = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(first=first)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.strip() == str(frozen)
