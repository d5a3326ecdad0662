"""Properties of the hybrid prompt."""

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import TITLES, BuildModel, put_bos_first
from transformers import PreTrainedTokenizerFast

from ccf_llm_hf import CCFLLMProcessor
from ccf_llm_hf.modeling.processing_ccf_llm import Request, window_start
from ccf_llm_hf.modeling.prompt_ccf_llm import WORDINGS

FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
ITEMS = [f"i{row}" for row in range(len(TITLES))]
items = st.one_of(st.sampled_from(ITEMS), st.text(max_size=12).map(lambda t: {"title": t}))


def make(tokenizer: PreTrainedTokenizerFast, **settings: Any) -> CCFLLMProcessor:
    if settings.get("wording") == "answered":
        settings = {"histories": "signed", **settings}
    return CCFLLMProcessor(tokenizer, ITEMS, list(TITLES), ["u0", "u1"], **settings)


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("form", ["slot", "title_slot", "title"])
@FIXTURE
@given(history=st.lists(items, max_size=45), candidates=st.lists(items, min_size=1, max_size=5))
def test_every_item_has_its_slot_and_every_candidate_its_answer(
    tokenizer: PreTrainedTokenizerFast, wording: str, form: str, history: list, candidates: list
) -> None:
    processor = make(tokenizer, wording=wording, history_format=form, candidate_format=form)
    batch = processor(user="u1", history=history, candidates=candidates)
    window = history[window_start(len(history), (20, 16)) :]
    assert batch["input_ids"].shape[0] == 1
    assert batch["sequence_ids"].max() == 0
    written = len(window) + len(candidates)
    assert (batch["item_slots"] >= 0).sum() == (0 if form == "title" else written)
    asks_user = form != "title" and wording != "answered"
    assert (batch["user_slots"] >= 0).sum() == int(asks_user)
    slots = batch["input_ids"] == processor.item_slot_token_id
    assert torch.equal(slots, batch["item_slots"] >= 0)
    blocks = batch["block_ids"][0, batch["answer_positions"]]
    assert (blocks >= 1).all(), "an answer is read in a candidate's block"


@pytest.mark.parametrize("wording", WORDINGS)
@FIXTURE
@given(
    history=st.lists(items, max_size=6),
    candidates=st.lists(items, min_size=1, max_size=5),
    data=st.data(),
)
def test_packing_is_the_samples_alone(
    tokenizer: PreTrainedTokenizerFast,
    wording: str,
    history: list,
    candidates: list,
    data: st.DataObject,
) -> None:
    """What a candidate sees, by position, is its own prompt: tokens, positions and slots."""
    form = {"history_format": "title_slot", "candidate_format": "title_slot"}
    processor = make(tokenizer, wording=wording, **form)
    lengths = [data.draw(st.integers(0, len(history))) for _ in candidates]
    packed = processor(user="u0", history=history, candidates=candidates, history_lengths=lengths)
    for index, (item, length) in enumerate(zip(candidates, lengths, strict=True)):
        alone = processor(
            user="u0", history=history[:length], candidates=[item], history_lengths=[length]
        )
        block, depth = packed["block_ids"][0], packed["history_depths"][0]
        seen = ((block == 0) & (depth <= length)) | (block == index + 1)
        assert torch.equal(packed["input_ids"][0, seen], alone["input_ids"][0])
        assert torch.equal(packed["position_ids"][0, seen], alone["position_ids"][0])
        assert torch.equal(packed["position_ids"][0, seen], torch.arange(int(seen.sum())))


@FIXTURE
@given(candidates=st.lists(items, min_size=1, max_size=6), history=st.lists(items, max_size=9))
def test_count_tokens_is_the_row_length_without_the_instruction(
    tokenizer: PreTrainedTokenizerFast, candidates: list, history: list
) -> None:
    for form, wording in product(("slot", "title_slot", "title"), WORDINGS):
        processor = make(tokenizer, wording=wording, history_format=form, candidate_format=form)
        batch = processor(user="u0", history=history, candidates=candidates)
        request = Request("u0", history, candidates)
        row = batch["input_ids"].shape[1]
        assert processor.count_tokens(request) == row - len(processor.prompt.instruction())


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("form", ["slot", "title_slot", "title"])
def test_a_batch_begins_with_bos_once_where_the_tokenizer_puts_one(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, wording: str, form: str
) -> None:
    settings = {"wording": wording, "history_format": form, "candidate_format": form}
    call = {"user": ["u0", "u1"], "history": [["i0"], []], "candidates": [["i1", "i2"], ["i3"]]}
    tokenizer.bos_token = "<|endoftext|>"
    without = make(tokenizer, **settings)(**call)["input_ids"][0].tolist()
    assert tokenizer.bos_token_id not in without, "SmolLM2 has such a token, but never puts it"
    bos = put_bos_first(tokenizer)
    processor = make(tokenizer, **settings)
    assert processor(**call)["input_ids"][0].tolist() == [bos, *without]
    assert all(bos not in ids for ids in processor.item_title_ids())
    assert len(processor.answer_token_ids()) == 2
    processor.save_pretrained(tmp_path)
    loaded = CCFLLMProcessor.from_pretrained(tmp_path)
    assert loaded(**call)["input_ids"][0].tolist() == [bos, *without]
    assert loaded.with_catalog(["a"], ["A"], []).prompt.instruction()[0] == bos


def test_titles_that_spell_tokens_or_templates_stay_text(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    processor = make(tokenizer, history_format="title_slot", candidate_format="title_slot")
    special = tokenizer.convert_tokens_to_ids("<|im_end|>")
    candidates = ["i4", "i3", {"title": "<|ccf_item|> {item} {user}"}]
    batch = processor(user="u0", history=[], candidates=candidates)
    assert special not in batch["input_ids"][0].tolist()
    assert (batch["input_ids"] == processor.item_slot_token_id).sum() == 3
    text = tokenizer.decode(batch["input_ids"][0])
    assert "Ed Wood {item} (1994)" in text and "<|im_end|> the Movie" in text


def test_items_by_id_title_or_both(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = make(tokenizer)
    assert processor.resolve_item("i1") == (1, "Heat (1995)")
    assert processor.resolve_item("Heat (1995)") == (1, "Heat (1995)")
    assert processor.resolve_item({"id": "i1"}) == (1, "Heat (1995)")
    assert processor.resolve_item({"id": "new", "title": "Heat (1995)"}) == (1, "Heat (1995)")
    assert processor.resolve_item({"id": "new", "title": "Dune (2021)"}) == (None, "Dune (2021)")
    assert processor.resolve_item({"id": "new"}) == (None, "")
    assert processor.resolve_item("Dune (2021)") == (None, "Dune (2021)")
    with pytest.raises(ValueError, match="neither id nor title"):
        processor.resolve_item({})


def test_an_unknown_id_is_told_what_ids_look_like(
    tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    processor = CCFLLMProcessor(tokenizer, TITLES[:2], TITLES[:2], [])
    assert processor.resolve_item("1") == processor.resolve_item(1) == (None, "1")
    CCFLLMProcessor(tokenizer).resolve_item("2")
    first, second = (record.getMessage() for record in caplog.records)
    assert "'1' is no id or title of the catalog: taken as a new title" in first
    assert "(ids of this catalog look like 'Toy Story (1995)')" in first
    assert "look like" not in second, "an empty catalog has none to show"


def test_new_titles_share_one_slot_and_carry_their_tokens(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    processor = make(tokenizer)
    batch = processor(user="u0", history=["Dune"], candidates=["Dune", "Alien (1979)", "Tar"])
    assert batch["candidate_items"].tolist() == [[8, 7, 9]]
    assert batch["new_title_lengths"].tolist() == [
        len(processor.prompt.tokens(t)) for t in ("Dune", "Tar")
    ]
    assert batch["new_title_ids"].tolist() == processor.prompt.tokens(
        "Dune"
    ) + processor.prompt.tokens("Tar")


def test_integer_ids_are_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = CCFLLMProcessor(tokenizer, ["10", "11"], ["A", "B"], ["7"])
    batch = processor(user=7, history=[10], candidates=[11])
    assert batch["candidate_items"].tolist() == [[1]] and batch["candidate_users"].tolist() == [0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"candidates": []}, "candidates is empty"),
        ({"candidates": ["i0"], "labels": [1, 0]}, "labels has 2 values for 1 candidates"),
        (
            {"candidates": ["i0"], "history_lengths": [3], "history": ["i1"]},
            "history_lengths is",
        ),
        (
            {"candidates": [["i0"], ["i1"]], "user": ["u0"]},
            "user has 1 entries but candidates has 2",
        ),
        ({"candidates": [["i0"], ["i1"]], "user": "u0"}, "user must be a list"),
        (
            {"candidates": [["i0"], ["i1"]], "history": ["i1", "i2"]},
            "history is 'i1': give a list",
        ),
        ({"candidates": "i0"}, "candidates is 'i0': give a list of"),
        ({"candidates": [["i0"], ["i1"]], "labels": [[1], None]}, "for every user of the batch"),
        ({"candidates": ["i0"], "truncation": True}, r"\['truncation'\] are unknown"),
    ],
)
def test_bad_calls_name_the_mistake(
    tokenizer: PreTrainedTokenizerFast, call: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tokenizer)(**call)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"wording": "x"}, "wording='x'"),
        ({"candidate_format": "x"}, "candidate_format='x'"),
        ({"wording": "answered", "histories": "likes"}, 'needs histories="signed"'),
        ({"wording": "answered", "candidate_format": "title"}, "a candidate is the next line"),
        ({"templates": {"prefx": ""}}, "unknown entry 'prefx'"),
        ({"templates": {"candidate_slot": "no slot"}}, "must contain {item} exactly once"),
        ({"history_window": (5, 0)}, "S >= 1"),
    ],
)
def test_bad_settings_name_the_mistake(
    tokenizer: PreTrainedTokenizerFast, setting: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tokenizer, **setting)


def test_duplicate_ids_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="an id twice"):
        CCFLLMProcessor(tokenizer, ["a", "a"], ["x", "y"], [])


def test_saved_equals_loaded(tokenizer: PreTrainedTokenizerFast, tmp_path: Any) -> None:
    processor = make(tokenizer, candidate_format="title_slot", history_window=(3, 2))
    processor.save_pretrained(tmp_path)
    again = CCFLLMProcessor.from_pretrained(tmp_path)
    call = {"user": "u1", "history": ITEMS[:7], "candidates": ["i2", "<|im_end|> the Movie", "new"]}
    first, second = processor(**call), again(**call)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_changed_catalog_is_refused(tokenizer: PreTrainedTokenizerFast, tmp_path: Any) -> None:
    make(tokenizer).save_pretrained(tmp_path)
    catalog = tmp_path / "item_catalog.jsonl"
    lines = catalog.read_text().splitlines()
    catalog.write_text("\n".join([lines[1], lines[0], *lines[2:]]) + "\n")
    with pytest.raises(OSError, match=r"item_catalog\.jsonl"):
        CCFLLMProcessor.from_pretrained(tmp_path)
    catalog.write_text("not json\n")
    with pytest.raises(ValueError, match="line 1"):
        CCFLLMProcessor.from_pretrained(tmp_path)


def test_years_can_be_left_out_of_the_prompt_and_stay_in_what_the_gate_reads(
    build: BuildModel, tmp_path: Path
) -> None:
    forms = {"candidate_format": "title_slot", "history_format": "title", "title_years": False}
    _, built = build()
    processor = CCFLLMProcessor(
        built.tokenizer, built.item_ids, built.item_titles, built.user_ids, **forms
    )
    batch = processor(user="u0", history=["i0", "1984 (1984) (1956)"], candidates=["i1"])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert "Toy Story\n1984 (1984)" in text
    assert "(1956)" not in text and "Heat" in text and "(1995)" not in text
    assert processor.item_title_ids() == built.item_title_ids()
    processor.save_pretrained(tmp_path)
    assert CCFLLMProcessor.from_pretrained(tmp_path).title_years is False


@given(n=st.integers(0, 500), length=st.integers(0, 50), stride=st.integers(1, 40))
def test_windows_are_anchored(n: int, length: int, stride: int) -> None:
    start = window_start(n, (length, stride))
    assert start % stride == 0
    if n <= length:
        assert start == 0
    else:
        assert length <= n - start < length + stride
    both = window_start(np.array([n, 0]), (length, stride))
    assert both.tolist() == [start, 0], "the rule is the same for arrays"


AUTHORS = [{"author": f"Author {row}"} for row in range(len(TITLES) - 1)] + [{}]
BY = {
    "item_template": "{title} by {author}",
    "candidate_format": "title",
    "history_format": "title",
}


def test_an_items_fields_stand_in_the_prompt_and_in_what_a_gate_reads(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    processor = make(tokenizer, **BY, item_fields=AUTHORS)
    new = {"title": "A new book", "author": ["One", "Two"]}
    call = {"user": "u0", "history": ["i1", "i7"], "candidates": ["i0", new]}
    text = tokenizer.decode(processor(**call)["input_ids"][0])
    for words in ("Heat (1995) by Author 1", "Alien (1979)?", "A new book by One, Two?"):
        assert words.removesuffix("?") in text
    assert "Alien (1979) by" not in text
    assert tokenizer.decode(processor.item_title_ids()[0]) == "Toy Story (1995) by Author 0"
    assert processor.resolve_item("Toy Story (1995)") == (0, "Toy Story (1995)")
    processor.save_pretrained(tmp_path)
    loaded = CCFLLMProcessor.from_pretrained(tmp_path)
    assert loaded.item_fields == AUTHORS
    assert torch.equal(loaded(**call)["input_ids"], processor(**call)["input_ids"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"item_template": "{title} of {year}"}, "asks for 'year', which no item"),
        ({"item_template": "by {author}"}, "must contain {title}"),
        ({"item_fields": AUTHORS[:3]}, "but 3 item_fields"),
    ],
)
def test_an_item_template_that_cannot_be_is_refused(
    tokenizer: PreTrainedTokenizerFast, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(tokenizer, **({"item_fields": AUTHORS} | settings))


def same(ours: Any, theirs: Any) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("user", [7.0, "7.0", " 7 ", b"7", np.int64(7), torch.tensor(7)])
def test_every_spelling_of_an_id_is_that_id(tokenizer: PreTrainedTokenizerFast, user: Any) -> None:
    processor = CCFLLMProcessor(tokenizer, [10, 11.0, b"12"], ["A", "B", "C"], [7, np.int64(8)])
    assert (processor.item_ids, processor.user_ids) == (["10", "11", "12"], ["7", "8"])
    wanted = processor(user="7", history=["10"], candidates=["11", "12"])
    assert same(processor(user=user, history=[10.0], candidates=[b"11", " 12 "]), wanted)


@pytest.mark.parametrize("missing", [None, "", float("nan"), pd.NA])
def test_a_missing_user_is_a_new_one_and_a_missing_item_is_refused(
    tokenizer: PreTrainedTokenizerFast, missing: Any
) -> None:
    processor = make(tokenizer)
    assert processor.resolve_user(missing) == 2
    with pytest.raises(ValueError, match="candidates: item 1 is"):
        processor(candidates=["i0", missing])


def test_containers_are_lists(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = make(tokenizer)
    wanted = processor(user="u0", history=["i1", "i2"], candidates=["i3", "i4"])
    for kind in (tuple, np.array, lambda ids: pd.Series(ids, index=[5, 9]), iter):
        found = processor(user="u0", history=kind(["i1", "i2"]), candidates=kind(["i3", "i4"]))
        assert same(found, wanted)
    batch = processor(user=["u0", "u1"], candidates=[["i3"], ["i4"]])
    users, candidates = pd.Series(["u0", "u1"], index=[5, 9]), np.array([["i3"], ["i4"]])
    assert same(processor(user=users, candidates=candidates), batch)
    for history in ({"i1", "i2"}, {"id": "i1"}, b"i1", 5, pd.DataFrame({"i1": [1]})):
        with pytest.raises(ValueError, match=r"history is .* give a list of items"):
            processor(history=history, candidates=["i3"])
    with pytest.raises(ValueError, match="is no id"):
        processor(user=users, candidates=["i3"])


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1, 5), (1, 10), (-10, 10), (0, 100), (0, 1e6)])
@pytest.mark.parametrize("slope", [1.5, 1e3])
def test_ratings_of_any_scale_are_targets(
    tokenizer: PreTrainedTokenizerFast, low: float, high: float, slope: float
) -> None:
    middle = (low + high) / 2
    processor = make(tokenizer, histories="signed", rating_scale=(middle, slope))
    ratings = [float(rating) for rating in np.linspace(low, high, 20)]
    history = [{"id": "i1", "rating": rating} for rating in ratings]
    targets = [processor.target(item) for item in history]
    assert targets == sorted(targets) and targets[0] >= 0 and targets[-1] <= 1
    assert [processor.likes(item) for item in history] == [rating > middle for rating in ratings]


@pytest.mark.parametrize("rating", ["4,5", "4.5/5", float("nan"), float("inf"), [4]])
def test_a_rating_that_is_no_number_is_named(
    tokenizer: PreTrainedTokenizerFast, rating: Any
) -> None:
    processor = make(tokenizer, histories="signed", rating_scale=(3.5, 1.5))
    with pytest.raises(ValueError, match=r"give a rating as a number, as 3\.5 is"):
        processor(history=[{"id": "i1", "rating": rating}], candidates=["i2"])
