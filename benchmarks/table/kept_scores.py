"""Test scores of rows that others are compared with, kept beside the results (our choice).

Work folders come and go, and a row trained anew is another model: what is compared with a row long
after it was computed is to be compared with the one in the table. A file has the one column
`score`, in the order of the test split; without users, items and labels it can be committed.
"""

from pathlib import Path

import numpy as np
import pandas as pd

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation.metrics import auc
from ccf_llm_hf.evaluation.scores import read_scores
from ccf_llm_hf.inference.score_table import write_scores


def keep_scores(scores: pd.DataFrame, file: Path) -> None:
    """Write the scores of a whole split, a row each, without saying whose they are."""
    write_scores(scores[["score"]], file)


def kept_scores(file: Path, rows: pd.DataFrame, expected: float) -> pd.DataFrame:
    """Read what `keep_scores` wrote.

    Args:
        file: parquet with the column score.
        rows: the split: user_id, item_id, label.
        expected: AUC of these scores, as the cell's result says.

    Returns:
        user_id, item_id, label and score, a row each, in the order of the split.

    Raises:
        InputError: the file is no such file, or of other rows or another training.
    """
    scores = read_scores(file, needed=("score",))["score"].to_numpy()
    if len(scores) != len(rows) or not np.isclose(auc(rows["label"], scores), expected):
        raise InputError(
            f"{file} does not hold the scores of the result beside it: delete both to have the "
            "cell computed again"
        )
    return rows[["user_id", "item_id", "label"]].reset_index(drop=True).assign(score=scores)
