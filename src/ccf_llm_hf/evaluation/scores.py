"""Files and tables of scores, checked against the split that they are for."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from ccf_llm_hf.data.validation import as_ids
from ccf_llm_hf.errors import InputError

NEEDED = ("user_id", "item_id", "score")


def read_scores(path: str | Path, needed: Sequence[str] = NEEDED) -> pd.DataFrame:
    """A parquet file with user_id, item_id, score (any monotone scale) and, if known, prob, label.

    Raises:
        InputError: missing, damaged, or without one of the `needed` columns.
    """
    try:
        scores = pq.read_table(path).to_pandas()
    except (OSError, pa.ArrowException) as error:
        raise InputError(
            f"scores {path} are missing or no parquet file; write them with ccf-llm evaluate --out"
        ) from error
    _check_columns(scores, str(path), needed)
    return scores


def align_scores(
    scores: pd.DataFrame, rows: pd.DataFrame, name: str, partial: bool = False
) -> pd.DataFrame:
    """`score` and `prob` (NaN if not known) for each of `rows`, in their order.

    Scores in the order of the split are taken as they are; in another order they are matched by
    user and item. With `partial`, rows without a score stay NaN.

    Raises:
        InputError: a row has no score or several, labels differ, or a score is NaN.
    """
    _check_columns(scores, f"of {name!r}")
    scores = scores.reset_index(drop=True)
    scores = scores.assign(**{side: as_ids(scores[side]) for side in ("user_id", "item_id")})
    # Scores of whole users in the split's order are taken as they stand: a pair may repeat.
    scored = rows["user_id"].isin(scores["user_id"]).to_numpy()
    own = scores[scores["user_id"].isin(rows["user_id"])]
    if (scored.all() or (partial and scored.any())) and _same_pairs(own, rows[scored]):
        scores = own.set_axis(np.flatnonzero(scored)).reindex(range(len(rows)))
    else:
        scores = _matched(scores, rows, name, partial)
    scored = scores["score"].notna().to_numpy() | (not partial)
    if "label" in scores and not np.array_equal(scores["label"][scored], rows["label"][scored]):
        raise InputError(
            f"scores of {name!r}: labels differ from the split's; score this data again"
        )
    if scores["score"][scored].isna().any():
        row = int(scores["score"].isna().to_numpy().argmax())
        raise InputError(f"scores of {name!r}: row {row} is NaN; every row needs a number")
    return pd.DataFrame(
        {"score": scores["score"].astype(float), "prob": scores.get("prob", np.nan)}
    )


def _check_columns(scores: pd.DataFrame, name: str, needed: Sequence[str] = NEEDED) -> None:
    missing = [column for column in needed if column not in scores]
    if missing:
        raise InputError(f"scores {name} lack the column {missing[0]!r}; add it")


def _same_pairs(scores: pd.DataFrame, rows: pd.DataFrame) -> bool:
    return all(
        np.array_equal(scores[column].to_numpy(), rows[column].to_numpy())
        for column in ("user_id", "item_id")
    )


def _matched(scores: pd.DataFrame, rows: pd.DataFrame, name: str, partial: bool) -> pd.DataFrame:
    keys = ["user_id", "item_id"]
    if scores.duplicated(keys).any() or rows.duplicated(keys).any():
        raise InputError(
            f"scores of {name!r} repeat a pair of user and item; give them in the split's order"
        )
    merged = rows[keys].merge(scores, on=keys, how="left", validate="1:1", indicator=True)
    lost = merged[merged["_merge"] == "left_only"]
    if len(lost) == len(rows) or (len(lost) and not partial):
        raise InputError(
            f"scores of {name!r}: {len(lost)} of {len(rows)} rows have none, first user "
            f"{lost['user_id'].iloc[0]!r} with item {lost['item_id'].iloc[0]!r}; score this split"
        )
    return merged
