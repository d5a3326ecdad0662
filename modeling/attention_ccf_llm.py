"""Attention of packed rows: who sees whom, and how that is computed exactly.

A batch is one flat row of tokens without padding. The instruction stands there once, for everybody;
then each user's sequence: prefix and history once, and one short block per candidate. Three
integers per token describe the row:

- `sequence_ids`: which sequence the token belongs to; `SHARED` is the instruction;
- `block_ids`: 0 for prefix and history, k >= 1 for the k-th candidate block of the sequence; where
  blocks begin alike, `g * GROUP` is what group g shares, and `g * GROUP + k` the rest of block k;
- `history_depths`: 0 in the prefix, i in the i-th history item; in a candidate block the number of
  history items that precede its interaction in time. So it is in the lines of a stream, where only
  the answer counts its own line.

`visible` is the one rule. A row of a thousand tokens holds some twenty users who do not see each
other, so a dense mask throws nearly all of the attention away. On a GPU, FlexAttention compiles the
rule into its kernel and passes over what is all masked. Elsewhere, and where that kernel does not
compile, attention runs in *tiles*: a run of queries of one user with the keys that they may see,
instruction, the user's prefix and history, and the queries' own blocks. Tiles of similar size are
attended to in one call each; every linear layer still works on the whole row. A backbone that can
do neither takes a dense mask.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.utils import logging

logger = logging.get_logger(__name__)

SHARED = -1
GROUP = 2**20  # more than a sequence has candidates
# Names of attention, as transformers chooses them: ours takes one of the other two.
PACKED_ATTENTION = "ccf_llm"
TILED_ATTENTION = "ccf_llm_tiles"
FLEX_ATTENTION = "ccf_llm_flex"
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
    query: Layout,
    key: Layout,
    query_columns: Tensor,
    key_columns: Tensor,
    window: Tensor | int | None,
) -> Tensor:
    """Who may attend to whom.

    A token sees the instruction, earlier tokens of its own block, what its block shares with those
    of its group, and those prefix and history tokens of its sequence that are no deeper in history
    than itself; never another candidate, never a later history item, never another sequence.

    Args:
        query, key: layouts of tokens, of shapes that broadcast: `(queries, 1)` and `(keys,)` give
            all pairs, two scalars one.
        query_columns, key_columns: their columns in the row, of the same shapes.
        window: sliding window of the layer, counted in *positions*, or None.

    Returns:
        Bool. Every token sees itself, so no softmax runs over nothing.
    """
    block = query.block_ids
    own = (query.sequence_ids == key.sequence_ids) & (
        (key.block_ids == block)
        | (
            ((key.block_ids == 0) | (key.block_ids == block - block % GROUP))
            & (key.history_depths <= query.history_depths)
        )
    )
    seen = (own | (key.sequence_ids == SHARED)) & (key_columns <= query_columns)
    if window is not None:
        seen = seen & (query.position_ids - key.position_ids < window)
    return seen


def block_mask(layout: Layout, cached: int = 0, window: int | None = None) -> Tensor:
    """`visible` for a whole row: `(1, 1, length - cached, length)` bool, True where seen.

    Args:
        layout: of the whole row, `(length,)`.
        cached: leading tokens whose keys are in the cache already, so that they ask nothing.
        window: see `visible`.
    """
    columns = torch.arange(len(layout.sequence_ids), device=layout.sequence_ids.device)
    asking = columns[cached:, None]
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
            queries, keys = self.queries[..., None], self.keys[:, None]
            query, key = self.layout.at(queries), self.layout.at(keys)
            seen = visible(query, key, queries, keys, window) & self.real_keys[:, None]
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
        starts: dict[int, list[int]] = {}  # of the groups
        held: set[int] = set()  # groups whose start is among the keys
        for _, block, columns in runs:
            group, rest = divmod(block, GROUP)
            if block == 0:
                context += columns
            elif queries and len(queries) + len(columns) > TILE_QUERIES:
                tiles.append((queries, [*shared, *context, *keys]))
                queries, keys = [], []
                held = set()
            if block and not rest:
                starts[group] = columns
                if columns[0] < cached:
                    continue
            if group and group not in held:
                held.add(group)
                keys += starts[group]
            if rest:
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


class BlockMasks:
    """The rule in FlexAttention's form: `visible` itself, and which blocks of 128 by 128 tokens it
    leaves anything of.

    Args:
        layout: of the whole row, `(length,)`.
        cached: leading tokens whose keys are in the cache already.
    """

    def __init__(self, layout: Layout, cached: int = 0) -> None:
        self.layout = layout
        self.cached = cached
        self._masks: dict[int | None, BlockMask] = {}

    def mask(self, window: int | None) -> BlockMask:
        """Made once for all layers with the same window."""
        if window not in self._masks:
            layout, device = self.layout, self.layout.sequence_ids.device
            columns = torch.arange(len(layout.sequence_ids), device=device)
            asking = columns[self.cached :]
            # As tensors, because numbers would be compiled in.
            width = None if window is None else torch.tensor(window, device=device)

            def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
                column = asking[query]
                return visible(layout.at(column), layout.at(key), column, columns[key], width)

            self._masks[window] = create_block_mask(
                rule, None, None, len(asking), len(columns), device=device
            )
        return self._masks[window]


@cache
def compiled_flex() -> Any:
    """FlexAttention's kernel, for rows of any length."""
    return torch.compile(flex_attention, dynamic=True)


@cache
def flex_compiles(device: torch.device, width: int) -> bool:
    """Whether FlexAttention's kernel can be had for heads of this width: it wants a GPU, Triton, a
    C compiler, and no narrow heads."""
    if device.type != "cuda":
        return False
    probe = torch.zeros(1, 1, 128, width, device=device, requires_grad=True)
    ids = torch.zeros(128, dtype=torch.long, device=device)
    try:
        with torch.enable_grad():
            mask = BlockMasks(Layout(ids, ids, ids, ids)).mask(None)
            compiled_flex()(probe, probe, probe, block_mask=mask).sum().backward()
    except Exception as problem:  # whatever the compilers say
        logger.warning("FlexAttention does not compile here, sdpa is used: %s", problem)
        return False
    return True


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed: Tiles | BlockMasks | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a packed row, as transformers calls it.

    Args:
        query: `(1, heads, new tokens, head_dim)`.
        key, value: `(1, key-value heads, length, head_dim)`, cached tokens first.
        attention_mask: used only without `packed`, when the backbone is called on its own: then
            this is plain sdpa.

    Returns:
        `(1, new tokens, heads, head_dim)`, and no attention weights.
    """
    if packed is None:
        return sdpa_attention_forward(
            *(module, query, key, value, attention_mask),
            dropout=dropout,
            scaling=scaling,
            sliding_window=sliding_window,
            **kwargs,
        )
    # By what it holds, not by its class: the package and the code of a checkpoint that was loaded
    # in the same process share one name in transformers' registry, and have classes of their own.
    rows: Any = packed
    if hasattr(rows, "batches"):
        return tiled_attention(query, key, value, rows, dropout, scaling, sliding_window), None
    flex = flex_attention if query.device.type == "cpu" else compiled_flex()
    attended = flex(
        *(query, key, value),
        block_mask=rows.mask(sliding_window),
        scale=scaling,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return attended.transpose(1, 2), None


def tiled_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    tiles: Tiles,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """As `packed_attention`, in tiles."""
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
    return torch.cat(answers).index_select(0, tiles.places)[None].to(dtype)


def use_packed_attention(backbone: PreTrainedModel) -> None:
    """Let a backbone whose attention is sdpa, transformers' default, attend to packed rows.

    Another choice, such as eager, stays, and then takes a dense mask. So does a backbone that caps
    its attention logits, which sdpa cannot do.
    """
    config = backbone.config
    if (
        config._attn_implementation == "sdpa"
        and backbone._supports_attention_backend
        and not getattr(config, "attn_logit_softcapping", None)
    ):
        backbone.set_attn_implementation(PACKED_ATTENTION)


def takes_flex(config: PreTrainedConfig, device: torch.device, cached: int) -> bool:
    """Whether a packed row goes through FlexAttention, which knows no dropout. A row on cached keys
    is of one user, and one tile as good."""
    if config._attn_implementation == FLEX_ATTENTION:
        return True
    dropout = any(getattr(config, name, 0) for name in ("attention_dropout", "attn_pdrop"))
    if config._attn_implementation == TILED_ATTENTION or cached or dropout:
        return False
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return flex_compiles(device, width)


def attention_inputs(
    config: PreTrainedConfig, layout: Layout, cached: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Who sees whom, in the form that the backbone's attention takes: FlexAttention's, tiles, or a
    dense mask.

    Sliding windows count in positions, so that packing does not narrow them. `config` is that of
    the backbone.
    """
    if config._attn_implementation in (PACKED_ATTENTION, TILED_ATTENTION, FLEX_ATTENTION):
        device = layout.block_ids.device
        flex = takes_flex(config, device, cached)
        packed = BlockMasks(layout, cached) if flex else make_tiles(layout, cached)
        # Any four-dimensional mask keeps transformers from making one over the whole row.
        unused = torch.zeros(1, 1, 1, 1, dtype=dtype, device=device)
        return {"attention_mask": unused, "packed": packed}
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


for name in (PACKED_ATTENTION, TILED_ATTENTION, FLEX_ATTENTION):
    AttentionInterface.register(name, packed_attention)
    AttentionMaskInterface.register(name, sdpa_mask)

__all__ = [
    "BlockMasks",
    "Layout",
    "attention_inputs",
    "make_tiles",
    "packed_attention",
    "use_packed_attention",
    "visible",
]
