"""Histories of stored users: a checkpoint carries none, the prepared data does."""

from pathlib import Path
from typing import Any

import pandas as pd

from ccf_llm_hf.data.prepared import interactions, load_protocol
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.configuration_ccf_llm import read_id


def stored_histories(data_dir: str | Path) -> dict[str, list[Any]]:
    """What `stored_history` gives, for every user of the data at once."""
    shown = _shown(data_dir)
    return {str(user): rows["shown"].tolist() for user, rows in shown.groupby("user_id")}


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
    rows, user = interactions(data_dir), read_id(user) or ""
    if not (rows["user_id"] == user).any():
        known = rows["user_id"].iloc[0]
        raise InputError(f"user {user!r} has no rows in {data_dir}: give an id like {known!r}")
    return _shown(data_dir, user)["shown"].tolist()


def _shown(data_dir: str | Path, user: str | None = None) -> pd.DataFrame:
    rows = interactions(data_dir)
    rows = rows if user is None else rows[rows["user_id"] == user]
    protocol = load_protocol(Path(data_dir))
    if protocol.get("frozen_histories"):
        rows = rows[~rows["split"].isin(["validation", "test"])]
    if protocol.get("histories") != "signed":
        rows = rows[(rows["split"] != "") & (rows["label"] == 1)]
        return rows.assign(shown=rows["item_id"])
    key, column = ("liked", "label") if rows["rating"].isna().any() else ("rating", "rating")
    signed = [
        {"id": item, key: value} for item, value in zip(rows["item_id"], rows[column], strict=True)
    ]
    return rows.assign(shown=pd.Series(signed, index=rows.index, dtype=object))
