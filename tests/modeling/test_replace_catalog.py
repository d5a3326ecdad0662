"""Another catalog under trained weights: `model.replace_catalog`."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import ARMS, BuildModel
from transformers import AutoModel, AutoProcessor

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor, CTRRanker
from ccf_llm_hf.cf.vectors import CFVectors

# Of the old catalog `Heat` stays, under another id and with another vector.
ITEMS = {"n0": "Fargo (1996)", "n1": "Heat (1995)", "n2": "A film without ratings (2024)"}


def new_table(dim: int) -> CFVectors:
    generator = torch.Generator().manual_seed(7)
    vectors = {name: torch.randn(dim, generator=generator).numpy() for name in ("n0", "n1")}
    users = {name: torch.randn(dim, generator=generator).numpy() for name in ("v0", "v1")}
    return CFVectors.from_tables(users, vectors, ITEMS, model_name="lightgcn")


def replaced(
    model: CCFLLMForCTR, processor: CCFLLMProcessor, dim: int
) -> tuple[CCFLLMForCTR, CCFLLMProcessor, CFVectors]:
    cf = new_table(dim)
    processor = processor.with_catalog(cf.item_ids, cf.item_titles, cf.user_ids)
    return model.replace_catalog(processor, cf), processor, cf


def logits(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> torch.Tensor:
    batch = processor(user="v0", history=["n0", "n2"], candidates=["n1", "n2", "A new one (2025)"])
    with torch.no_grad():
        return model(**batch).logits


@pytest.mark.parametrize("dim", [6, 4])
def test_old_items_read_the_new_table_and_new_ones_are_cold(build: BuildModel, dim: int) -> None:
    model, processor, cf = replaced(*build(), dim)
    rows = torch.arange(3)
    aligned, evidence = model.model.aligned_items(rows)
    scaled = cf.item_vectors[0] / cf.item_vectors[0, :2].pow(2).mean(0).sqrt()
    expected = model.model.item_alignment(scaled)
    torch.testing.assert_close(aligned[:2], expected[:2])
    cold = model.config.slot_scale * model.model.cold_item
    torch.testing.assert_close(aligned[2], cold)
    assert (evidence[:2] > 0).all() and evidence[2] == 0
    text = model.model.item_words(rows)
    states = model.model.read_texts(processor.item_title_ids())
    words = model.model.text_alignment(model.model.item_text.reduce(states))
    torch.testing.assert_close(text, words, atol=2e-3, rtol=2e-3)
    torch.testing.assert_close(
        model.cf.logits(torch.tensor([0]), torch.tensor([1])),
        cf.logits(["v0"], ["n1"]),
    )


def test_an_item_by_its_new_id_scores_as_by_its_title(build: BuildModel) -> None:
    model, processor, _ = replaced(*build(), 6)
    batch = processor(user="v0", history=["n0"], candidates=["n1", "Heat (1995)"])
    with torch.no_grad():
        one, other = model(**batch).logits[0]
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dim", [6, 4])
def test_only_the_alignment_may_start_afresh_and_it_is_said(
    build: BuildModel, dim: int, caplog: pytest.LogCaptureFixture
) -> None:
    model, processor = build(lora=True, cf_logit=True)
    before = {
        name: value.clone()
        for name, value in model.state_dict().items()
        if not name.startswith("model.cf.") and name != "model.item_text.vectors"
    }
    model, *_ = replaced(model, processor, dim)
    after = model.state_dict()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    if dim == 6:
        assert not changed
        assert "alignment networks are kept" in caplog.text
    else:
        of_cf = ("model.item_alignment.", "model.user_alignment.")
        assert changed and all(name.startswith(of_cf) for name in changed)
        assert "start afresh" in caplog.text and "4 dimensions instead of 6" in caplog.text
        assert model.model.item_alignment.up.weight.std() > 0.1
    assert model.config.cf_dim == dim and model.config.cf_model == "lightgcn"
    assert model.config.num_items == 3 and model.config.num_users == 2


@pytest.mark.parametrize("form", ["full", "slim"])
@pytest.mark.parametrize("arm", ARMS)
def test_saved_equals_loaded(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, arm: str, form: str
) -> None:
    model, processor, _ = replaced(*build(arm, lora=True, cf_logit=True), 4)
    model.save_pretrained(tmp_path, form=form)
    processor.save_pretrained(tmp_path)
    options = {"backbone": str(backbone_folder())} if form == "slim" else {}
    loaded = AutoModel.from_pretrained(tmp_path, **options)
    again = AutoProcessor.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded, again), logits(model, processor), atol=1e-5, rtol=0)


@pytest.mark.parametrize("form", ["full", "slim"])
def test_a_loaded_checkpoint_takes_another_catalog(
    build: BuildModel, backbone_folder: Callable[..., Path], tmp_path: Path, form: str
) -> None:
    model, processor = build(lora=True)
    model.save_pretrained(tmp_path / "old", form=form)
    processor.save_pretrained(tmp_path / "old")
    options = {"backbone": str(backbone_folder())} if form == "slim" else {}
    loaded = AutoModel.from_pretrained(tmp_path / "old", **options)
    loaded, again, _ = replaced(loaded, AutoProcessor.from_pretrained(tmp_path / "old"), 6)
    expected, processor, _ = replaced(model, processor, 6)
    torch.testing.assert_close(
        logits(loaded, again), logits(expected, processor), atol=1e-5, rtol=0
    )
    loaded.save_pretrained(tmp_path / "new")
    again.save_pretrained(tmp_path / "new")
    ranked = CTRRanker(AutoModel.from_pretrained(tmp_path / "new", **options), again).rank(
        user="v1", history=["n0"], candidates=["n1", "n2"]
    )
    assert {item.item_id: item.known for item in ranked} == {"n1": True, "n2": False}


def test_without_a_cf_table_everything_is_cold(build: BuildModel, tmp_path: Path) -> None:
    model, processor = build()
    weights = model.model.item_alignment.up.weight.clone()
    processor = processor.with_catalog(list(ITEMS), list(ITEMS.values()), [])
    model.replace_catalog(processor)
    cold = model.config.slot_scale * model.model.cold_item
    aligned, _ = model.model.aligned_items(torch.arange(3))
    torch.testing.assert_close(aligned, cold.expand(3, -1))
    assert torch.equal(model.model.item_alignment.up.weight, weights)
    model.save_pretrained(tmp_path, form="full")
    processor.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(AutoModel.from_pretrained(tmp_path), processor), logits(model, processor)
    )


@pytest.mark.parametrize("dim", [6, 4])
def test_the_new_table_can_be_trained_on(build: BuildModel, dim: int) -> None:
    model, processor, _ = replaced(*build(cf_logit=True), dim)
    batch = processor(
        user=["v0", "v1"],
        history=[["n0"], ["n2"]],
        candidates=[["n1", "n2"], ["n0", "n1"]],
        labels=[[1, 0], [0, 1]],
    )
    weights = [parameter for _, parameter in model.fusion_parameters()]
    optimizer = torch.optim.AdamW(weights, lr=0.01)
    losses = []
    for _ in range(8):
        loss = model(**batch).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert all(parameter.grad is not None for parameter in model.model.item_alignment.parameters())


def test_tables_and_tokenizers_that_do_not_fit_are_refused(build: BuildModel) -> None:
    model, processor = build()
    with pytest.raises(ValueError, match="name other users or items"):
        model.replace_catalog(processor, new_table(6))
    processor.item_slot_token_id += 1
    with pytest.raises(ValueError, match="item_slot_token_id"):
        model.replace_catalog(processor)


def test_the_prompt_stays(build: BuildModel) -> None:
    _, processor = build("concat", wording="question_last")
    processor.templates["prefix"] = "For{user}:"
    new = processor.with_catalog(list(ITEMS), list(ITEMS.values()), ["v0"])
    assert (new.wording, new.candidate_format) == ("question_last", "title_slot")
    assert new.templates == processor.templates and new.history_window == processor.history_window
    assert new.item_ids == list(ITEMS) and processor.item_ids != list(ITEMS)
