"""Every snippet of docs/interop.md runs, verbatim and in order."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny import BuildModel

from ccf_llm_hf.cli import main as cli
from ccf_llm_hf.data.asset_list import ASSETS
from ccf_llm_hf.training.recipe import Stage, is_hub_repo

TEXT = (Path(__file__).parents[1] / "docs" / "interop.md").read_text(encoding="utf-8")
CHECKS = """
assert [len(ranked) for ranked in ranker(users)] == [2, 3]
assert any("lora_A" in name for name, _ in tuned.named_parameters())
assert best_item in item_ids and len(user_ids) == len(user_vectors)
books = pipeline("ctr-ranking", model="runs/books", trust_remote_code=True)
ranked = books({"user": "reader-1", "history": ["book-0"], "candidates": ["book-3", "book-5"]})
assert {item["item_id"]: item["known"] for item in ranked} == {"book-3": True, "book-5": False}
"""


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)


@pytest.fixture
def trained(
    build: BuildModel,
    backbone_folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    """The current folder, as `make demo` leaves it but for a tiny model: the checkpoint names a
    backbone of the Hub, whose copy is in the cache of assets and nowhere else."""
    model, processor = build(lora=True)
    asset = ASSETS["smollm2-135m-instruct"]
    model.config.backbone_name = asset.hub_id
    for form, name in (("slim", "checkpoint-slim"), ("full", "checkpoint")):
        folder = tmp_path / "runs" / "demo" / name
        model.save_pretrained(folder, form=form)
        processor.save_pretrained(folder)
    shutil.copytree(backbone_folder(), tmp_path / "cache" / asset.name)
    for name, value in (
        ("CCF_LLM_CACHE", str(tmp_path / "cache")),
        ("HF_HOME", str(tmp_path / "home")),
        ("HF_HUB_OFFLINE", "1"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_snippets_run(trained: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", "\n".join([*blocks("python"), CHECKS])],
        env={**os.environ, "HF_MODULES_CACHE": str(trained / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "The Green Mile" in run.stdout and "ids_fingerprint" in run.stdout
    assert (trained / "runs" / "books" / "config.json").is_file()


def test_the_adapter_is_not_attached_to_other_weights(trained: Path) -> None:
    """The snippet stops where the cached copy is not the one that was trained on."""
    weights = trained / "cache" / "smollm2-135m-instruct" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, weights, {"format": "pt"})
    (snippet,) = [block for block in blocks("python") if "PeftModel" in block]
    run = subprocess.run(
        [sys.executable, "-c", 'slim = "runs/demo/checkpoint-slim"\n' + snippet],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1 and "AssertionError" in run.stderr


def test_commands_run(trained: Path) -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert lines
    for line in lines:
        name, *arguments = line.split()
        assert name == "ccf-llm" and cli.main(arguments) == 0
    assert (trained / "runs" / "demo" / "merged" / "model.safetensors").is_file()


def test_recipe_entries_are_valid() -> None:
    (stage,) = [Stage(**yaml.safe_load(block)) for block in blocks("yaml")]
    assert is_hub_repo(stage.init_from)
