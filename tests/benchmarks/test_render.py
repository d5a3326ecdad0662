"""What the cells say: means over seeds, intervals, and the words made of them."""

import json
from pathlib import Path

import pytest
import render
from rows import DATASETS

RESULTS = Path(__file__).resolve().parents[2] / "results"
CONTROL = {"arm": "item + user mean", "cf": "", "training": "", "seed": None}


def result(auc, away=0.0, **changes):
    """A finished cell as the data file has it; `away`: its AUC minus MF's."""
    test = {"auc": auc, "uauc": auc - 0.05, "logloss": 0.6, "ece": 0.02}
    test |= {"auc_ci": [auc - 0.02, auc + 0.02], "uauc_ci": [auc - 0.08, auc - 0.01]}
    other = {"auc": away, "auc_ci": [away - 0.01, away + 0.01]}
    other |= {"uauc": 0.0, "uauc_ci": [-0.01, 0.01]}
    cell = {"cell": f"{len(changes)}-{auc}", "dataset": "ml-1m", "track": "protocol"}
    cell |= {"arm": "gate", "cf": "mf", "training": "joint", "quick": False, "seed": 0}
    cell |= {"validation": {"auc": auc + 0.01, "uauc": auc - 0.04}, "test": test}
    return cell | {"differences": {"MF": other}, "minutes": 3.0} | changes


def table_of(folder, *cells):
    (folder / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    return render.write_table(folder)


def test_seeds_are_averaged_and_their_spread_widens_a_difference(tmp_path):
    cells = [result(0.73, 0.01), result(0.75, 0.03, seed=1, minutes=5.0)]
    (row,) = table_of(tmp_path, *cells)
    assert (row["seeds"], row["auc"], row["minutes"]) == (2, 0.74, 4.0)
    assert row["auc_sd"] == pytest.approx(0.014142, abs=1e-6)
    assert row["auc_ci"] == pytest.approx([0.72, 0.76])
    found = row["differences"]["MF"]
    extra = 1.96 * 0.0141421 / 2**0.5
    half = (0.01**2 + extra**2) ** 0.5
    assert found["auc_wide"] == pytest.approx([0.02 - half, 0.02 + half], abs=1e-5)
    assert render.side(found, "auc") == 0 and found["auc_ci"][0] > 0
    assert render.read_table(tmp_path) == [row]


def test_a_quick_row_is_another_one_and_tracks_are_apart(tmp_path):
    rows = table_of(tmp_path, result(0.81, track="open"), result(0.74), result(0.71, quick=True))
    assert [(row["track"], row["quick"]) for row in rows] == [
        ("protocol", True),
        ("protocol", False),
        ("open", False),
    ]
    text = (tmp_path / "table.md").read_text()
    assert "| gate (MF, joint), quick | 1 | .7100 [.690, .730]" in text
    protocol, opened = text.split("### Open track")
    assert ".8100" in opened and ".8100" not in protocol


def test_a_difference_is_bold_where_its_interval_leaves_zero_out(tmp_path):
    rows = table_of(tmp_path, result(0.74, 0.02), result(0.7, -0.005, arm="sum"))
    text = render.table_markdown(rows)
    assert "| gate (MF, joint) | **+.020** [+.010, +.030] | +.000 [-.010, +.010] |" in text
    assert "| sum (MF, joint) | -.005 [-.015, +.005] |" in text
    tiny = {"auc": 0.0004, "auc_wide": [0.0001, 0.0007]}
    assert render.side(tiny, "auc") == 0
    (line,) = render.headline(rows)
    assert "2 rows with a language model" in line and "against MF 1 / 1 / 0 in AUC" in line


def test_targets_are_judged_by_the_row_that_validation_puts_first(tmp_path):
    chosen = result(0.74, validation={"auc": 0.77, "uauc": 0.7})
    better = result(0.755, arm="sum", validation={"auc": 0.75, "uauc": 0.7})
    control = result(0.733, **CONTROL, validation={"auc": 0.78, "uauc": 0.7})
    (line,) = render.targets(table_of(tmp_path, chosen, better, control))
    assert line.startswith("- **protocol**: *gate (MF, joint)*")
    assert (
        "AUC 0.7400 [0.720, 0.760], target 0.7606: **missed**, the interval over users ends" in line
    )
    assert "without a language model: *item + user mean* (test 0.7330 / 0.6830)" in line


def test_the_page_has_its_rows_and_all_of_book_crossing_that_read_words(tmp_path):
    cells = [result(0.74), result(0.73, arm="sum"), result(0.733, **CONTROL)]
    trained = result(0.78, track="frozen", cf="mf_fields")
    text = "\n".join(render.shown_table(table_of(tmp_path, *cells, trained)))
    assert "| protocol | gate (MF, joint) | 1 | .7400 [.720, .760] |" in text
    assert "| frozen | gate (MF + fields, joint) | 1 | .7800" in text
    assert "item + user mean" in text and "sum" not in text


@pytest.mark.parametrize(("track", "names"), render.SHOWN.items())
def test_the_rows_of_the_page_are_in_the_table(track, names):
    dataset = "book-crossing" if track == "frozen" else "ml-1m"
    rows = render.read_table(RESULTS / dataset)
    assert set(names) <= {render.name_of(row) for row in rows if row["track"] == track}


@pytest.mark.parametrize("dataset", DATASETS)
def test_committed_tables_are_those_of_the_committed_cells(dataset, tmp_path):
    cells = RESULTS / dataset / "cells.jsonl"
    assert cells.stat().st_size < 200_000
    (tmp_path / "cells.jsonl").write_bytes(cells.read_bytes())
    render.write_table(tmp_path)
    for name in ("table.json", "table.md"):
        assert (tmp_path / name).read_text() == (RESULTS / dataset / name).read_text()
