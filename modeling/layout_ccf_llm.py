"""The prompt layout as pure tensor functions: who sees whom, and where a history window starts.

Many candidates of one user share one row: the prefix and the history stand there once, then one
short block per candidate. Three integers per token describe the row:

- `sequence_ids`: which packed sequence the token belongs to; -1 is padding;
- `block_ids`: 0 for prefix and history, k >= 1 for the k-th candidate block of the row;
- `history_depths`: 0 in the prefix, i in the i-th history item; in a candidate block the number of
  history items that precede its interaction in time.
"""

import torch
from torch import Tensor


def window_start(num_earlier: int, history_window: tuple[int, int]) -> int:
    """First history item that a sample with `num_earlier` earlier items sees (our choice).

    With `(H, S)` the start moves in strides of S, so that S samples in a row share one prefix;
    S = 1 is the protocol's strict last-H. The window then holds between H and H + S - 1 items.
    """
    length, stride = history_window
    return stride * (max(0, num_earlier - length) // stride)


def block_mask(sequence_ids: Tensor, block_ids: Tensor, history_depths: Tensor) -> Tensor:
    """Who may attend to whom.

    A token sees earlier tokens of its own block, and those prefix and history tokens of its
    sequence that are no deeper in history than itself; never another candidate, never a later
    history item.

    Args:
        sequence_ids, block_ids, history_depths: `(rows, length)` int.

    Returns:
        `(rows, 1, length, length)` bool, True where the query (dim 2) sees the key (dim 3). Every
        token sees itself, so no softmax runs over nothing.
    """
    length = sequence_ids.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=sequence_ids.device).tril()
    same_sequence = sequence_ids[:, :, None] == sequence_ids[:, None, :]
    same_block = block_ids[:, :, None] == block_ids[:, None, :]
    context_key = (block_ids == 0)[:, None, :]
    early_enough = history_depths[:, None, :] <= history_depths[:, :, None]
    visible = causal & same_sequence & (same_block | (context_key & early_enough))
    return visible[:, None]


def sliding_window(mask: Tensor, position_ids: Tensor, window: int) -> Tensor:
    """Narrow `mask` `(rows, 1, length, length)` to keys less than `window` *positions* back."""
    distance = position_ids[:, None, :, None] - position_ids[:, None, None, :]
    return mask & (distance < window)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool mask to the additive float form that both eager attention and sdpa take."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


__all__ = ["additive", "block_mask", "sliding_window", "window_start"]
