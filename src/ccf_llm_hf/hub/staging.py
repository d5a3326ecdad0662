"""A checked copy of a checkpoint, as it will stand in its repository."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import ModelCard
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ccf_llm_hf.data.assets import asset_source, cached_backbone
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.checkpoint_files import (
    CARD_FILE,
    FACTS_FILE,
    copy_published,
    cut_local_names,
    is_weights,
)
from ccf_llm_hf.hub.example import (
    TOLERANCE,
    check_in_clean_process,
    read_calls,
    record_example,
)
from ccf_llm_hf.hub.merge import merge_checkpoint
from ccf_llm_hf.hub.model_card import (
    find_asset,
    has_own_words,
    name_source_to_supply,
    read_facts,
    write_card,
)
from ccf_llm_hf.hub.scan import scan_folder
from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CATALOG_FILE, USERS_FILE
from ccf_llm_hf.modeling.configuration_ccf_llm import CCFLLMConfig
from ccf_llm_hf.version import __version__

NEEDED = ("config.json", "processor_config.json", "modeling_ccf_llm.py", CATALOG_FILE, USERS_FILE)


@dataclass
class Staged:
    """Files that are ready to be sent, and what is to be said about them.

    Args:
        folder: where they are, under the names they will have.
        left: files of the checkpoint that stay behind.
        notes: what whoever publishes it should know.
        generic_card: the card was written for want of one, and replaces none in the repository.
        backbone: what to give as `backbone=` on this machine, where who loads it must supply that.
    """

    folder: Path
    left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    generic_card: bool = False
    backbone: str = ""

    @property
    def files(self) -> dict[str, int]:
        """Sizes in bytes by name."""
        paths = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return {path.relative_to(self.folder).as_posix(): path.stat().st_size for path in paths}


def list_files(files: Mapping[str, int], left: Sequence[str], notes: Sequence[str]) -> str:
    """What goes up with its sizes, what stays here, and the notes, for a terminal."""
    sizes = {**files, f"{len(files)} files": sum(files.values())}
    width = max(map(len, sizes))
    lines = [f"  {name:<{width}}  {_format_size(size):>9}" for name, size in sizes.items()]
    lines += [f"stays here: {', '.join(left)}"] if left else []
    return "\n".join([*lines, *notes])


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
def stage_checkpoint(
    checkpoint: str | Path, repo_id: str, *, form: str | None = None, backbone: str | None = None
) -> Iterator[Staged]:
    """Copy a checkpoint's published files, bring them into `form`, and check them.

    The copy lies beside the checkpoint, where large files can be linked, until the context ends.
    Its card is rendered for the repository, unless the README.md has words of somebody's own. It is
    scanned for secrets and absolute paths, loaded in a process without this package, and its
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
    attach = _find_backbone(config, backbone)
    above = folder.resolve().parent
    with tempfile.TemporaryDirectory(
        prefix=".push-", dir=above if os.access(above, os.W_OK) else None
    ) as work:
        copy = Path(work) / "copy" / name
        copy.mkdir(parents=True)
        staged = Staged(copy, copy_published(folder, copy))
        _complete_example(copy, attach)
        if form and form != config.checkpoint_form:
            staged.folder = _convert(copy, Path(work) / "converted" / name, form, attach)
            config = CCFLLMConfig.from_pretrained(staged.folder)
            attach = _find_backbone(config, backbone)  # a slim one needs one, a full one does not
        source = _describe(staged, config, repo_id, attach)
        _finish(staged, [above, Path.home()])
        local = attach is not None and Path(attach).is_dir()
        offline = local or config.checkpoint_form == "full"
        difference = check_in_clean_process(staged.folder, attach, offline=offline)
        staged.notes.append(
            f"check: loads in a process without this package; the example's logits differ by at "
            f"most {difference:.1e} from the recorded ones (limit {TOLERANCE:.0e})"
        )
        if source:
            staged.notes.append(
                f"note: the Hub has no such backbone as this one, which came from {source}. "
                "Whoever loads this slim checkpoint must have the same copy and give it as "
                "backbone=FOLDER; a checkpoint pushed with --full loads by itself"
            )
        yield staged


@contextmanager
def stage_part(saved: Path, repo_id: str) -> Iterator[Staged]:
    """As `stage_checkpoint`, for a folder that holds a model or a processor alone: there is
    nothing to score, so it is scanned only."""
    with tempfile.TemporaryDirectory() as work:
        copy = Path(work) / check_repo_id(repo_id).split("/")[1]
        copy.mkdir()
        staged = Staged(copy, copy_published(saved, copy))
        if (copy / "config.json").is_file():
            config = CCFLLMConfig.from_pretrained(copy)
            _describe(staged, config, repo_id, cached_backbone(config.backbone_name))
        _finish(staged, [Path.home()])
        yield staged


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


def _find_backbone(config: CCFLLMConfig, backbone: str | None) -> str | None:
    """What to attach to a slim checkpoint: as given, or a copy on this machine, or None."""
    if config.checkpoint_form == "full":
        return None
    name = cached_backbone(backbone or config.backbone_name)
    return str(Path(name).resolve()) if Path(name).is_dir() else backbone


def _describe(staged: Staged, config: CCFLLMConfig, repo_id: str, backbone: str | None) -> str:
    """Render the card for the repository, or check the header of one with words of its own.

    Returns:
        Where whoever loads the checkpoint must get its backbone; empty if it is fetched by name.
    """
    folder = staged.folder
    facts, card = read_facts(folder), folder / CARD_FILE
    staged.generic_card = not (folder / FACTS_FILE).is_file() and not card.is_file()
    facts.backbone_source = facts.backbone_source or (backbone and asset_source(backbone)) or ""
    if has_own_words(folder):
        staged.notes.append(
            f"note: {CARD_FILE} was written by hand and is sent as it stands; without it, a push "
            "renders one that names this repository"
        )
    else:
        write_card(folder, facts, repo=repo_id)
    try:
        ModelCard.load(card)
    except Exception as error:  # of YAML, and of several checks of its fields
        reason = " ".join(str(error).split())
        raise InputError(f"the header of {CARD_FILE} is not valid metadata: {reason}") from error
    source = name_source_to_supply(config, facts.backbone_source)
    if source:
        staged.backbone = find_asset(config.backbone_name) or backbone or config.backbone_name
    return source


def _complete_example(folder: Path, backbone: str | None) -> None:
    """Record the example of a checkpoint that has none, or another than its card shows."""
    if read_facts(folder).example in [call["inputs"] for call in read_calls(folder)]:
        return
    model, processor = load_checkpoint(str(folder), backbone=backbone)
    record_example(folder, model, processor)


def _convert(copy: Path, target: Path, form: str, backbone: str | None) -> Path:
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
    if (target / FACTS_FILE).is_file():  # save_pretrained put this version's code there
        write_card(target, replace(read_facts(target), version=__version__))
    return target


def _finish(staged: Staged, private_paths: list[Path]) -> None:
    """Cut local names, and scan."""
    cut_local_names(staged.folder)
    findings = scan_folder(staged.folder, private_paths)
    findings.sort(key=lambda finding: finding.file == CARD_FILE)  # it repeats what others say
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


def _format_size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
