"""What a cell is trained from, scored on and compared with, in a tiny table."""

import json
import os
from dataclasses import replace

import measure
import numpy as np
import pandas as pd
import pytest
from prepared_folder import make_rows, write_prepared
from rows import Cell, plan

from ccf_llm_hf.cf.config import MFConfig
from ccf_llm_hf.cf.fit import score_cf
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation import auc, fit_temperature

GATE, TEXT = "protocol-gate-mf-joint-seed0", "protocol-text_only-LoRA-seed0"
PAIR = ["user_id", "item_id"]
AVERAGE = "protocol-average_of_MF_and_text_only-LoRA-seed0"


def cell_of(bench, name):
    return next(cell for cell in bench.cells if cell.name == name)


def test_a_result_is_measured_on_the_scores_that_are_kept(world):
    bench = world.bench()
    result = bench.run(cell_of(bench, GATE))
    folder = world.work / "cells" / GATE
    validation, test = (pd.read_parquet(folder / f"{s}.parquet") for s in ("validation", "test"))
    assert result["test"]["auc"] == pytest.approx(auc(test["label"], test["score"]), rel=1e-5)
    assert result["validation"]["auc"] == pytest.approx(
        auc(validation["label"], validation["score"]), rel=1e-5
    )
    assert result["temperature"] == pytest.approx(
        fit_temperature(validation["score"], validation["label"]), rel=1e-5
    )
    assert result["minutes"] >= 2.0 and result["settings"]["model"]["fusion"] == "gate"
    assert world.cells() == {GATE: json.loads(json.dumps(result))}


def test_a_difference_is_of_the_same_rows_as_the_control(world):
    bench = world.bench()
    result = bench.run(cell_of(bench, GATE))
    assert list(result["differences"]) == ["item + user mean", "MF"]
    test = pd.read_parquet(world.work / "cells" / GATE / "test.parquet")
    mf = score_cf(world.work / "cf-protocol-mf", world.work / "data-protocol", "test")
    away = auc(test["label"], test["score"]) - auc(mf["label"], mf["score"])
    assert result["differences"]["MF"]["auc"] == pytest.approx(away, abs=1e-5)
    assert set(bench.run(cell_of(bench, TEXT))["differences"]) == {"item + user mean", "MF", "gate"}
    control = bench.run(cell_of(bench, "protocol-item_and_user_mean"))
    assert list(control["differences"]) == ["MF"]


def test_an_average_is_of_the_two_rows_scores(world):
    bench = world.bench()
    for name in (TEXT, AVERAGE):
        bench.run(cell_of(bench, name))
    names = ("protocol-CF-mf", TEXT, AVERAGE)
    tables = [pd.read_parquet(world.work / "cells" / name / "test.parquet") for name in names]
    cf, text, average = (table["score"] for table in tables)
    mean = sum((scores - scores.mean()) / scores.std(ddof=0) for scores in (cf, text)) / 2
    back = (average - average.mean()) / average.std() * mean.std()
    np.testing.assert_allclose(back, mean, atol=1e-5)  # the level is that of the probabilities


def test_recipes_say_where_a_cell_starts_and_on_how_much(world):
    cells = plan("ml-1m", ["protocol"], 2, False)
    bench = replace(world.bench(), cells=cells)
    staged = bench.recipe(cell_of(bench, "protocol-gate-mf-two-stage-seed1"))
    (stage,) = staged["stages"]
    first = world.work / "cells" / "protocol-text_only-LoRA-seed1" / "checkpoint-slim"
    assert stage["init_from"] == str(first) and "lora" not in stage and staged["seed"] == 1
    assert "max_train_labels" not in stage["training"]
    text_only = world.bench(quick=True)
    recipe = text_only.recipe(cell_of(text_only, f"{TEXT}-quick"))
    assert recipe["cf_dir"] == "" and recipe["stages"][0]["preset"] == "text_only"
    assert recipe["stages"][0]["training"]["max_train_labels"] == measure.QUICK_TITLE_LABELS
    shared = cell_of(text_only, f"{TEXT}-quick").stage["training"]
    assert "max_train_labels" not in shared


def test_the_means_of_the_open_track_know_every_earlier_row(world):
    write_prepared(world.work / "data-open", rows := make_rows(900))
    interactions = world.work / "data-open" / "interactions" / "interactions.parquet"
    rows.assign(rating=rows["label"] * 1.0, split="train").to_parquet(interactions, index=False)
    bench = world.bench()
    start = measure.read_rows(world.work / "data-open", "validation")["timestamp"].min()
    train = pd.read_parquet(world.work / "data-protocol" / "data" / "train.parquet")
    assert len(bench.known_rows("protocol")) == len(train)
    assert bench.known_rows("open")["timestamp"].max() < start


def test_data_is_prepared_once_a_track_and_not_of_another_set(world, monkeypatch):
    asked = []

    def prepared(config):
        asked.append(config)
        write_prepared(measure.Path(config.out), make_rows(200))

    monkeypatch.setattr(measure, "prepare", prepared)
    bench = replace(world.bench(), work=world.work / "new", offline=True)
    for track in ("protocol", "open", "protocol", "open"):
        bench.data(track)
    protocol, opened = asked
    assert protocol.source == opened.source == "synthetic" and protocol.offline
    assert (protocol.histories, protocol.max_history) == ("likes", None)
    assert (opened.histories, opened.max_history) == ("signed", 256)
    with pytest.raises(InputError, match="holds synthetic, not ml-1m: name another work folder"):
        replace(bench, dataset="ml-1m").data("open")


def test_a_sample_is_of_few_users_and_the_same_in_any_order(monkeypatch):
    monkeypatch.setattr(measure, "SAMPLED_USERS", {"test": 12})
    monkeypatch.setattr(measure, "SAMPLED_ROWS", 5)
    rows = make_rows(600).drop_duplicates(PAIR).reset_index(drop=True)
    chosen = rows.iloc[measure.sampled_rows(rows, "test")]
    counts = chosen["user_id"].value_counts()
    assert len(counts) == 12 and counts.max() == 5
    assert chosen.index.is_monotonic_increasing
    mixed = rows.assign(label=1 - rows["label"]).sample(frac=1, random_state=0)
    mixed = mixed.reset_index(drop=True)
    again = mixed.iloc[measure.sampled_rows(mixed, "test")]
    assert set(again[PAIR].agg(" ".join, axis=1)) == set(chosen[PAIR].agg(" ".join, axis=1))


def test_rows_of_the_frozen_track_are_measured_on_its_sample(world, monkeypatch):
    write_prepared(world.work / "data-frozen", make_rows(900).drop_duplicates(PAIR))
    tables = {"frozen": {"mf_fields": measure.TABLES["protocol"]["mf"]}}
    monkeypatch.setattr(measure, "TABLES", tables)
    monkeypatch.setattr(measure, "SAMPLED_USERS", {"validation": 15, "test": 12})
    cells = [Cell("frozen", "item mean"), Cell("frozen", "CF", "mf_fields")]
    bench = replace(world.bench(), cells=cells)
    result = bench.run(cells[0])
    test = pd.read_parquet(world.work / "cells" / cells[0].name / "test.parquet")
    sample = test.iloc[measure.sampled_rows(test, "test")]
    assert result["test"]["auc"] == pytest.approx(auc(sample["label"], sample["score"]), rel=1e-5)
    assert result["test"]["users"] == 12 and result["test"]["rows"] == len(sample) < len(test)
    assert result["whole_test"]["rows"] == len(test)
    assert result["whole_test"]["auc"] == pytest.approx(auc(test["label"], test["score"]), rel=1e-5)
    mf = score_cf(world.work / "cf-frozen-mf_fields", world.work / "data-frozen", "test")
    away = result["test"]["auc"] - auc(sample["label"], mf["score"][sample.index])
    assert result["differences"]["MF + fields"]["auc"] == pytest.approx(away, abs=1e-5)


def test_a_table_is_fitted_once(world):
    folder = world.bench().cf("protocol", "mf")
    assert CFVectors.load(folder).model_name == "mf"
    file = folder / "cf_embeddings.safetensors"
    stamp = file.stat().st_mtime_ns
    assert world.bench().cf("protocol", "mf") == folder and file.stat().st_mtime_ns == stamp


def test_training_rows_see_snapshots_as_they_did_for_the_committed_figures():
    tables = measure.TABLES
    fits = [config for track in ("protocol", "open") for _, config in tables[track].values()]
    assert all(c.cross_fit == "snapshots" for c in fits if hasattr(c, "cross_fit"))
    assert tables["open"]["mf"][1] == MFConfig(
        rows="earlier",
        targets="graded",
        cross_fit="snapshots",
        snapshots=8,
        l2_factors=5.0,
        l2_user_bias=5.0,
        l2_item_bias=0.3,
    )


def test_a_split_that_was_scored_is_not_scored_again(world, monkeypatch):
    bench = world.bench()
    cell = cell_of(bench, GATE)
    first = bench.run(cell)
    stage = bench.folder(cell) / "stages" / "main" / "stage.json"
    stage.parent.mkdir(parents=True)
    stage.touch()
    monkeypatch.setattr(measure.Bench, "scores", lambda *_: pytest.fail("scored again"))
    with pytest.raises(pytest.fail.Exception):  # it was trained again since
        bench.run(cell)
    os.utime(stage, (0, 0))
    assert bench.run(cell)["test"] == first["test"]
