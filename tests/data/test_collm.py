import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from raw_data import pickled_table

from ccf_llm_hf.data import PrepareConfig, interactions, load_prepared, prepare
from ccf_llm_hf.errors import InputError

FILES = ("train_ood2.pkl", "valid_ood2.pkl", "test_ood2.pkl")


def history(*numbers: int) -> tuple[np.ndarray, list[str]]:
    """As CoLLM stores it: a 0 without a title comes first."""
    return np.array([0, *numbers]), ["", *(f"Book {number}" for number in numbers)]


# Per split: uid, iid, label, timestamp, history, not_cold. The histories are not those that the
# rows would give, and rows repeat: neither must change.
ROWS: dict[str, list[tuple]] = {
    "train": [(2, 7, 1, 10.0, (), 1), (2, 7, 1, 10.0, (7,), 1), (1, 8, 0, 11.0, (9, 9), 1)],
    "validation": [(1, 7, 1, 21.0, (9,), 1), (3, 5, 0, 20.0, (), 0)],
    "test": [(2, 8, 0, 30.0, (7, 7), 1), (2, 5, 1, 31.0, (7,), 0), (2, 8, 1, 32.0, (), 0)],
}


def write(folder: Path, **changed: Any) -> Path:
    for file, rows in zip(FILES, ROWS.values(), strict=True):
        columns: dict[str, list] = {
            "uid": [row[0] for row in rows],
            "iid": [row[1] for row in rows],
            "label": [row[2] for row in rows],
            "timestamp": [row[3] for row in rows],
            "his": [history(*row[4])[0] for row in rows],
            "his_title": [history(*row[4])[1] for row in rows],
            "title": [f"Book {row[1]}" for row in rows],
            "flag": [0.0] * len(rows),
            "not_cold": [row[5] for row in rows],
        }
        for name, cells in changed.items():
            columns[name] = cells[: len(rows)]
            if not cells:
                del columns[name]
        (folder / file).write_bytes(pickled_table(columns))
    return folder


def config(folder: Path) -> PrepareConfig:
    return PrepareConfig("collm", str(folder / "out"), str(folder))


def test_rows_are_kept_as_published(tmp_path: Path) -> None:
    data = load_prepared(prepare(config(write(tmp_path)), summary=False))
    counts = {f"{name[:5]}_ood2.pkl": len(rows) for name, rows in ROWS.items()}
    assert {f: n["accepted"] for f, n in data.protocol["tables"].items()} == counts
    assert all(n["read"] == n["accepted"] for n in data.protocol["tables"].values())
    for name, rows in ROWS.items():
        found = [
            (
                *(int(row["user_id"]), int(row["item_id"]), row["label"], float(row["timestamp"])),
                *(tuple(map(int, row["history"])), int(row["not_cold"])),
            )
            for row in data.splits[name]
        ]
        assert found == rows
    assert data.splits["test"]["split_position"] == [0, 1, 2]
    assert data.splits["validation"]["split_position"] == [0, 0]
    titles = dict(zip(data.items["item_id"], data.items["title"], strict=True))
    assert titles == {n: f"Book {n}" for n in ("5", "7", "8", "9")}
    log = interactions(data.path)
    assert len(log) == 8 and log["rating"].isna().all()
    assert log["split"].tolist() == ["train"] * 3 + ["validation"] * 2 + ["test"] * 3
    assert data.protocol["redistributable"] is False


@pytest.mark.parametrize(
    ("title", "link"),
    [("Film (1995)", "https://grouplens.org"), ("Book", "https://amazon-reviews-2023")],
)
def test_the_license_is_that_of_the_ratings_behind(title: str, link: str, tmp_path: Path) -> None:
    data = load_prepared(prepare(config(write(tmp_path, title=[title] * 3)), summary=False))
    assert f"license_link: {link}" in (data.path / "README.md").read_text()
    assert ("MovieLens" in data.protocol["source"]) == title.startswith("Film")


def test_not_cold_is_computed_where_it_is_not_published(tmp_path: Path) -> None:
    data = load_prepared(prepare(config(write(tmp_path, not_cold=[])), summary=False))
    assert data.splits["train"]["not_cold"] == [True] * 3
    assert data.splits["validation"]["not_cold"] == [True, False]
    assert data.splits["test"]["not_cold"] == [True, False, True]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"his": []}, "train_ood2.pkl has no column 'his'"),
        ({"label": [1, 2, 0]}, "train_ood2.pkl, row 1: 'label' is not 0 or 1"),
        ({"uid": [1, -1, 0]}, "train_ood2.pkl, row 1: 'uid' is not a number from 0 on"),
        ({"timestamp": [float("nan")] * 3}, "row 0: 'timestamp' is not a number"),
        ({"his": [1, 2, 3]}, "row 0: 'his' is not a list"),
        ({"his": [np.array([0, 4])] * 3}, "row 0: 'his_title' is not a title for each"),
        ({"his": [["x"]] * 3}, "row 0: 'his' is not a list of whole numbers"),
    ],
)
def test_unusable_cells_are_named(changed: dict, message: str, tmp_path: Path) -> None:
    if message.endswith("whole numbers"):
        changed = {**changed, "his_title": [["t"]] * 3}
    with pytest.raises(InputError, match=message):
        prepare(config(write(tmp_path, **changed)))
    assert not (tmp_path / "out").exists()


def test_a_pickle_that_asks_for_more_is_refused(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    write(tmp_path)
    (tmp_path / FILES[1]).write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(InputError, match=r"valid_ood2\.pkl: the pickle asks for \w+\.system"):
        prepare(config(tmp_path))
    (tmp_path / FILES[1]).unlink()
    with pytest.raises(InputError, match=r"valid_ood2\.pkl does not exist"):
        prepare(config(tmp_path))
    assert not (tmp_path / "ran").exists()


def test_numbers_are_ids_exactly(tmp_path: Path) -> None:
    large = 2**70
    folder = write(
        tmp_path,
        uid=[1.9, 1.2, 3.0],
        iid=[2**53 + 1, 2**53, 8],
        his=[[0, large], [0, 8], [0, 8]],
        his_title=[["", "Large"], ["", "Eight"], ["", "Eight"]],
    )
    data = load_prepared(prepare(config(folder), summary=False))
    train = data.splits["train"]
    assert train["user_id"][:] == ["1.9", "1.2", "3"]
    assert train["item_id"][:] == ["9007199254740993", "9007199254740992", "8"]
    assert train["history"][:] == [[str(large)], ["8"], ["8"]]
