"""What a user has just liked, as a term beside a logit: no language model reads times (ours)."""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.optimize import minimize

from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.data.prepared import read_rows
from ccf_llm_hf.data.protocol import SPLITS

# Taken on validation, where 1, 3 and 10 minutes hardly differ (results/ml-1m/experiments.md).
RECENT_SECONDS = 180


def recent_likes_term(cf_folder: str | Path, data_dir: str | Path, split: str) -> pd.DataFrame:
    """`a + b log(1 + likes of the last three minutes)` of a split's rows (our choice).

    The two numbers are fitted on the train split by maximum likelihood, beside the CF logit of a
    snapshot that was not fitted on the row; the likes are those of the protocol's histories, of all
    splits, but for the same second, where a history goes by the order of the file.

    Args:
        cf_folder: a table fitted by `fit-cf mf`.
        data_dir: folder written by `ccf-llm prepare`.
        split: train, validation or test.

    Returns:
        Columns user_id, item_id and term (a logit, float64), in the split's order.

    Raises:
        InputError: a folder is missing or damaged.
    """
    cf = CFVectors.load(cf_folder)
    splits = {name: read_rows(data_dir, name) for name in SPLITS}
    likes = pd.concat(rows[rows["label"] == 1] for rows in splits.values())
    train = splits["train"]
    keys = ("user_id", "item_id", "timestamp")
    snapshots = cf.training_snapshots(*(train[key].to_numpy() for key in keys))
    bias, weight = _fit(
        cf.score(train, snapshots)["score"].to_numpy(),
        np.log1p(recent_likes(train, likes)),
        train["label"].to_numpy(),
    )
    rows = splits[split].reset_index(drop=True)
    term = bias + weight * np.log1p(recent_likes(rows, likes))
    return rows[["user_id", "item_id"]].assign(term=term)


def with_term(scores: pd.DataFrame, term: pd.DataFrame) -> pd.DataFrame:
    """Logits and probabilities of a split, or a sample of it, with the rows' terms added.

    Args:
        scores: user_id, item_id, label, score (logit).
        term: user_id, item_id, term, of the whole split.

    Returns:
        user_id, item_id, label, score and prob, in the order of `scores`.
    """
    pair = ["user_id", "item_id"]
    shared = scores[[*pair, "label"]].reset_index(drop=True)
    added = shared.merge(term, on=pair, how="left", validate="1:1")["term"]
    logits = scores["score"].to_numpy() + added.to_numpy()
    return shared.assign(score=logits, prob=1 / (1 + np.exp(-logits)))


def recent_likes(
    rows: pd.DataFrame, likes: pd.DataFrame, seconds: int = RECENT_SECONDS
) -> np.ndarray:
    """How many likes each row's user gave in the time before it; one of the same second is not
    before it.

    Args:
        rows: `user_id`, `timestamp` (seconds).
        likes: the same columns, in any order.
        seconds: how far back a like counts, the whole span included.

    Returns:
        `(rows,)` int64.
    """
    times = {str(user): np.sort(group) for user, group in likes.groupby("user_id")["timestamp"]}
    none = np.zeros(0, dtype=np.int64)
    counts = np.zeros(len(rows), dtype=np.int64)
    for user, places in rows.reset_index(drop=True).groupby("user_id").indices.items():
        now = rows["timestamp"].to_numpy()[places]
        given = times.get(str(user), none)
        counts[places] = np.searchsorted(given, now) - np.searchsorted(given, now - seconds)
    return counts


def _fit(logits: np.ndarray, feature: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """`a` and `b` of the likeliest `sigmoid(logits + a + b feature)`."""

    def loss(free: np.ndarray) -> float:
        total = logits + free[0] + free[1] * feature
        return float((np.logaddexp(0, total) - labels * total).mean())

    bias, weight = minimize(loss, np.zeros(2)).x
    return float(bias), float(weight)
