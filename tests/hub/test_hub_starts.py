"""What starts from a checkpoint on the Hub: the pipeline, merging, training on."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.loopback import LoopbackHub
from huggingface_hub import HfApi
from tiny import BuildModel
from transformers import pipeline

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.merge import merge_checkpoint
from ccf_llm_hf.hub.push import push
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CODE_FILES
from ccf_llm_hf.training.run import find_start
from ccf_llm_hf.training.warm_start import hash_start

REPO = "acme/films"
INPUTS = [
    {"user": "u0", "history": ["i1", "i2"], "candidates": ["i0", "i3", "A new film (2024)"]},
    {"user": "u1", "history": ["i0"]},
]


@pytest.fixture
def slim(build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path) -> Path:
    model, processor = build(lora=True)
    model.config.backbone_name = str(backbone_folder())
    model.save_pretrained(tmp_path / "slim", form="slim")
    processor.save_pretrained(tmp_path / "slim")
    (tmp_path / "slim" / "README.md").write_text("---\ntags: [a]\n---\n# Films\n")
    return tmp_path / "slim"


@pytest.fixture
def revision(hub: LoopbackHub, slim: Path) -> str:
    """The commit of the slim checkpoint in a private repository."""
    api = HfApi(endpoint=hub.url, token="hf_ada")
    api.create_repo(REPO, private=True)
    return api.upload_folder(repo_id=REPO, folder_path=slim).oid


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


PIPELINE = """
import json, sys
sys.modules["ccf_llm_hf"] = None  # importing it fails
sys.modules["peft"] = None
from transformers import pipeline
repo, revision, inputs = sys.argv[1:]
pinned = {"revision": revision, "code_revision": revision}
ranker = pipeline("ctr-ranking", model=repo, trust_remote_code=True, **pinned)
print("FOUND", json.dumps(ranker(json.loads(inputs), batch_size=2)))
"""
PEFT = """
import json, sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
repo, revision, backbone = sys.argv[1:]
plain = AutoModelForCausalLM.from_pretrained(backbone)
tuned = PeftModel.from_pretrained(plain, repo, subfolder="adapter", revision=revision)
with torch.no_grad():
    hidden = tuned(torch.tensor([[3, 4, 5]]), output_hidden_states=True).hidden_states[-1]
print("FOUND", json.dumps(hidden.tolist()))
"""


def run_clean(code: str, hub: LoopbackHub, home: Path, *arguments: str, offline: bool) -> Any:
    """What `code` prints as JSON, in a process of its own that Bob may read with."""
    run = subprocess.run(
        [sys.executable, "-c", code, REPO, *arguments],
        env=os.environ | hub.environment(home, token="hf_bob", offline=offline),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.split("FOUND ")[1])


def test_the_pipeline_loads_from_a_private_repository_and_offline(
    hub: LoopbackHub, revision: str, slim: Path, tmp_path: Path
) -> None:
    model = CCFLLMForCTR.from_pretrained(slim)
    processor = CCFLLMProcessor.from_pretrained(slim)
    expected = pipeline("ctr-ranking", model=model, processor=processor)(INPUTS)
    for offline in (False, True):
        found = run_clean(
            PIPELINE, hub, tmp_path / "home", revision, json.dumps(INPUTS), offline=offline
        )
        for one, other in zip(found, expected, strict=True):
            assert [item["title"] for item in one] == [item["title"] for item in other]
            logits = torch.tensor([[item["logit"] for item in ranked] for ranked in (one, other)])
            torch.testing.assert_close(logits[0], logits[1], atol=1e-5, rtol=0)


def test_peft_takes_the_adapter_from_a_repository(
    hub: LoopbackHub,
    revision: str,
    backbone_folder: Callable[..., Path],
    slim: Path,
    tmp_path: Path,
) -> None:
    arguments = (revision, str(backbone_folder()))
    hidden = run_clean(PEFT, hub, tmp_path / "home", *arguments, offline=False)
    with torch.no_grad():
        model = CCFLLMForCTR.from_pretrained(slim).language_model
        expected = model(torch.tensor([[3, 4, 5]])).last_hidden_state
    torch.testing.assert_close(torch.tensor(hidden), expected, atol=1e-5, rtol=0)


def test_a_pipeline_is_pushed_as_a_checkpoint(
    hub: LoopbackHub, revision: str, slim: Path, tmp_path: Path
) -> None:
    model = CCFLLMForCTR.from_pretrained(slim)
    processor = CCFLLMProcessor.from_pretrained(slim)
    ranker = pipeline("ctr-ranking", model=model, processor=processor)
    push(ranker, "acme/pushed", form="full")
    names = set(hub.store.repo("acme/pushed").commit_at("main").files)
    assert {"model.safetensors", "item_catalog.jsonl", *CODE_FILES} <= names


def test_a_repository_can_be_merged(revision: str, slim: Path, cache: Path, tmp_path: Path) -> None:
    full = merge_checkpoint(REPO, tmp_path / "full")
    assert (full / "README.md").is_file() and not (full / ".gitattributes").exists()
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        merged, whole = (
            CCFLLMForCTR.from_pretrained(folder).language_model(ids).last_hidden_state
            for folder in (full, slim)
        )
    torch.testing.assert_close(merged, whole)
    with pytest.raises(InputError, match=r"acme/nowhere cannot be fetched"):
        merge_checkpoint("acme/nowhere", tmp_path / "other")


def test_a_stage_may_start_from_a_repository(
    revision: str, slim: Path, cache: Path, tmp_path: Path
) -> None:
    folder = find_start(f"{REPO}@{revision}", tmp_path, [], offline=False)
    assert folder is not None and hash_start(folder) == hash_start(slim)
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    assert names == {
        "config.json",
        "processor_config.json",
        "fusion.safetensors",
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
    }
    assert find_start(f"{REPO}@{revision}", tmp_path, [], offline=True) == folder
    assert find_start("first", tmp_path, ["first"], False) == tmp_path / "stages/first/checkpoint"
    assert find_start(str(slim), tmp_path, [], offline=True) == slim
    for source, offline in (("acme/nowhere", False), (f"{REPO}@nowhere", False), ("a/b", True)):
        with pytest.raises(InputError, match=f"`init_from` {source} cannot be fetched"):
            find_start(source, tmp_path, [], offline)
