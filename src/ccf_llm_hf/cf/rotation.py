"""Bring separately fitted vectors into one space, without a change to what they score."""

from collections.abc import Sequence

import torch
from torch import Tensor


def rotate_onto(vectors: Sequence[Tensor], onto: Sequence[Tensor]) -> list[Tensor]:
    """Tables of one model, all rotated (or mirrored) alike, as near another model's as can be.

    Dot products between the tables stay as they are, so that the model remains ignorant of what the
    other one was fitted on. Orthogonal Procrustes problem (Schoenemann 1966).

    Args:
        vectors: tables `(n, dim)` float32, of users and of items.
        onto: the other model's, of the same shapes.

    Returns:
        Tables of the same shapes.
    """
    products = [mine.double().T @ other.double() for mine, other in zip(vectors, onto, strict=True)]
    left, _, right = torch.linalg.svd(torch.stack(products).sum(0))
    rotation = (left @ right).float()
    return [table @ rotation for table in vectors]
