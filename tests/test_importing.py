"""The garbage collector while large libraries are imported."""

import gc
import subprocess
import sys

import pytest
from conftest import ROOT

from gtpo.system.environment import garbage_collection_off


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


@pytest.mark.parametrize("before, frozen", [("import json", True), ("import torch", False)])
def test_only_what_was_there_before_any_tensor_could_be_is_left_out_of_later_collections(
    before, frozen
):
    code = (
        f"{before}\nimport gc\nfrom gtpo.system.environment import garbage_collection_off\nwith garbage_collection_off():\n   "
        " import email\nprint(gc.get_freeze_count() > 0)"
    )
    said = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert said.strip() == str(frozen)
