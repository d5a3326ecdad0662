"""The losses against their definitions, written out pair by pair."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from tiny import BuildModel

from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.modeling.loss_ccf_llm import cross_entropy, ctr_loss, ranking

LABELS = torch.tensor([[1, 0, 1, 0, -100], [1, 1, -100, -100, -100], [0, 1, 0, 0, 1]])


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(3, 5, generator=torch.Generator().manual_seed(0))


def by_hand(logits: torch.Tensor) -> float:
    total = 0.0
    for row, labels in zip(logits.tolist(), LABELS.tolist(), strict=True):
        liked, disliked = ([x for x, y in zip(row, labels, strict=True) if y == z] for z in (1, 0))
        pairs = [math.log1p(math.exp(b - a)) for a, b in itertools.product(liked, disliked)]
        total += sum(pairs) / max(1, len(pairs)) * (len(liked) + len(disliked))
    return total


def test_ranking_is_the_mean_over_a_users_pairs(logits: torch.Tensor) -> None:
    assert ranking(logits, LABELS).item() == pytest.approx(by_hand(logits), rel=1e-5)
    assert ranking(logits[1:2], LABELS[1:2]).item() == 0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_loss_is_shared_between_the_two(logits: torch.Tensor, share: float) -> None:
    total = (1 - share) * cross_entropy(logits, LABELS) + share * by_hand(logits)
    assert ctr_loss(logits, LABELS, None, share).item() == pytest.approx(float(total) / 11)
    assert ctr_loss(logits, LABELS, 20, share).item() == pytest.approx(float(total) / 20)


def test_ranking_does_not_see_a_users_level_or_another_users_candidates(
    logits: torch.Tensor,
) -> None:
    shifted = logits + torch.tensor([[3.0], [-1.0], [7.0]])
    torch.testing.assert_close(ranking(shifted, LABELS), ranking(logits, LABELS))
    apart = sum(ranking(logits[row : row + 1], LABELS[row : row + 1]) for row in range(3))
    torch.testing.assert_close(ranking(logits, LABELS), apart)


def test_a_model_trains_on_the_share_of_its_config(build: BuildModel) -> None:
    model, processor = build(pairwise_share=0.5)
    batch = processor(user="u0", history=["i1"], candidates=["i0", "i3", "i7"])
    batch["labels"] = torch.tensor([[1, 0, 0]])
    output = model(**batch)
    expected = ctr_loss(output.logits, batch["labels"], None, 0.5)
    torch.testing.assert_close(output.loss, expected)
    assert abs(output.loss - ctr_loss(output.logits, batch["labels"], None, 0.0)) > 1e-4


@pytest.mark.parametrize("share", [0.4, 1.0])
@pytest.mark.parametrize("snapshot", [0, 1])
def test_the_cf_model_takes_its_share_of_the_labels_in_training_only(
    build: BuildModel, cf: CFVectors, share: float, snapshot: int
) -> None:
    taught, processor = build(cf_target_share=share)
    plain, _ = build()
    batch = processor(user="u0", history=["i1"], candidates=["i0", "i3"], snapshot=snapshot)
    batch["labels"] = torch.tensor([[1.0, 0.0]])
    outside = taught.eval()(**batch).loss
    torch.testing.assert_close(outside, plain.eval()(**batch).loss)
    output = taught.train()(**batch)
    said = torch.sigmoid(cf.logits(["u0", "u0"], ["i0", "i3"], snapshot=snapshot)).float()
    targets = (1 - share) * batch["labels"] + share * said
    expected = F.binary_cross_entropy_with_logits(output.logits, targets)
    torch.testing.assert_close(output.loss, expected)
    assert abs(output.loss - outside) > 1e-4
