"""The words of the hybrid prompt: users and items rendered as token ids and slots."""

import re
from typing import Any

from transformers import PreTrainedTokenizerBase

ITEM_SLOT = "<|ccf_item|>"
USER_SLOT = "<|ccf_user|>"
WORDINGS = ("shared_prefix", "question_last", "answered")
ITEM_FORMATS = ("title_slot", "slot", "title")
ANSWERS = (" Yes", " No")

# Templates are data (our choice of words); `{user}` and `{item}` mark where slots or titles go. A
# title needs separators that a slot can do without, so each format has its own. A hybrid candidate
# block ends at its slot: read there, the slot reaches the answer through the residual stream too,
# not only through attention from a later token. What a prefix says before its user slot is the same
# for everybody and stands in a batch once, so the slot comes late.
QUESTION_LAST = ' Will the user enjoy {item}? Answer with "Yes" or "No".\n#Answer:'
TEMPLATES: dict[str, dict[str, str]] = {
    "shared_prefix": {
        "prefix": (
            "Will the user like the next one, given what they liked? Answer Yes or No.\n"
            "User{user} liked:"
        ),
        "history_slot": "{item}",
        "history_title": "\n{item}",
        "history_title_slot": "\n{item}",
        "disliked_slot": " not{item}",
        "disliked_title": "\nnot {item}",
        "disliked_title_slot": "\nnot {item}",
        "candidate_slot": "{item}",
        "candidate_title": "\n{item}?",
        "candidate_title_slot": " {item}",
    },
    "question_last": {
        "prefix": "#Question: A user{user} has given high ratings to the following items:",
        "history_slot": "{item}",
        "history_title": " {item},",
        "history_title_slot": " {item},",
        "disliked_slot": " not{item}",
        "disliked_title": " not {item},",
        "disliked_title_slot": " not {item},",
        "candidate_slot": QUESTION_LAST,
        "candidate_title": QUESTION_LAST,
        "candidate_title_slot": QUESTION_LAST,
    },
    # Lines of a history are a candidate's and an answer. There is no user slot: what the user
    # likes, the lines say, and they say it of strangers too.
    "answered": {
        "prefix": "Whether one user likes each of these items, Yes or No:",
        "candidate_slot": "{item}",
        "candidate_title": "\n{item}:",
        "candidate_title_slot": "\n{item}:",
    },
}

NO_SLOT = -1
PIECE = re.compile(r"([^{}]*)\{(\w+)\}")
YEAR = re.compile(r"\s*\(\d{4}\)$")


class Span:
    """A run of tokens with the slots among them."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.items: list[int] = []
        self.users: list[int] = []

    def add(self, ids: list[int], item: int = NO_SLOT, user: int = NO_SLOT) -> "Span":
        self.ids += ids
        self.items += [item] * len(ids)
        self.users += [user] * len(ids)
        return self

    def append(self, other: "Span") -> "Span":
        self.ids += other.ids
        self.items += other.items
        self.users += other.users
        return self


class HybridPrompt:
    """Renders the parts of a prompt in the words of one of `WORDINGS`.

    Args:
        tokenizer: the backbone's; two slot tokens are added past its vocabulary.
        wording: of `WORDINGS`, which words are used.
        history_format, candidate_format: of `ITEM_FORMATS`, how an item is rendered.
        title_years: whether titles keep the year at their end.
        templates: replaces entries of `TEMPLATES[wording]`.

    Raises:
        ValueError: on an unknown wording, format or template, a template without its slot, or
            answered lines in two formats.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        wording: str,
        history_format: str,
        candidate_format: str,
        title_years: bool,
        templates: dict[str, str] | None,
    ) -> None:
        for value, allowed, name in (
            (wording, WORDINGS, "wording"),
            (history_format, ITEM_FORMATS, "history_format"),
            (candidate_format, ITEM_FORMATS, "candidate_format"),
        ):
            check_choice(name, value, allowed)
        if unknown := set(templates or {}) - set(TEMPLATES[wording]):
            raise ValueError(
                f"templates has unknown entry {min(unknown)!r}: "
                f"use {', '.join(TEMPLATES[wording])}."
            )
        self.answered = wording == "answered"
        if self.answered and history_format != candidate_format:
            raise ValueError(
                f"history_format={history_format!r} and candidate_format={candidate_format!r} "
                "differ, but in answered histories a candidate is the next line: give the same."
            )
        self.tokenizer = tokenizer
        tokenizer.add_tokens([ITEM_SLOT, USER_SLOT], special_tokens=True)
        slots = tokenizer.convert_tokens_to_ids([ITEM_SLOT, USER_SLOT])
        assert isinstance(slots, list)
        self.item_slot_token_id, self.user_slot_token_id = slots
        # Gemma, for one, is lost without it; a chat model such as SmolLM2 wants none.
        bos = [tokenizer.bos_token_id]
        self.bos_token_ids: list[int] = bos if tokenizer("")["input_ids"][:1] == bos else []
        self.history_format, self.candidate_format = history_format, candidate_format
        self.title_years = title_years
        self.templates = {**TEMPLATES[wording], **(templates or {})}
        self._pieces: dict[str, list[int]] = {}
        self._check_templates()

    def _check_templates(self) -> None:
        for name, template in self.templates.items():
            slot = "{user}" if name == "prefix" else "{item}"
            wanted = template.count(slot) == 1 or (name == "prefix" and template.count(slot) == 0)
            if not wanted:
                raise ValueError(
                    f"Template {name!r} must contain {slot} exactly once: {template!r}."
                )

    @property
    def uses_slots(self) -> bool:
        """Whether any slot is written, that is, whether the prompt is hybrid."""
        return (self.history_format, self.candidate_format) != ("title", "title")

    def tokens(self, text: str) -> list[int]:
        """Token ids of literal text: a title that spells a special token stays text."""
        if text not in self._pieces:
            check_text(text)
            self._pieces[text] = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=True
            )["input_ids"]
        return self._pieces[text]

    def instruction(self) -> list[int]:
        """Tokens that all prompts begin with: the prefix up to its user slot, or all of it, after
        the tokenizer's beginning-of-sequence token, if it puts one before every text."""
        before, _, after = self.templates["prefix"].partition("{user}")
        words = before if self.uses_slots else before + after
        return self.bos_token_ids + (self.tokens(words) if words else [])

    def prefix(self, user: int) -> Span:
        """What follows the instruction: the user slot and the rest of the prefix."""
        _, slot, after = self.templates["prefix"].partition("{user}")
        if not slot or not self.uses_slots:
            return Span()
        span = Span().add([self.user_slot_token_id], user=user)
        return span.add(self.tokens(after) if after else [])

    def answer(self, liked: bool) -> list[int]:
        """Tokens of what stands behind a line's colon, which is never tokenized with it."""
        return self.tokens(ANSWERS[0 if liked else 1])

    def item(self, kind: str, row: int, title: str) -> Span:
        """One rendered item, as `history`, `disliked` or `candidate`; `row` is its slot index
        (catalog row, or past it when new)."""
        if self.answered and kind != "candidate":
            return self.item("candidate", row, title).add(self.answer(kind == "history"))
        form = self.candidate_format if kind == "candidate" else self.history_format
        template = self.templates[f"{kind}_{form}"]
        before, _, after = template.partition("{item}")
        title = title if self.title_years else YEAR.sub("", title)
        words = before + title + ("" if form == "title_slot" else after)
        span = Span()
        span.add(self.tokens(before if form == "slot" else words) if words else [])
        if form != "title":
            span.add([self.item_slot_token_id], item=row)
            span.add(self.tokens(after) if after else [])
        return span


def render_item(template: str, fields: dict[str, Any]) -> str:
    """An item in words, such as "Emma by Jane Austen" by `{title} by {author}`.

    A field that the item lacks is left out, with the words before it. Lists are joined by commas.
    """
    words = ""
    for before, name in PIECE.findall(template):
        value = fields.get(name)
        text = ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else value
        if text not in (None, ""):
            words += f"{before}{text}"
    return words + template[template.rindex("}") + 1 :]


def field_values(fields: dict[str, Any], name: str) -> list[str]:
    """The distinct values of an item's field as they are compared: trimmed, without case."""
    value = fields.get(name)
    values = value if isinstance(value, (list, tuple)) else [value]
    texts = ["" if one is None else str(one).strip().casefold() for one in values]
    return list(dict.fromkeys(text for text in texts if text))


def check_text(text: str) -> None:
    """Raises `ValueError` on a string that no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{ascii(text)[:80]} is no text: it holds half of a letter.") from None


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raises `ValueError` on a value that is none of those allowed."""
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(allowed)}.")
