import json
import socket

import pytest
import yaml
from huggingface_hub import ModelCard

from ccf_llm_hf import CCFLLMConfig
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.model_card import describe_run, write_model_card

MEASURES = {
    "auc": 0.7412345,
    "auc_ci": [0.72, 0.76],
    "uauc": 0.69,
    "uauc_ci": [0.66, 0.72],
    "wuauc": 0.7,
    "logloss": 0.6,
    "ece": None,
    "rows": 7331,
    "users": 320,
    "uauc_users": 224,
}
DIFFERENCE = {"auc": 0.01, "auc_ci": [-0.002, 0.02], "uauc": -0.01, "uauc_ci": [-0.03, 0.01]}
REPORT = {
    "split": "test",
    "name": "CCF-LLM",
    "rows": 7331,
    "users": 320,
    "positive_rate": 0.5454,
    "methods": {"CCF-LLM": MEASURES, "item + user mean": {**MEASURES, "auc": 0.733}},
    "slices": {
        "cold_user": {
            "definition": "user does not occur in train",
            "rows": 3108,
            "users": 140,
            "methods": {"CCF-LLM": MEASURES},
        },
        "cold_item": {"definition": "item not in train", "rows": 0, "users": 0, "methods": {}},
    },
    "differences": {"item + user mean": DIFFERENCE},
    "intervals": {"level": 0.95, "unit": "user", "resamples": 1000, "seed": 0},
    "definitions": {"auc": "area under the ROC curve"},
}
SPLIT = {"rows": 33891, "users": 740, "items": 3000, "positive_rate": 0.5368}
PROTOCOL = {
    "format": "ccf-llm-prepared-1",
    "name": "ml-1m",
    "source": "MovieLens-1M, GroupLens Research",
    "license": "research use only",
    "label_rule": "1 if rating >= 4, else 0",
    "split_rule": "by month",
    "splits": {"train": SPLIT},
}


@pytest.fixture
def config():
    return CCFLLMConfig(
        backbone_name="smollm2-135m-instruct",
        cf_model="mf",
        num_users=740,
        num_items=3706,
        lora={"r": 8, "lora_alpha": 16, "target_modules": ["v_proj", "q_proj"]},
        checkpoint_form="slim",
    )


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the card looked something up on the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


def write(folder, config, **facts):
    return write_model_card(folder, config=config, **facts).read_text(encoding="utf-8")


def test_metadata_loads_and_carries_the_results(tmp_path, config):
    write(tmp_path, config, metrics=REPORT, data_protocol=PROTOCOL)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == "transformers"
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data.license == "apache-2.0"
    assert "ccf-llm" in data.tags
    found = {result.metric_type: result for result in data.eval_results}
    assert set(found) == {"auc", "uauc", "wuauc", "logloss"}  # ece is undefined
    assert found["auc"].metric_value == 0.7412
    assert (found["auc"].dataset_name, found["auc"].dataset_split) == ("ml-1m", "test")


def test_body_shows_results_controls_recipe_and_limits(tmp_path, config):
    card = write(
        tmp_path,
        config,
        metrics=REPORT,
        recipe={"seed": 3, "stages": [{"name": "text"}]},
        data_protocol=PROTOCOL,
    )
    for text in (
        "| CCF-LLM | 0.7412 (0.720 to 0.760) | 0.6900 (0.660 to 0.720) | 0.7000 | 0.6000 | - |",
        "| item + user mean | 0.7330",
        "| item + user mean | +0.0100 (-0.002 to +0.020) | -0.0100 (-0.030 to +0.010) |",
        "**cold_user**: user does not occur in train (3,108 rows, 140 users)",
        "| train | 33,891 | 740 | 3,000 | 0.5368 |",
        "seed: 3\nstages:\n- name: text",
        "trust_remote_code=True",
        'history=["Toy Story (1995)"',
        "Popularity bias",
        "may not be redistributed",
        "rank 8, alpha 16, on q_proj, v_proj",
        "740 users, 3,706 items",
        "arxiv.org/abs/2408.08564",
        "doi       = {10.1145/3627673.3679596}",
    ):
        assert text in card
    assert "{{" not in card
    assert "{%" not in card


def test_paths_of_the_authors_machine_stay_out(tmp_path):
    local = CCFLLMConfig(backbone_name=str(tmp_path / "my-lm"), logit_temperature=1.25)
    recipe = {"data_dir": str(tmp_path / "ml1m"), "stages": [{"init_from": str(tmp_path / "s")}]}
    card = write(tmp_path, local, recipe=recipe)
    assert str(tmp_path) not in card
    assert "| Backbone | my-lm |" in card
    assert "data_dir: ml1m\nstages:\n- init_from: s" in card
    assert "sigmoid(logit / 1.25)" in card


def test_card_of_an_unevaluated_model_says_so(tmp_path, config):
    card = write(tmp_path, config)
    assert "has not been evaluated" in card
    assert "recipe was not recorded" in card
    assert "MovieLens" not in card
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None


@pytest.mark.parametrize("fusion", ["gate", "scalar_gate", "sum", "concat", "cf_only", "text_only"])
def test_every_fusion_arm_has_a_card(tmp_path, fusion):
    card = write(tmp_path, CCFLLMConfig(fusion=fusion))
    assert f"| Fusion | `{fusion}` |" in card
    assert "| LoRA | none |" in card


def test_license_and_base_model_are_claimed_only_where_known(tmp_path):
    (tmp_path / "local").mkdir()
    write(tmp_path, CCFLLMConfig(backbone_name=str(tmp_path / "local")))
    header = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert "base_model" not in header
    assert "license" not in header
    write(tmp_path, CCFLLMConfig(backbone_name="Qwen/Qwen2-1.5B"))
    header = yaml.safe_load((tmp_path / "README.md").read_text().split("---")[1])
    assert header["base_model"] == "Qwen/Qwen2-1.5B"
    assert "license" not in header


def test_describe_run_finds_recipe_and_protocol(tmp_path, config):
    config.save_pretrained(tmp_path / "demo" / "checkpoint-slim")
    (tmp_path / "demo" / "training.json").write_text(json.dumps({"recipe": {"seed": 5}}))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "protocol.json").write_text(json.dumps(PROTOCOL))
    card = describe_run(tmp_path / "demo" / "checkpoint-slim", tmp_path / "data").read_text()
    assert "# demo\n" in card
    assert "seed: 5" in card
    assert "by month" in card
    with pytest.raises(InputError, match=r"no config\.json"):
        describe_run(tmp_path / "data", tmp_path / "data")


def test_a_missing_folder_is_an_input_error(tmp_path, config):
    with pytest.raises(InputError, match="is not a folder"):
        write_model_card(tmp_path / "nowhere", config=config)
