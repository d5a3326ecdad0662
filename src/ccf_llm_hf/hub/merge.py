"""`ccf-llm merge`: one self-contained checkpoint out of a slim one and its backbone."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from huggingface_hub import snapshot_download

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.checkpoint_files import FACTS_FILE
from ccf_llm_hf.hub.model_card import read_facts, write_card
from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.io import write_folder
from ccf_llm_hf.modeling.checkpoint_ccf_llm import (
    ADAPTER_FOLDER,
    CF_FILE,
    FULL_FILE,
    FUSION_FILE,
    TEXT_FILE,
)
from ccf_llm_hf.version import __version__

WRITTEN_ANEW = (CF_FILE, FUSION_FILE, TEXT_FILE, FULL_FILE, ADAPTER_FOLDER)


def merge_checkpoint(checkpoint: str, out: str | Path, backbone: str | None = None) -> Path:
    """Write a full checkpoint that scores as the slim one does, LoRA merged into the backbone.

    Processor, catalog and whatever else lies beside the slim weights go along; the card is rendered
    anew from the same facts. `out` is filled under a temporary name and then renamed.

    Args:
        checkpoint: slim checkpoint folder or Hub repository.
        out: folder to write; must not exist, or be empty.
        backbone: folder or name to attach instead of the recorded one.

    Returns:
        `out`.

    Raises:
        InputError: `out` holds something, the checkpoint is full already, or it cannot be loaded.
    """
    out = Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists already: name a new folder, or delete it first")
    source = _find_folder(checkpoint)
    config = source / "config.json"
    if not config.is_file():
        raise InputError(f"{checkpoint} has no config.json: name a slim checkpoint")
    if json.loads(config.read_text(encoding="utf-8")).get("checkpoint_form") != "slim":
        raise InputError(f"{checkpoint} is no slim checkpoint: there is nothing to merge")
    model, processor = load_checkpoint(str(source), backbone=backbone)

    def write(folder: Path) -> None:
        model.save_pretrained(folder, form="full")
        processor.save_pretrained(folder)
        _copy_the_rest(source, folder)
        if (folder / FACTS_FILE).is_file():
            write_card(folder, replace(read_facts(folder), version=__version__), repo=out.name)

    return write_folder(out, write)


def _find_folder(checkpoint: str) -> Path:
    if Path(checkpoint).is_dir():
        return Path(checkpoint)
    try:
        return Path(snapshot_download(checkpoint))
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"checkpoint {checkpoint} cannot be fetched: {reason}") from error


def _copy_the_rest(source: Path, folder: Path) -> None:
    """Files that neither model nor processor writes, such as the facts of the card."""
    for path in source.iterdir():
        target = folder / path.name
        if path.name in WRITTEN_ANEW or path.name.startswith(".") or target.exists():
            continue
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, target)
