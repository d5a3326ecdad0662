"""What a scan finds, and what it lets pass."""

import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from ccf_llm_hf.hub.scan import scan_folder
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CODE_FILES, copy_code

TOKEN = "hf_" + "aB3" * 11


@pytest.fixture(autouse=True)
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "")


def found(folder: Path, name: str, text: str) -> list[str]:
    (folder / name).write_text(text, encoding="utf-8")
    return [str(finding) for finding in scan_folder(folder, [Path("/work/me")])]


@pytest.mark.parametrize(
    ("text", "what"),
    [
        (TOKEN, "a Hugging Face token"),
        ("github_pat_" + "a1" * 18, "a GitHub token"),
        ("sk-proj-" + "x" * 24, "an API key"),
        ("ghp_" + "a1" * 18, "GitHub Token"),
        ("glpat-" + "a1" * 10, "GitLab Token"),
        ("AKIAABCDEFGHIJKLMNOP", "AWS Access Key"),
        ("xoxb-" + "12345678901-" * 2 + "a1" * 12, "Slack Token"),
        ("sk_live_" + "a1" * 12, "Stripe Access Key"),
        ("-----BEGIN RSA PRIVATE KEY-----", "Private Key"),
        ("https://me:secret@example.org/x", "Basic Auth Credentials"),
        ("postgres://me:secret@example.org/x", "Basic Auth Credentials"),
        ("trained in /home/me/films", "an absolute path"),
        ('"/Users/me/films"', "an absolute path"),
        ("/work/me/films", "a path of this machine"),
        ("C:\\Users\\me\\films", "an absolute path of Windows"),
        ('"D:\\\\films\\\\data"', "an absolute path of Windows"),
        ("file:///x/y", "a file address"),
    ],
)
def test_secrets_and_paths_are_found_by_line(tmp_path: Path, text: str, what: str) -> None:
    (finding,) = found(tmp_path, "notes.txt", f"first\nsecond {text} end\n")
    assert finding.startswith(f"notes.txt, line 2: {what} (")
    assert TOKEN not in finding and "secret" not in finding


@pytest.mark.parametrize(
    "text",
    [
        "Face/Off (1997)",
        "https://example.org/home/page and //example.org/tmp/x",
        "runs/demo/data and ./home/x and ~/data/x and ../tmp/x",
        "10/90 AC/DC and/or /s",
        "Mission: Impossible (1996), 8:30/9:00",
        "hf_hub_download(repo_id) of ccf_llm_hf",
        "task-sk-x desk-" + "a" * 30,
    ],
)
def test_titles_addresses_and_relative_paths_pass(tmp_path: Path, text: str) -> None:
    assert found(tmp_path, "README.md", text) == []


def test_settings_may_hold_no_absolute_path_at_all(tmp_path: Path) -> None:
    assert found(tmp_path, "config.json", '{\n"a": "/odd/place/lm"\n}') == [
        "config.json, line 2: an absolute path of any kind (/odd/place/lm)"
    ]
    assert found(tmp_path, "config.json", '{"a": "/", "b": "org/name", "c": "\\n/x y/"}') == []
    assert found(tmp_path, "README.md", "data_dir: /odd/place\n")
    (tmp_path / "README.md").unlink()
    assert found(tmp_path, "user_ids.jsonl", '{"id": "/odd/place"}') == []


def test_ids_of_amazons_users_are_no_keys(tmp_path: Path) -> None:
    ids = ["AP2NZAALUQKF5", "AEYORAKIA2AVPMCPDV57CE337YU5"]
    for name in ("item_catalog.jsonl", "user_ids.jsonl"):
        assert found(tmp_path, name, "".join(f'{{"id": "{one}"}}\n' for one in ids)) == []
    assert found(tmp_path, "user_ids.jsonl", "ghp_" + "a1" * 18)


def test_no_secret_is_tried_online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(*_: object) -> None:
        raise AssertionError("a scan reached out")

    monkeypatch.setattr(socket.socket, "connect", connect)
    (finding,) = found(tmp_path, "notes.txt", "ghp_" + "a1" * 18)
    assert finding == "notes.txt, line 1: GitHub Token (not shown)"


def test_vocabularies_may_hold_fragments_of_paths(tmp_path: Path) -> None:
    assert found(tmp_path, "tokenizer.json", '"/home/user": 5, "/usr/bin": 6') == []
    assert found(tmp_path, "tokenizer.json", '"/work/me/films": 5')


def test_the_token_in_use_is_found_in_any_form(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "not-the-usual-form")
    (finding,) = found(tmp_path, "example.json", '"not-the-usual-form"')
    assert finding == "example.json, line 1: the Hugging Face token in use (not shown)"


def test_safetensors_headers_are_read(tmp_path: Path) -> None:
    file = tmp_path / "fusion.safetensors"
    save_file({"x": torch.zeros(2)}, file, {"from": "/home/me/films", "format": "pt"})
    (finding,) = scan_folder(tmp_path)
    assert str(finding) == "fusion.safetensors, the header: an absolute path (/home/me/films)"
    save_file({"x": torch.zeros(2)}, file, {"format": "pt"})
    assert scan_folder(tmp_path) == []


def test_the_code_that_is_shipped_passes(tmp_path: Path) -> None:
    copy_code(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(CODE_FILES)
    assert scan_folder(tmp_path, [Path.home(), Path.cwd()]) == []
