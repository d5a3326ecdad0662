"""Groups of samples that share one packed sequence: one user, one window start, one CF snapshot."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.processing_ccf_llm import Request, window_start


@dataclass
class Group(Request):
    """Samples of one user that share a history window and a CF snapshot: a request with labels.

    Attributes:
        rows: row of each sample in its split.
        snapshot: CF snapshot of all samples; -1 is the last.
    """

    rows: list[int] = field(default_factory=list)
    snapshot: int = -1


def check_histories(split: datasets.Dataset, wanted: str) -> None:
    """Refuse a split whose histories hold likes where a model reads signed ones, or vice versa."""
    stored = "signed" if "history_labels" in split.column_names else "likes"
    if wanted != stored:
        raise InputError(
            f"this model reads histories of {wanted}, but the data was prepared with {stored}: "
            f"prepare it with --histories {wanted}"
        )


def group_rows(
    split: datasets.Dataset,
    history_window: tuple[int, int],
    cf_snapshots: Sequence[int] | None = None,
    max_candidates: int = 64,
    fold_in_items: int = 0,
) -> list[Group]:
    """Cut a split into groups; every row is in exactly one.

    Args:
        split: rows with user_id, item_id, label, history, and history_labels if it is signed.
        history_window: `(H, S)`, see `processing_ccf_llm.window_start`.
        cf_snapshots: CF snapshot per row; default the last for all.
        max_candidates: samples a group holds at most; 1 gives one row a sample.
        fold_in_items: length of `earlier`, at most; what is not stored is left out.

    Returns:
        Groups in order of their first row.

    Raises:
        InputError: the split stores histories that are too short for the window.
    """
    names = ["user_id", "item_id", "label", "history"]
    optional = ("history_dropped", "history_labels", "history_ratings")
    names += [name for name in optional if name in split.column_names]
    table = split.select_columns(names).with_format("arrow")[:]
    earlier, starts, stored = _windows(table, history_window)
    snapshots = np.full(len(table), -1) if cf_snapshots is None else np.asarray(cf_snapshots)
    users, user_names = _coded(table["user_id"])
    items, item_names = _coded(table["item_id"])
    parts = _parts([users, starts, snapshots], earlier, max_candidates)
    last = np.array([part[-1] for part in parts], dtype=np.int64)
    shown = (starts - stored)[last]
    unshown = np.minimum(shown, fold_in_items)
    histories = history_tails(table["history"], last, shown - unshown)
    for column, key in (("history_ratings", "rating"), ("history_labels", "liked")):
        if column in table.column_names:
            values = history_tails(table[column], last, shown - unshown)
            histories = _with_values(histories, key, values)
            break
    labels = table["label"].to_numpy()
    return [
        Group(
            user=user_names[users[part[0]]],
            history=history[before:],
            candidates=item_names[items[part]].tolist(),
            history_lengths=(earlier[part] - starts[part]).tolist(),
            labels=labels[part].tolist(),
            rows=part.tolist(),
            snapshot=int(snapshots[part[0]]),
            earlier=history[:before],
        )
        for part, history, before in zip(parts, histories, unshown.tolist(), strict=True)
    ]


def _with_values(histories: list[list[Any]], key: str, values: list[list[Any]]) -> list[list[Any]]:
    """Items as dicts with a value each; equal ones share a dict, since they occur in many rows."""
    shared: dict[tuple[str, float], dict[str, Any]] = {}
    return [
        [
            shared.setdefault((item, value), {"id": item, key: value})
            for item, value in zip(items, of_items, strict=True)
        ]
        for items, of_items in zip(histories, values, strict=True)
    ]


def _windows(
    table: pa.Table, history_window: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per row: how many items are earlier, the first one that the window shows, and the first one
    that is stored."""
    lengths = pc.list_value_length(table["history"]).to_numpy().astype(np.int64)
    stored = np.zeros_like(lengths)
    if "history_dropped" in table.column_names:
        stored = table["history_dropped"].to_numpy()
    earlier = lengths + stored
    starts = window_start(earlier, history_window)
    if (starts < stored).any():
        raise InputError(
            f"the data stores the {lengths.max()} latest items of a history, but the window "
            f"{history_window} shows up to {sum(history_window) - 1}: prepare it again with a "
            "larger --max-history"
        )
    return earlier, starts, stored


def _coded(column: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Ids as codes `(n,)`, and the ids behind them as one string object each, to be shared."""
    codes, names = pd.factorize(column.to_pandas())
    return codes, np.asarray(names, dtype=object)


def _parts(keys: list[np.ndarray], order_by: np.ndarray, most: int) -> list[np.ndarray]:
    """Rows cut into parts of equal keys and at most `most` rows, each sorted by `order_by`; the
    parts in order of their first row."""
    order = np.lexsort((order_by, *keys))
    if not len(order):
        return []
    new = np.ones(len(order), dtype=bool)
    new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    place = np.arange(len(order))
    within = place - np.maximum.accumulate(np.where(new, place, 0))
    starts = np.flatnonzero(within % most == 0)
    ends = np.append(starts[1:], len(order))
    by_row = np.argsort(order[starts])
    return [order[a:b] for a, b in zip(starts[by_row], ends[by_row], strict=True)]


def history_tails(column: pa.ChunkedArray, rows: np.ndarray, skip: np.ndarray) -> list[list[Any]]:
    """The history of each of `rows` without its first `skip` items.

    Args:
        column: lists of item ids, or of labels, none of them null.
        rows: `(n,)`, which.
        skip: `(n,)`, items to leave out at the beginning.
    """
    # Chunk by chunk: all histories together may be longer than one array can be.
    found: list[list[Any]] = [[] for _ in rows]
    order = np.argsort(rows)
    first = 0
    for chunk in column.chunks:
        inside = np.searchsorted(rows[order], [first, first + len(chunk)])
        which = order[slice(*inside)]
        offsets = chunk.offsets.to_numpy()
        starts = offsets[rows[which] - first] + skip[which]
        lengths = offsets[rows[which] - first + 1] - starts
        ends = np.cumsum(lengths)
        if len(ends) and ends[-1]:
            flat = np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1])
            codes, names = _coded(chunk.values.take(pa.array(flat)))
            items = names[codes].tolist()
            for place, end, length in zip(which, ends.tolist(), lengths.tolist(), strict=True):
                found[place] = items[end - length : end]
        first += len(chunk)
    return found


def sample_group(groups: list[Group], max_labels: int, order: Sequence[int]) -> list[Group]:
    """Whole groups in `order` until `max_labels` labels are reached; 0 keeps all."""
    if not max_labels:
        return groups
    chosen, labels = [], 0
    for index in order:
        if labels >= max_labels:
            break
        chosen.append(groups[index])
        labels += len(groups[index].rows)
    return chosen
