"""Temperature against Platt's scaling, on logits whose miscalibration is known."""

import json

import numpy as np
import pandas as pd
import pytest
from calibration import (
    calibrated,
    calibration,
    fit_calibration,
    measure_calibration,
    plot_calibration_fits,
)
from sklearn.linear_model import LogisticRegression
from tiny import TITLES

from ccf_llm_hf import CTRRanker
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation import auc, ece, fit_temperature, log_loss
from ccf_llm_hf.evaluation.bootstrap import UserBootstrap
from ccf_llm_hf.inference.score_table import score_table


def make(temperature: float, bias: float, rows: int = 8000, users: int = 200, taste: float = 0.0):
    """Logits of which `sigmoid(logit / temperature + bias)` is the truth, but for users' taste."""
    draw = np.random.default_rng(0)
    logits = draw.normal(0.3, 1.5, rows)
    owners = draw.integers(0, users, rows)
    truth = logits / temperature + bias + taste * draw.normal(size=users)[owners]
    labels = (draw.random(rows) < 1 / (1 + np.exp(-truth))).astype(np.int64)
    return logits, labels, np.array([f"u{user}" for user in owners])


def test_both_fits_find_what_is_wrong():
    logits, labels, users = make(temperature=2.0, bias=0.5)
    result = fit_calibration(logits, labels, users)
    assert result["platt"]["temperature"] == pytest.approx(2.0, rel=0.1)
    assert result["platt"]["bias"] == pytest.approx(0.5, abs=0.07)
    exact = LogisticRegression(C=1e9).fit(logits[:, None], labels)
    assert 1 / result["platt"]["temperature"] == pytest.approx(exact.coef_[0, 0], abs=1e-3)
    assert result["platt"]["bias"] == pytest.approx(exact.intercept_[0], abs=1e-3)
    assert result["temperature"]["temperature"] == fit_temperature(logits, labels)
    assert result["temperature"]["bias"] == 0
    assert result["bias_wins"]
    assert result["gain"]["ci"][0] > 0.01
    assert result["platt"]["ece"] < 0.02 < result["temperature"]["ece"]
    assert result["verdict"].startswith("a bias clearly helps")


def test_a_bias_that_is_not_there_does_not_win():
    result = fit_calibration(*make(temperature=2.0, bias=0.0))
    assert not result["bias_wins"]
    assert result["verdict"].startswith("the temperature is enough")
    assert abs(result["gain"]["log_loss"]) < 1e-3
    assert result["temperature"]["log_loss"] < result["none"]["log_loss"] - 0.01


def test_a_bias_of_a_few_users_alone_does_not_win():
    # Within rows as if independent, the bias would be certain; between users it is not.
    logits, labels, users = make(temperature=1.0, bias=0.0, users=6, taste=1.0)
    result = fit_calibration(logits, labels, users)
    assert result["folds"] == 5
    assert abs(result["platt"]["bias"]) > 0.1
    assert not result["bias_wins"]


def test_losses_are_of_users_left_out():
    logits, labels, users = make(temperature=1.5, bias=0.3, rows=600, users=7)
    result = fit_calibration(logits, labels, users, folds=100, seed=4)
    assert result["folds"] == 7
    probs = np.empty(len(logits))
    for user in np.unique(users):
        rest = users != user
        temperature = fit_temperature(logits[rest], labels[rest])
        probs[~rest] = 1 / (1 + np.exp(-logits[~rest] / temperature))
    assert result["temperature"]["log_loss"] == pytest.approx(log_loss(labels, probs))
    assert result["temperature"]["ece"] == pytest.approx(ece(labels, probs))
    assert result["none"]["ece"] == pytest.approx(ece(labels, 1 / (1 + np.exp(-logits))))


def test_repeats_deal_users_anew_and_are_averaged():
    data = make(temperature=1.5, bias=0.3, rows=600, users=7)
    one, two = (fit_calibration(*data, repeats=repeats) for repeats in (1, 2))
    other = 2 * two["gain"]["log_loss"] - one["gain"]["log_loss"]
    assert abs(other - one["gain"]["log_loss"]) > 1e-6
    assert two["platt"]["temperature"] == one["platt"]["temperature"]


def test_the_gain_is_drawn_by_user():
    logits, labels, users = make(temperature=2.0, bias=0.2, rows=400, users=9)
    result = fit_calibration(logits, labels, users, resamples=50, seed=1)
    again = fit_calibration(logits, labels, users, resamples=50, seed=1)
    assert result == again
    gain = result["temperature"]["log_loss"] - result["platt"]["log_loss"]
    assert result["gain"]["log_loss"] == pytest.approx(gain)
    low, high = result["gain"]["ci"]
    assert low < gain < high
    assert UserBootstrap(users, 50, 1).counts.shape == (50, 9)


def test_a_fit_keeps_the_order_and_is_measured_elsewhere():
    logits, labels, users = make(temperature=2.0, bias=0.5)
    half = np.arange(len(logits)) < 4000
    result = fit_calibration(logits[half], labels[half], users[half])
    fits = {name: result[name] for name in ("temperature", "platt")}
    measured = measure_calibration(fits, logits[~half], labels[~half])
    probs = calibrated(result["platt"], logits[~half])
    assert auc(labels[~half], probs) == auc(labels[~half], logits[~half])
    assert measured["platt"]["ece"] == ece(labels[~half], probs)
    assert measured["platt"]["log_loss"] == log_loss(labels[~half], probs)
    assert measured["platt"]["log_loss"] < measured["temperature"]["log_loss"]
    # What was made with a bias is off by more than chance without one, and not with it.
    bounds = {name: part["calibrated_ece"]["ci"] for name, part in measured.items()}
    assert measured["platt"]["ece"] < bounds["platt"][1]
    assert measured["temperature"]["ece"] > bounds["temperature"][1]


def test_extreme_logits_stay_finite():
    extreme = np.array([-1e4, 1e4])
    assert calibrated({"temperature": 0.01, "bias": 0.0}, extreme).tolist() == [0.0, 1.0]
    result = fit_calibration([-800.0, 900.0, 700.0, -900.0], [0, 1, 0, 1], ["a", "a", "b", "b"])
    json.dumps(result, allow_nan=False)
    one_class = fit_calibration([0.1, 0.2, 0.3], [1, 1, 1], ["a", "b", "c"])
    json.dumps(one_class, allow_nan=False)


def test_a_checkpoint_is_measured_with_the_temperature_it_holds(build, tmp_path):
    model, processor = build()
    model.config.logit_temperature = 3.0
    ranker = CTRRanker(model, processor)
    data_dir = write_splits(tmp_path / "data")
    result = calibration(ranker, data_dir, measure_on="test", progress=False)
    assert result["checkpoint"] == {"temperature": 3.0, "bias": 0.0}
    splits = {name: scored(ranker, data_dir, name) for name in ("validation", "test")}
    table = splits["validation"]
    assert result["temperature"]["temperature"] == fit_temperature(table["score"], table["label"])
    table = splits["test"]
    measured = result["measured"]
    assert measured["split"] == "test"
    assert measured["checkpoint"]["ece"] == pytest.approx(
        ece(table["label"], table["prob"]), abs=1e-6
    )
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    plot_calibration_fits(result, tmp_path / "calibration.png")
    assert (tmp_path / "calibration.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(InputError, match="'tests'"):
        calibration(ranker, data_dir, measure_on="tests")


def scored(ranker, data_dir, split) -> pd.DataFrame:
    from ccf_llm_hf.data.prepared import load_prepared

    rows = load_prepared(data_dir).splits[split]
    return score_table(ranker.model, ranker.processor, rows, progress=False)


def write_splits(folder):
    """A prepared folder in the tiny catalog, with histories."""
    from ccf_llm_hf.data.prepare import PrepareConfig, prepare

    draw = np.random.default_rng(0)
    rows = pd.DataFrame(
        {
            "user_id": [f"u{user}" for user in draw.integers(0, 6, 150)],
            "item_id": [f"i{item}" for item in draw.integers(0, len(TITLES), 150)],
            "title": "Film",
            "label": draw.integers(0, 2, 150),
            "timestamp": np.arange(150),
        }
    )
    folder.mkdir()
    rows.to_csv(folder / "rows.csv", index=False)
    config = PrepareConfig(
        source="table",
        out=str(folder / "prepared"),
        interactions=str(folder / "rows.csv"),
        label_column="label",
        ratios=[0.4, 0.3, 0.3],
    )
    return prepare(config, summary=False)


def test_bad_input_is_named():
    with pytest.raises(InputError, match="1 users"):
        fit_calibration([0.1, 0.2], [0, 1], ["a", "a"])
    with pytest.raises(InputError, match="equal length"):
        fit_calibration([0.1, 0.2], [0, 1], ["a"])
    with pytest.raises(InputError, match="NaN"):
        fit_calibration([0.1, float("nan")], [0, 1], ["a", "b"])
