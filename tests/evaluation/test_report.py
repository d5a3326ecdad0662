import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from prepared_folder import make_rows, write_prepared

from ccf_llm_hf.data import read_rows
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation import (
    auc,
    evaluate_scores,
    format_report,
    item_user_mean,
    read_scores,
    uauc,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_prepared(tmp_path_factory.mktemp("prepared"), make_rows())


@pytest.fixture(scope="module")
def scores(folder: Path) -> pd.DataFrame:
    rows = read_rows(folder, "test")
    logits = rows["label"] + np.random.default_rng(0).normal(size=len(rows)) * 1.5 - 0.5
    return rows[["user_id", "item_id", "label"]].assign(
        score=logits, prob=1 / (1 + np.exp(-logits))
    )


@pytest.fixture(scope="module")
def report(folder: Path, scores: pd.DataFrame) -> dict:
    other = scores.assign(score=scores["score"] * 2).drop(columns="prob")
    return evaluate_scores(
        scores, folder, compare={"twice": other}, averages=[("model", "twice")], resamples=100
    )


def test_metrics_are_those_of_the_rows(report: dict, scores: pd.DataFrame) -> None:
    values = report["methods"]["model"]
    assert values["auc"] == auc(scores["label"], scores["score"])
    assert values["uauc"] == uauc(scores["label"], scores["score"], scores["user_id"])
    assert values["auc_ci"][0] < values["auc"] < values["auc_ci"][1]
    assert values["uauc_ci"][0] < values["uauc"] < values["uauc_ci"][1]
    assert values["rows"] == len(scores)
    assert values["users"] == scores["user_id"].nunique()
    assert 0 < values["uauc_users"] <= values["users"]
    assert 0 < values["logloss"] < 1
    assert 0 < values["ece"] < 0.5


def test_controls_and_comparisons_are_always_there(
    report: dict, folder: Path, scores: pd.DataFrame
) -> None:
    names = ["model", "twice", "item mean", "item + user mean", "model & twice"]
    assert list(report["methods"]) == names
    expected = item_user_mean(read_rows(folder, "train"), read_rows(folder, "test"))
    assert report["methods"]["item + user mean"]["auc"] == auc(scores["label"], expected["score"])
    assert report["methods"]["twice"]["ece"] is None
    assert set(report["definitions"]) >= {"auc", "uauc", "wuauc", "item mean", "model & twice"}


def test_slices_are_cut_by_what_train_holds(report: dict, folder: Path) -> None:
    rows = read_rows(folder, "test")
    slices = report["slices"]
    assert slices["warm_pair"]["rows"] == rows["not_cold"].sum()
    assert slices["cold_user"]["rows"] == (rows["user_id"] == "u0").sum() > 0
    assert slices["cold_item"]["rows"] == (rows["item_id"] == "i0").sum() > 0
    assert slices["cold_user"]["users"] == 1
    for part in slices.values():
        assert part["definition"]
        assert part["methods"]["model"]["rows"] == part["rows"]


def test_differences_are_paired(report: dict) -> None:
    twice = report["differences"]["twice"]
    zeros = {"auc": 0.0, "auc_ci": [0.0, 0.0], "uauc": 0.0, "uauc_ci": [0.0, 0.0]}
    assert twice == zeros | {"rows": report["rows"]}
    control = report["differences"]["item mean"]
    methods = report["methods"]
    assert control["auc"] == pytest.approx(methods["model"]["auc"] - methods["item mean"]["auc"])
    assert control["auc_ci"][0] < control["auc"] < control["auc_ci"][1]


def test_the_report_is_json_and_prints_the_same_from_it(report: dict) -> None:
    text = json.dumps(report, allow_nan=False)
    assert format_report(json.loads(text)) == format_report(report)


def test_the_table_is_tidy(report: dict) -> None:
    lines = format_report(report).split("\n")
    rows = [line for line in lines if line.startswith("  item mean ")][:1]
    header = next(line for line in lines if line.startswith("  all rows"))
    assert len(rows[0]) == len(header)
    assert max(map(len, lines)) <= 120
    assert not any(line != line.rstrip() for line in lines)
    for name in ("warm_pair", "cold_user", "cold_item"):
        assert any(line.startswith(f"{name}: ") and "rows" in line for line in lines)


def test_scores_in_another_order_are_matched(folder: Path) -> None:
    rows = read_rows(folder, "test").drop_duplicates(["user_id", "item_id"])
    small = write_prepared(folder.parent / "unique", make_rows(60))
    rows = read_rows(small, "test")
    assert not rows.duplicated(["user_id", "item_id"]).any()
    scores = rows[["user_id", "item_id", "label"]].assign(score=np.arange(len(rows)) * 1.0)
    straight = evaluate_scores(scores, small, resamples=10)
    shuffled = evaluate_scores(scores.sample(frac=1, random_state=0), small, resamples=10)
    assert straight == shuffled
    with pytest.raises(InputError, match="1 of 12 rows have none"):
        evaluate_scores(scores[1:], small)


def test_scores_that_do_not_fit_are_refused(folder: Path, scores: pd.DataFrame) -> None:
    with pytest.raises(InputError, match="'score'"):
        evaluate_scores(scores.drop(columns="score"), folder)
    with pytest.raises(InputError, match="labels differ"):
        evaluate_scores(scores.assign(label=0), folder)
    with pytest.raises(InputError, match="row 0 is NaN"):
        evaluate_scores(scores.assign(score=np.nan), folder)
    with pytest.raises(InputError, match="repeat a pair"):
        evaluate_scores(scores[::-1], folder)
    with pytest.raises(InputError, match="named 'item mean'"):
        evaluate_scores(scores, folder, compare={"item mean": scores})
    with pytest.raises(InputError, match="cannot average 'x'"):
        evaluate_scores(scores, folder, averages=[("x", "model")])
    with pytest.raises(InputError, match="missing or damaged"):
        evaluate_scores(scores, folder, split="dev")


def test_score_files_are_checked(tmp_path: Path, scores: pd.DataFrame) -> None:
    scores.to_parquet(tmp_path / "scores.parquet")
    pd.testing.assert_frame_equal(read_scores(tmp_path / "scores.parquet"), scores)
    scores.drop(columns="user_id").to_parquet(tmp_path / "less.parquet")
    with pytest.raises(InputError, match=r"less\.parquet lack the column 'user_id'"):
        read_scores(tmp_path / "less.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"broken\.parquet are missing or no parquet"):
        read_scores(tmp_path / "broken.parquet")


def test_a_method_that_covers_some_rows_is_compared_on_those(tmp_path):
    once = make_rows().drop_duplicates(["user_id", "item_id"], ignore_index=True)
    data = write_prepared(tmp_path / "data", once)
    rows = read_rows(data, "test")
    scores = rows.assign(score=np.linspace(-1, 1, len(rows)), prob=0.5)
    part = rows["user_id"].isin(rows["user_id"].unique()[:5])
    report = evaluate_scores(scores, data, compare={"part": scores[part]}, resamples=20)
    assert report["methods"]["part"]["rows"] == part.sum() < report["methods"]["model"]["rows"]
    assert report["differences"]["part"]["rows"] == part.sum()
    assert report["differences"]["part"]["auc"] in (0.0, None)
    assert f"on {part.sum():,} of these rows" in format_report(report)
    alone = evaluate_scores(scores[part], data, sample=True, resamples=20)
    assert alone["rows"] == part.sum()
    assert alone["methods"]["model"]["auc"] == report["methods"]["part"]["auc"]
    with pytest.raises(InputError, match="rows have none"):
        evaluate_scores(scores[part], data, resamples=20)


def test_pairs_that_repeat_are_measured_in_a_sample_and_compared(folder: Path, scores) -> None:
    rows = read_rows(folder, "test")
    assert rows.duplicated(["user_id", "item_id"]).any()
    part = rows["user_id"].isin(rows["user_id"].unique()[:9])
    assert rows[part].duplicated(["user_id", "item_id"]).any()
    report = evaluate_scores(
        scores[part], folder, compare={"all": scores}, sample=True, resamples=10
    )
    wanted = auc(rows["label"][part], scores["score"][part])
    assert report["rows"] == part.sum()
    assert [report["methods"][name]["auc"] for name in ("model", "all")] == [wanted, wanted]
    whole = evaluate_scores(scores, folder, compare={"part": scores[part]}, resamples=10)
    assert whole["methods"]["part"]["auc"] == wanted
