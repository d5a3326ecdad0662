import numpy as np
import pytest
import torch

from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.inference.score_table import sample_users
from ccf_llm_hf.inference.scoring import score_split


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_checkpoint(str(checkpoint))


def test_split_scores_equal_each_row_scored_alone(loaded, split):
    model, processor = loaded
    window = (3, 2)
    packed = score_split(model, processor, split, history_window=window, progress=False)
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
    common = {"history_window": (3, 2), "progress": False}
    whole = score_split(model, processor, split, **common)
    cut = score_split(model, processor, split, max_candidates=1, max_tokens_per_batch=1, **common)
    np.testing.assert_allclose(whole, cut, atol=1e-4)


def test_training_mode_is_restored(loaded, split):
    model, processor = loaded
    model.train()
    score_split(model, processor, split, history_window=(3, 2), progress=False)
    assert model.training
    model.eval()


def test_a_sample_holds_whole_users(split):
    part = sample_users(split, rows=1)
    owners = set(part["user_id"])
    assert len(owners) == 1
    assert len(part) == sum(user in owners for user in split["user_id"])
    assert len(sample_users(split, rows=10**6)) == len(split)
    assert list(sample_users(split, rows=1)["item_id"]) == list(part["item_id"])
