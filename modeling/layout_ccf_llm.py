"""The prompt layout as pure tensor functions: who sees whom, and where a history window starts.

A batch is one flat row of tokens without padding. The instruction stands there once, for everybody;
then each user's sequence: prefix and history once, and one short block per candidate. Three
integers per token describe the row:

- `sequence_ids`: which sequence the token belongs to; `SHARED` is the instruction;
- `block_ids`: 0 for prefix and history, k >= 1 for the k-th candidate block of the sequence;
- `history_depths`: 0 in the prefix, i in the i-th history item; in a candidate block the number of
  history items that precede its interaction in time.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SHARED = -1


@dataclass
class Layout:
    """The three integers and the position id of each token, all of one shape."""

    sequence_ids: Tensor
    block_ids: Tensor
    history_depths: Tensor
    position_ids: Tensor

    def at(self, columns: Tensor) -> "Layout":
        """The layout of chosen tokens of a `(length,)` layout, in the shape of `columns`."""
        return Layout(
            self.sequence_ids[columns],
            self.block_ids[columns],
            self.history_depths[columns],
            self.position_ids[columns],
        )


def window_start(num_earlier: int, history_window: tuple[int, int]) -> int:
    """First history item that a sample with `num_earlier` earlier items sees (our choice).

    With `(H, S)` the start moves in strides of S, so that S samples in a row share one prefix;
    S = 1 is the protocol's strict last-H. The window then holds between H and H + S - 1 items.
    """
    length, stride = history_window
    return stride * (max(0, num_earlier - length) // stride)


def visible(
    query: Layout, key: Layout, query_columns: Tensor, key_columns: Tensor, window: int | None
) -> Tensor:
    """Who may attend to whom.

    A token sees the instruction, earlier tokens of its own block, and those prefix and history
    tokens of its sequence that are no deeper in history than itself; never another candidate, never
    a later history item, never another sequence.

    Args:
        query, key: layouts `(..., queries)` and `(..., keys)`.
        query_columns, key_columns: their columns in the row, of the same shapes.
        window: sliding window of the layer, counted in *positions*, or None.

    Returns:
        `(..., queries, keys)` bool. Every token sees itself, so no softmax runs over nothing.
    """

    def pair(name: str) -> tuple[Tensor, Tensor]:
        return getattr(query, name).unsqueeze(-1), getattr(key, name).unsqueeze(-2)

    (q_sequence, k_sequence), (q_block, k_block) = pair("sequence_ids"), pair("block_ids")
    q_depth, k_depth = pair("history_depths")
    own = (q_sequence == k_sequence) & (
        (q_block == k_block) | ((k_block == 0) & (k_depth <= q_depth))
    )
    seen = (own | (k_sequence == SHARED)) & (
        key_columns.unsqueeze(-2) <= query_columns.unsqueeze(-1)
    )
    if window is not None:
        q_position, k_position = pair("position_ids")
        seen &= q_position - k_position < window
    return seen


def block_mask(layout: Layout, cached: int = 0, window: int | None = None) -> Tensor:
    """`visible` for a whole row: `(1, 1, length - cached, length)` bool, True where seen.

    Args:
        layout: of the whole row, `(length,)`.
        cached: leading tokens whose keys are in the cache already, so that they ask nothing.
        window: see `visible`.
    """
    columns = torch.arange(len(layout.sequence_ids), device=layout.sequence_ids.device)
    asking = columns[cached:]
    return visible(layout.at(asking), layout, asking, columns, window)[None, None]


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Bool mask to the additive float form that both eager attention and sdpa take."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


__all__ = ["SHARED", "Layout", "additive", "block_mask", "visible", "window_start"]
