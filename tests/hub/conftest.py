"""A loopback Hub with a few users, which this process talks to as well."""

import time
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import transformers.utils.hub
from hub.loopback import LoopbackHub
from huggingface_hub import constants
from huggingface_hub.utils import _http


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """Ada may write to acme, Bob may read there, Eve is a stranger; Ada's token is in use."""
    with LoopbackHub() as server:
        server.store.add_user("ada", acme="write")
        server.store.add_user("bob", acme="read")
        server.store.add_user("eve")
        server.store.add_token("hf_ada", "ada")
        server.store.add_token("hf_ada_reads", "ada", role="read")
        server.store.add_token("hf_ada_alone", "ada", namespaces=["ada"])
        server.store.add_token("hf_bob", "bob")
        server.store.add_token("hf_eve", "eve")
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # it keeps an old address
        monkeypatch.setenv("HF_TOKEN", "hf_ada")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
        yield server


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """huggingface_hub waits before it tries again: here it only writes down how long."""
    slept: list[float] = []
    clock = SimpleNamespace(sleep=slept.append, time=time.time, monotonic=time.monotonic)
    monkeypatch.setattr(_http, "time", clock)
    return slept
