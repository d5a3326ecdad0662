"""What the table says in words, from made-up rows."""

import pytest
from results_files import CELLS, cell_result, write_cells

from ccf_llm_hf.reproduce.table import write_table
from ccf_llm_hf.reproduce.words import (
    differences_in_words,
    differences_table,
    name_of,
    targets_in_words,
)


@pytest.fixture
def rows(tmp_path):
    write_cells(tmp_path, [*CELLS, cell_result("sum", 0.742), cell_result("cf_only", 0.70)])
    return [row for row in write_table(tmp_path) if row["budget"] == "full"]


def test_a_row_is_above_or_below_only_where_its_interval_leaves_zero_out(rows):
    protocol = [row for row in rows if row["track"] == "protocol"]
    auc, uauc = differences_in_words(protocol)
    assert auc == (
        "- **AUC against MF**: above it: *gate (mf, joint, tiny)*; below it: *cf_only (mf, "
        "joint, tiny)*; not told apart: 2."
    )
    assert "above it: none; below it: none; not told apart: 4." in uauc


def test_the_table_of_differences_has_every_compared_row_and_marks_what_is_outside(rows):
    protocol = [row for row in rows if row["track"] == "protocol"]
    head, _, *lines = differences_table(protocol)
    assert head == "| row | AUC against MF | UAUC against MF |"
    found = {line.split("|")[1].strip(): line.split("|")[2:4] for line in lines}
    assert set(found) == {name_of(row) for row in protocol if row["differences"]}
    for row in protocol:
        for cell, metric in zip(found.get(name_of(row), []), ("auc", "uauc"), strict=False):
            low, high = row["differences"]["MF"][f"{metric}_ci"]
            assert f"{row['differences']['MF'][metric]:+.4f}" in cell
            assert cell.strip().startswith("**") == (low > 0 or high < 0)
    assert "**+0.0110**" in found["gate (mf, joint, tiny)"][0]


def test_a_control_of_few_rows_is_told_row_by_row(rows):
    protocol = [row for row in rows if row["track"] == "protocol"]
    protocol[-1]["differences"]["its CF alone"] = protocol[-1]["differences"]["MF"]
    last = differences_in_words(protocol)[-1]
    assert last.startswith(f"- **{name_of(protocol[-1])} against its CF alone**: AUC ")
    assert "UAUC" in last and "[" in last
    assert "its CF alone" not in differences_table(protocol)[0]


def test_a_control_that_a_seed_was_not_compared_with_is_left_out(tmp_path):
    cells = [cell_result("gate", 0.74), cell_result("gate", 0.75, seed=1, differences={})]
    write_cells(tmp_path, cells)
    (row,) = write_table(tmp_path)
    assert row["seeds"] == 2 and row["differences"] == {}
    assert differences_in_words([row]) == differences_table([row]) == []


def test_targets_are_judged_by_the_row_that_validation_chose(rows):
    protocol, opened = targets_in_words(rows)
    assert "gate (mf, joint, tiny), 2 seeds. AUC 0.7500, target 0.7606: **missed**" in protocol
    assert "1 seed. AUC 0.8100, target 0.8200: **missed**" in opened
    assert "UAUC 0.7600, target 0.7600: **met**" in opened
    assert targets_in_words([]) == []


def test_the_usual_backbone_goes_without_saying():
    row = {"arm": "gate", "cf": "mf", "training": "joint", "backbone": "smollm2-135m-instruct"}
    assert name_of(row) == "gate (mf, joint)"
    assert name_of(row | {"cf": "", "training": "", "backbone": ""}) == "gate"
