"""Paired user-level bootstrap: users are drawn with replacement, with all their rows."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from ccf_llm_hf.evaluation.metrics import auc_per_user

LEVEL = 0.95
COUNTS_AT_ONCE = 1 << 23  # 64 MB in float64


class UserBootstrap:
    """The same resamples of users for every method, so that differences are paired.

    Args:
        users: `(n,)` ids, one per row.
        resamples: number of resamples; 1,000 take about a second on 10,000 rows.
        seed: of the resampling.
    """

    def __init__(self, users: Any, resamples: int = 1000, seed: int = 0) -> None:
        self.codes, names = pd.factorize(np.asarray(users))
        generator = np.random.default_rng(seed)
        size = max(len(names), 1)
        share = np.full(size, 1 / size)
        # How often each user is drawn, (resamples, users); no user is ever drawn 256 times.
        self.counts = np.stack(
            [generator.multinomial(size, share).astype(np.uint8) for _ in range(resamples)]
        )

    def auc(self, labels: Any, scores: Any, rows: np.ndarray | None = None) -> np.ndarray:
        """Pooled AUC of each resample, `(resamples,)`; NaN where only one class was drawn.

        Args:
            labels, scores: `(n,)`, aligned with `users`.
            rows: `(n,)` bool, a slice to stay in; default all rows.
        """
        codes, labels, scores = self._slice(labels, scores, rows)
        order = np.argsort(scores, kind="stable")
        codes, labels = codes[order], labels[order]
        last_of_tie = np.append(np.flatnonzero(np.diff(scores[order])), len(scores) - 1)
        values = [_weighted_auc(w, labels, last_of_tie) for w in self._drawn(codes)]
        return np.concatenate(values)

    def uauc(self, labels: Any, scores: Any, rows: np.ndarray | None = None) -> np.ndarray:
        """UAUC of each resample, `(resamples,)`; NaN where no user with both classes was drawn."""
        codes, labels, scores = self._slice(labels, scores, rows)
        table = auc_per_user(labels, scores, codes).dropna()
        users, values = table.index.to_numpy(dtype=np.int64), table["auc"].to_numpy()
        with np.errstate(invalid="ignore"):
            return np.concatenate([(drawn @ values) / drawn.sum(1) for drawn in self._drawn(users)])

    def _slice(
        self, labels: Any, scores: Any, rows: np.ndarray | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        chosen = slice(None) if rows is None else np.asarray(rows, dtype=bool)
        labels, scores = np.asarray(labels).astype(bool), np.asarray(scores, dtype=np.float64)
        return self.codes[chosen], labels[chosen], scores[chosen]

    def _drawn(self, codes: np.ndarray) -> Iterator[np.ndarray]:
        """Counts of these users, `(some resamples, len(codes))` float64."""
        step = max(1, COUNTS_AT_ONCE // max(1, len(codes)))
        for start in range(0, len(self.counts), step):
            yield self.counts[start : start + step][:, codes].astype(np.float64)


def _weighted_auc(weights: np.ndarray, labels: np.ndarray, last_of_tie: np.ndarray) -> np.ndarray:
    """AUC of rows sorted by score that count `weights` times each, per row of `weights`."""
    positives = np.cumsum(weights * labels, axis=1)[:, last_of_tie]
    negatives = np.cumsum(weights * ~labels, axis=1)[:, last_of_tie]
    # A run of equal scores wins over all negatives below it and over half of its own.
    below = np.pad(negatives, ((0, 0), (1, 0)))[:, :-1]
    wins = (np.diff(positives, axis=1, prepend=0) * (below + negatives) / 2).sum(1)
    with np.errstate(invalid="ignore"):
        return wins / (positives[:, -1] * negatives[:, -1])


def interval(values: np.ndarray, level: float = LEVEL) -> list[float]:
    """Percentile interval `[low, high]` over resamples; NaN resamples are left out."""
    usable = values[~np.isnan(values)]
    if not len(usable):
        return [float("nan"), float("nan")]
    tail = (1 - level) / 2
    return [float(bound) for bound in np.quantile(usable, [tail, 1 - tail])]
