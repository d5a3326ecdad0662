"""Users folded in: against the mode of the posterior, found by a plain minimizer."""

import json
from dataclasses import replace

import datasets
import numpy as np
import pytest
from measure import folded_scores
from scipy.optimize import minimize

from ccf_llm_hf.errors import InputError

PRECISION = [1.0, 2.0, 0.5, 1.5, 3.0, 0.0]  # the last dimension stays at the default user's
SCALE = (3.5, 1.2)
ROWS = {
    "user_id": ["u0", "u0", "stranger", "u1"],
    "item_id": ["i1", "i7", "i3", "i0"],
    "history": [["i0", "i3", "i4"], ["i5"], [], ["i6", "i7", "i1", "i2"]],
    "history_labels": [[1, 0, 1], [0], [], [0, 1, 1, 0]],
    "history_ratings": [[5.0, 1.0, 4.0], [3.0], [], [2.0, 4.0, 5.0, 3.0]],
}


@pytest.fixture
def folder(cf, tmp_path):
    cf.item_vectors /= 3
    metadata = {"user_precision": json.dumps(PRECISION)}
    replace(cf, metadata=metadata).save(tmp_path / "labels")
    graded = metadata | {"rating_scale": json.dumps(SCALE)}
    replace(cf, metadata=graded).save(tmp_path / "graded")
    return tmp_path


def expected(cf, targets):
    """Logits of the rows, each user vector found by minimizing the negative log posterior."""
    items = cf.item_vectors[-1].double().numpy()
    default = cf.default_user[-1].double().numpy()
    offset, precision = float(cf.offset[-1]), np.array(PRECISION)
    free = precision > 0
    logits = []
    for history, wanted, candidate in zip(ROWS["history"], targets, ROWS["item_id"], strict=True):
        rows = np.array([int(item[1:]) for item in history], dtype=int)
        weight = rows != 7  # i7 has no vector

        def user_of(part):
            user = default.copy()
            user[free] = part
            return user

        def loss(part, rows=rows, wanted=wanted, weight=weight):
            user = user_of(part)
            logit = items[rows] @ user + offset
            fit = weight * (np.logaddexp(0, logit) - np.array(wanted) * logit)
            return fit.sum() + 0.5 * (precision * (user - default) ** 2).sum()

        user = user_of(minimize(loss, default[free], tol=1e-12).x)
        row = int(candidate[1:])
        vector = items[row] if row != 7 else cf.default_item[-1].double().numpy()
        logits.append(user @ vector + offset)
    return np.array(logits)


def test_scores_are_those_of_the_posterior_mode(cf, folder):
    split = datasets.Dataset.from_dict(ROWS)
    scores = folded_scores(folder / "labels", split)
    np.testing.assert_allclose(scores["score"], expected(cf, ROWS["history_labels"]), atol=1e-4)
    np.testing.assert_allclose(scores["prob"], 1 / (1 + np.exp(-scores["score"])), atol=1e-9)


def test_a_table_fitted_to_ratings_folds_graded_targets(cf, folder):
    targets = [
        [1 / (1 + np.exp(-SCALE[1] * (rating - SCALE[0]))) for rating in row]
        for row in ROWS["history_ratings"]
    ]
    scores = folded_scores(folder / "graded", datasets.Dataset.from_dict(ROWS))["score"]
    np.testing.assert_allclose(scores, expected(cf, targets), atol=1e-4)
    labels = expected(cf, ROWS["history_labels"])
    assert np.abs(scores - labels).max() > 0.05


def test_rows_are_scored_alike_in_any_portions(folder, monkeypatch):
    split = datasets.Dataset.from_dict(ROWS)
    whole = folded_scores(folder / "labels", split)
    monkeypatch.setattr("measure.FOLDED_AT_ONCE", 3)
    np.testing.assert_allclose(folded_scores(folder / "labels", split), whole, atol=1e-5)


def test_what_folding_in_needs_is_named(cf, folder, tmp_path):
    split = datasets.Dataset.from_dict(ROWS)
    cf.save(tmp_path / "imported")
    with pytest.raises(InputError, match=r"imported.*is another"):
        folded_scores(tmp_path / "imported", split)
    with pytest.raises(InputError, match="--histories signed"):
        folded_scores(folder / "labels", split.remove_columns("history_labels"))
