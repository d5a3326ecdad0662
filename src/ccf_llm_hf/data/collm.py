"""CoLLM's published files: three pickled tables whose rows are kept as they stand.

Source: train_ood2.pkl, valid_ood2.pkl and test_ood2.pkl of https://github.com/zyang1580/CoLLM, for
MovieLens-1M and Amazon-Book.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from ccf_llm_hf.data.protocol import SPLITS, Samples
from ccf_llm_hf.data.sources import YEAR_IN_TITLE
from ccf_llm_hf.data.unpickle import read_pickled_table
from ccf_llm_hf.data.validation import as_ids
from ccf_llm_hf.errors import InputError

FILES = dict(zip(SPLITS, ("train_ood2.pkl", "valid_ood2.pkl", "test_ood2.pkl"), strict=True))
COLUMNS = ("uid", "iid", "title", "his", "his_title", "label", "timestamp")
CITATION = (
    "Yang Zhang, Fuli Feng, Jizhi Zhang, Keqin Bao, Qifan Wang and Xiangnan He. 2023. CoLLM: "
    "Integrating Collaborative Embeddings into Large Language Models for Recommendation. "
    "https://arxiv.org/abs/2310.19488"
)
RULES = {
    "label_rule": "as published",
    "split_rule": "as published: " + ", ".join(FILES.values()),
    "history_rule": "as published, without the 0 that CoLLM puts before every history",
}


def read_collm(folder: Path) -> tuple[Samples, pd.DataFrame, pd.DataFrame, dict[str, int]]:
    """The published rows, in their order.

    `not_cold` is taken over where it is published and computed where it is not; items are those of
    the rows and of their histories.

    Returns:
        Samples; the log with user_id, item_id, rating (NaN), label, timestamp and split (int8); the
        items with item_id and title; how many rows each file holds. Ids are the published numbers
        as text.

    Raises:
        InputError: a file or a column is missing, a pickle asks for more than tables, or a cell is
            not what it should be (named by file and row, from 0).
    """
    frames = [_read(folder / file) for file in FILES.values()]
    table = pd.concat(frames, ignore_index=True)
    split = np.repeat(np.arange(len(SPLITS), dtype=np.int8), [len(frame) for frame in frames])
    lengths = np.array([len(history) for history in table["his"]], dtype=np.int64)
    own = table["iid"].to_numpy(object)
    items, item_names = pd.factorize(np.concatenate([own, *table["his"]]))
    users, user_names = pd.factorize(table["uid"].to_numpy(object))
    stop = np.cumsum(lengths)
    samples = Samples(
        user=users,
        item=items[: len(table)],
        label=table["label"].to_numpy(np.int64),
        timestamp=table["timestamp"].to_numpy(np.int64),
        split=split,
        split_position=table.groupby([split, users]).cumcount().to_numpy(),
        not_cold=_not_cold(table, split),
        earlier=items[len(table) :],
        earlier_labels=None,
        earlier_ratings=None,
        history_start=stop - lengths,
        history_stop=stop,
        history_dropped=None,
        user_names=pa.array(user_names, pa.string()),
        item_names=pa.array(item_names, pa.string()),
    )
    rows = pd.DataFrame(
        {
            "user_id": user_names[users],
            "item_id": item_names[samples.item],
            "rating": np.nan,
            "label": samples.label,
            "timestamp": samples.timestamp,
            "split": split,
        }
    )
    titles = _titles(table)
    catalog = [titles.get(item) or item for item in item_names]
    read = {file: len(frame) for file, frame in zip(FILES.values(), frames, strict=True)}
    return samples, rows, pd.DataFrame({"item_id": item_names, "title": catalog}), read


def is_movielens(items: pd.DataFrame) -> bool:
    """Whether these are CoLLM's files of MovieLens-1M and not of Amazon-Book: nothing in them says
    so but the titles, most of which end in a year."""
    return bool(items["title"].str.extract(YEAR_IN_TITLE)[0].notna().mean() > 0.5)


def _read(path: Path) -> pd.DataFrame:
    """One split, checked; ids as text, `his` as arrays of them and `his_title` as lists, both
    without padding."""
    if not path.is_file():
        raise InputError(f"{path} does not exist: pass the folder with {', '.join(FILES.values())}")
    with path.open("rb") as stream:
        table = read_pickled_table(stream, path.name)
    missing = [name for name in COLUMNS if name not in table]
    if missing:
        raise InputError(f"{path.name} has no column {missing[0]!r}: get CoLLM's file again")
    for name in ("uid", "iid"):
        table[name], odd = _ids(table[name])
        if odd.any():
            raise _bad(path.name, int(odd.argmax()), name, "a number from 0 on")
    for name in ("timestamp", "label"):
        table[name] = _whole(table[name], name, path.name)
    odd = np.flatnonzero(~table["label"].isin([0, 1]))
    if len(odd):
        raise _bad(path.name, odd[0], "label", "0 or 1")
    pairs = zip(table["his"], table["his_title"], strict=True)
    histories = [_history(ids, titles, path.name, row) for row, (ids, titles) in enumerate(pairs)]
    ends = np.cumsum([len(history) for history, _ in histories])
    flat, odd = _ids(pd.Series(np.concatenate([history for history, _ in histories])))
    if odd.any():
        row = int(np.searchsorted(ends, odd.argmax(), side="right"))
        raise _bad(path.name, row, "his", "a list of whole numbers")
    texts = np.split(flat.to_numpy(object), ends[:-1])
    histories = [(ids, titles) for ids, (_, titles) in zip(texts, histories, strict=True)]
    for place, name in enumerate(("his", "his_title")):
        column = np.empty(len(table), dtype=object)
        for row, history in enumerate(histories):
            column[row] = history[place]
        table[name] = column
    return table


def _ids(values: pd.Series) -> tuple[pd.Series, np.ndarray]:
    """Numbers as text, exactly, and where there is none from 0 on."""
    ids = as_ids(values)
    return ids, ~ids.str.fullmatch(r"\d+(\.\d+)?").to_numpy(bool)


def _whole(values: pd.Series, name: str, file: str) -> pd.Series:
    numbers = pd.to_numeric(values, errors="coerce").astype("float64")
    odd = np.flatnonzero(~np.isfinite(numbers) | (numbers < 0))
    if len(odd):
        raise _bad(file, odd[0], name, "a number from 0 on")
    return numbers.astype("int64")


def _history(ids: Any, titles: Any, file: str, row: int) -> tuple[np.ndarray, list[str]]:
    if not isinstance(ids, list | tuple | np.ndarray) or not isinstance(titles, list | tuple):
        raise _bad(file, row, "his", "a list of ids, with as many titles in 'his_title'")
    if len(ids) != len(titles) or not all(isinstance(title, str) for title in titles):
        raise _bad(file, row, "his_title", "a title for each id of 'his'")
    try:
        numbers = np.array(ids, dtype=object).reshape(len(titles))
    except ValueError as error:
        raise _bad(file, row, "his", "a list of whole numbers") from error
    pad = int(len(numbers) > 0 and numbers[0] == 0 and titles[0] == "")
    return numbers[pad:], list(titles[pad:])


def _bad(file: str, row: int, column: str, expected: str) -> InputError:
    return InputError(f"{file}, row {row}: {column!r} is not {expected}: get CoLLM's file again")


def _not_cold(table: pd.DataFrame, split: np.ndarray) -> np.ndarray:
    train = table[split == 0]
    seen = table["uid"].isin(train["uid"]) & table["iid"].isin(train["iid"])
    if "not_cold" not in table:
        return seen.to_numpy()
    published = pd.to_numeric(table["not_cold"], errors="coerce")
    return np.where(published.isna(), seen, published == 1)


def _titles(table: pd.DataFrame) -> dict[str, str]:
    """Title by item: the first one that is not empty."""
    titles: dict[str, str] = {}

    def note(numbers: Sequence[str], names: Sequence[Any]) -> None:
        for number, name in zip(numbers, names, strict=True):
            if number not in titles and isinstance(name, str) and name.strip():
                titles[number] = " ".join(name.split())

    note(table["iid"].tolist(), table["title"].tolist())
    for numbers, names in zip(table["his"], table["his_title"], strict=True):
        if any(number not in titles for number in numbers.tolist()):
            note(numbers.tolist(), names)
    return titles
