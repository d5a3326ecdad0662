"""What a CF model is fitted on: training rows in order of time, cut into folds or slices."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ccf_llm_hf.cf.folds import fold_of, fold_of_users
from ccf_llm_hf.cf.solver import ItemFields, Rows
from ccf_llm_hf.data.prepared import (
    earlier_interactions,
    has_times,
    rating_midpoint,
    read_item_fields,
    read_items,
    read_rows,
)
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.prompt_ccf_llm import field_values

logger = logging.getLogger(__name__)

TABLE_BYTES = 1 << 30  # of all snapshots together; our choice
GRADED_SLOPE = 1.5  # best of 1.5, 2 and 2.5 on ML-1M's validation split


@dataclass
class TrainingData:
    """Rows to fit in order of time, with their times `(n,)`, and of validation, with the users'
    codes `(n,)`; user and item ids in table order. In `validation` an index below zero is unknown.
    `split_times` are those of the train split alone, which snapshots are cut by; `rating_scale` is
    `(midpoint, slope)` of graded labels. Without `has_times` times are positions among a user's
    rows. `fields` says which of `field_values`, (field, value) pairs, the items have.
    """

    train: Rows
    times: np.ndarray
    validation: Rows
    validation_users: np.ndarray
    users: pd.Index
    items: pd.DataFrame
    split_times: np.ndarray
    rating_scale: tuple[float, float] | None = None
    has_times: bool = True
    fields: ItemFields = field(default_factory=ItemFields.none)
    field_values: list[tuple[str, str]] = field(default_factory=list)


def load_training_data(
    folder: Path, which: str = "train", targets: str = "labels", item_fields: Sequence[str] = ()
) -> TrainingData:
    """Rows to fit and validation rows of a prepared folder.

    Args:
        folder: written by `ccf-llm prepare`.
        which: `train`, or `earlier` for every interaction before the validation split.
        targets: `labels`, or `graded` for sigmoid(slope (rating - midpoint)).
        item_fields: names of the fields to read.

    Raises:
        InputError: the folder is no prepared one, a split lacks a class, the catalog an item, or
            the items a field.
    """
    train = read_rows(folder, "train").sort_values("timestamp", kind="stable", ignore_index=True)
    validation, items = read_rows(folder, "validation"), read_items(folder)
    for name, split in (("train", train), ("validation", validation)):
        if split["label"].nunique() < 2:
            raise InputError(
                f"{folder}: the {name} split needs rows of both labels to fit a CF model; prepare "
                "it with another period or label rule"
            )
    split_times, scale = train["timestamp"].to_numpy(), None
    if which == "earlier":
        train = earlier_interactions(folder)
    if targets == "graded":
        scale = (rating_midpoint(train), GRADED_SLOPE)
        graded = 1 / (1 + np.exp(-scale[1] * (train["rating"] - scale[0])))
        train = train.assign(label=graded)
    users, catalog = pd.Index(train["user_id"].unique()), pd.Index(items["item_id"])
    rows = _rows(train, users, catalog)
    if (lost := rows.items < 0).any():
        raise InputError(
            f"{folder}: item {train['item_id'][int(lost.nonzero()[0])]!r} of train is not in the "
            "catalog; prepare it again"
        )
    return TrainingData(
        rows,
        train["timestamp"].to_numpy(),
        _rows(validation, users, catalog),
        pd.factorize(validation["user_id"])[0],
        users,
        items,
        split_times,
        scale,
        has_times(folder),
        *_read_fields(folder, list(item_fields)),
    )


def _read_fields(folder: Path, names: list[str]) -> tuple[ItemFields, list[tuple[str, str]]]:
    if not names:
        return ItemFields.none(), []
    places: dict[tuple[str, str], int] = {}
    items, values, weights = [], [], []
    for row, fields in enumerate(read_item_fields(folder, names)):
        for name in names:
            found = field_values(fields, name)
            items += [row] * len(found)
            values += [places.setdefault((name, value), len(places)) for value in found]
            weights += [1 / len(found) for _ in found]
    who_has = ItemFields(
        # The types are said because all may be empty.
        torch.tensor(items, dtype=torch.int64),
        torch.tensor(values, dtype=torch.int64),
        torch.tensor(weights, dtype=torch.float32),
        num_values=len(places),
        of_field=torch.tensor([names.index(name) for name, _ in places], dtype=torch.int64),
    )
    return who_has, list(places)


def _rows(table: pd.DataFrame, users: pd.Index, items: pd.Index) -> Rows:
    return Rows(
        torch.from_numpy(places(table["user_id"], users)),
        torch.from_numpy(places(table["item_id"], items)),
        torch.tensor(table["label"].to_numpy(), dtype=torch.float32),
    )


def places(ids: pd.Series, index: pd.Index) -> np.ndarray:
    """Place of each id in the index, -1 where it is not there: `(n,)` int64."""
    # Each id is looked up once, however many rows it has.
    codes, names = pd.factorize(ids)
    return index.get_indexer(names)[codes]


def limit_tables(data: TrainingData, width: int) -> int:
    """How many tables of vectors of this width fit into a gigabyte."""
    return TABLE_BYTES // (4 * width * (len(data.users) + len(data.items)))


def slice_by_time(data: TrainingData, snapshots: int, width: int) -> tuple[np.ndarray, list[int]]:
    """Slices of the training rows by time, about equal in rows.

    Args:
        data: its rows.
        snapshots: slices to make; fewer where the tables would pass a gigabyte, with a warning.
        width: of a vector.

    Returns:
        Snapshot times, ascending, one more than there are slices, and how many of the time-ordered
        rows lie before each: the first is fitted on what precedes the train split, the last on all.

    Raises:
        InputError: the data has no times.
    """
    if not data.has_times:
        raise InputError(
            "CF snapshots are cut by time, and this data was split at random, without times: fit "
            "mf or lightgcn with cross_fit=folds"
        )
    times = data.split_times
    count = min(snapshots, max(1, limit_tables(data, width) - 1))
    if count < snapshots:
        logger.warning("%d snapshots instead of %d, to keep within 1 GB", count, snapshots)
    starts = times[np.arange(count) * len(times) // count]
    found = np.append(np.unique(starts), times[-1] + 1)
    return found, np.searchsorted(data.times, found, side="left").tolist()


def mark_seen(ids: Tensor, size: int) -> Tensor:
    """`(size,)` bool, True at the ids that occur."""
    return torch.bincount(ids, minlength=size) > 0


@dataclass
class Plan:
    """Which training rows each table is fitted on.

    Attributes:
        times: `(tables,)` int64, the time before which the rows of each lie.
        rows: of each table; the last is fitted on all.
        sees: `(n,)` int64, the table that each row sees; -1 before the train split.
        cross_fit: `snapshots`, `folds` or `users`.
    """

    times: np.ndarray
    rows: list[slice | Tensor]
    sees: Tensor
    cross_fit: str


def plan_snapshots(data: TrainingData, snapshots: int, width: int) -> Plan:
    """Tables by [`slice_by_time`]: one fitted on nothing, one at the end of each slice."""
    times, sizes = slice_by_time(data, snapshots, width)
    sees = torch.from_numpy(np.searchsorted(times, data.times, side="right") - 1)
    return Plan(times, [slice(0, size) for size in sizes], sees, "snapshots")


def plan_folds(data: TrainingData, folds: int, width: int, cross_fit: str = "folds") -> Plan:
    """A table for each fold of pairs, or of `users`, on the rows of the others, and one on all
    rows; fewer folds where the tables would pass a gigabyte, with a warning."""
    count = min(folds, max(2, limit_tables(data, width) - 1))
    if count < folds:
        logger.warning("%d folds instead of %d, to keep within 1 GB", count, folds)
    users, items = data.users.to_numpy(), data.items["item_id"].to_numpy()
    if cross_fit == "users":
        fold = torch.from_numpy(fold_of_users(users, count))[data.train.users]
    else:
        fold = torch.from_numpy(fold_of(users[data.train.users], items[data.train.items], count))
    rows = [(fold != left_out).nonzero().flatten() for left_out in range(count)]
    times = np.full(count + 1, data.times[-1] + 1)
    return Plan(times, [*rows, slice(0, len(data.train))], fold, cross_fit)
