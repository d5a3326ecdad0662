"""The table of a checkpoint's scores on a prepared split."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ccf_llm_hf.data.grouping import Group, group_split
from ccf_llm_hf.io import write_file
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor
from ccf_llm_hf.modeling.ranking_ccf_llm import TOKENS_PER_BATCH, score, score_cf_logit

MAX_CANDIDATES = 512  # rows of one user packed behind one history


def score_table(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    split: datasets.Dataset,
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
        split: a prepared split (see `data.load_prepared`).
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
    groups = group_split(split, processor, max_candidates, lines=lines)
    scores = score(model, processor, groups, tokens_per_batch=tokens_per_batch, progress=progress)
    logits = _by_row(groups, scores, len(split))
    return _table(split, logits, model.probabilities(logits))


def score_cf_table(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    split: datasets.Dataset,
    *,
    lines: Mapping[str, list[Any]] | None = None,
) -> pd.DataFrame:
    """The table of `score_table`, of the model's CF logit alone: the control for what words add."""
    groups = group_split(split, processor, MAX_CANDIDATES, lines=lines)
    logits = _by_row(groups, score_cf_logit(model, processor, groups), len(split))
    return _table(split, logits, logits.sigmoid())


def _by_row(groups: Sequence[Group], scores: Sequence[Tensor], rows: int) -> Tensor:
    logits = torch.full((rows,), torch.nan)
    for group, values in zip(groups, scores, strict=True):
        logits[group.rows] = values
    return logits


def _table(split: datasets.Dataset, logits: Tensor, prob: Tensor) -> pd.DataFrame:
    keys = {name: list(split[name]) for name in ("user_id", "item_id", "label")}
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
