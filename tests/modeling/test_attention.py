"""Who sees whom in a packed row; and attention in tiles is attention under that dense mask."""

import copy
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import ARMS, BACKBONES, BuildModel
from torch.nn.attention import flex_attention
from torch.nn.functional import scaled_dot_product_attention

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.modeling import attention_ccf_llm
from ccf_llm_hf.modeling.attention_ccf_llm import (
    FLEX_ATTENTION,
    PACKED_ATTENTION,
    SHARED,
    TILE_QUERIES,
    BlockMasks,
    Layout,
    additive,
    block_mask,
    flex_compiles,
    make_tiles,
    packed_attention,
    takes_flex,
)
from ccf_llm_hf.modeling.processing_ccf_llm import Request
from ccf_llm_hf.modeling.ranking_ccf_llm import score


def row_layout(sequences: list[int], blocks: list[int], depths: list[int], positions: list[int]):
    return Layout(*map(torch.tensor, (sequences, blocks, depths, positions)))


# Tokens: instruction; prefix, history 1 and 2, candidate A (two tokens, sees one item) and B (sees
# two) of one user; prefix and candidate of another.
ROW = row_layout(
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


@st.composite
def random_layouts(draw: st.DrawFn) -> Layout:
    """Rows of users with a prefix, history items and candidate blocks of random sizes."""
    rows: list[tuple[int, int, int, int]] = [
        (SHARED, 0, 0, place) for place in range(draw(st.integers(0, 4)))
    ]
    start = len(rows)
    for sequence in range(draw(st.integers(1, 4))):
        ends = [start + draw(st.integers(0, 3))]
        rows += [(sequence, 0, 0, place) for place in range(start, ends[0])]
        for depth in range(1, draw(st.integers(0, 6)) + 1):
            ends.append(ends[-1] + draw(st.integers(1, 40)))
            rows += [(sequence, 0, depth, place) for place in range(ends[-2], ends[-1])]
        for block in range(1, draw(st.integers(1, 12)) + 1):
            depth = draw(st.integers(0, len(ends) - 1))
            size = draw(st.integers(1, 30))
            rows += [(sequence, block, depth, ends[depth] + place) for place in range(size)]
    return Layout(*torch.tensor(rows).unbind(1))


@settings(deadline=None)
@given(layout=random_layouts(), window=st.sampled_from([None, 3, 50]), data=st.data())
def test_tiles_equal_the_dense_mask(
    layout: Layout, window: int | None, data: st.DataObject
) -> None:
    length = len(layout.sequence_ids)
    first = layout.sequence_ids == layout.sequence_ids.clamp(max=0)
    context = int((first & (layout.block_ids == 0)).sum())
    cached = data.draw(st.sampled_from([0, context])) if context < length else 0
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(1, heads, length, 4, generator=generator, requires_grad=True)
        for heads in (4, 2, 2)
    )
    asking = query[:, :, cached:]
    dense = scaled_dot_product_attention(
        *(asking, key, value), attn_mask=block_mask(layout, cached, window), enable_gqa=True
    ).transpose(1, 2)
    tiled, _ = packed_attention(
        torch.nn.Identity(),
        *(asking, key, value, None),
        sliding_window=window,
        packed=make_tiles(layout, cached),
    )
    torch.testing.assert_close(tiled, dense, atol=1e-5, rtol=1e-4)
    weight = torch.randn(dense.shape, generator=generator)
    for result in (tiled, dense):
        (result * weight).sum().backward(retain_graph=True)
        gradients = [x.grad for x in (query, key, value)]
        for x in (query, key, value):
            x.grad = None
        if result is tiled:
            expected = gradients
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-3)


@pytest.fixture(scope="module")
def untraced() -> Iterator[None]:
    """FlexAttention without the tracing, which takes seconds for each length of a row."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
        yield


@pytest.mark.usefixtures("untraced")
@settings(deadline=None, max_examples=15)
@given(layout=random_layouts(), window=st.sampled_from([None, 50]), cached=st.booleans())
def test_flex_attention_equals_the_dense_mask(
    layout: Layout, window: int | None, cached: bool
) -> None:
    length = len(layout.sequence_ids)
    same_by_flex(layout, window, length // 3 if cached else 0)


def test_flex_attention_can_be_traced() -> None:
    same_by_flex(ROW, 3, 2)


def same_by_flex(layout: Layout, window: int | None, cached: int) -> None:
    length = len(layout.sequence_ids)
    generator = torch.Generator().manual_seed(length)
    query, key, value = (
        torch.randn(1, heads, length, 4, generator=generator) for heads in (4, 2, 2)
    )
    asking = query[:, :, cached:]
    dense = scaled_dot_product_attention(
        *(asking, key, value), attn_mask=block_mask(layout, cached, window), enable_gqa=True
    ).transpose(1, 2)
    flex, _ = packed_attention(
        torch.nn.Identity(),
        *(asking, key, value, None),
        sliding_window=window,
        packed=BlockMasks(layout, cached),
    )
    torch.testing.assert_close(flex, dense, atol=1e-5, rtol=1e-4)


@settings(deadline=None)
@given(layout=random_layouts())
def test_every_token_asks_once_and_tiles_stay_small(layout: Layout) -> None:
    tiles = make_tiles(layout)
    answers = torch.cat([batch.queries.flatten() for batch in tiles.batches])
    assert torch.equal(answers[tiles.places], torch.arange(len(layout.sequence_ids)))
    context = int(((layout.block_ids == 0) & (layout.sequence_ids != SHARED)).sum())
    assert all(batch.queries.shape[1] <= max(TILE_QUERIES, context) for batch in tiles.batches)


@pytest.mark.parametrize(("asked", "used"), [("sdpa", PACKED_ATTENTION), ("eager", "eager")])
def test_sdpa_means_packed_attention_and_eager_stays(
    build: BuildModel, asked: str, used: str
) -> None:
    model, _ = build(attn=asked)
    assert model.language_model.config._attn_implementation == used


@pytest.mark.parametrize("backbone", BACKBONES)
def test_a_backbone_on_its_own_attends_as_usual(build: BuildModel, backbone: str) -> None:
    model, _ = build(backbone=backbone)
    plain = copy.deepcopy(model.language_model)
    plain.set_attn_implementation("eager")
    mask = torch.tensor([[1] * 14, [0] * 3 + [1] * 11])
    call = {"input_ids": torch.arange(28).view(2, 14), "attention_mask": mask}
    with torch.no_grad():
        found, expected = (m(**call).last_hidden_state for m in (model.language_model, plain))
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=1e-4)


HISTORY = ["i1", "i2", "i7", "i0", "i6"]
REQUESTS = {
    "user": ["u0", "stranger"],
    "history": [HISTORY, HISTORY[:2]],
    "candidates": [["i0", "i3", "i7", "i4", "A new film (2024)", "i5"], ["i0", "i3"]],
    "history_lengths": [[0, 2, 2, 3, 5, 5], [1, 2]],
}


def same_scores_by_flex(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> None:
    """Logits by FlexAttention are those by tiles, and those of a dense mask."""
    batch = processor(**REQUESTS)
    with torch.no_grad():
        tiles = model(**batch).logits
        assert tiles[0].std() > 1e-3
        for name in (FLEX_ATTENTION, "sdpa"):
            model.language_model.set_attn_implementation(name)
            torch.testing.assert_close(model(**batch).logits, tiles, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("wording", ["shared_prefix", "question_last"])
@pytest.mark.parametrize("arm", ARMS)
def test_flex_attention_scores_as_tiles_for_every_arm(
    build: BuildModel, arm: str, wording: str
) -> None:
    same_scores_by_flex(*build(arm, wording))


@pytest.mark.usefixtures("untraced")
@pytest.mark.parametrize("wording", ["shared_prefix", "question_last"])
@pytest.mark.parametrize("backbone", BACKBONES)
def test_flex_attention_scores_as_tiles_for_every_backbone(
    build: BuildModel, backbone: str, wording: str
) -> None:
    same_scores_by_flex(*build(wording=wording, backbone=backbone, lora=True))


@pytest.mark.usefixtures("untraced")
def test_a_long_row_goes_through_flex_attention_in_parts(build: BuildModel) -> None:
    model, processor = build()
    request = Request("u0", HISTORY, [f"i{row}" for row in range(8)] * 4)
    (whole,) = score(model, processor, [request])
    model.language_model.set_attn_implementation(FLEX_ATTENTION)
    (parts,) = score(model, processor, [request], tokens_per_batch=40)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-4)


def test_the_kernel_is_for_gpus_alone_and_what_does_not_compile_falls_back(
    build: BuildModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not flex_compiles(torch.device("cpu"), 64)
    config = build()[0].language_model.config
    here = torch.device("cpu")
    monkeypatch.setattr(attention_ccf_llm, "flex_compiles", lambda device, width: True)
    assert takes_flex(config, here, cached=0)
    assert not takes_flex(config, here, cached=3)  # one user's row
    config.attention_dropout = 0.1
    assert not takes_flex(config, here, cached=0)
    monkeypatch.setattr(attention_ccf_llm, "flex_compiles", lambda device, width: False)
    config.attention_dropout = 0.0
    assert not takes_flex(config, here, cached=0)
