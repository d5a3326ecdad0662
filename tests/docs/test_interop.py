"""Every snippet of docs/interop.md runs, verbatim and in order."""

import os
import subprocess
import sys
from pathlib import Path

import yaml
from docs.pages import blocks, commands, run_command, run_python
from safetensors.torch import load_file, save_file

from ccf_llm_hf.training.recipe import Stage, is_hub_repo

PAGE = "docs/interop.md"
CHECKS = """
assert [len(ranked) for ranked in ranker(users)] == [2, 3]
assert any("lora_A" in name for name, _ in tuned.named_parameters())
assert best_item in item_ids and len(user_ids) == len(user_vectors)
books = pipeline("ctr-ranking", model="runs/books", trust_remote_code=True)
ranked = books({"user": "reader-1", "history": ["book-0"], "candidates": ["book-3", "book-5"]})
assert {item["item_id"]: item["known"] for item in ranked} == {"book-3": True, "book-5": False}
"""


def test_python_snippets_run(trained: Path) -> None:
    printed = run_python([*blocks(PAGE, "python"), CHECKS], trained)
    assert "The Green Mile" in printed and "ids_fingerprint" in printed
    assert (trained / "runs" / "books" / "config.json").is_file()


def test_the_adapter_is_not_attached_to_other_weights(trained: Path) -> None:
    """The snippet stops where the cached copy is not the one that was trained on."""
    weights = trained / "cache" / "smollm2-135m-instruct" / "model.safetensors"
    tensors = load_file(weights)
    tensors["model.layers.0.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, weights, {"format": "pt"})
    (snippet,) = [block for block in blocks(PAGE, "python") if "PeftModel" in block]
    run = subprocess.run(
        [sys.executable, "-c", 'slim = "runs/demo/checkpoint-slim"\n' + snippet],
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1 and "AssertionError" in run.stderr


def test_commands_run(trained: Path) -> None:
    for words in commands(PAGE):
        run_command(words)
    assert (trained / "runs" / "demo" / "merged" / "model.safetensors").is_file()


def test_recipe_entries_are_valid() -> None:
    (stage,) = [Stage(**yaml.safe_load(block)) for block in blocks(PAGE, "yaml")]
    assert is_hub_repo(stage.init_from)
