"""What has to be set before large libraries are imported, and how to import them faster.

GTPO itself sends nothing anywhere. What libraries would send by themselves is switched off. The
caller's environment and the recipe's `env` can switch it on again: HF_HUB_DISABLE_TELEMETRY "0".
"""

import contextlib
import gc
import os
import sys
from collections.abc import MutableMapping

NO_TELEMETRY = {
    "DO_NOT_TRACK": "1",  # huggingface_hub, vllm
    "HF_HUB_DISABLE_TELEMETRY": "1",  # sends versions of libraries with each request to the hub
    "UNSLOTH_DISABLE_STATISTICS": "1",  # downloads a file from the hub at every start, as a counter
    "VLLM_NO_USAGE_STATS": "1",
    "WANDB_ERROR_REPORTING": "false",  # sends wandb's own crashes to Sentry
    # Uploads the script and the uncommitted changes beside it. A recipe with a token may be one.
    "WANDB_DISABLE_CODE": "true",
}


def set_environment(
    variables: dict[str, str], environment: MutableMapping[str, str] = os.environ
) -> None:
    """Set `variables`, and those of NO_TELEMETRY that are not set yet.

    Libraries read them when they are imported, so call this first.
    """
    environment.update(variables)
    for name, value in NO_TELEMETRY.items():
        environment.setdefault(name, value)


@contextlib.contextmanager
def garbage_collection_off():
    """Switch garbage collection off inside, so that large imports take less time.

    An import of torch, transformers and TRL creates half a million objects that all stay, and the
    collector would visit them again and again. Without it the imports take 0.7 of the CPU time
    (docs/performance.md).

    If torch is imported inside for the first time, all objects that exist at the end are left out
    of later collections as well. None of them can be a model or a tensor.
    """
    was_enabled, before_torch = gc.isenabled(), "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if before_torch:
            gc.freeze()
        if was_enabled:
            gc.enable()
