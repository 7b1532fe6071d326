"""A name on the hub is looked up with one short request, and each outcome is one sentence."""

import httpx
import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

from gtpo.errors import RecipeError
from gtpo.models.base_model import check_model
from gtpo.system.hub import look_up


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """An empty cache, and a function that sets the hub's answer: file names, or an error.

    The function returns the list of requests, which grows as they come.
    """
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    requests = []

    def answer(outcome):
        def info(self, name, timeout):
            requests.append((name, timeout))
            if isinstance(outcome, Exception):
                raise outcome
            return huggingface_hub.ModelInfo(
                id=name,
                gated="gated" in outcome and "manual",
                siblings=[{"rfilename": file} for file in outcome],
            )

        for method in ("model_info", "dataset_info"):
            monkeypatch.setattr(huggingface_hub.HfApi, method, info)
        return requests

    return answer


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://hub"))


def look(kind="model"):
    return look_up("model.model_name", "some/model", kind=kind, instead="a local folder")


def test_a_model_on_the_hub_is_accepted_after_one_request(hub):
    requests = hub(["config.json", "model.safetensors"])
    assert look() == ["config.json", "model.safetensors"] and requests == [("some/model", 5)]


@pytest.mark.parametrize(
    "kind, folder", [("model", "models--some--model"), ("dataset", "datasets--some--model")]
)
def test_no_request_is_made_for_a_name_in_the_cache(hub, tmp_path, kind, folder):
    requests = hub(httpx.ConnectError("no network"))
    (tmp_path / folder / "snapshots" / "abc").mkdir(parents=True)
    (tmp_path / folder / "snapshots" / "abc" / "config.json").touch()
    assert look(kind) == ["config.json"] and requests == []


def test_a_gated_model_is_refused_without_a_token_and_accepted_with_one(hub, monkeypatch):
    hub(["config.json", "gated"])
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    sentence = "'some/model' is gated; accept its licence on the hub and set HF_TOKEN"
    with pytest.raises(RecipeError, match=sentence):
        look()
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_x")
    assert look()


def test_weights_that_can_contain_code_are_refused_before_they_are_downloaded(hub):
    file = "pytorch_model-00001-of-00002.bin"
    hub(["config.json", file])
    sentence = f"'some/model' has its weights in {file}, which could run code"
    with pytest.raises(RecipeError, match=sentence):
        check_model("some/model")
    hub(["config.json", "pytorch_model.bin", "model.safetensors", "training_args.bin"])
    check_model("some/model")


@pytest.mark.parametrize(
    "outcome, sentence",
    [
        (
            RepositoryNotFoundError("404", response=response(404)),
            "the hub has no model 'some/model' that you may see; check the name, or set HF_TOKEN",
        ),
        (
            GatedRepoError("403", response=response(403)),
            "'some/model' is gated; accept its licence on the hub and set HF_TOKEN",
        ),
        (
            httpx.ConnectError("no network"),
            "is not in the local cache and the hub cannot be reached (ConnectError); connect to"
            " the network, or use a local folder",
        ),
        (httpx.ReadTimeout("slow"), "the hub cannot be reached (ReadTimeout)"),
    ],
)
def test_each_other_outcome_is_one_sentence(hub, outcome, sentence):
    hub(outcome)
    with pytest.raises(RecipeError) as caught:
        look()
    assert caught.value.key == "model.model_name" and sentence in str(caught.value)
