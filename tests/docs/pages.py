"""The pages' code blocks, and how they are run."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from ccf_llm_hf.cli import main as cli

ROOT = Path(__file__).parents[2]


def blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of a page, in order, but those that a comment marks: they need what is
    not installed here, or have a test of their own."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"(?<!-->\n)^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[list[str]]:
    """The lines of a page's `bash` blocks, as argument lists, without comments."""
    return split_commands("\n".join(blocks(page, "bash")))


def split_commands(block: str) -> list[list[str]]:
    """The lines of a `bash` block, as argument lists, without comments."""
    return [words for line in block.splitlines() if (words := shlex.split(line, comments=True))]


def run_command(words: list[str]) -> None:
    """Run `ccf-llm ...` here, and `python ...` in a process; `make ...` is only looked up."""
    if words[0] == "ccf-llm":
        assert cli.main(words[1:]) == 0, words
        return
    folder = None
    if words[0] == "make":
        words, folder = ["make", "--dry-run", *words[1:]], ROOT
    words = [sys.executable, *words[1:]] if words[0] == "python" else words
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def run_python(code: list[str], folder: Path) -> str:
    """What blocks of one session print."""
    run = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        cwd=folder,
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout
