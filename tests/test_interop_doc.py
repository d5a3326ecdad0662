"""Every snippet of docs/interop.md runs, verbatim and in order."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny import BuildModel

from ccf_llm_hf import cli
from ccf_llm_hf.training.recipe import StageConfig, is_hub_repo

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
    """A folder in which `runs/demo` is a tiny model's; it is the current one."""
    model, processor = build(lora=True)
    model.config.backbone_name = str(backbone_folder())
    folder = tmp_path / "runs" / "demo" / "checkpoint-slim"
    model.save_pretrained(folder, form="slim")
    processor.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_snippets_run(trained: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", "\n".join([*blocks("python"), CHECKS])],
        env={**os.environ, "HF_MODULES_CACHE": str(trained / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert "Heat (1995)" in run.stdout and "ids_fingerprint" in run.stdout
    assert (trained / "runs" / "books" / "config.json").is_file()


def test_commands_run(trained: Path) -> None:
    lines = [line for block in blocks("bash") for line in block.splitlines()]
    assert lines
    for line in lines:
        name, *arguments = line.split()
        assert name == "ccf-llm" and cli.main(arguments) == 0
    assert (trained / "runs" / "demo" / "merged" / "model.safetensors").is_file()


def test_recipe_entries_are_valid() -> None:
    (stage,) = [StageConfig(**yaml.safe_load(block)) for block in blocks("yaml")]
    assert is_hub_repo(stage.init_from)
