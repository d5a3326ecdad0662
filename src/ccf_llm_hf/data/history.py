"""Histories of stored users: a checkpoint carries none, the prepared data does."""

from pathlib import Path
from typing import Any

import pandas as pd

from ccf_llm_hf.data.prepared import interactions, load_protocol
from ccf_llm_hf.data.rows import Histories
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.configuration_ccf_llm import read_id


def stored_histories(data_dir: str | Path) -> Histories:
    """What `stored_history` gives, for every user of the data at once, each when asked for."""
    return _select(data_dir, interactions(data_dir, categories=True))


def stored_history(data_dir: str | Path, user: str | int) -> list[Any]:
    """Items that a user liked, over all splits, oldest first; in a folder with signed histories all
    that the user rated, as dicts of `id` with `rating` or `liked`.

    Which rows count is as in the histories that `prepare` writes: frozen ones hold none of
    validation or test.

    Args:
        data_dir: prepared folder.
        user: raw user id.

    Returns:
        Raw item ids, or dicts of them.

    Raises:
        InputError: not a prepared folder, or no such user in it.
    """
    user = read_id(user) or ""
    rows = interactions(data_dir, user=user)
    if rows.empty:
        known = interactions(data_dir)["user_id"].iloc[0]
        raise InputError(f"user {user!r} has no rows in {data_dir}: give an id like {known!r}")
    rows = rows.astype(dict.fromkeys(("user_id", "item_id"), "category"))
    return _select(data_dir, rows).get(user, [])


def _select(data_dir: str | Path, rows: pd.DataFrame) -> Histories:
    """Which rows count, and what is known of their items; ids are categories."""
    protocol = load_protocol(Path(data_dir))
    known: dict[str, Any] = {}
    if protocol.get("frozen_histories"):
        rows = rows[~rows["split"].isin(["validation", "test"])]
    if protocol.get("histories") != "signed":
        rows = rows[(rows["split"] != "") & (rows["label"] == 1)]
    else:
        column = "label" if rows["rating"].isna().any() else "rating"
        known = {"key": {"label": "liked"}.get(column, column), "values": rows[column].to_numpy()}
    users, items = rows["user_id"].cat, rows["item_id"].cat
    return Histories(
        users.codes.to_numpy(),
        users.categories.to_numpy(dtype=object),
        items.codes.to_numpy(),
        items.categories.to_numpy(dtype=object),
        **known,
    )
