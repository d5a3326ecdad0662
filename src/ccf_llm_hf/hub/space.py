"""`ccf-llm push-space`: the Space's page over a published checkpoint, in one commit."""

import shutil
import sys
import tempfile
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelInfo, RepoCard
from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

import ccf_llm_hf.hub_cards
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.card_metadata import find_hub_backbone
from ccf_llm_hf.hub.checkpoint_files import FACTS_FILE
from ccf_llm_hf.hub.model_card import name_source_to_supply
from ccf_llm_hf.hub.repository import (
    ask_hub,
    explain,
    open_repo,
    read_remote_json,
    tell_overwritten,
    tell_reason,
)
from ccf_llm_hf.hub.staging import NEEDED, check_repo_id
from ccf_llm_hf.io import write_json
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CF_FILE, FULL_FILE, FUSION_FILE
from ccf_llm_hf.modeling.configuration_ccf_llm import CCFLLMConfig

SPACE = Path(ccf_llm_hf.hub_cards.__file__).with_name("space")


@dataclass
class SpacePush:
    """What was, or in a dry run would be, uploaded: sizes in bytes by file name.

    `notes` tell what whoever publishes it should know, and what a dry run could not ask.
    """

    repo: str
    checkpoint: str
    revision: str | None
    files: dict[str, int]
    url: str | None
    notes: list[str] = field(default_factory=list)

    def as_text(self) -> str:
        """The upload for a terminal."""
        lines = [f"{size:>9,}  {name}" for name, size in self.files.items()]
        pinned = f" at {self.revision}" if self.revision else ""
        done = f"uploaded to {self.url}" if self.url else f"would be uploaded to {self.repo}"
        return "\n".join([*lines, f"{done}, showing {self.checkpoint}{pinned}", *self.notes])


def push_space(
    checkpoint: str,
    repo: str,
    *,
    revision: str | None = None,
    private: bool | None = None,
    replace: bool = False,
    dry_run: bool = False,
) -> SpacePush:
    """Upload the Space that shows a published checkpoint.

    Args:
        checkpoint: Hub repository of the model.
        repo: Space to write to; made if it is not there.
        revision: branch, tag or commit of the checkpoint. The Space is pinned to the commit that
            it stands for now, since it will run the repository's code. Default: the newest.
        private: a new Space is private; one that is public is refused.
        replace: the Space may hold another app, whose files are kept or overwritten.
        dry_run: check model, token and Space, and send nothing. Where the Hub cannot be reached,
            the notes say that this was not checked.

    Raises:
        InputError: a local folder or a malformed name; no such checkpoint, or one that does not
            load from the Hub alone; the Space holds another app; the Hub refuses or cannot be
            reached.
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
    where: dict[str, Any] = {"kind": "space", "private": private, "replace": replace}
    head, notes = ask_hub(api, repo, dry_run=dry_run, **where)
    commit = revision
    if not notes:  # else the Hub cannot be asked
        try:
            model = find_model(api, checkpoint, revision)
            closed = check_loads_from_hub(api, checkpoint, model)
        except InputError:
            raise
        except Exception as error:  # of httpx and of the Hub: they share no class
            raise InputError(f"{repo} was not published: {tell_reason(error)}") from error
        commit = model.sha
        notes = tell_access(checkpoint, closed, private if head is None else head.private)
    with tempfile.TemporaryDirectory() as folder:
        files = write_space(Path(folder), checkpoint, commit)
        over = tell_overwritten(head, repo, files) if replace else []
        notes += over
        if dry_run:
            return SpacePush(repo, checkpoint, commit, files, None, notes)
        for line in over:
            print(line, file=sys.stderr)
        try:
            open_repo(api, repo, **where)
            api.upload_folder(  # one commit: the files are small texts, which all travel in it
                repo_id=repo,
                repo_type="space",
                folder_path=folder,
                commit_message=f"Show {checkpoint}",
            )
        except InputError:
            raise
        except Exception as error:  # as above
            raise InputError(explain(error, repo)) from error
        return SpacePush(repo, checkpoint, commit, files, f"{api.endpoint}/spaces/{repo}", notes)


def check_loads_from_hub(api: HfApi, checkpoint: str, model: ModelInfo) -> list[str]:
    """Refuse a published checkpoint that a machine with nothing but the Hub cannot load.

    Returns:
        The repositories, of checkpoint, backbone and sentence encoder, that not everybody reads.

    Raises:
        InputError: a file is missing, or the backbone or the sentence encoder is not on the Hub.
    """
    files = {sibling.rfilename for sibling in model.siblings or []}
    config = _read_config(api, checkpoint, model, files)
    slim = config.checkpoint_form == "slim"
    weights = {CF_FILE, FUSION_FILE} if slim else {FULL_FILE, f"{FULL_FILE}.index.json"}
    if not (weights <= files if slim else weights & files):
        raise InputError(
            f"{checkpoint} has no weights of its {config.checkpoint_form} form: publish it again "
            "with ccf-llm push"
        )
    facts = read_remote_json(api, model, "model", FACTS_FILE) if FACTS_FILE in files else {}
    mend = "publish it with ccf-llm push --full, which loads by itself"
    parts = {}
    if slim:
        parts["backbone"] = (config.backbone_name, config.backbone_revision, mend)
        if source := name_source_to_supply(config, facts.get("backbone_source") or ""):
            raise InputError(
                f"{checkpoint} is slim and does not load from the Hub alone, because its backbone "
                f"came from {source}: {mend}"
            )
    if name := config.sentence_encoder:
        mend = "publish the encoder, and name it so when you train"
        parts["sentence encoder"] = (name, config.sentence_encoder_revision, mend)
    read = {checkpoint: model}
    for what, (name, revision, mend) in parts.items():
        found = _find_part(api, name, revision)
        if found is None:
            raise InputError(
                f"{checkpoint} does not load from the Hub alone, because its {what} {name} is not "
                f"there for this login: {mend}"
            )
        read[name] = found
    return [name for name, found in read.items() if found.private or found.gated]


def _read_config(
    api: HfApi, checkpoint: str, model: ModelInfo, files: Collection[str]
) -> CCFLLMConfig:
    missing = [name for name in NEEDED if name not in files]
    settings = {} if missing else read_remote_json(api, model, "model", "config.json")
    try:
        if settings.get("model_type") == CCFLLMConfig.model_type:
            return CCFLLMConfig.from_dict(settings)
    except (OSError, ValueError, TypeError):
        pass
    lacks = f"has no {missing[0]}" if missing else "has no config.json of a CCF-LLM checkpoint"
    raise InputError(
        f"{checkpoint} {lacks}, so a Space cannot show it: name what ccf-llm push published"
    )


def _find_part(api: HfApi, name: str, revision: str | None) -> ModelInfo | None:
    """What a checkpoint fetches besides itself; None where the Hub has it not for this login."""
    hub_name = find_hub_backbone(name)
    try:
        return api.model_info(hub_name, revision=revision) if hub_name else None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return None


def tell_access(checkpoint: str, closed: list[str], private: bool | None) -> list[str]:
    """What it means that a Space shows what not everybody reads."""
    if not closed:
        return []
    names = " and ".join(closed)
    notes = [
        f"note: not everybody may read {names}: give the Space a secret HF_TOKEN that may, or it "
        "will not start"
    ]
    if not private:
        notes.append(
            f"note: the Space is public: whoever visits it uses {names} and sees the titles of "
            "the catalog; a new Space made with --private shows them to you and your organization"
        )
    return notes


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


def find_model(api: HfApi, checkpoint: str, revision: str | None) -> ModelInfo:
    """A published checkpoint at the commit that `revision` stands for now."""
    try:
        return api.model_info(checkpoint, revision=revision)
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is no model {checkpoint} on the Hub that this login can read: "
            "publish it first with ccf-llm push"
        ) from error
    except RevisionNotFoundError as error:
        raise InputError(
            f"model {checkpoint} has no revision {revision}: name a branch, tag or commit of it"
        ) from error
