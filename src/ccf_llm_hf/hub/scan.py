"""A last look at what is about to be published: no tokens and no paths of this machine in it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import get_token

from ccf_llm_hf.hub.checkpoint_files import (
    CARD_FILE,
    FACTS_FILE,
    SETTINGS_FILES,
    VOCABULARY_FILES,
)

SECRETS = {
    "a Hugging Face token": r"\b(?:hf|api_org|hf_oauth|hf_jwt)_[A-Za-z0-9]{20,}",
    "a GitHub token": r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,})",
    "an AWS key": r"\bAKIA[0-9A-Z]{16}\b",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
    "a private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
    "a password in an address": r"\bhttps?://[^\s/:@\"]+:[^\s/@\"]+@",
}
ROOTS = "home|root|Users|Volumes|private|mnt|media|tmp|var|opt|srv|data|scratch|workspace|content"
PATHS = {
    "an absolute path": rf"(?<![\w.~:/-])/(?:{ROOTS})/[\w.-][\w./-]*",
    "an absolute path of Windows": r"\b[A-Za-z]:(?:\\{1,2}|/)[\w .-]+[\\/][\w .\\/-]*",
    "a file address": r"\bfile://[^\s\"]+",
}
# A value that is a path whatever its first folder is called; settings hold no other such text.
SETTINGS_PATH = {"an absolute path of any kind": r"(?:\"|:[ \t]+)/[^\"\s/]+/[^\"\s]*"}
OWN_PATH, OWN_TOKEN = "a path of this machine", "the Hugging Face token in use"


@dataclass(frozen=True, order=True)
class Finding:
    """Something that must not be published, in a line of a file (0: the safetensors header)."""

    file: str
    line: int
    what: str
    text: str

    def __str__(self) -> str:
        place = f"line {self.line}" if self.line else "the header"
        return f"{self.file}, {place}: {self.what} ({self.text})"


def scan_folder(folder: Path, private_paths: Sequence[Path] = ()) -> list[Finding]:
    """Look for secrets and absolute paths in every text and every safetensors header of a folder.

    In vocabularies, whose entries are fragments of any text, only `private_paths` count as paths.

    Args:
        folder: what is about to be published.
        private_paths: folders of this machine that must not be named, such as the home.

    Returns:
        One finding a line at most, in order.
    """
    everywhere = dict(SECRETS)
    if token := get_token():
        everywhere[OWN_TOKEN] = re.escape(token)
    if own := [re.escape(str(path)) for path in private_paths if len(path.parts) > 1]:
        everywhere[OWN_PATH] = rf"(?<![\w.~:/-])(?:{'|'.join(own)})/[\w.-][\w./-]*"
    findings: dict[tuple[str, int], Finding] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        rules = everywhere | ({} if name in VOCABULARY_FILES else PATHS)
        if name in (*SETTINGS_FILES, CARD_FILE, FACTS_FILE):
            rules |= SETTINGS_PATH
        for finding in _search(path, name, rules):
            findings.setdefault((name, finding.line), finding)
    return sorted(findings.values())


def _search(path: Path, name: str, rules: dict[str, str]) -> list[Finding]:
    weights = path.suffix == ".safetensors"
    text = read_safetensors_header(path) if weights else path.read_text("utf-8", errors="replace")
    return [
        Finding(
            name,
            0 if weights else text.count("\n", 0, match.start()) + 1,
            what,
            # A secret is not printed either.
            match[0].strip('": ') if what in (*PATHS, *SETTINGS_PATH, OWN_PATH) else "not shown",
        )
        for what, pattern in rules.items()
        for match in re.finditer(pattern, text)
    ]


def read_safetensors_header(path: Path) -> str:
    """The JSON at the start of a safetensors file: names, shapes and metadata."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    return json.dumps(json.loads(header), ensure_ascii=False)
