"""A checkpoint goes to the Hub whole or not at all, and strangers can load it from there."""

import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hub.loopback import Fault, LoopbackHub
from hub.loopback_store import File
from hub.pushing import REPO, Save, contents
from huggingface_hub import HfApi, constants

from ccf_llm_hf import __version__
from ccf_llm_hf.cli import main as cli
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.model_card import read_facts, write_card
from ccf_llm_hf.hub.push import publish, push
from ccf_llm_hf.hub.repository import check_may_write
from ccf_llm_hf.hub.staging import Staged, list_files, stage_checkpoint


def staged_bytes(staged: Staged) -> dict[str, bytes]:
    return {name: (staged.folder / name).read_bytes() for name in staged.files}


# --- what is sent


PUBLISHED = {
    "README.md",
    "card.json",
    "example.json",
    "config.json",
    "processor_config.json",
    "item_catalog.jsonl",
    "user_ids.jsonl",
    "tokenizer.json",
    "tokenizer_config.json",
    "modeling_ccf_llm.py",
    "pipeline_ccf_llm.py",
}


def test_only_a_checkpoint_goes_up(save: Save, unchecked: None, tmp_path: Path) -> None:
    folder = save("slim")
    with stage_checkpoint(folder, REPO) as staged:
        files = set(staged.files)
        text = list_files(staged.files, staged.left, staged.notes)
        card = (staged.folder / "README.md").read_text()
        config = json.loads((staged.folder / "config.json").read_text())
        adapter = json.loads((staged.folder / "adapter" / "adapter_config.json").read_text())
    assert files >= PUBLISHED | {"fusion.safetensors", "adapter/adapter_model.safetensors"}
    assert all(name.endswith((".py", ".json", ".jsonl", ".safetensors", ".md")) for name in files)
    assert staged.left == ["adapter/notes.txt", "logs/", "optimizer.pt", "train.parquet"]
    assert "stays here: adapter/notes.txt, logs/, optimizer.pt, train.parquet" in text
    assert "scan: no token and no absolute path in" in text
    assert f"{len(files)} files" in text
    assert f'repo = "{REPO}"' in card
    assert config["backbone_name"] == adapter["base_model_name_or_path"] == "llama0"
    assert json.loads((folder / "config.json").read_text())["backbone_name"].startswith("/")
    assert not list(folder.parent.glob(".push-*")), "the copy is gone"


@pytest.mark.parametrize(
    ("file", "old", "new", "place"),
    [
        ("config.json", '"cf_model": "mf"', '"cf_model": "/srv/x/mf"', "line"),
        ("README.md", "", "\ndata_dir: /somewhere/else/ml1m\n", "line"),
        ("card.json", '"source": "shop.csv"', '"source": "of /srv/x"', "line"),
        ("README.md", "", "\nsee C:\\Users\\me\\films\n", "line"),
        ("item_catalog.jsonl", "Heat (1995)", "hf_" + "Ab1" * 12, "line 2"),
        ("modeling_ccf_llm.py", "", '\nFOLDER = "/home/me/films"\n', "line"),
    ],
)
def test_what_is_private_is_refused_with_file_and_line(
    save: Save, unchecked: None, file: str, old: str, new: str, place: str
) -> None:
    folder = save()
    write_card(folder, replace(read_facts(folder), protocol={"source": "shop.csv"}))
    text = (folder / file).read_text()
    assert old in text
    (folder / file).write_text(text.replace(old, new) if old else text + new)
    with pytest.raises(InputError) as caught, stage_checkpoint(folder, REPO):
        pass
    assert str(caught.value).startswith(f"{file}, {place}")
    assert "Ab1Ab1" not in str(caught.value)


def test_no_path_of_the_author_is_published_as_a_fact(save: Save, unchecked: None) -> None:
    folder = save()
    facts = folder / "card.json"
    facts.write_text(facts.read_text().replace('"protocol": {', '"protocol": {"x": "/else/where"'))
    with stage_checkpoint(folder, REPO) as staged:
        assert read_facts(staged.folder).protocol == {"x": "where"}
    (folder / "README.md").write_text("By hand, so that nothing is rendered.\n")
    with (
        pytest.raises(InputError, match=r"card\.json, line \d+: an absolute path of any kind"),
        stage_checkpoint(folder, REPO),
    ):
        pass


def test_a_slim_checkpoint_without_a_public_backbone_says_so(save: Save, unchecked: None) -> None:
    with stage_checkpoint(save("slim"), REPO) as staged:
        (note,) = [note for note in staged.notes if note.startswith("note: ")]
        assert "which came from a local folder" in note
        assert "--full loads by itself" in note
        assert Path(staged.backbone).is_dir()
    with stage_checkpoint(save("full", "full"), REPO) as staged:
        assert not staged.backbone


def test_slim_becomes_full_and_is_checked_in_a_clean_process(
    save: Save, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save("slim")
    (folder / "example.json").unlink()
    (folder / "README.md").unlink()
    assert cli.main(["push", str(folder), "--repo", REPO, "--full", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "model.safetensors" in out
    assert "cf_embeddings.safetensors" not in out
    assert "check: loads in a process without this package" in out
    assert out.rstrip().endswith("nothing was sent")
    assert {request.method for request in hub.requests} == {"GET"}
    assert not (folder / "example.json").exists(), "the folder itself is left as it was"


def test_a_card_follows_form_and_repository(save: Save, unchecked: None) -> None:
    folder = save("slim")
    write_card(folder, replace(read_facts(folder), name="Our films", version="0.0.1"))
    assert "backbone = " in (folder / "README.md").read_text()
    with stage_checkpoint(folder, REPO, form="full") as staged:
        text = (staged.folder / "README.md").read_text()
        facts = read_facts(staged.folder)
    assert "backbone = " not in text
    assert "| Form | full: self-contained" in text
    assert f'repo = "{REPO}"' in text
    assert "# Our films\n" in text and facts.name == "Our films"
    assert f"`ccf-llm-hf` {__version__}: read them first" in text, "the code is this version's"


@pytest.mark.parametrize("form", ["slim", "full"])
def test_a_card_with_words_of_its_own_is_sent_as_it_stands(
    save: Save, unchecked: None, form: str
) -> None:
    folder = save("slim")
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nBy hand.\n")
    with stage_checkpoint(folder, REPO, form=form) as staged:
        assert (staged.folder / "README.md").read_text() == card.read_text()
        assert any("README.md was written by hand and is sent" in note for note in staged.notes)
        assert "card.json" in staged.files
    card.unlink()
    with stage_checkpoint(folder, REPO, form=form) as staged:
        assert f'repo = "{REPO}"' in (staged.folder / "README.md").read_text()
        assert not any("by hand" in note for note in staged.notes)
        assert not staged.generic_card, "the facts are there"


def test_full_becomes_slim_where_its_lora_is_known(save: Save, unchecked: None) -> None:
    with stage_checkpoint(save("full"), REPO, form="slim") as staged:
        files = {"fusion", "cf_embeddings", "text_vectors", "adapter/adapter_model"}
        assert {f"{name}.safetensors" for name in files} <= set(staged.files)
        assert staged.backbone
        assert "model.safetensors" not in staged.files
        assert "| Form | slim" in (staged.folder / "README.md").read_text()
    merged = save("full", "merged")
    shutil.rmtree(merged / "adapter")  # as releases before 0.2 wrote it
    with (
        pytest.raises(InputError, match="LoRA is merged"),
        stage_checkpoint(merged, REPO, form="slim"),
    ):
        pass


def test_code_that_needs_this_package_is_refused(
    save: Save, hub: LoopbackHub, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = save()
    code = folder / "configuration_ccf_llm.py"
    code.write_text(code.read_text().replace("import hashlib", "import ccf_llm_hf\nimport hashlib"))
    assert cli.main(["push", str(folder), "--repo", REPO]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: the checkpoint does not load in a process without this package")
    assert "ccf_llm_hf" in error.split("could load it: ")[1]
    assert {request.method for request in hub.requests} == {"GET"}


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
        (lambda folder: (folder / "user_ids.jsonl").unlink(), r"has no user_ids\.jsonl"),
        (lambda folder: (folder / "README.md").write_text("---\na: [\n---\n"), "README.md"),
        (lambda folder: (folder / "example.json").write_text("{}"), "example.json"),
        (lambda folder: (folder / "card.json").write_text("{}"), r"card\.json does not hold"),
    ],
)
def test_a_damaged_checkpoint_is_refused(
    save: Save, unchecked: None, spoil: Callable[[Path], Any], words: str
) -> None:
    folder = save()
    spoil(folder)
    with pytest.raises(InputError, match=words), stage_checkpoint(folder, REPO):
        pass


@pytest.mark.parametrize("repo", ["films", "a/b/c", "acme/", "acme/fi lms"])
def test_a_repository_needs_an_owner_and_a_name(save: Save, unchecked: None, repo: str) -> None:
    with pytest.raises(InputError, match="org/name"), stage_checkpoint(save(), repo):
        pass


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--repo", "films"], "org/name"), (["--repo", REPO, "--revision", "a" * 40], "a branch")],
)
def test_names_are_checked_before_anything_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], words: str
) -> None:
    assert cli.main(["push", str(tmp_path), *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line


# --- how it is sent


@pytest.fixture
def slim(save: Save, unchecked: None) -> Iterator[Staged]:
    with stage_checkpoint(save("slim"), REPO) as staged:
        yield staged


def test_one_commit_and_the_line_that_loads_it(hub: LoopbackHub, slim: Staged) -> None:
    published = publish(slim, REPO, private=True)
    repo = hub.store.repo(REPO)
    titles = [commit.title for commit in repo.history("main")]
    assert titles == ["Upload checkpoint", "initial commit"]
    assert repo.private and published.private
    assert contents(hub).items() >= staged_bytes(slim).items()
    pinned = f'"{REPO}", revision="{repo.branches["main"]}"'
    assert published.load == [
        f'AutoModel.from_pretrained({pinned}, backbone="{slim.backbone}", trust_remote_code=True)',
        f"AutoProcessor.from_pretrained({pinned}, trust_remote_code=True)",
    ]
    assert published.load[0] in published.as_text()
    again = publish(slim, REPO)
    assert again.unchanged and again.commit == published.commit
    assert len(repo.history("main")) == 2


def test_a_push_to_a_branch_leaves_main_alone(hub: LoopbackHub, slim: Staged) -> None:
    publish(slim, REPO, revision="dev")
    assert set(contents(hub)) == {".gitattributes"}
    assert set(contents(hub, branch="dev")) == {".gitattributes", *slim.files}
    with pytest.raises(InputError, match="name a branch"):
        publish(slim, REPO, revision="a" * 40)


def test_the_other_form_is_replaced_and_other_files_stay(
    hub: LoopbackHub, slim: Staged, save: Save
) -> None:
    publish(slim, REPO)
    with stage_checkpoint(save("full", "full"), REPO) as full:
        hub.store.repo(REPO).add_commit(
            "main", "by hand", "ada", hub.store.repo(REPO).commit_at("main").files
        )
        publish(full, REPO)
        assert set(contents(hub)) == {".gitattributes", *full.files}


def test_a_written_card_outlives_a_generic_one(
    hub: LoopbackHub, save: Save, unchecked: None
) -> None:
    folder = save()
    (folder / "card.json").unlink()
    (folder / "README.md").write_text("---\ntags: [films]\n---\nBy hand.\n")
    push(folder, REPO)
    (folder / "README.md").unlink()
    published = push(folder, REPO)
    assert "README.md" in published.files
    assert contents(hub)["README.md"].endswith(b"By hand.\n")
    assert "card.json" not in contents(hub)


def add_files(hub: LoopbackHub, repo: str = REPO, kind: str = "model", **files: str) -> None:
    """A repository of somebody's, with files named like `config_json`."""
    HfApi().create_repo(repo, repo_type=kind)
    found = hub.store.repo(repo, kind)
    more = {name.replace("_", "."): File(text.encode()) for name, text in files.items()}
    found.add_commit("main", "by hand", "ada", found.commit_at("main").files | more)


BERT = {"config_json": '{"model_type": "bert"}', "model_safetensors": "weights", "README_md": "Ada"}


@pytest.mark.parametrize(
    ("files", "named"),
    [
        (BERT, "config.json says model_type: bert"),
        ({"config_json": "no JSON"}, "config.json"),
        ({"weights_bin": "x", "vocab_txt": "a"}, "vocab.txt"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--dry-run"], ["--revision", "dev"]])
def test_another_model_is_not_pushed_over(
    hub: LoopbackHub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    files: dict[str, str],
    named: str,
    flags: list[str],
) -> None:
    add_files(hub, **files)
    before = contents(hub)
    assert cli.main(["push", str(tmp_path), "--repo", REPO, *flags]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: {REPO} holds something else than a CCF-LLM checkpoint ({named}): choose another "
        "name, or say --replace to push over it"
    )
    assert contents(hub) == before
    assert set(hub.store.repo(REPO).branches) == {"main"}


def test_asked_for_it_is_and_deletions_are_told_before(
    hub: LoopbackHub,
    save: Save,
    unchecked: None,
    naps: list[float],
    capsys: pytest.CaptureFixture[str],
) -> None:
    add_files(hub, **BERT)
    argv = ["push", str(save("slim")), "--repo", REPO, "--replace"]
    told = f"the commit deletes from {REPO}: model.safetensors"
    over = f"the commit overwrites in {REPO}: README.md, config.json"
    assert cli.main([*argv, "--dry-run"]) == 0
    assert {told, over} <= set(capsys.readouterr().out.splitlines())
    assert "model.safetensors" in contents(hub)
    hub.inject(Fault("error", path="/commit/", times=None))
    assert cli.main(argv) == 2
    said = set(capsys.readouterr().err.splitlines())
    assert {told, over} <= said, "told before the commit, which failed"
    hub.inject(None)
    assert cli.main([*argv, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["deleted"] == ["model.safetensors"]
    assert "model.safetensors" not in contents(hub)
    assert cli.main(argv[:-1]) == 0, "now it is ours"
    err = capsys.readouterr().err
    assert "deletes" not in err and "overwrites" not in err


def test_a_repository_with_a_card_alone_is_free(hub: LoopbackHub, slim: Staged) -> None:
    add_files(hub, README_md="---\nlicense: mit\n---\n")
    assert publish(slim, REPO).deleted == []


@pytest.mark.parametrize(
    ("token", "exists", "words"),
    [
        ("", False, "hf auth login"),
        ("hf_nobody", False, "hf auth login"),
        ("hf_bob", False, "may not write"),
        ("hf_eve", False, "may not write"),
        ("hf_ada_reads", False, "may not write"),
        ("hf_bob", True, "may not write"),
        ("hf_ada_alone", True, "may not write"),
    ],
)
def test_a_dry_run_asks_the_hub_who_may_write(
    hub: LoopbackHub,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    token: str,
    exists: bool,
    words: str,
) -> None:
    """And before any work: the folder is not even looked at."""
    if exists:
        HfApi().create_repo(REPO)
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "none"))
    assert cli.main(["push", str(tmp_path), "--repo", REPO, "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {REPO} was not published: ") and words in line


@pytest.mark.parametrize(
    ("scoped", "may"),
    [
        ([], False),
        ([{"entity": {"name": "acme"}, "permissions": ["repo.content.read"]}], False),
        ([{"entity": {"name": "eve"}, "permissions": ["repo.write"]}], False),
        ([{"entity": {"name": "acme"}, "permissions": ["repo.write"]}], True),
        ([{"entity": {"name": REPO}, "permissions": ["repo.write"]}], True),
    ],
)
def test_a_fine_grained_token_is_read_by_its_scopes(
    hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch, scoped: list[Any], may: bool
) -> None:
    token = {"role": "fineGrained", "fineGrained": {"scoped": scoped}}
    orgs = [{"name": "acme", "roleInOrg": "write"}]
    me = {"name": "ada", "orgs": orgs, "auth": {"accessToken": token}}
    monkeypatch.setattr(HfApi, "whoami", lambda _: me)
    api = HfApi(token="hf_ada")
    if may:
        check_may_write(api, REPO, "model", exists=False)
    else:
        with pytest.raises(InputError, match="may not write"):
            check_may_write(api, REPO, "model", exists=False)


@pytest.mark.parametrize(
    ("fault", "reason"), [("off", "HF_HUB_OFFLINE is set"), ("error", "answered with error 500")]
)
def test_without_the_hub_a_dry_run_says_so_and_a_push_ends(
    hub: LoopbackHub,
    save: Save,
    unchecked: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    fault: str,
    reason: str,
) -> None:
    argv = ["push", str(save()), "--repo", REPO]
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", fault == "off")
    hub.inject(Fault("error", times=None))
    assert cli.main([*argv, "--dry-run"]) == 0
    (note,) = [line for line in capsys.readouterr().out.splitlines() if "could not be" in line]
    assert note.startswith("note: the Hub could not be asked for token, repository and rights: ")
    assert reason in note
    assert cli.main(argv) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {REPO} was not published: the Hub could not be asked")


@pytest.mark.parametrize(
    ("token", "words"),
    [
        (False, "hf auth login"),
        ("hf_nobody", "hf auth login"),
        ("hf_bob", "may not write"),
        ("hf_ada_reads", "may not write"),
        ("hf_ada_alone", "may not write"),
    ],
)
def test_who_may_not_write_is_told(
    hub: LoopbackHub, slim: Staged, token: str | bool, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        publish(slim, REPO, token=token)
    assert ("model", REPO) not in hub.store.repos


def test_private_is_not_promised_of_a_public_repository(hub: LoopbackHub, slim: Staged) -> None:
    publish(slim, REPO)
    with pytest.raises(InputError, match="is public"):
        publish(slim, REPO, private=True)


# --- what goes wrong

FAULTS = {
    "500 once": Fault("error"),
    "500 forever": Fault("error", times=None),
    "429 once": Fault("busy", retry_after=3),
    "429 forever": Fault("busy", times=None, retry_after=3),
    "dropped once": Fault("drop"),
    "dropped forever": Fault("drop", times=None),
    "answer lost once": Fault("lose"),
    "answer lost forever": Fault("lose", times=None),
}
# To a new repository and branch: look, create, look, branch, look, validate, preupload, batch, each
# of four weight files put and verified, commit. To one that is there: the first four fall away, and
# config.json is read.
REQUESTS = {"new": 17, "old": 14}


def try_push(staged: Staged, repo: str, revision: str | None) -> bool:
    """Whether it went through; if not, it said so in one line with what to do."""
    try:
        publish(staged, repo, revision=revision)
    except InputError as error:
        assert "\n" not in str(error)
        assert "run the same again" in str(error) or "hf auth login" in str(error)
        return False
    return True


def state(hub: LoopbackHub, repo: str, branch: str) -> dict[str, bytes]:
    found = hub.store.repos.get(("model", repo))
    if found is None or branch not in found.branches:
        return {}
    files = contents(hub, repo, branch)
    files.pop(".gitattributes")
    return files


@pytest.mark.parametrize("kind", FAULTS)
@pytest.mark.parametrize("age", REQUESTS)
def test_no_fault_at_any_request_leaves_half_a_checkpoint(
    hub: LoopbackHub, slim: Staged, save: Save, naps: list[float], age: str, kind: str
) -> None:
    revision = "dev" if age == "new" else None
    branch, whole = revision or "main", staged_bytes(slim)
    before: dict[str, bytes] = {}
    publish(slim, REPO)  # some things huggingface_hub asks once a process
    with stage_checkpoint(save("full", "older"), REPO) as older:
        for at in itertools.count():
            repo = f"acme/films-{at}"
            if age == "old":
                hub.store.objects.clear()
                publish(older, repo)
                before = state(hub, repo, branch)
            hub.store.objects.clear()
            fault = Fault(**{**vars(FAULTS[kind]), "at": at}) if at else None
            hub.inject(fault)
            went_through = try_push(slim, repo, revision)
            count = len(hub.requests)
            after = state(hub, repo, branch)
            assert after in (before, whole), f"half a checkpoint after {kind} at request {at}"
            assert after == whole or not went_through
            if at == 0:
                assert count == REQUESTS[age]
            elif fault.times is None:
                assert not went_through
            hub.inject(None)
            assert try_push(slim, repo, revision), "the same again completes it"
            assert state(hub, repo, branch) == whole
            assert len(hub.store.repo(repo).history(branch)) == (2 if age == "new" else 3)
            if at == REQUESTS[age]:
                break
    if "429" in kind:
        assert 4.0 in naps, "huggingface_hub waits as long as Retry-After says, and a second"


def test_a_fault_is_one_line_and_exit_code_2(
    hub: LoopbackHub, save: Save, unchecked: None, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(save())
    hub.inject(Fault("error", path="/api/repos/create"))
    assert cli.main(["push", folder, "--repo", REPO]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    error = captured.err.strip().splitlines()[-1]
    assert error.startswith(f"error: pushing to {REPO} broke off: the Hub answered with error 500")
    assert cli.main(["push", folder, "--repo", REPO, "--json"]) == 0
    captured = capsys.readouterr()
    document = json.loads(captured.out)
    assert document["commit"] == hub.store.repo(REPO).branches["main"]
    assert "model.safetensors" in document["files"]
    assert "model.safetensors" in captured.err, "what is uploaded is printed before"
