"""Metrics of CTR prediction and ranking, vectorized over users.

`labels` is `(n,)` of 0 and 1 (or bool), `scores` `(n,)` real (any monotone scale), `probs` `(n,)`
in [0, 1], `users` and `lists` `(n,)` ids of any type; arrays, lists and CPU tensors all do.
"""

from typing import Any

import numpy as np
import pandas as pd

from ccf_llm_hf.errors import InputError

ECE_BINS = 15  # as Guo et al. 2017
TEMPERATURES = (0.01, 100.0)  # beyond what any model here asked for; our choice
LEAST_PROB = 1e-7  # about what float32 tells from 1; our choice


def auc(labels: Any, scores: Any) -> float:
    """Area under the ROC curve over all rows; a tie between classes counts half.

    Returns:
        NaN if only one class occurs.

    Raises:
        InputError: lengths differ, labels are not 0 and 1, or a score is NaN.
    """
    labels, scores = _checked(labels, scores)
    _, wins, pairs = _pairs_won(labels, scores, np.zeros(len(labels), dtype=np.int64), 1)
    return float(wins[0] / pairs[0]) if pairs[0] else float("nan")


def auc_per_user(labels: Any, scores: Any, users: Any) -> pd.DataFrame:
    """AUC of every user.

    Returns:
        Index: user, in order of first appearance. Columns: `auc` (NaN for users with one class
        only), `rows` (int).
    """
    labels, scores = _checked(labels, scores)
    codes, names = pd.factorize(_column(users, len(labels), "users"), use_na_sentinel=False)
    rows, wins, pairs = _pairs_won(labels, scores, codes, len(names))
    values = np.divide(wins, pairs, out=np.full(len(names), np.nan), where=pairs > 0)
    return pd.DataFrame({"auc": values, "rows": rows}, index=pd.Index(names, name="user"))


def uauc(labels: Any, scores: Any, users: Any) -> float:
    """Unweighted mean of per-user AUC over the users with both classes (CoLLM's UAUC)."""
    return float(auc_per_user(labels, scores, users)["auc"].mean())


def wuauc(labels: Any, scores: Any, users: Any) -> float:
    """Mean of per-user AUC over the users with both classes, weighted by their rows."""
    table = auc_per_user(labels, scores, users).dropna()
    return float(np.average(table["auc"], weights=table["rows"])) if len(table) else float("nan")


def log_loss(labels: Any, probs: Any) -> float:
    """Mean negative log likelihood in nats; probabilities are clipped to [1e-7, 1 - 1e-7]."""
    labels, probs = _checked(labels, probs)
    probs = np.clip(probs, LEAST_PROB, 1 - LEAST_PROB)
    return float(-np.where(labels, np.log(probs), np.log1p(-probs)).mean())


def reliability_table(labels: Any, probs: Any, bins: int = ECE_BINS) -> pd.DataFrame:
    """Predicted against observed rates in equal-width bins of the predicted probability.

    Returns:
        One row per bin: `low`, `high` (bin k is [k / bins, (k + 1) / bins), the last one closed),
        `rows`, `predicted` (mean probability), `observed` (positive rate); NaN where empty.
    """
    labels, probs = _checked(labels, probs)
    if len(probs) and not (probs.min() >= 0 and probs.max() <= 1):
        raise InputError("probs must lie in [0, 1]; apply the sigmoid to logits first")
    codes = np.minimum((probs * bins).astype(np.int64), bins - 1)
    rows = np.bincount(codes, minlength=bins)
    with np.errstate(invalid="ignore"):
        predicted = np.bincount(codes, weights=probs, minlength=bins) / rows
        observed = np.bincount(codes, weights=labels, minlength=bins) / rows
    edges = np.arange(bins + 1) / bins
    columns = {"low": edges[:-1], "high": edges[1:], "rows": rows}
    return pd.DataFrame(columns | {"predicted": predicted, "observed": observed})


def ece(labels: Any, probs: Any, bins: int = ECE_BINS) -> float:
    """Expected calibration error: mean |predicted - observed| over equal-width bins, by rows."""
    table = reliability_table(labels, probs, bins).query("rows > 0")
    gaps = (table["predicted"] - table["observed"]).abs()
    return float(np.average(gaps, weights=table["rows"])) if len(table) else float("nan")


def fit_temperature(logits: Any, labels: Any) -> float:
    """The T in [0.01, 100] that minimizes the log loss of `sigmoid(logits / T)`.

    Fit it on the validation split. Source: Guo et al., "On Calibration of Modern Neural Networks".
    """
    from scipy.optimize import minimize_scalar

    labels, logits = _checked(labels, logits)
    if not len(labels):
        raise InputError("fit_temperature got no rows; give the validation split's logits")

    def loss(log_temperature: float) -> float:
        scaled = logits / np.exp(log_temperature)
        return float((np.logaddexp(0, scaled) - labels * scaled).mean())

    found = minimize_scalar(loss, bounds=tuple(np.log(TEMPERATURES)), method="bounded")
    return float(np.exp(found.x))


def ndcg_at_k(labels: Any, scores: Any, lists: Any, k: int = 10) -> float:
    """Mean over candidate lists with a positive of DCG@k / ideal DCG@k, binary gains."""
    ranked = _ranked(labels, scores, lists, k)
    gains = ranked["label"] * (ranked["rank"] <= k) / np.log2(ranked["rank"] + 1)
    positives = ranked["label"].groupby(ranked["list"]).sum()
    ideal = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(k) + 2))])
    best = ideal[np.minimum(positives.to_numpy().astype(np.int64), k)]
    return _mean_over(gains.groupby(ranked["list"]).sum().to_numpy(), best)


def hr_at_k(labels: Any, scores: Any, lists: Any, k: int = 10) -> float:
    """Share of the candidate lists with a positive that have one among their first k."""
    ranked = _ranked(labels, scores, lists, k)
    hits = (ranked["label"] * (ranked["rank"] <= k)).groupby(ranked["list"]).max()
    return _mean_over(hits.to_numpy(), ranked["label"].groupby(ranked["list"]).max().to_numpy())


def mrr(labels: Any, scores: Any, lists: Any) -> float:
    """Mean over candidate lists with a positive of 1 / rank of the first positive."""
    ranked = _ranked(labels, scores, lists, 1)
    first = (ranked["label"] / ranked["rank"]).groupby(ranked["list"]).max()
    return _mean_over(first.to_numpy(), ranked["label"].groupby(ranked["list"]).max().to_numpy())


def _mean_over(values: np.ndarray, best: np.ndarray) -> float:
    usable = best > 0
    return float((values[usable] / best[usable]).mean()) if usable.any() else float("nan")


def _ranked(labels: Any, scores: Any, lists: Any, k: int) -> pd.DataFrame:
    """`list`, `label` and 1-based `rank`; of equal scores the negative ranks first.

    So a constant score earns nothing, and the order of the input does not matter.
    """
    if k < 1:
        raise InputError(f"k={k} must be at least 1")
    labels, scores = _checked(labels, scores)
    codes, _ = pd.factorize(_column(lists, len(labels), "lists"), use_na_sentinel=False)
    order = np.lexsort((labels, -scores, codes))
    table = pd.DataFrame({"list": codes[order], "label": labels[order].astype(float)})
    table["rank"] = table.groupby("list").cumcount() + 1
    return table


def _checked(labels: Any, values: Any) -> tuple[np.ndarray, np.ndarray]:
    labels = np.asarray(labels)
    values = np.asarray(values, dtype=np.float64)
    if labels.ndim != 1 or labels.shape != values.shape:
        raise InputError(
            f"labels have shape {labels.shape} but scores {values.shape}; give two flat arrays of "
            "equal length"
        )
    if not np.isin(labels, (0, 1)).all():
        raise InputError("labels must be 0 or 1; turn ratings into labels first")
    if np.isnan(values).any():
        raise InputError(f"score {int(np.isnan(values).argmax())} is NaN; every row needs a number")
    return labels.astype(bool), values


def _column(values: Any, length: int, name: str) -> np.ndarray:
    array = values.to_numpy() if hasattr(values, "to_numpy") else np.asarray(values)
    if array.shape != (length,):
        raise InputError(f"{name} have shape {array.shape} but there are {length} rows")
    return array


def _pairs_won(
    labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, num_groups: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per group: rows, positive-over-negative pairs ranked right (ties half), all such pairs."""
    order = np.lexsort((scores, groups))
    labels, scores, groups = labels[order], scores[order], groups[order]
    new = np.ones(len(labels), dtype=bool)
    new[1:] = (groups[1:] != groups[:-1]) | (scores[1:] != scores[:-1])
    # Mean rank (1-based) of each run of equal scores within a group, over the whole sorted array.
    starts = np.flatnonzero(new)
    ends = np.append(starts[1:], len(labels))
    ranks = np.repeat((starts + 1 + ends) / 2, ends - starts)
    rows = np.bincount(groups, minlength=num_groups)
    before = np.concatenate([[0], np.cumsum(rows)[:-1]])
    ranks = ranks - before[groups]
    positives = np.bincount(groups, weights=labels, minlength=num_groups)
    rank_sums = np.bincount(groups, weights=ranks * labels, minlength=num_groups)
    wins = rank_sums - positives * (positives + 1) / 2
    return rows, wins, positives * (rows - positives)
