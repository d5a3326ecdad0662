"""The whole path on real ratings with the real language model, a few hundred labels long."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoModel, AutoProcessor

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor, CTRRanker
from ccf_llm_hf.cf import MFConfig, fit_mf
from ccf_llm_hf.data import PrepareConfig, load_prepared, prepare
from ccf_llm_hf.inference.score_table import score_table
from ccf_llm_hf.training.run import run_recipe

pytestmark = pytest.mark.slow

SHARED = {"labels_per_step": 32, "max_eval_labels": 60}
STAGES: list[dict[str, Any]] = [
    {
        "name": "text",
        "preset": "text_only",
        "lora": {},
        "training": {**SHARED, "max_train_labels": 32},
    },
    {
        "name": "fusion",
        "init_from": "text",
        "prompt": {"candidate_format": "title_slot", "history_window": [20, 16]},
        "lora": {},
        "training": {**SHARED, "max_train_labels": 96},
    },
]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ml1m")
    prepare(PrepareConfig(source="ml-1m", out=str(folder / "data")), summary=False)
    strengths = {"l2_factors": 8.0, "l2_user_bias": 2.0, "l2_item_bias": 0.25}
    fit_mf(folder / "data", MFConfig(cross_fit="snapshots", snapshots=4, **strengths)).save(
        folder / "cf"
    )
    recipe = {
        "data_dir": str(folder / "data"),
        "cf_dir": str(folder / "cf"),
        "output_dir": str(folder / "run"),
        "backbone": "smollm2-135m-instruct",
        "stages": STAGES,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_recipe(["--config", str(folder / "recipe.yaml")])
    return folder


@pytest.fixture(scope="module")
def loaded(run_folder: Path) -> tuple[CCFLLMForCTR, CCFLLMProcessor]:
    folder = run_folder / "run" / "checkpoint"
    return AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


def test_packed_scores_of_real_rows_equal_their_scores_alone(
    run_folder: Path, loaded: tuple[CCFLLMForCTR, CCFLLMProcessor]
) -> None:
    model, processor = loaded
    test = load_prepared(run_folder / "data").splits["test"]
    user = max(set(test["user_id"]), key=test["user_id"].count)
    rows = [row for row, owner in enumerate(test["user_id"]) if owner == user][:40]
    part = test.select(rows)
    packed = score_table(model, processor, part, progress=False)["score"]
    alone = score_table(model, processor, part, max_candidates=1, progress=False)["score"]
    assert packed.std() > 1e-3
    np.testing.assert_allclose(packed, alone, atol=1e-4)


def test_both_checkpoint_forms_give_the_same_logits(
    run_folder: Path, loaded: tuple[CCFLLMForCTR, CCFLLMProcessor]
) -> None:
    model, processor = loaded
    slim = AutoModel.from_pretrained(run_folder / "run" / "checkpoint-slim")
    batch = processor(user="1", history=["Toy Story (1995)"], candidates=["Heat (1995)", "New one"])
    with torch.no_grad():
        torch.testing.assert_close(slim(**batch).logits, model(**batch).logits, atol=1e-5, rtol=0)


def test_the_run_is_recorded_and_drawn(run_folder: Path) -> None:
    run = run_folder / "run"
    report = json.loads((run / "training.json").read_text())
    assert report["recipe"]["seed"] == 0 and report["versions"]["torch"]
    assert 0 < report["validation"]["auc"] < 1
    for stage in ("text", "fusion"):
        assert (run / "stages" / stage / "curves.png").stat().st_size > 1000
        assert (run / "stages" / stage / "checkpoint" / "adapter").is_dir()


def test_ten_recommendations_for_one_user(run_folder: Path) -> None:
    ranker = CTRRanker.from_pretrained(str(run_folder / "run" / "checkpoint-slim"))
    history = ["Toy Story (1995)", "Bug's Life, A (1998)"]
    items = ranker.rank(user="1", history=history, top_k=10, preselect=20)
    assert len(items) == 10 and not {item.title for item in items} & set(history)
    assert [item.probability for item in items] == sorted(
        (item.probability for item in items), reverse=True
    )
    assert all(abs(item.text_share + item.cf_share - 1) < 1e-6 for item in items)
