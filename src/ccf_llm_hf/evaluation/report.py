"""One report per scored split: metrics with intervals, slices, controls, paired differences."""

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ccf_llm_hf.data.prepared import read_rows
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation.bootstrap import LEVEL, UserBootstrap, interval
from ccf_llm_hf.evaluation.controls import (
    AVERAGE_DEFINITION,
    DEFINITIONS,
    item_mean,
    item_user_mean,
    score_average,
)
from ccf_llm_hf.evaluation.linear_hybrid import DEFINITION, linear_hybrid
from ccf_llm_hf.evaluation.metrics import (
    ECE_BINS,
    auc,
    auc_per_user,
    ece,
    log_loss,
    reliability_table,
    uauc,
    wuauc,
)
from ccf_llm_hf.evaluation.scores import align_scores
from ccf_llm_hf.io import as_json

SLICES = {
    "warm_pair": "user and item both occur in train (not_cold)",
    "cold_user": "user does not occur in train",
    "cold_item": "item does not occur in train",
}
METRICS = {
    "auc": "area under the ROC curve over all rows, ties half",
    "uauc": "unweighted mean of per-user AUC over users with both classes (uauc_users)",
    "wuauc": "the same, each user weighted by the number of rows",
    "logloss": "mean negative log likelihood, nats",
    "ece": f"expected calibration error, {ECE_BINS} equal-width bins",
}


@dataclass
class _Split:
    """Rows of the split, the scores of every method, and resamples that they share."""

    rows: pd.DataFrame
    methods: dict[str, pd.DataFrame]
    bootstrap: UserBootstrap


def evaluate_scores(
    scores: pd.DataFrame,
    data_dir: str | Path,
    split: str = "test",
    compare: Mapping[str, pd.DataFrame] | None = None,
    *,
    name: str = "model",
    averages: Sequence[tuple[str, str]] = (),
    sample: bool = False,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Report on a method's scores of a split, beside the controls and other methods.

    Args:
        scores: user_id, item_id, score (any monotone scale) and, if known, prob and label.
        data_dir: folder written by `ccf-llm prepare`; the means of train are computed from it, and
            where its items have fields the linear hybrid is fitted to it (see `linear_hybrid`).
        split: train, validation or test.
        compare: name to scores of other methods, as of `read_scores` or `cf.score_cf`. One that
            covers only some rows is measured, and compared, on those; its `rows` says how many.
        name: of the evaluated method.
        sample: the scores cover a sample of the split; the report is of those rows alone. Without
            it, a row without a score is an error.
        averages: pairs of names whose scores are averaged as further methods.
        resamples: of the user-level bootstrap.
        seed: of the bootstrap.

    Returns:
        JSON-serializable: `methods` {name: {auc, auc_ci, uauc, uauc_ci, wuauc, logloss, ece, rows,
        users, uauc_users}}, `slices` {slice: {definition, rows, users, methods}}, `differences`
        {name: {auc, auc_ci, uauc, uauc_ci}} (the evaluated method minus that one, paired),
        `reliability` of the evaluated method, `definitions`. What is undefined is None.

    Raises:
        InputError: scores do not fit the split, or two methods have one name.
    """
    rows, train = read_rows(data_dir, split), read_rows(data_dir, "train")
    if rows.empty:
        raise InputError(f"{data_dir}: the {split} split has no rows to evaluate")
    hybrid = linear_hybrid(data_dir, split)
    if sample:
        scored = align_scores(scores, rows, name, partial=True)["score"].notna()
        rows = rows[scored].reset_index(drop=True)
        hybrid = None if hybrid is None else hybrid[scored].reset_index(drop=True)
    controls = {
        "item mean": item_mean(train, rows),
        "item + user mean": item_user_mean(train, rows),
    }
    if hybrid is not None:
        controls["linear hybrid"] = hybrid
    methods = _methods(scores, rows, controls, dict(compare or {}), name, averages)
    data = _Split(rows, methods, UserBootstrap(rows["user_id"], resamples, seed))
    masks = _slice_masks(rows, train)
    definitions = METRICS | DEFINITIONS
    definitions |= {"linear hybrid": DEFINITION} if hybrid is not None else {}
    definitions |= {" & ".join(pair): AVERAGE_DEFINITION for pair in averages}
    return as_json(
        {
            "split": split,
            "name": name,
            "rows": len(rows),
            "users": rows["user_id"].nunique(),
            "positive_rate": rows["label"].mean(),
            "methods": {method: _measure(data, method) for method in methods},
            "slices": {part: _slice(data, part, mask) for part, mask in masks.items()},
            "differences": {
                other: _difference(data, name, other) for other in methods if other != name
            },
            "reliability": _reliability(rows, methods[name]),
            "intervals": {"level": LEVEL, "unit": "user", "resamples": resamples, "seed": seed},
            "definitions": definitions,
        }
    )


def _methods(
    scores: pd.DataFrame,
    rows: pd.DataFrame,
    controls: dict[str, pd.DataFrame],
    compare: dict[str, pd.DataFrame],
    name: str,
    averages: Sequence[tuple[str, str]],
) -> dict[str, pd.DataFrame]:
    taken = {name, *controls} & set(compare) or {name} & set(controls)
    if taken:
        raise InputError(f"two methods are named {taken.pop()!r}; give the comparison another name")
    methods = {name: align_scores(scores, rows, name)}
    methods |= {key: align_scores(table, rows, key, partial=True) for key, table in compare.items()}
    methods |= controls
    for pair in averages:
        unknown = [part for part in pair if part not in methods]
        if unknown:
            raise InputError(
                f"cannot average {unknown[0]!r}: the methods are {', '.join(map(repr, methods))}"
            )
        methods[" & ".join(pair)] = score_average(methods[pair[0]], methods[pair[1]])
    return methods


def _slice_masks(rows: pd.DataFrame, train: pd.DataFrame) -> dict[str, np.ndarray]:
    user = rows["user_id"].isin(train["user_id"]).to_numpy()
    item = rows["item_id"].isin(train["item_id"]).to_numpy()
    return dict(zip(SLICES, (user & item, ~user, ~item), strict=True))


def _slice(data: _Split, part: str, mask: np.ndarray) -> dict[str, Any]:
    return {
        "definition": SLICES[part],
        "rows": int(mask.sum()),
        "users": data.rows["user_id"][mask].nunique(),
        "methods": {method: _measure(data, method, mask) for method in data.methods}
        if mask.any()
        else {},
    }


def _measure(data: _Split, method: str, mask: np.ndarray | None = None) -> dict[str, Any]:
    chosen = data.methods[method]["score"].notna().to_numpy()
    if mask is not None:
        chosen = chosen & mask
    rows, scores = data.rows[chosen], data.methods[method][chosen]
    labels, users = rows["label"], rows["user_id"]
    everything = data.rows["label"], data.methods[method]["score"]
    calibrated = scores["prob"].notna().all()
    return {
        "auc": auc(labels, scores["score"]),
        "auc_ci": interval(data.bootstrap.auc(*everything, chosen)),
        "uauc": uauc(labels, scores["score"], users),
        "uauc_ci": interval(data.bootstrap.uauc(*everything, chosen)),
        "wuauc": wuauc(labels, scores["score"], users),
        "logloss": log_loss(labels, scores["prob"]) if calibrated else None,
        "ece": ece(labels, scores["prob"]) if calibrated else None,
        "rows": len(rows),
        "users": users.nunique(),
        "uauc_users": auc_per_user(labels, scores["score"], users)["auc"].notna().sum(),
    }


def _difference(data: _Split, name: str, other: str) -> dict[str, Any]:
    labels, users = data.rows["label"], data.rows["user_id"]
    first, second = data.methods[name]["score"], data.methods[other]["score"]
    both = second.notna().to_numpy()
    a, b, y, u = first[both], second[both], labels[both], users[both]
    aucs = [data.bootstrap.auc(labels, scores, both) for scores in (first, second)]
    uaucs = [data.bootstrap.uauc(labels, scores, both) for scores in (first, second)]
    return {
        "auc": auc(y, a) - auc(y, b),
        "auc_ci": interval(aucs[0] - aucs[1]),
        "uauc": uauc(y, a, u) - uauc(y, b, u),
        "uauc_ci": interval(uaucs[0] - uaucs[1]),
        "rows": int(both.sum()),
    }


def _reliability(rows: pd.DataFrame, scores: pd.DataFrame) -> list[dict[Hashable, Any]] | None:
    if scores["prob"].isna().any():
        return None
    return reliability_table(rows["label"], scores["prob"]).to_dict("records")
