"""A checked copy of a checkpoint, as it will stand in its repository."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ccf_llm_hf.data.assets import asset_source, cached_backbone
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.card_metadata import hub_backbone
from ccf_llm_hf.hub.checkpoint_files import (
    CARD_FILE,
    copy_published,
    cut_local_names,
    is_weights,
)
from ccf_llm_hf.hub.example import (
    TOLERANCE,
    card_call,
    check_in_clean_process,
    read_calls,
    record_example,
)
from ccf_llm_hf.hub.merge import FORM_ROW, merge_checkpoint
from ccf_llm_hf.hub.model_card import address_card, write_model_card
from ccf_llm_hf.hub.scan import scan_folder
from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CATALOG_FILE, USERS_FILE
from ccf_llm_hf.modeling.configuration_ccf_llm import CCFLLMConfig

# What of a card depends on the form.
FORM_PARTS = (
    FORM_ROW,
    re.compile(r"^base_model_relation: .*$", re.MULTILINE),
    re.compile(r"^## Use\n.*?(?=^## )", re.MULTILINE | re.DOTALL),
)
NEEDED = ("config.json", "processor_config.json", "modeling_ccf_llm.py", CATALOG_FILE, USERS_FILE)


@dataclass
class Staged:
    """Files that are ready to be sent, and what is to be said about them.

    Args:
        folder: where they are, under the names they will have.
        left: files of the checkpoint that stay behind.
        notes: what whoever publishes it should know.
        generic_card: the card was written for want of one, and replaces none in the repository.
        needs_backbone: who loads it must supply the backbone.
    """

    folder: Path
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    generic_card: bool = False
    needs_backbone: bool = False

    @property
    def files(self) -> dict[str, int]:
        """Sizes in bytes by name."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}

    def as_text(self) -> str:
        """The files with their sizes, and the notes, for a terminal."""
        width = max(map(len, self.files))
        lines = [f"  {name:<{width}}  {_size(size):>9}" for name, size in self.files.items()]
        lines.append(
            f"  {f'{len(self.files)} files':<{width}}  {_size(sum(self.files.values())):>9}"
        )
        lines += [f"stays here: {', '.join(self.left)}"] if self.left else []
        return "\n".join([*lines, *self.notes])

    def as_dict(self) -> dict[str, Any]:
        """The same, for machines."""
        return {"files": self.files, "stays_here": self.left, "notes": self.notes}


def check_repo_id(repo_id: str) -> str:
    """The id itself.

    Raises:
        InputError: it is not of the form org/name.
    """
    try:
        validate_repo_id(repo_id)
        valid = repo_id.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise InputError(f"repository {repo_id!r} is not of the form org/name: write acme/films")
    return repo_id


@contextmanager
def staged_checkpoint(
    checkpoint: str | Path, repo_id: str, *, form: str | None = None, backbone: str | None = None
) -> Iterator[Staged]:
    """Copy a checkpoint's published files, bring them into `form`, and check them.

    The copy lies beside the checkpoint, where large files can be linked, until the context ends.
    It is scanned for secrets and absolute paths, loaded in a process without this package, and its
    recorded example is scored there.

    Args:
        checkpoint: folder of a full or slim checkpoint.
        repo_id: the repository that its card will name.
        form: `slim` or `full`; default the folder's own.
        backbone: folder or name to attach instead of the recorded one, here and for the check.

    Raises:
        InputError: naming what is missing, damaged, or must not be published.
    """
    folder, config = Path(checkpoint), _read_config(Path(checkpoint))
    name = check_repo_id(repo_id).split("/")[1]
    attach = _local_backbone(config, backbone)
    above = folder.resolve().parent
    with tempfile.TemporaryDirectory(
        prefix=".push-", dir=above if os.access(above, os.W_OK) else None
    ) as work:
        copy = Path(work) / "copy" / name
        copy.mkdir(parents=True)
        left = copy_published(folder, copy)
        source = asset_source(attach) if attach else None
        generic_card = _ensure_card(copy, config, source)
        _complete_example(copy, attach)
        if form and form != config.checkpoint_form:
            copy = _converted(copy, Path(work) / "converted" / name, form, attach)
            config = CCFLLMConfig.from_pretrained(copy)
            attach = _local_backbone(config, backbone)  # a slim one needs one, a full one does not
            source = asset_source(attach) if attach else None
            _mend_card(copy, config, source)
        slim = config.checkpoint_form == "slim"
        staged = Staged(copy, left, generic_card=generic_card)
        _finish(staged, repo_id, [above, Path.home()])
        local = attach is not None and Path(attach).is_dir()
        difference = check_in_clean_process(copy, attach, offline=local or not slim)
        staged.notes.append(
            f"check: loads in a process without this package; the example's logits differ by at "
            f"most {difference:.1e} from the recorded ones (limit {TOLERANCE:.0e})"
        )
        if slim and (note := backbone_note(config.backbone_name, source)):
            staged.notes.append(note)
            staged.needs_backbone = True
        yield staged


@contextmanager
def staged_part(saved: Path, repo_id: str) -> Iterator[Staged]:
    """As `staged_checkpoint`, for a folder that holds a model or a processor alone: there is
    nothing to score, so it is scanned only."""
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / check_repo_id(repo_id).split("/")[1]
        copy.mkdir()
        staged = Staged(copy, copy_published(saved, copy))
        if (copy / "config.json").is_file():
            config = CCFLLMConfig.from_pretrained(copy)
            source = asset_source(cached_backbone(config.backbone_name))
            staged.generic_card = _ensure_card(copy, config, source)
        _finish(staged, repo_id, [Path.home()])
        yield staged


def backbone_note(name: str, source: str | None) -> str:
    """What to say when nobody else can fetch a slim checkpoint's backbone by its name; empty when
    the Hub has it.

    Args:
        name: as the config records it.
        source: where the copy that is used here was obtained, if that was recorded.
    """
    if hub_backbone(name) is None:
        reason = "is known by that name on this machine only"
    elif source and not source.endswith(name):
        reason = f"is here a copy from {source}, whose weights are not those of the Hub"
    else:
        return ""
    return (
        f"note: the backbone {Path(name).name if Path(name).is_absolute() else name} {reason}. "
        "Whoever loads this slim checkpoint must have the same copy and give it as "
        "backbone=FOLDER; a checkpoint pushed with --full loads by itself"
    )


def _read_config(folder: Path) -> CCFLLMConfig:
    if not folder.is_dir():
        raise InputError(f"checkpoint {folder} is not a folder: make one with ccf-llm train")
    for name in NEEDED:
        if not (folder / name).is_file():
            raise InputError(
                f"checkpoint {folder} has no {name}: save model and processor into one folder"
            )
    try:
        return CCFLLMConfig.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'} cannot be read: {error}") from error


def _local_backbone(config: CCFLLMConfig, backbone: str | None) -> str | None:
    """What to attach to a slim checkpoint: as given, or a copy on this machine, or None."""
    if config.checkpoint_form == "full":
        return None
    name = backbone or cached_backbone(config.backbone_name)
    return str(Path(name).resolve()) if Path(name).is_dir() else backbone


def _ensure_card(folder: Path, config: CCFLLMConfig, source: str | None) -> bool:
    """Write a card if there is none, and check that its header can be read; whether it was."""
    card = folder / CARD_FILE
    missing = not card.is_file()
    if missing:
        _write_card(folder, config, source)
    try:
        ModelCard.load(card)
    except Exception as error:  # of YAML, and of several checks of its fields
        reason = " ".join(str(error).split())
        raise InputError(f"the header of {CARD_FILE} is not valid metadata: {reason}") from error
    return missing


def _write_card(folder: Path, config: CCFLLMConfig, source: str | None) -> Path:
    """A card from what the folder itself tells, and where its backbone was obtained."""
    return write_model_card(folder, config=config, training={"backbone": {"source": source}})


def _complete_example(folder: Path, backbone: str | None) -> None:
    """Record the example of a checkpoint that has none, or another than its card shows."""
    recorded, shown = [call["inputs"] for call in read_calls(folder)], card_call(folder / CARD_FILE)
    if recorded and (shown is None or shown in recorded):
        return
    model, processor = load_checkpoint(str(folder), backbone=backbone)
    record_example(folder, model, processor)


def _converted(copy: Path, target: Path, form: str, backbone: str | None) -> Path:
    """The same checkpoint in its other form, the record of its example unchanged."""
    if form == "full":
        return merge_checkpoint(str(copy), target, backbone)
    model, _ = load_checkpoint(str(copy))
    try:
        model.save_pretrained(target, form="slim")
    except ValueError as error:
        raise InputError(f"it cannot be pushed with --slim: {error}") from error
    for path in copy.iterdir():
        if path.is_file() and not is_weights(path.name) and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
    return target


def _mend_card(folder: Path, config: CCFLLMConfig, source: str | None) -> None:
    """Let a card speak of the form that the checkpoint has now, and keep the rest of it."""
    card = folder / CARD_FILE
    old = card.read_text(encoding="utf-8")
    fresh = _write_card(folder, config, source).read_text(encoding="utf-8")
    for part in FORM_PARTS:
        if new := part.search(fresh):
            old = part.sub(lambda _, new=new: new[0], old, count=1)  # type: ignore[misc]
    card.write_text(old, encoding="utf-8")


def _finish(staged: Staged, repo_id: str, private_paths: list[Path]) -> None:
    """Name the repository in the card, cut local names, and scan."""
    card = staged.folder / CARD_FILE
    if card.is_file():
        card.write_text(address_card(card.read_text(encoding="utf-8"), repo_id), encoding="utf-8")
    cut_local_names(staged.folder)
    findings = scan_folder(staged.folder, private_paths)
    if findings:
        more = f"; also {', '.join(map(str, findings[1:4]))}" if len(findings) > 1 else ""
        raise InputError(
            f"{findings[0]} must not be published: remove it from the checkpoint{more}"
        )
    weights = sum(name.endswith(".safetensors") for name in staged.files)
    staged.notes.append(
        f"scan: no token and no absolute path in {len(staged.files) - weights} texts and "
        f"{weights} safetensors headers"
    )


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
