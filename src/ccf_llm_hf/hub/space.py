"""`ccf-llm push-space`: the Space's page over a published checkpoint, in one commit."""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, RepoCard
from huggingface_hub.errors import (
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

import ccf_llm_hf.hub_cards
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.push import explain
from ccf_llm_hf.hub.staging import check_repo_id
from ccf_llm_hf.io import write_json

SPACE = Path(ccf_llm_hf.hub_cards.__file__).with_name("space")


@dataclass
class SpacePush:
    """What was, or in a dry run would be, uploaded: sizes in bytes by file name.

    `unchecked` says why a dry run could not look whether the model is there; None if it did.
    """

    repo: str
    checkpoint: str
    revision: str | None
    files: dict[str, int]
    url: str | None
    unchecked: str | None = None

    def as_text(self) -> str:
        """The upload for a terminal."""
        lines = [f"{size:>9,}  {name}" for name, size in self.files.items()]
        pinned = f" at {self.revision}" if self.revision else ""
        done = f"uploaded to {self.url}" if self.url else f"would be uploaded to {self.repo}"
        lines.append(f"{done}, showing {self.checkpoint}{pinned}")
        if self.unchecked:
            lines.append(f"note: it was not checked that this model is there: {self.unchecked}")
        return "\n".join(lines)


def push_space(
    checkpoint: str,
    repo: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    dry_run: bool = False,
) -> SpacePush:
    """Upload the Space that shows a published checkpoint.

    Args:
        checkpoint: Hub repository of the model.
        repo: Space to write to; made if it is not there.
        revision: branch, tag or commit of the checkpoint. The Space is pinned to the commit that
            it stands for now, since it will run the repository's code. Default: the newest.
        private: a new Space is private; one that is public is refused.
        dry_run: only list the files, and look whether the model is there; nothing is sent. Where
            the Hub cannot be reached, the result says that this was not checked.

    Raises:
        InputError: a local folder or a malformed name, no such checkpoint, or the Hub refuses or
            cannot be reached.
    """
    check_repo_id(repo)
    if Path(checkpoint).is_dir():
        raise InputError(
            f"{checkpoint} is a folder on this machine, and a Space loads a published model: "
            f"publish it first with ccf-llm push {checkpoint} --repo org/name, then name that "
            "repository here"
        )
    check_repo_id(checkpoint)
    api = HfApi(library_name="ccf-llm-hf")
    with tempfile.TemporaryDirectory() as folder:
        if dry_run:
            commit, unchecked = _try_commit(api, checkpoint, revision)
            files = write_space(Path(folder), checkpoint, commit)
            return SpacePush(repo, checkpoint, commit, files, None, unchecked)
        try:
            commit = _find_commit(api, checkpoint, revision)
            files = write_space(Path(folder), checkpoint, commit)
            _upload(api, Path(folder), repo, private, f"Show {checkpoint}")
        except InputError:
            raise
        except Exception as error:  # of httpx and of the Hub: they share no class
            raise InputError(explain(error, repo)) from error
        return SpacePush(repo, checkpoint, commit, files, f"{api.endpoint}/spaces/{repo}")


def _try_commit(api: HfApi, checkpoint: str, revision: str | None) -> tuple[str | None, str | None]:
    """The commit to show; or the revision as given, and why the Hub could not tell."""
    try:
        return _find_commit(api, checkpoint, revision), None
    except InputError:
        raise
    except OfflineModeIsEnabled:
        return revision, "HF_HUB_OFFLINE is set"
    except HfHubHTTPError as error:
        return revision, f"the Hub answered with error {error.response.status_code}"
    except Exception as error:  # of httpx: the Hub's libraries share no class for it
        return revision, f"the Hub cannot be reached ({' '.join(str(error).split())})"


def _upload(api: HfApi, folder: Path, repo: str, private: bool | None, message: str) -> None:
    """One commit: the files are small texts, which all travel in it."""
    api.create_repo(repo, repo_type="space", space_sdk="gradio", private=private, exist_ok=True)
    if private and not api.space_info(repo).private:
        raise InputError(
            f"Space {repo} is public, and pushing to it does not make it private: change that in "
            "its settings, or choose another name"
        )
    api.upload_folder(repo_id=repo, repo_type="space", folder_path=folder, commit_message=message)


def write_space(folder: Path, checkpoint: str, revision: str | None) -> dict[str, int]:
    """Write the Space's files; sizes in bytes by name."""
    shutil.copytree(
        SPACE, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__", "*.pyc")
    )
    settings = {"checkpoint": checkpoint, "revision": revision}
    write_json(folder / "checkpoint.json", settings)
    card = RepoCard.load(folder / "README.md", repo_type="space")
    card.data.models = [checkpoint]
    card.save(folder / "README.md")
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _find_commit(api: HfApi, checkpoint: str, revision: str | None) -> str:
    """The commit that a revision of the checkpoint stands for now."""
    try:
        commit = api.model_info(checkpoint, revision=revision).sha
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no model {checkpoint} on the Hub that this login can read: "
            "publish it first with ccf-llm push"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"model {checkpoint} has no revision {revision}: name a branch, tag or commit of it"
        ) from error
    assert commit is not None  # the Hub's answer about a whole repository always has it
    return commit
