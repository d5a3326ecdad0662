import numpy as np
import pytest
import torch

from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.inference.scoring import score_split, token_batches


@pytest.fixture(scope="module")
def loaded(checkpoint):
    return load_checkpoint(str(checkpoint))


def test_token_batches_hold_the_budget_and_every_index_once():
    lengths = [7, 50, 3, 9, 120, 9]
    batches = token_batches(lengths, max_tokens=100)
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert batches[0] == [4]  # longer than the budget: alone, not dropped
    assert all(len(batch) * max(lengths[index] for index in batch) <= 100 for batch in batches[1:])


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
