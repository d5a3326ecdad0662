import numpy as np
import pytest
import torch
from tiny import BACKBONES

from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.inference.score_table import sample_users, score_cf_table, score_table
from ccf_llm_hf.modeling.processing_ccf_llm import Request
from ccf_llm_hf.modeling.ranking_ccf_llm import score


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_checkpoint(str(checkpoint))


def test_split_scores_equal_each_row_scored_alone(loaded, split):
    model, processor = loaded
    table = score_table(model, processor, split, progress=False)
    assert list(table["item_id"]) == list(split["item_id"])
    packed = table["score"].to_numpy()
    assert packed.shape == (len(split),)
    assert packed.dtype == np.float32
    for row, logit in zip(split, packed, strict=True):
        batch = processor(user=row["user_id"], history=row["history"], candidates=[row["item_id"]])
        with torch.inference_mode():
            alone = float(model(**batch).logits[0, 0])
        assert logit == pytest.approx(alone, abs=1e-4)
    assert np.ptp(packed) > 1e-2


def test_batching_changes_no_score(loaded, split):
    model, processor = loaded
    whole = score_table(model, processor, split, progress=False)
    cut = score_table(model, processor, split, max_candidates=1, tokens_per_batch=1, progress=False)
    np.testing.assert_allclose(whole["score"], cut["score"], atol=1e-4)


def test_the_cf_logit_alone_is_the_score_without_the_backbones(checkpoint, split):
    model, processor = load_checkpoint(str(checkpoint))
    model.config.cf_logit = True
    model.cf_logit_scale.data.fill_(1.0)
    model.answer_scale.data.zero_()
    whole = score_table(model, processor, split, progress=False)
    alone = score_cf_table(model, processor, split)
    np.testing.assert_allclose(alone["score"], whole["score"], atol=1e-5)
    assert list(alone["item_id"]) == list(split["item_id"])
    assert np.ptp(alone["score"]) > 1e-2


@pytest.mark.parametrize("wording", ["shared_prefix", "question_last"])
@pytest.mark.parametrize("form", ["slot", "title_slot"])
@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_cached_history_changes_no_score(build, backbone, attn, form, wording):
    model, processor = build("gate", wording, backbone, True, attn, cf_logit=True)
    processor.prompt.candidate_format = form
    candidates = ["i0", "i3", {"title": "A new film"}, "i4", "i5", "i1"]
    request = Request("u0", ["i1", "i2", "i7"], candidates, [0, 1, 2, 3, 3, 3])
    (whole,) = score(model, processor, [request])
    for budget in (1, 3, 30):
        (parts,) = score(model, processor, [request], tokens_per_batch=budget)
        np.testing.assert_allclose(whole, parts, atol=1e-4)


def test_question_last_is_packed_and_scores_as_alone(build):
    model, processor = build(wording="question_last")
    request = Request("u0", ["i1", "i2"], ["i0", "i3", "i4"], [2, 0, 1])
    scores = score(model, processor, [request, Request("u1", [], ["i5"])])
    assert [len(part) for part in scores] == [3, 1]
    for item, length, logit in zip(request.candidates, [2, 0, 1], scores[0], strict=True):
        batch = processor(user="u0", history=request.history[:length], candidates=[item])
        with torch.inference_mode():
            assert logit == pytest.approx(float(model(**batch).logits[0, 0]), abs=1e-4)


def test_training_mode_is_restored(loaded, split):
    model, processor = loaded
    model.train()
    score_table(model, processor, split, progress=False)
    assert model.training
    model.eval()


def test_a_sample_holds_whole_users(split):
    part = sample_users(split, rows=1)
    owners = set(part["user_id"])
    assert len(owners) == 1
    assert len(part) == sum(user in owners for user in split["user_id"])
    assert len(sample_users(split, rows=10**6)) == len(split)
    assert list(sample_users(split, rows=1)["item_id"]) == list(part["item_id"])
