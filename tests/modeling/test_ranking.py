"""Candidates from the catalog, lists that vary, and what a logit is made of."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny import ARMS, BuildModel

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.modeling.processing_ccf_llm import Request
from ccf_llm_hf.modeling.ranking_ccf_llm import (
    Reasons,
    _by_text,
    explain,
    preselect,
    rank,
    score,
    shortlist,
)

SIGNED = {"histories": "signed", "history_window": (3, 2), "fold_in_items": 2}
FOLDED = {"cf_logit": True, "cf_fold_in": True}
AUTHORS = ["King", "Roberts", "King", "King", ["Roberts", "Tan"], None, "Poe", "king"]
FIELDS = [{} if author is None else {"author": author} for author in AUTHORS]
BY_AUTHOR: dict[str, Any] = {"evidence_fields": ["author"], "item_fields": FIELDS}
LIKES = ["i0", "i2", "A new film (2024)", "i1", "i6"]


def disliked(item: str) -> dict[str, object]:
    return {"id": item, "liked": False}


MIXED: list[Any] = ["i0", disliked("i1"), "i2", "i6", disliked("i5")]


@pytest.fixture
def cf(cf: CFVectors) -> CFVectors:
    """Item 7 and user 4 are unknown; a new user is told from the default by folding in."""
    cf.item_vectors /= 3
    precision = [1.0, 2.0, 0.5, 1.5, 3.0, 0.0]
    return replace(cf, metadata={"user_precision": json.dumps(precision)})


def reasons_of(
    model: CCFLLMForCTR, processor: CCFLLMProcessor, history: list[Any], *items: Any
) -> list[Reasons]:
    return explain(model, processor, Request("u0", history, list(items)))


def logit(
    model: CCFLLMForCTR, processor: CCFLLMProcessor, history: list[Any], item: Any, **cut: Any
) -> float:
    (one,) = score(model, processor, [Request("u0", history, [item], **cut)])
    return float(one)


@pytest.mark.parametrize("history", [LIKES, MIXED], ids=["likes", "signed"])
@pytest.mark.parametrize("wording", ["shared_prefix", "answered"])
@pytest.mark.parametrize("arm", ["gate", "concat", "text_only"])
def test_an_effect_is_the_score_with_a_line_less_that_without(
    build: BuildModel, arm: str, wording: str, history: list[Any]
) -> None:
    model, processor = build(arm, wording, prompt=SIGNED, **FOLDED)
    earlier, shown = processor.window(history)
    assert len(earlier) == 2 and len(shown) == 3
    for item, found in zip(
        ("i3", "i4"), reasons_of(model, processor, history, "i3", "i4"), strict=True
    ):
        whole = logit(model, processor, history, item)
        assert found.logit == pytest.approx(whole, abs=1e-5)
        effects = [line.effect for line in found.lines]
        assert effects == sorted(effects, reverse=True) and len(effects) == 3
        by_title = {line.title: line for line in found.lines}
        for place, line in enumerate(shown):
            left = [*shown[:place], *shown[place + 1 :]]
            rest = logit(model, processor, left, item, history_lengths=[2], earlier=earlier)
            told = by_title[processor.item_text(line)[1]]
            assert told.effect == pytest.approx(whole - rest, abs=1e-4) and told.effect
            assert told.liked == processor.likes(line)
        assert found.history == pytest.approx(whole - logit(model, processor, [], item), abs=1e-4)


@pytest.mark.parametrize("arm", ["gate", "text_only"])
def test_lines_before_the_window_that_bear_on_a_candidate_are_told_too(
    build: BuildModel, arm: str
) -> None:
    prompt = SIGNED | {"history_window": (1, 1)} | BY_AUTHOR
    model, processor = build(arm, "answered", prompt=prompt, **FOLDED)
    history = ["i0", "i6", "i5"]
    (found,) = reasons_of(model, processor, history, "i3")
    assert {line.item_id for line in found.lines} == {"i0", "i5"}
    whole = logit(model, processor, history, "i3")
    assert found.logit == pytest.approx(whole, abs=1e-5)
    (king,) = (line for line in found.lines if line.item_id == "i0")
    rest = logit(model, processor, ["i5"], "i3", history_lengths=[1], earlier=["i6"])
    assert king.effect == pytest.approx(whole - rest, abs=1e-4) and king.effect


def test_lines_of_one_author_are_left_out_together_too(build: BuildModel) -> None:
    model, processor = build("text_only", "answered", prompt=SIGNED | BY_AUTHOR)
    history = ["i0", "i1", "i2"]
    king, roberts = reasons_of(model, processor, history, "i7", "i4")
    (both,) = king.topics
    assert (both.field, both.value, both.lines) == ("author", "king", 2)
    without = logit(model, processor, ["i1"], "i7")
    assert both.effect == pytest.approx(king.logit - without, abs=1e-4)
    assert not roberts.topics, "one line of an author is that line"


@pytest.mark.parametrize("cf_settings", [{}, {"cf_logit": True}, FOLDED], ids=str)
@pytest.mark.parametrize("arm", ARMS)
def test_parts_sum_to_the_logit_and_are_0_where_an_arm_lacks_them(
    build: BuildModel, arm: str, cf_settings: dict[str, Any]
) -> None:
    model, processor = build(arm, prompt=SIGNED, **cf_settings)
    # Item 7 and the last have no CF vector.
    for item, found in zip(
        ("i3", "i7", "Unheard of"),
        reasons_of(model, processor, MIXED, "i3", "i7", "Unheard of"),
        strict=True,
    ):
        total = found.start + found.words + found.behavior + found.cf
        assert found.logit == pytest.approx(total, abs=1e-5)
        known = item == "i3"
        assert (found.behavior != 0) == (known and arm != "text_only")
        assert (found.cf != 0) == (known and bool(cf_settings))
        assert (found.words != 0) == (arm != "cf_only")


def test_behavior_is_what_the_vector_in_the_slot_does(build: BuildModel) -> None:
    model, processor = build("gate", prompt=SIGNED, cf_logit=True)
    (found,) = reasons_of(model, processor, MIXED, "i3")
    model.cf_logit_scale.data.zero_()
    before = logit(model, processor, MIXED, "i3")
    model.cf.item_known[3] = False
    assert found.behavior == pytest.approx(before - logit(model, processor, MIXED, "i3"), abs=1e-4)


def test_explaining_leaves_the_model_as_it_was(build: BuildModel) -> None:
    model, processor = build("gate", prompt=SIGNED, **FOLDED)
    known = model.cf.item_known.clone()
    before = logit(model, processor, MIXED, "i3")
    reasons_of(model, processor, MIXED, "i3")
    assert torch.equal(model.cf.item_known, known)
    assert logit(model, processor, MIXED, "i3") == before


def test_of_many_lines_those_of_the_same_author_come_first(build: BuildModel) -> None:
    model, processor = build("gate", prompt=SIGNED | {"history_window": (9, 1)} | BY_AUTHOR)
    request = Request("u0", LIKES, ["i3"])
    (every,) = explain(model, processor, request)
    assert len(every.lines) == 5
    for most, wanted in ((0, []), (1, ["i2"]), (3, ["i0", "i2", "i6"])):
        (some,) = explain(model, processor, request, max_lines=most)
        assert sorted(str(line.item_id) for line in some.lines) == wanted
        effects = {line.title: line.effect for line in every.lines}
        for line in some.lines:
            assert line.effect == pytest.approx(effects[line.title], abs=1e-5)
        assert some.topics[0].effect == pytest.approx(every.topics[0].effect, abs=1e-5)


def chosen(model: CCFLLMForCTR, processor: CCFLLMProcessor, *args: Any) -> list[str]:
    return [item["id"] for item in preselect(model, processor, *args)]


def test_a_liked_author_brings_items_that_nobody_has_rated(build: BuildModel) -> None:
    model, processor = build(prompt=BY_AUTHOR, item_text="static")
    assert "i7" in chosen(model, processor, None, ["i0"], 6)
    assert "i7" not in chosen(model, processor, None, ["i1"], 6)
    _, without = build(item_text="static")
    assert chosen(model, without, None, ["i0"], 7)[-1] == "i7", "last, where CF alone chooses"


def test_sources_take_turns_and_nothing_comes_twice(build: BuildModel) -> None:
    model, processor = build(prompt=BY_AUTHOR)
    rows = chosen(model, processor, None, ["i0"], 8)
    assert len(rows) == len(set(rows)) and "i0" not in rows
    king = [row for row in rows if row in ("i2", "i3", "i7")]
    assert rows.index(king[0]) <= 1 and set(king) == {"i2", "i3", "i7"}
    for count in range(1, 8):
        assert chosen(model, processor, None, ["i0"], count) == rows[:count]


def test_a_list_that_is_to_vary_has_candidates_of_others(
    build: BuildModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ccf_llm_hf.modeling.ranking_ccf_llm.SPARE", 1)
    model, processor = build(prompt=BY_AUTHOR)
    king = {"i2", "i3", "i7"}
    assert len(king & set(chosen(model, processor, None, ["i0"], 8))) == 3
    varied = preselect(model, processor, None, ["i0"], 8, max_per_topic=1)
    rows = [item["id"] for item in varied]
    assert len(king & set(rows)) == 1 and len(set(rows) - king) >= 3


def test_words_bring_an_item_that_cf_does_not_know(build: BuildModel) -> None:
    model, processor = build()
    words = model.text_vectors(torch.arange(8))
    nearest = torch.nn.functional.cosine_similarity(words, words[:1]).argsort(descending=True)
    assert chosen(model, processor, None, ["i0"], 2)[1] in [f"i{row}" for row in nearest[1:3]]
    assert "i7" in chosen(model, processor, None, ["i0"], 7)


def test_words_near_to_any_liked_title_bring_theirs() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.1], [-1.0, 0.0], [0.1, 0.3]])
    assert _by_text(vectors, [0, 1], 5)[2:] == [2, 4, 3]
    assert _by_text(vectors, [0], 3) == [0, 2, 4]
    assert _by_text(vectors, [], 3) == []


def test_an_author_who_was_disliked_as_often_brings_nothing(build: BuildModel) -> None:
    model, processor = build("text_only", prompt=SIGNED | BY_AUTHOR)
    model.cf.item_known.zero_()
    history = ["i0", disliked("i2"), "i1"]
    assert chosen(model, processor, None, history, 8) == ["i4"]
    with pytest.raises(ValueError, match="evidence_fields with another: give candidates"):
        preselect(model, processor, None, history[:2])


def test_authors_get_places_as_often_as_they_were_liked(build: BuildModel) -> None:
    model, processor = build("text_only", prompt=SIGNED | BY_AUTHOR)
    model.cf.item_known.zero_()
    rows = chosen(model, processor, None, ["i0", "i2", "i1"], 8)
    assert rows[0] in ("i3", "i7") and set(rows[:2]) | {rows[2]} == {"i3", "i7", "i4"}


@pytest.mark.parametrize("settings", [{}, {"cf_logit": True}, FOLDED], ids=str)
def test_a_new_user_is_folded_in_wherever_the_cf_model_allows_it(
    build: BuildModel, settings: dict[str, Any]
) -> None:
    model, processor = build(prompt={"histories": "signed"}, item_text="static", **settings)
    history = ["i0", "i3"]
    table = model.cf
    users = table.folded_users(torch.tensor([[0, 3]]), torch.ones(1, 2), torch.tensor([2]))
    nobody = table.logits(torch.tensor(5), torch.arange(8))
    logits = table.folded_logits(users, torch.arange(8)[None])[0] - nobody
    order = [f"i{row}" for row in logits.argsort(descending=True).tolist() if row not in (0, 3, 7)]
    assert chosen(model, processor, None, history, 5) == order
    own = table.logits(torch.full((8,), 1), torch.arange(8)) - nobody
    by_own = [f"i{row}" for row in own.argsort(descending=True).tolist() if row not in (0, 3, 7)]
    assert chosen(model, processor, "u1", history, 5) == (
        order if settings.get("cf_fold_in") else by_own
    )


def test_what_everybody_likes_comes_after_what_is_this_users_own(build: BuildModel) -> None:
    model, processor = build(prompt={"histories": "signed"})
    first = {chosen(model, processor, user, [], 1)[0] for user in ("u0", "u1", "u2", "u3")}
    model.cf.default_user += 100.0  # a favorite of everybody, known users included
    model.cf.user_vectors += 100.0
    assert first == {chosen(model, processor, user, [], 1)[0] for user in ("u0", "u1", "u2", "u3")}
    assert len(first) > 1


def test_nobody_at_all_gets_the_default_users_list(build: BuildModel) -> None:
    model, processor = build(prompt=SIGNED, **FOLDED)
    logits = model.cf.logits(torch.full((8,), 5), torch.arange(8))
    order = [f"i{row}" for row in logits.argsort(descending=True).tolist() if row != 7]
    assert chosen(model, processor, None, [], 7) == order


def test_a_list_can_be_asked_to_vary(build: BuildModel) -> None:
    model, processor = build(prompt=BY_AUTHOR)
    request = Request(None, ["i5"], [f"i{row}" for row in range(8)])
    (plain,) = rank(model, processor, [request], 8)
    (varied,) = rank(model, processor, [request], 8, max_per_topic=1)
    taken: set[str] = set()
    expected = []
    for item in plain:  # the best of an author, and what has none
        author = FIELDS[int(str(item.item_id)[1:])].get("author") or []
        names = {name.lower() for name in ([author] if isinstance(author, str) else author)}
        if not names & taken:
            expected.append(item)
            taken |= names
    assert varied == expected and len(varied) < 8
    assert rank(model, processor, [request], 3, max_per_topic=1)[0] == expected[:3]
    (loose,) = rank(model, processor, [request], 8, max_per_topic=8)
    assert loose == plain
    _, without = build()
    with pytest.raises(ValueError, match="names none: leave it out"):
        rank(model, without, [request], 8, max_per_topic=2)


@pytest.mark.parametrize("wording", ["shared_prefix", "answered"])
def test_likes_alone_are_a_signed_history(build: BuildModel, wording: str) -> None:
    model, processor = build("concat", wording, prompt=SIGNED | BY_AUTHOR, **FOLDED)
    bare, said = (
        rank(model, processor, [Request(None, history, ["i3", "i4", "i5"])])[0]
        for history in (LIKES, [{"id": item, "title": item, "liked": True} for item in LIKES])
    )
    assert bare == said
    assert chosen(model, processor, None, LIKES, 5)


EVERY: list[Any] = [f"i{row}" for row in (3, 7, 5, 0, 2, 4)]


@pytest.mark.parametrize("wording", ["shared_prefix", "answered"])
def test_a_shortlist_by_the_cf_logit_is_the_list_where_words_say_nothing(
    build: BuildModel, wording: str
) -> None:
    model, processor = build("gate", wording, prompt=SIGNED, **FOLDED)
    new = {"title": "Unheard of"}
    request = Request("u0", MIXED, [new, *EVERY])
    model.answer_scale.data.zero_()
    (whole,) = rank(model, processor, [request], 7)
    (short,) = rank(model, processor, [request], 7, shortlisted=3)
    assert [item.item_id for item in short] == [item.item_id for item in whole[:3]]
    for item, other in zip(short, whole, strict=False):
        assert item.logit == pytest.approx(other.logit, abs=1e-4)
    assert new in shortlist(model, processor, request, 7)


@pytest.mark.parametrize("arm", ["gate", "text_only"])
def test_places_of_a_list_that_goes_through_the_model_in_part_are_those_of_the_whole(
    build: BuildModel, arm: str
) -> None:
    model, processor = build(arm, "answered", prompt=SIGNED | BY_AUTHOR)
    request = Request(None, MIXED, [*EVERY, "Unheard of"])
    (whole,) = rank(model, processor, [request], 9)
    for count in range(1, 8):
        (short,) = rank(model, processor, [request], 9, shortlisted=count)
        left = {item.title for item in short}
        assert len(left) == count
        expected = [item for item in whole if item.title in left]
        assert [item.title for item in short] == [item.title for item in expected]
        for item, other in zip(short, expected, strict=True):
            assert item.logit == pytest.approx(other.logit, abs=1e-4)


def test_a_shortlist_without_a_cf_logit_takes_turns(build: BuildModel) -> None:
    model, processor = build(prompt=SIGNED | BY_AUTHOR, item_text="static")
    request = Request(None, ["i0", disliked("i1")], EVERY)
    logits = model.cf.logits(torch.full((6,), 5), torch.tensor([3, 7, 5, 0, 2, 4])).tolist()
    by_cf = [item for _, item in sorted(zip(logits, EVERY, strict=True), reverse=True)]
    king = [item for item in by_cf if item in ("i0", "i2", "i3", "i7")]
    found = shortlist(model, processor, request, 2)
    assert found == [by_cf[0], next(item for item in king if item != by_cf[0])]
    assert sorted(shortlist(model, processor, request, 9)) == sorted(EVERY)
    assert len(set(shortlist(model, processor, request, 3, 1)) & set(king)) <= 3
