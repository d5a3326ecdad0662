"""Is a temperature enough? Against Platt's scaling, on validation, over users left out.

`prob = sigmoid(logit / temperature + bias)`. A checkpoint carries a temperature alone, fitted on
the validation labels that its training looked at. Neither fit changes the order of scores, so AUC
and UAUC stay.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from cold_start import Checkpoint, as_ranker, save_figure
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ccf_llm_hf.data.prepared import load_prepared
from ccf_llm_hf.data.protocol import SPLITS
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation.bootstrap import UserBootstrap, interval
from ccf_llm_hf.evaluation.metrics import (
    TEMPERATURES,
    ece,
    ece_if_calibrated,
    fit_temperature,
    log_loss,
    reliability_table,
)
from ccf_llm_hf.inference.score_table import sample_users, score_table

Fit = Callable[[np.ndarray, np.ndarray], dict[str, float]]
FITS = ("temperature", "platt")


def calibration(
    checkpoint: Checkpoint,
    data_dir: str | Path,
    measure_on: str | None = None,
    seed: int = 0,
    max_rows: int | None = None,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Score the validation split, fit both calibrations on it, and measure them elsewhere.

    Args:
        checkpoint: a ranker, or a checkpoint folder.
        data_dir: prepared folder.
        measure_on: another split to report the fits on, for example test; nothing is chosen there.
        seed: of the sample of rows and of `fit_calibration`.
        max_rows: of each split, score whole users until this many rows are reached; default all.
        progress: show bars.

    Returns:
        What `fit_calibration` gives, with `checkpoint` (the fit that the checkpoint's config holds,
        {temperature, bias}) and, with `measure_on`, `measured`: {split, **measure_calibration}.

    Raises:
        InputError: an unknown split, or a bad folder or checkpoint.
    """
    if measure_on is not None and measure_on not in SPLITS:
        raise InputError(f"measure_on={measure_on!r} is no split: give one of {', '.join(SPLITS)}")
    ranker, splits = as_ranker(checkpoint), load_prepared(data_dir).splits

    def scored(split: str) -> pd.DataFrame:
        rows = splits[split]
        rows = rows if max_rows is None else sample_users(rows, max_rows, seed)
        return score_table(ranker.model, ranker.processor, rows, progress=progress)

    table = scored("validation")
    result = fit_calibration(table["score"], table["label"], table["user_id"], seed=seed)
    held = {"temperature": float(ranker.model.config.logit_temperature), "bias": 0.0}
    result["checkpoint"] = held
    if measure_on is not None:
        table = scored(measure_on)
        fits = {name: result[name] for name in (*FITS, "checkpoint")}
        measured = measure_calibration(fits, table["score"], table["label"])
        result["measured"] = {"split": measure_on, **measured}
    return result


def fit_calibration(
    valid_logits: Any,
    labels: Any,
    users: Any,
    *,
    folds: int = 5,
    repeats: int = 10,
    resamples: int = 1000,
    seed: int = 0,
) -> dict[str, Any]:
    """Fit a temperature, and a temperature with a bias (Platt), and compare them by log loss.

    The comparison is over users whom a fit has not seen (cross-validation by user), with a paired
    bootstrap over users. The bias wins clearly (our choice) if the interval of its gain lies above
    zero.

    Args:
        valid_logits: `(n,)` uncalibrated logits of the validation split.
        labels: `(n,)` 0 or 1.
        users: `(n,)` ids.
        folds: of the cross-validation; fewer if there are fewer users.
        repeats: cross-validations with users dealt anew, over which everything is averaged: with
            few heavy users, one deal decides about as much as the fits do.
        resamples: of the bootstrap.
        seed: of the folds and of the bootstrap.

    Returns:
        `none`, `temperature` and `platt`: {temperature, bias, log_loss, ece, reliability}: the fit
        on all rows, and how users left out fare (in `reliability`, every row once a repeat);
        `gain`: {log_loss, ci}, nats that the bias saves; `bias_wins`; `verdict`, in words; `rows`,
        `users`, `folds`, `repeats`.

    Raises:
        InputError: fewer than two users, lengths that differ, or a logit that is NaN.
    """
    logits, labels, users = _checked(valid_logits, labels, users)
    codes, names = pd.factorize(users)
    if len(names) < 2:
        raise InputError(f"fit_calibration got {len(names)} users; give at least two to compare by")
    folds = min(folds, len(names))
    generator = np.random.default_rng(seed)
    parts = [generator.permutation(len(names))[codes] % folds for _ in range(repeats)]
    result: dict[str, Any] = {"rows": len(logits), "users": len(names)}
    result |= {"folds": folds, "repeats": repeats}
    losses = {}
    for name, fit in (("none", _no_fit), ("temperature", _fit_temperature), ("platt", _fit_platt)):
        probs = np.stack([_left_out(fit, logits, labels, part, folds) for part in parts])
        losses[name] = _row_losses(labels, probs).mean(axis=0)
        result[name] = fit(logits, labels) | _quality(np.tile(labels, repeats), probs.ravel())
    saved = losses["temperature"] - losses["platt"]
    bounds = _mean_interval(saved, users, resamples, seed)
    result["gain"] = {"log_loss": float(saved.mean()), "ci": bounds}
    result["bias_wins"] = bounds[0] > 0
    return result | {"verdict": _verdict(result)}


def calibrated(fit: Mapping[str, float], logits: Any) -> np.ndarray:
    """Probabilities `(n,)` float64 of logits under a fit ({temperature, bias})."""
    scaled = np.asarray(logits, dtype=np.float64) / fit["temperature"] + fit["bias"]
    return np.exp(-np.logaddexp(0, -scaled))


def measure_calibration(
    fits: Mapping[str, Mapping[str, float]], logits: Any, labels: Any
) -> dict[str, Any]:
    """{fit: {log_loss, ece, reliability, calibrated_ece}} of fits on rows that they were not made
    on; `calibrated_ece` ({mean, ci}) is what the same probabilities would show if they were right.
    """
    labels, measured = np.asarray(labels), {}
    for name, fit in fits.items():
        probs = calibrated(fit, logits)
        mean, bounds = ece_if_calibrated(probs)
        measured[name] = _quality(labels, probs) | {"calibrated_ece": {"mean": mean, "ci": bounds}}
    return measured


def _left_out(
    fit: Fit, logits: np.ndarray, labels: np.ndarray, part: np.ndarray, folds: int
) -> np.ndarray:
    """Probabilities of every row, by the fit on the other parts."""
    probs = np.empty(len(logits))
    for fold in range(folds):
        inside = part == fold
        probs[inside] = calibrated(fit(logits[~inside], labels[~inside]), logits[inside])
    return probs


def _no_fit(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"temperature": 1.0, "bias": 0.0}


def _fit_temperature(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    return {"temperature": fit_temperature(logits, labels), "bias": 0.0}


def _fit_platt(logits: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Temperature and bias of least log loss, the temperature within the bounds of the other fit.

    Source: Platt, "Probabilistic Outputs for Support Vector Machines", without its smoothed labels.
    """
    from scipy.optimize import minimize

    def loss(point: np.ndarray) -> tuple[float, np.ndarray]:
        slope, bias = point
        scaled = slope * logits + bias
        wrong = np.exp(-np.logaddexp(0, -scaled)) - labels
        value = (np.logaddexp(0, scaled) - labels * scaled).mean()
        return float(value), np.array([(wrong * logits).mean(), wrong.mean()])

    start = np.array([1 / fit_temperature(logits, labels), 0.0])
    slopes = (1 / TEMPERATURES[1], 1 / TEMPERATURES[0])
    # The bias is bounded too: labels of one class have none of least loss.
    found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=[slopes, (-20.0, 20.0)])
    return {"temperature": float(1 / found.x[0]), "bias": float(found.x[1])}


def _quality(labels: np.ndarray, probs: np.ndarray) -> dict[str, Any]:
    table = reliability_table(labels, probs).query("rows > 0")
    return {
        "log_loss": log_loss(labels, probs),
        "ece": ece(labels, probs),
        "reliability": table.to_dict("records"),
    }


def _row_losses(labels: np.ndarray, probs: np.ndarray) -> np.ndarray:
    probs = np.clip(probs, 1e-7, 1 - 1e-7)  # as `metrics.log_loss`
    return -np.where(labels == 1, np.log(probs), np.log1p(-probs))


def _mean_interval(values: np.ndarray, users: np.ndarray, resamples: int, seed: int) -> list[float]:
    """Interval of the mean over rows, users being drawn with all their rows."""
    bootstrap = UserBootstrap(users, resamples, seed)
    sums = np.bincount(bootstrap.codes, weights=values)
    rows = np.bincount(bootstrap.codes)
    drawn = bootstrap.counts.astype(np.float64)
    return interval((drawn @ sums) / (drawn @ rows))


def _verdict(result: Mapping[str, Any]) -> str:
    temperature, platt, gain = result["temperature"], result["platt"], result["gain"]
    answer = (
        "a bias clearly helps: give the config a logit_bias"
        if result["bias_wins"]
        else "the temperature is enough"
    )
    low, high = gain["ci"]
    return (
        f"{answer}: log loss {temperature['log_loss']:.4f} with temperature "
        f"{temperature['temperature']:.3f}, {platt['log_loss']:.4f} with temperature "
        f"{platt['temperature']:.3f} and bias {platt['bias']:+.3f}, over {result['users']:,} users "
        f"left out in turn (saved {gain['log_loss']:+.5f} [{low:+.5f}, {high:+.5f}]); ECE "
        f"{temperature['ece']:.3f} and {platt['ece']:.3f}, uncalibrated {result['none']['ece']:.3f}"
    )


def _checked(logits: Any, labels: Any, users: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    logits, labels = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    users = np.asarray(users)
    if not logits.shape == labels.shape == users.shape or logits.ndim != 1:
        raise InputError(
            f"fit_calibration got logits {logits.shape}, labels {labels.shape} and users "
            f"{users.shape}; give three flat arrays of equal length"
        )
    log_loss(labels, logits)  # refuses other labels than 0 and 1, and NaN
    return logits, labels.astype(np.float64), users


def plot_calibration_fits(result: Mapping[str, Any], path: str | Path) -> None:
    """Observed against predicted rates of users left out, one line a fit.

    Args:
        result: of `fit_calibration` or `calibration`.
        path: image to write; the suffix decides the format.

    Raises:
        InputError: the path cannot be written.
    """
    figure = Figure(figsize=(5, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color="0.7", linestyle="--")
    names = {"none": "uncalibrated", "temperature": "temperature", "platt": "temperature and bias"}
    for key, name in names.items():
        table = result[key]["reliability"]
        axes.plot(
            [part["predicted"] for part in table],
            [part["observed"] for part in table],
            marker="o",
            ms=3,
            label=f"{name}: ECE {result[key]['ece']:.3f}",
        )
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="predicted probability")
    axes.set(ylabel="observed positive rate", title="validation, users left out in turn")
    axes.legend(loc="upper left", fontsize=8)
    axes.grid(alpha=0.3)
    save_figure(figure, path)
