"""The CF model and recent likes: the counts by hand, the fit by the gradient of its likelihood."""

import numpy as np
import pandas as pd
import pytest
from prepared_folder import make_rows, write_prepared

from ccf_llm_hf.cf.config import MFConfig
from ccf_llm_hf.cf.fit import fit_cf
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.data.prepared import read_rows
from ccf_llm_hf.evaluation.metrics import auc
from ccf_llm_hf.reproduce.recent_likes import recent_likes, recent_likes_term, with_term

SPLITS = ("train", "validation", "test")


def table(rows):
    return pd.DataFrame(rows, columns=["user_id", "timestamp"])


def test_likes_count_within_the_span_and_strictly_before_the_row():
    likes = table([("u", 300), ("u", 100), ("v", 290), ("u", 120)])
    rows = table([("u", 300), ("u", 301), ("v", 100), ("w", 300), ("u", 279), ("u", 280)])
    assert recent_likes(rows, likes, 180).tolist() == [1, 1, 0, 0, 2, 2]
    assert recent_likes(rows.iloc[::-1], likes, 180).tolist() == [2, 2, 0, 0, 1, 1]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A prepared folder of users who like what follows upon a like, and MF fitted to it."""
    folder = tmp_path_factory.mktemp("recent")
    rows = make_rows().drop_duplicates(["user_id", "item_id"], ignore_index=True)
    draw, labels = np.random.default_rng(1), rows["label"].to_numpy().copy()
    for place in range(len(rows)):
        before = rows[:place].assign(label=labels[:place]).query("label == 1")
        if recent_likes(rows[place : place + 1], before)[0] and draw.random() < 0.6:
            labels[place] = 1
    data = write_prepared(folder / "data", rows.assign(label=labels))
    strengths = {"l2_factors": 2.0, "l2_user_bias": 1.0, "l2_item_bias": 1.0}
    fit_cf(
        "mf", data, folder / "mf", MFConfig(dim=4, cross_fit="snapshots", snapshots=4, **strengths)
    )
    return data, folder / "mf"


def test_bias_and_weight_are_the_likeliest_for_snapshots_that_do_not_know_the_row(world):
    data, cf_folder = world
    cf, rows = CFVectors.load(cf_folder), {split: read_rows(data, split) for split in SPLITS}
    likes = pd.concat(part[part["label"] == 1] for part in rows.values())
    feature = np.log1p(recent_likes(rows["test"], likes))
    term = recent_likes_term(cf_folder, data, "test")["term"].to_numpy()
    design = np.stack([np.ones_like(feature), feature], 1)
    (bias, weight), *_ = np.linalg.lstsq(design, term)
    np.testing.assert_allclose(design @ [bias, weight], term, atol=1e-9)
    assert weight > 0.2

    train = rows["train"]
    keys = (train[key].to_numpy() for key in ("user_id", "item_id", "timestamp"))
    logits = cf.score(train, cf.training_snapshots(*keys))["score"].to_numpy()
    feature = np.log1p(recent_likes(train, likes))
    wrong = 1 / (1 + np.exp(-(logits + bias + weight * feature))) - train["label"].to_numpy()
    assert abs(wrong.mean()) < 1e-3 and abs((wrong * feature).mean()) < 1e-3


@pytest.mark.parametrize("split", SPLITS[1:])
def test_the_term_makes_the_cf_model_better_where_likes_follow_upon_likes(world, split):
    data, cf_folder = world
    alone = CFVectors.load(cf_folder).score(read_rows(data, split))
    scores = with_term(alone, recent_likes_term(cf_folder, data, split))
    assert scores["user_id"].tolist() == read_rows(data, split)["user_id"].tolist()
    assert auc(alone["label"], scores["score"]) > auc(alone["label"], alone["score"])


def test_terms_find_their_rows_in_a_sample_and_in_another_order():
    keys = {"user_id": ["u", "u", "v"], "item_id": ["a", "b", "a"]}
    term = pd.DataFrame(keys | {"term": [1.0, 2.0, 3.0]})
    sample = pd.DataFrame(keys | {"label": [1, 0, 1], "score": [0.1, 0.2, 0.3]}).iloc[[2, 0]]
    scores = with_term(sample, term)
    assert scores["user_id"].tolist() == ["v", "u"] and scores["label"].tolist() == [1, 1]
    np.testing.assert_allclose(scores["score"], [3.3, 1.1])
    np.testing.assert_allclose(scores["prob"], 1 / (1 + np.exp([-3.3, -1.1])))
