from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from prepared_folder import make_rows, write_prepared

from ccf_llm_hf.cf import CFVectors, LightGCNConfig, fit_lightgcn
from ccf_llm_hf.cf import lightgcn as lightgcn_module
from ccf_llm_hf.cf.lightgcn import build_adjacency, propagate
from ccf_llm_hf.cf.snapshots import Snapshot
from ccf_llm_hf.cf.solver import Rows
from ccf_llm_hf.cf.training_data import load_training_data, plan_folds, plan_snapshots
from ccf_llm_hf.data import read_rows
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation import auc

CONFIG = LightGCNConfig(
    dim=8,
    layers=2,
    l2=1.0,
    learning_rate=0.03,
    max_steps=60,
    cross_fit="snapshots",
    snapshots=3,
)
CHOSEN = lightgcn_module._Chosen(layers=2, l2=1.0, learning_rate=0.03, steps=20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("prepared"), make_rows())


@pytest.fixture(scope="module")
def fitted(folder: Path) -> CFVectors:
    return fit_lightgcn(folder, CONFIG)


class Bar:
    def update(self) -> None: ...


def fit_tables(folder: Path, folds: int = 0) -> list[Snapshot]:
    """Tables by settings that do not depend on the labels."""
    data = load_training_data(folder)
    plan = plan_folds(data, folds, 8) if folds else plan_snapshots(data, 3, 8)
    return lightgcn_module._fit_tables(data, CONFIG, CHOSEN, plan, Bar())


@pytest.fixture
def rows() -> Rows:
    """Three users, two items; user 2 likes nothing, and user 0 likes item 0 twice."""
    users, items = torch.tensor([0, 0, 1, 2, 0, 1]), torch.tensor([0, 1, 1, 1, 0, 0])
    return Rows(users, items, torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0]))


def test_propagation_is_the_papers_on_likes_alone(rows: Rows) -> None:
    adjacency = build_adjacency(rows, 3, 2)
    root = 2**-0.5
    expected = torch.zeros(5, 5)
    expected[0, 3] = expected[3, 0] = root  # degrees 2 and 1
    expected[0, 4] = expected[4, 0] = 0.5  # degrees 2 and 2
    expected[1, 4] = expected[4, 1] = root
    torch.testing.assert_close(adjacency.to_dense(), expected)
    vectors = torch.randn(5, 4)
    by_hand = (vectors + expected @ vectors + expected @ expected @ vectors) / 3
    torch.testing.assert_close(propagate(vectors, adjacency, 2), by_hand)


def test_the_gradient_is_that_of_the_log_loss(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccf_llm_hf.cf.solver.PIECE_ROWS", 100)
    data = load_training_data(folder)
    fit = lightgcn_module._Fit(data, data.train, CHOSEN)
    vectors = torch.randn(len(data.users) + len(data.items), 8)
    found = fit._gradient(vectors)
    vectors.requires_grad_()
    dense = fit.adjacency.to_dense()
    spread = (vectors + dense @ vectors + dense @ dense @ vectors) / 3
    logits = (spread[data.train.users] * spread[data.train.items + len(data.users)]).sum(-1)
    loss = F.binary_cross_entropy_with_logits(logits, data.train.labels)
    (loss + vectors.square().sum() / (2 * len(data.train))).backward()
    torch.testing.assert_close(found, vectors.grad)


def test_it_learns_and_reports(fitted: CFVectors, folder: Path) -> None:
    assert fitted.model_name == "lightgcn"
    assert fitted.dim == 8
    assert not fitted.offset.any()
    validation = fitted.score(read_rows(folder, "validation"))
    found = auc(validation["label"], validation["score"])
    assert fitted.metadata["validation_auc"] == f"{found:.4f}"
    assert found > 0.65
    train = read_rows(folder, "train")
    scores = fitted.score(train, fitted.snapshot_for(train["timestamp"].to_numpy()))
    out_of_time = auc(train["label"], scores["score"])
    assert fitted.metadata["cross_fit_train_auc"] == f"{out_of_time:.4f}"
    assert out_of_time < float(fitted.metadata["in_sample_train_auc"])


def test_the_unknown_stand_at_the_mean_and_the_first_snapshot_knows_nobody(
    fitted: CFVectors,
) -> None:
    assert fitted.num_fits == 4
    assert not fitted.user_known[0].any()
    assert not fitted.item_known[0].any()
    assert fitted.logits(["nobody"], ["i3"], 0).tolist() == [0.0]
    known = fitted.user_vectors[-1][fitted.user_known[-1]]
    torch.testing.assert_close(fitted.default_user[-1], known.mean(0))
    # So a newcomer gets the items that are liked in general, not a constant.
    assert fitted.logits(["nobody"] * 5, [f"i{n}" for n in range(1, 6)]).std() > 0.1


def test_a_snapshot_never_sees_its_own_rows(folder: Path, tmp_path: Path) -> None:
    before, rows = fit_tables(folder), make_rows()
    times = plan_snapshots(load_training_data(folder), 3, 8).times
    later = rows["timestamp"] >= int(times[2])
    changed = rows.assign(label=np.where(later, 1 - rows["label"], rows["label"]))
    after = fit_tables(write_prepared(tmp_path, changed))
    for name in ("user_vectors", "item_vectors", "default_user"):
        for snapshot in (1, 2):
            same = getattr(before[snapshot], name), getattr(after[snapshot], name)
            assert torch.equal(*same), name
        assert not torch.equal(getattr(before[3], name), getattr(after[3], name))


def test_a_fold_never_sees_its_own_rows(folder: Path, tmp_path: Path) -> None:
    before, rows, data = fit_tables(folder, folds=3), make_rows(), load_training_data(folder)
    plan = plan_folds(data, 3, 8)
    mine = (plan.sees == 1).nonzero().flatten()
    ids = data.users.to_numpy(), data.items["item_id"].to_numpy()
    pairs = set(zip(ids[0][data.train.users[mine]], ids[1][data.train.items[mine]], strict=True))
    flip = [pair in pairs for pair in zip(rows["user_id"], rows["item_id"], strict=True)]
    changed = rows.assign(label=np.where(flip, 1 - rows["label"], rows["label"]))
    after = fit_tables(write_prepared(tmp_path, changed), folds=3)
    torch.testing.assert_close(before[1].logits(data.train), after[1].logits(data.train))
    for table in (0, 2, 3):
        assert not torch.allclose(before[table].logits(data.train), after[table].logits(data.train))


def test_settings_are_chosen_on_validation(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lightgcn_module, "L2_GRID", (1000.0, 1.0))
    config = LightGCNConfig(dim=8, layers=1, learning_rate=0.03, max_steps=40, folds=2)
    fitted = fit_lightgcn(folder, config)
    assert fitted.metadata["l2"] == "1"
    assert fitted.num_fits == 3
    again = fit_lightgcn(folder, config)
    assert torch.equal(again.user_vectors, fitted.user_vectors)


def test_bad_settings_are_refused() -> None:
    for name, value in (("layers", 0), ("l2", 0.0), ("learning_rate", -1.0), ("cross_fit", "user")):
        with pytest.raises(InputError, match=f"{name}="):
            LightGCNConfig(**{name: value})
