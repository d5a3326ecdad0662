"""UAUC as a module of the `evaluate` library."""

from typing import Any

import datasets
import evaluate

from ccf_llm_hf.evaluation.metrics import uauc, wuauc

_DESCRIPTION = "Mean of per-user AUC over the users with both classes."
_INPUTS = """
Args:
    predictions (list of float): scores on any monotone scale.
    references (list of int): labels, 0 or 1.
    users (list of str): user of each row.
Returns:
    uauc (float): unweighted mean; NaN if no user has both classes.
    wuauc (float): the same, weighted by the users' rows.
"""


class UAUC(evaluate.Metric):
    """`evaluate.load(metric_path("uauc"))`; needs no network."""

    def _info(self) -> evaluate.MetricInfo:
        features = {
            "predictions": datasets.Value("float64"),
            "references": datasets.Value("int64"),
            "users": datasets.Value("string"),
        }
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    def _compute(self, predictions: Any, references: Any, users: Any) -> dict[str, float]:
        return {
            "uauc": uauc(references, predictions, users),
            "wuauc": wuauc(references, predictions, users),
        }
