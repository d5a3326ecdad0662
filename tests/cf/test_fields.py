"""MF that knows fields, and folds of users."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from prepared_folder import ITEMS, make_rows, write_prepared
from torch.nn.functional import binary_cross_entropy_with_logits

from ccf_llm_hf.cf import CFVectors, MFConfig, fit_mf
from ccf_llm_hf.cf import mf as mf_module
from ccf_llm_hf.cf.folds import fold_of_users
from ccf_llm_hf.cf.solver import (
    ItemFields,
    Penalties,
    Rows,
    draw_parameters,
    factor_weights,
    solve,
)
from ccf_llm_hf.cf.training_data import load_training_data
from ccf_llm_hf.data import read_rows
from ccf_llm_hf.errors import InputError

AUTHORS = [f" Author {item % 6}" if item % 2 else f"AUTHOR {item % 6} " for item in range(ITEMS)]
AUTHORS[1] = "seen nowhere else"
GENRES = [["Drama", "drama", f"g{item % 3}"][: item % 4] for item in range(ITEMS)]
GENRES[1] = ["only here"]
FIELDS = {"author": AUTHORS, "genres": GENRES}
FIXED = {"l2_factors": 2.0, "l2_user_bias": 1.0, "l2_item_bias": 2.0}
VALUES = {"item_fields": ["author", "genres"], "l2_value_factors": 2.0, "l2_value_bias": 1.0}
VALUES |= {"field_scales": [1.0, 1.0], "tastes": [0.5, 0.25]}
CONFIG = MFConfig(dim=3, cross_fit="users", folds=3, **FIXED, **VALUES)


def make_interactions() -> pd.DataFrame:
    """Items 0, 1 and 2 have no training row, and nobody shares a value with 1."""
    rows = make_rows()
    rows.loc[(rows["item_id"] == "i2") & (rows.index < 900), "item_id"] = "i7"
    rows.loc[rows["item_id"] == "i1", "item_id"] = "i7"
    return rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("prepared"), make_interactions(), FIELDS)


@pytest.fixture(scope="module")
def fitted(folder: Path) -> CFVectors:
    return fit_mf(folder, CONFIG)


def test_values_are_compared_without_case_and_blanks(fitted: CFVectors) -> None:
    authors = [value for field, value in fitted.field_values if field == "author"]
    assert sorted(authors) == [f"author {number}" for number in range(6)]
    genres = {value for field, value in fitted.field_values if field == "genres"}
    assert genres == {"drama", "g0", "g1", "g2"}


def test_an_item_without_rows_is_made_of_what_is_known_of_its_values(fitted: CFVectors) -> None:
    vectors = dict(zip(fitted.field_values, fitted.field_vectors, strict=True))
    expected = fitted.default_item[-1] + vectors["author", "author 0"]
    torch.testing.assert_close(fitted.item_vectors[-1, 0], expected)
    assert fitted.item_known[-1].tolist() == [True, False] + [True] * (ITEMS - 2)
    assert torch.equal(fitted.item_vectors[-1, 1], fitted.default_item[-1])
    # The bias of the user and the constant beside it stay what they are.
    assert (fitted.field_vectors[:, -2] == 0).all()
    assert (fitted.item_vectors[..., -2] == 1).all()


def test_own_parts_that_cost_much_leave_the_values_alone(folder: Path) -> None:
    alone = fit_mf(folder, replace(CONFIG, l2_item_bias=1e5))
    vectors = dict(zip(alone.field_values, alone.field_vectors, strict=True))
    for item in (5, 11):  # of genres [drama] and [drama, g2]
        parts = [vectors["genres", "drama"]]
        parts += [vectors["genres", "g2"]] * (item == 11)
        expected = vectors["author", f"author {item % 6}"] + torch.stack(parts).mean(0)
        bias = alone.item_vectors[-1, item, -1]
        torch.testing.assert_close(bias, expected[-1], atol=1e-3, rtol=0)


def test_values_that_cost_much_give_mf_without_fields(folder: Path) -> None:
    plain = MFConfig(dim=3, folds=3, **FIXED)
    costly = replace(CONFIG, l2_value_factors=1e6, l2_value_bias=1e6)
    train = read_rows(folder, "train")
    found, expected = (fit_mf(folder, one).score(train)["score"] for one in (costly, plain))
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_a_scale_is_a_standard_deviation(folder: Path) -> None:
    train = read_rows(folder, "train")
    settings = FIXED | {"item_fields": ["author"]}
    weak = MFConfig(dim=2, folds=2, l2_value_factors=8.0, l2_value_bias=4.0, **settings)
    scaled = replace(weak, l2_value_factors=2.0, l2_value_bias=1.0, field_scales=[0.5])
    one, other = (fit_mf(folder, config) for config in (weak, scaled))
    np.testing.assert_allclose(one.score(train)["score"], other.score(train)["score"], atol=0.02)
    torch.testing.assert_close(
        one.field_vectors[:, -1], other.field_vectors[:, -1], atol=0.01, rtol=0
    )


def test_a_field_of_scale_0_moves_no_item(folder: Path) -> None:
    given = VALUES | {"field_scales": [1.0, 0.0], "tastes": [0.0, 0.0]}
    both = fit_mf(folder, MFConfig(dim=2, folds=2, **FIXED, **given))
    given |= {"item_fields": ["author"], "field_scales": [1.0], "tastes": [0.0]}
    alone = fit_mf(folder, MFConfig(dim=2, folds=2, **FIXED, **given))
    assert both.field_values == alone.field_values
    train = read_rows(folder, "train")
    found, expected = (fit.score(train)["score"] for fit in (both, alone))
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_the_scales_of_further_fields_are_chosen_on_validation(folder: Path) -> None:
    given = {key: value for key, value in VALUES.items() if key != "field_scales"}
    chosen = fit_mf(folder, MFConfig(dim=2, folds=2, **FIXED, **given)).metadata
    scales, tried = json.loads(chosen["field_scales"]), {}
    assert scales[0] == 1
    for scale in mf_module.SCALE_GRID:
        config = MFConfig(dim=2, folds=2, **FIXED, **given, field_scales=[1.0, scale])
        tried[scale] = float(fit_mf(folder, config).metadata["validation_auc"])
    assert tried[scales[1]] == max(tried.values())


def test_the_solution_is_an_optimum_in_every_part() -> None:
    draw = torch.Generator().manual_seed(0)
    users, items = (torch.randint(0, 8, (400,), generator=draw) for _ in range(2))
    rows = Rows(users, items, torch.randint(0, 2, (400,), generator=draw).float())
    # Item 0 has two values of one field, item 8 no rows, and value 4 nobody with rows.
    fields = ItemFields(
        torch.tensor([0, 0, 1, 2, 3, 3, 8]),
        torch.tensor([0, 1, 1, 2, 3, 0, 4]),
        torch.tensor([0.5, 0.5, 1, 1, 1, 1, 1]),
        5,
        torch.tensor([0, 0, 1, 1, 1]),
    )
    penalties = Penalties(0.3, 0.5, 0.7, value_factors=0.4, value_bias=0.2)
    fit = solve(rows, penalties, draw_parameters(8, 9, 2, 0, fields), iterations=1000)
    assert not fit.value_factors[4].any() and fit.value_bias[4] == 0
    parts = {k: v.clone().requires_grad_() for k, v in vars(fit).items() if k != "fields"}
    model = replace(fit, **parts)
    loss = binary_cross_entropy_with_logits(model.logits(rows), rows.labels, reduction="sum")
    weights = factor_weights(2)
    for strength, part in (
        (penalties.factors * weights, model.user_factors),
        (penalties.factors * weights, model.item_factors),
        (penalties.value_factors * weights, model.value_factors),
        (penalties.user_bias, model.user_bias),
        (penalties.item_bias, model.item_bias),
        (penalties.value_bias, model.value_bias),
    ):
        loss = loss + 0.5 * (strength * part.square()).sum()
    loss.backward()
    for name, part in parts.items():
        assert part.grad is not None and part.grad.abs().max() < 0.15, name
    assert fit.value_bias[:4].abs().min() > 0.01


@pytest.mark.parametrize("settings", [{"use_biases": False}, {"cross_fit": "snapshots"}], ids=str)
def test_fields_go_with_every_other_setting(folder: Path, settings: dict) -> None:
    given = {"folds": 3} if "cross_fit" not in settings else {"snapshots": 3}
    fitted = fit_mf(folder, MFConfig(**{"dim": 3, **FIXED, **VALUES, **given, **settings}))
    vectors = dict(zip(fitted.field_values, fitted.field_vectors, strict=True))
    expected = fitted.default_item[-1] + vectors["author", "author 0"]
    torch.testing.assert_close(fitted.item_vectors[-1, 0], expected)
    assert float(fitted.metadata["in_sample_train_auc"]) > 0.7
    assert fitted.item_known[0].any() == ("cross_fit" not in settings)


def test_strengths_of_values_are_chosen_on_validation(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(mf_module, "OWN_BIAS_GRID", (1e4, 1.0))
    monkeypatch.setattr(mf_module, "VALUE_BIAS_GRID", (1.0, 1e4))
    monkeypatch.setattr(mf_module, "VALUE_FACTOR_GRID", (5.0, 50.0))
    config = MFConfig(dim=2, folds=2, l2_user_bias=1.0, l2_factors=50.0, item_fields=["author"])
    chosen = fit_mf(folder, config).metadata
    # Labels follow the items, whatever their author is.
    assert (chosen["l2_item_bias"], chosen["l2_value_bias"]) == ("1", "10000")
    assert json.loads(chosen["item_fields"]) == ["author"]
    bar = capsys.readouterr().err.split()[-4:]
    assert any("11/11" in word for word in bar)  # 2 + 4 + 2 to choose, 3 fits


def test_what_is_loaded_equals_what_was_saved(fitted: CFVectors, tmp_path: Path) -> None:
    fitted.save(tmp_path)
    loaded = CFVectors.load(tmp_path)
    assert loaded.field_values == fitted.field_values
    assert loaded.field_vectors is not None
    for name in ("field_vectors", "item_values", "field_tastes"):
        assert torch.equal(getattr(loaded, name), getattr(fitted, name)), name
    assert loaded.cross_fit == "users"
    assert loaded.fingerprint == fitted.fingerprint
    lines = (tmp_path / "field_values.jsonl").read_text().splitlines()
    (tmp_path / "field_values.jsonl").write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(InputError, match="was not written with the ids"):
        CFVectors.load(tmp_path)
    (tmp_path / "field_values.jsonl").unlink()
    with pytest.raises(InputError, match=r"field_values\.jsonl is missing"):
        CFVectors.load(tmp_path)


def test_bad_fields_are_refused(folder: Path, fitted: CFVectors) -> None:
    with pytest.raises(InputError, match="no field 'brand', only author, genres"):
        fit_mf(folder, MFConfig(item_fields=["brand"]))
    with pytest.raises(InputError, match="l2_value_bias has no meaning without item_fields"):
        MFConfig(l2_value_bias=1.0)
    with pytest.raises(InputError, match="tastes has no meaning without item_fields"):
        MFConfig(tastes=[1.0])
    for given in ([1.0], [1.0, -1.0], [1.0, float("nan")]):
        with pytest.raises(InputError, match=r"field_scales=.* must be 2 numbers from 0"):
            replace(CONFIG, field_scales=given)
    with pytest.raises(InputError, match="field_vectors has shape"):
        replace(fitted, field_values=fitted.field_values[1:])
    with pytest.raises(InputError, match="twice"):
        replace(fitted, field_values=fitted.field_values[:1] * len(fitted.field_values))


def test_a_users_rows_share_a_fit_that_never_saw_them(
    folder: Path, fitted: CFVectors, tmp_path: Path
) -> None:
    train = read_rows(folder, "train")
    fits = fitted.training_fits(*(train[name] for name in ("user_id", "item_id", "timestamp")))
    users = fold_of_users(fitted.user_ids, 3)
    places = [fitted.user_ids.index(user) for user in train["user_id"]]
    assert fits.tolist() == users[places].tolist()
    assert len(set(fits.tolist())) == 3
    for user in range(3):
        assert torch.equal(fitted.user_known[user], torch.from_numpy(users != user))
    # Every label of one fold's users is another, and their fit is the same but for a rotation.
    rows = make_interactions()
    mine = fold_of_users(rows["user_id"], 3) == 1
    changed = rows.assign(label=np.where(mine, 1 - rows["label"], rows["label"]))
    after = fit_mf(write_prepared(tmp_path, changed, FIELDS), CONFIG)
    for fit, same in ((1, True), (0, False), (3, False)):
        before, then = (one.item_vectors[fit] @ one.item_vectors[fit].T for one in (fitted, after))
        assert torch.allclose(before, then, atol=1e-3) == same, fit
        assert torch.allclose(fitted.offset[fit], after.offset[fit], atol=1e-4) == same, fit


def test_many_rows_are_tuned_on_some_users_and_their_authors(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = load_training_data(folder, item_fields=["author"])
    monkeypatch.setattr(mf_module, "MANY_ROWS", 300)
    sample = mf_module._sample(data, seed=0)
    assert len(sample.fields.items) == len(sample.items)
    names = [sample.field_values[value][1] for value in sample.fields.values]
    places = sample.items["item_id"].str[1:].astype(int)
    assert names == [AUTHORS[place].strip().lower() for place in places]
    assert "i2" in set(sample.items["item_id"])
