"""The hub: a short look at a name, where the client would retry for minutes; datasets; a push."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from gtpo.errors import RecipeError

SECONDS = 5  # for one request
OFFLINE = ("1", "true", "yes", "on")  # values of HF_HUB_OFFLINE, as huggingface_hub 1 reads it
NOT_A_NAME = "is not a name on the hub; give one like owner/name"


def look_up(key: str, name: str, *, kind: str, instead: str) -> list[str]:
    """The file names of a model or dataset (`kind`) in the local cache or on the hub.

    Raises RecipeError with `key` if it is in neither place. `instead` says what a user without
    access to the hub can use.
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

    gated = f"{name!r} is gated; accept its licence on the hub and set HF_TOKEN"
    folder = repo_folder_name(repo_id=name, repo_type=kind)
    cached = Path(constants.HF_HUB_CACHE, folder, "snapshots")
    if cached.is_dir():
        return [file.name for file in cached.glob("*/*")]
    if kind == "dataset" and _prepared(name).is_dir():
        return []
    if _offline():
        raise RecipeError(
            key, f"{name!r} is not in the local cache and HF_HUB_OFFLINE is set; use {instead}"
        )
    api = HfApi()
    try:
        info = (api.model_info if kind == "model" else api.dataset_info)(name, timeout=SECONDS)
    except GatedRepoError:
        raise RecipeError(key, gated) from None
    except RepositoryNotFoundError:
        raise RecipeError(
            key, f"the hub has no {kind} {name!r} that you may see; check the name, or set HF_TOKEN"
        ) from None
    except HFValidationError:
        raise RecipeError(key, f"{name!r} {NOT_A_NAME}, or {instead}") from None
    except (httpx.HTTPError, HfHubHTTPError, OSError) as error:
        raise RecipeError(
            key,
            f"{name!r} is not in the local cache and the hub cannot be reached "
            f"({type(error).__name__}); connect to the network, or use {instead}",
        ) from None
    if info.gated and get_token() is None:
        raise RecipeError(key, gated)
    return [file.rfilename for file in info.siblings or ()]


def _prepared(name: str) -> Path:
    """The folder in which the library datasets keeps a dataset that it has loaded before."""
    from huggingface_hub import constants

    cache = os.environ.get("HF_DATASETS_CACHE") or Path(constants.HF_HOME, "datasets")
    return Path(cache, name.replace("/", "___"))


# ---- datasets


class DatasetContents(NamedTuple):
    """What is known of a dataset before it is loaded: empty where nothing is."""

    splits: list[str]
    columns: list[str]


def dataset_contents(name: str, subset: str | None) -> DatasetContents:
    """The splits and columns of a dataset on the hub or in the cache; downloads no rows.

    Raises RecipeError if it has no such subset, or cannot be read.
    """

    def contents(datasets, place: str) -> DatasetContents:
        builder = datasets.load_dataset_builder(place, subset)
        splits = builder.info.splits or builder.config.data_files or {}
        return DatasetContents(list(splits), list(builder.info.features or ()))

    return _from_hub_or_cache(name, contents)


def load_dataset_split(name: str, subset: str | None, split: str):
    """A split of a dataset on the hub or in the cache, as a datasets.Dataset.

    Raises RecipeError if it has no such subset or split, or cannot be read.
    """
    return _from_hub_or_cache(
        name, lambda datasets, place: datasets.load_dataset(place, subset, split=split)
    )


def _from_hub_or_cache(name: str, read: Callable):
    """What `read` returns for the dataset `name`; offline it also reads a downloaded copy."""
    import datasets

    try:
        return read(datasets, name)
    except Exception as error:  # the library raises errors of many classes
        first_error = error
    copies = _downloaded_copies(name) if _offline() else []
    for copy in copies:
        try:
            return read(datasets, str(copy))
        except Exception as error:
            first_error = error
    raise _dataset_error(name, first_error) from first_error


def _downloaded_copies(name: str) -> list[Path]:
    """The snapshots of a dataset in the hub's cache, the newest first."""
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = Path(constants.HF_HUB_CACHE, repo_folder_name(repo_id=name, repo_type="dataset"))
    copies = (folder / "snapshots").glob("*")
    return sorted(copies, key=lambda copy: copy.stat().st_mtime, reverse=True)


def _dataset_error(name: str, error: Exception) -> RecipeError:
    cause = error.__cause__ or error
    lines = [line.strip() for line in str(cause).splitlines() if line.strip()]
    sentence = f"{name!r} cannot be read ({' '.join(lines[:2]) or type(cause).__name__})"
    if "Config name is missing" in str(error):
        return RecipeError("dataset.subset", f"{name!r} has several; {' '.join(lines[1:2])}")
    if "BuilderConfig" in str(error):
        return RecipeError("dataset.subset", sentence)
    if "Unknown split" in str(error):
        return RecipeError("dataset.split", sentence)
    return RecipeError("dataset.name", sentence)


def token_status(name: str) -> str:
    """A sentence on whether a token is set and gives access to the model `name`.

    It does not contain the token. Raises RecipeError if the model is gated and the token, or its
    absence, gives no access.
    """
    import httpx
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError

    if os.path.isdir(name):
        return "not needed: the model is a local folder"
    has_token = bool(get_token())
    status = "set" if has_token else "not set, and not needed unless the model is gated"
    if _offline():
        return f"{status}; not checked, since HF_HUB_OFFLINE is set"
    try:
        HfApi().auth_check(name)
    except GatedRepoError:
        raise RecipeError(
            "model.model_name",
            f"{name!r} is gated, and the token is {'set' if has_token else 'not set'}; accept its"
            " licence on the hub and set HF_TOKEN to a token of that account",
        ) from None
    except (httpx.HTTPError, HfHubHTTPError, OSError) as error:
        return f"{status}; not checked, since the hub did not answer ({type(error).__name__})"
    return f"{status}; it gives access to {name}"


def push(folder: Path, repository: str) -> str:
    """Upload `folder` to the hub repository, and return its address.

    A new repository is private. Raises RecipeError if the upload fails.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_errors(repository):
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message="Merged model",
            # The recipe names folders of this machine. The model card has the rest of it.
            ignore_patterns=["recipe.yaml"],
        )
    return str(address)


def check_push(repository: str) -> None:
    """Raises RecipeError if a push to `repository` would fail: an invalid name, no login, no
    network.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.utils import validate_repo_id

    with _hub_errors(repository):
        validate_repo_id(repository)
        HfApi().whoami()


@contextlib.contextmanager
def _hub_errors(repository: str):
    """Turn the client's errors into RecipeErrors of --push."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    try:
        yield
    except HFValidationError:
        raise RecipeError("--push", f"{repository!r} {NOT_A_NAME}") from None
    except LocalTokenNotFoundError:
        raise RecipeError(
            "--push", "there is no login to the hub; run `hf auth login`, or set HF_TOKEN"
        ) from None
    except (httpx.HTTPError, HfHubHTTPError, OSError) as error:
        raise RecipeError(
            "--push", f"{repository} cannot be pushed to ({' '.join(str(error).split())})"
        ) from None


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "0").lower() in OFFLINE
