"""`ccf-llm doctor`: what is examined, what is said of it, and the exit code."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from films import build_checkpoint, film_table

from ccf_llm_hf.cli import doctor
from ccf_llm_hf.cli.main import main
from ccf_llm_hf.data.prepare import PrepareConfig, prepare


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_folder, backbone_folder) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    return build_checkpoint(folder, tokenizer_folder, backbone_folder("llama"), text_only=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    rows = [
        f"{'ab'[n % 2]},{n % 6 + 1},Film {n % 6 + 1},{(7 * n) % 5 + 1},{1_600_000_000 + n}"
        for n in range(60)
    ]
    (folder / "ratings.csv").write_text(
        "\n".join(["user_id,item_id,title,rating,timestamp", *rows]) + "\n"
    )
    config = PrepareConfig(
        source="table",
        out=str(folder / "data"),
        interactions=str(folder / "ratings.csv"),
        rating_column="rating",
        ratios=[0.5, 0.25, 0.25],
    )
    return prepare(config, summary=False)


@pytest.fixture
def recipe(tmp_path, data, backbone_folder) -> Path:
    stage = {
        "name": "main",
        "preset": "text_only",
        "lora": {},
        "training": {"labels_per_step": 8, "tokens_per_batch": 256},
    }
    settings = {
        "data_dir": str(data),
        "output_dir": str(tmp_path / "run"),
        "backbone": str(backbone_folder("llama")),
        "stages": [stage],
    }
    file = tmp_path / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def asked(capsys, *argv: str) -> tuple[int, dict]:
    code = main(["doctor", *argv, "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_the_environment_alone(capsys):
    code, report = asked(capsys)
    assert code == 0 and report["to_mend"] == []
    torch = next(one for one in report["environment"]["packages"] if one["name"] == "torch")
    assert torch["fits"] and torch["wanted"].startswith(">=")
    assert report["environment"]["free_memory_gb"] > 0
    assert main(["doctor"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("nothing to mend")


def test_versions_outside_their_range_and_full_disks_are_to_be_mended(monkeypatch, capsys):
    version = doctor.importlib.metadata.version
    monkeypatch.setattr(
        doctor.importlib.metadata,
        "version",
        lambda name: "4.1" if name == "transformers" else version(name),
    )
    usage = shutil.disk_usage(".")._replace(free=10**8)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    code, report = asked(capsys)
    assert code == 2
    old, *disks = report["to_mend"]
    assert old.startswith("transformers is 4.1, and ") and "pip install 'transformers" in old
    assert all("has 0.1 GB left: make room" in sentence for sentence in disks) and len(disks) == 2


def test_a_checkpoint_that_loads(capsys, checkpoint):
    code, report = asked(capsys, str(checkpoint))
    found = report["checkpoint"]
    assert code == 0 and found["loads"]
    assert found["items"] == len(film_table().item_ids) >= found["items_known_to_cf"] > 0
    assert "config.json" in found["files"] and found["largest_difference"] is None


def test_a_damaged_checkpoint_is_told_with_its_files(capsys, checkpoint, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(checkpoint, folder)
    (folder / "item_catalog.jsonl").unlink()
    code, report = asked(capsys, str(folder))
    assert code == 2 and not report["checkpoint"]["loads"]
    assert "item_catalog.jsonl" in report["to_mend"][0]
    assert "config.json" in report["checkpoint"]["files"]


def test_recorded_calls_are_scored_again(capsys, checkpoint, tmp_path):
    folder = tmp_path / "other"
    shutil.copytree(checkpoint, folder)
    call = {"inputs": {"history": ["1"], "candidates": ["2"]}, "logits": [[123.0]]}
    (folder / "example.json").write_text(json.dumps({"calls": [call]}))
    code, report = asked(capsys, str(folder))
    assert code == 2 and "example.json records [[123.0]]" in report["to_mend"][0]


def test_data_and_the_cf_vectors_that_shall_know_it(capsys, data, tmp_path):
    code, report = asked(capsys, str(data))
    assert code == 0
    rows = [report["data"][name]["rows"] for name in doctor.SPLITS]
    assert sum(rows) == 60 and report["data"]["items"] == 6
    film_table().save(tmp_path / "cf")
    code, report = asked(capsys, str(data), "--cf", str(tmp_path / "cf"))
    assert report["data"]["cf"] == {"users_known": 1.0, "items_known": 1.0}
    stranger = film_table()
    stranger.user_ids = [f"someone {row}" for row in range(len(stranger.user_ids))]
    stranger.save(tmp_path / "others")
    code, report = asked(capsys, str(data), "--cf", str(tmp_path / "others"))
    assert code == 2 and "know the users of 0% of the training rows" in report["to_mend"][0]


def test_a_recipe_before_it_runs(capsys, recipe):
    code, report = asked(capsys, str(recipe))
    (stage,) = report["recipe"]["stages"]
    assert code == 0 and report["recipe"]["minutes"] == stage["minutes"] > 0
    assert stage["longest_prompt"] <= stage["positions"] == 256
    assert not (recipe.parent / "run").exists(), "nothing is written"
    assert main(["doctor", str(recipe)]) == 0
    assert "tokens a label, longest prompt" in capsys.readouterr().out


def test_what_to_change_in_a_recipe(recipe, monkeypatch):
    from ccf_llm_hf.training.estimate import StageEstimate
    from ccf_llm_hf.training.recipe import parse_recipe

    read = parse_recipe(["--config", str(recipe), "--precision", "bf16"])
    long = StageEstimate("main", 6000, 10, 9.0, 100, 256, 6000.0, 0.0, 0.0, 3.0)
    monkeypatch.setattr("ccf_llm_hf.training.stage.uses_bf16", lambda precision: False)
    memory, minutes, precision = doctor.judge_recipe(read, [long], 0.1)
    assert "leaves 0.1 GB free: lower `tokens_per_batch`" in memory
    assert "takes 100.0 hours: try `max_train_labels: 60` first" in minutes
    assert "write auto" in precision
    short = StageEstimate("main", 6000, 10, 9.0, 100, 256, 60.0, 0.0, 0.0, 3.0)
    assert doctor.judge_recipe(parse_recipe(["--config", str(recipe)]), [short], 3.0) == []


def test_what_is_nothing_is_refused(capsys, tmp_path):
    (tmp_path / "notes.txt").write_text("")
    for target in (tmp_path / "notes.txt", tmp_path / "missing"):
        assert main(["doctor", str(target)]) == 2
        assert capsys.readouterr().err.startswith("error: ")
