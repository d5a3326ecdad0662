"""The losses: binary cross-entropy, and a ranking loss within users."""

import torch
import torch.nn.functional as F
from torch import Tensor

from .packing_ccf_llm import IGNORED_LABEL


def ctr_loss(
    logits: Tensor,
    labels: Tensor,
    num_items: Tensor | int | None,
    pairwise_share: float,
    targets: Tensor | None = None,
) -> Tensor:
    """The training loss of candidates `(batch, num_candidates)`: mean over their labels.

    Args:
        logits: float.
        labels: 0/1, -100 where padded.
        num_items: if given, the loss is the sum divided by it, for accumulated gradients.
        pairwise_share: how much of the cross-entropy the ranking loss takes the place of, in
            [0, 1] (our choice; the paper has cross-entropy alone).
        targets: probabilities that the cross-entropy asks for in place of the labels.
    """
    total = (1 - pairwise_share) * cross_entropy(logits, labels, targets)
    if pairwise_share:
        total = total + pairwise_share * ranking(logits, labels)
    valid = (labels != IGNORED_LABEL).sum().clamp(min=1)
    return total / (valid if num_items is None else num_items)


def cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Binary cross-entropy with `targets`, default the labels, summed where labels are not -100."""
    valid = labels != IGNORED_LABEL
    wanted = (labels if targets is None else targets)[valid].to(logits.dtype)
    return F.binary_cross_entropy_with_logits(logits[valid], wanted, reduction="sum")


def ranking(logits: Tensor, labels: Tensor) -> Tensor:
    """Logistic loss of every liked candidate against every disliked one of its row, as UAUC counts
    them: mean over a row's pairs, times its labels, summed over rows.

    A row holds one user's candidates. One without both classes has no pairs and no loss.
    """
    liked, disliked = labels == 1, labels == 0
    pairs = liked[:, :, None] & disliked[:, None, :]
    losses = F.softplus(logits[:, None, :] - logits[:, :, None]) * pairs
    mean = losses.sum((1, 2)) / pairs.sum((1, 2)).clamp(min=1)
    return torch.sum(mean * (liked | disliked).sum(1))


__all__ = ["ctr_loss"]
