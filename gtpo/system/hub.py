"""The hub: a short look at a name, instead of the client's minutes of retries; and, only when
asked, a push.
"""

import contextlib
import os
from pathlib import Path

from gtpo.errors import RecipeError

SECONDS = 5


def look_up(key: str, name: str, *, kind: str, instead: str) -> list[str]:
    """The files of the `kind` (model or dataset) `name`; raises RecipeError if it is neither cached
    here nor found on the hub.

    `instead` says what a person without the hub can use.
    """
    import httpx
    from huggingface_hub import HfApi, constants, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        RepositoryNotFoundError,
    )
    from huggingface_hub.file_download import repo_folder_name

    cached = Path(
        constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type=kind), "snapshots"
    )
    if cached.is_dir():
        return [file.name for file in cached.glob("*/*")]
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        raise RecipeError(
            key, f"{name!r} is not in the local cache and HF_HUB_OFFLINE is set; use {instead}"
        )
    try:
        info = (HfApi().model_info if kind == "model" else HfApi().dataset_info)(
            name, timeout=SECONDS
        )
    except GatedRepoError:
        raise RecipeError(
            key, f"{name!r} is gated; accept its licence on the hub and set HF_TOKEN"
        ) from None
    except RepositoryNotFoundError:
        raise RecipeError(
            key, f"the hub has no {kind} {name!r} that you may see; check the name, or set HF_TOKEN"
        ) from None
    except HFValidationError:
        raise RecipeError(
            key, f"{name!r} is no hub name; give one like owner/name, or {instead}"
        ) from None
    except (httpx.HTTPError, HfHubHTTPError, OSError) as error:
        raise RecipeError(
            key,
            f"{name!r} is not in the local cache and the hub cannot be reached "
            f"({type(error).__name__}); connect to the network, or use {instead}",
        ) from None
    if info.gated and get_token() is None:
        raise RecipeError(key, f"{name!r} is gated; accept its licence on the hub and set HF_TOKEN")
    return [file.rfilename for file in info.siblings or ()]


def token_status(name: str) -> str:
    """Whether there is a token for the model `name`, and whether it opens it, as a sentence that
    does not show it.
    """
    import httpx
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    if os.path.isdir(name):
        return "not needed: the model is a folder here"
    source = "set" if get_token() else "not set, and not needed unless the model is gated"
    if os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on"):
        return f"{source}; the hub is not asked, since HF_HUB_OFFLINE is set"
    try:
        HfApi().auth_check(name)
    except GatedRepoError:
        raise RecipeError(
            "model.model_name",
            f"{name!r} is gated, and the token is {source.partition(',')[0]}; accept its licence "
            "on the hub and set HF_TOKEN to a token of that account",
        ) from None
    except (httpx.HTTPError, HfHubHTTPError, OSError) as error:
        return f"{source}; the hub could not be asked ({type(error).__name__})"
    return f"{source}; the hub gives {name} to it"


def push(folder: Path, repository: str) -> str:
    """Upload `folder` to the hub repository, made private if it is new; returns its address."""
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_errors(repository):
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Merged model",
            # it names folders of this machine; the card tells the rest
            ignore_patterns=["recipe.yaml"],
        )
    return str(address)


def check_push(repository: str) -> None:
    """Raises RecipeError if nothing could be pushed to `repository`: a name that is none, no login,
    no network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with _hub_errors(repository):
        validate_repo_id(repository)
        HfApi().whoami()


@contextlib.contextmanager
def _hub_errors(repository: str):
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except HFValidationError:
        raise RecipeError(
            "--push", f"{repository!r} is no hub name; give one like owner/name"
        ) from None
    except LocalTokenNotFoundError:
        raise RecipeError(
            "--push", "there is no login to the hub; run `hf auth login`, or set HF_TOKEN"
        ) from None
    except (httpx.HTTPError, HfHubHTTPError, OSError) as error:
        raise RecipeError(
            "--push", f"{repository} cannot be pushed to ({' '.join(str(error).split())})"
        ) from None
