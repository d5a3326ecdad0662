"""What the table says in words, from made-up rows."""

import pytest
from results_files import CELLS, cell_result, write_cells

from ccf_llm_hf.reproduce.table import write_table
from ccf_llm_hf.reproduce.words import differences_in_words, name_of, targets_in_words


@pytest.fixture
def rows(tmp_path):
    write_cells(tmp_path, [*CELLS, cell_result("sum", 0.742), cell_result("cf_only", 0.70)])
    return [row for row in write_table(tmp_path) if row["budget"] == "full"]


def test_a_row_is_above_or_below_only_where_its_interval_leaves_zero_out(rows):
    protocol = [row for row in rows if row["track"] == "protocol"]
    auc, uauc = differences_in_words(protocol)
    assert auc == (
        "- **AUC against MF**: above: gate (mf, joint, tiny) (+0.0110); below: cf_only (mf, joint, "
        "tiny) (-0.0390); not told apart: item + user mean (-0.0060), sum (mf, joint, tiny) "
        "(+0.0030)."
    )
    assert "above: none; below: none; not told apart: cf_only" in uauc


def test_a_control_that_a_seed_was_not_compared_with_is_left_out(tmp_path):
    cells = [cell_result("gate", 0.74), cell_result("gate", 0.75, seed=1, differences={})]
    write_cells(tmp_path, cells)
    (row,) = write_table(tmp_path)
    assert row["seeds"] == 2 and row["differences"] == {}
    assert differences_in_words([row]) == []


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
