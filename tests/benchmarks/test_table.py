"""The results table and its picture, from made-up cells."""

import json
from statistics import stdev

import matplotlib.figure
import pytest
from plots import plot_table
from results_files import CELLS, cell_result, write_cells
from table import PUBLISHED, markdown, published, write_table

from ccf_llm_hf.errors import InputError

ASKED = {"track", "arm", "cf", "backbone", "seeds", "auc", "auc_ci", "uauc", "uauc_ci"}
ASKED |= {"logloss", "ece", "minutes"}


@pytest.fixture
def rows(tmp_path):
    write_cells(tmp_path, CELLS)
    return write_table(tmp_path)


def test_a_row_holds_the_means_over_seeds(rows, tmp_path):
    assert rows == json.loads((tmp_path / "table.json").read_text())
    assert all(set(row) >= ASKED for row in rows)
    assert [row["seeds"] for row in rows] == [1, 2, 1, 1]
    (gate,) = [row for row in rows if row["seeds"] == 2]
    assert gate["auc"] == pytest.approx(0.75)
    assert gate["auc_ci"] == pytest.approx([0.73, 0.77])
    assert gate["uauc"] == pytest.approx(0.70)
    assert gate["uauc_ci"] == pytest.approx([0.67, 0.74])
    assert gate["auc_sd"] == pytest.approx(stdev([0.74, 0.76]))
    assert gate["minutes"] == 4.0
    assert gate["validation_auc"] == pytest.approx(0.76)


def test_an_interval_over_users_and_trainings_is_wider_by_what_seeds_differ_by(tmp_path):
    three = [cell_result("gate", auc, seed=n) for n, auc in enumerate((0.74, 0.75, 0.76))]
    control = cell_result("CF", 0.74, cf="mf", training="", backbone="", seed=None)
    write_cells(tmp_path, [*three, cell_result("sum", 0.73), control])
    found = {row["arm"]: row["differences"]["MF"] for row in write_table(tmp_path)}
    assert found["gate"]["auc_sd"] == pytest.approx(0.01)
    for arm, seeds in (("gate", 3), ("sum", 1)):  # one seed: as far as the others' seeds differ
        half = (0.01**2 + (1.96 * 0.01) ** 2 / seeds) ** 0.5
        expected = [found[arm]["auc"] - half, found[arm]["auc"] + half]
        assert found[arm]["auc_wide"] == pytest.approx(expected)
        assert found[arm]["uauc_wide"] == pytest.approx(found[arm]["uauc_ci"])
    assert found["CF"]["auc_wide"] == pytest.approx(found["CF"]["auc_ci"])


def test_tracks_and_budgets_are_never_mixed(rows, tmp_path):
    places = [(row["track"], row["budget"], row["auc"]) for row in rows]
    assert [place[:2] for place in places] == [
        *[("protocol", "full")] * 2,
        ("protocol", "quick"),
        ("open", "full"),
    ]
    assert places[0][2] < places[1][2]
    text = (tmp_path / "table.md").read_text()
    assert text == markdown(rows)
    heads = [line for line in text.splitlines() if line.startswith("#")]
    assert heads == ["### Protocol track", "### Protocol track, quick budget", "### Open track"]
    assert "| 0.7500 ± 0.0141 [0.730, 0.770] |" in text
    assert "| 0.8100 [0.790, 0.830] |" in text


@pytest.mark.parametrize("content", ["", "{}", "[]", "null", '{"arm": 1', '"gate"'])
def test_a_file_that_is_no_result_is_named(tmp_path, content):
    write_cells(tmp_path, CELLS)
    (tmp_path / "cells" / "broken.json").write_text(content)
    with pytest.raises(InputError, match=r"broken\.json holds no cell's result: delete it"):
        write_table(tmp_path)
    assert not (tmp_path / "table.json").exists()


def test_a_copy_of_a_result_is_no_second_seed(tmp_path):
    write_cells(tmp_path, [*CELLS, CELLS[1]])
    with pytest.raises(InputError, match=r"5\.json and .*1\.json hold the same cell"):
        write_table(tmp_path)


def test_no_results_are_an_empty_table(tmp_path):
    assert write_table(tmp_path / "new") == []
    assert (tmp_path / "new" / "table.json").read_text() == "[]\n"
    assert not (tmp_path / "new" / "table.png").exists()


def test_published_figures_have_their_source():
    assert published().count("\n") == len(PUBLISHED) + 2
    assert "| SeLLa-Rec, 7B | .761 |  | SeLLa-Rec; its UAUC is defined otherwise |" in published()


def test_the_picture_sets_published_figures_beside_the_protocol_track_only(
    rows, tmp_path, monkeypatch
):
    drawn = []
    save = matplotlib.figure.Figure.savefig
    monkeypatch.setattr(
        matplotlib.figure.Figure,
        "savefig",
        lambda self, *a, **k: drawn.append(self) or save(self, *a, **k),
    )
    plot_table(rows, tmp_path / "t.png", PUBLISHED)
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    protocol, _, opened, _ = drawn[0].axes
    names = [label.get_text() for label in protocol.get_yticklabels()]
    assert len(names) == 3 + len(PUBLISHED)
    assert names.index("gate (MF, joint, tiny), quick budget") < names.index("item + user mean")
    assert names[-1] == "SeLLa-Rec, 7B"
    assert [label.get_text() for label in opened.get_yticklabels()] == [
        "gate and folded CF logit (MF, joint, tiny)"
    ]
    colors = {line.get_label(): line.get_color() for line in protocol.lines}
    assert len(set(colors.values())) == 3 and "controls" in colors
