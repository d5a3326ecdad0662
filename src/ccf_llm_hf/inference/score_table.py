"""The table of a checkpoint's scores on a prepared split, and its parquet file."""

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch

from ccf_llm_hf.inference.scoring import score_split


def score_table(
    model: Any, processor: Any, split: datasets.Dataset, **options: Any
) -> pd.DataFrame:
    """Score a split as the model was trained to read it.

    Args:
        model: a `CCFLLMForCTR`.
        processor: its `CCFLLMProcessor`; its history window is used.
        split: a prepared split.
        options: of `score_split`, such as `max_tokens_per_batch`.

    Returns:
        One row per sample, in split order: user_id, item_id, label, score (the logit) and prob.
    """
    logits = score_split(
        model, processor, split, history_window=processor.history_window, **options
    )
    return pd.DataFrame(
        {
            "user_id": list(split["user_id"]),
            "item_id": list(split["item_id"]),
            "label": list(split["label"]),
            "score": logits,
            "prob": model.probabilities(torch.as_tensor(logits)).numpy(),
        }
    )


def sample_users(split: datasets.Dataset, rows: int, seed: int = 0) -> datasets.Dataset:
    """Whole users in seeded order until `rows` rows are reached.

    Whole users, because per-user metrics need all rows of a user.
    """
    owners = np.asarray(split["user_id"])
    users = np.random.default_rng(seed).permutation(np.unique(owners))
    counts = pd.Series(owners).value_counts()[users].cumsum()
    chosen = users[: int(np.searchsorted(counts, rows)) + 1]
    return split.select(np.flatnonzero(np.isin(owners, chosen)))


def write_scores(scores: pd.DataFrame, path: str | Path) -> Path:
    """Write scores as parquet under a temporary name, then rename."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    scores.to_parquet(partial, index=False)
    return partial.replace(path)
