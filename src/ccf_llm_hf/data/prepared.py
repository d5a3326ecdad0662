"""Read a prepared folder. Everything downstream of `prepare` gets its data through here."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ccf_llm_hf.data.protocol import CHUNK_ROWS, SPLITS
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.configuration_ccf_llm import check_kinds

if TYPE_CHECKING:
    from datasets import Dataset

    from ccf_llm_hf.data.rows import Histories, Rows

PROTOCOL_FILE = "protocol.json"
ITEMS_FILE = "items/items.parquet"
INTERACTIONS_FILE = "interactions/interactions.parquet"
FORMAT = "ccf-llm-prepared-2"
HISTORIES = ("likes", "signed")
STEEP = 1e3  # turns ratings into plain likes and dislikes
ROW_COLUMNS = ("user_id", "item_id", "label", "timestamp", "not_cold")
# What the columns of a prepared folder hold, those that are there.
KINDS = {
    **dict.fromkeys(("user_id", "item_id", "title", "split"), "text"),
    **dict.fromkeys(("label", "timestamp", "split_position", "history_dropped"), "integers"),
    **dict.fromkeys(("history", "history_labels", "history_ratings"), "lists"),
    "not_cold": "booleans",
    "rating": "numbers",
}


def is_text(kind: pa.DataType) -> bool:
    """Whether an Arrow column holds text."""
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)


IS_KIND = {
    "text": lambda kind: is_text(getattr(kind, "value_type", kind)),
    "integers": pa.types.is_integer,
    "lists": lambda kind: pa.types.is_list(kind) or pa.types.is_large_list(kind),
    "booleans": pa.types.is_boolean,
    "numbers": pa.types.is_floating,
}


class Protocol(TypedDict, total=False):
    """What is read of protocol.json, besides its format."""

    name: str
    splits: dict[str, dict[str, Any]]
    item_fields: list[str]
    item_columns: list[str]
    has_times: bool
    frozen_histories: bool
    histories: str


class Splits(Mapping[str, "Dataset"]):
    """The splits of a prepared folder, each read, with all its histories, when it is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, Dataset] = {}

    def __getitem__(self, name: str) -> "Dataset":
        from datasets import Dataset

        if name not in SPLITS:
            raise KeyError(name)
        if name not in self._read:
            self._read[name] = Dataset(_read(self._folder, split_file(name)))
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return iter(SPLITS)

    def __len__(self) -> int:
        return len(SPLITS)


@dataclass
class PreparedData:
    """A prepared folder.

    `splits` has train, validation and test with columns user_id, item_id (str), label (int64),
    timestamp (int64, Unix seconds, but see `has_times`), history (list of item ids, oldest first),
    split_position (int64) and not_cold (bool), and where histories are signed `history_labels`
    (list of 0/1) and, if there are ratings, `history_ratings` (list of float32);
    `items` has item_id, title and any other column, of which those in the protocol's `item_fields`
    describe the item, as text or lists of text; `protocol` is protocol.json.
    """

    path: Path
    splits: "Mapping[str, Dataset]"
    items: "Dataset"
    protocol: dict
    _rows: "dict[str, Rows]" = field(default_factory=dict, repr=False)

    def rows(self, split: str) -> "Rows":
        """A split as arrays, which take a tenth of the memory: its histories stay in the file."""
        from ccf_llm_hf.data.rows import Rows

        if split not in self._rows:
            file = self.path / split_file(split)
            names = pq.read_schema(file).names
            self._rows[split] = Rows(names, partial(_batches, file))
        return self._rows[split]

    def lines(self) -> "Histories | None":
        """The users' whole histories as rows of validation and test may see them, if these are
        frozen; else None, since each row then has a history of its own."""
        from ccf_llm_hf.data.grouping import frozen_lines

        return frozen_lines(self.rows("train")) if self.protocol.get("frozen_histories") else None

    def rating_scale(self, fitted: tuple[float, float] | None = None) -> tuple[float, float] | None:
        """How a processor reads the ratings of the histories; None where they have none.

        Args:
            fitted: `CFVectors.rating_scale`, which holds where the CF model has one.

        Returns:
            `(midpoint, slope)`; by default each rating is plainly a like or a dislike.

        Raises:
            InputError: the ratings do not decide the labels.
        """
        if self.rows("train").key != "rating":
            return None
        return fitted or (rating_midpoint(read_ratings(self.path)), STEEP)


def split_file(split: str) -> str:
    """Path of a split inside a prepared folder."""
    return f"data/{split}.parquet"


def load_prepared(data_dir: str | Path) -> PreparedData:
    """Load a folder written by `prepare`.

    Raises:
        InputError: the folder or one of its files is missing or cannot be read.
    """
    # Imported here: it takes half a second, and most of what reads a prepared folder needs no more
    # than pandas.
    from datasets import Dataset

    folder = Path(data_dir)
    protocol = load_protocol(folder)
    for name in SPLITS:
        _check_split(folder / split_file(name))
    items, columns = _read(folder, ITEMS_FILE), ("item_id", "title")
    _check_columns(folder / ITEMS_FILE, items, (*columns, *protocol.get("item_fields", [])))
    return PreparedData(folder, Splits(folder), Dataset(items), protocol)


def interactions(
    data_dir: str | Path, *, user: str | None = None, categories: bool = False
) -> pd.DataFrame:
    """Every accepted interaction of a prepared folder, in order of time.

    Args:
        data_dir: folder written by `ccf-llm prepare`.
        user: raw id of one whose rows to read; default those of all.
        categories: ids and splits as pandas categories, which take a fourth of the memory.

    Returns:
        Columns user_id, item_id, rating (float64, NaN if the data has labels only), label (int64),
        timestamp (int64, see `has_times`), split (train, validation, test, or "" when in none).

    Raises:
        InputError: the folder or its interactions file is missing or cannot be read.
    """
    load_protocol(Path(data_dir))
    names = ("user_id", "item_id", "rating", "label", "timestamp", "split")
    options: dict[str, Any] = {} if user is None else {"filters": [("user_id", "=", user)]}
    if categories:
        options["read_dictionary"] = ["user_id", "item_id", "split"]
    return _read(Path(data_dir), INTERACTIONS_FILE, names, **options).to_pandas()


def has_times(data_dir: str | Path) -> bool:
    """Whether a prepared folder's timestamps are Unix seconds. If not, each is the position of the
    row in a random order of its user's rows, those of train first.

    Raises:
        InputError: no such folder.
    """
    return load_protocol(Path(data_dir)).get("has_times", True)


def earlier_interactions(data_dir: str | Path) -> pd.DataFrame:
    """The interactions before the validation split; of data without times those of train.

    Raises:
        InputError: as `interactions`.
    """
    rows = interactions(data_dir)
    if has_times(data_dir):
        start = read_rows(data_dir, "validation")["timestamp"].min()
        return rows[rows["timestamp"] < start].reset_index(drop=True)
    return rows[rows["split"] == "train"].reset_index(drop=True)


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
    return _read_columns(data_dir, split_file(split), ROW_COLUMNS)


def read_history_column(data_dir: str | Path, split: str) -> pd.Series:
    """The histories of one split, in its order: per row an array of item ids (str), oldest first.

    Raises:
        InputError: no such folder or split, or the file is damaged.
    """
    return _read_columns(data_dir, split_file(split), ("history",))["history"]


def read_items(data_dir: str | Path) -> pd.DataFrame:
    """The catalog of a prepared folder: columns item_id, title (str), in its order.

    Raises:
        InputError: no such folder, or the file is damaged.
    """
    return _read_columns(data_dir, ITEMS_FILE, ("item_id", "title"))


def read_item_fields(data_dir: str | Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """Some fields of each item of the catalog, text, lists of text or None, in its order.

    Raises:
        InputError: no such folder, or its items have no such field.
    """
    there = load_protocol(Path(data_dir)).get("item_fields", [])
    if missing := [name for name in names if name not in there]:
        raise InputError(
            f"{data_dir}: items have no field {missing[0]!r}, only {', '.join(there) or 'titles'}; "
            "name one of these, or prepare the data with --item-fields"
        )
    return _read(Path(data_dir), ITEMS_FILE, tuple(names)).to_pylist()


def read_ratings(data_dir: str | Path) -> pd.DataFrame:
    """Rating (float64, NaN where there is none) and label (int64) of every interaction.

    Raises:
        InputError: as `interactions`.
    """
    return _read_columns(data_dir, INTERACTIONS_FILE, ("rating", "label"))


def rating_midpoint(rows: pd.DataFrame) -> float:
    """Halfway between the highest disliked and the lowest liked rating.

    Args:
        rows: interactions with `rating` and `label`.

    Raises:
        InputError: there are no ratings, or they do not decide the labels.
    """
    ratings = rows.groupby("label")["rating"]
    highest, lowest = ratings.max().get(0, np.nan), ratings.min().get(1, np.nan)
    if not highest < lowest:
        raise InputError(
            "the data has no ratings that decide its labels: fit the labels (--targets labels)"
        )
    return float(highest + lowest) / 2


def load_protocol(folder: Path) -> dict:
    """protocol.json of a prepared folder. Raises InputError if this is none."""
    file = folder / PROTOCOL_FILE
    try:
        protocol = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(
            f"{folder} is not a prepared folder ({PROTOCOL_FILE} is missing or unreadable): "
            f"make one with `ccf-llm prepare`"
        ) from error
    if not isinstance(protocol, dict) or protocol.get("format") != FORMAT:
        raise InputError(f"{file} is not of format {FORMAT}: run `ccf-llm prepare` again")
    try:
        check_kinds(Protocol, protocol)
    except ValueError as error:
        raise InputError(f"{file} is damaged: {error} Run `ccf-llm prepare` again") from error
    return protocol


def _read_columns(data_dir: str | Path, name: str, columns: tuple[str, ...]) -> pd.DataFrame:
    load_protocol(Path(data_dir))
    return _read(Path(data_dir), name, columns).to_pandas()


def _read(
    folder: Path, name: str, columns: tuple[str, ...] | None = None, **options: Any
) -> pa.Table:
    """A file's table, all of it or these columns in their order; `options` of `pq.read_table`."""
    with _reading(folder / name):
        there = pq.read_schema(folder / name).names
        wanted = there if columns is None else [column for column in columns if column in there]
        table = pq.read_table(folder / name, columns=wanted, **options).select(wanted)
    _check_columns(folder / name, table, columns or ())
    return table


def _batches(file: Path, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """A file's rows, some at a time."""
    with _reading(file), pq.ParquetFile(file) as opened:
        yield from opened.iter_batches(CHUNK_ROWS, columns=list(columns))


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{file} is missing or damaged: run `ccf-llm prepare` again") from error


def _check_split(file: Path) -> None:
    """As `_check_columns`, of all columns of a split, some rows at a time."""
    with _reading(file):
        schema = pq.read_schema(file)
    needed = (*ROW_COLUMNS, "history", *(KINDS.keys() & set(schema.names)))
    _check_columns(file, schema.empty_table(), needed)
    for batch in _batches(file, schema.names):
        _check_columns(file, batch, needed)


def _check_columns(file: Path, table: pa.Table | pa.RecordBatch, needed: Sequence[str]) -> None:
    """Raise InputError for a column that is missing or holds what `prepare` does not write."""
    names = table.schema.names
    wrong = next((f"has no column {name!r}" for name in needed if name not in names), "")
    for name in needed if not wrong else []:
        column, kind = table[name], KINDS.get(name)
        if kind and not IS_KIND[kind](column.type):
            wrong = f"holds {column.type} in the column {name!r}, which has {kind}"
        elif kind and column.null_count and name != "rating":
            wrong = f"has empty cells in the column {name!r}"
        elif name == "label" and pc.any(pc.greater(pc.abs(pc.subtract(column, 0.5)), 0.5)).as_py():
            wrong = "holds labels other than 0 and 1"
    if wrong:
        raise InputError(f"{file} {wrong}: run `ccf-llm prepare` again")
