"""The command: which cells it computes, and what it refuses before it does."""

import json

import pytest
import run

GATE, TEXT = "protocol-gate-mf-joint-seed0", "protocol-text_only-LoRA-seed0"
AVERAGE = "protocol-average_of_MF_and_text_only-LoRA-seed0"


def test_a_table_is_computed_once_and_goes_on_where_it_stopped(world, capsys):
    assert world.run("--only", "protocol-item", TEXT) == 0
    assert world.trained == [TEXT]
    assert world.run() == 0
    assert TEXT not in world.trained and GATE in world.trained
    table = capsys.readouterr().out
    before = {file: file.stat().st_mtime_ns for file in world.work.rglob("*.parquet")}
    assert world.run() == 0
    assert world.trained == [] and capsys.readouterr().out in table
    assert before == {file: file.stat().st_mtime_ns for file in world.work.rglob("*.parquet")}
    rows = json.loads((world.results / "table.json").read_text())
    assert [row["auc"] for row in rows] == sorted(row["auc"] for row in rows)
    assert len(rows) == len(world.cells()) == 11
    assert "| gate (MF, joint) | 1 | " in (world.results / "table.md").read_text()


def test_a_cell_whose_line_is_gone_is_computed_again_alone(world):
    world.run()
    file = world.results / "cells.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(line for line in lines if GATE not in line))
    world.run()
    assert world.trained == [GATE] and len(world.cells()) == len(lines)


def test_what_a_cell_is_made_of_is_computed_too_where_it_is_missing(world):
    world.run("--only", TEXT)
    (world.work / "cells" / TEXT / "test.parquet").unlink()
    assert world.run("--only", AVERAGE) == 0
    assert world.trained == [TEXT] and set(world.cells()) == {TEXT, AVERAGE}


def test_a_dry_run_lists_the_cells_and_writes_nothing(world, capsys):
    world.run("--only", TEXT)
    stamp = (world.results / "cells.jsonl").stat().st_mtime_ns
    (world.work / "cells" / TEXT / "test.parquet").unlink()
    capsys.readouterr()
    assert world.run("--dry-run", "--seeds", "2") == 0
    *lines, total = capsys.readouterr().out.splitlines()
    states = {line.split("  ")[-1]: line[:5] for line in lines}
    assert states[TEXT] == "again" and states[GATE] == "to do"
    (own,) = [line for line in lines if line.endswith(TEXT.replace("seed0", "seed1"))]
    took = json.loads((world.results / "cells.jsonl").read_text().splitlines()[0])["minutes"]
    assert f" {took:.1f} min" in own  # as seed 0 took
    assert total.startswith(f"{len(lines)} cells to do: 0.1 hours by the minutes")
    assert (world.results / "cells.jsonl").stat().st_mtime_ns == stamp and world.trained == []


def test_a_result_of_other_settings_is_refused_not_averaged(world, capsys):
    world.run("--only", GATE)
    file = world.results / "cells.jsonl"
    result = json.loads(file.read_text())
    result["settings"]["training"]["learning_rate"] = 0.5
    file.write_text(json.dumps(result) + "\n")
    assert world.run() == 2
    assert f"{GATE} was trained with other settings; delete its line" in capsys.readouterr().err


def test_results_of_another_data_set_are_not_mixed_in(world, capsys):
    world.run("--only", GATE)
    file = world.results / "cells.jsonl"
    file.write_text(file.read_text().replace('"synthetic"', '"ml-1m"'))
    assert world.run() == 2
    assert "holds results of ml-1m, not synthetic: name another" in capsys.readouterr().err


def test_a_name_takes_its_cell_and_a_text_all_that_contain_it(world):
    cells = world.bench(seeds=2).cells
    assert [cell.name for cell in run.chosen(cells, [GATE])] == [GATE]
    assert len(run.chosen(cells, ["scalar_gate", TEXT])) == 3
    assert run.chosen(cells, []) == cells


@pytest.mark.parametrize(
    ("flags", "fragment"),
    [
        (["--tracks", "shut"], "'shut'"),
        (["--seeds", "0"], "--seeds"),
        (["--only", "protocol-CF-mf_no_bias"], "(near it: 'protocol-CF-mf_nobias')"),
    ],
)
def test_bad_choices_end_with_one_line(world, capsys, flags, fragment):
    assert world.run(*flags) == 2
    message = capsys.readouterr().err.strip()
    assert fragment in message and "\n" not in message and not world.results.exists()


def test_folders_that_cannot_be_made_are_refused_before_anything_is_computed(world, capsys):
    world.results.write_text("")
    assert world.run() == 2
    assert f"--out {world.results} cannot be made" in capsys.readouterr().err
    assert world.trained == []
