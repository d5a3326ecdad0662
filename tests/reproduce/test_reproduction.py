"""What a cell is trained from, scored on and compared with, in a tiny table."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.torch import load_file

from ccf_llm_hf.cf.fit import score_cf
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation import auc, fit_temperature
from ccf_llm_hf.reproduce import reproduction

TEXT, GATE = "protocol-text_only-LoRA-tiny-seed0", "protocol-gate-mf-joint-tiny-seed0"
STAGED = "protocol-gate-mf-two-stage-tiny-seed0"
AVERAGE = "protocol-average_of_CF_and_text_only-mf-LoRA-tiny-seed0"
ADAPTER = "checkpoint-slim/adapter/adapter_model.safetensors"


@pytest.mark.usefixtures("rows")
def test_a_result_is_measured_on_the_scores_that_are_kept(world):
    result = world.result(f"{GATE}-quick")
    folder = world.work / "cells" / f"{GATE}-quick"
    validation, test = (pd.read_parquet(folder / f"{s}.parquet") for s in ("validation", "test"))
    assert result["test"]["auc"] == pytest.approx(auc(test["label"], test["score"]))
    assert result["validation"]["auc"] == pytest.approx(
        auc(validation["label"], validation["score"])
    )
    assert result["temperature"] == fit_temperature(validation["score"], validation["label"])
    assert set(result["differences"]) == {"MF"}
    assert set(world.result(f"{STAGED}-quick")["differences"]) == {"MF", "gate"}
    assert set(result["slices"]) >= {"warm_pair"}
    assert 0 < result["trained"]["train_labels"] <= 96 + 64
    assert result["minutes"] >= result["trained"]["minutes"]


@pytest.mark.usefixtures("rows")
def test_a_two_stage_cell_keeps_the_lora_of_its_starting_row(world):
    folders = [world.work / "cells" / f"{name}-quick" for name in (TEXT, STAGED, GATE)]
    first, staged, joint = (load_file(folder / ADAPTER) for folder in folders)
    assert first.keys() == staged.keys()
    assert all(staged[name].equal(value) for name, value in first.items())
    assert not all(joint[name].equal(value) for name, value in first.items())
    recipe = yaml.safe_load((folders[1] / "recipe.yaml").read_text())
    assert recipe["stages"][0]["init_from"] == str(folders[0] / "checkpoint-slim")


@pytest.mark.usefixtures("rows")
def test_an_average_is_of_the_two_rows_scores(world):
    folder = world.work / "cells"
    names = ("protocol-CF-mf", f"{TEXT}-quick", f"{AVERAGE}-quick")
    tables = [pd.read_parquet(folder / name / "test.parquet") for name in names]
    cf, text, average = (table["score"] for table in tables)
    scaled = [(scores - scores.mean()) / scores.std(ddof=0) for scores in (cf, text)]
    mean = (scaled[0] + scaled[1]) / 2
    back = (average - average.mean()) / average.std() * mean.std()
    np.testing.assert_allclose(back, mean, atol=1e-6)  # another level: float32 rounds elsewhere
    probabilities = 1 / (1 + np.exp(-average))
    assert probabilities.mean() == pytest.approx(tables[2]["prob"].mean(), abs=0.01)
    own = score_cf(world.work / "cf-protocol-mf", world.work / "data-protocol", "test")
    np.testing.assert_allclose(cf, own["score"])


@pytest.mark.usefixtures("rows")
def test_the_means_of_a_track_know_its_rows_only(world):
    here = reproduction.Reproduction.of(world.config())
    data = world.work / "data-protocol" / "data"
    protocol, opened = here.known_rows("protocol"), here.known_rows("open")
    assert len(protocol) == len(pd.read_parquet(data / "train.parquet"))
    start = pd.read_parquet(data / "validation.parquet")["timestamp"].min()
    assert opened["timestamp"].max() < start


def test_a_cell_of_another_row_is_that_of_the_same_seed(world):
    here = reproduction.Reproduction.of(world.config(budget="full", seeds=3))
    (cell,) = [c for c in here.cells if c.name == AVERAGE.replace("seed0", "seed2")]
    names = [here.same_seed(cell, row).name for row in cell.average_of]
    assert names == ["protocol-CF-mf", TEXT.replace("seed0", "seed2")]


@pytest.mark.usefixtures("rows")
def test_a_cell_is_compared_with_a_control_that_was_computed_elsewhere(world):
    scores = world.work / "cells" / "protocol-CF-mf" / "test.parquet"
    gate = world.results / "cells" / f"{GATE}-quick.json"
    before, kept = json.loads(gate.read_text()), scores.read_bytes()
    scores.unlink()
    gate.unlink()
    world.reproduce(budget="quick")
    assert json.loads(gate.read_text())["differences"] == before["differences"]
    assert scores.read_bytes() == kept


@pytest.mark.usefixtures("rows")
def test_a_cell_is_compared_with_the_gate_of_the_table_where_the_work_folder_lacks_it(world):
    gate, staged = (world.results / "cells" / f"{name}-quick.json" for name in (GATE, STAGED))
    before, result = json.loads(staged.read_text()), gate.read_text()
    kept = world.results / "scores" / f"{GATE}-quick.parquet"
    assert list(pd.read_parquet(kept)) == ["score"]  # nothing that tells who liked what
    assert [file.name for file in kept.parent.iterdir()] == [kept.name]
    scored = world.work / "cells" / f"{GATE}-quick" / "test.parquet"
    held = scored.read_bytes()
    scored.unlink()
    try:
        here = reproduction.Reproduction.of(world.config(budget="quick"))
        cell = next(cell for cell in here.cells if cell.name == STAGED)
        tables = {name: here.scores(cell, name) for name in ("validation", "test")}
        again = here.figures(cell, tables)["differences"]
        assert again == before["differences"] and "gate" in again
        other = json.loads(result)
        gate.write_text(json.dumps(other | {"test": other["test"] | {"auc": 0.123}}))
        with pytest.raises(InputError, match=f"{GATE}.*does not hold the scores of the result"):
            here.comparisons(cell)
        gate.unlink()
        assert set(here.comparisons(cell)) == {"MF"}
    finally:
        gate.write_text(result)
        scored.write_bytes(held)


@pytest.mark.usefixtures("rows")
def test_a_cell_is_compared_with_the_row_it_stands_beside_and_with_its_own_cf(world, monkeypatch):
    here = reproduction.Reproduction.of(world.config(budget="quick"))
    gate, text, average = (
        next(cell for cell in here.cells if cell.name == name) for name in (GATE, TEXT, AVERAGE)
    )
    beside = replace(average, beside=text.row)
    assert set(here.comparisons(beside)) == {"MF", "gate", "text_only"}
    assert {text.name, gate.name} <= set(here.needs(beside)) and here.needs(gate) == []
    (world.work / "cells" / "protocol-item_mean" / "test.parquet").unlink()
    assert "item mean" in here.comparisons(replace(average, beside="protocol-item_mean"))
    monkeypatch.setattr(reproduction, "FUSED_CF", ("another", "mf"))
    assert set(here.comparisons(gate)) == {"its CF alone"}
