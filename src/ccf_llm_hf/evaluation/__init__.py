"""Metrics, intervals, controls and reports."""

from ccf_llm_hf.evaluation.bootstrap import UserBootstrap, interval
from ccf_llm_hf.evaluation.calibration_plot import plot_calibration
from ccf_llm_hf.evaluation.controls import item_mean, item_user_mean, score_average
from ccf_llm_hf.evaluation.hf_metrics import metric_path
from ccf_llm_hf.evaluation.linear_hybrid import linear_hybrid
from ccf_llm_hf.evaluation.metrics import (
    auc,
    auc_per_user,
    ece,
    fit_temperature,
    hr_at_k,
    log_loss,
    mrr,
    ndcg_at_k,
    reliability_table,
    uauc,
    wuauc,
)
from ccf_llm_hf.evaluation.report import evaluate_scores
from ccf_llm_hf.evaluation.scores import read_scores
from ccf_llm_hf.evaluation.tables import format_report

__all__ = [
    "UserBootstrap",
    "auc",
    "auc_per_user",
    "ece",
    "evaluate_scores",
    "fit_temperature",
    "format_report",
    "hr_at_k",
    "interval",
    "item_mean",
    "item_user_mean",
    "linear_hybrid",
    "log_loss",
    "metric_path",
    "mrr",
    "ndcg_at_k",
    "plot_calibration",
    "read_scores",
    "reliability_table",
    "score_average",
    "uauc",
    "wuauc",
]
