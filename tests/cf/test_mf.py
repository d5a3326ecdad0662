import re
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from prepared_folder import make_rows, write_prepared
from torch import Tensor

from ccf_llm_hf.cf import CFVectors, LightGCNConfig, MFConfig, fit_cf, fit_mf, score_cf
from ccf_llm_hf.cf import mf as mf_module
from ccf_llm_hf.cf import solver as solver_module
from ccf_llm_hf.cf.folds import fold_of
from ccf_llm_hf.cf.solver import Penalties, Rows, draw_parameters, solve
from ccf_llm_hf.cf.training_data import load_training_data
from ccf_llm_hf.data import read_rows
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation import auc, read_scores

FIXED = {"l2_factors": 2.0, "l2_user_bias": 1.0, "l2_item_bias": 1.0}
CONFIG = MFConfig(dim=4, cross_fit="snapshots", snapshots=6, **FIXED)
FOLDS = MFConfig(dim=4, folds=4, **FIXED)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("prepared"), make_rows())


@pytest.fixture(scope="module")
def fitted(folder: Path) -> CFVectors:
    return fit_mf(folder, CONFIG)


def test_biases_are_dimensions_of_the_vectors(fitted: CFVectors) -> None:
    assert fitted.dim == CONFIG.dim + 2
    assert (fitted.user_vectors[..., -1] == 1).all()
    assert (fitted.item_vectors[..., -2] == 1).all()
    assert fitted.default_user[-1].tolist() == [0, 0, 0, 0, 0, 1]
    assert fitted.default_item[-1].tolist() == [0, 0, 0, 0, 1, 0]
    user_bias, item_bias = fitted.user_vectors[-1, :, -2], fitted.item_vectors[-1, :, -1]
    assert user_bias.std() > 0.3
    row = fitted.item_ids.index("i5")
    alone = fitted.logits(["nobody"], ["i5"])
    torch.testing.assert_close(alone[0], item_bias[row] + fitted.offset[-1])


def test_the_table_covers_the_catalog_and_knows_what_was_fitted(
    fitted: CFVectors, folder: Path
) -> None:
    train = read_rows(folder, "train")
    assert len(fitted.item_ids) == 30
    assert sorted(fitted.user_ids) == sorted(train["user_id"].unique())
    known = {key for key, flag in zip(fitted.item_ids, fitted.item_known[-1], strict=True) if flag}
    assert known == set(train["item_id"])
    assert "i0" in fitted.item_ids
    assert "i0" not in known


def test_snapshot_zero_knows_nothing_and_the_last_all(fitted: CFVectors, folder: Path) -> None:
    times = read_rows(folder, "train")["timestamp"].to_numpy()
    assert not fitted.user_known[0].any()
    assert not fitted.item_known[0].any()
    assert fitted.offset[0] == 0
    assert fitted.user_known[-1].all()
    assert fitted.snapshot_times[-1] == times.max() + 1
    assert fitted.snapshot_for(times).max() == fitted.num_fits - 2


@pytest.mark.parametrize("config", [CONFIG, FOLDS], ids=lambda config: config.cross_fit)
def test_the_bar_ends_full(folder: Path, config: MFConfig, capsys: pytest.CaptureFixture) -> None:
    fit_mf(folder, config)
    done, fits = re.findall(r"(\d+)/(\d+) ", capsys.readouterr().err)[-1]
    assert done == fits


def test_a_snapshot_never_sees_its_own_rows(folder: Path, tmp_path: Path) -> None:
    before = fit_mf(folder, CONFIG)
    rows = make_rows()
    for snapshot in (1, 3, 5):
        changed = rows.copy()
        later = changed["timestamp"] >= int(before.snapshot_times[snapshot])
        changed.loc[later, "label"] = 1 - changed.loc[later, "label"]
        after = fit_mf(write_prepared(tmp_path / str(snapshot), changed), CONFIG)
        same = slice(0, snapshot + 1)
        for name in ("user_vectors", "item_vectors", "offset", "user_known", "item_known"):
            assert torch.equal(getattr(before, name)[same], getattr(after, name)[same]), name
        assert not torch.equal(before.user_vectors[snapshot + 1], after.user_vectors[snapshot + 1])


def test_training_rows_look_held_out_through_their_snapshots(
    fitted: CFVectors, folder: Path
) -> None:
    train = read_rows(folder, "train")
    scores = fitted.score(train, fitted.snapshot_for(train["timestamp"].to_numpy()))
    out_of_time = auc(train["label"], scores["score"])
    assert fitted.metadata["cross_fit_train_auc"] == f"{out_of_time:.4f}"
    held_out, in_sample = (
        float(fitted.metadata[name]) for name in ("validation_auc", "in_sample_train_auc")
    )
    assert out_of_time < held_out + 0.02 < in_sample + 0.02
    assert held_out > 0.7


def test_the_same_seed_gives_the_same_bits(fitted: CFVectors, folder: Path) -> None:
    again = fit_mf(folder, CONFIG)
    for name in (f.name for f in fields(CFVectors) if f.type is Tensor):
        assert torch.equal(getattr(again, name), getattr(fitted, name)), name


def test_without_biases_it_is_a_plain_dot_product(folder: Path) -> None:
    plain = fit_mf(folder, MFConfig(dim=4, folds=2, use_biases=False, l2_factors=0.5))
    assert plain.model_name == "mf_nobias"
    assert plain.dim == 4
    assert not plain.offset.any()
    assert plain.logits(["nobody"], ["i3"]).tolist() == [0.0]
    assert float(plain.metadata["in_sample_train_auc"]) > 0.75


def test_strengths_are_chosen_on_validation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ccf_llm_hf.cf.mf.USER_BIAS_GRID", (1.0, 1e4))
    monkeypatch.setattr("ccf_llm_hf.cf.mf.ITEM_BIAS_GRID", (1e4, 1.0))
    monkeypatch.setattr("ccf_llm_hf.cf.mf.FACTOR_GRID", (0.01, 50.0))
    chosen = fit_mf(folder, MFConfig(dim=4, folds=2)).metadata
    # The labels follow biases alone: strong penalties on them lose, and so do free factors.
    assert (chosen["l2_user_bias"], chosen["l2_item_bias"]) == ("1", "1")
    assert (chosen["l2_factors"], chosen["live_factors"]) == ("50", "0")


def test_the_solution_is_the_optimum_of_the_objective() -> None:
    # One user, one item, biases only: the optimum solves a one-dimensional equation.
    labels = torch.tensor([1.0] * 30 + [0.0] * 10)
    rows = Rows(torch.zeros(40, dtype=torch.long), torch.zeros(40, dtype=torch.long), labels)
    start = draw_parameters(2, 2, 0, 0)
    fit = solve(rows, Penalties(1, 5, 5), start, iterations=100)
    # b carries no penalty, so nothing is left for the biases.
    assert abs(float(fit.offset) - np.log(3)) < 1e-2
    assert fit.user_bias.abs().max() < 1e-2
    assert fit.user_bias[1] == 0


def test_work_in_pieces_changes_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit_mf(folder, CONFIG)
    monkeypatch.setattr(solver_module, "PIECE_ROWS", 10)
    pieces = fit_mf(folder, CONFIG)
    train = read_rows(folder, "train")
    np.testing.assert_allclose(whole.score(train)["score"], pieces.score(train)["score"], atol=1e-3)


def test_tables_stay_within_their_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("ccf_llm_hf.cf.training_data.TABLE_BYTES", 4 * 6 * 70 * 4)
    assert fit_mf(folder, CONFIG).num_fits == 4
    assert "3 snapshots instead of 6" in caplog.text


def test_fit_cf_writes_a_folder_that_scores_a_split(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit_cf("mf", folder, tmp_path / "cf", CONFIG)
    assert "validation_auc: 0." in capsys.readouterr().out
    scores = score_cf(tmp_path / "cf", folder, "test")
    assert len(scores) == len(read_rows(folder, "test"))
    assert auc(scores["label"], scores["score"]) > 0.65
    scores.to_parquet(tmp_path / "scores.parquet")
    pd.testing.assert_frame_equal(read_scores(tmp_path / "scores.parquet"), scores)


def test_bad_input_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'lightfm' is unknown"):
        fit_cf("lightfm", folder, tmp_path / "cf")
    with pytest.raises(InputError, match="l2_factors=0"):
        MFConfig(l2_factors=0)
    with pytest.raises(InputError, match="snapshots=0"):
        MFConfig(snapshots=0)
    with pytest.raises(InputError, match="cross_fit='user'"):
        MFConfig(cross_fit="user")
    with pytest.raises(InputError, match="folds=1"):
        MFConfig(folds=1)
    with pytest.raises(InputError, match="snapshots=4 has no meaning with cross_fit=folds"):
        MFConfig(snapshots=4)
    with pytest.raises(InputError, match="folds=3 has no meaning with cross_fit=snapshots"):
        MFConfig(cross_fit="snapshots", folds=3)
    with pytest.raises(InputError, match="LightGCNConfig does not configure mf"):
        fit_cf("mf", folder, tmp_path / "cf", LightGCNConfig())
    with pytest.raises(InputError, match="not a prepared folder"):
        fit_mf(tmp_path / "nowhere")
    one_class = write_prepared(tmp_path / "one", make_rows().assign(label=1))
    with pytest.raises(InputError, match="train split needs rows of both labels"):
        fit_mf(one_class)


def test_many_rows_are_tuned_on_some_users(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = load_training_data(folder)
    monkeypatch.setattr(mf_module, "MANY_ROWS", 300)
    sample = mf_module._sample(data, seed=0)
    assert 200 < len(sample.train) <= 300
    # Whole users: each has as many rows as in the data.
    found = torch.bincount(sample.train.users).tolist()
    there = torch.bincount(data.train.users).tolist()
    assert len(found) < len(there) and set(found) <= set(there)


@pytest.fixture(scope="module")
def folded(folder: Path) -> CFVectors:
    return fit_mf(folder, FOLDS)


def training_logits(vectors: CFVectors, train: pd.DataFrame) -> np.ndarray:
    columns = [train[name].to_numpy() for name in ("user_id", "item_id", "timestamp")]
    snapshots = vectors.training_fits(*columns)
    return vectors.score(train, snapshots)["score"].to_numpy()


def test_a_fold_never_sees_its_own_rows(folded: CFVectors, folder: Path, tmp_path: Path) -> None:
    rows, train = make_rows(), read_rows(folder, "train")
    assert folded.num_fits == 5
    fold = fold_of(rows["user_id"], rows["item_id"], 4)
    changed = rows.assign(label=np.where(fold == 2, 1 - rows["label"], rows["label"]))
    after = fit_mf(write_prepared(tmp_path, changed), FOLDS)
    mine = fold_of(train["user_id"], train["item_id"], 4) == 2
    before, flipped = (training_logits(found, train)[mine] for found in (folded, after))
    # The rotation onto the fit on all rows knows them, but it moves no logit.
    np.testing.assert_allclose(before, flipped, atol=1e-3)
    assert not torch.allclose(folded.user_vectors[0], after.user_vectors[0], atol=0.05)
    assert not torch.allclose(folded.user_vectors[-1], after.user_vectors[-1], atol=0.05)


def test_folds_stay_aligned_with_the_fit_on_all_rows(tmp_path: Path) -> None:
    rows = make_rows()
    users, items = (rows[name].str[1:].astype(int) for name in ("user_id", "item_id"))
    rows["label"] = np.sin(users * 1.7) * np.sin(items * 2.3) > 0.5 * np.cos(users) * np.cos(items)
    folder = write_prepared(tmp_path, rows.astype({"label": int}))
    config = MFConfig(dim=4, use_biases=False, l2_factors=0.5, folds=4)
    folded = fit_mf(folder, config)
    vectors = folded.item_vectors[:, folded.item_known[-1]]
    for table in vectors[:-1]:
        assert torch.nn.functional.cosine_similarity(table, vectors[-1]).mean() > 0.9


def test_folds_look_held_out_and_all_rows_do_not(folded: CFVectors, folder: Path) -> None:
    train = read_rows(folder, "train")
    out_of_fold = auc(train["label"], training_logits(folded, train))
    assert folded.metadata["cross_fit_train_auc"] == f"{out_of_fold:.4f}"
    assert 0.65 < out_of_fold < float(folded.metadata["in_sample_train_auc"]) - 0.01
    assert (folded.snapshot_times == train["timestamp"].max() + 1).all()
    whole = fit_mf(folder, replace(CONFIG, snapshots=1))
    np.testing.assert_allclose(folded.score(train)["score"], whole.score(train)["score"], atol=0.05)


def test_random_labels_teach_nothing_out_of_fold(tmp_path: Path) -> None:
    rows = make_rows()
    rows["label"] = np.random.default_rng(1).integers(0, 2, len(rows))
    config = MFConfig(dim=4, l2_factors=0.3, l2_user_bias=1.0, l2_item_bias=1.0)
    facts = fit_mf(write_prepared(tmp_path, rows), config).metadata
    assert float(facts["cross_fit_train_auc"]) < 0.53
    assert float(facts["in_sample_train_auc"]) > 0.7
