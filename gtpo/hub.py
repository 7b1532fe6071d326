"""A short look at a hub name, instead of the hub client's minutes of retries."""

import os

from gtpo.recipe import RecipeError

SECONDS = 5


def look_up(key: str, name: str, *, kind: str, instead: str) -> None:
    """Raises RecipeError if the `kind` (model or dataset) `name` is neither cached here nor found on the hub.

    `instead` says what a person without the hub can use.
    """
    import httpx
    from huggingface_hub import HfApi, constants
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, HFValidationError, RepositoryNotFoundError
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=name, repo_type=kind)
    if os.path.isdir(os.path.join(constants.HF_HUB_CACHE, folder, "snapshots")):
        return
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise RecipeError(f"{key}: {name!r} is not in the local cache and HF_HUB_OFFLINE is set; use {instead}")
    try:
        (HfApi().model_info if kind == "model" else HfApi().dataset_info)(name, timeout=SECONDS)
    except GatedRepoError:
        raise RecipeError(f"{key}: {name!r} is gated; accept its licence on the hub and set HF_TOKEN") from None
    except RepositoryNotFoundError:
        raise RecipeError(f"{key}: the hub has no {kind} {name!r} that you may see; check the name, or set HF_TOKEN") from None
    except HFValidationError:
        raise RecipeError(f"{key}: {name!r} is no hub name; give one like owner/name, or {instead}") from None
    except (httpx.HTTPError, HfHubHTTPError, OSError) as error:
        raise RecipeError(f"{key}: {name!r} is not in the local cache and the hub cannot be reached "
                          f"({type(error).__name__}); connect to the network, or use {instead}") from None
