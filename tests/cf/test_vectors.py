import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from ccf_llm_hf.cf import CFVectors
from ccf_llm_hf.cf.folds import fold_of
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.configuration_ccf_llm import ids_fingerprint

TENSOR_NAMES = [f.name for f in fields(CFVectors) if f.type is Tensor]


@pytest.fixture
def saved(cf: CFVectors, tmp_path: Path) -> Path:
    cf.metadata["validation_auc"] = "0.7000"
    cf.save(tmp_path / "cf")
    return tmp_path / "cf"


def test_what_is_loaded_equals_what_was_saved(cf: CFVectors, saved: Path) -> None:
    loaded = CFVectors.load(saved)
    for name in TENSOR_NAMES:
        assert torch.equal(getattr(loaded, name), getattr(cf, name)), name
    assert (loaded.user_ids, loaded.item_ids) == (cf.user_ids, cf.item_ids)
    assert loaded.item_titles == cf.item_titles
    assert loaded.model_name == cf.model_name
    assert loaded.metadata == {"validation_auc": "0.7000"}


def test_titles_with_any_line_break_survive(cf: CFVectors, tmp_path: Path) -> None:
    titles = ["a\nb", "c\r\nd", "e\u2028f", "g\x85h", '"', "\\", " ", ""]
    replace(cf, item_titles=titles).save(tmp_path)
    assert CFVectors.load(tmp_path).item_titles == titles


def test_metadata_describes_the_file(cf: CFVectors, saved: Path) -> None:
    with safe_open(saved / "cf_embeddings.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata == {
        "format_version": "1",
        "cf_model": "mf",
        "dim": "6",
        "num_users": "5",
        "num_items": "8",
        "num_fits": "2",
        "ids_fingerprint": ids_fingerprint(cf.user_ids, cf.item_ids),
        "validation_auc": "0.7000",
    }


def test_saving_leaves_other_files_and_no_rest(cf: CFVectors, saved: Path) -> None:
    (saved / "config.json").write_text("{}")
    cf.save(saved)
    names = {path.name for path in saved.iterdir()}
    assert names == {
        "cf_embeddings.safetensors",
        "user_ids.jsonl",
        "item_catalog.jsonl",
        "config.json",
    }
    assert len({(saved / name).stat().st_mode for name in names}) == 1


@pytest.mark.parametrize("name", ["cf_embeddings.safetensors", "user_ids.jsonl"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(InputError, match=name):
        CFVectors.load(saved)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.99])
def test_a_truncated_tensor_file_is_named(saved: Path, share: float) -> None:
    path = saved / "cf_embeddings.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match=r"cf_embeddings\.safetensors"):
        CFVectors.load(saved)


def test_a_truncated_catalog_is_named_with_its_line(saved: Path) -> None:
    path = saved / "item_catalog.jsonl"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(InputError, match=r"item_catalog\.jsonl line 8"):
        CFVectors.load(saved)


@pytest.mark.parametrize("change", ["dropped", "swapped", "renamed"])
def test_ids_of_another_fit_are_refused(saved: Path, change: str) -> None:
    path = saved / "user_ids.jsonl"
    lines = path.read_text().splitlines()
    if change == "dropped":
        lines.pop()
    elif change == "swapped":
        lines[0], lines[1] = lines[1], lines[0]
    else:
        lines[0] = json.dumps({"id": "someone"})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(InputError, match=r"cf_embeddings\.safetensors was not written with"):
        CFVectors.load(saved)


def test_another_format_version_is_refused(
    cf: CFVectors, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccf_llm_hf.cf.vectors.FORMAT_VERSION", "3")
    cf.save(tmp_path)
    with pytest.raises(InputError, match="format version 3"):
        CFVectors.load(tmp_path)


def test_contradicting_tensors_are_refused(cf: CFVectors) -> None:
    with pytest.raises(InputError, match="item_vectors"):
        replace(cf, item_vectors=cf.item_vectors[:, :-1])
    with pytest.raises(InputError, match="user_known"):
        replace(cf, user_known=cf.user_known.float())
    with pytest.raises(InputError, match="default_user holds NaN"):
        replace(cf, default_user=cf.default_user * float("nan"))
    with pytest.raises(InputError, match="ascend"):
        replace(cf, snapshot_times=cf.snapshot_times.flip(0))
    with pytest.raises(InputError, match="'u0' twice"):
        replace(cf, user_ids=["u0", "u0", "u2", "u3", "u4"])


def test_logits_are_dot_products_plus_offset(cf: CFVectors) -> None:
    logits = cf.logits(["u1", "u0", "u1"], ["i3", "i0", "i0"], fit=0)
    expected = [cf.user_vectors[0, u] @ cf.item_vectors[0, i] for u, i in ((1, 3), (0, 0), (1, 0))]
    torch.testing.assert_close(logits, torch.stack(expected) + cf.offset[0])


def test_the_last_snapshot_is_the_default(cf: CFVectors) -> None:
    users, items = ["u1", "u2"], ["i1", "i2"]
    assert torch.equal(cf.logits(users, items), cf.logits(users, items, 1))
    mixed = cf.logits(users, items, torch.tensor([0, 1]))
    assert mixed[0] == cf.logits(users[:1], items[:1], 0)
    assert mixed[1] == cf.logits(users[1:], items[1:], 1)


def test_the_unknown_stand_at_the_defaults(cf: CFVectors) -> None:
    # u4 and i7 are in the tables but unknown; i2 is unknown in snapshot 0 only.
    for user, item in (("u4", "i7"), ("nobody", "nothing"), ("u4", "nothing")):
        logit = cf.logits([user], [item], 0)
        expected = cf.default_user[0] @ cf.default_item[0] + cf.offset[0]
        torch.testing.assert_close(logit[0], expected)
    early = cf.user_vectors[0, 0] @ cf.default_item[0] + cf.offset[0]
    torch.testing.assert_close(cf.logits(["u0"], ["i2"], 0)[0], early)
    late = cf.user_vectors[1, 0] @ cf.item_vectors[1, 2] + cf.offset[1]
    torch.testing.assert_close(cf.logits(["u0"], ["i2"], 1)[0], late)


def test_score_keeps_rows_and_gives_probabilities(cf: CFVectors) -> None:
    rows = pd.DataFrame({"user_id": ["u3", "x"], "item_id": ["i1", "i2"], "label": [1, 0]})
    scores = cf.score(rows.set_index(pd.Index([7, 3])))
    assert list(scores.columns) == ["user_id", "item_id", "label", "score", "prob"]
    np.testing.assert_allclose(scores["score"], cf.logits(rows["user_id"], rows["item_id"]))
    np.testing.assert_allclose(scores["prob"], 1 / (1 + np.exp(-scores["score"])))


def test_snapshot_for_gives_strictly_earlier_fits(cf: CFVectors) -> None:
    cf = replace(cf, snapshot_times=torch.tensor([10, 100]))
    assert cf.snapshot_for(np.array([-5, 10, 99, 100, 101])).tolist() == [0, 0, 0, 1, 1]


@pytest.fixture
def folds(cf: CFVectors) -> CFVectors:
    """Two folds and a fit on all rows."""
    names = [name for name in TENSOR_NAMES if name != "snapshot_times"]
    tensors = {name: torch.cat([getattr(cf, name), getattr(cf, name)[-1:]]) for name in names}
    return replace(cf, **tensors, snapshot_times=torch.tensor([100] * 3), cross_fit="folds")


def test_training_snapshots_go_by_time_or_by_fold(cf: CFVectors, folds: CFVectors) -> None:
    users, items, times = ["u0", "u1", "u0", "u3"] * 5, ["i0", "i1", "i2", "i3"] * 5, [5, 100] * 10
    assert cf.training_fits(users, items, times).tolist() == [0, 1] * 10
    found = folds.training_fits(users, items, times)
    assert torch.equal(found, torch.from_numpy(fold_of(users, items, 2)))
    assert found.max() < folds.num_fits - 1
    with pytest.raises(InputError, match="training_fits"):
        folds.snapshot_for(times)


def test_the_cross_fit_is_saved_and_absent_in_files_of_snapshots_in_time(
    cf: CFVectors, folds: CFVectors, tmp_path: Path
) -> None:
    folds.save(tmp_path / "folds")
    assert CFVectors.load(tmp_path / "folds").cross_fit == "folds"
    assert CFVectors.load(tmp_path / "folds").metadata == {}
    cf.save(tmp_path / "snapshots")
    assert CFVectors.load(tmp_path / "snapshots").cross_fit == "snapshots"
    assert folds.last().cross_fit == "snapshots"
    assert folds.last().num_fits == 1


def test_a_bad_cross_fit_is_refused(cf: CFVectors, folds: CFVectors) -> None:
    with pytest.raises(InputError, match="2 fits by fold"):
        replace(cf, cross_fit="folds")
    with pytest.raises(InputError, match="'user' is none of"):
        replace(cf, cross_fit="user")
    with pytest.raises(InputError, match="ascend"):
        replace(folds, cross_fit="snapshots")


def test_last_keeps_the_last_snapshot_only(cf: CFVectors) -> None:
    last = cf.last()
    assert last.num_fits == 1
    pairs = ["u1", "u4", "x"], ["i0", "i2", "i3"]
    assert torch.equal(last.logits(*pairs), cf.logits(*pairs))


def test_from_tables_imports_vectors_of_any_ids() -> None:
    imported = CFVectors.from_tables(
        {7: [1.0, 2.0], "b": [3.0, 0.0]},
        {1: np.array([1.0, 1.0]), 2: np.array([0.0, 3.0])},
        titles={1: "One", 3: "Three"},
        offset=0.5,
    )
    assert imported.user_ids == ["7", "b"]
    assert imported.item_ids == ["1", "2", "3"]
    assert imported.item_titles == ["One", "2", "Three"]
    assert imported.item_known.tolist() == [[True, True, False]]
    assert imported.logits(["7", "b"], ["1", "2"]).tolist() == [3.5, 0.5]
    # The unknown stand at the mean of the known.
    assert imported.logits(["new", "b"], ["1", "3"]).tolist() == [3.5, 2.0]


def test_an_import_fitted_until_a_time_says_nothing_before_it() -> None:
    imported = CFVectors.from_tables({"a": [1.0]}, {"x": [2.0]}, fitted_before=50)
    assert imported.snapshot_for(np.array([0, 49, 50])).tolist() == [0, 0, 1]
    assert not imported.user_known[0].any()
    assert imported.logits(["a", "a"], ["x", "x"], torch.tensor([0, 1])).tolist() == [0.0, 2.0]


@pytest.mark.parametrize(
    ("users", "message"),
    [
        ({}, "empty"),
        ({"a": [1.0], "b": [1.0, 2.0]}, "'b'"),
        ({"a": [float("nan")]}, "NaN"),
        ({1: [1.0], "1": [2.0]}, "repeat"),
        ({"a": [1.0, 2.0]}, "2 dimensions"),
    ],
)
def test_bad_tables_are_refused(users: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        CFVectors.from_tables(users, {"x": [1.0]})
