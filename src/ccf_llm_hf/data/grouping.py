"""Groups of samples that share one packed sequence: one user, one CF fit, and one window start
or one stream of answered lines.

Groups are index ranges over a split's arrays; each becomes a `Group` when it is asked for, so that
millions of rows are no objects, and a dataloader's workers share them.
"""

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Self, overload

import datasets
import numpy as np
import pandas as pd

from ccf_llm_hf.data.rows import Histories, Rows, Runs, spread
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor, Request, window_start

PART_GROUPS = 1 << 14  # their histories as objects take some 100 MB


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


@dataclass
class Groups(Sequence[Group]):
    """Groups of a split's rows, each made when it is asked for.

    Attributes:
        split: the rows.
        rows: row numbers, group after group.
        offsets: `(groups + 1,)`, where each group begins in `rows`, and the end.
        fits: CF fit of each group.
        chosen: numbers of the groups that these are, in their order.
    """

    split: Rows
    rows: np.ndarray
    offsets: np.ndarray
    fits: np.ndarray
    chosen: np.ndarray

    @property
    def sizes(self) -> np.ndarray:
        """`(len,)` samples of each group."""
        return np.diff(self.offsets)[self.chosen]

    @property
    def labels(self) -> np.ndarray:
        """Labels of all samples, group after group."""
        sizes = self.sizes
        return self.split.labels[self.rows[spread(self.offsets[self.chosen], sizes)]]

    @property
    def users(self) -> np.ndarray:
        """`(len,)` user of each group, as a code of the split's."""
        return self.split.users[self.rows[self.offsets[self.chosen]]]

    def take(self, places: Sequence[int] | np.ndarray) -> Self:
        """Some of the groups, in the order of `places`."""
        return replace(self, chosen=self.chosen[np.asarray(places, dtype=np.int64)])

    def parts(self, size: int = PART_GROUPS) -> Iterator[list[Group]]:
        """The groups as lists of `size`, the last one shorter."""
        return (self[start : start + size] for start in range(0, len(self), size))

    def __len__(self) -> int:
        return len(self.chosen)

    @overload
    def __getitem__(self, place: int) -> Group: ...
    @overload
    def __getitem__(self, place: slice) -> list[Group]: ...
    def __getitem__(self, place: int | slice) -> Group | list[Group]:
        if isinstance(place, slice):
            return [self._make(number) for number in self.chosen[place].tolist()]
        return self._make(int(self.chosen[place]))

    @abstractmethod
    def _make(self, number: int) -> Group:
        """The group of this number."""


@dataclass
class CandidateGroups(Groups):
    """Groups whose samples are candidates after a shared history.

    Attributes:
        histories: of each group, the items that are folded in only and those that are shown.
        unshown: how many of these are folded in only.
        lengths: how many items of the shown each sample sees, in the order of `rows`.
        evidence: of the candidates of a group; None: there is none.
    """

    histories: Runs
    unshown: np.ndarray
    lengths: np.ndarray
    evidence: Callable[[Group], list[list[Any]]] | None = None

    def _make(self, number: int) -> Group:
        part = slice(self.offsets[number], self.offsets[number + 1])
        rows, split = self.rows[part], self.split
        history, unshown = self.histories[number], int(self.unshown[number])
        group = Group(
            user=split.user_names[split.users[rows[0]]],
            history=history[unshown:],
            candidates=split.item_names[split.items[rows]].tolist(),
            history_lengths=self.lengths[part].tolist(),
            labels=split.labels[rows].tolist(),
            rows=rows.tolist(),
            fit=int(self.fits[number]),
            earlier=history[:unshown],
        )
        if self.evidence is not None:
            group.evidence = self.evidence(group)
        return group


@dataclass
class Streams(Groups):
    """Groups whose samples are the lines of a stream.

    Attributes:
        earlier: of each stream, the items before its first line that are folded in.
        ratings: of each line, in the order of `rows`, NaN where later rows know the label alone;
            None where there are no ratings.
        hidden: `(streams,)` bool, whose dislikes are hidden; None: nobody's.
    """

    earlier: Runs
    ratings: np.ndarray | None = None
    hidden: np.ndarray | None = None

    def _make(self, number: int) -> Group:
        part = slice(self.offsets[number], self.offsets[number + 1])
        rows, split = self.rows[part], self.split
        labels = split.labels[rows].tolist()
        items = split.item_names[split.items[rows]].tolist()
        lines = [{"id": i, "liked": label} for i, label in zip(items, labels, strict=True)]
        if self.ratings is not None:
            ratings = self.ratings[part]
            for place in np.flatnonzero(~np.isnan(ratings)).tolist():
                lines[place] = {"id": items[place], "rating": float(ratings[place])}
        hides = self.hidden is not None and self.hidden[number]
        return Group(
            user=split.user_names[split.users[rows[0]]],
            history=lines,
            labels=labels,
            rows=rows.tolist(),
            fit=int(self.fits[number]),
            earlier=self.earlier[number],
            stream=True,
            hidden=[not label for label in labels] if hides else None,
        )


def check_histories(split: datasets.Dataset | Rows, wanted: str) -> None:
    """Refuse a split whose histories hold likes where a model reads signed ones, or vice versa."""
    stored = "signed" if "history_labels" in split.column_names else "likes"
    if wanted != stored:
        raise InputError(
            f"this model reads histories of {wanted}, but the data was prepared with {stored}: "
            f"prepare it with --histories {wanted}"
        )


def group_split(
    split: datasets.Dataset | Rows,
    processor: CCFLLMProcessor,
    max_candidates: int = 64,
    cf_fits: Sequence[int] | np.ndarray | None = None,
    lines: Mapping[str, list[Any]] | None = None,
) -> Groups:
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
    if processor.evidence_fields:
        groups.evidence = partial(_find_evidence, processor, lines)
    return groups


def _find_evidence(
    processor: CCFLLMProcessor, lines: Mapping[str, list[Any]] | None, group: Group
) -> list[list[Any]]:
    before = group.earlier
    if lines is not None:
        of_user = lines.get(str(group.user), [])
        before = of_user[: len(of_user) - len(group.history)]
    return processor.evidence(before, group.candidates)


def frozen_lines(train: datasets.Dataset | Rows) -> Histories:
    """Every user's training rows as items of a history, in their order: what rows of validation and
    test may see where histories are frozen."""
    rows = Rows.of(train)
    order = np.argsort(rows.order, kind="stable")
    return Histories(
        rows.users[order],
        rows.user_names,
        rows.items[order],
        rows.item_names,
        "liked",
        rows.labels[order],
    )


def group_rows(
    split: datasets.Dataset | Rows,
    history_window: tuple[int, int],
    cf_fits: Sequence[int] | np.ndarray | None = None,
    max_candidates: int = 64,
    fold_in_items: int = 0,
) -> CandidateGroups:
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
    split = Rows.of(split)
    starts = _find_windows(split, history_window)
    fits = _read_fits(cf_fits, len(split))
    rows, offsets = _cut([split.users, starts, fits], split.order, max_candidates)
    last = rows[offsets[1:] - 1]
    shown = (starts - split.dropped)[last]
    unshown = np.minimum(shown, fold_in_items)
    return CandidateGroups(
        split,
        rows,
        offsets,
        fits=fits[rows[offsets[:-1]]],
        chosen=np.arange(len(last)),
        histories=split.histories(last, shown - unshown),
        unshown=unshown,
        lengths=(split.order - starts)[rows].astype(np.int32),
    )


def group_streams(
    split: datasets.Dataset | Rows,
    lines: int = 48,
    cf_fits: Sequence[int] | np.ndarray | None = None,
    fold_in_items: int = 0,
    topics: Sequence[Any] | None = None,
) -> Streams:
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
    split = Rows.of(split)
    order = split.order
    if topics is not None:
        order = _order_by_topic(split.users, topics, order)
    rows, offsets = _cut([split.users], order, lines)
    first, ratings = rows[offsets[:-1]], None
    if topics is None:
        unshown = np.minimum(split.stored[first], fold_in_items)
        earlier = split.histories(first, split.stored[first] - unshown)
        if split.key == "rating":
            ratings = _find_ratings(split, rows, offsets)
    else:
        in_order = np.lexsort((order, split.users))
        ends = np.searchsorted(split.users[in_order], split.users[first]) + order[first]
        lengths = np.minimum(order[first], fold_in_items)
        before = in_order[spread(ends - lengths, lengths)]
        earlier = Runs(
            np.concatenate([[0], np.cumsum(lengths)]),
            split.items[before],
            split.item_names,
            "liked",
            split.labels[before],
        )
    return Streams(
        split,
        rows,
        offsets,
        fits=_share_fits(_read_fits(cf_fits, len(split))[rows], offsets),
        chosen=np.arange(len(first)),
        earlier=earlier,
        ratings=ratings,
    )


def _find_ratings(split: Rows, rows: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Ratings of the lines of streams, as far as the last line's history stores them; else NaN."""
    last, sizes = rows[offsets[1:] - 1], np.diff(offsets)
    # A row's own rating stands in the histories of later rows alone.
    is_before = split.order[rows] < np.repeat(split.order[last], sizes)
    counts = np.add.reduceat(is_before, offsets[:-1], dtype=np.int64) if len(last) else sizes
    stored = np.minimum(counts, split.stored[last])
    known = split.histories(last, split.stored[last] - stored)
    ratings = np.full(len(rows), np.nan, dtype=np.float32)
    lines = spread(offsets[:-1] + counts - stored, stored)
    same = known.items == split.items[rows[lines]]
    assert known.values is not None
    ratings[lines[same]] = known.values[same]
    return ratings


def _share_fits(fits: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """One fit for each stream: that of its rows, or the last, -1, where they differ."""
    first = fits[offsets[:-1]]
    if not len(first):
        return first
    differs = np.logical_or.reduceat(fits != np.repeat(first, np.diff(offsets)), offsets[:-1])
    if differs.any():
        warnings.warn(
            f"{differs.sum()} of {len(first)} streams have rows of several CF fits: they see "
            "the last fit, which knows their labels; fit with cross_fit=users",
            stacklevel=3,
        )
    return np.where(differs, -1, first)


def _read_fits(fits: Sequence[int] | np.ndarray | None, count: int) -> np.ndarray:
    return np.full(count, -1) if fits is None else np.asarray(fits)


def _order_by_topic(users: np.ndarray, topics: Sequence[Any], order: np.ndarray) -> np.ndarray:
    """An order of each user's rows in which a topic's rows follow its first one."""
    frame = pd.DataFrame({"user": users, "topic": pd.factorize(np.asarray(topics, object))[0]})
    frame["place"] = np.argsort(np.argsort(order, kind="stable"))
    frame["first"] = frame.groupby(["user", "topic"])["place"].transform("min")
    ranked = frame.sort_values(["first", "place"])
    return ranked.groupby("user").cumcount().sort_index().to_numpy()


def _find_windows(split: Rows, history_window: tuple[int, int]) -> np.ndarray:
    """Per row the first earlier item that the window shows."""
    starts = window_start(split.order, history_window)
    if (starts < split.dropped).any():
        raise InputError(
            f"the data stores the {split.stored.max()} latest items of a history, but the window "
            f"{history_window} shows up to {sum(history_window) - 1}: prepare it again with a "
            "larger --max-history"
        )
    return starts


def _cut(keys: list[np.ndarray], order_by: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows cut into parts of equal keys and at most `most` rows, each sorted by `order_by`; the
    parts, in order of their first row, one after the other, and where each begins."""
    order = np.lexsort((order_by, *keys))
    new = np.ones(len(order), dtype=bool)
    new[1:] = np.any([key[order][1:] != key[order][:-1] for key in keys], axis=0)
    place = np.arange(len(order))
    within = place - np.maximum.accumulate(np.where(new, place, 0))
    starts = np.flatnonzero(within % most == 0)
    lengths = np.diff(starts, append=len(order))
    by_row = np.argsort(order[starts])
    lengths = lengths[by_row]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return order[spread(starts[by_row], lengths)], offsets


def sample_group(groups: Groups, max_labels: int, order: Sequence[int] | np.ndarray) -> Groups:
    """Whole groups in `order` until `max_labels` labels are reached; 0 keeps all."""
    if not max_labels:
        return groups
    labels = np.cumsum(groups.sizes[order])
    return groups.take(order[: int(np.searchsorted(labels, max_labels)) + 1])
