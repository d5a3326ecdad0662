"""The table of a checkpoint's scores on a prepared split."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ccf_llm_hf.data.grouping import Groups, group_split
from ccf_llm_hf.data.rows import Rows
from ccf_llm_hf.io import write_file
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor
from ccf_llm_hf.modeling.ranking_ccf_llm import TOKENS_PER_BATCH, score, score_cf_logit

MAX_CANDIDATES = 512  # rows of one user packed behind one history


def score_table(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    split: datasets.Dataset | Rows,
    *,
    lines: Mapping[str, list[Any]] | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    max_candidates: int = MAX_CANDIDATES,
    progress: bool = True,
) -> pd.DataFrame:
    """Score a split as the model was trained to read it.

    Args:
        model: a model.
        processor: its processor, whose history window is used.
        split: a prepared split, as `load_prepared(folder).splits` or its `rows` have it.
        lines: the users' whole histories, where those of the split are frozen
            (`PreparedData.lines`); evidence is found in them.
        tokens_per_batch: tokens of a batch, at most (but for a single longer row of candidates).
        max_candidates: rows of one user that are packed behind one history.
        progress: show a bar on stderr.

    Returns:
        One row per sample, in split order: user_id, item_id, label, score (the logit, float32) and
        prob.

    Raises:
        InputError: the data's histories hold something else than the model reads.
    """
    rows = Rows.of(split)
    groups = group_split(rows, processor, max_candidates, lines=lines)
    options = {"tokens_per_batch": tokens_per_batch, "progress": progress}
    scores = [s for part in groups.parts() for s in score(model, processor, part, **options)]
    logits = _by_row(groups, scores)
    return _table(rows, logits, model.probabilities(logits))


def score_cf_table(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    split: datasets.Dataset | Rows,
    *,
    lines: Mapping[str, list[Any]] | None = None,
) -> pd.DataFrame:
    """The table of `score_table`, of the model's CF logit alone: the control for what words add."""
    rows = Rows.of(split)
    groups = group_split(rows, processor, MAX_CANDIDATES, lines=lines)
    scores = [s for part in groups.parts() for s in score_cf_logit(model, processor, part)]
    logits = _by_row(groups, scores)
    return _table(rows, logits, logits.sigmoid())


def _by_row(groups: Groups, scores: Sequence[Tensor]) -> Tensor:
    logits = torch.full((len(groups.rows),), torch.nan)
    logits[groups.rows] = torch.cat([torch.empty(0), *scores])
    return logits


def _table(rows: Rows, logits: Tensor, prob: Tensor) -> pd.DataFrame:
    keys = {
        "user_id": rows.user_names[rows.users].tolist(),
        "item_id": rows.item_names[rows.items].tolist(),
        "label": rows.labels.astype(np.int64),
    }
    return pd.DataFrame({**keys, "score": logits.numpy(), "prob": prob.numpy()})


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
    """Write scores as parquet."""
    return write_file(path, lambda partial: scores.to_parquet(partial, index=False))
