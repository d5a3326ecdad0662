"""Who sees whom in a packed row."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from ccf_llm_hf.modeling.attention_ccf_llm import SHARED, Layout, additive, block_mask, window_start


def layout(sequences: list[int], blocks: list[int], depths: list[int], positions: list[int]):
    return Layout(*map(torch.tensor, (sequences, blocks, depths, positions)))


# Tokens: instruction; prefix, history 1 and 2, candidate A (two tokens, sees one item) and B (sees
# two) of one user; prefix and candidate of another.
ROW = layout(
    [SHARED, 0, 0, 0, 0, 0, 0, 1, 1],
    [0, 0, 0, 0, 1, 1, 2, 0, 1],
    [0, 0, 1, 2, 1, 1, 2, 0, 0],
    [0, 1, 2, 3, 3, 4, 4, 1, 2],
)
SEEN = [
    *([0], [0, 1], [0, 1, 2], [0, 1, 2, 3]),
    *([0, 1, 2, 4], [0, 1, 2, 4, 5], [0, 1, 2, 3, 6]),
    *([0, 7], [0, 7, 8]),
]


def seen_by(mask: torch.Tensor) -> list[list[int]]:
    return [keys.nonzero().flatten().tolist() for keys in mask[0, 0]]


def test_a_token_sees_instruction_earlier_history_and_its_own_block_only() -> None:
    assert seen_by(block_mask(ROW)) == SEEN


def test_cached_tokens_ask_nothing() -> None:
    assert seen_by(block_mask(ROW, cached=4)) == SEEN[4:]


def test_sliding_windows_count_positions_not_columns() -> None:
    # Candidate B stands six columns on but at position 4: it sees positions 3 and 4.
    assert seen_by(block_mask(ROW, window=2))[6] == [3, 6]


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
