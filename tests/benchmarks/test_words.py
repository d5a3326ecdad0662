"""What the table says in words, from made-up rows."""

import pytest
from cells import name_of
from results_files import CELLS, cell_result, write_cells
from table import write_table
from words import (
    differences_in_words,
    differences_table,
    headline,
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
        "- **AUC against MF**: above it: *gate (MF, joint, tiny)*; below it: 1 of 4; "
        "not told apart: 2."
    )
    assert "above it: none; below it: 0 of 4; not told apart: 4." in uauc


def test_a_difference_that_another_training_may_turn_is_none(tmp_path):
    far, near = (0.70, 0.78, 0.785), (0.754, 0.755, 0.756)
    for arm, figures in (("gate", far), ("sum", near)):
        cells = [cell_result(arm, figure, seed=seed) for seed, figure in enumerate(figures)]
        write_cells(tmp_path / arm, cells)
    (gate,), (steady,) = (write_table(tmp_path / arm) for arm in ("gate", "sum"))
    for row in (gate, steady):
        assert row["differences"]["MF"]["auc_ci"][0] > 0
    assert "above it: none" in differences_in_words([gate])[0]
    assert "above it: *sum (MF, joint, tiny)*" in differences_in_words([steady])[0]
    assert "+0.0160 ± 0.0477 [" in differences_table([gate])[2]
    assert "**+0.0160** ± 0.0010 [" in differences_table([steady])[2]


def test_a_difference_too_small_to_see_is_none_whatever_its_interval(rows):
    (row,) = [row for row in rows if row["arm"] == "sum"]
    row["differences"]["MF"] |= {"auc": 0.0004, "auc_wide": [0.0001, 0.0009]}
    assert "above it: none" in differences_in_words([row])[0]
    assert "**" not in differences_table([row])[2]


def test_the_headline_counts_the_rows_with_a_language_model(rows):
    (line,) = headline([row for row in rows if row["track"] == "protocol"])
    assert "3 rows with a language model" in line
    assert "against MF 1 / 1 / 1 in AUC and 0 / 3 / 0 in UAUC" in line
    assert headline([row for row in rows if not row["backbone"]]) == []


def test_the_table_of_differences_has_every_compared_row_and_marks_what_is_outside(rows):
    protocol = [row for row in rows if row["track"] == "protocol"]
    head, _, *lines = differences_table(protocol)
    assert head == "| row | AUC against MF | UAUC against MF |"
    found = {line.split("|")[1].strip(): line.split("|")[2:4] for line in lines}
    assert set(found) == {name_of(row) for row in protocol if row["differences"]}
    for row in protocol:
        for cell, metric in zip(found.get(name_of(row), []), ("auc", "uauc"), strict=False):
            low, high = row["differences"]["MF"][f"{metric}_wide"]
            assert f"{row['differences']['MF'][metric]:+.4f}" in cell
            assert cell.strip().startswith("**") == (low > 0 or high < 0)
    assert "**+0.0110**" in found["gate (MF, joint, tiny)"][0]


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
    chosen = "gate (MF, joint, tiny), 2 seeds. AUC 0.7500 [0.730, 0.770]"
    assert f"{chosen}, target 0.7606: **missed**" in protocol
    assert "1 seed. AUC 0.8100 [0.790, 0.830], target 0.8200: **missed**" in opened
    assert opened.endswith("], target 0.7600: **met**, the interval over users begins below it.")
    assert targets_in_words([]) == []


@pytest.mark.parametrize(("high", "where"), [(0.7601, "holds it"), (0.7599, "ends below it")])
def test_a_missed_target_may_lie_within_the_interval(rows, high, where):
    row = next(row for row in rows if row["track"] == "open")
    row |= {"uauc": 0.75, "uauc_ci": [0.74, high]}
    said = targets_in_words([row])[0]
    assert said.endswith(f"], target 0.7600: **missed**, the interval over users {where}.")


def test_rows_that_validation_hardly_tells_from_the_chosen_one_are_named(rows):
    near, far = ({**rows[-1], "arm": arm} for arm in ("near", "far"))
    near["validation_auc"] -= 0.0004
    far["validation_auc"] -= 0.0006
    (said,) = targets_in_words([rows[-1], near, far])
    assert "Less than 0.0005 of validation AUC behind it: *near (" in said and "far" not in said


def test_the_chosen_row_has_a_language_model_and_simpler_ones_above_it_are_named(rows):
    (model,) = [row for row in rows if row["arm"] == "sum"]
    above, below = ({**model, "arm": arm, "backbone": ""} for arm in ("above", "below"))
    above["validation_auc"] += 0.001
    below["validation_auc"] -= 0.001
    (said,) = targets_in_words([above, model, below])
    assert "chosen on validation: sum (MF, joint, tiny), " in said
    assert "Without a language model, validation puts above it: *above (MF, joint)* (" in said
    assert "below (" not in said
    assert "Without a language model" not in targets_in_words([model, below])[0]
    assert targets_in_words([above]) == []
