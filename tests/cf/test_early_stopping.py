import torch

from ccf_llm_hf.cf.early_stopping import EarlyStopping


def test_the_best_weights_are_kept_and_patience_ends_the_fit() -> None:
    stopping, weights = EarlyStopping(patience=2), torch.zeros(3)
    ended = []
    for step, value in enumerate([0.6, 0.7, 0.65, 0.7], start=1):
        weights += 1
        ended.append(stopping.update(value, step, [weights]))
    assert ended == [False, False, False, True]
    assert (stopping.best, stopping.step) == (0.7, 2)
    assert stopping.weights[0].tolist() == [2, 2, 2]


def test_even_the_worst_first_value_is_kept() -> None:
    stopping = EarlyStopping(patience=1)
    assert not stopping.update(0.0, 1, [torch.ones(1)])
    assert len(stopping.weights) == 1
