import numpy as np
import pandas as pd
import pytest

from ccf_llm_hf.evaluation import auc, item_mean, item_user_mean, score_average
from ccf_llm_hf.evaluation.controls import as_logits

TRAIN = pd.DataFrame(
    {
        "user_id": ["a"] * 20 + ["b"] * 20,
        "item_id": ["x", "y"] * 20,
        "label": [1, 0] * 10 + [1, 1] * 10,
    }
)
PRIOR = 31 / 42


def logit(prob: float) -> float:
    return float(np.log(prob / (1 - prob)))


def test_item_mean_is_the_smoothed_rate() -> None:
    rows = pd.DataFrame({"user_id": ["a", "b", "a"], "item_id": ["x", "y", "new"]})
    scores = item_mean(TRAIN, rows)
    expected = [(20 + 5 * PRIOR) / 25, (10 + 5 * PRIOR) / 25, PRIOR]
    assert scores["prob"].tolist() == pytest.approx(expected)
    assert scores["score"].tolist() == pytest.approx([logit(p) for p in expected])


def test_item_user_mean_adds_logits() -> None:
    rows = pd.DataFrame({"user_id": ["a", "new", "new"], "item_id": ["x", "x", "new"]})
    item, user = (20 + 5 * PRIOR) / 25, (10 + 20 * PRIOR) / 40
    expected = [logit(item) + logit(user) - logit(PRIOR), logit(item), logit(PRIOR)]
    assert item_user_mean(TRAIN, rows)["score"].tolist() == pytest.approx(expected)


def test_controls_never_read_the_labels_of_the_rows() -> None:
    rows = pd.DataFrame({"user_id": ["a", "b"], "item_id": ["x", "y"], "label": [1, 0]})
    for control in (item_mean, item_user_mean):
        pd.testing.assert_frame_equal(
            control(TRAIN, rows), control(TRAIN, rows.assign(label=1 - rows["label"]))
        )


def test_score_average_ignores_the_scale_of_the_scores() -> None:
    first = pd.DataFrame({"score": [0.0, 1.0, 2.0], "prob": [0.1, 0.5, 0.9]})
    second = pd.DataFrame({"score": [2.0, 0.0, 1.0], "prob": [0.5, 0.3, 0.1]})
    average = score_average(first, second)
    larger = score_average(first.assign(score=first["score"] * 100 + 7), second)
    np.testing.assert_allclose(average["score"], larger["score"])
    assert average["prob"].tolist() == pytest.approx([0.3, 0.4, 0.5])
    constant = score_average(first.assign(score=1.0), second)
    assert constant["score"].rank().tolist() == second["score"].rank().tolist()


def test_score_average_takes_any_number_of_methods() -> None:
    methods = [
        pd.DataFrame({"score": scores, "prob": [0.2, 0.6]}) for scores in ([0, 1], [5, 3], [0, 9])
    ]
    average = score_average(*methods)
    np.testing.assert_allclose(average["score"], [-1 / 3, 1 / 3])
    assert average["prob"].tolist() == pytest.approx([0.2, 0.6])


def test_as_logits_gives_an_average_the_level_of_its_probabilities() -> None:
    draw = np.random.default_rng(0)
    logits = draw.normal(1.0, 0.8, size=(2, 4_000))
    label = draw.random(4_000) < 1 / (1 + np.exp(-logits.mean(0)))
    first, second = (pd.DataFrame({"score": x, "prob": 1 / (1 + np.exp(-x))}) for x in logits)
    average = score_average(first, second)
    leveled = as_logits(average)
    assert auc(label, leveled["score"]) == auc(label, average["score"])
    assert abs((1 / (1 + np.exp(-average["score"]))).mean() - label.mean()) > 0.15
    assert abs((1 / (1 + np.exp(-leveled["score"]))).mean() - label.mean()) < 0.02
