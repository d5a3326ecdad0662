"""Which files of a checkpoint folder are published, and the copy of them that goes up."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from ccf_llm_hf.data.assets import hub_id
from ccf_llm_hf.io import write_json
from ccf_llm_hf.modeling.checkpoint_ccf_llm import (
    ADAPTER_CONFIG,
    ADAPTER_FILE,
    ADAPTER_FOLDER,
    CATALOG_FILE,
    CF_FILE,
    CODE_FILES,
    FIELDS_FILE,
    FULL_FILE,
    FUSION_FILE,
    TEXT_FILE,
    TEXT_TOKENIZER_FOLDER,
    USERS_FILE,
)

CARD_FILE = "README.md"
FACTS_FILE = "card.json"
EXAMPLE_FILE = "example.json"
WEIGHT_FILES = (
    FULL_FILE,
    f"{FULL_FILE}.index.json",
    CF_FILE,
    FUSION_FILE,
    TEXT_FILE,
    f"{ADAPTER_FOLDER}/{ADAPTER_FILE}",
    f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG}",
)
VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "added_tokens.json",
)
SETTINGS_FILES = (
    "config.json",
    "generation_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    f"{ADAPTER_FOLDER}/{ADAPTER_CONFIG}",
    f"{TEXT_TOKENIZER_FOLDER}/tokenizer.json",
    f"{TEXT_TOKENIZER_FOLDER}/tokenizer_config.json",
)
PUBLISHED = {
    CARD_FILE,
    FACTS_FILE,
    EXAMPLE_FILE,
    CATALOG_FILE,
    USERS_FILE,
    FIELDS_FILE,
    "LICENSE",
    *WEIGHT_FILES,
    *VOCABULARY_FILES,
    *SETTINGS_FILES,
    *CODE_FILES,
}
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")
# Keys under which libraries write down where a model or tokenizer was loaded from.
NAME_KEYS = (
    "backbone_name",
    "sentence_encoder",
    "_name_or_path",
    "name_or_path",
    "base_model_name_or_path",
)


def is_weights(name: str) -> bool:
    """Whether a file of a repository holds weights, in either form of a checkpoint."""
    return name in WEIGHT_FILES or SHARD.fullmatch(name) is not None


def is_published(name: str) -> bool:
    """Whether a file, named relative to its checkpoint folder, belongs in a repository."""
    return name in PUBLISHED or is_weights(name)


def copy_published(folder: Path, target: Path) -> list[str]:
    """Fill `target` with the files of a checkpoint that are published.

    Large files are hard-linked where the file system can.

    Returns:
        Names of the files that stay behind, folders with a slash behind them.
    """
    left = set()
    config = folder / "config.json"
    form = json.loads(config.read_text("utf-8")).get("checkpoint_form") if config.is_file() else ""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        of_trainer = form == "slim" and name == FULL_FILE  # its own copy of what learns
        if is_published(name) and not of_trainer:
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(path.resolve(), target / name)
        else:
            top, inside, _ = name.partition("/")
            known = top in (ADAPTER_FOLDER, TEXT_TOKENIZER_FOLDER)
            left.add(name if known else top + inside)
    return sorted(left)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        if source.suffix == ".safetensors":
            os.link(source, target)
            return
    except OSError:  # another disk, or a file system without links
        pass
    shutil.copyfile(source, target)


def cut_local_names(folder: Path) -> None:
    """Cut paths of this machine, where settings say what a model was made from, to their last
    part: `"backbone_name": "/home/me/my-lm"` becomes `"my-lm"`. An asset's name becomes its Hub id.
    """
    for name in SETTINGS_FILES:
        file = folder / name
        if not file.is_file() or file.suffix != ".json":
            continue
        values = json.loads(file.read_text(encoding="utf-8"))
        shared = _cut_names(values)
        if shared != values:
            write_json(file, shared)


def cut_paths(value: Any) -> Any:
    """Absolute paths cut to their last part, anywhere in a value as JSON has it: a checkpoint is
    shared, its author's machine is not."""
    if isinstance(value, dict):
        return {key: cut_paths(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [cut_paths(part) for part in value]
    if isinstance(value, str) and (Path(value).is_absolute() or value.startswith("~/")):
        return Path(value).name
    return value


def _share_name(value: Any) -> Any:
    return hub_id(cut_paths(value)) if isinstance(value, str) else value


def _cut_names(values: Any) -> Any:
    if not isinstance(values, dict):
        return values
    return {
        key: _share_name(value) if key in NAME_KEYS else _cut_names(value)
        for key, value in values.items()
    }
