import time

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from ccf_llm_hf.evaluation import UserBootstrap, auc, interval, uauc


def make_split(users: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    ids = np.repeat(np.arange(users), generator.integers(2, 30, users))
    taste = np.repeat(generator.normal(size=users), np.bincount(ids))
    scores = np.round(generator.normal(size=len(ids)) + 0.3 * taste, 1)
    labels = generator.random(len(ids)) < 1 / (1 + np.exp(-scores - taste))
    return ids, labels.astype(int), scores


def test_a_resample_equals_the_metric_on_repeated_rows() -> None:
    users, labels, scores = make_split(12, 0)
    bootstrap = UserBootstrap(users, resamples=20)
    for mask in (None, np.arange(len(users)) % 3 > 0):
        chosen = np.ones(len(users), bool) if mask is None else mask
        pooled, per_user = bootstrap.auc(labels, scores, mask), bootstrap.uauc(labels, scores, mask)
        for draw, counts in enumerate(bootstrap.counts):
            rows = np.concatenate(
                [np.flatnonzero((users == u) & chosen) for u in range(12) for _ in range(counts[u])]
            )
            copies = np.concatenate(
                [
                    np.full(((users == u) & chosen).sum(), f"{u}-{copy}")
                    for u in range(12)
                    for copy in range(counts[u])
                ]
            )
            assert pooled[draw] == pytest.approx(roc_auc_score(labels[rows], scores[rows]))
            assert per_user[draw] == pytest.approx(uauc(labels[rows], scores[rows], copies))


def test_resamples_draw_as_many_users_as_there_are() -> None:
    bootstrap = UserBootstrap(["a", "b", "a", "c"], resamples=50, seed=3)
    assert bootstrap.counts.shape == (50, 3)
    assert (bootstrap.counts.sum(1) == 3).all()
    again = UserBootstrap(["a", "b", "a", "c"], resamples=50, seed=3)
    assert np.array_equal(bootstrap.counts, again.counts)


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    # Truth: the metric on a very large sample of users.
    truth_auc = auc(*make_split(20_000, 999)[1:])
    users, labels, scores = make_split(20_000, 999)
    truth_uauc = uauc(labels, scores, users)
    hits = []
    for seed in range(60):
        users, labels, scores = make_split(60, seed)
        bootstrap = UserBootstrap(users, resamples=200, seed=seed)
        low, high = interval(bootstrap.auc(labels, scores))
        low_u, high_u = interval(bootstrap.uauc(labels, scores))
        hits.append((low <= truth_auc <= high, low_u <= truth_uauc <= high_u))
    assert (np.mean(hits, axis=0) >= 0.85).all()
    assert np.mean(hits) < 1


def test_pairing_makes_differences_narrow() -> None:
    users, labels, scores = make_split(80, 5)
    bootstrap = UserBootstrap(users, resamples=200)
    first = bootstrap.auc(labels, scores)
    second = bootstrap.auc(labels, scores + 0.01 * np.random.default_rng(0).normal(size=len(users)))
    low, high = interval(first - second)
    single = np.diff(interval(first))[0]
    assert high - low < single / 5


def test_undefined_resamples_are_left_out() -> None:
    bootstrap = UserBootstrap(["a", "b"], resamples=100)
    values = bootstrap.auc([1, 0], [0.9, 0.1])
    assert np.isnan(values).any()
    assert interval(values) == [1.0, 1.0]
    assert np.isnan(interval(bootstrap.uauc([1, 0], [0.9, 0.1]))).all()


def test_a_thousand_resamples_of_a_test_split_take_seconds() -> None:
    users, labels, scores = make_split(470, 1)
    assert len(users) > 6_000
    start = time.perf_counter()
    bootstrap = UserBootstrap(users)
    values = np.stack([bootstrap.auc(labels, scores), bootstrap.uauc(labels, scores)])
    assert values.shape == (2, 1000)
    assert time.perf_counter() - start < 10
