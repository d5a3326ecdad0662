"""Scores to compare with: from a CF folder or from a file of scores."""

from pathlib import Path

import pandas as pd

from ccf_llm_hf.cf.embeddings import CFEmbeddings
from ccf_llm_hf.evaluation.rows import read_rows
from ccf_llm_hf.evaluation.scores import read_scores


def load_scores(path: str | Path, data_dir: str | Path, split: str = "test") -> pd.DataFrame:
    """What a comparison is given as, turned into scores of a split's rows.

    Args:
        path: a folder of `CFEmbeddings`, scored with its last snapshot, or a parquet file of
            scores.
        data_dir: folder written by `ccf-llm prepare`.
        split: train, validation or test.

    Returns:
        Columns user_id, item_id, label, score and, if known, prob.

    Raises:
        InputError: `path` is neither, or damaged.
    """
    if Path(path).is_dir():
        return CFEmbeddings.load(path).score(read_rows(data_dir, split))
    return read_scores(path)
