"""The words of the prompt: what each kind of item says, and where its slot stands."""

import pytest
from transformers import PreTrainedTokenizerFast

from ccf_llm_hf.modeling.prompt_ccf_llm import (
    ITEM_FORMATS,
    ITEM_SLOT,
    TEMPLATES,
    USER_SLOT,
    WORDINGS,
    HybridPrompt,
    render_item,
)

KINDS = ("history", "disliked", "candidate")


def make(tokenizer: PreTrainedTokenizerFast, wording: str, form: str, years: bool) -> HybridPrompt:
    return HybridPrompt(tokenizer, wording, form, form, years, None)


@pytest.mark.parametrize("wording", WORDINGS)
@pytest.mark.parametrize("form", ITEM_FORMATS)
@pytest.mark.parametrize("years", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_an_item_is_its_template_with_title_and_slot_in_place(
    tokenizer: PreTrainedTokenizerFast, wording: str, form: str, years: bool, kind: str
) -> None:
    prompt = make(tokenizer, wording, form, years)
    title = "Heat (1995)" if years else "Heat"
    shown = {"slot": ITEM_SLOT, "title": title, "title_slot": title + ITEM_SLOT}[form]
    span = prompt.item(kind, 7, "Heat (1995)")
    template = TEMPLATES[wording].get(f"{kind}_{form}")
    if template is None:  # a line of an answered history
        answer = " Yes" if kind == "history" else " No"
        template = TEMPLATES[wording][f"candidate_{form}"] + answer
    assert tokenizer.decode(span.ids) == template.format(item=shown)
    assert [row for row in span.items if row >= 0] == [7] * (form != "title")


@pytest.mark.parametrize("wording", ["shared_prefix", "question_last"])
@pytest.mark.parametrize("form", ["slot", "title"])
def test_the_user_slot_comes_after_what_all_prompts_share(
    tokenizer: PreTrainedTokenizerFast, wording: str, form: str
) -> None:
    prompt = make(tokenizer, wording, form, True)
    before, _, after = TEMPLATES[wording]["prefix"].partition("{user}")
    user = prompt.prefix(3)
    if form == "title":
        assert prompt.instruction() == prompt.bos_token_ids + prompt.tokens(before + after)
        assert user.ids == []
    else:
        assert prompt.instruction() == prompt.bos_token_ids + prompt.tokens(before)
        assert user.ids == [prompt.user_slot_token_id, *prompt.tokens(after)]
        assert tokenizer.convert_ids_to_tokens(user.ids[0]) == USER_SLOT
        assert user.users[0] == 3


def test_a_template_says_the_slot_once(tokenizer: PreTrainedTokenizerFast) -> None:
    for words in ("nothing", "{item} and {item}"):
        with pytest.raises(
            ValueError, match=r"'candidate_slot' must contain \{item\} exactly once"
        ):
            HybridPrompt(
                tokenizer, "shared_prefix", "slot", "slot", True, {"candidate_slot": words}
            )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"title": "Emma", "author": "Jane Austen"}, "Emma by Jane Austen."),
        ({"title": "Emma", "author": ""}, "Emma."),
        ({"title": "Emma"}, "Emma."),
        (
            {"title": "Good Omens", "author": ["Pratchett", "Gaiman"]},
            "Good Omens by Pratchett, Gaiman.",
        ),
        ({"title": "{author}", "author": "{title}"}, "{author} by {title}."),
    ],
)
def test_an_item_in_words_leaves_out_what_it_lacks(fields: dict[str, object], words: str) -> None:
    assert render_item("{title} by {author}.", fields) == words
