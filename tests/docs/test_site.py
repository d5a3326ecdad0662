"""The site builds without a warning, and names what there is."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from docs.pages import ROOT, commands

from ccf_llm_hf.cli import main as cli


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert built.returncode == 0, built.stderr[-3000:]
    return folder


def test_every_page_is_in_the_navigation(site: Path) -> None:
    navigation = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    assert set(re.findall(r"[\w-]+\.md", str(navigation))) == {
        page.name for page in (ROOT / "docs").glob("*.md")
    }


def test_reference_pages_have_the_docstrings_and_every_help(site: Path) -> None:
    reference = (site / "api" / "index.html").read_text()
    for name in ("CTRRanker.rank", "CCFLLMForCTR.forward", "CFVectors.from_tables", "CTRTrainer"):
        assert f"{name}" in reference
    helped = (site / "cli" / "index.html").read_text()
    for name in cli.COMMANDS:
        assert f"usage: ccf-llm {name}" in helped


def test_nothing_is_fetched_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert not re.findall(r"<(?:script|img|link)[^>]+(?:src|href)=\"?https?://", text), page


def test_the_commands_of_the_reference_parse() -> None:
    named = set()
    for words in commands("docs/cli.md"):
        cli.parse(words[1:])
        named.add(words[1])
    assert named == set(cli.COMMANDS)
