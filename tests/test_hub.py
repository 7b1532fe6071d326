"""A hub name is looked up shortly: in the cache, then with one request; each outcome is one sentence."""

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from gtpo.hub import look_up
from gtpo.recipe import RecipeError


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache, and a hub that answers as told."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    asked = []

    def answer(outcome):
        def info(self, name, timeout):
            asked.append((name, timeout))
            if outcome is not None:
                raise outcome

        for method in ("model_info", "dataset_info"):
            monkeypatch.setattr(huggingface_hub.HfApi, method, info)
        return asked

    return answer


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub"))


def look(kind="model"):
    look_up("model.model_name", "some/model", kind=kind, instead="a local folder")


def test_what_the_hub_has_is_accepted_after_one_request(hub):
    assert hub(None) == [] and look() is None
    assert hub(None) == [("some/model", 5)]


@pytest.mark.parametrize("kind, folder", [("model", "models--some--model"), ("dataset", "datasets--some--model")])
def test_what_is_in_the_cache_is_not_asked_for(hub, tmp_path, kind, folder):
    asked = hub(httpx.ConnectError("no network"))
    (tmp_path / folder / "snapshots").mkdir(parents=True)
    assert look(kind) is None and asked == []


@pytest.mark.parametrize("outcome, sentence", [
    (RepositoryNotFoundError("404", response=response(404)), "the hub has no model 'some/model' that you may see; check the name, or set HF_TOKEN"),
    (GatedRepoError("403", response=response(403)), "'some/model' is gated; accept its licence on the hub and set HF_TOKEN"),
    (httpx.ConnectError("no network"), "is not in the local cache and the hub cannot be reached (ConnectError); connect to the network, or use a local folder"),
    (httpx.ReadTimeout("slow"), "the hub cannot be reached (ReadTimeout)"),
])
def test_each_other_outcome_is_one_sentence(hub, outcome, sentence):
    hub(outcome)
    with pytest.raises(RecipeError) as caught:
        look()
    assert sentence in str(caught.value) and str(caught.value).startswith("model.model_name: ")
