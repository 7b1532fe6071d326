"""Import large libraries at less cost."""

import contextlib
import gc
import sys


@contextlib.contextmanager
def collector_off():
    """No garbage collection inside: it would look again and again through half a million objects
    that all stay.

    Torch, transformers and TRL are imported in 0.7 of the CPU time (docs/performance.md). Where
    torch is imported only inside, what there is afterwards is left out of later collections too: no
    model and no tensor can be among it.
    """
    enabled, fresh = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if fresh:
            gc.freeze()
        if enabled:
            gc.enable()
