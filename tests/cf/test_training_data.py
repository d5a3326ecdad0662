from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from raw_data import small_raw, write_raw

from ccf_llm_hf.cf import LightGCNConfig, MFConfig, SASRecConfig, fit_cf
from ccf_llm_hf.cf.training_data import load_training_data
from ccf_llm_hf.data import PrepareConfig, interactions, prepare
from ccf_llm_hf.errors import FolderInUse, InputError
from ccf_llm_hf.io import lock_output

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


def test_two_processes_do_not_write_one_output(without_times: Path, tmp_path: Path) -> None:
    given = write_raw(small_raw(20, 24), "csv", tmp_path)
    options = PrepareConfig(**given, split="random", out=str(tmp_path / "out"))
    with lock_output(tmp_path / "out"):
        for work in (
            lambda: prepare(options),
            lambda: fit_cf("mf", without_times, tmp_path / "out"),
        ):
            with pytest.raises(FolderInUse, match="another process works in"):
                work()


@pytest.mark.parametrize("which", ["train", "earlier"])
def test_rows_of_one_second_keep_their_order(tmp_path: Path, which: str) -> None:
    """By their milliseconds, then as they stand in the file."""
    draw = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "user_id": draw.permutation(np.repeat(["a", "b", "c"], 40)),
            "item_id": np.concatenate([draw.permutation(40) for _ in range(3)]),
            "title": "A film",
            "rating": draw.integers(1, 6, 120),
            "timestamp": 1_600_000_000_000
            + 500 * (np.arange(120) // 15)
            + draw.integers(0, 2, 120),
        }
    ).drop_duplicates(["user_id", "item_id"])
    table.to_csv(tmp_path / "rows.csv", index=False)
    options = {"rating_column": "rating", "time_unit": "ms", "ratios": [0.6, 0.2, 0.2]}
    given = {"source": "table", "interactions": str(tmp_path / "rows.csv")}
    out = prepare(PrepareConfig(**given, **options, out=str(tmp_path / "out")), summary=False)
    data = load_training_data(out, which)
    ordered = table.sort_values("timestamp", kind="stable")
    found = pd.DataFrame(
        {
            "user": data.users.to_numpy()[data.train.users],
            "item": data.items["item_id"].to_numpy()[data.train.items],
        }
    )
    for user, rows in found.groupby("user"):
        wanted = ordered[ordered["user_id"] == user]["item_id"].astype(str)
        assert rows["item"].tolist() == wanted.tolist()[: len(rows)]
