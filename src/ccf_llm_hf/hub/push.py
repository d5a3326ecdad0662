"""Publish a checkpoint: one commit, whole or not at all, that may be tried again."""

import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
)

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.checkpoint_files import CARD_FILE, FACTS_FILE, is_weights
from ccf_llm_hf.hub.example import record_example
from ccf_llm_hf.hub.repository import ask_hub, explain, open_repo, tell_overwritten
from ccf_llm_hf.hub.staging import Staged, check_repo_id, list_files, stage_checkpoint, stage_part
from ccf_llm_hf.inference.ranker import CTRRanker
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.pipeline_ccf_llm import CTRRankingPipeline
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor

Publishable: TypeAlias = CCFLLMForCTR | CCFLLMProcessor | CTRRanker | CTRRankingPipeline


@dataclass
class Published:
    """Where a checkpoint is now. `unchanged`: it was there already, and no commit was made.

    In a dry run there is no commit. `files` has the sizes in bytes by name, `deleted` the weights
    that the commit takes away from the repository, or would.
    """

    repo: str
    files: dict[str, int]
    stays_here: list[str]
    notes: list[str]
    deleted: list[str] = field(default_factory=list)
    url: str | None = None
    commit: str | None = None
    private: bool | None = None
    unchanged: bool = False
    load: list[str] = field(default_factory=list)

    def as_text(self) -> str:
        """For a terminal: the commit, and how to load it; of a dry run, what it would send."""
        if self.commit is None:
            lines = [list_files(self.files, self.stays_here, self.notes)]
            lines += [tell_deletions(self.repo, self.deleted)] if self.deleted else []
            return "\n".join([*lines, "nothing was sent"])
        what = "holds it already" if self.unchanged else "published"
        seen = "private" if self.private else "public"
        lines = [f"{what}: {self.url} ({seen})", "load this revision:"]
        return "\n".join([*lines, *(f"  {line}" for line in self.load)])


def push(
    thing: str | Path | Publishable,
    repo_id: str,
    *,
    form: str | None = None,
    backbone: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    commit_message: str = "",
    replace: bool = False,
    dry_run: bool = False,
) -> Published:
    """Check a checkpoint, say on stderr what would be sent, and send it in one commit.

    A folder, a ranker and a pipeline hold both model and processor: they are loaded and scored in a
    process of their own. A model or a processor alone is scanned, and leaves the other's files in
    the repository as they are.

    Args:
        thing: checkpoint folder, or what to save as one.
        repo_id: `org/name`.
        form: `slim` or `full`; default the checkpoint's own.
        backbone: for the check of a slim checkpoint, what to attach instead of the recorded one.
        private, revision, token, replace: see [`publish`].
        commit_message: the commit's title.
        dry_run: check everything, the token's rights too, and send nothing.

    Raises:
        InputError: see [`publish`]; or something is damaged, or must not be published.
    """
    check_repo_id(repo_id)
    check_branch(revision)
    api = HfApi(token=token, library_name="ccf-llm-hf")
    where: Any = {"private": private, "revision": revision, "replace": replace}
    head, unasked = ask_hub(api, repo_id, dry_run=dry_run, **where)
    print(f"checking what is to be sent to {repo_id}", file=sys.stderr)
    with _stage(thing, repo_id, form, backbone) as staged:
        staged.notes += unasked
        if replace:
            staged.notes += tell_overwritten(head, repo_id, _sent(staged, head))
        if dry_run:
            deleted = list_deletions(staged, head)
            return Published(repo_id, staged.files, staged.left, staged.notes, deleted)
        print(list_files(staged.files, staged.left, staged.notes), file=sys.stderr)
        kind = "checkpoint" if isinstance(thing, str | Path) else type(thing).__name__
        message = commit_message or f"Upload {kind}"
        return publish(staged, repo_id, token=token, message=message, **where)


@contextmanager
def _stage(
    thing: str | Path | Publishable, repo_id: str, form: str | None, backbone: str | None
) -> Iterator[Staged]:
    """What is pushed as files that are checked; an object is saved first."""
    if isinstance(thing, str | Path):
        with stage_checkpoint(thing, repo_id, form=form, backbone=backbone) as staged:
            yield staged
        return
    whole = isinstance(thing, CTRRanker | CTRRankingPipeline)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "saved"
        for part in (thing.model, thing.processor) if whole else (thing,):
            options = {"form": form} if isinstance(part, CCFLLMForCTR) else {}
            try:
                part.save_pretrained(folder, **options)
            except ValueError as error:
                raise InputError(f"it cannot be saved: {error}") from error
        if whole:
            record_example(folder, thing.model, thing.processor)
            staging = stage_checkpoint(folder, repo_id, backbone=backbone)
        else:
            staging = stage_part(folder, repo_id)
        with staging as staged:
            yield staged


def publish(
    staged: Staged,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    message: str = "Upload checkpoint",
    replace: bool = False,
) -> Published:
    """Send staged files in one commit; make the repository and the branch if they are not there.

    Weights that the repository holds under names of the other form are listed on stderr and deleted
    by the same commit, other files stay. When a request fails, the repository holds the whole
    commit or nothing of it, though it may have been made, and be empty; the same call again
    completes it.

    Args:
        staged: what to send.
        repo_id: `org/name`.
        private: a new repository is private; one that is public is refused.
        revision: branch; default main.
        token: default the one of `hf auth login` or HF_TOKEN.
        message: the commit's title.
        replace: the repository may hold another model, whose weights are deleted or overwritten.

    Raises:
        InputError: the repository holds something else than a CCF-LLM checkpoint; the Hub refuses,
            cannot be reached, or breaks off.
    """
    check_branch(revision)
    api = HfApi(token=token, library_name="ccf-llm-hf")
    try:
        head = open_repo(
            api, check_repo_id(repo_id), private=private, revision=revision, replace=replace
        )
        deleted = list_deletions(staged, head)
        if deleted:
            print(tell_deletions(repo_id, deleted), file=sys.stderr)
        # Not upload_folder: over Xet that one may split a folder into several commits.
        commit: CommitInfo = api.create_commit(
            repo_id,
            _list_operations(staged, head, deleted),
            commit_message=message,
            revision=revision,
            parent_commit=head.sha,
        )
    except InputError:
        raise
    except Exception as error:  # of httpx, of upload threads and of the Hub: they share no class
        raise InputError(explain(error, repo_id)) from error
    return Published(
        repo_id,
        staged.files,
        staged.left,
        staged.notes,
        deleted,
        url=f"{api.endpoint}/{repo_id}/tree/{commit.oid}",
        commit=commit.oid,
        private=bool(head.private),
        unchanged=commit.oid == head.sha,
        load=write_load_lines(staged, repo_id, commit.oid),
    )


def check_branch(revision: str | None) -> None:
    """Raise an InputError when the branch to push to is a commit's name."""
    if revision and re.fullmatch(r"[0-9a-f]{40}", revision):
        raise InputError(f"revision {revision} is a commit: name a branch to push to")


def write_load_lines(staged: Staged, repo_id: str, commit: str) -> list[str]:
    """Python that loads what was published, pinned to its commit."""
    place = f'"{repo_id}", revision="{commit}"'
    supply = f', backbone="{staged.backbone}"' if staged.backbone else ""
    names = {"config.json": ("AutoModel", supply), "processor_config.json": ("AutoProcessor", "")}
    return [
        f"{auto}.from_pretrained({place}{more}, trust_remote_code=True)"
        for name, (auto, more) in names.items()
        if name in staged.files
    ]


def list_deletions(staged: Staged, head: Any) -> list[str]:
    """Weights that the branch holds (`head`; None: it is not there) and the upload does not."""
    if head is None or not any(map(is_weights, staged.files)):  # a processor alone replaces none
        return []
    present = {sibling.rfilename for sibling in head.siblings or []}
    return sorted(name for name in present - staged.files.keys() if is_weights(name))


def tell_deletions(repo_id: str, deleted: list[str]) -> str:
    """For a terminal."""
    return f"the commit deletes from {repo_id}: {', '.join(deleted)}"


def _list_operations(
    staged: Staged, head: Any, deleted: list[str]
) -> list[CommitOperationAdd | CommitOperationDelete]:
    """The files to delete and to add."""
    return [
        *(CommitOperationDelete(name) for name in deleted),
        *(CommitOperationAdd(name, staged.folder / name) for name in _sent(staged, head)),
    ]


def _sent(staged: Staged, head: Any) -> list[str]:
    """The files to add: a card for want of one replaces none in the repository."""
    present = {sibling.rfilename for sibling in (head.siblings if head else None) or []}
    kept = {CARD_FILE, FACTS_FILE} if staged.generic_card and CARD_FILE in present else set()
    return sorted(staged.files.keys() - kept)
