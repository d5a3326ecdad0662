"""Folding users in from signed histories: the CF model's own optimum, in every way of packing."""

import json
from dataclasses import replace

import pytest
import torch
from tiny import BuildModel
from torch.nn.functional import softplus

from ccf_llm_hf import CCFLLMConfig, CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.modeling.checkpoint_ccf_llm import cf_settings
from ccf_llm_hf.modeling.modeling_ccf_llm import CFTable
from ccf_llm_hf.modeling.processing_ccf_llm import Request
from ccf_llm_hf.modeling.ranking_ccf_llm import cf_logits, score, score_cf_logit

PRECISION = [1.0, 2.0, 0.5, 1.5, 3.0, 0.0]  # the last dimension is fixed, as the "1" of MF is
FOLDED = {"cf_logit": True, "cf_fold_in": True}
SIGNED = {"histories": "signed", "history_window": (2, 2), "fold_in_items": 3}


def disliked(item: str) -> dict[str, object]:
    return {"id": item, "liked": False}


HISTORY = ["i0", disliked("i3"), "i4", disliked("i1"), "i5", disliked("i7"), "i6", "a new title"]
CANDIDATES = ["i2", "i1", "i6", "i3"]


@pytest.fixture
def cf(cf: CFVectors) -> CFVectors:
    cf.item_vectors /= 3
    return replace(cf, metadata={"user_precision": json.dumps(PRECISION)})


def table_of(cf: CFVectors) -> CFTable:
    table = CFTable(CCFLLMConfig(**cf_settings(cf)))
    table.fill(cf)
    return table


def objective(
    cf: CFVectors, user: torch.Tensor, rows: list[int], liked: list[float]
) -> torch.Tensor:
    """The CF model's own loss of one user on the last fit, written out."""
    known = cf.item_known[-1]
    loss = 0.5 * (torch.tensor(PRECISION) * (user - cf.default_user[-1]).square()).sum()
    for row, label in zip(rows, liked, strict=True):
        if 0 <= row < len(known) and known[row]:
            logit = (user * cf.item_vectors[-1, row]).sum() + cf.offset[-1]
            loss = loss + softplus(logit) - label * logit
    return loss


def test_a_folded_user_minimizes_the_cf_models_loss(cf: CFVectors) -> None:
    rows = [0, 3, 7, 4, 99, 1]  # 7 is not known, 99 not in the table
    liked = [1.0, 0.0, 1.0, 0.7, 0.0, 0.0]
    user = (
        table_of(cf)
        .folded_users(torch.tensor([[*rows, -1]]), torch.tensor([[*liked, 1.0]]), torch.tensor([6]))
        .vectors[0]
    )
    assert user[-1] == cf.default_user[-1, -1]
    user = user.requires_grad_()
    objective(cf, user, rows, liked).backward()
    assert user.grad is not None
    assert user.grad[:-1].abs().max() < 1e-3
    assert (user - cf.default_user[-1]).abs().max() > 0.1


def test_without_a_history_the_default_user_stands(cf: CFVectors) -> None:
    items = torch.full((2, 1), -1)
    users = table_of(cf).folded_users(items, items.float(), torch.tensor([0, 0]))
    torch.testing.assert_close(users.vectors, cf.default_user[-1].expand(2, -1))
    nothing = table_of(cf).folded_users(items[:, :0], items[:, :0].float(), torch.tensor([0, 0]))
    torch.testing.assert_close(nothing.vectors, users.vectors)


def test_tastes_are_one_step_from_the_mode_for_each_value(cf: CFVectors) -> None:
    plain, count = table_of(cf), len(cf.item_ids)
    values = torch.tensor(
        [[place % 3, 3 + place % 2 if place % 4 else -1] for place in range(count)]
    )
    tastes = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.5])
    tasted = table_of(
        replace(
            cf,
            field_values=[
                ("author", "a"),
                ("author", "b"),
                ("author", "c"),
                ("x", "y"),
                ("x", "z"),
            ],
            field_vectors=torch.zeros(5, 6),
            item_values=values.int(),
            field_tastes=tastes,
        )
    )
    items = torch.tensor([[0, 3, 4, 1, -1], [5, 2, 6, 7, 0]])
    targets = torch.tensor([[1.0, 0.0, 1.0, 0.3, 9.0], [0.0, 1.0, 1.0, 0.0, 1.0]])
    depths, asked = torch.tensor([4, 3]), torch.tensor([[2, 6, 1], [0, 3, 99]])
    before = plain.folded_users(items, targets, depths)
    expected = plain.folded_logits(before, asked)
    for user in range(2):
        own = range(int(depths[user]))
        p = plain.folded_logits(before, items.clamp(min=0))[user].sigmoid()
        for place, item in enumerate(asked[user].tolist()):
            for value in values[item].tolist() if item < count else []:
                same = [n for n in own if value >= 0 and value in values[items[user, n]]]
                gain = sum(targets[user, n] - p[n] for n in same)
                bend = sum(p[n] * (1 - p[n]) for n in same)
                expected[user, place] += gain / (1 / tastes[value] + bend)
    found = tasted.folded_logits(tasted.folded_users(items, targets, depths), asked)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - plain.folded_logits(before, asked)).abs().max() > 0.05


@pytest.mark.parametrize("wording", ["shared_prefix", "question_last"])
@pytest.mark.parametrize("fusion", ["gate", "concat", "text_only"])
def test_packed_equals_alone(build: BuildModel, fusion: str, wording: str) -> None:
    model, processor = build(fusion, wording, prompt=SIGNED, **FOLDED)
    lengths = [0, 1, 3, 2]
    common = {"user": "u0", "earlier": HISTORY[:3]}
    packed = processor(
        **common, history=HISTORY[3:7], candidates=CANDIDATES, history_lengths=lengths
    )
    alone = [
        processor(
            **common,
            history=HISTORY[3 : 3 + length],
            candidates=[item],
            history_lengths=[length],
        )
        for item, length in zip(CANDIDATES, lengths, strict=True)
    ]
    expected = torch.stack([model(**batch).logits[0, 0] for batch in alone])
    torch.testing.assert_close(model(**packed).logits[0], expected, atol=1e-4, rtol=0)


def test_the_score_is_the_backbones_plus_the_folded_cf_logit(
    build: BuildModel, cf: CFVectors
) -> None:
    model, processor = build(prompt=SIGNED, **FOLDED)
    batch = processor(user="u0", history=HISTORY, candidates=CANDIDATES)
    both = model(**batch).logits[0]
    rows = torch.tensor([int(item[1:]) for item in CANDIDATES])
    folded = cf_logits(model, processor, "u0", HISTORY, rows)
    model.cf_logit_scale.data.zero_()
    torch.testing.assert_close(both - model(**batch).logits[0], folded, atol=1e-5, rtol=0)
    # The window begins at item 6, and three items before it are folded in too.
    shown = [{"i4": 4, "i5": 5, "i6": 6}.get(str(item), -1) for item in HISTORY[3:]]
    shown[0], shown[2] = 1, 7
    liked = torch.tensor([[0.0, 1, 0, 1, 1]])
    users = table_of(cf).folded_users(torch.tensor([shown]), liked, torch.tensor([5])).vectors
    expected = (users * cf.item_vectors[1, rows]).sum(-1) + cf.offset[1]
    torch.testing.assert_close(folded, expected, atol=1e-5, rtol=0)


def test_scoring_in_parts_on_cached_keys_changes_no_score(build: BuildModel) -> None:
    model, processor = build(prompt=SIGNED, **FOLDED)
    request = Request("u1", HISTORY[3:], CANDIDATES, [5, 5, 5, 5], earlier=HISTORY[:3])
    (whole,) = score(model, processor, [request])
    (parts,) = score(model, processor, [request], tokens_per_batch=3)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=0)


def test_the_cf_logit_alone_is_the_score_without_the_backbones(build: BuildModel) -> None:
    model, processor = build(prompt=SIGNED, **FOLDED)
    model.answer_scale.data.zero_()
    requests = [Request("u1", HISTORY[3:], CANDIDATES, [5, 2, 0, 5], earlier=HISTORY[:3])]
    requests.append(Request("u0", [], ["i1"]))
    found, expected = score_cf_logit(model, processor, requests), score(model, processor, requests)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_dislikes_are_shown_as_such_and_only_to_models_that_read_them(build: BuildModel) -> None:
    _, processor = build(prompt=SIGNED)
    batch = processor(user="u0", history=["i0", disliked("i1")], candidates=["i2"])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert "<|ccf_item|> not<|ccf_item|><|ccf_item|>" in text
    assert batch["history_items"].tolist() == [[0, 1]]
    assert batch["history_targets"].tolist() == [[1.0, 0.0]]
    _, likes_only = build()
    assert "history_items" not in likes_only(user="u0", history=["i0"], candidates=["i2"])
    with pytest.raises(ValueError, match="reads likes only"):
        likes_only(user="u0", history=[disliked("i1")], candidates=["i2"])


def test_a_saved_model_folds_in_alike(build: BuildModel, tmp_path, backbone_folder) -> None:
    model, processor = build(prompt=SIGNED, **FOLDED)
    model.save_pretrained(tmp_path, form="slim")
    processor.save_pretrained(tmp_path)
    again = CCFLLMForCTR.from_pretrained(tmp_path, backbone=str(backbone_folder("llama")))
    read = CCFLLMProcessor.from_pretrained(tmp_path)
    batch = {"user": "u0", "history": HISTORY, "candidates": CANDIDATES}
    torch.testing.assert_close(again(**read(**batch)).logits, model(**processor(**batch)).logits)


def test_a_model_that_folds_in_says_what_it_lacks(build: BuildModel) -> None:
    model, processor = build(**FOLDED)  # a processor of likes only
    with pytest.raises(ValueError, match="histories"):
        model(**processor(user="u0", history=["i0"], candidates=["i2"]))
    with pytest.raises(ValueError, match="cf_user_precision"):
        CCFLLMConfig(cf_logit=True, cf_fold_in=True)


def test_ratings_far_from_the_midpoint_do_not_overflow(build: BuildModel) -> None:
    _, processor = build(prompt=SIGNED | {"rating_scale": (3.5, 1000.0)})
    assert processor.target({"id": "i0", "rating": 1}) == 0.0
    assert processor.target({"id": "i0", "rating": 5}) == 1.0


def test_ratings_are_graded_on_the_scale_of_the_cf_model(build: BuildModel) -> None:
    _, processor = build(prompt=SIGNED | {"rating_scale": (3.5, 1.5)})
    rated = [{"id": "i0", "rating": 5}, {"id": "i1", "rating": 3}]
    batch = processor(user="u0", history=rated, candidates=["i2"])
    expected = torch.sigmoid(1.5 * (torch.tensor([[5.0, 3.0]]) - 3.5))
    torch.testing.assert_close(batch["history_targets"], expected)
    assert " not<|ccf_item|>" in processor.tokenizer.decode(batch["input_ids"][0])
    _, labels_only = build(prompt=SIGNED)
    with pytest.raises(ValueError, match="takes no ratings"):
        labels_only(user="u0", history=rated, candidates=["i2"])
