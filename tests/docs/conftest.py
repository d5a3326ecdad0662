"""A tiny stand-in for what the pages have trained or fetched."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from docs.pages import ROOT
from tiny import BuildModel

from ccf_llm_hf.data.asset_list import ASSETS

BACKBONE = ASSETS["smollm2-135m-instruct"]


@pytest.fixture
def place(
    backbone_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    """The current folder, with the examples; the cache of assets has a tiny model by the name of
    the demo's backbone, and there is no network."""
    tiny = shutil.copytree(backbone_folder(), tmp_path / "cache" / BACKBONE.name)
    config = json.loads((tiny / "config.json").read_text())
    (tiny / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 4096}))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    for name, value in (
        ("CCF_LLM_CACHE", str(tmp_path / "cache")),
        ("HF_HOME", str(tmp_path / "home")),
        ("HF_HUB_OFFLINE", "1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def trained(build: BuildModel, place: Path) -> Path:
    """The current folder as `make demo` leaves it, but for the model's size: its checkpoint names
    a backbone of the Hub."""
    model, processor = build(lora=True)
    model.config.backbone_name = BACKBONE.hub_id
    for form, name in (("slim", "checkpoint-slim"), ("full", "checkpoint")):
        folder = place / "runs" / "demo" / name
        model.save_pretrained(folder, form=form)
        processor.save_pretrained(folder)
    return place
