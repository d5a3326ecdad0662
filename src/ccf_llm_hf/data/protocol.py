"""Labels, splits and histories: what turns a log of interactions into CTR samples.

Pure functions of arrays. Nothing here looks at a file.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pyarrow as pa

from ccf_llm_hf.data.hashing import Ids, hash_pairs
from ccf_llm_hf.errors import InputError

SPLITS = ("train", "validation", "test")
CHUNK_ROWS = 1 << 16
CHUNK_HISTORY = 1 << 21


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


def split_by_ratio(timestamps: np.ndarray, ratios: list[float]) -> TimeSplit:
    """Boundaries that cut the time-ordered rows in the given shares.

    Rows that are equal in time stay together, in the later split.

    Raises:
        InputError: not three positive shares that add up to 1.
    """
    _check_ratios(ratios)
    ordered = np.sort(timestamps)
    # Rounded, not cut: 0.8 + 0.1 is a little less than 0.9 in floating point.
    at = [round(len(ordered) * share) for share in (ratios[0], ratios[0] + ratios[1])]
    valid_start, test_start = (int(ordered[min(i, len(ordered) - 1)]) for i in at)
    return TimeSplit(valid_start, test_start)


def split_at_random(
    users: Ids, items: Ids, ratios: list[float], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Splits for data without times, and an order that stands for time.

    A hash of the pair and the seed decides, so that neither depends on the order of the file.

    Args:
        users: n raw ids.
        items: n raw ids; a pair occurs once.
        ratios: chances of train, validation and test.
        seed: another one gives another split and another order.

    Returns:
        The split of each row, 0, 1 or 2, `(n,)` int8; and its position among its user's rows from
        0, `(n,)` int64: training rows in random order, then those of validation, then of test.

    Raises:
        InputError: not three positive shares that add up to 1.
    """
    _check_ratios(ratios)
    drawn = hash_pairs(users, items, f"split {seed}") / 2.0**64
    bounds = np.array([ratios[0], ratios[0] + ratios[1]])
    split = np.searchsorted(bounds, drawn, side="right").astype(np.int8)
    codes = pd.factorize(np.asarray(users, dtype=object))[0]
    order = np.lexsort((hash_pairs(users, items, f"order {seed}"), split, codes))
    position = np.empty(len(codes), dtype=np.int64)
    position[order] = np.arange(len(codes)) - _find_run_starts(codes[order])
    return split, position


def _check_ratios(ratios: list[float]) -> None:
    if len(ratios) != 3 or min(ratios) <= 0 or abs(sum(ratios) - 1) > 1e-6:
        raise InputError(f"--ratios must be three positive numbers that add up to 1, not {ratios}")


@dataclass
class Samples:
    """Rows that belong to a split, ordered by user, time, item; every array is `(rows,)`.

    `user` and `item` are indices into `user_names` and `item_names`. The history of row i is
    `earlier[history_start[i]:history_stop[i]]`, indices into `item_names`, with the labels in
    `earlier_labels` and ratings in `earlier_ratings` at the same places; None where histories hold
    likes only, or there are no ratings. `history_dropped`
    counts the earlier items that are not stored; None when histories are whole.
    """

    user: np.ndarray
    item: np.ndarray
    label: np.ndarray
    timestamp: np.ndarray
    split: np.ndarray
    split_position: np.ndarray
    not_cold: np.ndarray
    earlier: np.ndarray
    earlier_labels: np.ndarray | None
    earlier_ratings: np.ndarray | None
    history_start: np.ndarray
    history_stop: np.ndarray
    history_dropped: np.ndarray | None
    user_names: pa.Array
    item_names: pa.Array

    def tables(self, split: str) -> Iterator[pa.Table]:
        """The split as arrow tables of at most CHUNK_ROWS rows and about CHUNK_HISTORY history
        items, in order."""
        rows = np.flatnonzero(self.split == SPLITS.index(split))
        items = np.cumsum(self.history_stop[rows] - self.history_start[rows])
        start = 0
        while start < len(rows):
            before = items[start - 1] if start else 0
            end = int(np.searchsorted(items, before + CHUNK_HISTORY, side="right"))
            end = min(max(end, start + 1), start + CHUNK_ROWS)
            yield self._table(rows[start:end])
            start = end

    def _table(self, rows: np.ndarray) -> pa.Table:
        start = self.history_start[rows]
        lengths = self.history_stop[rows] - start
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        flat = np.repeat(start - offsets[:-1], lengths) + np.arange(offsets[-1])
        history = pa.ListArray.from_arrays(
            pa.array(offsets, pa.int32()), self.item_names.take(pa.array(self.earlier[flat]))
        )
        columns = {
            "user_id": self.user_names.take(pa.array(self.user[rows])),
            "item_id": self.item_names.take(pa.array(self.item[rows])),
            "label": pa.array(self.label[rows], pa.int64()),
            "timestamp": pa.array(self.timestamp[rows], pa.int64()),
            "history": history,
            "split_position": pa.array(self.split_position[rows], pa.int64()),
            "not_cold": pa.array(self.not_cold[rows], pa.bool_()),
        }
        for name, values, kind in (
            ("history_labels", self.earlier_labels, pa.int8()),
            ("history_ratings", self.earlier_ratings, pa.float32()),
        ):
            if values is not None:
                columns[name] = pa.ListArray.from_arrays(
                    pa.array(offsets, pa.int32()), pa.array(values[flat], kind)
                )
        if self.history_dropped is not None:
            columns["history_dropped"] = pa.array(self.history_dropped[rows], pa.int64())
        return pa.table(columns)


def build_samples(
    interactions: pd.DataFrame,
    max_history: int | None = None,
    *,
    signed: bool = False,
    frozen: bool = False,
    ties: str = "item",
) -> Samples:
    """Order the rows of all splits by user and attach to each its history.

    `interactions` holds every accepted row in the order of the ratings file, with columns user_id,
    item_id, timestamp (with its fraction, which is stored cut to seconds), label (0/1) and split
    (int8, -1 for none). Users come in order of first appearance in the file; a user's rows by time,
    ties by first appearance of the item in the file or, with `ties="file"`, as they stand in it.
    The history of a row is the items of the user's earlier rows (in that order) with label 1,
    oldest first, carried across splits; rows outside the splits do not count (this, with that order
    of ties, gives CoLLM's published ML-1M files row for row). With `signed` it is all items of the
    user's rows at earlier times, those outside the splits too, with their labels (our choice; rows
    equal in time are given at once and do not see each other's labels). With `frozen` no history
    holds a row of validation or test. `max_history` keeps the latest ones only, and counts the
    others in `history_dropped`.
    """
    user, user_names = encode_ids(interactions["user_id"])
    item, item_names = encode_ids(interactions["item_id"])
    order = order_in_time(interactions, ties, users_first=True)
    user, item = user[order], item[order]
    label, timestamp, split = (
        interactions[name].to_numpy()[order] for name in ("label", "timestamp", "split")
    )

    shown = np.ones(len(user), dtype=bool) if signed else (label == 1) & (split >= 0)
    if frozen:
        shown &= split <= 0
    earlier, earlier_labels = item[shown], label[shown] if signed else None
    ratings = None
    if signed and "rating" in interactions and interactions["rating"].notna().all():
        ratings = interactions["rating"].to_numpy()[order][shown]
    stop = np.cumsum(shown) - shown
    start, dropped = stop[_find_run_starts(user)], None
    if signed:
        stop = stop[np.maximum(_find_run_starts(user), _find_run_starts(timestamp))]
    if max_history is not None:
        whole, start = start, np.maximum(start, stop - max_history)
        dropped = start - whole
    inside = split >= 0
    user, item, label, timestamp, split, start, stop = (
        values[inside] for values in (user, item, label, timestamp, split, start, stop)
    )
    dropped = None if dropped is None else dropped[inside]

    seen = [np.bincount(ids[split == 0], minlength=ids.max(initial=0) + 1) for ids in (user, item)]
    return Samples(
        user=user,
        item=item,
        label=label,
        timestamp=np.floor(timestamp).astype(np.int64),
        split=split,
        # Time grows along a user's rows, so the rows of a split are one run.
        split_position=np.arange(len(user)) - _find_run_starts(user * len(SPLITS) + split),
        not_cold=(seen[0][user] > 0) & (seen[1][item] > 0),
        earlier=earlier,
        earlier_labels=earlier_labels,
        earlier_ratings=ratings,
        history_start=start,
        history_stop=stop,
        history_dropped=dropped,
        user_names=user_names,
        item_names=item_names,
    )


def order_in_time(rows: pd.DataFrame, ties: str, users_first: bool = False) -> np.ndarray:
    """Places `(n,)` that sort rows by time, then user, or by user, then time; see `build_samples`
    for equal ones."""
    user, item = (pd.factorize(rows[side])[0] for side in ("user_id", "item_id"))
    tie = np.arange(len(rows)) if ties == "file" else item
    time = rows["timestamp"].to_numpy()
    return np.lexsort((tie, time, user) if users_first else (tie, user, time))


def encode_ids(ids: pd.Series) -> tuple[np.ndarray, pa.Array]:
    """Ids as codes `(n,)` in order of first appearance, and the ids behind the codes."""
    codes, names = pd.factorize(ids)
    return codes, pa.array(names.astype("str"), pa.string())


def _find_run_starts(values: np.ndarray) -> np.ndarray:
    """For each place, the first place of the run of equal values that it is in."""
    new = np.ones(len(values), dtype=bool)
    new[1:] = values[1:] != values[:-1]
    return np.maximum.accumulate(np.where(new, np.arange(len(values)), 0))


def describe_splits(samples: Samples, has_times: bool = True) -> dict[str, dict]:
    """Per split: rows, users, items, positive rate, cold-start shares and, of data with times, the
    time span.

    Raises:
        InputError: a split has no rows.
    """
    statistics: dict[str, dict[str, float]] = {}
    for code, name in enumerate(SPLITS):
        rows = samples.split == code
        if not rows.any():
            raise InputError(f"the {name} split has no rows: move the split's boundaries")
        statistics[name] = {"rows": int(rows.sum())}
        unseen: dict[str, float] = {}
        for side, ids in (("user", samples.user), ("item", samples.item)):
            counts = np.bincount(ids[samples.split == 0], minlength=ids.max() + 1)
            statistics[name][f"{side}s"] = int(np.count_nonzero(np.bincount(ids[rows])))
            unseen[f"unseen_{side}_rate"] = float((counts[ids[rows]] == 0).mean())
        statistics[name] |= {
            "positive_rate": float(samples.label[rows].mean()),
            **unseen,
            "not_cold_rows": int(samples.not_cold[rows].sum()),
        }
        if has_times:
            times = samples.timestamp[rows]
            statistics[name] |= {
                "first_timestamp": int(times.min()),
                "last_timestamp": int(times.max()),
            }
    return statistics
