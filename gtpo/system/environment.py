"""The environment that libraries read when they are imported: what the recipe sets, and no
telemetry.

GTPO itself sends nothing anywhere. What libraries would send of their own accord is switched off,
unless the caller's environment or the recipe's `env` says otherwise: HF_HUB_DISABLE_TELEMETRY "0",
for instance.
"""

import contextlib
import gc
import os
import sys
from collections.abc import MutableMapping

NO_TELEMETRY = {
    "DO_NOT_TRACK": "1",  # huggingface_hub, vllm
    "HF_HUB_DISABLE_TELEMETRY": "1",  # versions of libraries in each request to the hub
    "UNSLOTH_DISABLE_STATISTICS": "1",  # a download from the hub at every start, to be counted
    "VLLM_NO_USAGE_STATS": "1",
    "WANDB_ERROR_REPORTING": "false",  # wandb's own crashes, to Sentry
    # the script and the uncommitted changes beside it, of which a recipe with a token may be one
    "WANDB_DISABLE_CODE": "true",
}


def set_environment(
    variables: dict[str, str], environment: MutableMapping[str, str] = os.environ
) -> None:
    """Set `variables`, and what is not set yet of NO_TELEMETRY; to be called before anything heavy
    is imported.
    """
    environment.update(variables)
    for name, value in NO_TELEMETRY.items():
        environment.setdefault(name, value)


@contextlib.contextmanager
def garbage_collection_off():
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
