"""Folds of (user, item) pairs, or of users: which one a training row is in follows from its ids."""

import numpy as np

from ccf_llm_hf.data.hashing import USER_FACTOR, Ids, hash_ids

# The high bits of the mixture are mixed best.
HIGH_BITS = np.uint64(33)


def fold_of(user_ids: Ids, item_ids: Ids, folds: int) -> np.ndarray:
    """The fold of each pair.

    A hash of both ids decides, so that whoever has a row can find the vectors that were not fitted
    on it, and a pair that occurs twice is left out as a whole.

    Args:
        user_ids: n raw ids.
        item_ids: n raw ids.
        folds: how many there are.

    Returns:
        `(n,)` int64 in [0, folds), about equal in size.
    """
    mixed = hash_ids(user_ids) * USER_FACTOR + hash_ids(item_ids)
    return ((mixed >> HIGH_BITS) % np.uint64(folds)).astype(np.int64)


def fold_of_users(user_ids: Ids, folds: int) -> np.ndarray:
    """The fold of each user's rows, as `fold_of`: `(n,)` int64 in [0, folds)."""
    return ((hash_ids(user_ids) >> HIGH_BITS) % np.uint64(folds)).astype(np.int64)
