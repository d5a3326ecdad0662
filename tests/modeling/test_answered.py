"""Answered histories: lines of items and answers, each scored where its words end."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import ARMS, BACKBONES, BuildModel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from ccf_llm_hf import CCFLLMForCTR, CCFLLMProcessor
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.data.assets import get_asset
from ccf_llm_hf.modeling.processing_ccf_llm import Request
from ccf_llm_hf.modeling.prompt_ccf_llm import ITEM_FORMATS, HybridPrompt
from ccf_llm_hf.modeling.ranking_ccf_llm import PrefixCache, cf_logits, score

SIGNED = {"histories": "signed", "history_window": (3, 2), "fold_in_items": 9}
FOLDED = {"cf_logit": True, "cf_fold_in": True}
LINES: list[dict[str, object]] = [
    {"id": "i3", "liked": True},
    {"id": "i0", "liked": True},
    {"id": "i7", "liked": False},
    {"title": "A new film (2024)", "liked": False},
    {"id": "i5", "liked": True},
    {"id": "i1", "liked": False},
]
EARLIER = [{"id": "i6", "liked": False}, {"id": "i2", "liked": True}]
OTHER = Request("stranger", [{"id": "i4", "liked": True}, *LINES[:2]], stream=True)


@pytest.fixture
def cf(cf: CFVectors) -> CFVectors:
    cf.item_vectors /= 3
    precision = [1.0, 2.0, 0.5, 1.5, 3.0, 0.0]
    return replace(cf, metadata={"user_precision": json.dumps(precision)})


def stream(lines: list = LINES) -> Request:
    return Request("u0", list(lines), earlier=EARLIER, stream=True)


@torch.no_grad()
def logits(
    model: CCFLLMForCTR, processor: CCFLLMProcessor, *requests: Request
) -> list[torch.Tensor]:
    """Of each request, all in one forward pass."""
    rows = model(**processor.pack(requests)).logits
    return [row[: len(one.scored)] for row, one in zip(rows, requests, strict=True)]


def alone(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> torch.Tensor:
    """Each line of the stream as the one candidate after the lines before it."""
    requests = [
        Request("u0", LINES[:place], [line], [place], earlier=EARLIER)
        for place, line in enumerate(LINES)
    ]
    return torch.cat([logits(model, processor, request)[0] for request in requests])


def check_all_ways(model: CCFLLMForCTR, processor: CCFLLMProcessor) -> None:
    expected = alone(model, processor)
    assert expected.std() > 1e-3
    found, _ = logits(model, processor, stream(), OTHER)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    whole, _ = score(model, processor, [stream(), OTHER])
    torch.testing.assert_close(whole, expected, atol=1e-4, rtol=0)
    (uncut,) = score(model, processor, [stream()], tokens_per_batch=5)
    torch.testing.assert_close(uncut, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("cf_settings", [{}, {"cf_logit": True}, FOLDED], ids=str)
@pytest.mark.parametrize("arm", ARMS)
def test_a_line_scores_as_a_candidate_after_the_same_lines(
    build: BuildModel, arm: str, cf_settings: dict
) -> None:
    check_all_ways(*build(arm, "answered", prompt=SIGNED, **cf_settings))


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("arm", ["gate", "text_only"])
def test_on_every_backbone(build: BuildModel, arm: str, backbone: str, attn: str) -> None:
    model, processor = build(
        arm, "answered", backbone, lora=True, attn=attn, prompt=SIGNED, **FOLDED
    )
    check_all_ways(model, processor)


@pytest.mark.parametrize("arm", ["gate", "concat", "text_only"])
def test_candidates_in_parts_after_cached_lines(build: BuildModel, arm: str) -> None:
    model, processor = build(arm, "answered", prompt=SIGNED, **FOLDED)
    candidates = ["i2", *LINES[4:], "i6"]
    request = Request("u0", LINES[:4], candidates, [4] * 4, earlier=EARLIER)
    (parts,) = score(model, processor, [request], tokens_per_batch=3)
    torch.testing.assert_close(parts, logits(model, processor, request)[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(
        parts[1], logits(model, processor, stream())[0][4], atol=1e-4, rtol=0
    )


def test_candidates_of_several_times_share_the_lines(build: BuildModel) -> None:
    model, processor = build("concat", "answered", prompt=SIGNED, **FOLDED)
    lengths = list(range(len(LINES)))
    (packed,) = logits(model, processor, Request("u0", LINES, LINES, lengths, earlier=EARLIER))
    torch.testing.assert_close(packed, alone(model, processor), atol=1e-4, rtol=0)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("arm", ["gate", "concat", "text_only"])
def test_evidence_in_a_block_reads_as_the_last_lines_before_it(
    build: BuildModel, arm: str, backbone: str, attn: str
) -> None:
    model, processor = build(arm, "answered", backbone, attn=attn, prompt=SIGNED)
    # Several candidates share their lines, which stand once, unless they see other histories.
    evidence: list[list] = [LINES[4:], [], LINES[1:2], LINES[4:], [], LINES[4:], LINES[1:2]]
    candidates = ["i2", "i6", "i1", "i4", "i2", "i6", "i3"]
    lengths = [4, 4, 4, 4, 4, 2, 4]
    request = Request("u0", LINES[:4], candidates, lengths, evidence=evidence)
    expected = [
        logits(
            model,
            processor,
            Request("u0", [*LINES[:length], *lines], [item], [length + len(lines)]),
        )[0]
        for item, lines, length in zip(candidates, evidence, lengths, strict=True)
    ]
    (packed,) = logits(model, processor, request)
    torch.testing.assert_close(packed, torch.cat(expected), atol=1e-4, rtol=0)
    model.config.cf_logit = model.config.cf_fold_in = True  # which tells whose a logit is
    (packed,) = logits(model, processor, request)
    prefixes = PrefixCache(2**24)
    for tokens in (3, 30, 2048):
        (parts,) = score(model, processor, [request], tokens_per_batch=tokens)
        torch.testing.assert_close(parts, packed, atol=1e-4, rtol=0)
        (again,) = score(model, processor, [request], tokens_per_batch=tokens, prefixes=prefixes)
        torch.testing.assert_close(again, packed, atol=1e-4, rtol=0)
    other = replace(OTHER, stream=False, candidates=["i1"])
    found, _ = score(model, processor, [request, other], prefixes=prefixes)
    torch.testing.assert_close(found, packed, atol=1e-4, rtol=0)


def test_evidence_that_candidates_share_stands_once(build: BuildModel) -> None:
    _, processor = build("concat", "answered", prompt=SIGNED)

    def count(candidates: list, evidence: list) -> int:
        lengths = [4] * len(candidates)
        request = Request("u0", LINES[:4], candidates, lengths, evidence=evidence)
        tokens = processor.count_tokens(request)
        packed = processor.pack([request])["input_ids"].shape[1] if candidates else tokens
        assert packed in (tokens, tokens + len(processor.prompt.instruction()))
        return tokens

    lines = LINES[4:]
    both, first = count(["i2", "i6"], [lines, lines]), count(["i2"], [lines])
    assert both == first + count(["i6"], [[]]) - count([], [])
    assert count(["i2", "i6"], [lines, lines[:1]]) > both


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("arm", ARMS)
def test_a_hidden_line_is_scored_and_not_seen(build: BuildModel, arm: str, attn: str) -> None:
    model, processor = build(arm, "answered", attn=attn, prompt=SIGNED, **FOLDED)
    hidden = [not line["liked"] for line in LINES]
    (found,) = logits(model, processor, replace(stream(), hidden=hidden))
    for place, line in enumerate(LINES):
        seen = [line for line, hide in zip(LINES[:place], hidden[:place], strict=True) if not hide]
        request = Request("u0", seen, [line], [len(seen)], earlier=EARLIER)
        expected = logits(model, processor, request)[0][0]
        torch.testing.assert_close(found[place], expected, atol=1e-4, rtol=0)


def by_author(tokenizer: PreTrainedTokenizerFast, **settings: object) -> CCFLLMProcessor:
    authors: list[dict] = [
        {"author": "King"},
        {"author": ["king", "Straub"]},
        {"author": "Roberts"},
    ]
    ids = ["a", "b", "c", "d"]
    return CCFLLMProcessor(
        tokenizer,
        ids,
        ids,
        wording="answered",
        histories="signed",
        history_window=(1, 1),
        item_fields=[*authors, {}],
        evidence_fields=["author"],
        **settings,
    )


def test_evidence_shares_a_value_and_comes_before(tokenizer: PreTrainedTokenizerFast) -> None:
    processor = by_author(tokenizer)
    history = ["a", {"id": "c", "liked": False}, {"id": "b", "liked": False}, "d"]
    new = {"title": "Ghost Story", "author": "straub"}
    shared = [history[0], history[2]]
    assert processor.evidence(history, ["a", new, "c", "d"]) == [
        shared,
        [history[2]],
        [history[1]],
        [],
    ]
    # Two values in common weigh more than being the latest.
    both = {"title": "The Talisman", "author": ["King", "Straub"]}
    assert by_author(tokenizer, evidence_items=1).evidence(["b", "a"], [both]) == [["b"]]
    assert by_author(tokenizer, evidence_items=1).evidence(["a", "b"], ["a"]) == [["b"]]
    assert by_author(tokenizer, evidence_items=0).evidence(["a", "b"], ["a"]) == [[]]
    # Only what the window leaves out: it shows the last item.
    cut = processor.cut(Request(None, history, ["a", "d"]))
    assert (cut.history, cut.evidence) == (["d"], [shared, []])
    assert processor.cut(Request(None, history[:3], ["a"])).evidence == [["a"]]
    assert processor.cut(Request(None, [], ["a"])).evidence == [[]]
    asked = len(processor.pack([cut])["input_ids"][0]) - len(processor.prompt.instruction())
    assert processor.count_tokens(Request(None, history, ["a", "d"])) == asked


def test_evidence_that_cannot_be_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="evidence_fields has 'genre'"):
        CCFLLMProcessor(tokenizer, ["a"], ["A"], evidence_fields=["genre"])
    with pytest.raises(ValueError, match="evidence_items is -1"):
        by_author(tokenizer, evidence_items=-1)
    lines = by_author(tokenizer)
    with pytest.raises(ValueError, match="evidence has 1 values for 2 candidates"):
        lines.pack([Request(None, ["a"], ["b", "c"], [1, 1], evidence=[["a"]])])


@pytest.mark.parametrize("arm", ["gate", "concat", "text_only"])
def test_streams_packed_side_by_side_do_not_meet(build: BuildModel, arm: str) -> None:
    model, processor = build(arm, "answered", prompt=SIGNED, **FOLDED)
    changed = replace(OTHER, history=[LINES[4], *OTHER.history])
    (first, _), (second, _) = (
        logits(model, processor, stream(), other) for other in (OTHER, changed)
    )
    torch.testing.assert_close(first, second, atol=1e-5, rtol=0)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("arm", ARMS)
def test_an_answer_moves_later_lines_only(build: BuildModel, arm: str, attn: str) -> None:
    model, processor = build(arm, "answered", attn=attn, prompt=SIGNED, **FOLDED)
    (before,) = logits(model, processor, stream())
    for place, line in enumerate(LINES):
        flipped = [*LINES[:place], line | {"liked": not line["liked"]}, *LINES[place + 1 :]]
        (after,) = logits(model, processor, stream(flipped))
        assert torch.equal(after[: place + 1], before[: place + 1]), place
        assert ((after - before)[place + 1 :].abs() > 1e-5).all(), place


def test_a_line_folds_in_what_was_rated_before_it(build: BuildModel) -> None:
    model, processor = build("gate", "answered", prompt=SIGNED, **FOLDED)
    both = logits(model, processor, stream())[0]
    model.cf_logit_scale.data.zero_()
    folded = both - logits(model, processor, stream())[0]
    for place, line in enumerate(LINES):
        row = processor.resolve_item(line)[0]
        rows = torch.tensor([len(processor.item_ids) if row is None else row])
        expected = cf_logits(model, processor, "u0", [*EARLIER, *LINES[:place]], rows)
        torch.testing.assert_close(folded[place : place + 1], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_learns_from_a_stream(build: BuildModel, arm: str) -> None:
    model, processor = build(arm, "answered", lora=True, prompt=SIGNED, **FOLDED)
    labels = [int(bool(line["liked"])) for line in LINES]
    output = model.train()(**processor.pack([replace(stream(), labels=labels)]))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        alone(model.eval(), processor), torch.tensor(labels).float()
    )
    torch.testing.assert_close(output.loss, expected, atol=1e-4, rtol=0)
    output.loss.backward()
    names = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert {name for name, _ in model.lora_parameters()} <= names
    assert ("model.item_alignment.up.weight" in names) == (arm != "text_only")


@pytest.mark.parametrize("form", ITEM_FORMATS)
def test_what_a_stream_says_and_where_it_is_read(
    tokenizer: PreTrainedTokenizerFast, form: str
) -> None:
    processor = CCFLLMProcessor(
        tokenizer,
        ["a", "b"],
        ["Heat (1995)", "Alien"],
        wording="answered",
        history_format=form,
        candidate_format=form,
        histories="signed",
    )
    request = Request(None, ["a", {"id": "b", "liked": False}], labels=[1, 0], stream=True)
    batch = processor.pack([request])
    ids = batch["input_ids"][0]
    said = {
        "slot": "<|ccf_item|> Yes<|ccf_item|> No",
        "title": "\nHeat (1995): Yes\nAlien: No",
        "title_slot": "\nHeat (1995)<|ccf_item|>: Yes\nAlien<|ccf_item|>: No",
    }[form]
    assert tokenizer.decode(ids) == processor.templates["prefix"] + said
    places = batch["answer_positions"][0]
    read_at = "<|ccf_item|>" if form == "slot" else ":"
    assert all(token.endswith(read_at) for token in tokenizer.batch_decode(ids[places, None]))
    assert tokenizer.batch_decode(ids[places + 1, None]) == [" Yes", " No"]
    assert batch["history_depths"][0, places].tolist() == [0, 1]
    assert torch.equal(batch["position_ids"][0], torch.arange(len(ids)))
    assert batch["candidate_items"].tolist() == [[0, 1]]
    assert batch["labels"].tolist() == [[1.0, 0.0]]
    assert processor.count_tokens(request) == len(ids) - len(processor.prompt.instruction())


def check_tokens_up_to_the_colon(tokenizer: PreTrainedTokenizerFast, titles: list[str]) -> None:
    for form in ITEM_FORMATS:
        prompt = HybridPrompt(tokenizer, "answered", form, form, True, None)
        for title in titles:
            line = prompt.item("candidate", 0, title)
            for kind, answer in (("history", " Yes"), ("disliked", " No")):
                span = prompt.item(kind, 0, title)
                assert span.ids == [*line.ids, *prompt.tokens(answer)], title
                if form == "title":  # as written in one go, and none of it has another reading
                    text = tokenizer.decode(line.ids) + answer
                    assert tokenizer(text, add_special_tokens=False)["input_ids"] == span.ids, title


def test_a_line_has_the_same_tokens_with_and_without_its_answer(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    check_tokens_up_to_the_colon(tokenizer, ["Heat (1995)", "Alien", "", "Se7en: Yes", "Why? :"])


@pytest.mark.slow
def test_so_it_is_with_the_tokenizer_of_smollm2() -> None:
    tokenizer = AutoTokenizer.from_pretrained(get_asset("smollm2-135m-instruct"))
    titles = ["Heat (1995)", "It by Stephen King", "", "M*A*S*H", "Why? :", "1984", "Amélie..."]
    check_tokens_up_to_the_colon(tokenizer, titles)
    prompt = HybridPrompt(tokenizer, "answered", "title", "title", True, None)
    assert [len(prompt.answer(liked)) for liked in (True, False)] == [1, 1]


@pytest.mark.parametrize("form", ["full", "slim"])
def test_saved_equals_loaded(build: BuildModel, tmp_path: Path, backbone_folder, form: str) -> None:
    model, processor = build("concat", "answered", prompt=SIGNED, **FOLDED)
    model.save_pretrained(tmp_path, form=form)
    processor.save_pretrained(tmp_path)
    again = CCFLLMForCTR.from_pretrained(
        tmp_path, **({"backbone": str(backbone_folder("llama"))} if form == "slim" else {})
    )
    read = CCFLLMProcessor.from_pretrained(tmp_path)
    assert read.answered
    torch.testing.assert_close(
        logits(again.eval(), read, stream()), logits(model, processor, stream())
    )


def test_a_stream_that_cannot_be_is_refused(build: BuildModel) -> None:
    _, processor = build("gate", "answered", prompt=SIGNED)
    with pytest.raises(ValueError, match="takes no candidates"):
        processor.pack([replace(stream(), candidates=["i1"])])
    with pytest.raises(ValueError, match="labels has 1 values for 6 lines"):
        processor.pack([replace(stream(), labels=[1])])
    _, other = build(prompt=SIGNED)
    with pytest.raises(ValueError, match='wording="answered"'):
        other.pack([stream()])
