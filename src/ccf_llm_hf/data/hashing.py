"""Hashes of ids: the same on every machine, in whatever order the rows come."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pandas as pd

# 2^64 over the golden ratio, an odd number (Fibonacci hashing, Knuth): what the two ids' hashes are
# added with, so that a pair and its reverse differ.
USER_FACTOR = np.uint64(0x9E3779B97F4A7C15)
Ids = Sequence[str] | np.ndarray | pd.Series


def hash_ids(ids: Ids, key: str = "") -> np.ndarray:
    """`(n,)` uint64, a hash of each raw id; another `key` gives unrelated ones."""
    codes, names = pd.factorize(np.asarray(ids, dtype=object))
    digests = [
        hashlib.blake2b(str(name).encode(), digest_size=8, key=key.encode()).digest()
        for name in names
    ]
    return np.frombuffer(b"".join(digests), dtype="<u8")[codes].astype(np.uint64)


def hash_pairs(users: Ids, items: Ids, key: str) -> np.ndarray:
    """`(n,)` uint64, a hash of each (user, item) pair; another `key` gives unrelated ones."""
    mixed = hash_ids(users, key) * USER_FACTOR + hash_ids(items, key)
    # The sum alone would draw two users with near hashes alike; this is splitmix64's last step.
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    return mixed ^ (mixed >> np.uint64(31))
