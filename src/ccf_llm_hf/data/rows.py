"""A split as arrays, whose histories stay where they are and are read as they are asked for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ccf_llm_hf.data.protocol import CHUNK_ROWS

# What is known of a history's items besides their ids, by the key that an item as a dict has.
KNOWN = {"history_ratings": "rating", "history_labels": "liked"}

Batches = Callable[[Sequence[str]], Iterator[pa.RecordBatch]]


@dataclass
class Runs:
    """Items of histories, run after run.

    Attributes:
        offsets: `(n + 1,)`, where each run begins, and the end.
        items: codes into `names`.
        names: raw ids.
        key: what `values` are called; "" where there are none.
        values: of the items.
    """

    offsets: np.ndarray
    items: np.ndarray
    names: np.ndarray
    key: str = ""
    values: np.ndarray | None = None

    def __getitem__(self, run: int) -> list[Any]:
        part = slice(self.offsets[run], self.offsets[run + 1])
        items = self.names[self.items[part]].tolist()
        if self.values is None:
            return items
        values = self.values[part].tolist()
        return [{"id": i, self.key: value} for i, value in zip(items, values, strict=True)]


class Histories(Mapping[str, list[Any]]):
    """Histories by user, each made when it is asked for.

    Args:
        users: user of each item, codes into `names`, a user's items in their order.
        names: raw ids of the users; those without items are in none of the keys.
        items: codes into `item_names`.
        item_names: raw ids.
        key, values: see `Runs`.
    """

    def __init__(
        self,
        users: np.ndarray,
        names: np.ndarray,
        items: np.ndarray,
        item_names: np.ndarray,
        key: str = "",
        values: np.ndarray | None = None,
    ) -> None:
        order = np.argsort(users, kind="stable")
        counts = np.bincount(users, minlength=len(names))
        offsets = np.concatenate([[0], np.cumsum(counts)])
        values = None if values is None else values[order]
        self._runs = Runs(offsets, items[order], item_names, key, values)
        self._codes = {
            str(name): code
            for code, (name, count) in enumerate(zip(names, counts, strict=True))
            if count
        }

    def __getitem__(self, user: str) -> list[Any]:
        return self._runs[self._codes[user]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._codes)

    def __len__(self) -> int:
        return len(self._codes)


class Rows:
    """The rows of a split; every array is `(n,)`.

    Attributes:
        column_names: of the split.
        users, items: codes into `user_names` and `item_names`, int32.
        labels: int8.
        stored: how many items a history stores.
        dropped: how many it leaves out before them.
        key: what histories know of their items: `rating`, `liked` or "", which is likes alone.
    """

    def __init__(self, column_names: Sequence[str], batches: Batches) -> None:
        self.column_names, self._batches = list(column_names), batches
        known = [name for name in KNOWN if name in self.column_names]
        self._known = known[0] if known else None
        self.key = KNOWN[known[0]] if known else ""
        lists = known[-1] if known else "history"  # the smallest of equal lengths
        ids: dict[str, list[pa.Array]] = {"user_id": [], "item_id": []}
        labels, stored, dropped = [], [], []
        has_dropped = "history_dropped" in self.column_names
        for batch in batches([*ids, "label", lists, *["history_dropped"] * has_dropped]):
            for name, chunks in ids.items():
                chunks.append(batch[name].dictionary_encode())
            labels.append(batch["label"].to_numpy().astype(np.int8))
            stored.append(pc.list_value_length(batch[lists]).to_numpy().astype(np.int32))
            dropped.append(
                batch["history_dropped"].to_numpy().astype(np.int32)
                if has_dropped
                else np.zeros(len(batch), dtype=np.int32)
            )
        self.users, self.user_names = _join(ids["user_id"])
        self.items, self.item_names = _join(ids["item_id"])
        self.labels, self.stored, self.dropped = (
            np.concatenate([np.empty(0, dtype), *arrays])
            for dtype, arrays in ((np.int8, labels), (np.int32, stored), (np.int32, dropped))
        )

    @classmethod
    def of(cls, split: "datasets.Dataset | Rows") -> "Rows":
        """The rows of a `datasets.Dataset`; what are rows already as they are."""
        if isinstance(split, Rows):
            return split

        def batches(names: Sequence[str]) -> Iterator[pa.RecordBatch]:
            tables = split.select_columns(list(names)).with_format("arrow")
            for table in tables.iter(CHUNK_ROWS):
                yield from table.to_batches()

        return cls(split.column_names, batches)

    def __len__(self) -> int:
        return len(self.users)

    @property
    def signed(self) -> bool:
        """Whether histories hold dislikes too."""
        return "history_labels" in self.column_names

    @property
    def order(self) -> np.ndarray:
        """How many items are earlier than each row, stored or not: a user's rows by time."""
        return self.stored + self.dropped

    def timestamps(self) -> np.ndarray:
        """`(n,)` int64."""
        found = [batch["timestamp"].to_numpy() for batch in self._batches(["timestamp"])]
        return np.concatenate([np.empty(0, np.int64), *found])

    def histories(self, rows: np.ndarray, skip: np.ndarray) -> Runs:
        """The history of each of `rows` without its first `skip` items.

        Args:
            rows: `(n,)`, which.
            skip: `(n,)`, items to leave out at the beginning.
        """
        lengths = self.stored[rows] - skip
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        items, values = np.empty(offsets[-1], dtype=np.int32), None
        codes = {name: code for code, name in enumerate(self.item_names)}
        order = np.argsort(rows, kind="stable")
        first = 0
        for batch in self._batches(["history", *([self._known] if self._known else [])]):
            inside = np.searchsorted(rows[order], [first, first + len(batch)])
            which = order[slice(*inside)]
            lists = batch["history"]
            begin = lists.offsets.to_numpy()[rows[which] - first] + skip[which]
            source, counts = spread(begin, lengths[which]), lengths[which]
            target = spread(offsets[which], counts)
            found = lists.values.take(pa.array(source)).dictionary_encode()
            of_names = [codes.setdefault(name, len(codes)) for name in found.dictionary.to_pylist()]
            items[target] = np.array(of_names, dtype=np.int32)[found.indices.to_numpy()]
            if self._known:
                known = batch[self._known].values.take(pa.array(source)).to_numpy()
                values = np.empty(len(items), known.dtype) if values is None else values
                values[target] = known
            first += len(batch)
        if self._known and values is None:
            values = np.empty(0)
        return Runs(offsets, items, np.array([*codes], dtype=object), self.key, values)


def spread(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The places `start, start + 1, ...` of each run, one run after the other."""
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(total)


def _join(chunks: list[pa.DictionaryArray]) -> tuple[np.ndarray, np.ndarray]:
    """Ids as codes in order of first appearance, and the ids behind them."""
    if not chunks:
        return np.empty(0, np.int32), np.empty(0, object)
    whole = pa.chunked_array(chunks).unify_dictionaries()
    codes = np.concatenate([chunk.indices.to_numpy() for chunk in whole.chunks])
    return codes, np.array(whole.chunk(0).dictionary.to_pylist(), dtype=object)
