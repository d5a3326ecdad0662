"""Histories of stored users: a checkpoint carries none, the prepared data does."""

from pathlib import Path

from ccf_llm_hf.data.prepared import interactions
from ccf_llm_hf.errors import InputError


def stored_histories(data_dir: str | Path) -> dict[str, list[str]]:
    """What `stored_history` gives, for every user of the data at once."""
    rows = interactions(data_dir)
    liked = rows[(rows["split"] != "") & (rows["label"] == 1)]
    return {str(user): items.tolist() for user, items in liked.groupby("user_id")["item_id"]}


def stored_history(data_dir: str | Path, user: str) -> list[str]:
    """Items that a user liked, over all splits, oldest first.

    Rows outside all splits do not count, as in the histories that `prepare` writes.

    Args:
        data_dir: prepared folder.
        user: raw user id.

    Returns:
        Raw item ids of the user's rows with label 1.

    Raises:
        InputError: not a prepared folder, or no such user in it.
    """
    rows = interactions(data_dir)
    rows = rows[(rows["user_id"] == user) & (rows["split"] != "")]
    if rows.empty:
        known = interactions(data_dir)["user_id"].iloc[0]
        raise InputError(f"user {user!r} has no rows in {data_dir}: give an id like {known!r}")
    return rows.loc[rows["label"] == 1, "item_id"].tolist()
