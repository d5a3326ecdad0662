"""What the Space's page shows, without Gradio: scores, slots and markup."""

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from hub.space_checkpoint import TITLES, UNRATED, build_space_checkpoint

from ccf_llm_hf import CCFLLMProcessor
from ccf_llm_hf.hub_cards.space.ccf_llm_space import recommender as module
from ccf_llm_hf.hub_cards.space.ccf_llm_space.markup import (
    gate_html,
    prompt_html,
    ranking_html,
    results_html,
    status_line,
)
from ccf_llm_hf.hub_cards.space.ccf_llm_space.recommender import (
    Piece,
    Place,
    Recommender,
    clean_titles,
    without_cf,
)
from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.inference.ranker import CTRRanker
from ccf_llm_hf.modeling.pipeline_ccf_llm import CTRRankingPipeline
from ccf_llm_hf.modeling.ranking_ccf_llm import preselect

HISTORY = ["Heat (1995)", "Alien (1979)", "A film that nobody knows (2031)"]
EVIL = "<img src=x onerror='alert(1)'> & \"friends\""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_space_checkpoint(tmp_path_factory.mktemp("space"))


@pytest.fixture(scope="module")
def recommender(checkpoint: Path) -> Recommender:
    return load(checkpoint)


@pytest.fixture(scope="module")
def text_only(tmp_path_factory: pytest.TempPathFactory) -> Recommender:
    folder = build_space_checkpoint(tmp_path_factory.mktemp("words"), text_only=True)
    return load(folder)


def load(checkpoint: Path) -> Recommender:
    model, processor = load_checkpoint(str(checkpoint))
    return Recommender(CTRRankingPipeline(model=model, processor=processor))


class Page(HTMLParser):
    """Tags and visible text of markup; fails on tags that do not match."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def place(title: str = "Heat (1995)", known: bool = True, **parts: float) -> Place:
    return Place(title, 0.631, torch.full((4,), 0.25), known, parts, [("Alien (1979)", 0.421)])


def test_the_ranking_is_the_rankers(checkpoint: Path, recommender: Recommender) -> None:
    candidates = [title for title in TITLES if title not in HISTORY]
    expected = CTRRanker.from_pretrained(str(checkpoint), device="cpu").rank(
        history=HISTORY, candidates=candidates, top_k=5
    )
    found = recommender.rank(HISTORY, top_k=5)
    assert [one.title for one in found] == [one.title for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.probability == pytest.approx(other.probability, abs=1e-5)
        assert float(one.gate.mean()) == pytest.approx(other.text_share, abs=1e-5)


def test_liked_and_disliked_titles_are_not_ranked(recommender: Recommender) -> None:
    disliked = [place.title for place in recommender.rank(HISTORY, top_k=3)]
    found = recommender.rank(HISTORY, disliked, top_k=100)
    assert {place.title for place in found} == {*TITLES} - {*HISTORY, *disliked}


def test_the_language_model_scores_the_candidates_that_ranking_takes(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CANDIDATES", 7)
    recommender = Recommender(recommender.ranker)
    model, processor = recommender.model, recommender.processor
    taken = [
        processor.resolve_item(item)[1] for item in preselect(model, processor, None, HISTORY, 7)
    ]
    assert len(taken) == 7
    for stage in ("first", "read"):
        assert {place.title for place in recommender.rank(HISTORY, stage=stage)} == {*taken}


def test_titles_stand_in_the_order_of_the_cf_models_biases(recommender: Recommender) -> None:
    table = recommender.model.cf
    bias = {title: float(table.item_vectors[row, -1]) for row, title in enumerate(TITLES)}
    rated = [title for title in recommender.titles if title not in UNRATED]
    assert rated == sorted(rated, key=lambda title: -bias[title])


def test_nothing_left_gives_an_empty_list(recommender: Recommender) -> None:
    assert recommender.rank([], TITLES) == []


def test_the_history_changes_the_scores(recommender: Recommender) -> None:
    scores = [
        {place.title: place.probability for place in recommender.rank(history, HISTORY, top_k=99)}
        for history in ([], HISTORY[:1], HISTORY)
    ]
    assert scores[0].keys() == scores[1].keys() == scores[2].keys()
    assert scores[0] != scores[1] != scores[2]


@torch.inference_mode()
def test_a_blank_table_scores_an_item_by_its_title_alone(recommender: Recommender) -> None:
    """With nothing known of it, a catalog item is what a new item of the same title would be."""
    processor = recommender.processor
    row = processor.title_index["Jaws (1975)"]
    batch = processor(history=[], candidates=["Jaws (1975)"], return_tensors="pt")
    tokens = processor.item_title_ids()[row]
    as_new = {
        **batch,
        "item_slots": batch["item_slots"].masked_fill(batch["item_slots"] == row, len(TITLES)),
        "candidate_items": batch["candidate_items"] * 0 + len(TITLES),
        "new_title_ids": torch.tensor(tokens),
        "new_title_lengths": torch.tensor([len(tokens)]),
    }
    expected = recommender.model.probabilities(recommender.model(**as_new).logits[0, 0])
    places = {place.title: place for place in recommender.rank([], blank=True, top_k=99)}
    assert places["Jaws (1975)"].probability == pytest.approx(float(expected), abs=1e-5)
    assert not places["Jaws (1975)"].known


def test_blanking_leaves_the_model_as_it_was(recommender: Recommender) -> None:
    before = [place.probability for place in recommender.rank(HISTORY)]
    blank = without_cf(recommender.model)
    weights = dict(recommender.model.named_parameters())
    for name, weight in blank.named_parameters():
        assert weight.data_ptr() == weights[name].data_ptr()
    assert not blank.cf.item_known.any()
    assert not blank.cf.user_known.any()
    assert recommender.model.cf.item_known.any()
    blank_places = recommender.rank(HISTORY, blank=True)
    assert not any(place.known for place in blank_places)
    assert [place.probability for place in blank_places] != before
    assert [place.probability for place in recommender.rank(HISTORY)] == before


def test_places_tell_what_the_cf_model_knows(recommender: Recommender) -> None:
    known = {place.title: place.known for place in recommender.rank([], top_k=99)}
    assert known == {title: title not in UNRATED for title in TITLES}


def test_the_prompt_has_a_piece_for_each_slot(recommender: Recommender) -> None:
    pieces = recommender.prompt(HISTORY, "Jaws (1975)")
    assert [(piece.kind, piece.text) for piece in pieces if piece.kind != "text"] == [
        ("user", "new user"),
        *(("history", title) for title in HISTORY),
        ("candidate", "Jaws (1975)"),
    ]
    assert pieces[0].text.startswith("Will the user like")
    assert [piece.known for piece in pieces if piece.kind == "history"] == [True, True, False]
    blank = recommender.prompt(HISTORY, "Jaws (1975)", blank=True)
    assert not any(piece.known for piece in blank)


def test_a_title_that_looks_like_an_id_is_a_title(recommender: Recommender) -> None:
    assert "t3" in recommender.processor.item_index
    pieces = recommender.prompt(["t3"], "Jaws (1975)")
    assert [(piece.text, piece.known) for piece in pieces if piece.kind == "history"] == [
        ("t3", False)
    ]


def test_a_text_only_model_has_no_slots_and_nothing_to_blank(text_only: Recommender) -> None:
    assert not text_only.has_cf
    assert text_only.titles == TITLES
    places = text_only.rank(HISTORY, top_k=3)
    for found in places:
        assert (found.parts["behavior"], found.parts["cf"]) == (0.0, 0.0)
        assert found.parts["words"]
    assert text_only.rank(HISTORY, blank=True, top_k=3)[0].probability == places[0].probability
    pieces = text_only.prompt(HISTORY, "Jaws (1975)")
    assert {piece.kind for piece in pieces} == {"text"}
    html = results_html(places, pieces, text_only.model.config, uses_slots=False)
    assert "The gate" not in html and "The prompt" in html
    assert "ccf-words" in html and "ccf-behavior" not in html


def test_titles_of_visitors_are_cleaned() -> None:
    assert clean_titles(None) == []
    assert clean_titles([" Heat \n (1995)", "", "  ", "Heat (1995)", 7]) == ["Heat (1995)", "7"]
    assert len(clean_titles(["x" * 1000])[0]) == 200


def test_a_row_tells_probability_parts_and_what_raised_it() -> None:
    page = Page(
        ranking_html([place(words=0.2, behavior=-0.3), place("Jaws (1975)", words=1.0, cf=0.0)])
    )
    assert "63.1\u00a0% probability of a like" in page.text
    assert "words +0.20, behavior \u22120.30" in page.text
    assert "words +1.00LikeDislikeRaised by Alien (1979) (+0.42)" in page.text
    buttons = [attributes for tag, attributes in page.tags if tag == "button"]
    assert [(one["data-say"], one["data-title"]) for one in buttons][2:] == [
        ("like", "Jaws (1975)"),
        ("dislike", "Jaws (1975)"),
    ]
    assert buttons[3]["aria-label"] == "Dislike Jaws (1975)"
    styles = [attributes.get("style") for _, attributes in page.tags if "style" in attributes]
    assert styles == ["width:20.0%", "width:30.0%", "width:100.0%"]
    assert [tag for tag, _ in page.tags].count("li") == 2


def test_the_key_names_what_occurs(recommender: Recommender) -> None:
    config = recommender.model.config
    prompt = [Piece("text", "Liked:")]
    both = results_html([place(words=0.1), place(cf=-0.1, behavior=0.0)], prompt, config)
    assert "the words of the title" in both
    assert "own estimate" in both
    assert "behavior of its users" not in both


def test_what_raised_a_title_is_what_it_lacks_without(recommender: Recommender) -> None:
    history = ["Heat (1995)", "Alien (1979)"]
    logits = {
        len(likes): {
            item["title"]: item["logit"]
            for item in recommender.ranker(
                {"history": likes, "candidates": list(TITLES), "top_k": 99}
            )
        }
        for likes in (history, history[1:])
    }
    for found in recommender.rank(history, top_k=5):
        effect = logits[2][found.title] - logits[1][found.title]
        told = dict(found.raised).get("Heat (1995)")
        assert told == (pytest.approx(effect, abs=1e-4) if effect > 0 else None)


def test_titles_are_told_apart_by_their_authors_and_lists_vary(checkpoint: Path) -> None:
    model, plain = load_checkpoint(str(checkpoint))
    titles = ["Emma", "Emma", *(f"Book {number}" for number in range(len(TITLES) - 2))]
    fields = [{"author": f"Writer {number // 6}"} for number in range(len(TITLES))]
    processor = CCFLLMProcessor(
        plain.tokenizer,
        plain.item_ids,
        titles,
        plain.user_ids,
        item_template="{title} by {author}",
        evidence_fields=["author"],
        item_fields=[*fields[:1], {"author": "Another"}, *fields[2:]],
    )
    recommender = Recommender(CTRRankingPipeline(model=model, processor=processor))
    assert {"Emma by Writer 0", "Emma by Another"} <= {*recommender.titles}
    names = [example["name"] for example in recommender.examples]
    assert names == ["Writer 1", "Writer 2", "Writer 3"]
    assert recommender._item("sequel by writer 1") == {"title": "sequel", "author": "writer 1"}
    assert recommender._item("sequel by nobody") == {"title": "sequel by nobody"}
    found = recommender.rank(["Emma by Writer 0"], ["Book 0"], top_k=99)
    names = [place.title for place in found]
    assert "Emma by Another" in names and "Emma by Writer 0" not in names
    assert "Book 0 by Writer 0" not in names and "Book 1 by Writer 0" in names
    varied = [place.title for place in recommender.rank(["Emma"], varied=True, top_k=99)]
    counts = [sum(name.endswith(f"Writer {writer}") for name in varied) for writer in range(10)]
    assert max(counts) == 3


def test_the_first_list_is_there_before_a_word_is_read(
    recommender: Recommender, text_only: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert recommender.ranks_at_once(HISTORY) and not recommender.ranks_at_once([])
    assert not text_only.ranks_at_once(HISTORY)
    read = recommender.rank(HISTORY, stage="read")
    assert all(place.probability and not place.parts for place in read)
    why = recommender.rank(HISTORY, stage="why")
    assert [(place.title, place.probability) for place in why] == [
        (place.title, place.probability) for place in read
    ]
    monkeypatch.setattr(recommender.model, "forward", None)
    first = recommender.rank(HISTORY, stage="first")
    assert len(first) == 10 and {place.probability for place in first} == {None}
    assert "\u2026" in Page(results_html(first, [], recommender.model.config)).text


def test_examples_are_alike_and_of_the_catalog(
    recommender: Recommender, text_only: Recommender
) -> None:
    for one in (recommender, text_only):
        assert len(one.examples) == 3
        for example in one.examples:
            assert len(example["titles"]) == 5 and {*example["titles"]} <= {*TITLES}
    assert len({example["titles"][0] for example in recommender.examples}) == 3
    assert recommender.examples[0]["name"] == f"Like {recommender.examples[0]['titles'][0]}"


@pytest.mark.parametrize(
    ("typed", "title"),
    [
        ("the godfather", "The Godfather (1972)"),
        ("toy story 1995", "Toy Story (1995)"),
        ("1995 story", "Toy Story (1995)"),
        ("matrix", "The Matrix (1999)"),
        ("godfahter", "The Godfather (1972)"),
        ("termnator 2", "Terminator 2: Judgment Day (1991)"),
        ("singin in", "Singin' in the Rain (1952)"),
        ("AMELIE", "Amélie (2001)"),
    ],
)
def test_titles_are_found_as_they_are_typed(
    recommender: Recommender, typed: str, title: str
) -> None:
    assert recommender.search.find(typed) == [title]


def test_what_is_no_title_is_not_found(recommender: Recommender) -> None:
    search = recommender.search
    assert search.find("zzzz") == search.find("  !") == []
    assert search.same("the godfather") == "The Godfather (1972)"
    assert search.same("godfather") is None
    assert len(search.find("the", limit=4)) == 4


def test_a_typed_title_is_the_catalogs(recommender: Recommender) -> None:
    typed, own = (
        recommender.rank([title], stage="read")
        for title in ("the godfather", "The Godfather (1972)")
    )
    assert [(one.title, one.probability) for one in typed] == [
        (one.title, one.probability) for one in own
    ]


def test_heat_map_sorts_dimensions_by_spread() -> None:
    gates = torch.tensor([[0.5, 0.9, 0.5, 0.4], [0.5, 0.1, 0.6, 0.4]])
    page = Page(gate_html([Place("a", 0.5, gates[0], True), Place("b", 0.5, gates[1], True)]))
    fills = [attributes["fill"] for tag, attributes in page.tags if tag == "rect"]
    assert len(fills) == 8
    assert fills[0] == "#0072b2"  # the widest spread first: .9 is the most words there is
    assert fills[4] == "#d55e00"
    assert fills[1] == fills[2] == "#e0e0e0"  # .5 and .5
    assert fills[3] == fills[7]  # no spread at all: last
    assert "0.10 behavior" in page.text
    assert "0.90 words" in page.text
    assert "The 4 of 4 dimensions" in page.text
    assert "0.400 down to 0.000" in page.text


def test_heat_map_shows_some_of_many_dimensions_and_names_its_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    places = [Place(t, 0.5, torch.rand(576, generator=generator), True) for t in ("a", EVIL)]
    page = Page(gate_html(places))
    images = [attributes for tag, attributes in page.tags if tag == "svg"]
    assert [image["role"] for image in images] == ["img", "img"]
    assert str(images[1]["aria-label"]).startswith(f"Gate of {EVIL}: from 0.0")
    assert [tag for tag, _ in page.tags].count("rect") == 128
    assert "The 64 of 576 dimensions" in page.text


def test_heat_map_of_unknown_items_is_gray_where_words_do_not_reach() -> None:
    gates = torch.tensor([[0.1, 0.9]])
    page = Page(gate_html([Place("a", 0.5, gates[0], False)]))
    assert {attributes["fill"] for tag, attributes in page.tags if tag == "rect"} == {
        "#606060",
        "#0072b2",
    }
    assert "0.10 stand-in" in page.text


def test_titles_are_escaped_everywhere(recommender: Recommender) -> None:
    pieces = [Piece("text", f"read {EVIL}"), Piece("history", EVIL), Piece("candidate", EVIL)]
    raised = Place("a", 0.5, torch.ones(4), True, {}, [(EVIL, 0.1)])
    page = Page(results_html([place(EVIL), raised], pieces, recommender.model.config))
    assert {tag for tag, _ in page.tags} <= {
        *("details", "summary", "p", "span", "i", "ol", "li", "div", "svg", "rect", "button")
    }
    assert page.text.count(EVIL) == 6
    assert all("onerror" not in attributes for _, attributes in page.tags)


def test_prompt_markup_keeps_text_and_order() -> None:
    pieces = [
        Piece("text", "Liked:\n"),
        Piece("user", "new user"),
        Piece("history", "a", True),
    ]
    text = Page(prompt_html(pieces)).text
    assert text == (
        "Liked:\nslot of the user: new user (a learned stand-in for behavior) "
        "slot of the history: a (behavior known) "
    )


def test_status_says_what_was_ranked_for_whom() -> None:
    assert status_line(10, 1, 0, False) == "The best 10 for 1 liked title, with the CF table."
    assert status_line(3, 2, 1, True) == (
        "The best 3 for 2 liked titles, with a blank CF table (cold start); 1 disliked left out."
    )
    assert "no liked title" in status_line(10, 0, 0, False)
    assert status_line(10, 0, 1, False, read=True).endswith("; 1 disliked read.")
    assert status_line(10, 2, 0, False, stage="first") == (
        "10 candidates for 2 liked titles; the language model is reading."
    )
    assert "Nothing is left" in status_line(0, 5, 55, False)


def test_dislikes_are_read_by_a_model_of_signed_histories_only(checkpoint: Path) -> None:
    likes_only = load(checkpoint)
    assert not likes_only.reads_dislikes
    model, processor = load_checkpoint(str(checkpoint))
    processor.histories = "signed"
    signed = Recommender(CTRRankingPipeline(model=model, processor=processor))
    assert signed.reads_dislikes
    places = signed.rank(HISTORY, disliked=["Psycho (1960)"])
    assert "Psycho (1960)" not in [place.title for place in places]
    pieces = signed.prompt(HISTORY, places[0].title, disliked=["Psycho (1960)"])
    shown = [piece.text for piece in pieces if piece.kind == "history"]
    assert shown == ["Psycho (1960)", *HISTORY]
    assert " not" in "".join(piece.text for piece in pieces if piece.kind == "text")
    assert places != signed.rank(HISTORY, ["Psycho (1960)"])
