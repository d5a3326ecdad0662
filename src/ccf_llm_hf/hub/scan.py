"""A last look at what is about to be published: no tokens and no paths of this machine in it."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub import get_token

from ccf_llm_hf.hub.checkpoint_files import (
    CARD_FILE,
    FACTS_FILE,
    SETTINGS_FILES,
    VOCABULARY_FILES,
)
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CATALOG_FILE, FIELDS_FILE, USERS_FILE

# Which detect-secrets, whose list is kept up, does not know.
SECRETS = {
    "a Hugging Face token": r"\b(?:hf|api_org|hf_oauth|hf_jwt)_[A-Za-z0-9]{20,}",
    "a GitHub token": r"\bgithub_pat_\w{30,}",
    "an API key": r"\bsk-[A-Za-z0-9_-]{20,}",
}
DATA_FILES = (CATALOG_FILE, FIELDS_FILE, USERS_FILE)
ID_LIKE = ("AWS Access Key", "Artifactory Credentials")  # Amazon's user ids are of these forms
ROOTS = "home|root|Users|Volumes|private|mnt|media|tmp|var|opt|srv|data|scratch|workspace|content"
PATHS = {
    "an absolute path": rf"(?<![\w.~:/-])/(?:{ROOTS})/[\w.-][\w./-]*",
    "an absolute path of Windows": r"\b[A-Za-z]:(?:\\{1,2}|/)[\w .-]+[\\/][\w .\\/-]*",
    "a file address": r"\bfile://[^\s\"]+",
}
# A value that is a path whatever its first folder is called; settings hold no other such text.
SETTINGS_PATH = {"an absolute path of any kind": r"(?:\"|:[ \t]+)/[^\"\s/]+/[^\"\s]*"}
Rule: TypeAlias = tuple[str, str | re.Pattern[str]]  # what it finds, and how
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

    In vocabularies, whose entries are fragments of any text, only `private_paths` count as paths,
    and only tokens as secrets.

    Args:
        folder: what is about to be published.
        private_paths: folders of this machine that must not be named, such as the home.

    Returns:
        One finding a line at most, in order.
    """
    everywhere: list[Rule] = [*SECRETS.items()]
    if token := get_token():
        everywhere.append((OWN_TOKEN, re.escape(token)))
    if own := [re.escape(str(path)) for path in private_paths if len(path.parts) > 1]:
        everywhere.append((OWN_PATH, rf"(?<![\w.~:/-])(?:{'|'.join(own)})/[\w.-][\w./-]*"))
    kept = list_detectors()
    findings: dict[tuple[str, int], Finding] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        rules = [*everywhere]
        if name not in VOCABULARY_FILES:
            too_wide = ID_LIKE if name in DATA_FILES else ()
            rules += [*PATHS.items(), *(rule for rule in kept if rule[0] not in too_wide)]
        if name in (*SETTINGS_FILES, CARD_FILE, FACTS_FILE):
            rules += SETTINGS_PATH.items()
        for finding in _search(path, name, rules):
            findings.setdefault((name, finding.line), finding)
    return sorted(findings.values())


def list_detectors() -> list[Rule]:
    """Forms of secrets that detect-secrets knows, by name; it is not asked to try them online.

    Not its guesses, such as from the names of variables or the entropy of strings, which would
    refuse titles and hashes.
    """
    from detect_secrets.core.plugins.util import get_mapping_from_secret_type_to_class
    from detect_secrets.plugins.base import RegexBasedDetector
    from detect_secrets.plugins.ip_public import IPPublicDetector

    known: dict[str, Any] = get_mapping_from_secret_type_to_class()
    return [
        (what, re.compile(form.pattern, form.flags | re.MULTILINE))
        for what, plugin in known.items()
        if issubclass(plugin, RegexBasedDetector) and plugin is not IPPublicDetector
        for form in plugin().denylist
    ]


def _search(path: Path, name: str, rules: Sequence[Rule]) -> list[Finding]:
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
        for what, pattern in rules
        for match in re.finditer(pattern, text)
    ]


def read_safetensors_header(path: Path) -> str:
    """The JSON at the start of a safetensors file: names, shapes and metadata."""
    with path.open("rb") as file:
        header = file.read(int.from_bytes(file.read(8), "little"))
    return json.dumps(json.loads(header), ensure_ascii=False)
