"""What the page shows of a model: ranked titles, their gates, and the prompt in pieces."""

import copy
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import Pipeline

CANDIDATES = 100  # that the language model scores; the CF model picks them, as in `ccf-llm rank`
LONGEST_TITLE = 200


@dataclass
class Place:
    """One place of the ranked list.

    `gate` (hidden_size,) is the share that the item's slot takes from its words, per dimension.
    The rest is the item's CF vector if it is `known`, else a learned stand-in.
    """

    title: str
    probability: float
    gate: Tensor
    known: bool

    @property
    def words(self) -> float:
        """Mean of the gate over dimensions, in [0, 1]."""
        return float(self.gate.mean())


class Piece(NamedTuple):
    """A run of prompt text, or one slot: its name, its share of words, and whether the rest is a
    CF vector (`known`) or a learned stand-in."""

    kind: Literal["text", "user", "history", "candidate"]
    text: str
    words: float = 0.0
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

    Histories and exclusions are titles. A title outside the catalog is a new item, which has words
    but no CF vector. The visitor is a new user.

    Args:
        ranker: the checkpoint's `ctr-ranking` pipeline, which scores all that the page shows.
    """

    def __init__(self, ranker: Pipeline) -> None:
        self.ranker = ranker
        self.model: Any = ranker.model
        self.processor: Any = ranker.processor
        self._blank = type(ranker)(model=without_cf(self.model), processor=self.processor)
        self.titles = self._by_cf_preference()

    @property
    def has_cf(self) -> bool:
        """Whether there are CF vectors that the prompt's slots show."""
        return self.processor.uses_slots and bool(self.model.cf.item_known.any())

    @property
    def reads_dislikes(self) -> bool:
        """Whether the model was trained on histories that hold dislikes too."""
        return self.processor.histories == "signed"

    @property
    def longest_history(self) -> int:
        """Most items that the model ever reads: window (H, S) holds H to H + S - 1."""
        length, stride = self.processor.history_window
        return length + stride - 1

    @torch.inference_mode()
    def _by_cf_preference(self) -> list[str]:
        """Catalog titles, first those that the CF model ranks highest for a new user."""
        titles = list(dict.fromkeys(title for title in self.processor.item_titles if title.strip()))
        rows = torch.tensor(
            [self.processor.title_index[title] for title in titles],
            dtype=torch.long,
            device=self.model.device,
        )
        new_user = torch.full_like(rows, len(self.processor.user_ids))
        logits = self.model.cf.logits(new_user, rows)
        return [titles[place] for place in logits.argsort(descending=True, stable=True).tolist()]

    def rank(
        self,
        history: Sequence[str],
        excluded: Collection[str] = (),
        *,
        blank: bool = False,
        top_k: int = 10,
        disliked: Sequence[str] = (),
    ) -> list[Place]:
        """The best `top_k` of the candidates, best first.

        Args:
            history: liked titles, oldest first.
            excluded: titles to leave out besides the history's.
            blank: score as if the CF table knew nobody; the candidates stay the same.
            top_k: length of the list; fewer when there are fewer candidates.
            disliked: titles that the model reads as such, if it `reads_dislikes`.
        """
        left_out = {*history, *excluded, *disliked}
        candidates = [title for title in self.titles if title not in left_out][:CANDIDATES]
        if not candidates:
            return []
        ranker: Any = self._blank if blank else self.ranker
        found = ranker(self._request(history, candidates, disliked) | {"top_k": top_k})
        batch = self._batch([], [item["title"] for item in found], [])
        gates, _ = self._gates(ranker.model, batch["candidate_items"][0], batch)
        return [
            Place(item["title"], item["probability"], gate, item["known"])
            for item, gate in zip(found, gates, strict=True)
        ]

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
        gates, known = self._gates(model, slots[slots >= 0], batch)
        slot_contents = iter(zip(gates.mean(-1).tolist(), known.tolist(), strict=True))
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
                kind: Any = "candidate" if block else "history"
                pieces.append(Piece(kind, titles[item], *next(slot_contents)))
        return [*pieces, *self._text(words)]

    def _request(
        self, history: Sequence[str], candidates: Sequence[str], disliked: Sequence[str]
    ) -> dict[str, Any]:
        # As dicts, because a bare title that looks like an id would be taken for one. Nobody said
        # when: what was liked stands nearer to the candidate.
        return {
            "history": [
                *({"title": title, "liked": False} for title in disliked),
                *({"title": title} for title in history),
            ],
            "candidates": [{"title": title} for title in candidates],
        }

    def _batch(
        self, history: Sequence[str], candidates: Sequence[str], disliked: Sequence[str]
    ) -> dict[str, Tensor]:
        batch = self.processor(**self._request(history, candidates, disliked), return_tensors="pt")
        return {name: tensor.to(self.model.device) for name, tensor in batch.items()}

    def _slot_titles(self, titles: Sequence[str]) -> list[str]:
        """Title of every slot number: the catalog's, then new ones by first mention."""
        new = [title for title in titles if title not in self.processor.title_index]
        return [*self.processor.item_titles, *dict.fromkeys(new)]

    def _text(self, tokens: list[int]) -> list[Piece]:
        return [Piece("text", self.processor.tokenizer.decode(tokens))] if tokens else []

    @torch.inference_mode()
    def _gates(self, model: Any, slots: Tensor, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Per slot `(n,)` on the CPU: its gate `(n, hidden_size)` and whether it has a CF vector.
        Without slots in the prompt, all is words."""
        new = None
        if "new_title_ids" in batch:
            new = (batch["new_title_ids"], batch["new_title_lengths"])
        in_table = model.cf.item_known
        inside = slots < len(in_table)
        known = inside & in_table[slots.masked_fill(~inside, 0)]
        gates = model.item_gates(slots, new_titles=new).float().cpu()
        return gates if self.processor.uses_slots else torch.ones_like(gates), known.cpu()
