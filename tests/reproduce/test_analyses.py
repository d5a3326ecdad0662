"""The analyses of a tiny finished table, their files, and sentences that follow the figures."""

import json

import numpy as np
import pandas as pd
import pytest

from ccf_llm_hf.cf.fit import score_cf
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation import auc
from ccf_llm_hf.reproduce import analyses
from ccf_llm_hf.reproduce.analyses_text import _moved, analyses_markdown
from ccf_llm_hf.reproduce.cf_control import blanked_cf, new_user_cf

TEXT_ONLY = "text_only (LoRA)"
METHODS = ["MF", "gate (joint)", TEXT_ONLY]
PLOTS = ("cold_start", "new_user", "gate", "reliability")


@pytest.fixture(scope="module")
def content(world):
    only = ["CF-mf", "text_only-LoRA", "gate-mf-joint"]
    world.reproduce(budget="quick", tracks=["protocol"], only=only, analyses=True)
    return json.loads((world.results / "analyses.json").read_text())


def test_files_and_methods(content, world):
    for name in PLOTS:
        assert (world.results / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert list(content["slices"]) == list(content["calibration"]) == METHODS
    assert list(content["gate"]) == ["gate (joint)"]
    assert "heat_map" not in content["gate"]["gate (joint)"]
    assert content["max_rows"] == 60
    assert {entry["method"] for entry in content["blanked"]} == set(METHODS)
    # Paired across methods: the same rows, and the same ids blanked.
    assert len({entry["rows"] for entry in content["blanked"]}) == 1
    drawn = {
        (e["side"], e["share"], e["blanked_items"], e["blanked_users"], e["blanked_rows"])
        for e in content["blanked"]
        if e["method"] != TEXT_ONLY
    }
    assert len(drawn) == 15
    # A model without a CF table has nothing to blank.
    assert not any(e["blanked_rows"] for e in content["blanked"] if e["method"] == TEXT_ONLY)


def test_text_alone_loses_nothing_with_its_vectors(content):
    for entry in content["blanked"]:
        if entry["method"] == TEXT_ONLY:
            assert entry["auc_change"] == 0 and entry["uauc_change_ci"] == [0, 0]


@pytest.mark.usefixtures("content")
def test_analyses_are_kept_until_the_cell_is_computed_again(world, monkeypatch):
    computed = []
    real = analyses._cold_start

    def counted(subject, *rest):
        computed.append(subject.name)
        return real(subject, *rest)

    monkeypatch.setattr(analyses, "_cold_start", counted)
    only = {"tracks": ["protocol"], "only": ["CF-mf", "text_only-LoRA", "gate-mf-joint"]}
    world.reproduce(analyses=True, **only)
    assert computed == []
    (world.results / "cells" / "protocol-CF-mf.json").unlink()
    world.reproduce(analyses=True, **only)
    assert computed == ["MF"]


@pytest.mark.usefixtures("content")
def test_the_scores_of_mf_are_computed_again_where_the_work_folder_lacks_them(world):
    before = json.loads((world.results / "analyses.json").read_text())
    for split in ("validation", "test"):
        (world.work / "cells" / "protocol-CF-mf" / f"{split}.parquet").unlink()
    only = ["CF-mf", "text_only-LoRA", "gate-mf-joint"]
    world.reproduce(tracks=["protocol"], only=only, analyses=True)
    assert json.loads((world.results / "analyses.json").read_text()) == before


@pytest.mark.usefixtures("content")
def test_analyses_of_checkpoints_that_are_not_here_are_not_lost(world):
    before = (world.results / "analyses.json").read_bytes()
    with pytest.raises(InputError, match=r"analyses of text_only \(LoRA\), not finished"):
        world.reproduce(budget="quick", only=["gate-mf-joint"], analyses=True)
    assert (world.results / "analyses.json").read_bytes() == before


def test_nothing_finished_is_an_input_error(world):
    with pytest.raises(InputError, match="--analyses found no finished cell"):
        world.reproduce(tracks=["open"], only=["item_mean"], analyses=True)


@pytest.mark.usefixtures("content")
def test_the_cf_control_is_the_table_without_the_drawn_rows(world):
    cf, data = world.work / "cf-protocol-mf", world.work / "data-protocol"
    entries = blanked_cf("MF", cf, data, shares=(0.0, 1.0), resamples=20)
    whole = score_cf(cf, data, "test")
    by = {(entry["side"], entry["share"]): entry for entry in entries}
    assert by["item", 0.0]["auc"] == pytest.approx(auc(whole["label"], whole["score"]))
    rows = pd.read_parquet(data / "data" / "test.parquet")
    table = CFVectors.load(cf)
    nobody = table.logits(["nobody"] * len(rows), rows["item_id"].to_numpy()).numpy()
    assert by["user", 1.0]["auc"] == pytest.approx(auc(rows["label"], nobody))
    assert by["both", 1.0]["auc"] == 0.5
    assert by["user", 1.0]["blanked_items"] == 0
    first, second = new_user_cf("MF", cf, data, likes=(0, 1), resamples=20)
    assert first["auc"] == second["auc"] and second["auc_change_ci"] == [0, 0]
    assert first["rows"] == sum(len(past) >= 1 for past in rows["history"])


def entry(change, low, high):
    values = {"value": 0.7, "change": change, "change_ci": [low, high]}
    return {("auc" if key == "value" else f"auc_{key}"): value for key, value in values.items()} | {
        "uauc": None,
        "uauc_change": None,
        "uauc_change_ci": [None, None],
    }


@pytest.mark.parametrize(
    ("change", "low", "high", "said"),
    [
        (-0.05, -0.08, -0.02, "falls in AUC from 0.7500 to 0.7000 (-0.0500 [-0.0800, -0.0200])"),
        (-0.05, -0.08, 0.01, "does not clearly move in AUC from 0.7500 to 0.7000"),
        (0.05, 0.01, 0.08, "rises in AUC from 0.6500"),
        (0.0, 0, 0, "stays at AUC 0.7000"),
    ],
)
def test_a_sentence_says_no_more_than_its_interval(change, low, high, said):
    sentence = _moved(entry(change, low, high))
    assert said in sentence
    assert sentence.endswith("has no defined UAUC")


def test_the_text_follows_the_figures(content, world):
    text = (world.results / "analyses.md").read_text()
    assert text == analyses_markdown(content)
    assert f"gate (joint): {content['gate']['gate (joint)']['verdict']}." in text
    assert "text_only (LoRA) stays at AUC" in text
    changed = json.loads(json.dumps(content))
    measured = changed["calibration"]["MF"]["measured"]
    measured["none"]["ece"], measured["temperature"]["ece"] = 0.2, 0.01
    measured["temperature"]["calibrated_ece"] = {"mean": 0.02, "ci": [0.005, 0.035]}
    changed["gate"] = {}
    text = analyses_markdown(changed, "../results/")
    assert "MF: ECE on test falls from 0.200 to 0.010" in text and "within the target" in text
    assert "; no more than perfectly calibrated probabilities would show" in text
    assert "on as many independent rows (0.020 [0.005, 0.035]). On validation" in text
    assert "None of the analyzed methods has a gate." in text and "gate.png" not in text
    assert "](../results/reliability.png)" in text
    measured["temperature"]["ece"] = 0.3
    text = analyses_markdown(changed)
    assert "rises from 0.200 to 0.300" in text and "above the target" in text
    assert "; more than perfectly calibrated" in text
    assert np.isfinite([e["auc"] for e in content["blanked"]]).all()
