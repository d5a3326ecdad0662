"""The loopback Hub behaves as the Hub does, for the libraries that talk to it."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hub.loopback import Fault, LoopbackHub
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tiny import BuildModel

REPO = "acme/films"


def add(path: str, data: bytes) -> CommitOperationAdd:
    return CommitOperationAdd(path, io.BytesIO(data))


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    return HfApi(endpoint=hub.url, token="hf_ada")


@pytest.fixture
def repo(api: HfApi) -> str:
    """A repository with a text file, an LFS file and a folder."""
    api.create_repo(REPO)
    files = {"README.md": b"---\ntags: [a]\n---\n# Films\n", "a/x.txt": b"x" * 100}
    operations = [add(path, data) for path, data in files.items()]
    operations.append(add("model.safetensors", b"0123456789" * 20))
    api.create_commit(REPO, operations, commit_message="first")
    return REPO


def status(call: Callable[[], Any]) -> int:
    with pytest.raises(HfHubHTTPError) as caught:
        call()
    return caught.value.response.status_code


def fetch(hub: LoopbackHub, home: Path, name: str, **options: Any) -> bytes:
    options = {"token": "hf_ada", "endpoint": hub.url, **options}
    return Path(hf_hub_download(REPO, name, cache_dir=home, **options)).read_bytes()


def test_who_one_is_and_may_write_to(api: HfApi, hub: LoopbackHub) -> None:
    assert api.whoami()["name"] == "ada"
    assert [org["roleInOrg"] for org in api.whoami()["orgs"]] == ["write"]
    assert status(lambda: api.whoami(token="hf_nobody")) == 401
    assert status(lambda: HfApi(endpoint=hub.url, token=False).create_repo(REPO)) == 401
    for token in ("hf_bob", "hf_eve", "hf_ada_reads", "hf_ada_alone"):
        assert status(lambda token=token: api.create_repo(REPO, token=token)) == 403
    assert api.create_repo("ada/own", token="hf_ada_alone").repo_id == "ada/own"
    api.create_repo(REPO)
    assert status(lambda: api.create_repo(REPO)) == 409
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO


def test_a_commit_is_whole_and_keeps_what_it_does_not_name(
    api: HfApi, hub: LoopbackHub, repo: str
) -> None:
    operations = [CommitOperationDelete("a/x.txt"), add("b.txt", b"b")]
    info = api.create_commit(repo, operations, commit_message="second")
    assert api.repo_info(repo).sha == info.oid == hub.store.repo(repo).branches["main"]
    names = {sibling.rfilename for sibling in api.repo_info(repo).siblings or []}
    assert names == {".gitattributes", "README.md", "model.safetensors", "b.txt"}
    titles = [commit.title for commit in api.list_repo_commits(repo)]
    assert titles == ["second", "first", "initial commit"]
    again = api.create_commit(repo, [add("b.txt", b"b")], commit_message="none")
    assert again.oid == info.oid, "an unchanged file makes no commit"
    old = hub.store.repo(repo).commits[info.oid].parent
    stale = [add("c.txt", b"c")]
    late = {"commit_message": "late", "parent_commit": old}
    assert status(lambda: api.create_commit(repo, stale, **late)) == 412


def test_branches_tags_and_trees(api: HfApi, repo: str) -> None:
    first = api.repo_info(repo).sha
    api.create_branch(repo, branch="dev")
    api.create_tag(repo, tag="v1")
    dev = api.create_commit(repo, [add("d.txt", b"d")], commit_message="dev", revision="dev")
    assert api.repo_info(repo).sha == api.repo_info(repo, revision="v1").sha == first
    assert api.repo_info(repo, revision="dev").sha == dev.oid
    refs = api.list_repo_refs(repo)
    assert {ref.name for ref in refs.branches} == {"main", "dev"}
    assert [ref.name for ref in refs.tags] == ["v1"]
    assert {entry.path for entry in api.list_repo_tree(repo)} == {
        *(".gitattributes", "README.md", "model.safetensors", "a")
    }
    assert "a/x.txt" in {entry.path for entry in api.list_repo_tree(repo, recursive=True)}
    (weights,) = api.get_paths_info(repo, ["model.safetensors", "nowhere"], expand=True)
    assert weights.lfs is not None and weights.lfs.size == 200
    with pytest.raises(EntryNotFoundError):
        list(api.list_repo_tree(repo, "nowhere"))
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(repo, revision="nowhere")


def test_downloads_by_etag_revision_and_range(
    api: HfApi, hub: LoopbackHub, repo: str, tmp_path: Path
) -> None:
    assert fetch(hub, tmp_path, "model.safetensors") == b"0123456789" * 20
    assert fetch(hub, tmp_path, "a/x.txt") == b"x" * 100
    assert [request.token for request in hub.requests if "_lfs" in request.path][-1] is None
    hub.inject(None)
    assert fetch(hub, tmp_path, "model.safetensors") == b"0123456789" * 20
    assert [request.method for request in hub.requests] == ["HEAD"], "the ETag is unchanged"
    first = api.repo_info(repo).sha
    api.create_commit(repo, [add("a/x.txt", b"new")], commit_message="second")
    assert fetch(hub, tmp_path, "a/x.txt", revision=first) == b"x" * 100
    assert fetch(hub, tmp_path, "a/x.txt") == b"new"
    with pytest.raises(EntryNotFoundError):
        fetch(hub, tmp_path, "nowhere")


@pytest.mark.parametrize("name", ["model.safetensors", "a/x.txt"])
def test_a_download_that_is_cut_goes_on_where_it_stopped(
    hub: LoopbackHub, repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10)
    whole = hub.store.repo(repo).commit_at("main").files[name].data
    large = name == "model.safetensors"
    hub.inject(Fault("cut", at=1 if large else 2, path="_lfs" if large else "resolve"))
    assert fetch(hub, tmp_path, name) == whole
    assert hub.requests[-1].header("Range") == f"bytes={len(whole) // 2}-"


def test_a_slow_body_is_asked_for_again(
    hub: LoopbackHub, repo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
    hub.inject(Fault("slow", path="_lfs", pause=1.0))
    assert fetch(hub, tmp_path, "model.safetensors") == b"0123456789" * 20
    assert sum("_lfs" in request.path for request in hub.requests) == 2


def test_private_and_gated_repositories(
    api: HfApi, hub: LoopbackHub, repo: str, tmp_path: Path
) -> None:
    stored = hub.store.repo(repo)
    stored.private = True
    for token in (False, "hf_eve", "hf_ada_alone"):
        with pytest.raises(RepositoryNotFoundError):
            api.repo_info(repo, token=token)
    assert api.repo_info(repo, token="hf_bob").private
    assert fetch(hub, tmp_path / "bob", "a/x.txt", token="hf_bob") == b"x" * 100
    stored.private, stored.gated = False, True
    assert api.repo_info(repo, token=False).sha, "what a gated repository is, is public"
    for token in (False, "hf_eve"):
        with pytest.raises(GatedRepoError):
            fetch(hub, tmp_path / str(token), "a/x.txt", token=token)
    stored.granted.add("eve")
    assert fetch(hub, tmp_path / "eve", "a/x.txt", token="hf_eve") == b"x" * 100


def test_faults_strike_the_request_they_are_set_for(
    api: HfApi, hub: LoopbackHub, repo: str, naps: list[float]
) -> None:
    hub.inject(Fault("error", at=2))
    assert api.repo_info(repo).sha
    assert status(lambda: api.repo_info(repo)) == 500
    assert api.repo_info(repo).sha
    hub.inject(Fault("error", times=None, path="/commits/"))
    assert api.repo_info(repo).sha
    assert status(lambda: api.list_repo_commits(repo)) == 500
    hub.inject(Fault("busy", path="/preupload/", retry_after=7))
    info = api.create_commit(repo, [add("new.txt", b"1")], commit_message="after a wait")
    assert 8.0 in naps and api.repo_info(repo).sha == info.oid
    for kind, made in (("drop", False), ("lose", True)):
        hub.inject(Fault(kind, path="/commit/"))  # type: ignore[arg-type]
        with pytest.raises(Exception, match="disconnected"):
            api.create_commit(repo, [add("new.txt", kind.encode())], commit_message=kind)
        titles = [commit.title for commit in api.list_repo_commits(repo)]
        assert (kind in titles) is made


def test_invalid_metadata_is_refused(api: HfApi, repo: str) -> None:
    card = add("README.md", b"---\n- not\n- a mapping\n---\n")
    with pytest.raises(ValueError, match="Invalid metadata"):
        api.create_commit(repo, [card], commit_message="bad card")


LIBRARIES = """
import json, sys
sys.modules["ccf_llm_hf"] = None  # importing it fails
from datasets import load_dataset
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained("acme/backbone")
plain = AutoModelForCausalLM.from_pretrained("acme/backbone")
tuned = PeftModel.from_pretrained(plain, "acme/slim", subfolder="adapter")
ids = tokenizer("Toy Story", return_tensors="pt")["input_ids"]
rows = load_dataset("acme/rows", "items")["train"]
print("FOUND", json.dumps([rows.to_list(), tuned(input_ids=ids).logits.isfinite().all().item()]))
"""


def test_transformers_peft_and_datasets_talk_to_it(
    hub: LoopbackHub,
    api: HfApi,
    build: BuildModel,
    backbone_folder: Callable[..., Path],
    tmp_path: Path,
) -> None:
    from datasets import Dataset

    model, _ = build(lora=True)
    model.save_pretrained(tmp_path / "slim", form="slim")
    rows = [{"item_id": "1", "title": "Heat (1995)"}, {"item_id": "2", "title": "Alien (1979)"}]
    (tmp_path / "rows").mkdir()
    Dataset.from_list(rows).to_parquet(tmp_path / "rows" / "items.parquet")
    configs = json.dumps([{"config_name": "items", "data_files": "items.parquet"}])
    (tmp_path / "rows" / "README.md").write_text(f"---\nconfigs: {configs}\n---\n")
    for name, folder, kind in (
        ("backbone", backbone_folder(), "model"),
        ("slim", tmp_path / "slim", "model"),
        ("rows", tmp_path / "rows", "dataset"),
    ):
        api.create_repo(f"acme/{name}", repo_type=kind)
        api.upload_folder(repo_id=f"acme/{name}", folder_path=folder, repo_type=kind)
    api.create_repo("acme/space", repo_type="space", space_sdk="gradio")
    assert api.repo_info("acme/space", repo_type="space").sha
    run = subprocess.run(
        [sys.executable, "-c", LIBRARIES],
        env=os.environ | hub.environment(tmp_path / "home", token="hf_bob"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert json.loads(run.stdout.split("FOUND ")[1]) == [rows, True]
