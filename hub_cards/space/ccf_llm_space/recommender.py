"""What the page shows of a model: ranked titles, why, their gates, and the prompt in pieces."""

import copy
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import Pipeline

from .search import TitleSearch

# Candidates that the language model scores, chosen as in `ccf-llm rank`: a slot costs it two
# tokens, a title some twenty.
CANDIDATES, WRITTEN_CANDIDATES = 100, 40
MAX_PER_TOPIC = 3  # titles of one author, say, in a list that varies
EXPLAINED_LINES = 8  # of the history: each costs another scoring of the list
EXAMPLES, EXAMPLE_TITLES = 3, 5
WELL_KNOWN = 1000  # titles that examples are made of
KEPT_LISTS = 64  # whose reasons may be asked for
LONGEST_TITLE = 200
Stage = Literal["first", "read", "why"]  # of a list: see `Recommender.rank`


@dataclass
class Place:
    """One place of the ranked list.

    Before the language model has read it, only the title is known. `gate` (hidden_size,) is the
    share that the item's slot takes from its words, per dimension.
    The rest is the item's CF vector if it is `known`, else a learned stand-in. `parts` are what
    `words`, `behavior` and `cf` added to the logit, `raised` the lines of the history, and authors
    of several, that added most, with what they added.
    """

    title: str
    probability: float | None = None
    gate: Tensor = field(default_factory=lambda: torch.ones(0))
    known: bool = False
    parts: dict[str, float] = field(default_factory=dict)
    raised: list[tuple[str, float]] = field(default_factory=list)


class Piece(NamedTuple):
    """A run of prompt text, or one slot: its name, and whether it holds a CF vector (`known`) or a
    learned stand-in."""

    kind: Literal["text", "user", "history", "candidate"]
    text: str
    known: bool = False


def without_cf(model: Any) -> Any:
    """A model that shares all weights, but whose CF table knows no user and no item.

    Nothing of the given model changes, so that both can score at the same time.
    """
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    blank = copy.deepcopy(model, shared)
    table = blank.cf
    table.user_known = torch.zeros_like(table.user_known)
    table.item_known = torch.zeros_like(table.item_known)
    return blank


def clean_titles(titles: Sequence[Any] | None) -> list[str]:
    """Titles as a visitor sent them, without blanks and repetitions and of bounded length."""
    texts = [" ".join(str(title).split())[:LONGEST_TITLE] for title in titles or []]
    return list(dict.fromkeys(text for text in texts if text))


class Recommender:
    """A loaded model and processor, with and without the CF table.

    Histories and exclusions are titles, in the words of the prompt: with the author, say, where the
    catalog's items are written so. A title outside the catalog is a new item, which has words but
    no CF vector. The visitor is a new user.

    Args:
        ranker: the checkpoint's `ctr-ranking` pipeline, which scores all that the page shows.
    """

    def __init__(self, ranker: Pipeline) -> None:
        self.ranker = ranker
        self.model: Any = ranker.model
        self.processor: Any = ranker.processor
        self._blank = type(ranker)(model=without_cf(self.model), processor=self.processor)
        self._rows = self._rows_by_text()
        self._topics = self._known_topics()
        self.titles = self._by_cf_preference()
        self.search = TitleSearch(self.titles, self._names())
        self.examples = self._choose_examples()
        self._read = lru_cache(KEPT_LISTS)(self._read_list)

    @property
    def has_cf(self) -> bool:
        """Whether there are CF vectors that the prompt's slots show."""
        return self.processor.uses_slots and bool(self.model.cf.item_known.any())

    @property
    def reads_dislikes(self) -> bool:
        """Whether the model was trained on histories that hold dislikes too."""
        return self.processor.histories == "signed"

    @property
    def topics(self) -> list[str]:
        """Fields, such as author, in which a list can vary."""
        return self.processor.evidence_fields

    @property
    def has_choice(self) -> bool:
        """Whether candidates come from the CF model too, and not from liked topics alone."""
        return bool(self.model.cf.item_known.any())

    def _rows_by_text(self) -> dict[str, int]:
        rows: dict[str, int] = {}
        for row, title in enumerate(self.processor.item_titles):
            if title.strip():
                rows.setdefault(self.processor.item_texts[row], row)
        return rows

    def _known_topics(self) -> set[tuple[str, str]]:
        """The catalog's, looked up here, else the first visitor would wait for it."""
        return {*self.processor.topic_rows}

    def _names(self) -> list[str]:
        """Titles without what the prompt writes beside them, such as the author."""
        return [self.processor.item_titles[self._rows[title]] for title in self.titles]

    @torch.inference_mode()
    def _by_cf_preference(self) -> list[str]:
        """Catalog titles, first those that the CF model ranks highest for a new user."""
        titles = list(self._rows)
        rows = torch.tensor(list(self._rows.values()), device=self.model.device).long()
        new_user = torch.full_like(rows, len(self.processor.user_ids))
        logits = self.model.cf.logits(new_user, rows)
        return [titles[place] for place in logits.argsort(descending=True, stable=True).tolist()]

    def _choose_examples(self) -> list[dict[str, Any]]:
        """Histories to begin with, `{"name", "titles"}`: of topics that many known titles share,
        else of titles that are alike to the CF model, else of the catalog's first."""
        groups = self._topic_groups() or self._cf_groups()
        if not groups:
            starts = range(0, EXAMPLES * EXAMPLE_TITLES, EXAMPLE_TITLES)
            chunks = [self.titles[start : start + EXAMPLE_TITLES] for start in starts]
            groups = [(", ".join(titles[:2]), titles) for titles in chunks if titles]
        return [{"name": name, "titles": titles} for name, titles in groups]

    def _topic_groups(self) -> list[tuple[str, list[str]]]:
        known = self.model.cf.item_known.tolist()
        names: dict[Any, str] = {}
        titles: dict[Any, list[str]] = {}
        for title in self.titles[:WELL_KNOWN]:
            row = self._rows[title]
            for topic in self.processor.topics({"id": self.processor.item_ids[row]}):
                if known[row]:
                    titles.setdefault(topic, []).append(title)
                    names.setdefault(topic, self._spelled(row, *topic))
        most = sorted(titles, key=lambda topic: (-len(titles[topic]), topic))
        most = [topic for topic in most if len(titles[topic]) >= EXAMPLE_TITLES]
        return [(names[topic], titles[topic][:EXAMPLE_TITLES]) for topic in most[:EXAMPLES]]

    def _spelled(self, row: int, name: str, lowered: str) -> str:
        """A value of a field as an item spells it."""
        value = self.processor.item_fields[row][name]
        values = value if isinstance(value, list | tuple) else [value]
        return next((str(one) for one in values if str(one).lower() == lowered), lowered)

    @torch.inference_mode()
    def _cf_groups(self) -> list[tuple[str, list[str]]]:
        known = self.model.cf.item_known.tolist()
        titles = [title for title in self.titles if known[self._rows[title]]][:WELL_KNOWN]
        if len(titles) < EXAMPLES * EXAMPLE_TITLES:
            return []
        rows = torch.tensor([self._rows[title] for title in titles], device=self.model.device)
        vectors = F.normalize(self.model.cf.item_vectors[rows].float(), dim=-1)
        alike = (vectors @ vectors.T).cpu()
        groups, centers = [], [0]
        for _ in range(EXAMPLES):
            near = alike[centers[-1]].topk(EXAMPLE_TITLES).indices.tolist()
            groups.append((f"Like {titles[centers[-1]]}", [titles[place] for place in near]))
            centers.append(int(alike[centers].amax(dim=0).argmin()))
        return groups

    def ranks_at_once(self, history: Sequence[str]) -> bool:
        """Whether there is something to show before the language model has read anything."""
        return bool(history) and self.has_choice

    def rank(
        self,
        history: Sequence[str],
        excluded: Collection[str] = (),
        *,
        blank: bool = False,
        varied: bool = False,
        top_k: int = 10,
        disliked: Sequence[str] = (),
        stage: Stage = "why",
    ) -> list[Place]:
        """The best `top_k` of the candidates, best first.

        Args:
            history: liked titles, oldest first.
            excluded: titles to leave out besides the history's.
            blank: score as if the CF table knew nobody; the candidates stay the same.
            varied: at most `MAX_PER_TOPIC` titles of one author, say.
            top_k: length of the list; fewer when there are fewer candidates.
            disliked: titles that the model reads as such, if it `reads_dislikes`.
            stage: `first` is the order in which candidates are chosen, without a word read; `read`
                that of the language model; `why` has its reasons too.
        """
        asked = (tuple(history), tuple(excluded), blank, varied, top_k, tuple(disliked))
        if stage == "first":
            chosen = self._candidates(history, excluded, disliked, varied)
            return [Place(title) for title in (self._vary(chosen) if varied else chosen)[:top_k]]
        places = self._read(*asked)
        if stage == "read" or not places:
            return places
        ranker: Any = self._blank if blank else self.ranker
        best = self._request(history, [place.title for place in places], disliked)
        reasons = ranker.explain(best, max_lines=EXPLAINED_LINES)
        found = []
        for place, reason in zip(places, reasons, strict=True):
            parts, raised = _why(reason)
            found.append(replace(place, parts=parts, raised=raised))
        return found

    def _read_list(
        self,
        history: Sequence[str],
        excluded: Sequence[str],
        blank: bool,
        varied: bool,
        top_k: int,
        disliked: Sequence[str],
    ) -> list[Place]:
        """The list of `rank`, without reasons."""
        candidates = self._candidates(history, excluded, disliked, varied)
        if not candidates:
            return []
        ranker: Any = self._blank if blank else self.ranker
        asked = self._request(history, candidates, disliked)
        found = ranker(asked | {"top_k": top_k}, max_per_topic=self._limit(varied))
        titles = [self.processor.item_text({"id": item["item_id"]})[1] for item in found]
        gates = self._gates(ranker.model, titles)
        return [
            Place(title, item["probability"], gate, item["known"])
            for title, item, gate in zip(titles, found, gates, strict=True)
        ]

    def _limit(self, varied: bool) -> int | None:
        return MAX_PER_TOPIC if varied and self.topics else None

    def _vary(self, titles: Sequence[str]) -> list[str]:
        taken: Counter[Any] = Counter()
        kept = []
        for title in titles:
            topics = self.processor.topics(self._item(title))
            if all(taken[topic] < MAX_PER_TOPIC for topic in topics):
                taken.update(topics)
                kept.append(title)
        return kept

    def _candidates(
        self,
        history: Sequence[str],
        excluded: Collection[str],
        disliked: Sequence[str],
        varied: bool,
    ) -> list[str]:
        """Titles to score: the pipeline's own choice, or the catalog's first if it has none."""
        left_out = [*history, *excluded, *disliked]
        most = CANDIDATES if self.processor.candidate_format == "slot" else WRITTEN_CANDIDATES
        asked = self._request(history, [], disliked) | {"candidates": None}
        ranker: Any = self.ranker
        try:
            count = most + len(left_out)
            limit = self._limit(varied)
            request, _ = ranker.preprocess(asked, preselect=count, max_per_topic=limit)
        except ValueError:
            found = self.titles
        else:
            found = [self.processor.item_text(item)[1] for item in request.candidates]
        named = {self._row(title) for title in left_out}
        found = [title for title in dict.fromkeys(found) if title in self._rows]
        return [title for title in found if self._rows[title] not in named][:most]

    @torch.inference_mode()
    def prompt(
        self,
        history: Sequence[str],
        candidate: str,
        *,
        blank: bool = False,
        disliked: Sequence[str] = (),
    ) -> list[Piece]:
        """The hybrid prompt of one candidate, slots apart from text."""
        model = self._blank.model if blank else self.model
        batch = self._batch(history, [candidate], disliked)
        titles = self._slot_titles([*disliked, *history, candidate])
        slots = batch["item_slots"][0]
        known = iter(self._known(model, slots[slots >= 0]).tolist())
        pieces: list[Piece] = []
        words: list[int] = []
        columns = (batch[name][0].tolist() for name in ("input_ids", "user_slots", "block_ids"))
        for token, user, block, item in zip(*columns, slots.tolist(), strict=True):
            if item < 0 and user < 0:
                words.append(token)
                continue
            pieces += self._text(words)
            words = []
            if user >= 0:
                pieces.append(Piece("user", "new user"))
            else:
                # A block may hold lines of the history that bear on its candidate.
                own = block and item == int(batch["candidate_items"][0, 0])
                kind: Any = "candidate" if own else "history"
                pieces.append(Piece(kind, titles[item], next(known)))
        return [*pieces, *self._text(words)]

    def _request(
        self, history: Sequence[str], candidates: Sequence[str], disliked: Sequence[str]
    ) -> dict[str, Any]:
        # Nobody said when: what was liked stands nearer to the candidate.
        return {
            "history": [
                *(self._item(title) | {"liked": False} for title in disliked),
                *(self._item(title) for title in history),
            ],
            "candidates": [self._item(title) for title in candidates],
        }

    def _item(self, title: str) -> dict[str, Any]:
        """As a dict, because a bare title that looks like an id would be taken for one."""
        row = self._row(title)
        if row is not None:
            return {"id": self.processor.item_ids[row]}
        name, _, maker = title.rpartition(" by ")
        for topic in self.topics if name else ():
            if (topic, maker.lower()) in self._topics:
                return {"title": name, topic: maker}
        return {"title": title}

    def _row(self, title: str) -> int | None:
        """Catalog row of what a visitor picked, or typed, maybe without the author."""
        found: int | None = self._rows.get(title, self.processor.title_index.get(title))
        if found is None and (same := self.search.same(title)) is not None:
            found = self._rows[same]
        return found

    def _batch(
        self, history: Sequence[str], candidates: Sequence[str], disliked: Sequence[str]
    ) -> dict[str, Tensor]:
        batch = self.processor(**self._request(history, candidates, disliked), return_tensors="pt")
        return {name: tensor.to(self.model.device) for name, tensor in batch.items()}

    def _slot_titles(self, titles: Sequence[str]) -> list[str]:
        """Title of every slot number: the catalog's, then new ones by first mention."""
        new = [title for title in titles if self._row(title) is None]
        return [*self.processor.item_texts, *dict.fromkeys(new)]

    def _text(self, tokens: list[int]) -> list[Piece]:
        return [Piece("text", self.processor.tokenizer.decode(tokens))] if tokens else []

    def _known(self, model: Any, slots: Tensor) -> Tensor:
        """Per slot `(n,)` on the CPU: whether it has a CF vector."""
        in_table = model.cf.item_known
        inside = slots < len(in_table)
        return (inside & in_table[slots.masked_fill(~inside, 0)]).cpu()

    @torch.inference_mode()
    def _gates(self, model: Any, titles: Sequence[str]) -> Tensor:
        """Gates `(n, hidden_size)` of catalog titles; without slots in the prompt, all is words."""
        rows = torch.tensor([self._rows[title] for title in titles], device=model.device).long()
        gates = model.item_gates(rows).float().cpu()
        return gates if self.processor.uses_slots else torch.ones_like(gates)


def _why(reason: dict[str, Any]) -> tuple[dict[str, float], list[tuple[str, float]]]:
    """Parts of a logit, and the three lines or topics that raised it most."""
    parts = {name: reason[name] for name in ("words", "behavior", "cf")}
    lines = [(line["title"], line["effect"]) for line in reason["lines"]]
    topics = [
        (f"all {topic['lines']} of {topic['value']}", topic["effect"]) for topic in reason["topics"]
    ]
    raised = sorted([*topics, *lines], key=lambda one: -one[1])
    return parts, [one for one in raised if one[1] > 0][:3]
