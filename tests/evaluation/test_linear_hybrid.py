import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from prepared_folder import make_rows, write_prepared

from ccf_llm_hf.data import read_rows
from ccf_llm_hf.evaluation import auc, evaluate_scores, format_report, linear_hybrid
from ccf_llm_hf.evaluation.linear_hybrid import (
    FILE,
    Settings,
    _Features,
    fit_linear_hybrid,
)

AUTHORS = 12


def make_world(seed: int = 0) -> tuple[dict[str, pd.DataFrame], pd.DataFrame]:
    """Users who love or hate authors, each book read a few times: only the affinity knows a thing
    of books that are new."""
    draw = np.random.default_rng(seed)
    users, items = draw.integers(0, 60, 4_000), draw.integers(0, 800, 4_000)
    taste = draw.choice([-2.0, 2.0], size=(60, AUTHORS))
    labels = draw.random(4_000) < 1 / (1 + np.exp(-taste[users, items % AUTHORS]))
    table = pd.DataFrame(
        {
            "user_id": [f"u{user}" for user in users],
            "item_id": [f"i{item}" for item in items],
            "label": labels.astype(np.int64),
        }
    ).drop_duplicates(["user_id", "item_id"])
    bounds = {"train": (0, 2_400), "validation": (2_400, 3_000), "test": (3_000, None)}
    catalog = pd.DataFrame(
        {
            "item_id": [f"i{item}" for item in range(800)],
            "title": ["A book"] * 800,
            "author": [f"Author {item % AUTHORS}" for item in range(800)],
        }
    )
    rows = {split: table[low:high].reset_index(drop=True) for split, (low, high) in bounds.items()}
    return rows, catalog


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prepared data whose items have genres, some of them several, one none."""
    folder = write_prepared(tmp_path_factory.mktemp("fields"), make_rows(600))
    file = folder / "items" / "items.parquet"
    items = pd.read_parquet(file)
    genres = [["War", "Drama"] if row % 3 else ["War"] for row in range(len(items))]
    items.assign(genres=[None, *genres[1:]]).to_parquet(file, index=False)
    protocol = json.loads((folder / "protocol.json").read_text())
    (folder / "protocol.json").write_text(json.dumps(protocol | {"item_fields": ["genres"]}))
    return folder


def test_new_items_are_ranked_by_the_users_affinity_to_their_values() -> None:
    rows, items = make_world()
    known = fit_linear_hybrid(rows, items, ["author"], progress=False)["test"]
    blind = fit_linear_hybrid(rows, items, [], progress=False)["test"]
    new = ~rows["test"]["item_id"].isin(rows["train"]["item_id"][:1_200])
    labels = rows["test"]["label"]
    assert auc(labels[new], known["score"][new]) > 0.8
    assert auc(labels[new], blind["score"][new]) < 0.65


def test_no_label_of_the_scored_split_is_read() -> None:
    rows, items = make_world()
    scores = fit_linear_hybrid(rows, items, ["author"], progress=False)
    rows["test"] = rows["test"].drop(columns="label")
    again = fit_linear_hybrid(rows, items, ["author"], progress=False)
    pd.testing.assert_frame_equal(scores["test"], again["test"])


def test_a_training_row_says_nothing_of_its_own_label() -> None:
    # All of a user's rows share one author, so that what the user's bias knows of a row would show.
    rows, items = make_world()
    items["author"] = "One"
    settings = Settings(fields=("author",))

    def affinity_of_first(label: int) -> tuple[float, float]:
        rows["train"].loc[0, "label"] = label
        features = _Features(rows, items, ["author"])
        expected = 1 / (1 + np.exp(-features._logits(features.biases, settings)["train"]))
        found = features._affinity("author", expected, settings)["train"].toarray()[0, 0]
        user = features.users["train"] == features.users["train"][0]
        user[0] = False
        residuals = features.labels - expected
        return found, 3.0 * residuals[user].sum() / (user.sum() + settings.shrinkage)

    (low, naive_low), (high, naive_high) = affinity_of_first(0), affinity_of_first(1)
    assert abs(high - low) < 0.1 * abs(naive_high - naive_low)


def test_every_report_of_data_with_fields_has_it(folder: Path) -> None:
    rows = read_rows(folder, "test")
    scores = rows[["user_id", "item_id", "label"]].assign(score=np.arange(len(rows)) * 1.0)
    report = evaluate_scores(scores, folder, resamples=10)
    own = linear_hybrid(folder, "test")
    assert own is not None
    assert report["methods"]["linear hybrid"]["auc"] == auc(rows["label"], own["score"])
    assert report["differences"]["linear hybrid"]["rows"] == len(rows)
    assert "linear hybrid" in report["slices"]["cold_item"]["methods"]
    assert "affinity" in report["definitions"]["linear hybrid"]
    assert "linear hybrid" in format_report(report)


def test_it_is_of_the_same_rows_as_a_sample(folder: Path) -> None:
    rows = read_rows(folder, "test").drop_duplicates(["user_id", "item_id"])
    part = write_prepared(folder.parent / "unique", make_rows(90))
    (part / "protocol.json").write_bytes((folder / "protocol.json").read_bytes())
    (part / "items" / "items.parquet").write_bytes((folder / "items/items.parquet").read_bytes())
    rows = read_rows(part, "test")[5:]
    scores = rows[["user_id", "item_id", "label"]].assign(score=0.0)
    report = evaluate_scores(scores, part, sample=True, resamples=10)
    own = linear_hybrid(part, "test")
    assert own is not None
    assert report["methods"]["linear hybrid"]["auc"] == auc(rows["label"], own["score"][5:])


def test_it_is_fitted_once_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = linear_hybrid(folder, "validation")
    assert (folder / FILE).is_file()
    monkeypatch.setattr("sklearn.linear_model.LogisticRegression.fit", None)
    pd.testing.assert_frame_equal(linear_hybrid(folder, "validation"), kept)
    assert len(kept) == len(read_rows(folder, "validation"))


def test_data_without_fields_has_none(tmp_path: Path) -> None:
    assert linear_hybrid(write_prepared(tmp_path, make_rows(100)), "test") is None
