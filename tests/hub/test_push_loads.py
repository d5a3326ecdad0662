"""Strangers load what was pushed, by transformers alone."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.loopback import LoopbackHub
from hub.pushing import REPO, Save, contents
from tiny import BuildModel
from transformers import AutoModelForCausalLM

from ccf_llm_hf import CCFLLMForCTR, CTRRanker
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.push import publish, push
from ccf_llm_hf.hub.staging import stage_checkpoint
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CODE_FILES

CALL = {"user": "u0", "history": ["i1", "i2"], "candidates": ["i0", "i3", "A new film (2024)"]}

STRANGER = """
import json, sys, torch
for package in ("ccf_llm_hf", "peft", "datasets", "pandas"):
    sys.modules[package] = None  # importing it fails
from transformers import AutoModel, AutoProcessor
call, loads = json.loads(sys.argv[1]), json.loads(sys.argv[2])
found = []
for model_repo, processor_repo, options in loads:
    options["trust_remote_code"] = True
    backbone = {"backbone": options.pop("backbone")} if "backbone" in options else {}
    try:
        processor = AutoProcessor.from_pretrained(processor_repo, **options)
        model = AutoModel.from_pretrained(model_repo, **options, **backbone)
        with torch.no_grad():
            found.append(model(**processor(**call)).logits.tolist())
    except Exception as error:
        found.append(f"{type(error).__name__}: {error}")
print("FOUND", json.dumps(found))
"""


Load = tuple[str, str, dict[str, Any]]


def load_as_a_stranger(
    hub: LoopbackHub, home: Path, loads: list[Load], offline: bool = False
) -> list[Any]:
    """Logits, or errors, of several loads in one process that has neither package nor token."""
    run = subprocess.run(
        [sys.executable, "-c", STRANGER, json.dumps(CALL), json.dumps(loads)],
        env=os.environ | hub.environment(home, offline=offline),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.split("FOUND ")[1])


def logits(model: Any, processor: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(**processor(**CALL)).logits


def assert_same(found: Any, expected: torch.Tensor) -> None:
    assert isinstance(found, list), found
    torch.testing.assert_close(torch.tensor(found), expected, atol=1e-5, rtol=0)


def test_strangers_load_what_was_pushed(
    hub: LoopbackHub,
    environment: None,
    build: BuildModel,
    backbone_folder: Callable[..., Path],
    save: Save,
    tmp_path: Path,
) -> None:
    causal = AutoModelForCausalLM.from_pretrained(backbone_folder())
    causal.push_to_hub("acme/backbone")
    model, processor = build(lora=True, cf_logit=True)
    first = logits(model, processor)
    slim, full = save("slim", "slim", backbone_name="acme/backbone"), save("full")
    shutil.rmtree(slim / "logs")
    with stage_checkpoint(slim, "acme/slim") as staged:
        assert not staged.backbone, "the clean process fetched it from the Hub"
        publish(staged, "acme/slim")
    with stage_checkpoint(full, REPO) as staged:
        pinned = publish(staged, REPO).commit
        publish(staged, "acme/secret", private=True)
        publish(staged, "acme/gated")
    hub.store.repo("acme/gated").gated = True
    with torch.no_grad():
        model.answer_weight.mul_(2)
    push(model, REPO)
    second = logits(model, processor)
    assert (second - first).abs().max() > 1e-3

    def ask(repo: str, **options: Any) -> Load:
        return repo, repo, options

    loads = {
        "main": ask(REPO),
        "pinned": ask(REPO, revision=pinned),
        "code pinned": ask(REPO, code_revision=pinned),
        "slim": ask("acme/slim"),
        "no token": ask("acme/secret"),
        "token": ask("acme/secret", token="hf_bob"),
        "stranger": ask("acme/gated", token="hf_eve"),
        "granted": ask("acme/gated", token="hf_bob"),
    }
    found = dict(
        zip(loads, load_as_a_stranger(hub, tmp_path / "cache", list(loads.values())), strict=True)
    )
    for name in ("pinned", "slim", "token", "granted"):
        assert_same(found[name], first)
    for name in ("main", "code pinned"):
        assert_same(found[name], second)
    assert "acme/secret is not a local folder" in found["no token"]
    assert "gated repo" in found["stranger"]
    hub.inject(None)
    again = load_as_a_stranger(
        hub, tmp_path / "cache", [loads["main"], loads["pinned"], loads["slim"]], offline=True
    )
    assert_same(again[0], second)
    assert_same(again[1], first)
    assert_same(again[2], first)
    assert hub.requests == [], "offline means offline"


def test_model_processor_and_ranker_are_pushed(
    hub: LoopbackHub, build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path
) -> None:
    model, processor = build(lora=True)
    model.config.backbone_name = str(backbone_folder())
    expected = logits(model, processor)
    pushed = push(model, "acme/model", form="slim", private=True)
    assert hub.store.repo("acme/model").private
    assert b"backbone_name" in contents(hub, "acme/model")["config.json"]
    assert str(backbone_folder()).encode() not in contents(hub, "acme/model")["config.json"]
    supply = f'revision="{pushed.commit}", backbone="{backbone_folder()}", trust_remote_code=True'
    assert pushed.load == [f'AutoModel.from_pretrained("acme/model", {supply})']
    push(processor, "acme/processor")
    assert "config.json" not in contents(hub, "acme/processor")
    push(processor, "acme/model")
    assert "fusion.safetensors" in contents(hub, "acme/model"), "the model stays"
    push(CTRRanker(model, processor), "acme/ranker", form="full")
    assert {"example.json", "model.safetensors"} <= set(contents(hub, "acme/ranker"))
    local = {"backbone": str(backbone_folder()), "token": "hf_bob"}
    loads: list[Load] = [
        ("acme/model", "acme/processor", local),
        ("acme/model", "acme/model", local),
        ("acme/ranker", "acme/ranker", {}),
    ]
    for found in load_as_a_stranger(hub, tmp_path / "cache", loads):
        assert_same(found, expected)


def test_push_to_hub_is_that_of_transformers(
    hub: LoopbackHub, build: BuildModel, tmp_path: Path
) -> None:
    model, processor = build()
    model.push_to_hub("plain", commit_message="by transformers", private=True)
    processor.push_to_hub("plain")
    repo = hub.store.repo("ada/plain")
    assert repo.private and repo.history("main")[1].title == "by transformers"
    assert {"processor_config.json", *CODE_FILES} <= set(contents(hub, "ada/plain"))
    commits = len(repo.commits)
    last = model.push_to_hub("ada/plain"), processor.push_to_hub("ada/plain")
    assert len(repo.commits) == commits, "nothing changed, so there is no commit"
    assert {commit.oid for commit in last} == {repo.branches["main"]}
    loaded = CCFLLMForCTR.from_pretrained("ada/plain", revision=last[0].oid, cache_dir=tmp_path)
    assert_same(logits(loaded, processor).tolist(), logits(model, processor))

    asked = model.push_to_hub("ada/plain", create_pr=True, max_shard_size="20kB")
    assert asked.pr_url and repo.branches["main"] == last[0].oid
    assert "model.safetensors.index.json" in contents(hub, "ada/plain", "refs/pr/1")
    model.push_to_hub("ada/plain", revision="dev", token="hf_ada", tags=["films"])
    assert repo.branches["main"] == last[0].oid and "dev" in repo.branches
    with pytest.raises(TypeError, match="form"):
        model.push_to_hub("ada/plain", form="slim")


@pytest.mark.parametrize("argument", ["create_pr", "max_shard_size", "commit_description"])
def test_push_refuses_by_name_what_it_does_not_do(hub: LoopbackHub, argument: str) -> None:
    more: Any = {argument: True}
    with pytest.raises(TypeError, match=argument):
        push("folder", REPO, **more)
    with pytest.raises(InputError, match="'films' is not of the form org/name"):
        push("folder", "films")
