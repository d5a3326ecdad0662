"""The whole path on the real ratings of MovieLens latest-small, with a tiny random backbone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from ccf_llm_hf.cli.main import main
from ccf_llm_hf.data import load_prepared
from ccf_llm_hf.training.run import run_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("latest")
    assert main(["prepare", "ml-latest-small", "--out", str(folder / "data")]) == 0
    return folder


def test_prepared_ratings(folder: Path) -> None:
    data = load_prepared(folder / "data")
    splits = data.protocol["splits"]
    rows = [split["rows"] for split in splits.values()]
    # The edition of 2016 from the wheel, or one of 2018 or later from GroupLens.
    assert sum(rows) == data.protocol["accepted_rows"] >= 100_004
    assert rows[0] / sum(rows) == pytest.approx(0.8, abs=0.002)
    assert rows[1] / sum(rows) == pytest.approx(0.1, abs=0.002)
    assert splits["train"]["last_timestamp"] < splits["validation"]["first_timestamp"]
    assert splits["validation"]["last_timestamp"] < splits["test"]["first_timestamp"]
    items = data.items.to_pandas().set_index("item_id")
    assert items.loc["1", "title"] == "Toy Story (1995)" and items.loc["1", "year"] == 1995
    genres = ["Adventure", "Animation", "Children", "Comedy", "Fantasy"]
    assert items.loc["1", "genres"].tolist() == genres
    assert items.loc["11", "title"] == "American President, The (1995)"
    assert (items["title"] == "Hamlet (2000)").sum() == 2
    assert "(no genres listed)" not in set(items["genres"].explode())
    assert not (items["title"] == "").any()
    rejected = data.protocol["rejected"]
    assert set(rejected) <= {"missing_title"}
    assert data.protocol["redistributable"] is False


def test_fit_and_a_few_steps_of_training(
    folder: Path, backbone_folder: Callable, capsys: pytest.CaptureFixture[str]
) -> None:
    strengths = ["--l2-factors", "7", "--l2-user-bias", "1", "--l2-item-bias", "2"]
    command = ["fit-cf", "mf", "--data", str(folder / "data"), "--out", str(folder / "cf")]
    assert (
        main([*command, *strengths, "--cross-fit", "snapshots", "--snapshots", "4", "--json"]) == 0
    )
    fitted = json.loads(capsys.readouterr().out)
    assert 0.6 < float(fitted["validation_auc"]) < 0.9
    assert 0.55 < float(fitted["validation_uauc"]) < 0.9
    stage = {
        "name": "fusion",
        "prompt": {"candidate_format": "title_slot", "history_window": [20, 16]},
        "training": {"labels_per_step": 32, "max_train_labels": 96, "max_eval_labels": 60},
    }
    recipe = {
        "data_dir": str(folder / "data"),
        "cf_dir": str(folder / "cf"),
        "output_dir": str(folder / "run"),
        "backbone": str(backbone_folder("llama")),
        "stages": [stage],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_recipe(["--config", str(folder / "recipe.yaml")])
    report = json.loads((folder / "run" / "training.json").read_text())
    assert 0 < report["validation"]["auc"] < 1
    assert (folder / "run" / "checkpoint-slim" / "config.json").is_file()
