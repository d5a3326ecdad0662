"""Attention of packed rows: who sees whom, and how that is computed exactly.

A batch is one flat row of tokens without padding. The instruction stands there once, for everybody;
then each user's sequence: prefix and history once, and one short block per candidate. Three
integers per token describe the row:

- `sequence_ids`: which sequence the token belongs to; `SHARED` is the instruction;
- `block_ids`: 0 for prefix and history, k >= 1 for the k-th candidate block of the sequence;
- `history_depths`: 0 in the prefix, i in the i-th history item; in a candidate block the number of
  history items that precede its interaction in time. So it is in the lines of a stream, where only
  the answer counts its own line.

`visible` is the one rule. It is computed as a dense mask or in *tiles*: a row of a thousand tokens
holds some twenty users who do not see each other, so a dense mask throws nearly all of the
attention away. A tile is a run of queries of one user with the keys that they may see: instruction,
the user's prefix and history, and the queries' own blocks. Tiles of similar size are attended to in
one call each; every linear layer still works on the whole row.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

SHARED = -1
TILED_ATTENTION = "ccf_llm_tiles"
TILE_QUERIES = 64  # our choice; larger and smaller tiles did not pay on two cores
Tile = tuple[list[int], list[int]]  # columns of the queries, columns of the keys
Run = tuple[int, int, list[int]]  # sequence, block, columns


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


class TileBatch:
    """Tiles of similar size: columns of their queries `(tiles, q)` and keys `(tiles, k)`.

    Short tiles repeat their first query, whose extra answers nobody reads, and their first key,
    which nobody sees twice.
    """

    def __init__(self, tiles: list[Tile], layout: Layout) -> None:
        self.layout = layout
        device = layout.sequence_ids.device
        queries, keys = (max(len(tile[side]) for tile in tiles) for side in (0, 1))
        padded = [[t[0] + t[0][:1] * (queries - len(t[0])) for t in tiles]]
        padded += [[t[1] + t[1][:1] * (keys - len(t[1])) for t in tiles]]
        self.queries, self.keys = (torch.tensor(columns, device=device) for columns in padded)
        lengths = torch.tensor([len(tile[1]) for tile in tiles], device=device)
        self.real_keys = torch.arange(keys, device=device) < lengths[:, None]
        self._masks: dict[tuple[int | None, torch.dtype], Tensor] = {}

    def mask(self, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask `(tiles, 1, q, k)`, made once for all layers with the same window."""
        if (window, dtype) not in self._masks:
            query, key = self.layout.at(self.queries), self.layout.at(self.keys)
            seen = visible(query, key, self.queries, self.keys, window) & self.real_keys[:, None]
            self._masks[window, dtype] = additive(seen[:, None], dtype)
        return self._masks[window, dtype]


@dataclass
class Tiles:
    """The tiles of one row. `places` `(new tokens,)` says where each token's answer stands when the
    queries of all batches are written one after the other; `cached` tokens ask nothing."""

    batches: list[TileBatch]
    places: Tensor
    cached: int


def make_tiles(layout: Layout, cached: int = 0) -> Tiles:
    """Cut a row into tiles.

    Args:
        layout: of the whole row, `(length,)`; what a token may see stands before it.
        cached: leading tokens whose keys are in the cache already.
    """
    groups: list[list[Tile]] = []
    for tile in sorted(_cut(layout, cached), key=_size, reverse=True):
        if groups and _alike(groups[-1][0], tile):
            groups[-1].append(tile)
        else:
            groups.append([tile])
    batches = [TileBatch(group, layout) for group in groups]
    places = torch.empty(len(layout.sequence_ids) - cached, dtype=torch.long)
    start = 0
    for group, batch in zip(groups, batches, strict=True):
        width = batch.queries.shape[1]
        for row, (queries, _) in enumerate(group):
            first = start + row * width
            places[torch.tensor(queries) - cached] = torch.arange(first, first + len(queries))
        start += batch.queries.numel()
    return Tiles(batches, places.to(layout.sequence_ids.device), cached)


def _size(tile: Tile) -> tuple[int, int]:
    return len(tile[1]), len(tile[0])


def _alike(largest: Tile, tile: Tile) -> bool:
    """Whether padding `tile` to the size of the batch's largest wastes little."""
    (most_keys, most_queries), (keys, queries) = _size(largest), _size(tile)
    return 3 * keys >= 2 * most_keys and most_queries <= 2 * queries <= 3 * most_queries


def _cut(layout: Layout, cached: int) -> list[Tile]:
    """Columns of queries and keys of every tile; each new token is a query once."""
    tiles: list[Tile] = []
    sequences: dict[int, list[Run]] = {SHARED: []}
    for run in _runs(layout):
        sequences.setdefault(run[0], []).append(run)
    shared: list[int] = []
    for sequence, runs in sequences.items():
        context: list[int] = []
        queries: list[int] = []
        keys: list[int] = []
        for _, block, columns in runs:
            if block == 0:
                context += columns
            elif queries and len(queries) + len(columns) > TILE_QUERIES:
                tiles.append((queries, [*shared, *context, *keys]))
                queries, keys = [], []
            if block:
                keys += columns
            queries += [column for column in columns if column >= cached]
        if queries:
            tiles.append((queries, [*shared, *context, *keys]))
        if sequence == SHARED:
            shared = context
    return tiles


def _runs(layout: Layout) -> list[Run]:
    """Every run of tokens of one block, in the order of the row."""
    kinds = torch.stack([layout.sequence_ids, layout.block_ids])
    kinds, counts = torch.unique_consecutive(kinds, dim=1, return_counts=True)
    ends = counts.cumsum(0).tolist()
    return [
        (sequence, block, list(range(end - count, end)))
        for (sequence, block), count, end in zip(
            kinds.T.tolist(), counts.tolist(), ends, strict=True
        )
    ]


def tiled_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    tiles: Tiles | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over `tiles`, as transformers calls it.

    Args:
        query: `(1, heads, new tokens, head_dim)`.
        key, value: `(1, key-value heads, length, head_dim)`, cached tokens first.
        attention_mask: used only without tiles, when the backbone is called on its own: then this
            is plain sdpa.

    Returns:
        `(1, new tokens, heads, head_dim)`, and no attention weights.
    """
    if tiles is None:
        return sdpa_attention_forward(
            *(module, query, key, value, attention_mask),
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    dtype = query.dtype
    # On a CPU the backward pass of attention in half precision takes several times as long.
    working = torch.float32 if query.device.type == "cpu" else dtype
    # (1, heads, length, head_dim) -> (length, heads, head_dim): a token's states are one row.
    query, key, value = (states[0].transpose(0, 1).to(working) for states in (query, key, value))
    asking = [batch.queries.flatten() - tiles.cached for batch in tiles.batches]
    seen = [batch.keys.flatten() for batch in tiles.batches]
    # One index_select for all tiles: its backward pass, which writes a whole row, then runs once.
    parts = zip(
        tiles.batches,
        query.index_select(0, torch.cat(asking)).split([len(part) for part in asking]),
        key.index_select(0, torch.cat(seen)).split([len(part) for part in seen]),
        value.index_select(0, torch.cat(seen)).split([len(part) for part in seen]),
        strict=True,
    )
    answers = []
    for batch, queries, keys, values in parts:
        # (tiles * q, heads, head_dim) -> (tiles, heads, q, head_dim), keys and values with k for q
        attended = F.scaled_dot_product_attention(
            queries.unflatten(0, batch.queries.shape).transpose(1, 2),
            keys.unflatten(0, batch.keys.shape).transpose(1, 2),
            values.unflatten(0, batch.keys.shape).transpose(1, 2),
            attn_mask=batch.mask(sliding_window, working),
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        answers.append(attended.transpose(1, 2).flatten(0, 1))  # (tiles * q, heads, head_dim)
    return torch.cat(answers).index_select(0, tiles.places)[None].to(dtype), None


def use_tiles(backbone: PreTrainedModel) -> None:
    """Let a backbone whose attention is sdpa, transformers' default, attend in tiles.

    Another choice, such as eager, stays, and then takes a dense mask. So does a backbone that caps
    its attention logits, which sdpa cannot do.
    """
    config = backbone.config
    if (
        config._attn_implementation == "sdpa"
        and backbone._supports_attention_backend
        and not getattr(config, "attn_logit_softcapping", None)
    ):
        backbone.set_attn_implementation(TILED_ATTENTION)


def attention_inputs(
    config: PreTrainedConfig, layout: Layout, cached: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Who sees whom, in the form that the backbone's attention takes: tiles, or a mask.

    Sliding windows count in positions, so that packing does not narrow them. `config` is that of
    the backbone.
    """
    if config._attn_implementation == TILED_ATTENTION:
        # Any four-dimensional mask keeps transformers from making one over the whole row.
        unused = torch.zeros(1, 1, 1, 1, dtype=dtype, device=layout.block_ids.device)
        return {"attention_mask": unused, "tiles": make_tiles(layout, cached)}
    window = getattr(config, "sliding_window", None)
    kinds = set(getattr(config, "layer_types", None) or [])
    if (
        not window
        or kinds == {"full_attention"}
        or getattr(config, "use_sliding_window", 1) is False
    ):
        return {"attention_mask": additive(block_mask(layout, cached), dtype)}
    narrow = additive(block_mask(layout, cached, window), dtype)
    if not kinds:
        return {"attention_mask": narrow}
    full = additive(block_mask(layout, cached), dtype)
    return {"attention_mask": {"full_attention": full, "sliding_attention": narrow}}


AttentionInterface.register(TILED_ATTENTION, tiled_attention)
AttentionMaskInterface.register(TILED_ATTENTION, sdpa_mask)

__all__ = ["Layout", "attention_inputs", "make_tiles", "tiled_attention", "use_tiles", "visible"]
