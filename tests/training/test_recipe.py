import dataclasses
import time
from pathlib import Path

import pytest
import yaml

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.training.arguments import CTRTrainingArguments
from ccf_llm_hf.training.recipe import Recipe, Stage, fields_of, parse_recipe

TEXT = {"name": "text", "preset": "text_only", "lora": {}}
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
    content["stages"][1] = {
        **FUSION,
        "prompt": {"history_window": [10, 1]},
        "lora": {"lora_dropout": "1e-1"},
        "training": {"learning_rate": "1e-3", "learning_rate_mapping": {"gate": "2e-4"}},
    }
    text, fusion = parse_recipe(write(tmp_path, content)).stages
    assert fusion.prompt == {"history_window": (10, 1)}
    assert fusion.lora_config().lora_dropout == 0.1
    assert fusion.lora_config().target_modules == {"q_proj", "v_proj"}
    arguments = CTRTrainingArguments(output_dir=str(tmp_path), **fusion.training)
    assert arguments.learning_rate == 1e-3
    assert arguments.learning_rate_mapping == {"gate": 2e-4}
    assert text.prompt == {"history_format": "title", "candidate_format": "title"}
    assert (text.trains(), fusion.trains()) == (["lora"], ["fusion", "lora"])


def test_a_preset_is_where_settings_start(content, tmp_path):
    prompt = {"history_format": "slot"}
    content["stages"] = [{"name": "concat", "preset": "concat", "prompt": prompt}]
    stage = parse_recipe(write(tmp_path, content)).stages[0]
    assert stage.model == {"fusion": "cf_only"}
    assert stage.prompt == {"history_format": "slot", "candidate_format": "title_slot"}
    assert stage.trains() == ["fusion"]


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
        ({"seed": "many"}, "seed"),
        ({"stages": []}, "stages"),
        ({"stages": ["text"]}, "stage 1"),
        ({"stages": [{**TEXT, "model": {"fusion": "gates"}}]}, "gates"),
        ({"stages": [{**TEXT, "model": {"fusion": "concat"}}]}, "write `preset: concat`"),
        ({"stages": [{**TEXT, "preset": "text"}]}, "preset"),
        ({"stages": [{**TEXT, "training": {"eval_strategy": "no"}}]}, "its best validation"),
        ({"stages": [{**TEXT, "training": {"learning_rate_mapping": {"(": 1}}}]}, "no regular"),
        ({"stages": [{**TEXT, "training": {"metric_for_best_model": "f1"}}]}, "none of eval_auc"),
        ({"stages": [{**TEXT, "training": {"neftune_noise_alpha": 5}}]}, "leave it out"),
        ({"stages": [{**TEXT, "training": {"label_per_step": 5}}]}, "near it are labels_per_step"),
        ({"stages": [{**TEXT, "epoch": 2}]}, "the unknown key 'epoch'"),
        (
            {"stages": [{**TEXT, "fusion": "gate"}]},
            "has no 'fusion': it belongs into the section `model`",
        ),
        ({"stages": [{**TEXT, "training": {"wording": "x"}}]}, "section `prompt`"),
        (
            {"stages": [{**TEXT, "model": {"r": 8}}]},
            "`model` has no 'r': it belongs into the section `lora`",
        ),
        ({"stages": [{**TEXT, "prompt": {"learning_rat": 8}}]}, "the unknown key 'learning_rat'"),
        (
            {"stages": [{**TEXT, "model": {"num_users": 8}}]},
            "`num_users` of `model` is decided by the run",
        ),
        ({"stages": [{**TEXT, "prompt": {"item_ids": []}}]}, "decided by the run"),
        ({"stages": [{**TEXT, "training": {"output_dir": "x"}}]}, "decided by the run"),
        ({"stages": [{**TEXT, "training": {"gradient_accumulation_steps": 4}}]}, "sampler"),
        ({"stages": [{**TEXT, "training": {"num_train_epochs": "two"}}]}, "num_train_epochs"),
        ({"stages": [{**TEXT, "training": {"num_train_epochs": 0}}]}, "num_train_epochs"),
        ({"stages": [{**TEXT, "training": {"labels_per_step": 1.5}}]}, "labels_per_step"),
        ({"stages": [{**TEXT, "training": {"labels_per_step": 0}}]}, "labels_per_step"),
        ({"stages": [{**TEXT, "training": []}]}, "`training` must be a mapping"),
        ({"stages": [{**TEXT, "lora": None}]}, "write lora: {} for its defaults"),
        ({"stages": [{**TEXT, "lora": {"use_dora": True}}]}, "use_dora"),
        ({"stages": [{**TEXT, "lora": {"r": 0}}]}, "lora: r=0 must be above 0"),
        ({"stages": [{**TEXT, "name": "a/b"}]}, "name"),
        ({"stages": [TEXT, TEXT]}, "two stages"),
        ({"stages": [FUSION, TEXT]}, "init_from"),
        ({"stages": [{**TEXT, "prompt": {"history_window": [10]}}]}, "history_window"),
        ({"stages": [{**TEXT, "prompt": {"history_window": [-1, 1]}}]}, "history_window"),
        ({"stages": [{**TEXT, "prompt": {"history_window": [10, 0]}}]}, "history_window"),
        ({"stages": [{**TEXT, "model": {"cf_fold_in": True}}]}, "needs cf_logit"),
        ({"stages": [{**TEXT, "training": {"max_train_labels": -5}}]}, "max_train_labels"),
        ({"stages": [{**TEXT, "training": {"max_eval_labels": -3}}]}, "max_eval_labels"),
        ({"stages": [{**TEXT, "training": {"learning_rate": -1e-3}}]}, "learning_rate"),
        ({"stages": [{**TEXT, "training": {"learning_rate": float("nan")}}]}, "learning_rate"),
        ({"stages": [{**TEXT, "training": {"learning_rate": 1e12}}]}, "must be from 0 to 1"),
        ({"stages": [{**TEXT, "training": {"num_train_epochs": 1e12}}]}, "at most 1000"),
        ({"stages": [{**TEXT, "training": {"data_seed": -1}}]}, "data_seed=-1 must be from 0"),
        ({"seed": -1}, "`seed` -1 must be from 0 to 4294967295"),
        (
            {
                "stages": [
                    {
                        **TEXT,
                        "training": {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 4},
                    }
                ]
            },
            "save_steps=4 must be eval_steps=2",
        ),
        (
            {"stages": [{**TEXT, "training": {"learning_rate_mapping": {"a": -1}}}]},
            "learning_rate_mapping",
        ),
        (
            {"stages": [{**TEXT, "training": {"num_train_epochs": float("inf")}}]},
            "num_train_epochs",
        ),
        ({"stages": [{**TEXT, "training": {"tokens_per_batch": 0}}]}, "tokens_per_batch"),
        ({"stages": [{**TEXT, "training": {"lr_scheduler_type": "zigzag"}}]}, "zigzag"),
        ({"stages": [{**TEXT, "training": {"cf_distillation": -0.1}}]}, "cf_distillation"),
        ({"cf_dir": "", "stages": [{**TEXT, "training": {"cf_distillation": 0.5}}]}, "cf_dir"),
    ],
)
def test_bad_recipes_are_refused_in_one_sentence(content, tmp_path, change, message, capsys):
    with pytest.raises(InputError) as problem:
        parse_recipe(write(tmp_path, content | change))
    assert message in str(problem.value)
    assert "\n" not in str(problem.value)
    assert capsys.readouterr().err == ""


def test_a_setting_of_a_stage_is_no_flag(content, tmp_path):
    with pytest.raises(
        InputError, match=r"--learning_rate is a setting of a stage.*under `stages`"
    ):
        parse_recipe([*write(tmp_path, content), "--learning_rate", "2"])


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


@pytest.mark.parametrize("config", [Recipe, Stage, CTRTrainingArguments])
def test_every_field_has_help(config):
    own = config.__annotations__
    fields = [field for field in dataclasses.fields(config) if field.name in own]
    assert all(field.metadata["help"] for field in fields)


def test_a_name_means_one_section():
    """Sections must not share names, or a misplaced key would be sent to the wrong one."""
    names = [set(fields_of(section)) for section in ("model", "prompt", "training")]
    assert not set.intersection(names[0], names[1]) | set.intersection(names[0], names[2])
    assert not set.intersection(names[1], names[2])


@pytest.mark.parametrize("file", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.name)
def test_shipped_recipes_parse_and_comment_every_key(file, settings):
    places = {key: settings[key] for key in ("data_dir", "cf_dir")}
    flags = [word for key, value in places.items() for word in (f"--{key}", value)]
    recipe = parse_recipe(["--config", str(file), *flags])
    assert recipe.stages
    for line in file.read_text().splitlines():
        if ":" in line.split("#")[0] and line != "stages:":
            assert "#" in line, line


LAUGHS = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12))
MERGED = "\n".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}" for n in range(1, 9))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"a0: &a0 [x]\n{LAUGHS}\nenv: *a11", "aliases .* stand for more than 10,000 values"),
        (f"a0: &a0 {{x: 1}}\n{MERGED}", "aliases .* stand for more than 10,000 values"),
        ("stages: &a [*a]", "aliases .* stand for more than 10,000 values"),
        ("stages: " + "[" * 2000, "maximum recursion depth"),
        ("- a list", "must contain a YAML mapping"),
        ("", "must contain a YAML mapping"),
        ("1: 2", "its key '1' is no name"),
        ("a: \udcff", "can't decode byte 0xff"),
        ("a: [", "while parsing"),
    ],
)
def test_a_file_that_is_no_recipe_is_named_at_once(tmp_path, text, message):
    file = tmp_path / "recipe.yaml"
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    started = time.process_time()
    with pytest.raises(InputError, match=rf"recipe {file} cannot be read: .*{message}") as problem:
        parse_recipe(["--config", str(file)])
    assert time.process_time() - started < 5 and "\n" not in str(problem.value)


def test_aliases_that_spare_a_line_are_read(content, tmp_path):
    file = tmp_path / "recipe.yaml"
    stages = "- &first {name: a, preset: text_only, lora: {}}\n- {<<: *first, name: b}"
    del content["stages"]
    file.write_text(f"{yaml.safe_dump(content)}stages:\n{stages}\n")
    assert [stage.name for stage in parse_recipe(["--config", str(file)]).stages] == ["a", "b"]
