import numpy as np

from ccf_llm_hf.cf.folds import fold_of

USERS = [f"u{n}" for n in range(60)]
ITEMS = [f"i{n}" for n in range(50)]


def test_a_fold_is_the_same_on_every_machine() -> None:
    # A changed hash would give training rows the vectors that were fitted on them.
    found = fold_of(["42", "42", "reader", ""], ["7", "8", "Amélie (2001)", "x"], 5)
    assert found.dtype == np.int64
    assert found.tolist() == [3, 1, 2, 3]


def test_a_fold_follows_from_the_pair_alone() -> None:
    users, items = (column.ravel() for column in np.meshgrid(USERS, ITEMS))
    together = fold_of(users, items, 3)
    order = np.random.default_rng(0).permutation(len(users))
    assert (fold_of(users[order], items[order], 3) == together[order]).all()
    assert fold_of(users[7:8], items[7:8], 3)[0] == together[7]
    assert fold_of([], [], 3).tolist() == []


def test_folds_are_even_for_everyone() -> None:
    users, items = (column.ravel() for column in np.meshgrid(USERS, ITEMS))
    folds = fold_of(users, items, 5)
    assert (abs(np.bincount(folds) - 600) < 100).all()
    for ids in (users, items):
        # Nobody's pairs gather in one fold, as they would if one id decided.
        assert all(np.bincount(folds[ids == one], minlength=5).max() < 25 for one in set(ids))
    swapped = fold_of(items, users, 5)
    assert (swapped != folds).mean() > 0.7
