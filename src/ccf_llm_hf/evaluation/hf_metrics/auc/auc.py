"""AUC as a module of the `evaluate` library."""

from typing import Any

import datasets
import evaluate

from ccf_llm_hf.evaluation.metrics import auc

_DESCRIPTION = "Area under the ROC curve over all rows; a tie between classes counts half."
_INPUTS = """
Args:
    predictions (list of float): scores on any monotone scale.
    references (list of int): labels, 0 or 1.
Returns:
    auc (float): NaN if only one class occurs.
"""


class AUC(evaluate.Metric):
    """`evaluate.load(metric_path("auc"))`; needs no network."""

    def _info(self) -> evaluate.MetricInfo:
        features = {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(features),
        )

    # `evaluate.combine` passes every module the inputs of all; those of uauc are ignored here.
    def _compute(self, predictions: Any, references: Any, users: Any = None) -> dict[str, float]:
        return {"auc": auc(references, predictions)}
