"""Training that starts from a checkpoint of another catalog, from YAML."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.data.prepare import PrepareConfig, prepare
from ccf_llm_hf.data.prepared import load_prepared
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor
from ccf_llm_hf.training.recipe import Recipe
from ccf_llm_hf.training.run import run_recipe
from ccf_llm_hf.training.stage import RunInputs, StageRun

NUM_USERS, NUM_ITEMS = 8, 10


@pytest.fixture
def source(stage_run: Any, tmp_path: Path) -> Path:
    """A slim checkpoint of the films that the other tests train on, as if trained."""
    run = stage_run(lora={}, model={"cf_logit": True})
    processor = run.build_processor()
    model = run.build_trainer().model
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for _, weight in model.lora_parameters() + model.fusion_parameters():
            weight.copy_(0.1 * torch.randn(weight.shape, generator=generator))
        model.cf_logit_scale.fill_(0.7)
    model.save_pretrained(tmp_path / "source", form="slim")
    processor.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another catalog of other users; one title, `Film number 3`, is in both."""
    folder = tmp_path_factory.mktemp("books")
    draw = np.random.default_rng(3)
    titles = ["Film number 3", *(f"Book {item}" for item in range(1, NUM_ITEMS))]
    rows = [
        (f"r{user}", f"b{item}", titles[item], int(draw.random() > 0.5))
        for user in range(NUM_USERS)
        for item in draw.permutation(NUM_ITEMS)
    ]
    table = pd.DataFrame(rows, columns=["user_id", "item_id", "title", "label"])
    table["timestamp"] = 1_600_000_000 + draw.integers(0, 1_000_000, len(table))
    table.to_csv(folder / "rows.csv", index=False)
    config = PrepareConfig(
        source="table",
        interactions=str(folder / "rows.csv"),
        label_column="label",
        ratios=[0.6, 0.2, 0.2],
        out=str(folder / "prepared"),
    )
    return prepare(config, summary=False)


def table_of(books: Path, dim: int, folder: Path) -> Path:
    data, draw = load_prepared(books), np.random.default_rng(4)
    titles = dict(zip(data.items["item_id"], data.items["title"], strict=True))
    users = {f"r{user}": draw.normal(size=dim) for user in range(NUM_USERS)}
    items = {item: draw.normal(size=dim) for item in list(titles)[:-1]}  # the last one is cold
    CFVectors.from_tables(users, items, titles, fitted_before=500_000).save(folder)
    return folder


def stage_of(settings: dict[str, Any], books: Path, cf: Path, source: Path) -> StageRun:
    recipe = Recipe(
        **settings | {"data_dir": str(books), "cf_dir": str(cf)},
        output_dir="unused",
        stages=[  # type: ignore[list-item]
            {"name": "fusion", "model": {"cf_logit": True}, "init_from": str(source)}
        ],
    )
    return StageRun(recipe, recipe.stages[0], RunInputs.load(recipe), cf, source)


@pytest.mark.parametrize("dim", [4, 6])
def test_gate_cold_vectors_and_lora_carry_over(
    settings: dict[str, Any],
    books: Path,
    source: Path,
    tmp_path: Path,
    dim: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = stage_of(settings, books, table_of(books, dim, tmp_path / "cf"), source)
    processor = run.build_processor()
    model = run.build_model(processor)
    old = CCFLLMForCTR.from_pretrained(source)
    found, expected = dict(model.fusion_parameters()), dict(old.fusion_parameters())
    for name, value in expected.items():
        if "_alignment." not in name or dim == 4:
            assert torch.equal(found[name], value), name
    assert model.cf_logit_scale.item() == pytest.approx(0.7)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():  # LoRA is injected here and merged there
        torch.testing.assert_close(
            model.language_model(ids).last_hidden_state,
            old.language_model(ids).last_hidden_state,
        )
    fresh = "alignment networks start afresh" in caplog.text
    assert fresh == (dim == 6)
    assert model.model.item_alignment.up.weight.shape[1] == dim
    assert processor.item_ids == list(load_prepared(books).items["item_id"])


@pytest.mark.parametrize("dim", [4, 6])
def test_a_recipe_trains_on_from_a_checkpoint_of_another_catalog(
    settings: dict[str, Any], books: Path, source: Path, tmp_path: Path, dim: int
) -> None:
    recipe = {
        **settings,
        "data_dir": str(books),
        "cf_dir": str(table_of(books, dim, tmp_path / "cf")),
        "output_dir": str(tmp_path / "run"),
        "stages": [
            {
                "name": "books",
                "init_from": str(source),
                "model": {"cf_logit": True},
                "lora": {},
                "training": {"labels_per_step": 16},
            }
        ],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    result = run_recipe(["--config", str(tmp_path / "recipe.yaml")])
    assert 0 <= result["validation"]["auc"] <= 1
    for form in ("checkpoint", "checkpoint_slim"):
        processor = CCFLLMProcessor.from_pretrained(result[form])
        model = CCFLLMForCTR.from_pretrained(result[form])
        candidates = ["b1", "b0", "Film number 3", "An unknown one"]
        with torch.no_grad():
            logits = model(**processor(user="r1", history=["b2"], candidates=candidates)).logits[0]
        assert logits.isfinite().all()
        torch.testing.assert_close(logits[1], logits[2])  # the shared title, by its new id
    old = json.loads((source / "adapter" / "adapter_config.json").read_text())
    new = json.loads(Path(result["checkpoint_slim"], "adapter", "adapter_config.json").read_text())
    assert {key: new[key] for key in ("r", "lora_alpha", "target_modules")} == {
        key: old[key] for key in ("r", "lora_alpha", "target_modules")
    }


def test_another_backbone_is_pointed_out(
    settings: dict[str, Any], books: Path, source: Path, tmp_path: Path, backbone: Path
) -> None:
    from transformers import AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(backbone)
    with torch.no_grad():
        other.get_input_embeddings().weight.mul_(1.5)
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(backbone).save_pretrained(tmp_path / "other")
    changed = settings | {"backbone": str(tmp_path / "other")}
    run = stage_of(changed, books, table_of(books, 4, tmp_path / "cf"), source)
    with pytest.warns(UserWarning, match="are not those of this recipe's `backbone`"):
        run.build_model(run.build_processor())


def test_weights_of_another_shape_are_named(
    settings: dict[str, Any], books: Path, source: Path, tmp_path: Path
) -> None:
    weights = load_file(source / "fusion.safetensors")
    save_file(weights | {"model.cold_item": torch.zeros(3)}, source / "fusion.safetensors")
    run = stage_of(settings, books, table_of(books, 4, tmp_path / "cf"), source)
    with pytest.raises(InputError, match=r"stage 'fusion': .*'model\.cold_item' for another"):
        run.build_model(run.build_processor())


def test_a_full_checkpoint_is_refused_with_the_mend(
    settings: dict[str, Any], books: Path, source: Path, tmp_path: Path
) -> None:
    full = tmp_path / "full"
    CCFLLMForCTR.from_pretrained(source).save_pretrained(full, form="full")
    run = stage_of(settings, books, table_of(books, 4, tmp_path / "cf"), full)
    with pytest.raises(InputError, match="name its slim form"):
        run.settings()
