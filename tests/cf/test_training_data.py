from pathlib import Path

import pytest
from raw_data import small_raw, write_raw

from ccf_llm_hf.cf import LightGCNConfig, MFConfig, SASRecConfig, fit_cf
from ccf_llm_hf.cf.training_data import load_training_data
from ccf_llm_hf.data import PrepareConfig, interactions, prepare
from ccf_llm_hf.errors import InputError

FIXED = {"l2_factors": 1.0, "l2_user_bias": 1.0, "l2_item_bias": 1.0}


@pytest.fixture(scope="module")
def without_times(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ratings split at random, with histories signed."""
    folder = tmp_path_factory.mktemp("random")
    given = write_raw(small_raw(20, 24), "csv", folder)
    options = {"split": "random", "histories": "signed", "out": str(folder / "out")}
    return prepare(PrepareConfig(**given, **options), summary=False)


@pytest.mark.parametrize(
    ("model", "config"),
    [
        ("mf", MFConfig(cross_fit="snapshots", **FIXED)),
        ("lightgcn", LightGCNConfig(cross_fit="snapshots")),
        ("sasrec", SASRecConfig()),
    ],
)
def test_snapshots_need_times(without_times: Path, tmp_path: Path, model: str, config) -> None:
    with pytest.raises(InputError, match="cut by time, and this data was split at random") as error:
        fit_cf(model, without_times, tmp_path / "cf", config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "cf").exists()


@pytest.mark.parametrize(
    "config", [{}, {"rows": "earlier"}, {"rows": "earlier", "targets": "graded"}]
)
def test_folds_need_none(without_times: Path, tmp_path: Path, config: dict) -> None:
    vectors = fit_cf("mf", without_times, tmp_path / "cf", MFConfig(dim=2, **FIXED, **config))
    train = interactions(without_times).query("split == 'train'")
    assert vectors.metadata["train_rows"] == str(len(train))
    assert set(vectors.user_ids) == set(train["user_id"])


def test_earlier_rows_of_data_without_times_are_those_of_train(without_times: Path) -> None:
    train, earlier = (load_training_data(without_times, which) for which in ("train", "earlier"))
    assert len(earlier.train) == len(train.train)
    assert sorted(earlier.users) == sorted(train.users)
    assert not train.has_times
