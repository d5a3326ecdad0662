"""Groups of samples that share one packed sequence: one user, one CF fit, and one window start
or one stream of answered lines."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor, Request, window_start


@dataclass
class Group(Request):
    """Samples of one user that share a history window, or a stream, and one fit of the CF vectors:
    a request with labels.

    Attributes:
        rows: row of each sample in its split.
        fit: which fit of the CF vectors all samples see; -1 is the last, on all rows.
    """

    rows: list[int] = field(default_factory=list)
    fit: int = -1


def check_histories(split: datasets.Dataset, wanted: str) -> None:
    """Refuse a split whose histories hold likes where a model reads signed ones, or vice versa."""
    stored = "signed" if "history_labels" in split.column_names else "likes"
    if wanted != stored:
        raise InputError(
            f"this model reads histories of {wanted}, but the data was prepared with {stored}: "
            f"prepare it with --histories {wanted}"
        )


def group_split(
    split: datasets.Dataset,
    processor: CCFLLMProcessor,
    max_candidates: int = 64,
    cf_fits: Sequence[int] | None = None,
    lines: Mapping[str, list[Any]] | None = None,
) -> list[Group]:
    """A split's rows as groups of the processor's window, each candidate with its evidence.

    Args:
        split: a prepared split.
        processor: whose window, evidence and histories are meant.
        max_candidates, cf_fits: see `group_rows`.
        lines: the whole histories of users, where those of the split are frozen (`frozen_lines`);
            default the histories as the split stores them.

    Raises:
        InputError: the split holds other histories than the processor reads.
    """
    check_histories(split, processor.histories)
    groups = group_rows(
        split,
        history_window=processor.history_window,
        cf_fits=cf_fits,
        max_candidates=max_candidates,
        fold_in_items=processor.fold_in_items,
    )
    for group in groups if processor.evidence_fields else []:
        before = group.earlier
        if lines is not None:
            of_user = lines.get(str(group.user), [])
            before = of_user[: len(of_user) - len(group.history)]
        group.evidence = processor.evidence(before, group.candidates)
    return groups


def frozen_lines(train: datasets.Dataset) -> dict[str, list[dict[str, Any]]]:
    """Every user's training rows as items of a history, in their order: what rows of validation and
    test may see where histories are frozen."""
    table = _read(train)
    stored, dropped = _lengths(table)
    frame = table.select(["user_id", "item_id", "label"]).to_pandas()
    frame = frame.iloc[np.lexsort((stored + dropped, frame["user_id"]))]
    lines: dict[str, list[dict[str, Any]]] = {}
    for user, item, label in frame.itertuples(index=False):
        lines.setdefault(user, []).append({"id": item, "liked": label})
    return lines


def group_rows(
    split: datasets.Dataset,
    history_window: tuple[int, int],
    cf_fits: Sequence[int] | None = None,
    max_candidates: int = 64,
    fold_in_items: int = 0,
) -> list[Group]:
    """Cut a split into groups; every row is in exactly one.

    Args:
        split: rows with user_id, item_id, label, history, and history_labels if it is signed.
        history_window: `(H, S)`, see `processing_ccf_llm.window_start`.
        cf_fits: CF fit per row; default the last for all.
        max_candidates: samples a group holds at most; 1 gives one row a sample.
        fold_in_items: length of `earlier`, at most; what is not stored is left out.

    Returns:
        Groups in order of their first row.

    Raises:
        InputError: the split stores histories that are too short for the window.
    """
    table = _read(split)
    earlier, starts, stored = _windows(table, history_window)
    fits = np.full(len(table), -1) if cf_fits is None else np.asarray(cf_fits)
    users, user_names = _coded(table["user_id"])
    items, item_names = _coded(table["item_id"])
    parts = _parts([users, starts, fits], earlier, max_candidates)
    last = np.array([part[-1] for part in parts], dtype=np.int64)
    shown = (starts - stored)[last]
    unshown = np.minimum(shown, fold_in_items)
    histories = _histories(table, last, shown - unshown)
    labels = table["label"].to_numpy()
    return [
        Group(
            user=user_names[users[part[0]]],
            history=history[before:],
            candidates=item_names[items[part]].tolist(),
            history_lengths=(earlier[part] - starts[part]).tolist(),
            labels=labels[part].tolist(),
            rows=part.tolist(),
            fit=int(fits[part[0]]),
            earlier=history[:before],
        )
        for part, history, before in zip(parts, histories, unshown.tolist(), strict=True)
    ]


def group_streams(
    split: datasets.Dataset,
    lines: int = 48,
    cf_fits: Sequence[int] | None = None,
    fold_in_items: int = 0,
    topics: Sequence[Any] | None = None,
) -> list[Group]:
    """Cut a split into streams of answered lines; every row is a line, and a label, of exactly one.

    A user's rows stand in the order of the data, rows equal in time one after the other; with
    `topics` those of one topic stand together, which is for data whose order means nothing.

    Args:
        split: rows with user_id, item_id, label, history and history_labels.
        lines: lines a stream holds at most; a user with more rows has several, which do not see
            each other.
        cf_fits: CF fit per row; default the last for all. A stream has one: that of its
            rows, or the last if they differ.
        fold_in_items: length of `earlier`, at most; what is not stored is left out.
        topics: what each row is about, an author for example. Lines then have labels alone.

    Returns:
        Groups in order of their first row.
    """
    table = _read(split)
    stored, dropped = _lengths(table)
    order = stored + dropped
    if topics is not None:
        order = _order_by_topic(table["user_id"], topics, order)
    fits = np.full(len(table), -1) if cf_fits is None else np.asarray(cf_fits)
    users, user_names = _coded(table["user_id"])
    items = table["item_id"].to_numpy()
    labels = table["label"].to_numpy()

    def labeled(runs: list[np.ndarray]) -> list[list[Any]]:
        values = [labels[run].tolist() for run in runs]
        return _with_values([items[run].tolist() for run in runs], "liked", values)

    parts = _parts([users], order, lines)
    histories = labeled(parts)
    first, last = (np.array([part[end] for part in parts], dtype=np.int64) for end in (0, -1))
    if topics is None:
        unshown = np.minimum(stored[first], fold_in_items)
        earlier = _histories(table, first, stored[first] - unshown)
        # A row's own rating stands in the histories of later rows alone.
        counts = [int((order[part] < order[part[-1]]).sum()) for part in parts]
        rated = _histories(table, last, np.maximum(stored[last] - counts, 0))
        histories = [_with_ratings(*known) for known in zip(histories, rated, counts, strict=True)]
    else:
        in_order = np.lexsort((order, users))
        ends = np.searchsorted(users[in_order], users[first]) + order[first]
        starts = ends - np.minimum(order[first], fold_in_items)
        earlier = labeled([in_order[a:b] for a, b in zip(starts, ends, strict=True)])
    shared = [fits[part[0]] if len(set(fits[part])) == 1 else None for part in parts]
    if None in shared:
        warnings.warn(
            f"{shared.count(None)} of {len(parts)} streams have rows of several CF fits: they see "
            "the last fit, which knows their labels; fit with cross_fit=users",
            stacklevel=2,
        )
    return [
        Group(
            user=user_names[users[part[0]]],
            history=history,
            labels=labels[part].tolist(),
            rows=part.tolist(),
            fit=-1 if fit is None else int(fit),
            earlier=before,
            stream=True,
        )
        for part, history, fit, before in zip(parts, histories, shared, earlier, strict=True)
    ]


def _order_by_topic(users: pa.ChunkedArray, topics: Sequence[Any], order: np.ndarray) -> np.ndarray:
    """An order of each user's rows in which a topic's rows follow its first one."""
    frame = pd.DataFrame({"user": users.to_pandas(), "topic": list(topics)})
    frame["place"] = np.argsort(np.argsort(order, kind="stable"))
    frame["first"] = frame.groupby(["user", "topic"])["place"].transform("min")
    ranked = frame.sort_values(["first", "place"])
    return ranked.groupby("user").cumcount().sort_index().to_numpy()


def _with_ratings(history: list[Any], rated: list[Any], count: int) -> list[Any]:
    """Lines of a stream, the first `count` as later rows know them, as far as these store them."""
    start = count - len(rated)
    pairs = zip(history[start:count], rated, strict=True)
    known = [later if later["id"] == line["id"] else line for line, later in pairs]
    return [*history[:start], *known, *history[count:]]


def _read(split: datasets.Dataset) -> pa.Table:
    names = ["user_id", "item_id", "label", "history"]
    optional = ("history_dropped", "history_labels", "history_ratings")
    names += [name for name in optional if name in split.column_names]
    return split.select_columns(names).with_format("arrow")[:]


def _histories(table: pa.Table, rows: np.ndarray, skip: np.ndarray) -> list[list[Any]]:
    """As `history_tails`, of the histories' items, with their ratings or labels if there are."""
    histories = history_tails(table["history"], rows, skip)
    for column, key in (("history_ratings", "rating"), ("history_labels", "liked")):
        if column in table.column_names:
            return _with_values(histories, key, history_tails(table[column], rows, skip))
    return histories


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
    lengths, stored = _lengths(table)
    earlier = lengths + stored
    starts = window_start(earlier, history_window)
    if (starts < stored).any():
        raise InputError(
            f"the data stores the {lengths.max()} latest items of a history, but the window "
            f"{history_window} shows up to {sum(history_window) - 1}: prepare it again with a "
            "larger --max-history"
        )
    return earlier, starts, stored


def _lengths(table: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Per row: how many items its history stores, and how many it leaves out before them."""
    lengths = pc.list_value_length(table["history"]).to_numpy().astype(np.int64)
    if "history_dropped" in table.column_names:
        return lengths, table["history_dropped"].to_numpy()
    return lengths, np.zeros_like(lengths)


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
