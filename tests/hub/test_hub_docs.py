"""docs/hub.md and docs/publishing.md run as they stand there, against a loopback Hub."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from docs.pages import blocks, commands
from hub.loopback import LoopbackHub
from hub.pushing import Save
from huggingface_hub import HfApi
from raw_data import small_raw, write_raw
from tiny import BuildModel

from ccf_llm_hf.cli import main as cli
from ccf_llm_hf.data import PrepareConfig, prepare
from ccf_llm_hf.hub.push_dataset import push_dataset
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CODE_FILES

DOCUMENT = Path(__file__).parents[2] / "docs" / "hub.md"
RUN = """
import sys
sys.modules["ccf_llm_hf"] = None  # importing it fails
session = {}
for block in sys.argv[1:]:
    exec(compile(block, "docs/hub.md", "exec"), session)
assert type(session["model"]).__module__.startswith("transformers_modules.acme.films")
assert session["rows"].column_names[0] == "user_id"
assert session["items"].column_names[:2] == ["item_id", "title"]
print("FILES", *sorted(file.name for file in session["code"].glob("*.py")))
"""


def test_the_python_of_the_document_runs_in_order(
    build: BuildModel,
    backbone_folder: Callable[..., Path],
    tmp_path: Path,
    hub: LoopbackHub,
) -> None:
    model, processor = build(lora=True)
    model.config.backbone_name = "acme/tiny-lm"
    model.save_pretrained(tmp_path / "slim", form="slim")
    processor.save_pretrained(tmp_path / "slim")
    api = HfApi(endpoint=hub.url, token="hf_ada")
    for name, folder in (("films", tmp_path / "slim"), ("tiny-lm", backbone_folder())):
        api.create_repo(f"acme/{name}", private=True)
        api.upload_folder(repo_id=f"acme/{name}", folder_path=folder)
    config = {"out": str(tmp_path / "data"), **write_raw(small_raw(), "csv", tmp_path / "raw")}
    push_dataset(prepare(PrepareConfig(**config), summary=False), "acme/shop-ctr", private=True)

    blocks = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 5
    hub.inject(None)
    run = subprocess.run(
        [sys.executable, "-c", RUN, *blocks],
        cwd=tmp_path,
        env=os.environ | hub.environment(tmp_path / "home", token="hf_bob"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    assert re.fullmatch(r"\d{4} lines to read", lines[0])
    assert lines[-1].split()[1:] == sorted(CODE_FILES)


def test_the_commands_of_the_document_exist() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    commands = re.findall(r"^    ccf-llm (.+?)(?:  +#.*)?$", text, re.MULTILINE)
    assert len(commands) == 3
    for command in commands:
        _, arguments, rest = cli.parse(command.split())
        assert not rest and arguments.repo.startswith("acme/")


def test_to_the_hub_and_back(
    save: Save,
    hub: LoopbackHub,
    environment: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.move(save("full"), tmp_path / "runs" / "demo" / "checkpoint")
    monkeypatch.chdir(tmp_path)
    for words in commands("docs/publishing.md"):
        assert cli.main(words[1:]) == 0
    assert 'AutoModel.from_pretrained("acme/films", revision="' in capsys.readouterr().out
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(blocks("docs/publishing.md", "python"))],
        env=os.environ | hub.environment(tmp_path / "home", token="hf_ada"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert "torch.Size([1, 3])" in run.stdout
