"""Keys and values kept between requests: the same scores, of fewer tokens."""

import copy
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import ARMS, BACKBONES, BuildModel, inject_lora

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.modeling.processing_ccf_llm import Request
from ccf_llm_hf.modeling.ranking_ccf_llm import PrefixCache, rank, score

SIGNED = {"histories": "signed", "history_window": (5, 9), "fold_in_items": 2}
FOLDED = {"cf_logit": True, "cf_fold_in": True}
NEW = {"title": "A new film (2024)"}
OTHER_NEW = {"title": "Another one"}
LINES: list[Any] = ["i0", {"id": "i1", "liked": False}, NEW, "i2", "i6", "i7"]
CANDIDATES: list[Any] = ["i3", OTHER_NEW, "i4", NEW, "i5"]


@pytest.fixture
def cf(cf: CFVectors) -> CFVectors:
    cf.item_vectors /= 3
    precision = [1.0, 2.0, 0.5, 1.5, 3.0, 0.0]
    return replace(cf, metadata={"user_precision": json.dumps(precision)})


def asked(lines: int = 4, user: str | None = "u0", candidates: list[Any] = CANDIDATES) -> Request:
    return Request(user, LINES[:lines], candidates)


@contextmanager
def counting(model: CCFLLMForCTR) -> Iterator[list[int]]:
    """Tokens of each pass through the backbone."""
    tokens: list[int] = []

    def note(module: Any, args: Any, kwargs: Any) -> None:
        if "inputs_embeds" in kwargs:  # a reading of items' words has ids
            tokens.append(kwargs["inputs_embeds"].shape[1])

    handle = model.language_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield tokens
    finally:
        handle.remove()


def check(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    prefixes: PrefixCache,
    *requests: Request,
    **options: Any,
) -> int:
    """Scores with the cache equal those without; returns the tokens that the backbone read."""
    expected = score(model, processor, requests)
    with counting(model) as tokens:
        found = score(model, processor, requests, prefixes=prefixes, **options)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
    return sum(tokens)


def count(processor: CCFLLMProcessor, *requests: Request) -> int:
    """Tokens of candidates alone."""
    return int((processor.pack(requests)["block_ids"] > 0).sum())


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("wording", ["shared_prefix", "question_last", "answered"])
@pytest.mark.parametrize(
    ("arm", "backbone"),
    [*((arm, "llama") for arm in ARMS), *(("gate", backbone) for backbone in BACKBONES[1:])],
)
def test_scores_are_those_without_it(
    build: BuildModel, arm: str, backbone: str, wording: str, attn: str
) -> None:
    model, processor = build(arm, wording, backbone, lora=True, attn=attn, prompt=SIGNED, **FOLDED)
    prefixes = PrefixCache(2**24)
    first, grown, stranger = asked(), asked(6), Request(None, LINES[1:4], CANDIDATES[:2])
    whole = check(model, processor, prefixes, first)
    assert whole == processor.pack([first])["input_ids"].shape[1]
    assert check(model, processor, prefixes, first) == count(processor, first)
    # One that was read, one that has grown, and one that is new, in one pass.
    row = processor.pack([first, grown, stranger])
    sequences, blocks, depths = (
        row[name] for name in ("sequence_ids", "block_ids", "history_depths")
    )
    anew = (blocks > 0) | (sequences == 2) | ((sequences == 1) & (depths > 4))
    assert check(model, processor, prefixes, first, grown, stranger) == int(anew.sum())
    both = [grown, stranger]
    assert check(model, processor, prefixes, *both) == count(processor, *both)
    # Cut into parts, behind what is kept and behind what is not.
    assert check(model, processor, prefixes, grown, tokens_per_batch=3) == count(processor, grown)
    check(model, processor, PrefixCache(2**24), grown, tokens_per_batch=3)


def kept(build: BuildModel, **settings: Any) -> tuple[CCFLLMForCTR, CCFLLMProcessor, PrefixCache]:
    model, processor = build(**{"prompt": SIGNED, **FOLDED, **settings})
    prefixes = PrefixCache(2**24)
    check(model, processor, prefixes, asked())
    return model, processor, prefixes


def test_another_history_is_not_taken_for_the_same(build: BuildModel) -> None:
    model, processor, prefixes = kept(build)
    lines = [*LINES[:2], OTHER_NEW, LINES[3]]  # in the new item's place
    check(model, processor, prefixes, Request("u0", lines, CANDIDATES))
    check(model, processor, prefixes, Request("u0", LINES[1:4], CANDIDATES))
    check(model, processor, prefixes, Request("u1", LINES[:4], CANDIDATES))
    # A new item's number depends on the candidates before it; it is the same item.
    before = Request("u0", LINES[:4], [NEW, OTHER_NEW])
    others = Request("u2", [OTHER_NEW, NEW], ["i1"])
    check(model, processor, prefixes, others, before)


def test_a_new_item_is_told_by_its_fields_too(build: BuildModel, cf: CFVectors) -> None:
    cf.field_values = [("author", "king"), ("author", "tan")]
    cf.field_vectors = torch.randn(2, 6)
    model, processor, prefixes = kept(build)
    for author in ("King", "Tan", "nobody"):
        lines = [*LINES[:2], NEW | {"author": author}]
        check(model, processor, prefixes, Request("u0", lines, CANDIDATES))


def test_it_ends_with_the_weights_that_made_it(build: BuildModel) -> None:
    model, processor, prefixes = kept(build)
    whole = processor.pack([asked()])["input_ids"].shape[1]
    weight = next(model.language_model.parameters())

    def in_place() -> None:
        with torch.no_grad():
            weight.mul_(1.5)

    def table_in_place() -> None:
        model.cf.item_vectors.mul_(2)

    def table_replaced() -> None:
        model.cf.item_known = model.cf.item_known.clone().index_fill_(0, torch.tensor([0]), False)

    def data_replaced() -> None:
        weight.data = weight.data * 1.5

    def injected() -> None:
        inject_lora(model)

    def disabled() -> None:
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.enable_adapters(False)

    def merged() -> None:
        for module in model.modules():
            if hasattr(module, "lora_A"):
                module.enable_adapters(True)
                module.merge()

    for change in (
        in_place,
        table_in_place,
        table_replaced,
        data_replaced,
        injected,
        disabled,
        merged,
    ):
        before = score(model, processor, [asked()])[0]
        change()
        assert not torch.allclose(score(model, processor, [asked()])[0], before) or change is merged
        assert check(model, processor, prefixes, asked()) == whole, change
        assert check(model, processor, prefixes, asked()) == count(processor, asked())


def test_what_was_longest_unused_goes_first(build: BuildModel) -> None:
    model, processor, prefixes = kept(build)
    users = [asked(user=user) for user in ("u0", "u1", "u2")]
    check(model, processor, prefixes, users[1])
    room = prefixes.used_bytes  # of two users and the instruction
    prefixes = PrefixCache(room)
    for user in (*users[:2], users[0], users[2]):
        check(model, processor, prefixes, user)
        assert prefixes.used_bytes <= room
    assert check(model, processor, prefixes, users[0]) == count(processor, users[0])
    assert check(model, processor, prefixes, users[1]) > count(processor, users[1])
    prefixes.clear()
    assert prefixes.used_bytes == 0
    assert copy.deepcopy(prefixes).max_bytes == room
    none = PrefixCache(0)
    check(model, processor, none, users[0])
    assert check(model, processor, none, users[0]) > count(processor, users[0])


def test_a_history_that_grows_takes_the_place_of_its_start(build: BuildModel) -> None:
    model, processor, prefixes = kept(build)
    sizes = []
    for lines in (4, 5, 6):
        check(model, processor, prefixes, asked(lines))
        sizes.append(len(prefixes._kept))
    assert sizes == [2, 2, 2], "the instruction, and one user"
    # Its start is found in it.
    assert check(model, processor, prefixes, asked(5)) == count(processor, asked(5))


def test_streams_are_scored_as_ever(build: BuildModel) -> None:
    model, processor = build("concat", "answered", prompt=SIGNED, **FOLDED)
    stream = Request("u0", LINES, stream=True)
    check(model, processor, PrefixCache(2**24), stream, asked())


def test_ranked_lists_are_the_same(build: BuildModel) -> None:
    model, processor, prefixes = kept(build)
    for _ in "12":
        found = rank(model, processor, [asked()], prefixes=prefixes)[0]
        for one, other in zip(found, rank(model, processor, [asked()])[0], strict=True):
            assert one.title == other.title
            assert one.logit == pytest.approx(other.logit, abs=1e-4)


def test_threads_share_one(build: BuildModel) -> None:
    model, processor, prefixes = kept(build)
    prefixes.max_bytes = prefixes.used_bytes * 3  # so that what one keeps another may drop
    requests = [
        Request(f"u{user}", LINES[:lines], CANDIDATES[::2]) for user in range(5) for lines in (2, 4)
    ]
    expected = score(model, processor, requests)
    wrong: list[str] = []

    def ask(seed: int) -> None:
        order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(seed))
        for place in order.repeat(4).tolist():
            (found,) = score(model, processor, [requests[place]], prefixes=prefixes)
            if not torch.allclose(found, expected[place], atol=1e-4):
                wrong.append(f"{seed}: {place}")

    threads = [threading.Thread(target=ask, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
