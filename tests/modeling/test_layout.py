"""Who sees whom in a packed row."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ccf_llm_hf.modeling.layout_ccf_llm import additive, block_mask, sliding_window, window_start


def row(*values: int) -> torch.Tensor:
    return torch.tensor([values])


def test_candidate_sees_prefix_earlier_history_and_itself_only() -> None:
    # tokens: prefix, history 1, history 2, candidate A (two tokens, sees 1 item), B (sees 2)
    mask = block_mask(
        row(0, 0, 0, 0, 0, 0, -1), row(0, 0, 0, 1, 1, 2, 0), row(0, 1, 2, 1, 1, 2, 0)
    )[0, 0]
    seen = [mask[query].nonzero().flatten().tolist() for query in range(7)]
    assert seen == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [0, 1, 2, 5], [6]]


def test_sequences_in_one_row_do_not_meet() -> None:
    mask = block_mask(row(0, 0, 1, 1), row(0, 0, 0, 0), row(0, 0, 0, 0))[0, 0]
    assert mask.tolist() == [
        [True, False, False, False],
        [True, True, False, False],
        [False, False, True, False],
        [False, False, True, True],
    ]


def test_sliding_window_counts_positions_not_columns() -> None:
    mask = torch.ones(1, 1, 3, 3, dtype=torch.bool).tril()
    narrow = sliding_window(mask, row(0, 1, 1), window=1)
    assert narrow[0, 0].tolist() == [
        [True, False, False],
        [False, True, False],
        [False, True, True],
    ]


def test_additive_form() -> None:
    values = additive(torch.tensor([[True, False]]), torch.float32)
    assert values.tolist() == [[0.0, torch.finfo(torch.float32).min]]


@given(n=st.integers(0, 500), length=st.integers(0, 50), stride=st.integers(1, 40))
def test_windows_are_anchored(n: int, length: int, stride: int) -> None:
    start = window_start(n, (length, stride))
    assert start % stride == 0
    if n <= length:
        assert start == 0
    else:
        assert length <= n - start < length + stride
