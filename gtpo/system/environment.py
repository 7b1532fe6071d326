"""The environment that libraries read when they are imported: what the recipe sets, and no
telemetry.

GTPO itself sends nothing anywhere. What libraries would send of their own accord is switched off,
unless the caller's environment or the recipe's `env` says otherwise: HF_HUB_DISABLE_TELEMETRY "0",
for instance.
"""

import os
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


def set_up(variables: dict[str, str], environment: MutableMapping[str, str] = os.environ) -> None:
    """Set `variables`, and what is not set yet of NO_TELEMETRY; to be called before anything heavy
    is imported.
    """
    environment.update(variables)
    for name, value in NO_TELEMETRY.items():
        environment.setdefault(name, value)
