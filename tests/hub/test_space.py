"""The Space as a folder, and its upload to the loopback Hub."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hub.loopback import Fault, LoopbackHub
from hub.loopback_store import File
from huggingface_hub import HfApi, SpaceCard, constants
from packaging.requirements import Requirement

from ccf_llm_hf.cli import main as cli
from ccf_llm_hf.hub.space import SPACE, push_space, write_space
from ccf_llm_hf.hub.staging import NEEDED
from ccf_llm_hf.modeling.checkpoint_ccf_llm import FUSION_FILE

ROOT = Path(__file__).resolve().parents[2]
MODEL, DEMO = "acme/ccf-llm-ml1m", "acme/ccf-llm-demo"
FILES = {
    *("Dockerfile", "README.md", "app.py", "checkpoint.json", "requirements.txt"),
    *(
        f"ccf_llm_space/{name}"
        for name in (
            *("__init__.py", "guard.py", "markup.py", "recommender.py", "search.py", "server.py"),
            *("page.html", "page.js", "style.css"),
        )
    ),
}


BACKBONE = {
    "model_type": "llama",
    "vocab_size": 8,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
}
FULL = {"model_type": "ccf_llm", "text_config": BACKBONE}
SLIM = FULL | {"checkpoint_form": "slim", "backbone_name": "acme/tiny-lm"}
WEIGHTS = {"full": ["model.safetensors"], "slim": ["cf_embeddings.safetensors", FUSION_FILE]}


def publish_model(
    hub: LoopbackHub, config: dict[str, Any] = FULL, *, without: str = "", **more: Any
) -> str:
    """Commit of a model with the files that a Space looks for; `more` are JSON files."""
    HfApi().create_repo(MODEL, exist_ok=True)
    names = [*NEEDED, *WEIGHTS[config.get("checkpoint_form", "full")]]
    files = {name: File(b"") for name in names if name != without}
    for name, values in {"config": config, **more}.items():
        files[f"{name}.json"] = File(json.dumps(values).encode())
    return hub.store.repo(MODEL).add_commit("main", "by hand", "ada", files).oid


@pytest.fixture
def model(hub: LoopbackHub) -> str:
    return publish_model(hub)


def refusal(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert cli.main(["push-space", *argv]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def names_in(space: str) -> set[str]:
    return set(HfApi().list_repo_files(space, repo_type="space"))


def test_the_folder_is_complete_and_names_its_model(tmp_path: Path) -> None:
    sizes = write_space(tmp_path, MODEL, "abc")
    assert set(sizes) == FILES
    assert sizes["app.py"] == (tmp_path / "app.py").stat().st_size
    assert json.loads((tmp_path / "checkpoint.json").read_text()) == {
        "checkpoint": MODEL,
        "revision": "abc",
    }
    card = SpaceCard.load(tmp_path / "README.md")
    assert card.data.models == [MODEL]
    assert (card.data.sdk, card.data.app_port) == ("docker", 7860)
    assert card.content.count("---") >= 2


def test_versions_are_those_of_the_package() -> None:
    """The Space asks for what the package and its page ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    ours = {*project["dependencies"], *project["optional-dependencies"]["app"]}
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    names = {Requirement(line).name for line in lines}
    assert names == {"torch", "transformers", "safetensors", "starlette", "uvicorn", "rapidfuzz"}
    assert set(lines) <= ours


def test_the_image_runs_what_is_there() -> None:
    lines = (SPACE / "Dockerfile").read_text().splitlines()
    assert "USER user" in lines and 'CMD ["python", "app.py"]' in lines
    copied = [word for line in lines if line.startswith("COPY") for word in line.split()[2:-1]]
    assert all((SPACE / name).exists() for name in copied)


def test_one_command_publishes_it_in_one_commit(
    hub: LoopbackHub, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["push-space", MODEL, "--repo", DEMO, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["url"] == f"{hub.url}/spaces/{DEMO}"
    assert printed["revision"] == model
    assert names_in(DEMO) - {".gitattributes"} == FILES == set(printed["files"])
    commits = [r for r in hub.requests if r.method == "POST" and "/commit/" in r.path]
    assert sum("spaces" in request.path for request in commits) == 1
    settings = HfApi().hf_hub_download(DEMO, "checkpoint.json", repo_type="space")
    assert json.loads(Path(settings).read_text()) == {"checkpoint": MODEL, "revision": model}


def test_again_shows_another_revision(hub: LoopbackHub, model: str) -> None:
    push_space(MODEL, DEMO, private=True)
    newer = publish_model(hub, card={})
    assert push_space(MODEL, DEMO).revision == newer
    assert push_space(MODEL, DEMO, revision=model).revision == model


def test_a_dry_run_finds_the_model_and_sends_nothing(
    hub: LoopbackHub, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.inject(None)
    assert cli.main(["push-space", MODEL, "--repo", DEMO, "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert text.endswith(f"would be uploaded to {DEMO}, showing {MODEL} at {model}\n")
    assert "app.py" in text
    assert {request.method for request in hub.requests} == {"GET"}
    assert "there is no model acme/typo" in refusal(
        capsys, "acme/typo", "--repo", DEMO, "--dry-run"
    )


def test_an_offline_dry_run_says_what_it_did_not_check(
    hub: LoopbackHub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    dry = ["push-space", MODEL, "--repo", DEMO, "--revision", "v1", "--dry-run"]
    hub.inject(Fault("error", times=None))
    assert cli.main(dry) == 0
    text = capsys.readouterr().out
    assert f"would be uploaded to {DEMO}, showing {MODEL} at v1" in text
    assert "note: the Hub could not be asked for token, repository and rights: the Hub" in text
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert cli.main(dry) == 0
    assert "could not be asked for token, repository and rights: " in capsys.readouterr().out
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert cli.main([*dry, "--json"]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert note.endswith(": HF_HUB_OFFLINE is set")


@pytest.mark.parametrize("name", ["acme/films", "runs/demo/checkpoint", "checkpoint"])
def test_a_local_folder_is_to_be_published_first(
    hub: LoopbackHub,
    name: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir(parents=True)
    for flags in ([], ["--dry-run"]):
        line = refusal(capsys, name, "--repo", DEMO, *flags)
        assert f"error: {name} is a folder on this machine" in line
        assert f"ccf-llm push {name} --repo org/name" in line
    assert hub.requests == []


def test_refusals_are_one_line(
    hub: LoopbackHub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)  # a clone may hold what the demo leaves
    assert "there is no model acme/ccf-llm-ml1m" in refusal(capsys, MODEL, "--repo", DEMO)
    assert "'demo' is not of the form org/name" in refusal(capsys, MODEL, "--repo", "demo")
    assert "'runs/demo/checkpoint' is not" in refusal(
        capsys, "runs/demo/checkpoint", "--repo", DEMO
    )
    HfApi().create_repo(MODEL)
    line = refusal(capsys, MODEL, "--repo", DEMO, "--revision", "v9")
    assert "has no revision v9" in line
    monkeypatch.setenv("HF_TOKEN", "hf_bob")
    assert "may not write" in refusal(capsys, MODEL, "--repo", DEMO)


@pytest.mark.parametrize(
    ("config", "more", "words"),
    [
        ({"model_type": "bert"}, {}, "has no config.json of a CCF-LLM checkpoint"),
        ({"model_type": "ccf_llm"}, {}, "has no config.json of a CCF-LLM checkpoint"),
        (FULL, {"without": "processor_config.json"}, "has no processor_config.json"),
        (FULL, {"without": "model.safetensors"}, "has no weights of its full form"),
        (SLIM, {"without": FUSION_FILE}, "has no weights of its slim form"),
        (SLIM, {}, "because its backbone acme/tiny-lm is not there"),
        (SLIM | {"backbone_name": "my-lm"}, {}, "because its backbone came from a local folder"),
        (SLIM, {"card": {"backbone_source": "a GGUF"}}, "because its backbone came from a GGUF"),
        (FULL | {"sentence_encoder": "my-st"}, {}, "because its sentence encoder my-st is not"),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--dry-run"]])
def test_what_does_not_load_from_the_hub_alone_is_refused(
    hub: LoopbackHub,
    capsys: pytest.CaptureFixture[str],
    config: dict[str, Any],
    more: dict[str, Any],
    words: str,
    flags: list[str],
) -> None:
    publish_model(hub, config, **more)
    line = refusal(capsys, MODEL, "--repo", DEMO, *flags)
    assert line.startswith(f"error: {MODEL} ") and words in line
    assert ("space", DEMO) not in hub.store.repos


def test_what_a_private_model_behind_a_space_means_is_told(hub: LoopbackHub) -> None:
    HfApi().create_repo("acme/tiny-lm", private=True)
    publish_model(hub, SLIM)
    token, public = push_space(MODEL, DEMO, dry_run=True).notes
    assert "not everybody may read acme/tiny-lm: give the Space a secret HF_TOKEN" in token
    assert "the Space is public: whoever visits it uses acme/tiny-lm" in public
    hub.store.repo(MODEL).private = True
    assert f"{MODEL} and acme/tiny-lm" in push_space(MODEL, DEMO, dry_run=True).as_text()
    assert push_space(MODEL, DEMO, private=True).notes[0].endswith("it will not start")
    assert len(push_space(MODEL, DEMO).notes) == 1, "the Space that is there is private"
    hub.store.repo(MODEL).private = hub.store.repo("acme/tiny-lm").private = False
    assert push_space(MODEL, DEMO).notes == []


def test_another_space_is_not_pushed_over(
    hub: LoopbackHub, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    HfApi().create_repo(DEMO, repo_type="space", space_sdk="gradio")
    hub.store.repo(DEMO, "space").add_commit("main", "by hand", "ada", {"app.py": File(b"own")})
    for flags in ([], ["--dry-run"]):
        line = refusal(capsys, MODEL, "--repo", DEMO, *flags)
        assert "holds something else than a CCF-LLM Space (app.py)" in line
    assert names_in(DEMO) == {"app.py"}
    push_space(MODEL, DEMO, replace=True)
    assert f"the commit overwrites in {DEMO}: app.py\n" in capsys.readouterr().err
    assert names_in(DEMO) >= FILES
    push_space(MODEL, DEMO)


def test_a_public_space_is_not_taken_for_private(
    model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    push_space(MODEL, DEMO)
    assert f"{DEMO} is public" in refusal(capsys, MODEL, "--repo", DEMO, "--private")
    push_space(MODEL, "acme/other", private=True)
    assert HfApi().space_info("acme/other").private


def test_after_a_fault_the_same_again_completes_it(
    hub: LoopbackHub, model: str, capsys: pytest.CaptureFixture[str], naps: list[float]
) -> None:
    """The commit fails for good: the Space is there and empty, then whole."""
    hub.inject(Fault("error", path="/commit/", times=None))
    assert "run the same again to complete it" in refusal(capsys, MODEL, "--repo", DEMO)
    assert "app.py" not in names_in(DEMO)
    hub.inject(None)
    push_space(MODEL, DEMO)
    assert names_in(DEMO) >= FILES
