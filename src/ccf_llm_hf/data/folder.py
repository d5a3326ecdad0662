"""Write a prepared folder: complete or not at all, and never over anything else."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ccf_llm_hf.data.dataset_card import render_dataset_card
from ccf_llm_hf.data.prepared import (
    INTERACTIONS_FILE,
    ITEMS_FILE,
    PROTOCOL_FILE,
    load_protocol,
    split_file,
)
from ccf_llm_hf.data.protocol import SPLITS, Samples, encode_ids, order_in_time
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.io import check_writable, write_folder, write_json, write_text

WRITTEN = {"README.md", PROTOCOL_FILE, "data", "items", "interactions"}


def check_output(out: Path) -> None:
    """Raise InputError if `out` cannot be written to, or exists and is neither empty nor a prepared
    folder and no more."""
    if not out.exists():
        check_writable(out)
        return
    if not out.is_dir():
        raise InputError(f"{out} is a file: name another folder with --out")
    check_writable(out.resolve().parent)  # where it is made, and renamed into place
    entries = {entry.name for entry in out.iterdir()}
    if entries - WRITTEN:
        raise InputError(
            f"{out} holds {sorted(entries - WRITTEN)[0]!r}, which `prepare` did not write: "
            f"name another folder with --out, or move that away"
        )
    if entries:
        try:
            load_protocol(out)
        except InputError as error:
            raise InputError(
                f"{out} is not empty and no prepared folder: name another folder with --out"
            ) from error


def write_prepared(
    out: Path, samples: Samples, rows: pd.DataFrame, items: pd.DataFrame, protocol: dict
) -> None:
    """Write a prepared folder in the place of `out`.

    Raises:
        InputError: the folder that is to hold it cannot be written to.
    """

    def write(new: Path) -> None:
        for name in ("data", "items", "interactions"):
            (new / name).mkdir()
        for split in SPLITS:
            _write_parquet(new / split_file(split), samples.tables(split))
        pq.write_table(pa.Table.from_pandas(items, preserve_index=False), new / ITEMS_FILE)
        pq.write_table(
            _interactions_table(rows, protocol), new / INTERACTIONS_FILE, compression="zstd"
        )
        write_json(new / PROTOCOL_FILE, protocol)
        write_text(new / "README.md", render_dataset_card(protocol))

    try:
        write_folder(out, write)
    except OSError as error:
        raise InputError(
            f"{out.resolve().parent} cannot be written to ({error.strerror or error})"
        ) from error


def _write_parquet(path: Path, tables: Iterator[pa.Table]) -> None:
    first = next(tables)
    with pq.ParquetWriter(path, first.schema, compression="zstd") as writer:
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def _interactions_table(rows: pd.DataFrame, protocol: dict) -> pa.Table:
    user, user_names = encode_ids(rows["user_id"])
    item, item_names = encode_ids(rows["item_id"])
    order = order_in_time(rows, protocol.get("ties", "item"))
    names = pa.array([*SPLITS, ""], pa.string())  # -1, in no split, is the last
    split = rows["split"].to_numpy()[order]
    rating, label, timestamp = (rows[c].to_numpy()[order] for c in ("rating", "label", "timestamp"))
    return pa.table(
        {
            "user_id": user_names.take(pa.array(user[order])),
            "item_id": item_names.take(pa.array(item[order])),
            "rating": pa.array(rating, pa.float64(), from_pandas=True),
            "label": pa.array(label, pa.int64()),
            "timestamp": pa.array(np.floor(timestamp).astype(np.int64)),
            "split": names.take(pa.array(np.where(split < 0, len(SPLITS), split))),
        }
    )
