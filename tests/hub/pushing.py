"""What the tests of pushing share: a repository's name, and what is in one."""

from collections.abc import Callable
from pathlib import Path

from hub.loopback import LoopbackHub

REPO = "acme/films"
Save = Callable[..., Path]


def contents(hub: LoopbackHub, repo: str = REPO, branch: str = "main") -> dict[str, bytes]:
    found = hub.store.repo(repo)
    return {name: file.data for name, file in found.commit_at(branch).files.items()}
