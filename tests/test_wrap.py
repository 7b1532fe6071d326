"""`wrap`: the one function that puts code of ours around a member of another library."""

import ast
import gc
import inspect
import weakref
from types import SimpleNamespace

import pytest

from gtpo.hooks import seams

HERE = __name__


@pytest.fixture
def listed(monkeypatch):
    """A table in which this module and two others wrap a member called `act`, in this order."""
    row = seams.Seam(seams.TRL, "Thing.act", "wraps", ("inner", HERE, "outer"), "For the tests.")
    monkeypatch.setattr(seams, "SEAMS", (row,))


class Thing:
    def act(self, value: int) -> int:
        """Twice the value."""
        return 2 * value


def plus_one(original, *args, **kwargs):
    return original(*args, **kwargs) + 1


def of_layer(layer: str, add: int):
    """A function as if it were defined in the module `layer`."""

    def around(original, *args, **kwargs):
        return original(*args, **kwargs) + add

    around.__module__ = layer
    return around


def test_wrap_calls_around_with_the_original_and_undo_takes_it_away(listed):
    thing = Thing()
    undo = seams.wrap(thing, "act", plus_one)
    assert thing.act(3) == 7
    undo()
    assert thing.act(3) == 6 and "act" not in vars(thing)
    undo()  # a second time changes nothing
    assert thing.act(3) == 6


def test_undo_puts_back_an_attribute_of_the_object_itself(listed):
    def own(value):
        return value

    thing = SimpleNamespace(act=own)
    seams.wrap(thing, "act", plus_one)()
    assert thing.act is own


def test_a_wrapped_member_keeps_the_source_and_signature_of_the_original(listed):
    thing = Thing()
    seams.wrap(thing, "act", plus_one)
    assert "return 2 * value" in inspect.getsource(inspect.unwrap(thing.act))
    assert list(inspect.signature(thing.act).parameters) == ["value"]
    assert thing.act.__doc__ == "Twice the value."


def test_layers_stand_in_the_order_of_the_table(listed):
    thing = Thing()
    for layer, add in (("inner", 1), (HERE, 10), ("outer", 100)):
        seams.wrap(thing, "act", of_layer(layer, add))
    assert thing.act(0) == 111


def test_a_layer_in_the_wrong_order_is_refused(listed):
    thing = Thing()
    seams.wrap(thing, "act", of_layer("outer", 100))
    with pytest.raises(ValueError, match="inner must wrap act before outer does"):
        seams.wrap(thing, "act", of_layer("inner", 1))
    assert thing.act(0) == 100


def test_the_same_layer_twice_is_refused_until_it_is_undone(listed):
    thing = Thing()
    undo = seams.wrap(thing, "act", plus_one)
    with pytest.raises(ValueError, match="already"):
        seams.wrap(thing, "act", plus_one)
    undo()
    seams.wrap(thing, "act", plus_one)
    assert thing.act(0) == 1


def test_a_layer_that_is_undone_beneath_another_leaves_the_other_in_place(listed):
    thing = Thing()
    undo = seams.wrap(thing, "act", of_layer("inner", 1))
    seams.wrap(thing, "act", of_layer("outer", 100))
    undo()
    assert thing.act(0) == 100


def test_undo_frees_what_the_layer_keeps_without_a_garbage_collection(listed):
    class Tensor:
        pass

    tensor = Tensor()
    gone = weakref.ref(tensor)

    def around(original, *args, tensor=tensor):
        return undo  # a cycle: the layer refers to what undoes it

    gc.disable()
    try:
        undo = seams.wrap(Thing(), "act", around)
        undo()
        del tensor, around
        assert gone() is None
    finally:
        gc.enable()


def test_a_layer_that_the_table_does_not_list_is_refused(listed):
    with pytest.raises(ValueError, match=r"seams\.py does not list"):
        seams.wrap(Thing(), "act", of_layer("somewhere.else", 1))


def test_the_table_can_be_read_without_any_of_its_libraries():
    """So modules that must load quickly may import `wrap`."""
    imported = {
        (node.module if isinstance(node, ast.ImportFrom) else node.names[0].name).split(".")[0]
        for node in ast.walk(ast.parse(inspect.getsource(seams)))
        if isinstance(node, ast.Import | ast.ImportFrom)
    }
    assert imported == {"functools", "collections", "typing"}
