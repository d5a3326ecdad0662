"""A small synthetic prepared folder, for the tests of CF models and evaluation."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from ccf_llm_hf.data.prepared import FORMAT

USERS, ITEMS = 40, 30


def make_rows(rows: int = 1500, seed: int = 0) -> pd.DataFrame:
    """Interactions in order of time, whose labels follow user and item biases.

    User `u0` and item `i0` occur in the last fifth of the time only, so they are cold in test.
    """
    generator = np.random.default_rng(seed)
    users = generator.integers(1, USERS, rows)
    items = generator.integers(1, ITEMS, rows)
    late = np.arange(rows) >= rows * 4 // 5
    users[late & (generator.random(rows) < 0.2)] = 0
    items[late & (generator.random(rows) < 0.2)] = 0
    logits = 1.5 * np.sin(users * 1.7) + 1.5 * np.sin(items * 2.3)
    labels = (generator.random(rows) < 1 / (1 + np.exp(-logits))).astype(np.int64)
    return pd.DataFrame(
        {
            "user_id": [f"u{user}" for user in users],
            "item_id": [f"i{item}" for item in items],
            "label": labels,
            "timestamp": 1_000_000 + 7 * np.arange(rows) // 3,
        }
    )


def earlier_likes(rows: pd.DataFrame) -> list[list[str]]:
    """Of each row's user, oldest first."""
    likes: dict[str, list[str]] = {}
    histories = []
    for user, item, label in rows[["user_id", "item_id", "label"]].itertuples(index=False):
        histories.append(list(likes.setdefault(user, [])))
        likes[user] += [item] * label
    return histories


def write_prepared(folder: Path, rows: pd.DataFrame, fields: dict[str, list] | None = None) -> Path:
    """Write train (first 60 %), validation and test (20 % each) of time-ordered rows, each with the
    user's earlier likes as `history`; `fields` are columns of the items."""
    rows = rows.assign(history=earlier_likes(rows))
    for name in ("data", "items", "interactions"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    ends = {"train": len(rows) * 3 // 5, "validation": len(rows) * 4 // 5, "test": len(rows)}
    start = 0
    for split, end in ends.items():
        part = rows[start:end].sort_values(["user_id", "timestamp"], kind="stable")
        train = rows[: ends["train"]]
        warm = part["user_id"].isin(train["user_id"]) & part["item_id"].isin(train["item_id"])
        part.assign(not_cold=warm).to_parquet(folder / "data" / f"{split}.parquet", index=False)
        start = end
    ids = [f"i{item}" for item in range(ITEMS)]
    titles = [f"Film {key} \u2028é" for key in ids]
    items = pd.DataFrame({"item_id": ids, "title": titles, **(fields or {})})
    items.to_parquet(folder / "items" / "items.parquet", index=False)
    protocol = {"format": FORMAT, "name": "synthetic", "item_fields": list(fields or {})}
    (folder / "protocol.json").write_text(json.dumps(protocol))
    return folder
