"""Invariants of the model over arms, wordings, backbones and attention paths."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import ARMS, BACKBONES, BuildModel, put_bos_first
from transformers import PreTrainedTokenizerFast

from ccf_llm_hf import CCFLLMConfig, CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.modeling.configuration_ccf_llm import FUSIONS
from ccf_llm_hf.modeling.modeling_ccf_llm import SHARES

HISTORY = ["i1", "i2", "i7", "i0", "i6"]
CANDIDATES = ["i0", "i3", "i7", "i4", "A new film (2024)", "i5"]
LENGTHS = [0, 2, 2, 3, 5, 5]


def packed_logits(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> torch.Tensor:
    batch = processor(
        user=["u0", "stranger"],
        history=[HISTORY, HISTORY[:2]],
        candidates=[CANDIDATES, CANDIDATES[:2]],
        history_lengths=[LENGTHS, [1, 2]],
    )
    with torch.no_grad():
        return model(**batch).logits


def alone_logits(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> torch.Tensor:
    """The first user's samples, one a call, each with only the history it may see."""
    scores = []
    for item, length in zip(CANDIDATES, LENGTHS, strict=True):
        batch = processor(user="u0", history=HISTORY[:length], candidates=[item])
        with torch.no_grad():
            scores.append(model(**batch).logits[0, 0])
    return torch.stack(scores)


@pytest.mark.parametrize("wording", ["shared_prefix", "question_last"])
@pytest.mark.parametrize("arm", ARMS)
def test_packed_equals_alone_for_every_arm(build: BuildModel, arm: str, wording: str) -> None:
    model, processor = build(arm, wording, cf_logit=arm == "sum")
    packed = packed_logits(model, processor)
    assert packed.shape == (2, len(CANDIDATES))
    assert packed[0].std() > 1e-3
    torch.testing.assert_close(packed[0], alone_logits(model, processor), atol=1e-4, rtol=0)
    assert (packed[1, 2:] == 0).all()


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_packed_equals_alone_for_every_backbone(
    build: BuildModel, backbone: str, attn: str
) -> None:
    model, processor = build(backbone=backbone, attn=attn, lora=True)
    packed = packed_logits(model, processor)[0]
    torch.testing.assert_close(packed, alone_logits(model, processor), atol=1e-4, rtol=0)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_packed_equals_alone_after_a_bos(
    build: BuildModel, tokenizer: PreTrainedTokenizerFast, attn: str
) -> None:
    without = packed_logits(*build(backbone="gemma3", attn=attn))[0]
    put_bos_first(tokenizer)
    model, processor = build(backbone="gemma3", attn=attn)
    packed = packed_logits(model, processor)[0]
    assert (packed - without).abs().max() > 1e-3
    torch.testing.assert_close(packed, alone_logits(model, processor), atol=1e-4, rtol=0)


def test_several_users_in_one_batch_do_not_meet(build: BuildModel) -> None:
    model, processor = build()
    both = packed_logits(model, processor)[1, :2]
    batch = processor(
        user="stranger",
        history=HISTORY[:2],
        candidates=CANDIDATES[:2],
        history_lengths=[1, 2],
    )
    torch.testing.assert_close(both, model(**batch).logits[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_trains(build: BuildModel, arm: str) -> None:
    model, processor = build(arm, lora=True, cf_logit=True)
    batch = processor(user="u0", history=HISTORY, candidates=CANDIDATES, labels=[1, 0, 1, 0, 1, 1])
    output = model.train()(**batch)
    output.loss.backward()
    names = {name for name, weight in model.named_parameters() if weight.grad is not None}
    expected = {"cf_logit_scale"} | {name for name, _ in model.lora_parameters()}
    if arm != "text_only":
        expected |= {"model.item_alignment.up.weight", "model.user_alignment.up.weight"}
        expected |= {"model.cold_item"}
    if arm in ("gate", "scalar_gate"):
        expected |= {"model.gate.linear.weight", "model.gate.evidence_weight"}
    assert expected <= names
    assert all(torch.isfinite(w.grad).all() for w in model.parameters() if w.grad is not None)


def test_loss_is_the_mean_or_divided_by_the_steps_labels(build: BuildModel) -> None:
    model, processor = build()
    batch = processor(user="u0", history=HISTORY, candidates=CANDIDATES[:4], labels=[1, 0, 1, 1])
    with torch.no_grad():
        mean = model(**batch).loss
        shared = model(**batch, num_items_in_batch=10).loss
        expected = torch.nn.functional.binary_cross_entropy_with_logits(
            model(**batch).logits[0], torch.tensor([1.0, 0, 1, 1])
        )
    torch.testing.assert_close(mean, expected)
    torch.testing.assert_close(shared, mean * 4 / 10)


def test_labels_of_padded_candidates_do_not_count(build: BuildModel) -> None:
    model, processor = build()
    two = processor(
        user=["u0", "u1"],
        history=[HISTORY, []],
        candidates=[CANDIDATES[:3], ["i3"]],
        labels=[[1, 0, 1], [0]],
    )
    alone = [
        processor(user="u0", history=HISTORY, candidates=CANDIDATES[:3], labels=[1, 0, 1]),
        processor(user="u1", history=[], candidates=["i3"], labels=[0]),
    ]
    with torch.no_grad():
        together = model(**two).loss
        apart = sum(model(**batch, num_items_in_batch=4).loss for batch in alone)
    torch.testing.assert_close(together, apart)


def test_cf_logit_adds_the_cf_logit(build: BuildModel, cf: CFVectors) -> None:
    plain, processor = build()
    added, _ = build(cf_logit=True)
    with torch.no_grad():
        added.cf_logit_scale.fill_(0.5)
    difference = packed_logits(added, processor) - packed_logits(plain, processor)
    known = [item for item in CANDIDATES if item in cf.item_ids]
    expected = cf.logits(["u0"] * len(known), known) * 0.5
    rows = [column for column, item in enumerate(CANDIDATES) if item in cf.item_ids]
    torch.testing.assert_close(difference[0, rows], expected.float(), atol=1e-4, rtol=0)


def test_unknown_items_and_users_are_cold(build: BuildModel) -> None:
    model, processor = build("cf_only")
    batch = processor(user=None, history=[], candidates=["i7", {"id": "never seen"}, "New title"])
    logits = model(**batch).logits[0]
    torch.testing.assert_close(logits[1:], logits[:1].expand(2))
    gated, processor = build("gate")
    logits = gated(**batch).logits[0]
    assert logits.unique().numel() == 3, "the gate still reads the titles"


def test_text_embedding_is_the_mean_of_title_tokens(build: BuildModel) -> None:
    model, processor = build(item_text="static")
    table = model.get_input_embeddings().weight
    text = model.model.item_words(torch.tensor([1, 5, 0]))
    ids = processor.item_title_ids()
    torch.testing.assert_close(text[0], table[ids[1]].mean(0))
    torch.testing.assert_close(text[2], table[ids[0]].mean(0))
    assert (text[1] == 0).all()
    with torch.no_grad():
        table.mul_(2)
    torch.testing.assert_close(model.model.item_words(torch.tensor([1]))[0], text[0] * 2)


def test_gate_lies_in_the_unit_interval_and_ablations_are_constant(build: BuildModel) -> None:
    items = torch.arange(8)
    gate = build("gate")[0].item_gates(items)
    assert gate.shape == (8, 32) and ((gate > 0) & (gate < 1)).all() and gate.std(1).min() > 0
    scalar = build("scalar_gate")[0].item_gates(items)
    assert scalar.std(1).max() < 1e-6
    assert SHARES.keys() < set(FUSIONS)
    for fusion, share in SHARES.items():
        assert (build(fusion)[0].item_gates(items) == share).all()


def test_every_fusion_is_an_arm_of_the_tests() -> None:
    assert {fusion for fusion, _ in ARMS.values()} == set(FUSIONS)


@pytest.mark.parametrize("fusion", ["gate", "scalar_gate"])
def test_a_fresh_gate_turns_to_words_where_cf_knows_little(build: BuildModel, fusion: str) -> None:
    """Vectors of a tenth, once and ten times the average mean square, then none."""
    model, _ = build(fusion)
    with torch.no_grad():
        model.cf.item_known[:4] = torch.tensor([True, True, True, False])
        for row, evidence in enumerate((0.1, 1.0, 10.0, 10.0)):
            model.cf.item_vectors[row] = model.cf.item_scale * evidence**0.5
        model.model.gate.linear.weight.zero_()
    few, average, many, none = model.item_gates(torch.arange(4)).mean(1).tolist()
    assert [few, average, many] == pytest.approx([1 / 1.11, 1 / 2.01, 1 / 11.01], rel=1e-3)
    assert none == pytest.approx(1 / 1.01, rel=1e-3)


def test_slots_that_disagree_with_tokens_are_refused(build: BuildModel) -> None:
    model, processor = build()
    batch = processor(user="u0", history=HISTORY, candidates=CANDIDATES)
    batch["item_slots"][0, (batch["item_slots"][0] >= 0).nonzero()[0]] = -1
    with pytest.raises(ValueError, match=r"11 item slot tokens but 10 item slots"):
        model(**batch)


@pytest.mark.parametrize("backbone", BACKBONES)
def test_fresh_slots_have_the_scale_of_token_embeddings(build: BuildModel, backbone: str) -> None:
    model, _ = build("cf_only", backbone=backbone)
    words = model.get_input_embeddings()(torch.arange(300))
    slots, _ = model.model.aligned_items(torch.arange(6))
    ratio = slots.pow(2).mean().sqrt() / words.pow(2).mean().sqrt()
    assert 0.2 < ratio < 2


@pytest.mark.parametrize("name", ["fusion", "checkpoint_form"])
def test_unknown_settings_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name}='nonsense'"):
        CCFLLMConfig(**{name: "nonsense"})


@pytest.mark.parametrize("key", ["cf_residual", "layout"])
def test_a_checkpoint_of_release_0_1_says_how_to_convert_it(key: str) -> None:
    with pytest.raises(ValueError, match=r"written by ccf-llm-hf 0\.1: convert it by") as refused:
        CCFLLMConfig(**{key: "any"})
    assert "\n" not in str(refused.value)


def test_the_table_takes_the_last_fit_of_the_cf_vectors(build: BuildModel, cf: CFVectors) -> None:
    table = build()[0].cf
    assert torch.equal(table.item_vectors, cf.item_vectors[-1])
    assert torch.equal(table.user_known, cf.user_known[-1])
    vectors, known = table.lookup("item", torch.tensor([1, 7, 99]))
    assert known.tolist() == [True, False, False]
    assert torch.equal(vectors[1:], cf.default_item[-1].expand(2, -1))


def test_config_round_trips() -> None:
    config = CCFLLMConfig(text_config={"model_type": "gpt2", "n_embd": 16}, fusion="sum", cf_dim=7)
    again = CCFLLMConfig.from_dict(config.to_dict())
    assert again.text_config.n_embd == 16 and again.fusion == "sum" and again.cf_dim == 7


def test_a_misspelled_setting_and_foreign_vectors_are_refused(
    build: BuildModel, cf: CFVectors, backbone_folder: Callable[[str], Path]
) -> None:
    _, processor = build()
    backbone = str(backbone_folder("llama"))
    with pytest.raises(ValueError, match="'fusoin', which CCFLLMConfig has not"):
        CCFLLMForCTR.from_backbone(backbone, processor, cf=cf, fusoin="gate")
    other = processor.with_catalog(["a"], ["A"], [])
    with pytest.raises(ValueError, match="name other users or items"):
        CCFLLMForCTR.from_backbone(backbone, other, cf=cf)
