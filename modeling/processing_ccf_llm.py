"""The hybrid prompt: raw users, items and titles in, token ids, slots and layout tensors out."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging

from .attention_ccf_llm import GROUP, SHARED
from .checkpoint_ccf_llm import (
    CATALOG_FILE,
    FIELDS_FILE,
    HUB_ARGUMENTS,
    TEXT_TOKENIZER_FOLDER,
    USERS_FILE,
    check_catalog,
    copy_code,
    find_file,
    load_text_tokenizer,
    load_tokenizer,
    read_field_values,
    read_ids,
    read_json,
    reading,
    write_ids,
    write_json,
)
from .configuration_ccf_llm import (
    AUTO_MAP,
    IGNORED_LABEL,
    check_kinds,
    check_release,
    ids_fingerprint,
    is_kind,
    read_id,
)
from .prompt_ccf_llm import (
    ANSWERS,
    NO_SLOT,
    PIECE,
    HybridPrompt,
    Span,
    check_choice,
    check_text,
    field_values,
    render_item,
)

logger = logging.get_logger(__name__)

HISTORIES = ("likes", "signed")
PROCESSOR_FILE = "processor_config.json"
PROMPT_SETTINGS = (
    "wording",
    "history_format",
    "candidate_format",
    "history_window",
    "histories",
    "fold_in_items",
    "rating_scale",
    "title_years",
    "item_template",
    "evidence_fields",
    "evidence_items",
    "templates",
)
TOKEN_FIELDS = (
    "input_ids",
    "item_slots",
    "user_slots",
    "position_ids",
    "sequence_ids",
    "block_ids",
    "history_depths",
)

User = str | int | None
Item = str | int | dict[str, Any]
Block = tuple[int, Span, Span]  # of a candidate: slot row, evidence, and its own words and slot
Values = tuple[tuple[int, float], ...]  # rows of the CF table's field values, and their weights
Count = TypeVar("Count")  # an int, or a NumPy array of them


def window_start(num_earlier: Count, history_window: tuple[int, int]) -> Count:
    """First history item that a sample with `num_earlier` earlier items sees (our choice).

    With `(H, S)` the start moves in strides of S, so that S samples in a row share one prefix;
    S = 1 is the protocol's strict last-H. The window then holds between H and H + S - 1 items.
    """
    length, stride = history_window
    beyond: Any = num_earlier
    return (beyond > length) * stride * ((beyond - length) // stride)


def is_container(value: Any) -> bool:
    """Whether a value holds several others in an order: a list, an array, a Series, an iterator."""
    if isinstance(value, (str, bytes, bytearray, Mapping, Set)) or not hasattr(value, "__iter__"):
        return False
    return getattr(value, "shape", None) != ()  # a single number of PyTorch's claims to be one


def read_title(value: Any) -> str | None:
    """A title as text, as it stands; None where it is missing."""
    return value if isinstance(value, str) else read_id(value)


def read_number(value: Any) -> float:
    """A number; NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last of tensors of several
        return math.nan


def read_items(values: Any, name: str) -> list[Any]:
    """The items of any container as a list, none for None.

    Raises:
        ValueError: it is a single item, a set or a table, or holds what is no item.
    """
    if values is None:
        return []
    if not is_container(values) or len(getattr(values, "shape", ())) > 1:
        raise ValueError(f"{name} is {' '.join(repr(values).split())[:80]}: give a list of items.")
    items = list(values)
    for place, item in enumerate(items):
        try:
            usable = read_id(item.get("id") if isinstance(item, dict) else item) is not None
            if isinstance(item, dict):
                usable = read_title(item.get("title")) is not None or usable
        except ValueError:
            usable = False
        if not usable:
            raise ValueError(
                f"{name}: item {place} is {' '.join(repr(item).split())[:80]}: give an id, a "
                "title, or a dict with either."
            )
    return items


@dataclass
class Request:
    """Candidates to score for one user by one history.

    Attributes:
        user: raw id; an unknown one, or None, is a new user.
        history: earlier items, oldest first; `{"id": ..., "liked": False}` for one that the user
            disliked, where histories are signed.
        candidates: items to score: id, title, or `{"id": ..., "title": ...}`.
        history_lengths: how many of `history` each candidate may see, which is then taken as it
            stands. None: the processor cuts its window, and every candidate sees all of that.
        labels: 0/1 a candidate, or None.
        earlier: with `history_lengths` and signed histories, items before `history`, which no
            prompt shows and every candidate's user vector is folded in from.
        evidence: with `history_lengths`, per candidate the earlier items that stand in its own
            block, before it; see `CCFLLMProcessor.evidence`.
        stream: score the lines of `history` themselves, each after the lines before it and their
            answers; `labels` are theirs, `candidates` none. For `wording="answered"`; the history
            is taken as it stands.
        hidden: of a stream, whether each line is hidden from those after it.
    """

    user: User = None
    history: list[Any] = field(default_factory=list)
    candidates: list[Any] = field(default_factory=list)
    history_lengths: list[int] | None = None
    labels: list[int] | None = None
    earlier: list[Any] = field(default_factory=list)
    evidence: list[list[Any]] | None = None
    stream: bool = False
    hidden: list[bool] | None = None

    @property
    def scored(self) -> list[Any]:
        """The items that get a score each."""
        return self.history if self.stream else self.candidates


class PackedRow:
    """One flat row of tokens, all requests one after the other, and where their answers are read.

    Items outside the catalog get slot numbers past the table, in order of first mention.
    """

    def __init__(self, shared: list[int], num_items: int) -> None:
        self.num_items = num_items
        self.new_items: dict[tuple[str, Values], int] = {}
        self.tokens: dict[str, list[int]] = {name: [] for name in TOKEN_FIELDS}
        self.num_shared = len(shared)
        self._extend(Span().add(shared), SHARED, start=0, block=0, depth=0)
        # One entry a sequence from here on.
        self.answers: list[list[tuple[int, int]]] = []  # (position, item) a candidate
        self.users: list[int] = []
        self.labels: list[list[int] | None] = []
        self.histories: list[list[tuple[int, float]]] = []  # signed: (table row, target)
        self.unshown: list[int] = []  # how many of these come before what the prompt shows

    def add_item(self, text: str, values: Values) -> int:
        """Slot number of an item outside the catalog."""
        return self.new_items.setdefault((text, values), self.num_items + len(self.new_items))

    def add_sequence(
        self,
        prefix: Span,
        history: list[Span],
        blocks: list[Block],
        lengths: list[int],
    ) -> None:
        """Prefix and history once, then a block per candidate, which sees `lengths` items. What
        several blocks begin with, the same evidence, stands once too."""
        sequence = len(self.answers)
        self._extend(prefix, sequence, start=self.num_shared, block=0, depth=0)
        ends = [self.num_shared + len(prefix.ids)]  # ends[i]: position after i history items
        for depth, span in enumerate(history, start=1):
            self._extend(span, sequence, start=ends[-1], block=0, depth=depth)
            ends.append(ends[-1] + len(span.ids))
        answers: dict[int, tuple[int, int]] = {}
        group = 0
        for (length, *_), places in group_blocks(blocks, lengths).items():
            start, shared = ends[length], 0
            if len(places) > 1:
                group += 1
                shared = group * GROUP
                evidence = blocks[places[0]][1]
                self._extend(evidence, sequence, start, block=shared, depth=length)
                start += len(evidence.ids)
            for place in places:
                item, evidence, span = blocks[place]
                rest = span if shared else Span().append(evidence).append(span)
                self._extend(rest, sequence, start, block=shared + place + 1, depth=length)
                answers[place] = (len(self.tokens["input_ids"]) - 1, item)
        self.answers.append([answers[place] for place in range(len(blocks))])

    def add_stream(self, prefix: Span, lines: list[tuple[int, Span, Span | None]]) -> None:
        """Prefix, then lines of (item, words up to the answer, answer), each scored where its words
        end. An answer belongs to the history that the next line sees, not to that of its own. A
        line without an answer is hidden: a block by itself, as a candidate is."""
        sequence, answers = len(self.answers), []
        self._extend(prefix, sequence, start=self.num_shared, block=0, depth=0)
        start = self.num_shared + len(prefix.ids)
        depth = 0
        for block, (item, line, answer) in enumerate(lines, start=1):
            self._extend(line, sequence, start, block=0 if answer else block, depth=depth)
            answers.append((len(self.tokens["input_ids"]) - 1, item))
            if answer is None:
                continue
            depth += 1
            start += len(line.ids)
            self._extend(answer, sequence, start, block=0, depth=depth)
            start += len(answer.ids)
        self.answers.append(answers)

    def _extend(self, span: Span, sequence: int, start: int, block: int, depth: int) -> None:
        count, tokens = len(span.ids), self.tokens
        tokens["input_ids"] += span.ids
        tokens["item_slots"] += span.items
        tokens["user_slots"] += span.users
        tokens["position_ids"] += range(start, start + count)
        tokens["sequence_ids"] += [sequence] * count
        tokens["block_ids"] += [block] * count
        tokens["history_depths"] += [depth] * count

    def tensors(self, new_title_tokens: list[list[int]], signed: bool) -> dict[str, Tensor]:
        """The batch; token fields `(1, length)`, candidates `(batch, num_candidates)`."""
        batch = {name: torch.tensor([values]) for name, values in self.tokens.items()}
        width = max(len(answers) for answers in self.answers)
        for place, name in enumerate(("answer_positions", "candidate_items")):
            batch[name] = torch.tensor(
                [
                    [answer[place] for answer in answers] + [0] * (width - len(answers))
                    for answers in self.answers
                ]
            )
        counts = torch.tensor([len(answers) for answers in self.answers])
        batch["candidate_mask"] = torch.arange(width)[None, :] < counts[:, None]
        batch["candidate_users"] = torch.tensor(self.users)
        if self.labels[0] is not None:
            batch["labels"] = torch.tensor(
                [
                    [float(label) for label in labels or []]
                    + [float(IGNORED_LABEL)] * (width - len(labels or []))
                    for labels in self.labels
                ]
            )
        if signed:
            longest = max(1, *map(len, self.histories))
            table = torch.tensor(  # (num_sequences, longest, 2)
                [
                    history + [(NO_SLOT, 0.0)] * (longest - len(history))
                    for history in self.histories
                ],
                dtype=torch.float64,
            )
            batch["history_items"] = table[..., 0].long()
            batch["history_targets"] = table[..., 1].float()
            batch["history_unshown"] = torch.tensor(self.unshown)
        if new_title_tokens:
            flat = [token for title in new_title_tokens for token in title]
            batch["new_title_ids"] = torch.tensor(flat, dtype=torch.long)
            batch["new_title_lengths"] = torch.tensor([len(title) for title in new_title_tokens])
        if any(values for _, values in self.new_items):
            pair = pad_values([values for _, values in self.new_items])
            batch["new_field_values"], batch["new_field_weights"] = pair
        return batch


def group_blocks(
    blocks: Sequence[Block], lengths: Sequence[int]
) -> dict[tuple[Any, ...], list[int]]:
    """Places of blocks of the same evidence after the same history, by what they share, whose first
    entry is the history's length; a block without evidence is alone."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for place, ((_, evidence, _), length) in enumerate(zip(blocks, lengths, strict=True)):
        told = (*evidence.ids, NO_SLOT, *evidence.items) if evidence.ids else (NO_SLOT, place)
        groups.setdefault((length, *told), []).append(place)
    return groups


def pad_values(values: Sequence[Values]) -> tuple[Tensor, Tensor]:
    """Field values of n new items as the CF table takes them: `(n, most)` int64, -1 where padded,
    and float32."""
    most = max(map(len, values), default=0)
    padded = [[*of_item, *[(-1, 0.0)] * (most - len(of_item))] for of_item in values]
    table = torch.tensor(padded, dtype=torch.float64).view(len(values), most, 2)
    return table[..., 0].long(), table[..., 1].float()


def _index_ids(ids: Sequence[Any], side: str) -> tuple[list[str], dict[str, int]]:
    """Ids as text, those of text as they are, and the row of each as it is looked up."""
    index: dict[str, int] = {}
    for row, raw in enumerate(ids):
        key = read_id(raw)
        if key is None or key in index:
            wrong = "leaves an id empty" if key is None else f"names an id twice, {key!r}"
            raise ValueError(f"The catalog {wrong}: give each {side} one row and an id.")
        index[key] = row
    return [raw if isinstance(raw, str) else str(read_id(raw)) for raw in ids], index


class CCFLLMProcessor(ProcessorMixin):
    """Writes hybrid prompts and packs them.

    Args:
        tokenizer: the backbone's; two slot tokens are added past its vocabulary.
        item_ids, item_titles, user_ids: the catalog in CF table order (raw ids, see [`read_id`]).
        wording: the prompt's words: `shared_prefix` (ours, default) or `question_last` (the
            papers'), which asks after every candidate, or `answered` (ours): a history is lines of
            an item and its answer, and a candidate the next line up to its colon. It shows dislikes
            as lines, so it needs `histories="signed"`. All are packed alike.
        history_format, candidate_format: how an item is rendered: `slot`, `title_slot`, or `title`
            (text only). With `title` for both, the user slot is left out too; answered histories
            have none unless a template puts `{user}` into the prefix.
        history_window: `(H, S)`, see [`window_start`].
        histories: `likes` (the papers' protocol): a history holds liked items; `signed`
            (ours): disliked ones too, each given as `{"id": ..., "liked": False}` or with a
            `rating`, and shown as such.
        fold_in_items: how many signed items before the window a model with `cf_fold_in` folds in
            besides those that the prompt shows.
        rating_scale: `(midpoint, slope)` of history items that come with a `rating`: liked above
            the midpoint; folded in as `sigmoid(slope * (rating - midpoint))`, as the CF model was
            fitted. None: this model takes no ratings.
        title_years: whether the prompt writes the year at the end of a title, as in "Heat (1995)";
            its six tokens can be half of what an item costs. A gate reads the whole title anyway.
        item_template: an item in words, of its title and its fields, such as `{title} by {author}`;
            see [`render_item`]. A gate reads it too.
        evidence_fields: fields, such as author, by which items of a history bear on a candidate;
            see [`evidence`]. Of a history given whole they are found before the window.
        evidence_items: how many of them stand in a candidate's block, at most.
        templates: replaces entries of `TEMPLATES[wording]`.
        item_fields: what is known of each catalog item besides its title, as text or lists of text.
        text_tokenizer: that of the sentence encoder by which the model reads items' words, where it
            has one.
        field_values: (field, value) pairs that have CF vectors, in the order of these: those of
            `CFVectors`. By them an item outside the catalog, given as a dict with such a field, has
            a CF vector.

    Raises:
        ValueError: on an item template without a title or of a field that no item has, an unknown
            wording, format, `histories` or template, on answered histories of likes alone or of two
            formats, or on duplicate ids.
    """

    attributes = ["tokenizer"]  # noqa: RUF012
    tokenizer_class = "AutoTokenizer"

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        item_ids: list[str] | None = None,
        item_titles: list[str] | None = None,
        user_ids: list[str] | None = None,
        wording: str = "shared_prefix",
        history_format: str = "slot",
        candidate_format: str = "slot",
        history_window: tuple[int, int] = (20, 16),
        histories: str = "likes",
        fold_in_items: int = 0,
        rating_scale: tuple[float, float] | None = None,
        title_years: bool = True,
        item_template: str = "{title}",
        evidence_fields: list[str] | None = None,
        evidence_items: int = 8,
        templates: dict[str, str] | None = None,
        item_fields: list[dict[str, Any]] | None = None,
        text_tokenizer: PreTrainedTokenizerBase | None = None,
        field_values: Sequence[tuple[str, str]] = (),
    ) -> None:
        checked = (*PROMPT_SETTINGS, "item_fields")
        given = {name: value for name, value in locals().items() if name in checked}
        check_kinds(CCFLLMProcessor.__init__, given)
        check_choice("histories", histories, HISTORIES)
        if wording == "answered" and histories != "signed":
            raise ValueError(
                'wording="answered" shows dislikes as lines answered No: it needs '
                'histories="signed", and data that was prepared with signed histories.'
            )
        if history_window[1] < 1:
            raise ValueError(f"history_window={history_window} needs S >= 1.")
        self.chat_template = None
        self.tokenizer, self.text_tokenizer = tokenizer, text_tokenizer
        self.prompt = HybridPrompt(
            tokenizer, wording, history_format, candidate_format, title_years, templates
        )
        self.item_slot_token_id = self.prompt.item_slot_token_id
        self.user_slot_token_id = self.prompt.user_slot_token_id
        self.wording, self.history_window = wording, (history_window[0], history_window[1])
        self.history_format, self.candidate_format = history_format, candidate_format
        self.histories, self.fold_in_items = histories, fold_in_items
        self.rating_scale = rating_scale and (float(rating_scale[0]), float(rating_scale[1]))
        self.title_years = title_years
        self.item_template, self.templates = item_template, self.prompt.templates
        self.evidence_fields = list(evidence_fields or [])
        self.field_values = [(field, value) for field, value in field_values]
        self._value_index = {pair: row for row, pair in enumerate(self.field_values)}
        self.cf_fields = list(dict.fromkeys(field for field, _ in self.field_values))
        self.evidence_items = evidence_items
        self._set_catalog(item_ids or [], item_titles or [], user_ids or [], item_fields)
        self._warned = False

    def with_catalog(
        self,
        item_ids: list[str],
        item_titles: list[str],
        user_ids: list[str],
        item_fields: list[dict[str, Any]] | None = None,
        field_values: Sequence[tuple[str, str]] = (),
    ) -> "CCFLLMProcessor":
        """The same tokenizer and prompt over another catalog, for `model.replace_catalog`."""
        prompt = {name: getattr(self, name) for name in PROMPT_SETTINGS}
        catalog = (item_ids, item_titles, user_ids)
        return type(self)(
            self.tokenizer,
            *catalog,
            **prompt,
            item_fields=item_fields,
            text_tokenizer=self.text_tokenizer,
            field_values=field_values,
        )

    def _set_catalog(
        self,
        item_ids: list[str],
        item_titles: list[str],
        user_ids: list[str],
        item_fields: list[dict[str, Any]] | None,
    ) -> None:
        if len(item_ids) != len(item_titles):
            raise ValueError(
                f"{len(item_ids)} item ids but {len(item_titles)} titles: give one each."
            )
        self.item_ids, self.item_index = _index_ids(item_ids, "item")
        self.user_ids, self.user_index = _index_ids(user_ids, "user")
        self.item_titles = [read_title(title) or "" for title in item_titles]
        self.item_fields = item_fields or [{} for _ in item_ids]
        if len(self.item_fields) != len(item_ids):
            raise ValueError(
                f"{len(item_ids)} item ids but {len(self.item_fields)} item_fields: give one each."
            )
        for row, fields in enumerate(self.item_fields):
            for name, value in fields.items():
                values = value if isinstance(value, (list, tuple)) else [value]
                if not all(isinstance(one, str) or is_kind(one, float | None) for one in values):
                    raise ValueError(
                        f"item_fields of item {row}: {name!r} is {repr(value)[:80]}; give text, a "
                        "number, or a list of them."
                    )
        known = {"title"}.union(*self.item_fields) if item_ids else None
        for name in self.evidence_fields:
            if known is not None and name not in known:
                raise ValueError(
                    f"evidence_fields has {name!r}, which no item of the catalog has: use "
                    f"{', '.join(sorted(known))}."
                )
        for _, name in PIECE.findall(self.item_template):
            if known is not None and name not in known:
                raise ValueError(
                    f"item_template={self.item_template!r} asks for {name!r}, which no item of the "
                    f"catalog has: use {', '.join(sorted(known))}."
                )
        if "{title}" not in self.item_template:
            raise ValueError(f"item_template={self.item_template!r} must contain {{title}}.")
        self.item_texts = [
            render_item(self.item_template, {**fields, "title": title})
            for title, fields in zip(self.item_titles, self.item_fields, strict=True)
        ]
        self.title_index: dict[str, int] = {}
        for row, title in enumerate(self.item_titles):
            self.title_index.setdefault(title, row)

    @property
    def ids_fingerprint(self) -> str:
        """Ties this catalog to the CF tables of a model."""
        return ids_fingerprint(self.user_ids, self.item_ids, self.field_values)

    @property
    def uses_slots(self) -> bool:
        """Whether any slot is written, that is, whether the prompt is hybrid."""
        return self.prompt.uses_slots

    @property
    def answered(self) -> bool:
        """Whether histories are lines of items and answers, each of which can be a label."""
        return self.prompt.answered

    @property
    def model_input_names(self) -> list[str]:
        """Names of the tensors that every call returns."""
        return [
            *TOKEN_FIELDS,
            "answer_positions",
            "candidate_items",
            "candidate_mask",
            "candidate_users",
        ]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of an item's words as a slot's text side takes them."""
        if not text or self.text_tokenizer is None:
            return self.prompt.tokens(text) if text else []
        check_text(text)
        return self.text_tokenizer(text, truncation=True)["input_ids"]

    def text_prefix_ids(self) -> list[int]:
        """What a causal model reads before an item's words: the beginning-of-sequence token, if the
        tokenizer puts one before every text, else a line break."""
        return self.prompt.bos_token_ids or self.prompt.tokens("\n")

    def item_title_ids(self) -> list[list[int]]:
        """`text_ids` of every catalog item's words, in table order."""
        return [self.text_ids(text) for text in self.item_texts]

    def answer_token_ids(self) -> tuple[int, int]:
        """Ids of " Yes" and " No".

        Raises:
            ValueError: when the tokenizer splits them.
        """
        yes, no = (self.prompt.tokens(word) for word in ANSWERS)
        if len(yes) != 1 or len(no) != 1:
            raise ValueError(
                "This tokenizer splits ' Yes' or ' No' into pieces: use another backbone."
            )
        return yes[0], no[0]

    def resolve_item(self, item: Item) -> tuple[int | None, str]:
        """Catalog row (None when new) and title of an item given by id, title, or both.

        A dict may hold `id`, `title`, and in a history `liked` or `rating` (see `likes`). A bare
        value is looked up as id, then as title, else taken as the title of a new item, which has
        text but no CF vector. (One given as a dict has, by its fields, see `new_values`.)
        """
        if isinstance(item, dict):
            raw, title = read_id(item.get("id")), read_title(item.get("title"))
            if raw is None and title is None:
                raise ValueError(f"Item {item!r} has neither id nor title: give at least one.")
            row = None if raw is None else self.item_index.get(raw)
            row = self.title_index.get(title) if row is None and title else row
            return row, (title or "") if row is None else self.item_titles[row]
        key = read_id(item)
        if key is None:
            raise ValueError(f"Item {item!r} is empty: give an id or a title.")
        row = self.item_index.get(key)
        if row is None:
            key = item if isinstance(item, str) else key
            row = self.title_index.get(key)
        if row is not None:
            return row, self.item_titles[row]
        if not self._warned:  # of thousands, one is enough
            self._warned = True
            example = (
                f" (ids of this catalog look like {self.item_ids[0]!r})" if self.item_ids else ""
            )
            logger.warning(
                "Item %r is no id or title of the catalog: taken as a new title%s. Further ones "
                "are not named.",
                key,
                example,
            )
        return None, key

    def item_text(self, item: Item) -> tuple[int | None, str]:
        """Catalog row (None when new) of an item, and its words by `item_template`; the fields of a
        new one are those of its dict."""
        row, title = self.resolve_item(item)
        if row is not None:
            return row, self.item_texts[row]
        fields = item if isinstance(item, dict) else {}
        return None, render_item(self.item_template, {**fields, "title": title})

    def new_values(self, item: Item) -> Values:
        """Rows of the CF table's field values that a new item has, and what each counts; none of a
        catalog item, whose vector holds them. A field's vector is the mean of its values'."""
        if not isinstance(item, dict) or self.resolve_item(item)[0] is not None:
            return ()
        found: list[tuple[int, float]] = []
        for name in self.cf_fields:
            values = field_values(item, name)
            rows = [self._value_index.get((name, value)) for value in values]
            found += [(row, 1 / len(values)) for row in rows if row is not None]
        return tuple(found)

    def evidence(self, history: Sequence[Item], candidates: Sequence[Item]) -> list[list[Item]]:
        """For each candidate the items of a history, or of the part that the window leaves out,
        that share a value of `evidence_fields` with it, oldest first: `evidence_items` at most,
        those that share most, the latest of equals."""
        places: dict[tuple[str, str], list[int]] = {}
        for place, item in enumerate(history if self.evidence_fields else []):
            for topic in self.topics(item):
                places.setdefault(topic, []).append(place)
        found = []
        for candidate in candidates:
            shared = Counter(
                place for topic in self.topics(candidate) for place in places.get(topic, [])
            )
            best = sorted(shared, key=lambda place: (-shared[place], -place))
            found.append([history[place] for place in sorted(best[: self.evidence_items])])
        return found

    def topics(self, item: Item) -> frozenset[tuple[str, str]]:
        """(field, value) pairs of an item's `evidence_fields`, letters lowered."""
        row, _ = self.resolve_item(item)
        fields = item if row is None and isinstance(item, dict) else {}
        fields = fields if row is None else self.item_fields[row]
        names = self.evidence_fields
        return frozenset((name, value) for name in names for value in field_values(fields, name))

    @cached_property
    def topic_rows(self) -> dict[tuple[str, str], list[int]]:
        """Catalog rows by topic; see `topics`."""
        rows: dict[tuple[str, str], list[int]] = {}
        for row, item in enumerate(self.item_ids):
            for topic in self.topics(item):
                rows.setdefault(topic, []).append(row)
        return rows

    def likes(self, item: Item) -> bool:
        """Whether a history item was liked: yes, unless it is a dict whose `liked` is False or
        whose `rating` does not lie above the midpoint of `rating_scale`.

        Raises:
            ValueError: it was not, and this prompt has no form for that; or ratings mean nothing.
        """
        liked = self._graded(item) > 0.5
        if not liked and self.histories != "signed":
            raise ValueError(
                f"The history holds {item!r}, but this model reads likes only: leave it out."
            )
        return liked

    def target(self, item: Item) -> float:
        """What folding in takes a history item for: 0 disliked to 1 liked."""
        self.likes(item)
        return self._graded(item)

    def _graded(self, item: Item) -> float:
        if not isinstance(item, dict):
            return 1.0
        rating = item.get("rating")
        if rating is None:
            liked = read_number(item.get("liked", True))
            if liked not in (0, 1):
                raise ValueError(f"The history holds {item!r}: liked is True or False.")
            return liked
        if self.rating_scale is None:
            raise ValueError(
                f"The history holds {item!r}, but this model takes no ratings: give liked instead."
            )
        midpoint, slope = self.rating_scale
        rating = read_number(rating)
        if not math.isfinite(rating):
            raise ValueError(
                f"The history holds {item!r}: give a rating as a number, as {midpoint:g} is."
            )
        # The sigmoid, in a form that no slope can make overflow.
        return 0.5 * (1.0 + math.tanh(0.5 * slope * (rating - midpoint)))

    def resolve_user(self, user: User) -> int:
        """CF table row of a user; `len(user_ids)`, the cold row, for an unknown one."""
        key = read_id(user)
        return len(self.user_ids) if key is None else self.user_index.get(key, len(self.user_ids))

    def window(self, history: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        """What of a whole history a candidate after it reads: items that are folded in only, and
        those that the prompt shows, both oldest first."""
        start = window_start(len(history), self.history_window)
        return list(history[max(0, start - self.fold_in_items) : start]), list(history[start:])

    def cut(self, request: Request) -> Request:
        """A request whose history is taken as it stands: itself, or what its window leaves."""
        if request.history_lengths is not None or request.stream:
            return request
        earlier, history = self.window(request.history)
        return replace(
            request,
            history=history,
            history_lengths=[len(history)] * len(request.candidates),
            earlier=earlier,
            evidence=self.evidence(request.history[: -len(history) or None], request.candidates),
        )

    def count_tokens(self, request: Request) -> int:
        """Tokens that a request adds to a batch, that is, without the instruction, which a batch
        has once."""
        row, request = PackedRow([], len(self.item_ids)), self.cut(request)
        spans = [self.prompt.prefix(0)]
        spans += [self._history_item(item, row) for item in request.history]
        blocks = self._blocks(request, row)
        spans += [span for _, _, span in blocks]
        for places in group_blocks(blocks, request.history_lengths or []).values():
            spans.append(blocks[places[0]][1])
        return sum(len(span.ids) for span in spans)

    def _history_item(self, item: Item, packed: PackedRow) -> Span:
        kind = "history" if self.likes(item) else "disliked"
        return self.prompt.item(kind, *self._slot(item, packed))

    def _blocks(self, request: Request, packed: PackedRow) -> list[Block]:
        evidence = request.evidence or [[]] * len(request.candidates)
        return [
            self._block(item, packed, lines)
            for item, lines in zip(request.candidates, evidence, strict=True)
        ]

    def _block(self, item: Item, packed: PackedRow, evidence: Sequence[Item]) -> Block:
        lines = Span()
        for line in evidence:
            lines.append(self._history_item(line, packed))
        slot = self._slot(item, packed)
        return slot[0], lines, self.prompt.item("candidate", *slot)

    def _slot(self, item: Item, packed: PackedRow) -> tuple[int, str]:
        row, text = self.item_text(item)
        return (packed.add_item(text, self.new_values(item)) if row is None else row), text

    def __call__(
        self,
        user: Any = None,
        history: list[Any] | None = None,
        candidates: list[Any] | None = None,
        history_lengths: list[Any] | None = None,
        labels: list[Any] | None = None,
        earlier: list[Any] | None = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Hybrid prompts for one user, or for a batch when `candidates` is a list of lists.

        Args:
            user, history, candidates, history_lengths, labels, earlier: the fields of a
                [`Request`]; in a batch, a list with one entry a user.

        Returns:
            See [`pack`].

        Raises:
            ValueError: on missing candidates or lists whose lengths differ.
        """
        if return_tensors != "pt" or kwargs:
            raise ValueError(
                f"return_tensors must be 'pt' and {sorted(kwargs)} are unknown arguments."
            )
        asked: Any = candidates
        candidates = list(asked) if is_container(asked) else read_items(asked, "candidates")
        if not candidates:
            raise ValueError("candidates is empty: give at least one item to score.")
        batched = is_container(candidates[0])
        size = len(candidates) if batched else 1
        given = {
            "user": user,
            "history": history,
            "candidates": candidates,
            "history_lengths": history_lengths,
            "labels": labels,
            "earlier": earlier,
        }
        columns = {
            name: value if batched else [value]
            for name, value in given.items()
            if value is not None
        }
        for name, values in columns.items():
            if not is_container(values):
                raise ValueError(f"{name} must be a list with one entry for each of {size} users.")
            columns[name] = list(values)
            if len(columns[name]) != size:
                found = len(columns[name])
                raise ValueError(f"{name} has {found} entries but candidates has {size}.")
        rows = [{name: values[place] for name, values in columns.items()} for place in range(size)]
        for row in rows:
            for name in ("history", "candidates", "earlier"):
                row[name] = read_items(row.get(name), name)
            for name in ("history_lengths", "labels"):
                values = row.get(name)
                if values is None:
                    continue
                if not is_container(values):
                    raise ValueError(
                        f"{name} is {values!r}: give one number a candidate, in a list."
                    )
                row[name] = values.tolist() if hasattr(values, "tolist") else list(values)
        return self.pack([Request(**row) for row in rows])

    def pack(self, requests: Sequence[Request]) -> BatchFeature:
        """All requests in one flat row; sequence i is that of request i.

        Returns:
            Tensors `(1, length)` per token, and `answer_positions`, `candidate_items`,
            `candidate_mask`, `labels` `(batch, num_candidates)`, `candidate_users` `(batch,)`; with
            signed histories also `history_items` and `history_targets` `(batch, longest)` and
            `history_unshown` `(batch,)`; with new items `new_title_ids` and `new_title_lengths`,
            and `new_field_values` and `new_field_weights` where these have CF vectors.

        Raises:
            ValueError: labels for some requests only, or lists whose lengths differ.
        """
        if len({request.labels is None for request in requests}) > 1:
            raise ValueError("labels must be given for every user of the batch or for none.")
        packed = PackedRow(self.prompt.instruction(), len(self.item_ids))
        for request in requests:
            self._write(packed, request)
        new = [self.text_ids(text) for text, _ in packed.new_items]
        return BatchFeature(packed.tensors(new, signed=self.histories == "signed"))

    def _write(self, packed: PackedRow, request: Request) -> None:
        request = self.cut(request)
        history, lengths = request.history, request.history_lengths or []
        if request.stream and (lengths or request.candidates or not self.prompt.answered):
            raise ValueError(
                "A stream scores the lines of its history: it takes no candidates or "
                'history_lengths, and a processor of wording="answered".'
            )
        kind = "lines" if request.stream else "candidates"
        for name in ("history_lengths", "labels", "evidence", "hidden"):
            values = getattr(request, name)
            if values is not None and len(values) != len(request.scored):
                raise ValueError(
                    f"{name} has {len(values)} values for {len(request.scored)} {kind}."
                )
        if not all(isinstance(n, Integral) and 0 <= n <= len(history) for n in lengths):
            raise ValueError(
                f"history_lengths is {lengths!r}: give whole numbers from 0 to the history's "
                f"{len(history)} items."
            )
        for label in () if request.labels is None else request.labels:
            if read_number(label) not in (0, 1, IGNORED_LABEL):
                raise ValueError(f"labels holds {label!r}: give 0 or 1 for each of the {kind}.")
        user = self.resolve_user(request.user)
        prefix = self.prompt.prefix(user)
        if request.stream:
            hidden = request.hidden or [False] * len(history)
            answers = [Span().add(self.prompt.answer(self.likes(item))) for item in history]
            packed.add_stream(
                prefix,
                [
                    (*self._block(item, packed, ())[::2], None if hide else answer)
                    for item, answer, hide in zip(history, answers, hidden, strict=True)
                ],
            )
            history = [item for item, hide in zip(history, hidden, strict=True) if not hide]
        else:
            shown = [self._history_item(item, packed) for item in history]
            packed.add_sequence(prefix, shown, self._blocks(request, packed), lengths)
        packed.users.append(user)
        packed.labels.append(request.labels)
        if self.histories == "signed":
            signed = [*request.earlier, *history]
            packed.histories.append(
                [(self._slot(item, packed)[0], self.target(item)) for item in signed]
            )
            packed.unshown.append(len(request.earlier))

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, **kwargs: Any
    ) -> list[str]:
        """Write tokenizer, settings, catalog and the code; returns the files written."""
        if kwargs.pop("push_to_hub", False):
            raise ValueError("save_pretrained does not upload: call push_to_hub(repo_id).")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        files = list(self.tokenizer.save_pretrained(folder))
        if self.text_tokenizer is not None:
            files += self.text_tokenizer.save_pretrained(folder / TEXT_TOKENIZER_FOLDER)
        items = zip(self.item_ids, self.item_titles, self.item_fields, strict=True)
        rows = [{**fields, "id": item, "title": title} for item, title, fields in items]
        write_ids(folder / CATALOG_FILE, rows)
        write_ids(folder / USERS_FILE, [{"id": user} for user in self.user_ids])
        values = [{"field": field, "value": value} for field, value in self.field_values]
        if values:
            write_ids(folder / FIELDS_FILE, values)
            files.append(str(folder / FIELDS_FILE))
        write_json(folder / PROCESSOR_FILE, self.to_dict())
        copy_code(folder)
        return [
            *files,
            *(str(folder / name) for name in (CATALOG_FILE, USERS_FILE, PROCESSOR_FILE)),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Settings as saved in processor_config.json (the catalog has files of its own)."""
        return {
            "processor_class": type(self).__name__,
            "auto_map": {"AutoProcessor": AUTO_MAP["AutoProcessor"]},
            "wording": self.wording,
            "history_format": self.history_format,
            "candidate_format": self.candidate_format,
            "history_window": list(self.history_window),
            "histories": self.histories,
            "fold_in_items": self.fold_in_items,
            "rating_scale": self.rating_scale,
            "title_years": self.title_years,
            "item_template": self.item_template,
            "evidence_fields": self.evidence_fields,
            "cf_fields": self.cf_fields,
            "evidence_items": self.evidence_items,
            "templates": self.templates,
            "ids_fingerprint": self.ids_fingerprint,
        }

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, **kwargs: Any
    ) -> "CCFLLMProcessor":
        """Load a processor from a folder or a Hub repo.

        Raises:
            OSError: naming a missing file.
            ValueError: when the catalog is not the one the settings were saved with.
        """
        path = str(pretrained_model_name_or_path)
        hub = {key: kwargs[key] for key in HUB_ARGUMENTS if kwargs.get(key) is not None}
        settings_file, catalog_file, users_file = (
            str(find_file(path, name, hub)) for name in (PROCESSOR_FILE, CATALOG_FILE, USERS_FILE)
        )
        settings = read_json(settings_file)
        check_release(settings)
        catalog, users = read_ids(catalog_file), read_ids(users_file)
        values: list[tuple[str, str]] = []
        if settings.get("cf_fields"):
            values = read_field_values(str(find_file(path, FIELDS_FILE, hub)))
        tokenizer = load_tokenizer(path, hub, bool(kwargs.get("trust_remote_code")))
        text_tokenizer = load_text_tokenizer(path, hub)
        with reading(path, f"{PROCESSOR_FILE}, {CATALOG_FILE} or {USERS_FILE}"):
            processor = cls(
                tokenizer,
                [row["id"] for row in catalog],
                [row.get("title") or "" for row in catalog],
                [row["id"] for row in users],
                **{name: settings[name] for name in PROMPT_SETTINGS if name in settings},
                text_tokenizer=text_tokenizer,
                item_fields=[
                    {name: value for name, value in row.items() if name not in ("id", "title")}
                    for row in catalog
                ],
                field_values=values,
            )
            fingerprint = settings["ids_fingerprint"]
        check_catalog(path, hub, fingerprint, bool(processor.cf_fields))
        return processor


__all__ = ["CCFLLMProcessor"]
