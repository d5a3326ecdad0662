import dataclasses
from pathlib import Path

import pytest
import yaml

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.training.recipe import Recipe, StageConfig, parse_recipe

TEXT = {"name": "text", "fusion": "text_only", "train": ["lora"]}
FUSION = {"name": "fusion", "init_from": "text"}
CONFIGS = Path(__file__).parents[2] / "examples" / "configs"


def write(folder: Path, content: dict) -> list[str]:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(content))
    return ["--config", str(file)]


@pytest.fixture
def content(settings: dict, tmp_path: Path) -> dict:
    return {**settings, "output_dir": str(tmp_path / "run"), "stages": [TEXT, FUSION]}


def test_yaml_becomes_typed_stages(content, tmp_path):
    # PyYAML reads 1e-3 (no dot) as a string; the recipe means a number.
    content["stages"][1] = {**FUSION, "fusion_learning_rate": "1e-3", "history_window": [10, 1]}
    recipe = parse_recipe(write(tmp_path, content))
    assert [stage.name for stage in recipe.stages] == ["text", "fusion"]
    assert recipe.stages[1].fusion_learning_rate == 1e-3
    assert recipe.stages[1].prompt_settings() == {"history_window": (10, 1)}
    assert recipe.stages[0].prompt_settings() == {
        "history_format": "title",
        "candidate_format": "title",
    }


def test_flags_override_the_file(content, tmp_path):
    recipe = parse_recipe([*write(tmp_path, content), "--seed", "7", "--precision", "auto"])
    assert (recipe.seed, recipe.precision) == (7, "auto")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sead": 1}, "unknown key 'sead'; known keys are backbone,"),
        ({"data_dir": "nowhere"}, "data_dir"),
        ({"cf_dir": ""}, "cf_dir"),
        ({"output_dir": ""}, "output_dir"),
        ({"score_head": "no_only"}, "score_head"),
        ({"seed": "many"}, "seed"),
        ({"stages": []}, "stages"),
        ({"stages": ["text"]}, "stage 1"),
        ({"stages": [{**TEXT, "fusion": "gates"}]}, "gates"),
        ({"stages": [{**TEXT, "epoch": 2}]}, "epoch"),
        ({"stages": [{**TEXT, "epochs": "two"}]}, "epochs"),
        ({"stages": [{**TEXT, "epochs": 0}]}, "epochs"),
        ({"stages": [{**TEXT, "labels_per_step": 1.5}]}, "labels_per_step"),
        ({"stages": [{**TEXT, "train": []}]}, "train"),
        ({"stages": [{**TEXT, "train": "lora"}]}, "train"),
        ({"stages": [{**TEXT, "train": ["fusion"]}]}, "text_only"),
        ({"stages": [{**TEXT, "name": "a/b"}]}, "name"),
        ({"stages": [TEXT, TEXT]}, "two stages"),
        ({"stages": [FUSION, TEXT]}, "init_from"),
        ({"stages": [{**TEXT, "history_window": [10]}]}, "history_window"),
        ({"stages": [{**TEXT, "history_window": [-1, 1]}]}, "history_window"),
        ({"stages": [{**TEXT, "history_window": [10, 0]}]}, "history_window"),
        ({"stages": [{**TEXT, "max_train_labels": -5}]}, "max_train_labels"),
        ({"stages": [{**TEXT, "eval_max_labels": -3}]}, "eval_max_labels"),
        ({"stages": [{**TEXT, "lora_learning_rate": -1e-3}]}, "lora_learning_rate"),
        ({"stages": [{**TEXT, "lora_learning_rate": float("nan")}]}, "lora_learning_rate"),
        ({"stages": [{**TEXT, "epochs": float("inf")}]}, "epochs"),
        ({"tokens_per_batch": 0}, "tokens_per_batch"),
        ({"stages": [{**TEXT, "scheduler": "zigzag"}]}, "zigzag"),
        ({"stages": [{**TEXT, "slot_dropout": 1}]}, "slot_dropout"),
        ({"stages": [{**TEXT, "pairwise_share": 2}]}, "pairwise_share"),
        ({"stages": [{**TEXT, "cf_target_share": -0.1}]}, "cf_target_share"),
        ({"cf_dir": "", "stages": [{**TEXT, "cf_target_share": 0.5}]}, "cf_dir"),
    ],
)
def test_bad_recipes_are_refused_in_one_sentence(content, tmp_path, change, message, capsys):
    with pytest.raises(InputError) as problem:
        parse_recipe(write(tmp_path, content | change))
    assert message in str(problem.value)
    assert "\n" not in str(problem.value)
    assert capsys.readouterr().err == ""


def test_a_setting_of_a_stage_is_no_flag(content, tmp_path):
    with pytest.raises(InputError, match=r"--epochs is a setting of a stage.*under `stages`"):
        parse_recipe([*write(tmp_path, content), "--epochs", "2"])


def test_an_unknown_flag_is_named_before_any_folder(content, tmp_path):
    argv = write(tmp_path, content | {"data_dir": "nowhere"})
    with pytest.raises(InputError, match=r"--sead is no setting .*--seed") as problem:
        parse_recipe([*argv, "--sead", "3"])
    assert "Parser" not in str(problem.value)
    with pytest.raises(InputError, match=r"two recipes are named, one of them .*\.yaml: give one"):
        parse_recipe([*argv, *argv])
    with pytest.raises(InputError, match=r"other\.yaml stands where a flag belongs"):
        parse_recipe([*argv, "other.yaml"])


def test_a_bad_flag_is_refused_in_one_sentence(content, tmp_path, capsys):
    with pytest.raises(InputError, match=r"--seed.*'abc'") as problem:
        parse_recipe([*write(tmp_path, content), "--seed", "abc"])
    assert "\n" not in str(problem.value)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("source", ["acme/films", "acme/films@v1.0", "acme/films@refs/pr/1"])
def test_a_stage_may_start_from_a_hub_repository(content, tmp_path, monkeypatch, source):
    content["stages"] = [{**FUSION, "init_from": source}]
    assert parse_recipe(write(tmp_path, content)).stages[0].init_from == source
    monkeypatch.chdir(tmp_path)
    (tmp_path / "acme").mkdir()
    with pytest.raises(InputError, match="init_from"):
        parse_recipe(write(tmp_path, content))


def test_a_missing_file_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.yaml"):
        parse_recipe(["--config", str(tmp_path / "nowhere.yaml")])


def test_a_text_only_recipe_needs_no_cf_table(content, tmp_path):
    recipe = parse_recipe(write(tmp_path, content | {"cf_dir": "", "stages": [TEXT]}))
    assert not recipe.needs_cf()


@pytest.mark.parametrize("config", [Recipe, StageConfig])
def test_every_field_has_help(config):
    assert all(field.metadata["help"] for field in dataclasses.fields(config))


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_recipes_parse_and_comment_every_key(file, settings):
    places = {key: settings[key] for key in ("data_dir", "cf_dir")}
    flags = [word for key, value in places.items() for word in (f"--{key}", value)]
    recipe = parse_recipe(["--config", str(file), *flags])
    assert recipe.stages
    entries = yaml.safe_load(file.read_text())
    commented = {
        line.split(":")[0].strip(" -")
        for line in file.read_text().splitlines()
        if "#" in line and ":" in line
    }
    keys = set(entries) - {"stages"} | {key for stage in entries["stages"] for key in stage}
    assert keys <= commented
