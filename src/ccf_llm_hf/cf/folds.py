"""Folds of (user, item) pairs: which one a training row is in follows from its ids alone."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

# 2^64 over the golden ratio, an odd number (Fibonacci hashing, Knuth): what the two ids' hashes are
# added with, so that a pair and its reverse differ. The high bits are mixed best.
USER_FACTOR = np.uint64(0x9E3779B97F4A7C15)
HIGH_BITS = np.uint64(33)


def fold_of(
    user_ids: Sequence[str] | np.ndarray | pd.Series,
    item_ids: Sequence[str] | np.ndarray | pd.Series,
    folds: int,
) -> np.ndarray:
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
    mixed = _hashes(user_ids) * USER_FACTOR + _hashes(item_ids)
    return ((mixed >> HIGH_BITS) % np.uint64(folds)).astype(np.int64)


def _hashes(ids: Sequence[str] | np.ndarray | pd.Series) -> np.ndarray:
    codes, names = pd.factorize(np.asarray(ids, dtype=object))
    digests = [hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), dtype="<u8")[codes].astype(np.uint64)
