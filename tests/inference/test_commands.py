"""The commands that need a model: `ccf-llm rank`, `explain` and `evaluate`."""

import json
import shutil

import numpy as np
import pandas as pd
import pytest

from ccf_llm_hf.cli import main as cli
from ccf_llm_hf.data import load_prepared
from ccf_llm_hf.data.history import stored_history
from ccf_llm_hf.evaluation import auc


def test_rank_and_explain_print_text_and_json(capsys, checkpoint):
    argv = ["rank", str(checkpoint), "--history", "Toy Story (1995)", "--top-k", "2"]
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert len(out.strip().splitlines()) == 3
    assert cli.main([*argv, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [item["title"] in out for item in document["items"]] == [True, True]
    argv = ["explain", str(checkpoint), "--history", "1", "--item", "Heat (1995)", "--json"]
    assert cli.main(argv) == 0
    explained = json.loads(capsys.readouterr().out)
    assert explained["item_id"] == "3"
    assert explained["lines"][0]["title"] == "Toy Story (1995)"


def test_rank_needs_to_know_nothing_and_takes_a_limit(capsys, checkpoint):
    assert cli.main(["rank", str(checkpoint), "--json"]) == 0
    read = capsys.readouterr()
    assert len(json.loads(read.out)["items"]) == 6 and "note:" not in read.err
    assert cli.main(["rank", str(checkpoint), "--max-per-topic", "0"]) == 2
    assert "max_per_topic=0" in capsys.readouterr().err
    assert cli.main(["rank", str(checkpoint), "--max-per-topic", "2"]) == 2
    assert "evidence_fields" in capsys.readouterr().err


def test_a_new_item_is_given_with_its_fields(capsys, checkpoint):
    new = json.dumps({"title": "Up", "studio": " PIXAR"})
    argv = [str(checkpoint), "--history", "1", new, "--json"]
    assert cli.main(["rank", *argv, "--candidates", "2", new, "Up", "{up}"]) == 0
    document = json.loads(capsys.readouterr().out)
    known = [(item["title"], item["known"]) for item in document["items"]]
    assert sorted(known) == [("Jumanji (1995)", True), ("Up", False), ("Up", True), ("{up}", False)]
    assert document["history"] == ["1", json.loads(new)]
    assert cli.main(["explain", *argv, "--item", new]) == 0
    explained = json.loads(capsys.readouterr().out)
    assert explained["title"] == "Up" and explained["known"]
    assert "Up" in {line["title"] for line in explained["lines"]}


def test_rank_takes_a_stored_users_history(capsys, checkpoint, prepared):
    argv = ["rank", str(checkpoint), "--user", "a", "--data", str(prepared), "--json"]
    assert cli.main([*argv, "--candidates", "1", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["history"] == stored_history(prepared, "a")
    assert len(document["history"]) > 2


def test_a_user_without_history_is_pointed_out(capsys, checkpoint, prepared):
    argv = ["rank", str(checkpoint), "--user", "a", "--candidates", "1", "2"]
    assert cli.main(argv) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "no history of user a" in notes[0] and "--data" in notes[0]
    for known in (["--data", str(prepared)], ["--history", "1"]):
        assert cli.main([*argv, *known]) == 0
        assert "note: " not in capsys.readouterr().err


def test_explain_shows_a_temperature_that_is_not_one(capsys, checkpoint, tmp_path):
    argv = ["--history", "1", "--item", "3"]
    assert cli.main(["explain", str(checkpoint), *argv]) == 0
    assert "temperature" not in capsys.readouterr().out
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"logit_temperature": 2.5}))
    assert cli.main(["explain", str(folder), *argv]) == 0
    assert "temperature 2.5" in capsys.readouterr().out
    assert cli.main(["explain", str(folder), *argv, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["temperature"] == 2.5
    assert found["probability"] == pytest.approx(1 / (1 + np.exp(-found["logit"] / 2.5)))


def test_evaluate_writes_scores_report_plot_and_card(
    capsys, checkpoint, prepared, film_folder, tmp_path
):
    folder = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    out = tmp_path / "scores.parquet"
    argv = ["evaluate", str(folder), "--data", str(prepared), "--out", str(out)]
    argv += ["--compare", f"MF={film_folder}", "--average", "MF,CCF-LLM"]
    argv += ["--metrics-out", str(tmp_path / "metrics.json"), "--plot", str(tmp_path / "plot.png")]
    assert cli.main([*argv, "--card", str(folder)]) == 0
    table = capsys.readouterr().out
    assert "MF & CCF-LLM" in table
    assert "item + user mean" in table

    scores = pd.read_parquet(out)
    split = load_prepared(prepared).splits["test"]
    assert list(scores) == ["user_id", "item_id", "label", "score", "prob"]
    assert scores["item_id"].tolist() == list(split["item_id"])
    np.testing.assert_allclose(scores["prob"], 1 / (1 + np.exp(-scores["score"])), atol=1e-6)
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["methods"]["CCF-LLM"]["auc"] == pytest.approx(
        auc(scores["label"], scores["score"])
    )
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"| CCF-LLM | {report['methods']['CCF-LLM']['auc']:.4f} (" in card
    assert not list(tmp_path.glob("*.partial"))


def test_scores_can_be_compared_with_later(capsys, checkpoint, prepared, tmp_path):
    first = tmp_path / "first.parquet"
    argv = ["evaluate", str(checkpoint), "--data", str(prepared), "--split", "validation"]
    assert cli.main([*argv, "--out", str(first)]) == 0
    capsys.readouterr()
    again = [*argv, "--out", str(tmp_path / "second.parquet"), "--compare", f"first={first}"]
    assert cli.main([*again, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["split"] == "validation"
    assert report["differences"]["first"]["auc"] == 0.0
