"""What evaluation and CF models read of a prepared folder: rows without histories, and titles."""

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ccf_llm_hf.data.prepared import ITEMS_FILE, load_protocol, split_file
from ccf_llm_hf.errors import InputError

COLUMNS = ("user_id", "item_id", "label", "timestamp", "not_cold")


def read_rows(data_dir: str | Path, split: str) -> pd.DataFrame:
    """One split of a prepared folder, in its order, without the bulky histories.

    Args:
        data_dir: folder written by `ccf-llm prepare`.
        split: train, validation or test.

    Returns:
        Columns user_id, item_id (str), label, timestamp (int64), not_cold (bool).

    Raises:
        InputError: no such folder or split, or the file is damaged.
    """
    return _read(Path(data_dir), split_file(split), COLUMNS)


def read_history_column(data_dir: str | Path, split: str) -> pd.Series:
    """The histories of one split, in its order: per row an array of item ids (str), oldest first.

    Raises:
        InputError: no such folder or split, or the file is damaged.
    """
    return _read(Path(data_dir), split_file(split), ("history",))["history"]


def read_items(data_dir: str | Path) -> pd.DataFrame:
    """The catalog of a prepared folder: columns item_id, title (str), in its order.

    Raises:
        InputError: no such folder, or the file is damaged.
    """
    return _read(Path(data_dir), ITEMS_FILE, ("item_id", "title"))


def _read(folder: Path, name: str, columns: tuple[str, ...]) -> pd.DataFrame:
    load_protocol(folder)
    path = folder / name
    try:
        return pq.read_table(path, columns=list(columns)).select(list(columns)).to_pandas()
    except (OSError, pa.ArrowException, KeyError) as error:
        raise InputError(f"{path} is missing or damaged: run `ccf-llm prepare` again") from error
