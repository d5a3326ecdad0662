"""Labels, temporal splits and histories: what turns a log of interactions into CTR samples.

Pure functions of arrays. Nothing here looks at a file.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from ccf_llm_hf.errors import InputError

SPLITS = ("train", "validation", "test")
CHUNK_ROWS = 4096


@dataclass(frozen=True)
class TimeSplit:
    """Boundaries in Unix seconds: train is [train_start, valid_start), test ends before `end`.

    A row before `train_start` or from `end` on belongs to no split.
    """

    valid_start: int
    test_start: int
    train_start: int | None = None
    end: int | None = None

    def assign(self, timestamps: np.ndarray) -> np.ndarray:
        """Split of each row: 0, 1, 2 for train, validation, test; -1 for none. (n,) int8."""
        bounds = np.array([self.valid_start, self.test_start])
        split = np.searchsorted(bounds, timestamps, side="right").astype(np.int8)
        if self.train_start is not None:
            split[timestamps < self.train_start] = -1
        if self.end is not None:
            split[timestamps >= self.end] = -1
        return split


def ratio_split(timestamps: np.ndarray, ratios: list[float]) -> TimeSplit:
    """Boundaries that cut the time-ordered rows in the given shares.

    Rows that are equal in time stay together, in the later split.

    Raises:
        InputError: not three positive shares that add up to 1.
    """
    if len(ratios) != 3 or min(ratios) <= 0 or abs(sum(ratios) - 1) > 1e-6:
        raise InputError(f"--ratios must be three positive numbers that add up to 1, not {ratios}")
    ordered = np.sort(timestamps)
    # Rounded, not cut: 0.8 + 0.1 is a little less than 0.9 in floating point.
    at = [round(len(ordered) * share) for share in (ratios[0], ratios[0] + ratios[1])]
    valid_start, test_start = (int(ordered[min(i, len(ordered) - 1)]) for i in at)
    return TimeSplit(valid_start, test_start)


@dataclass
class Samples:
    """Rows that belong to a split, ordered by user, time, item.

    `rows` has columns user_id, item_id, label, timestamp, split (int8), split_position, not_cold.
    The history of row i is `positives[history_start[i]:history_stop[i]]`, indices into
    `item_names`.
    """

    rows: pd.DataFrame
    positives: np.ndarray
    history_start: np.ndarray
    history_stop: np.ndarray
    item_names: pa.Array

    def tables(self, split: str) -> Iterator[pa.Table]:
        """The split as arrow tables of at most CHUNK_ROWS rows, in order."""
        rows = np.flatnonzero(self.rows["split"].to_numpy() == SPLITS.index(split))
        for start in range(0, len(rows), CHUNK_ROWS):
            yield self._table(rows[start : start + CHUNK_ROWS])

    def _table(self, rows: np.ndarray) -> pa.Table:
        start = self.history_start[rows]
        lengths = self.history_stop[rows] - start
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.repeat(start - offsets[:-1], lengths) + np.arange(offsets[-1])
        history = pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), self.item_names.take(pa.array(self.positives[flat]))
        )
        frame = self.rows.iloc[rows]
        return pa.table(
            {
                "user_id": pa.array(frame["user_id"], pa.string()),
                "item_id": pa.array(frame["item_id"], pa.string()),
                "label": pa.array(frame["label"], pa.int64()),
                "timestamp": pa.array(frame["timestamp"], pa.int64()),
                "history": history,
                "split_position": pa.array(frame["split_position"], pa.int64()),
                "not_cold": pa.array(frame["not_cold"], pa.bool_()),
            }
        )


def build_samples(interactions: pd.DataFrame, max_history: int | None = None) -> Samples:
    """Order the rows of all splits by user and attach to each its history.

    `interactions` holds every accepted row in the order of the ratings file, with columns user_id,
    item_id, timestamp, label (0/1) and split (int8, -1 for none). Users come in order of first
    appearance in the file; a user's rows by time, ties by first appearance of the item in the file.
    The history of a row is the items of the user's earlier rows (in that order) with label 1,
    oldest first, carried across splits; rows outside the splits do not count (this, with that order
    of ties, gives CoLLM's published ML-1M files row for row). `max_history` keeps the latest ones
    only.
    """
    user, _ = pd.factorize(interactions["user_id"])
    item, names = pd.factorize(interactions["item_id"])
    order = np.lexsort((item, interactions["timestamp"].to_numpy(), user))
    order = order[interactions["split"].to_numpy()[order] >= 0]
    rows = interactions.iloc[order].reset_index(drop=True)
    user, item = user[order], item[order]

    liked = rows["label"].to_numpy() == 1
    stop = np.cumsum(liked) - liked
    first_of_user = np.flatnonzero(np.diff(user, prepend=-1))
    start = np.repeat(stop[first_of_user], np.diff(first_of_user, append=len(user)))
    if max_history is not None:
        start = np.maximum(start, stop - max_history)

    train = rows["split"].to_numpy() == 0
    rows["split_position"] = rows.groupby([user, rows["split"]]).cumcount()
    rows["not_cold"] = np.isin(user, user[train]) & np.isin(item, item[train])
    return Samples(rows, item[liked], start, stop, pa.array(names, pa.string()))


def split_statistics(samples: Samples) -> dict[str, dict]:
    """Per split: rows, users, items, positive rate, cold-start shares and the time span.

    Raises:
        InputError: a split has no rows.
    """
    train = samples.rows[samples.rows["split"] == 0]
    statistics = {}
    for code, name in enumerate(SPLITS):
        rows = samples.rows[samples.rows["split"] == code]
        if rows.empty:
            raise InputError(f"the {name} split has no rows: move the split's boundaries")
        statistics[name] = {
            "rows": len(rows),
            "users": int(rows["user_id"].nunique()),
            "items": int(rows["item_id"].nunique()),
            "positive_rate": float(rows["label"].mean()),
            "unseen_user_rate": float((~rows["user_id"].isin(train["user_id"])).mean()),
            "unseen_item_rate": float((~rows["item_id"].isin(train["item_id"])).mean()),
            "not_cold_rows": int(rows["not_cold"].sum()),
            "first_timestamp": int(rows["timestamp"].min()),
            "last_timestamp": int(rows["timestamp"].max()),
        }
    return statistics
