"""What the pages show of a reproduced table: generated, and clear about what is missing."""

import json
import sys
from pathlib import Path

import pytest
from cells import plan
from results_files import CELLS, cell_result, write_cells
from table import write_table

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import results_sections


@pytest.fixture
def results(tmp_path, monkeypatch):
    monkeypatch.setattr(results_sections, "RESULTS", tmp_path / "ml-1m")
    (tmp_path / "ml-1m").mkdir()
    return tmp_path / "ml-1m"


def test_missing_results_are_said_and_not_raised(results):
    for name, lines in results_sections.sections().items():
        if name != "published":
            assert "yet: run `ccf-llm reproduce ml-1" in lines[0], name
    (text,) = results_sections.main_section()
    assert "table.json` holds no results yet" in text
    (results / "table.json").write_text(json.dumps([]))
    assert results_sections.main_section() == [text]


def test_tables_come_from_the_rows(results):
    write_cells(results, CELLS)
    write_table(results)
    sections = {name: "\n".join(lines) for name, lines in results_sections.sections().items()}
    assert "0.7500 ± 0.0141" in sections["protocol"] and "0.8100" not in sections["protocol"]
    assert "0.8100" in sections["open"] and "0.7500" not in sections["open"]
    assert "| protocol | full | 2 | 0.1 | 4 |" in sections["times"]
    assert "AUC 0.7500 [0.730, 0.770], target 0.7606: **missed**" in sections["targets"]
    assert (
        "**AUC against MF**: above it: *gate (MF, joint, tiny)*; below it: 0"
        in sections["protocol"]
    )
    assert "results/ml-1m/table.png" in sections["picture"]
    main = "\n".join(results_sections.main_section())
    assert "| protocol | gate | MF | joint | 2 | **0.7500** (0.730 to 0.770)" in main
    assert "0.7100" not in main  # the quick budget's, where the full one is there
    assert ".761 (SeLLa-Rec, 7B)." in main
    assert "- **protocol**, 1 rows with a language model" in main


def test_the_whole_budget_is_estimated_from_the_rows_that_are_there(results):
    assert results_sections.whole_budget_lines() == []
    trained = [cell for cell in plan(["open"], "full", 1, "ml-1m") if cell.seeded]
    (gate,) = (cell for cell in trained if cell.arm == "gate and folded CF logit")
    row = {key: getattr(gate, key) for key in ("track", "arm", "cf", "training", "backbone")}
    cells = [cell_result(seed=seed, minutes=10.0 * (seed + 1), auc=0.8, **row) for seed in range(3)]
    write_cells(results, [*cells, cell_result(auc=0.8, budget="quick", minutes=900.0, **row)])
    text = "\n".join(results_sections.whole_budget_lines())
    expected = "2 cells at a time: open 0.5 hours, 0.2 if all seeds were as fast as their row's"
    assert f"3 seeds of every row take, {expected} fastest (1 of {len(trained)} rows" in text
    assert "protocol" not in text


def test_cells_that_took_too_long_are_named_with_their_cores(results):
    write_cells(results, [cell_result("gate", 0.75, minutes=45.0)])
    assert results_sections.slow_lines() == []
    fast, slow = (
        {"minutes": minutes, "hardware": {"torch_threads": 1, "bf16_backbone": bf16}}
        for minutes, bf16 in ((46.0, True), (99.6, False))
    )
    cells = [cell_result("gate", 0.75, seed=1, **slow), cell_result("gate", 0.75, **fast)]
    write_cells(results, [*cells, cell_result("sum", 0.75)])
    _, text = results_sections.slow_lines()
    seeds = "46 (seed 0, one core), 100 (seed 1, one core, no bf16)"
    assert text.endswith(f"took longer: *gate (MF, joint, tiny)* (protocol track): {seeds}.")


def test_repeated_cells_stand_beside_those_of_the_table(results):
    write_cells(results, CELLS)
    write_cells(results / "repeats", [cell_result("gate", 0.7, seed=1)])
    *_, line = lines = results_sections.repeat_section()
    assert len(lines) == 3
    assert line == "| gate | MF | 1 | 0.7100, 0.7700 | 0.7000, 0.7600 | 0.6500, 0.7100 |"


def test_other_data_sets_are_shown_under_their_names(results):
    for name in results_sections.OTHERS:
        write_cells(results.parent / name, CELLS)
        write_table(results.parent / name)
    text = "\n".join(results_sections.other_section())
    assert "### MovieLens-100K: Protocol track\n" in text
    assert "### MovieLens latest-small: Open track\n" in text


def test_schemes_of_cf_vectors_are_compared_with_snapshots(results):
    away = {"auc": 0.013, "auc_ci": [-0.003, 0.028], "uauc": -0.003, "uauc_ci": [-0.022, 0.018]}
    real = {"backbone": results_sections.SMOLLM}
    in_sample = cell_result("gate, in-sample CF", 0.73, differences={"gate": away}, **real)
    write_cells(results, [in_sample, cell_result("gate", 0.72, **real), *CELLS])
    write_table(results)
    *_, first, second = results_sections.leak_section()
    assert first == "| snapshots in time | 1 | 1.00 | 0.7300 / 0.6800 | 0.7200 | 0.6700 |"
    assert (
        "in-sample) | 1 | 1.00 | 0.7400 / 0.6900 | 0.7300 (+0.0130 [-0.0030, +0.0280]) |" in second
    )
