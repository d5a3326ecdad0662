"""A loopback Hub with a few users, which this process talks to as well, and a checkpoint for it."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import transformers.utils.hub
from hub.loopback import LoopbackHub
from hub.pushing import Save
from huggingface_hub import constants
from huggingface_hub.utils import _http
from tiny import BuildModel

from ccf_llm_hf.hub import staging
from ccf_llm_hf.hub.example import record_example
from ccf_llm_hf.hub.model_card import write_card


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


@pytest.fixture
def save(build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path) -> Save:
    """Save a tiny checkpoint as training does, with junk beside it that is nobody's business."""

    def make(form: str = "full", name: str = "films", lora: bool = True, **config: Any) -> Path:
        model, processor = build(lora=lora, cf_logit=True)
        for key, value in {"backbone_name": str(backbone_folder()), **config}.items():
            setattr(model.config, key, value)
        folder = tmp_path / "runs" / name
        model.save_pretrained(folder, form=form)
        processor.save_pretrained(folder)
        write_card(folder)
        record_example(folder, model, processor)
        for junk in ("optimizer.pt", "train.parquet", "logs/run.txt", "adapter/notes.txt"):
            (folder / junk).parent.mkdir(exist_ok=True)
            (folder / junk).write_text("hf_" + "a" * 34)
        return folder

    return make


@pytest.fixture
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare the clean process: other tests run it."""
    monkeypatch.setattr(staging, "check_in_clean_process", lambda *_, **__: 0.0)


@pytest.fixture
def environment(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The clean process of a push talks to the loopback Hub too."""
    for name, value in hub.environment(tmp_path / "home", token="hf_ada").items():
        monkeypatch.setenv(name, value)
