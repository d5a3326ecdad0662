"""Tastes: a user's own liking of an author beyond the vectors."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from prepared_folder import ITEMS, make_rows, write_prepared

from ccf_llm_hf.cf import CFVectors, MFConfig, fit_mf
from ccf_llm_hf.cf.tastes import TASTE_GRID
from ccf_llm_hf.data import read_rows
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation.metrics import auc

AUTHORS = [f"a{item % 10}" for item in range(ITEMS)]
GENRES = [["drama", "crime"][: item % 3] for item in range(ITEMS)]
SETTINGS = {"dim": 2, "folds": 2, "l2_factors": 20.0, "l2_user_bias": 1.0, "l2_item_bias": 1.0}
SETTINGS |= {"item_fields": ["author", "genres"], "l2_value_factors": 20.0, "l2_value_bias": 1.0}
SETTINGS |= {"field_scales": [1.0, 1.0]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each user likes the books of one half of the authors, another half each."""
    rows = make_rows()
    authors = rows["item_id"].str[1:].astype(int) % 10
    likes = np.random.default_rng(1).random((40, 10)) < 0.5
    liked = likes[rows["user_id"].str[1:].astype(int), authors]
    noise = np.random.default_rng(2).random(len(rows)) < 0.2
    rows = rows.assign(label=(liked ^ noise).astype(np.int64))
    fields = {"author": AUTHORS, "genres": GENRES}
    return write_prepared(tmp_path_factory.mktemp("prepared"), rows, fields)


@pytest.fixture(scope="module")
def fitted(folder: Path) -> CFVectors:
    return fit_mf(folder, MFConfig(**SETTINGS))


def add_tastes(vectors: CFVectors, folder: Path, tastes: dict[str, float]) -> pd.Series:
    """Validation logits with tastes as they are defined, row by row."""
    train, rows = read_rows(folder, "train"), read_rows(folder, "validation")
    train = train.assign(p=vectors.score(train)["prob"].to_numpy())
    logits = vectors.score(rows)["score"]
    values = {
        "author": lambda item: {AUTHORS[int(item[1:])]},
        "genres": lambda item: set(GENRES[int(item[1:])]),
    }
    for place, (user, item) in enumerate(zip(rows["user_id"], rows["item_id"], strict=True)):
        own = train[train["user_id"] == user]
        for field, prior in tastes.items():
            for value in values[field](item):
                same = own[[value in values[field](other) for other in own["item_id"]]]
                bend = (same["p"] * (1 - same["p"])).sum()
                logits[place] += prior * (same["label"] - same["p"]).sum() / (1 + prior * bend)
    return logits


def test_the_tastes_of_authors_are_found_on_validation(fitted: CFVectors, folder: Path) -> None:
    labels = read_rows(folder, "validation")["label"]
    tastes = json.loads(fitted.metadata["tastes"])
    assert tastes[0] > 0
    tried = {
        prior: auc(labels, add_tastes(fitted, folder, {"author": prior})) for prior in TASTE_GRID
    }
    assert tried[tastes[0]] == max(tried.values()) > tried[0.0] + 0.1
    tried = {
        prior: auc(labels, add_tastes(fitted, folder, {"author": tastes[0], "genres": prior}))
        for prior in TASTE_GRID
    }
    assert tried[tastes[1]] == max(tried.values())


def test_a_table_says_which_values_an_item_has(folder: Path) -> None:
    vectors = fit_mf(folder, MFConfig(**SETTINGS, tastes=[0.5, 2.0]))
    assert vectors.item_values is not None and vectors.field_tastes is not None
    for item, places in enumerate(vectors.item_values.tolist()):
        found = {vectors.field_values[place] for place in places if place >= 0}
        assert found == {("author", AUTHORS[item]), *(("genres", one) for one in GENRES[item])}
    of_field = {"author": 0.5, "genres": 2.0}
    expected = [of_field[field] for field, _ in vectors.field_values]
    assert vectors.field_tastes.tolist() == expected
    only = fit_mf(folder, MFConfig(**SETTINGS, tastes=[0.5, 0.0]))
    assert only.item_values is not None and only.item_values.shape == (ITEMS, 1)
    assert fit_mf(folder, MFConfig(**SETTINGS, tastes=[0.0, 0.0])).item_values is None


def test_tables_of_tastes_that_do_not_fit_are_refused(folder: Path) -> None:
    vectors = fit_mf(folder, MFConfig(**SETTINGS, tastes=[0.5, 2.0]))
    with pytest.raises(InputError, match="come together"):
        replace(vectors, field_tastes=None)
    with pytest.raises(InputError, match="item_values must be from -1 to"):
        replace(vectors, item_values=vectors.item_values + 100)
    with pytest.raises(InputError, match="30 items, of which it holds a row of int32 each"):
        replace(vectors, item_values=vectors.item_values[1:])
    with pytest.raises(InputError, match="field_tastes must be 12 numbers from 0"):
        replace(vectors, field_tastes=-vectors.field_tastes)
    with pytest.raises(InputError, match="field_tastes holds NaN"):
        replace(vectors, field_tastes=vectors.field_tastes * torch.nan)


def test_a_field_that_says_nothing_has_no_tastes(folder: Path, tmp_path: Path) -> None:
    nothing: list[list[str]] = [[] for _ in range(ITEMS)]
    fields = {"author": AUTHORS, "genres": nothing}
    empty = write_prepared(tmp_path / "one", make_rows(), fields)
    vectors = fit_mf(empty, MFConfig(**SETTINGS))
    assert json.loads(vectors.metadata["tastes"])[1] == 0
    none_at_all = write_prepared(tmp_path / "two", make_rows(), {**fields, "author": nothing})
    vectors = fit_mf(none_at_all, MFConfig(**SETTINGS, tastes=[1, 2]))
    assert (vectors.field_values, vectors.item_values) == ([], None)
