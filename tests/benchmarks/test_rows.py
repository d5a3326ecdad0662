"""The plan of the table: which cells, in which order, by settings that a recipe takes."""

from pathlib import Path

import pytest
import yaml
from measure import TABLES
from rows import COMPARED, DATASETS, name_of, plan, read_cells, row_of

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.training.recipe import Stage

WHOLE = [
    cell for data in ("ml-1m", "book-crossing") for cell in plan(data, DATASETS[data], 1, False)
]


def names(*args):
    return [cell.name for cell in plan(*args)]


def test_controls_come_first_then_seed_after_seed():
    cells = plan("ml-1m", ["protocol", "open"], 2, False)
    seeds = [cell.seed for cell in cells]
    fixed, trained = seeds.count(None), seeds.count(0)
    assert seeds == [None] * fixed + [0] * trained + [1] * trained
    assert (fixed, trained) == (10, 12)
    assert len({cell.name for cell in cells}) == len(cells)


def test_a_quick_run_and_the_other_data_sets_have_the_main_rows():
    quick = names("ml-1m", ["protocol"], 1, True)
    assert "protocol-gate-mf-joint-seed0-quick" in quick and "protocol-CF-mf" in quick
    assert not any("two-stage" in name or "concat" in name or "sasrec" in name for name in quick)
    assert [name.removesuffix("-quick") for name in quick] == names(
        "ml-100k", ["protocol"], 1, False
    )


def test_what_a_cell_is_made_of_is_planned_before_it():
    cells = plan("ml-1m", ["protocol"], 1, False)
    for place, cell in enumerate(cells):
        before = {other.row for other in cells[:place]}
        assert {row for row in (cell.starts_from, *cell.average_of) if row} <= before


def test_rows_stand_on_tables_and_are_compared_with_rows_that_exist():
    for cell in WHOLE:
        assert not cell.cf or cell.cf in TABLES[cell.track]
    for data_tracks in DATASETS.values():
        found = {c.row.removeprefix(f"{c.track}-") for c in WHOLE if c.track in data_tracks}
        assert all(set(COMPARED[track].values()) <= found for track in data_tracks)


@pytest.mark.parametrize("cell", [cell for cell in WHOLE if cell.stage], ids=lambda cell: cell.name)
def test_a_recipe_takes_the_settings(cell):
    stage = Stage(name="main", init_from="elsewhere" if cell.starts_from else "", **cell.stage)
    wanted = {"LoRA": ["lora"], "joint": ["fusion", "lora"], "two-stage": ["fusion"]}
    assert stage.trains() == wanted[cell.training]
    assert stage.reads_cf() == bool(cell.cf)


def test_the_stages_of_the_recipe_are_the_cells():
    recipe = Path(__file__).parents[2] / "examples" / "configs" / "bookcrossing.yaml"
    words, whole = yaml.safe_load(recipe.read_text())["stages"]
    cells = {cell.row: cell for cell in WHOLE}
    assert Stage(name="words", **cells["frozen-text_only-LoRA"].stage) == Stage(**words)
    cell = cells["frozen-gate_and_CF_logit-mf_fields-joint"]
    assert cell.starts_from == "frozen-text_only-LoRA"
    assert Stage(name="whole", init_from="words", **cell.stage) == Stage(**whole)


def test_rows_in_words():
    said = [name_of(row_of(cell)) for cell in WHOLE]
    assert {"item mean", "MF without biases", "MF, folded in", "gate (MF, two-stage)"} <= set(said)
    assert {"linear hybrid", "MF + fields", "cf_only (MF + fields, joint)"} <= set(said)


@pytest.mark.parametrize(
    ("tracks", "seeds", "fragment"), [(["shut"], 1, "'shut'"), (["open"], 0, "--seeds")]
)
def test_what_cannot_be_planned_is_refused(tracks, seeds, fragment):
    with pytest.raises(InputError, match=fragment):
        plan("ml-1m", tracks, seeds, False)


def test_a_line_that_is_no_result_is_named(tmp_path):
    assert read_cells(tmp_path) == []
    (tmp_path / "cells.jsonl").write_text('{"cell": "a"}\n')
    with pytest.raises(InputError, match=r"cells\.jsonl, line 1: .*delete the line"):
        read_cells(tmp_path)
