"""A whole tiny table, reproduced: what is computed, and what is not computed again."""

import json
import re
import shutil

import pandas as pd
import pytest
from results_files import cell_result, write_cells

from ccf_llm_hf.cli.main import main
from ccf_llm_hf.configs import ReproduceConfig
from ccf_llm_hf.data.prepared import FORMAT
from ccf_llm_hf.errors import FolderInUse, InputError
from ccf_llm_hf.reproduce import reproduction, run
from ccf_llm_hf.reproduce.cells import plan
from ccf_llm_hf.reproduce.reproduction import Reproduction
from ccf_llm_hf.reproduce.table import outlook_text

TEXT, GATE = "protocol-text_only-LoRA-tiny-seed0", "protocol-gate-mf-joint-tiny-seed0"
STAGED = "protocol-gate-mf-two-stage-tiny-seed0"
AVERAGE = "protocol-average_of_CF_and_text_only-mf-LoRA-tiny-seed0"


def test_every_cell_has_a_result_and_every_row_is_in_the_table(rows, world):
    files = {file.stem for file in (world.results / "cells").iterdir()}
    assert {f"{name}-quick" for name in (TEXT, GATE, STAGED, AVERAGE)} <= files
    assert {"protocol-CF-mf", "open-CF_folded_in-mf", "open-item_and_user_mean"} <= files
    assert "protocol-CF_recent_likes-mf" in files
    assert len(files) == len(rows) == 11
    assert rows == json.loads((world.results / "table.json").read_text())
    assert (world.results / "table.png").read_bytes().startswith(b"\x89PNG")
    for row in rows:
        assert row["auc_ci"][0] <= row["auc"] <= row["auc_ci"][1]
        assert row["budget"] == ("quick" if row["backbone"] else "full")
    assert [*world.results.rglob("*.partial")] == []
    # Ratings stay in the work folder; of the row that others are compared with the bare scores.
    (kept,) = world.results.rglob("*.parquet")
    assert kept.stem == f"{GATE}-quick" and list(pd.read_parquet(kept)) == ["score"]


@pytest.mark.usefixtures("rows")
def test_a_finished_cell_stays_and_a_deleted_result_is_computed_again(world):
    stamps = {file: file.stat().st_mtime_ns for file in (world.results / "cells").iterdir()}
    before = world.result(f"{GATE}-quick")
    world.reproduce(budget="quick")
    assert world.trained == world.scored == []
    gone = world.results / "cells" / f"{GATE}-quick.json"
    gone.unlink()
    world.reproduce(budget="quick")
    assert world.trained == [GATE] and world.scored == [GATE, GATE]
    assert world.result(f"{GATE}-quick")["test"] == before["test"]
    for file, stamp in stamps.items():
        assert (file.stat().st_mtime_ns == stamp) == (file != gone), file


def test_a_killed_run_goes_on_behind_the_training(world, monkeypatch):
    name = "protocol-gate-mf-joint-tiny-seed1"
    scores = reproduction.Reproduction.model_scores

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduction.Reproduction, "model_scores", killed)
    with pytest.raises(KeyboardInterrupt):
        world.reproduce(seeds=2, only=[name])
    assert not (world.results / "cells" / f"{name}-quick.json").exists()
    stage = world.work / "cells" / f"{name}-quick" / "stages" / "main" / "stage.json"
    trained = stage.stat().st_mtime_ns
    monkeypatch.setattr(reproduction.Reproduction, "model_scores", scores)
    world.reproduce(seeds=2, only=[name])
    assert stage.stat().st_mtime_ns == trained
    result = world.result(f"{name}-quick")
    assert result["seed"] == 1
    assert result["minutes"] >= result["trained"]["minutes"]


def test_what_a_cell_is_made_of_is_computed_with_it_where_it_is_not_here(world, capsys):
    staged, text = (name.replace("seed0", "seed3") for name in (STAGED, TEXT))
    world.reproduce(seeds=4, only=[staged])
    assert world.trained == [text, staged]
    assert f"{text}-quick too: others are made of it" in capsys.readouterr().err
    shutil.rmtree(world.work / "cells" / f"{text}-quick")  # as in a clone: only its result is there
    average = AVERAGE.replace("seed0", "seed3")
    world.reproduce(seeds=4, only=[average])
    assert world.trained == [text]
    assert world.result(f"{average}-quick")["test"]["rows"] > 0


@pytest.mark.usefixtures("rows")
def test_a_dry_run_says_what_is_computed_again_and_why(world, tmp_path):
    results = tmp_path / "results"
    shutil.copytree(world.results, results)
    (results / "cells" / f"{STAGED}-quick.json").unlink()
    cells = run.outlook(world.config(work=str(tmp_path / "elsewhere"), out=str(results)))
    again = [cell["cell"] for cell in cells if cell["again"]]
    assert again == [f"{TEXT}-quick"]
    *lines, why, total = outlook_text(cells).splitlines()
    assert [line.split()[-1] for line in lines if line.startswith("again ")] == again
    took = {cell["cell"]: cell["minutes"] for cell in cells}
    assert took[f"{GATE}-quick"] == world.result(f"{GATE}-quick")["minutes"]
    assert why.startswith("again: has a result") and total.startswith("2 cells to do: ")


@pytest.mark.usefixtures("rows")
def test_cells_side_by_side_give_what_they_give_one_after_another(world, tmp_path):
    names = ["protocol-item_mean", "open-item_mean", "open-item_and_user_mean"]
    tables = [
        run.reproduce(world.config(out=str(tmp_path / str(n)), only=names, workers=n))
        for n in (1, 2)
    ]
    for row in tables[0] + tables[1]:
        row["minutes"] = 0
        del row["differences"]  # another process plans the real rows, which have more controls
    assert len(tables[0]) == 3 and tables[0] == tables[1]
    log = world.work / "cells" / "open-item_mean" / "log.txt"
    assert log.is_file()


def test_only_takes_parts_of_names_and_refuses_others(tmp_path, monkeypatch):
    monkeypatch.setattr(reproduction, "plan", plan)  # the real one
    folders = {"work": str(tmp_path / "work"), "out": str(tmp_path / "out")}
    config = ReproduceConfig("ml-1m", budget="quick", tracks=["protocol"], **folders)
    here = Reproduction.of(config)
    assert here.cells == plan(["protocol"], "quick", 1, "ml-1m")
    assert [cell.name for cell in run.chosen(here, ["item_mean", "CF-mf_no"])] == [
        "protocol-item_mean",
        "protocol-CF-mf_nobias",
    ]
    assert [cell.name for cell in run.chosen(here, ["protocol-CF-mf"])] == ["protocol-CF-mf"]
    assert run.chosen(here, []) == here.cells
    printed = [here.label(cell) for cell in here.cells]  # what `--dry-run` lists can be given
    for cell, name in zip(here.cells, printed, strict=True):
        assert cell in run.chosen(here, [name])
    with pytest.raises(
        InputError, match=r"--only 'gait' .* --budget quick --seeds 1: --dry-run lists"
    ):
        run.chosen(here, ["gate", "gait"])
    with pytest.raises(InputError, match=r"\(but with --tracks open\): --dry-run lists"):
        run.chosen(here, ["open-CF-mf"])
    with pytest.raises(InputError, match=r"\(near it: 'protocol-CF-mf_nobias'\)"):
        run.chosen(here, ["protocol-CF-mf_no_bias"])


@pytest.mark.usefixtures("rows")
def test_a_dry_run_lists_the_cells_and_writes_nothing(world, tmp_path, capsys):
    before = {file: file.stat().st_mtime_ns for file in world.results.rglob("*")}
    dry = ["reproduce", "ml-100k", "--work", str(tmp_path / "work"), "--seeds", "2", "--dry-run"]
    assert main([*dry, "--out", str(world.results)]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    done = [line for line in lines if line.startswith("done ")]
    files = {file.stem for file in (world.results / "cells").iterdir()}
    assert len(done) >= 10 and {line.split()[-1] for line in done} <= files
    left = {line.split()[-1] for line in lines} - files
    assert len(left) >= 3 and all("seed1" in name for name in left)
    assert len(done) + len(left) == len(lines)
    assert all(re.match(r"(done |to do) +\d+\.\d min  \S+$", line) for line in lines)
    assert total.startswith(f"{len(left)} cells to do: ") and "without" not in total
    assert main([*dry, "--out", str(tmp_path / "out"), "--json"]) == 0
    cells = json.loads(capsys.readouterr().out)
    assert len(cells) == len(lines)
    assert {(cell["done"], cell["again"], cell["minutes"]) for cell in cells} == {
        (False, False, None)
    }
    assert main([*dry, "--out", str(tmp_path / "out")]) == 0
    *_, total = capsys.readouterr().out.splitlines()
    assert total == f"{len(cells)} cells to do; no estimate for {len(cells)} of them, " + (
        "of whose rows no seed is finished"
    )
    assert before == {file: file.stat().st_mtime_ns for file in world.results.rglob("*")}
    assert not (tmp_path / "work").exists() and not (tmp_path / "out").exists()


@pytest.mark.usefixtures("rows")
def test_a_result_of_other_settings_is_refused_not_averaged(world):
    file = world.results / "cells" / f"{GATE}-quick.json"
    before = file.read_text()
    result = json.loads(before)
    result["recipe"] |= {"fusion_learning_rate": 0.5}
    file.write_text(json.dumps(result))
    with pytest.raises(InputError, match=r"made with another fusion_learning_rate: delete it"):
        world.reproduce(budget="quick")
    file.write_text(before)
    world.reproduce(budget="quick")
    assert world.trained == []


def test_folders_of_something_else_are_refused(capsys, tmp_path):
    file, work = tmp_path / "file", tmp_path / "work"
    file.write_text("")
    for options in (["--out", str(file)], ["--work", str(file / "below")]):
        assert main(["reproduce", "ml-1m", *options]) == 2
        assert f"{options[0]} {options[1]} is a file" in capsys.readouterr().err
    (work / "data-protocol").mkdir(parents=True)
    (work / "data-protocol" / "protocol.json").write_text(
        json.dumps({"format": FORMAT, "name": "ml-100k"})
    )
    options = ["--work", str(work), "--out", str(tmp_path / "out"), "--only", "protocol-item_mean"]
    assert main(["reproduce", "ml-1m", *options]) == 2
    assert "holds ml-100k, not ml-1m" in capsys.readouterr().err
    (work / "data-protocol" / "protocol.json").write_text("{")
    assert main(["reproduce", "ml-1m", *options]) == 2
    message = capsys.readouterr().err
    assert f"delete {work / 'data-protocol'}, and it is made again" in message
    assert "data-protocol is not a prepared folder" in message


def test_a_cell_that_another_run_trains_is_not_said_to_be_damaged(world, monkeypatch):
    folder = world.work / "cells" / f"{GATE.replace('seed0', 'seed5')}-quick"

    def in_use(*_):
        raise FolderInUse(f"another process trains in {folder} now: wait")

    monkeypatch.setattr(reproduction.Reproduction, "train", in_use)
    with pytest.raises(FolderInUse) as refused:
        world.reproduce(seeds=6, only=[GATE.replace("seed0", "seed5")])
    assert str(refused.value) == f"another process trains in {folder} now: wait"


def test_results_of_another_data_set_are_not_mixed_in(capsys, tmp_path):
    write_cells(tmp_path, [cell_result("item mean", 0.709)])
    before = (tmp_path / "cells" / "0.json").read_bytes()
    for options in ([], ["--dry-run"]):
        assert main(["reproduce", "ml-100k", "--out", str(tmp_path), *options]) == 2
        message = f"{tmp_path} holds results of ml-1m, not ml-100k: name another folder (--out)"
        assert message in capsys.readouterr().err
    assert [file.name for file in tmp_path.iterdir()] == ["cells"]
    assert (tmp_path / "cells" / "0.json").read_bytes() == before


@pytest.mark.parametrize("flag", ["--out", "--work"])
def test_folders_that_cannot_be_made_are_refused_before_anything_is_computed(
    capsys, tmp_path, flag
):
    broken = tmp_path / "link"
    broken.symlink_to(tmp_path / "nowhere")
    folders = {"--out": tmp_path / "out", "--work": tmp_path / "work"} | {flag: broken}
    options = [part for name, folder in folders.items() for part in (name, str(folder))]
    assert main(["reproduce", "ml-1m", "--only", "protocol-item_mean", *options]) == 2
    message = capsys.readouterr().err.strip()
    assert f"{flag} {broken} cannot be written to" in message and "\n" not in message
    assert not list(tmp_path.rglob("*.parquet")) and not list(tmp_path.rglob("*.json"))


@pytest.mark.parametrize(
    ("options", "fragment"),
    [
        (["--budget", "huge"], "--budget"),
        (["--tracks", "shut"], "'shut'"),
        (["--seeds", "0"], "--seeds"),
        (["--workers", "0"], "--workers"),
        (["--only", "gait"], "--only 'gait'"),
    ],
)
def test_bad_choices_end_with_exit_code_2(capsys, tmp_path, options, fragment):
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    assert main(["reproduce", "ml-1m", *folders, *options]) == 2
    message = capsys.readouterr().err.strip()
    assert fragment in message and "\n" not in message
    assert not (tmp_path / "out").exists()
