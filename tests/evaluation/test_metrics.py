import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import log_loss as sklearn_log_loss
from sklearn.metrics import ndcg_score, roc_auc_score

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation import (
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

# Scores from few values, so that ties are common.
SAMPLES = st.lists(
    st.tuples(st.integers(0, 1), st.sampled_from([-2.5, -1.0, 0.0, 0.1, 3.0]), st.integers(0, 4)),
    min_size=1,
    max_size=40,
)


def per_user_reference(samples: list[tuple[int, float, int]]) -> list[tuple[float, int]]:
    table = pd.DataFrame(samples, columns=["label", "score", "user"])
    return [
        (roc_auc_score(rows["label"], rows["score"]), len(rows))
        for _, rows in table.groupby("user")
        if rows["label"].nunique() == 2
    ]


@given(SAMPLES)
def test_auc_equals_sklearn(samples: list[tuple[int, float, int]]) -> None:
    labels, scores, _ = zip(*samples, strict=True)
    if len(set(labels)) == 2:
        assert auc(labels, scores) == pytest.approx(roc_auc_score(labels, scores))
    else:
        assert np.isnan(auc(labels, scores))


@given(SAMPLES)
def test_uauc_and_wuauc_equal_sklearn_per_user(samples: list[tuple[int, float, int]]) -> None:
    labels, scores, users = zip(*samples, strict=True)
    reference = per_user_reference(samples)
    table = auc_per_user(labels, scores, users)
    assert table["rows"].sum() == len(samples)
    assert table["auc"].notna().sum() == len(reference)
    if reference:
        values, rows = zip(*reference, strict=True)
        assert uauc(labels, scores, users) == pytest.approx(np.mean(values))
        assert wuauc(labels, scores, users) == pytest.approx(np.average(values, weights=rows))
    else:
        assert np.isnan(uauc(labels, scores, users))
        assert np.isnan(wuauc(labels, scores, users))


def test_extreme_and_unordered_inputs() -> None:
    assert auc([0, 1, 1], [-np.inf, 0.0, np.inf]) == 1.0
    assert auc([True, False], torch.tensor([0.2, 0.8])) == 0.0
    assert uauc([1, 0, 1, 0], [2, 1, 0, 3], ["b", "b", "a", "a"]) == 0.5


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [0.5], "equal length"),
        ([0, 2], [0.5, 0.1], "0 or 1"),
        ([0, 1], [0.5, float("nan")], "score 1 is NaN"),
    ],
)
def test_bad_input_is_refused(labels: list, scores: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        auc(labels, scores)
    with pytest.raises(InputError, match="users have shape"):
        uauc([0, 1], [0.1, 0.2], ["a"])


@given(st.lists(st.tuples(st.integers(0, 1), st.floats(0.001, 0.999)), min_size=1, max_size=30))
def test_log_loss_equals_sklearn(samples: list[tuple[int, float]]) -> None:
    labels, probs = zip(*samples, strict=True)
    assert log_loss(labels, probs) == pytest.approx(sklearn_log_loss(labels, probs, labels=[0, 1]))


def test_log_loss_is_finite_at_the_ends() -> None:
    assert log_loss([1, 0], [0.0, 1.0]) == pytest.approx(-np.log(1e-7))


def test_ece_and_reliability_by_hand() -> None:
    labels, probs = [1, 0, 1, 1], [0.1, 0.1, 0.9, 1.0]
    table = reliability_table(labels, probs, bins=2)
    assert table["rows"].tolist() == [2, 2]
    assert table["observed"].tolist() == [0.5, 1.0]
    assert table["predicted"].tolist() == pytest.approx([0.1, 0.95])
    assert ece(labels, probs, bins=2) == pytest.approx((0.4 + 0.05) / 2)
    assert len(reliability_table(labels, probs)) == 15
    with pytest.raises(InputError, match=r"\[0, 1\]"):
        ece([0, 1], [0.5, 1.5])


def test_a_calibrated_forecast_has_little_ece() -> None:
    generator = np.random.default_rng(0)
    probs = generator.random(50_000)
    labels = generator.random(50_000) < probs
    assert ece(labels, probs) < 0.01
    assert ece(labels, probs**3) > 0.1


@pytest.mark.parametrize("temperature", [0.25, 1.0, 4.0])
def test_fit_temperature_recovers_the_scale(temperature: float) -> None:
    generator = np.random.default_rng(1)
    logits = generator.normal(size=20_000) * 2
    labels = generator.random(20_000) < 1 / (1 + np.exp(-logits))
    assert fit_temperature(logits * temperature, labels) == pytest.approx(temperature, rel=0.05)


def test_fit_temperature_stays_in_its_bounds() -> None:
    assert 0.01 <= fit_temperature([5.0, -5.0], [1, 0]) <= 0.02
    assert 50 < fit_temperature([5.0, -5.0], [0, 1]) <= 100
    with pytest.raises(InputError, match="no rows"):
        fit_temperature([], [])


@pytest.mark.parametrize("k", [1, 3, 10])
def test_ndcg_equals_sklearn_without_ties(k: int) -> None:
    generator = np.random.default_rng(2)
    lists = generator.integers(0, 6, 60)
    labels, scores = generator.integers(0, 2, 60), generator.permutation(60)
    reference = [
        ndcg_score([labels[lists == name]], [scores[lists == name]], k=k) for name in range(6)
    ]
    assert ndcg_at_k(labels, scores, lists, k) == pytest.approx(np.mean(reference))


def test_ranking_metrics_by_hand() -> None:
    lists = ["a"] * 4 + ["b"] * 3 + ["none"] * 2
    labels = [0, 0, 1, 1, 1, 0, 0, 0, 0]
    scores = [9, 8, 7, 6, 3, 2, 1, 5, 4]
    assert mrr(labels, scores, lists) == pytest.approx((1 / 3 + 1) / 2)
    assert hr_at_k(labels, scores, lists, 2) == 0.5
    assert hr_at_k(labels, scores, lists, 3) == 1.0
    assert ndcg_at_k(labels, scores, lists, 1) == 0.5
    assert np.isnan(mrr([0], [1.0], ["a"]))
    with pytest.raises(InputError, match="k=0"):
        hr_at_k(labels, scores, lists, 0)


def test_a_constant_score_earns_no_rank() -> None:
    for labels in ([1, 0, 0, 0], [0, 0, 0, 1]):
        assert mrr(labels, [0.5] * 4, ["a"] * 4) == 0.25
        assert hr_at_k(labels, [0.5] * 4, ["a"] * 4, 3) == 0.0
