"""An item outside the catalog has a CF vector, made of what is known of its fields."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import BuildModel
from transformers import AutoModel, AutoProcessor, pipeline

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor, CTRRanker
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.processing_ccf_llm import Request
from ccf_llm_hf.modeling.ranking_ccf_llm import cf_logits, item_shares, number_items, score

PRECISION = [1.0, 2.0, 0.5, 1.5, 3.0, 0.0]
FOLDED = {"cf_logit": True, "cf_fold_in": True}
SIGNED = {"histories": "signed"}
NEW = {"title": "Never seen", "author": " ANN lee", "genres": ["Drama", "drama ", "unheard of"]}
TWIN = "i3"  # the fixture gives it the vector that NEW has


@pytest.fixture
def cf(cf: CFVectors) -> CFVectors:
    values = [("author", "ann lee"), ("genres", "drama"), ("genres", "crime"), ("author", "bo")]
    vectors = torch.randn(len(values), 6, generator=torch.Generator().manual_seed(5))
    # The new item's genres are two, of which one has a vector.
    cf.item_vectors[-1, 3] = cf.default_item[-1] + vectors[0] + vectors[1] / 2
    recorded = {"user_precision": json.dumps(PRECISION)}
    cf = replace(cf, field_values=values, field_vectors=vectors, metadata=recorded)
    of_items = torch.full((len(cf.item_ids), 2), -1, dtype=torch.int32)
    of_items[:5] = torch.tensor([[3, 2], [0, -1], [1, 2], [0, 1], [3, 0]])
    return replace(cf, item_values=of_items, field_tastes=torch.tensor([2.0, 0.5, 0.5, 2.0]))


@pytest.mark.parametrize("settings", [{}, {"cf_logit": True}, FOLDED], ids=str)
def test_a_new_item_counts_as_a_catalog_item_of_its_vector(
    build: BuildModel, settings: dict
) -> None:
    model, processor = build("cf_only", prompt=SIGNED, **settings)
    twins = [
        processor(user="u0", history=["i1", item, "i2"], candidates=["i4", item])
        for item in (NEW, TWIN)
    ]
    with torch.no_grad():
        new, known = (model(**batch).logits for batch in twins)
    torch.testing.assert_close(new, known, atol=1e-5, rtol=0)
    nobody = {"title": NEW["title"], "author": "a stranger"}
    for other in (nobody, NEW["title"]):
        batch = processor(user="u0", history=["i1", other, "i2"], candidates=["i4", other])
        assert (model(**batch).logits - known).abs().max() > 1e-3, other


def test_the_gate_and_the_cf_logit_see_its_vector(build: BuildModel) -> None:
    model, processor = build(cf_logit=True)
    new, twin, plain = item_shares(model, processor, [NEW, TWIN, NEW["title"]])
    assert (new.item_id, new.known, twin.known, plain.known) == (None, True, True, False)
    assert new.text_share != plain.text_share
    rows, fields = number_items(processor, [NEW, TWIN, NEW["title"]], torch.device("cpu"))
    logits = cf_logits(model, processor, "u0", [], rows, fields)
    torch.testing.assert_close(logits[0], logits[1])
    assert abs(logits[2] - logits[0]) > 1e-3


def test_new_items_of_one_title_are_told_apart_by_their_authors(build: BuildModel) -> None:
    model, processor = build(cf_logit=True)
    items = [{"title": "Poems", "author": author} for author in ("Ann Lee", "Bo", "?", "ann lee")]
    batch = processor(user="u0", history=["i1"], candidates=items)
    assert batch["new_title_lengths"].shape == (3,)
    assert batch["new_field_values"].tolist() == [[0], [3], [-1]]
    assert batch["new_field_weights"].tolist() == [[1.0], [1.0], [0.0]]
    logits = model(**batch).logits[0]
    assert len({round(logit, 4) for logit in logits.tolist()}) == 3
    (parts,) = score(model, processor, [Request("u0", ["i1"], items)], tokens_per_batch=3)
    torch.testing.assert_close(parts, logits.detach(), atol=1e-4, rtol=0)
    ranker = CTRRanker(model, processor)
    pairs = [{"user": "u0", "history": [item], "item": "i2"} for item in items[:2]]
    assert len(set(ranker.predict(pairs).tolist())) == 2


def test_rank_explain_and_the_pipeline_take_them(build: BuildModel) -> None:
    model, processor = build(cf_logit=True)
    ranker = CTRRanker(model, processor)
    ranked = ranker.rank("u0", ["i1"], [NEW, "i2"])
    assert {item.title: item.known for item in ranked}["Never seen"]
    piped = pipeline("ctr-ranking", model=model, processor=processor)
    again = piped({"user": "u0", "history": ["i1"], "candidates": [NEW, "i2"]})
    assert [item["logit"] for item in again] == pytest.approx([item.logit for item in ranked])
    explained = ranker.explain("u0", ["i1"], item=NEW)
    assert explained.known
    assert explained.cf_logit == pytest.approx(ranker.explain("u0", item=TWIN).cf_logit)


def save(model: CCFLLMForCTR, processor: CCFLLMProcessor, folder: Path, form: str) -> Path:
    model.save_pretrained(folder, form=form)
    processor.save_pretrained(folder)
    return folder


CLEAN_LOAD = """
import json, sys, torch
sys.modules["ccf_llm_hf"] = None  # importing it fails
from transformers import AutoModel, AutoProcessor
folder, call, kwargs = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
model = AutoModel.from_pretrained(folder, trust_remote_code=True, **kwargs)
with torch.no_grad():
    print("LOGITS", json.dumps(model(**processor(**call)).logits.tolist()))
"""


@pytest.mark.parametrize("form", ["full", "slim"])
def test_saved_equals_loaded_with_the_package_and_without_it(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    model, processor = build(cf_logit=True)
    call = {"user": "u0", "history": ["i1", NEW], "candidates": [NEW, "i2"]}
    with torch.no_grad():
        expected = model(**processor(**call)).logits
    folder = save(model, processor, tmp_path / "saved", form)
    place = {"backbone": str(backbone_folder())} if form == "slim" else {}
    loaded, read = AutoModel.from_pretrained(folder, **place), AutoProcessor.from_pretrained(folder)
    assert read.field_values == processor.field_values
    with torch.no_grad():
        torch.testing.assert_close(loaded(**read(**call)).logits, expected, atol=1e-5, rtol=0)
    arguments = [str(folder), json.dumps(call), json.dumps(place)]
    run = subprocess.run(
        [sys.executable, "-c", CLEAN_LOAD, *arguments],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    found = torch.tensor(json.loads(run.stdout.split("LOGITS ")[1]))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["full", "slim"])
def test_values_of_another_fit_are_refused(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    folder = save(*build(), tmp_path, form)
    file = folder / "field_values.jsonl"
    file.write_text(file.read_text().replace("ann lee", "another"))
    place = {"backbone": str(backbone_folder())} if form == "slim" else {}
    with pytest.raises(OSError, match="not the catalog that this checkpoint was saved with"):
        AutoModel.from_pretrained(folder, **place)
    with pytest.raises(OSError, match="not the catalog"):
        AutoProcessor.from_pretrained(folder)


def test_a_checkpoint_without_fields_loads(
    build: BuildModel, cf: CFVectors, backbone_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """As the ones before there were any: no tensor, no file, no entry in either config."""
    _, processor = build()
    plain = replace(cf, field_values=[], field_vectors=None, item_values=None, field_tastes=None)
    processor = processor.with_catalog(cf.item_ids, cf.item_titles, cf.user_ids)
    model = CCFLLMForCTR.from_backbone(str(backbone_folder()), processor, cf=plain)
    folder = save(model, processor, tmp_path, "slim")
    assert not (folder / "field_values.jsonl").exists()
    tensors = folder / "cf_embeddings.safetensors"
    assert "field_vectors" not in load_file(tensors)
    for name, key in (("config.json", "num_field_values"), ("processor_config.json", "cf_fields")):
        settings = json.loads((folder / name).read_text())
        del settings[key]
        (folder / name).write_text(json.dumps(settings))
    loaded = AutoModel.from_pretrained(folder, backbone=str(backbone_folder()))
    read = AutoProcessor.from_pretrained(folder)
    batch = read(user="u0", history=["i1"], candidates=[NEW])
    assert "new_field_values" not in batch
    torch.testing.assert_close(loaded(**batch).logits, model.eval()(**batch).logits)


def test_another_catalog_brings_its_own_values(build: BuildModel, cf: CFVectors) -> None:
    model, processor = build()
    values = [("author", "carl")]
    other = replace(
        cf, field_values=values, field_vectors=torch.ones(1, 6), item_values=None, field_tastes=None
    )
    catalog = (cf.item_ids, cf.item_titles, cf.user_ids)
    with pytest.raises(ValueError, match=r"as field_values, cf\.field_values"):
        model.replace_catalog(processor.with_catalog(*catalog), other)
    new = processor.with_catalog(*catalog, field_values=values)
    model.replace_catalog(new, other)
    assert item_shares(model, new, [{"title": "?", "author": "Carl"}])[0].known
    without = processor.with_catalog(*catalog)
    model.replace_catalog(without)
    assert not item_shares(model, without, [{"title": "?", "author": "Carl"}])[0].known


def test_the_vectors_of_a_checkpoint_read_as_cf_vectors(
    build: BuildModel, cf: CFVectors, tmp_path: Path
) -> None:
    save(*build(), tmp_path, "slim")
    read = CFVectors.load(tmp_path)
    assert read.field_values == cf.field_values
    assert torch.equal(read.field_vectors, cf.field_vectors)
    file = tmp_path / "cf_embeddings.safetensors"
    save_file(load_file(file), file, {"format_version": "2", "ids_fingerprint": "another"})
    with pytest.raises(InputError):
        CFVectors.load(tmp_path)
