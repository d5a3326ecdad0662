"""The files behind `CFVectors`: safetensors for the vectors, JSON lines for the ids."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CF_TENSORS, FIELD_TENSORS
from ccf_llm_hf.modeling.checkpoint_ccf_llm import FORMAT_VERSION as CHECKPOINT_VERSION

FORMAT_VERSION = "1"
TENSOR_FILE = "cf_embeddings.safetensors"
USER_FILE = "user_ids.jsonl"
ITEM_FILE = "item_catalog.jsonl"
FIELD_FILE = "field_values.jsonl"
RESERVED = (
    "format_version",
    "cf_model",
    "dim",
    "num_users",
    "num_items",
    "num_fits",
    "ids_fingerprint",
)


def write_lines(path: Path, records: list[dict[str, str]]) -> None:
    """One JSON object per line, UTF-8."""
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def read_lines(path: Path, keys: tuple[str, ...]) -> list[dict[str, str]]:
    """Records that all hold `keys` as text. Raises InputError that names the file and the line."""
    try:
        # Only "\n" ends a line: str.splitlines would also cut at characters that titles may hold.
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is missing or unreadable; restore the folder") from error
    records = []
    for number, line in enumerate(lines if lines != [""] else [], start=1):
        try:
            record = json.loads(line)
            complete = all(isinstance(record[key], str) for key in keys)
        except (ValueError, KeyError, TypeError):
            complete = False
        if not complete:
            raise InputError(
                f"{path} line {number} is not a JSON object with {' and '.join(keys)} as text; "
                "restore the file"
            )
        records.append(record)
    return records


def read_tensors(path: Path, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The named tensors, fits first, those of fields where there are some, which have no fits, and
    the metadata. Raises InputError that names the file.

    The table of a checkpoint holds one fit and no dimension for it; it is read as a file of one.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            there = file.keys()
            extra = {name: file.get_tensor(name) for name in FIELD_TENSORS if name in there}
            if metadata.get("format_version") == CHECKPOINT_VERSION:
                tensors = {name: file.get_tensor(name)[None] for name in CF_TENSORS}
                times = torch.zeros(1, dtype=torch.long)
                return tensors | extra | {"snapshot_times": times}, metadata
            missing = [key for key in RESERVED if key not in metadata]
            missing += [name for name in names if name not in there]
            tensors = {} if missing else extra | {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} is missing or damaged ({error}); fit or copy it again") from error
    if missing:
        raise InputError(f"{path} lacks {missing[0]!r}, so it holds no CF vectors; fit it again")
    if metadata["format_version"] != FORMAT_VERSION:
        raise InputError(
            f"{path} has format version {metadata['format_version']}, this package reads "
            f"{FORMAT_VERSION}; fit it again or update the package"
        )
    return tensors, metadata
