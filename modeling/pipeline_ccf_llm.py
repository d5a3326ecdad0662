"""`pipeline("ctr-ranking")`: users, histories and candidates in, ranked lists out.

What makes a ranked list, and says where an item's slot takes its content from, are functions of
their own: the package's ranker uses them too. A model or processor is whatever has the methods, so
that this file works beside any copy of the others.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from numbers import Integral
from os import PathLike
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, Pipeline

from .checkpoint_ccf_llm import Publishable
from .layout_ccf_llm import window_start

TASK = "ctr-ranking"
CUSTOM_PIPELINES = {
    TASK: {"impl": "pipeline_ccf_llm.CTRRankingPipeline", "pt": ["AutoModel"], "type": "text"}
}
INPUT_KEYS = ("user", "history", "candidates", "top_k")
ID_TYPES = (str, Integral)  # NumPy's integers are of the second
MAX_CANDIDATES = 128  # packed behind one history; attention grows with their square
MAX_TOKENS = 2048  # of a longer list's candidates in one forward pass
CONTENT = ("input_ids", "item_slots", "user_slots")
LAYOUT = ("position_ids", "sequence_ids", "block_ids", "history_depths")
NEW_TITLES = ("new_title_ids", "new_title_lengths")
HISTORIES = ("history_items", "history_targets", "history_unshown")


@dataclass
class ItemShare:
    """Where an item's slot takes its content from.

    `item_id` is None for an item outside the catalog. `text_share` is the mean of the gate over
    dimensions, in (0, 1), and `cf_share` the rest; the gate depends on the item alone. `known`
    tells whether the CF model was fitted on the item; if not, the CF share is that of the learned
    cold-item vector.
    """

    item_id: str | None
    title: str
    text_share: float
    cf_share: float
    known: bool


@dataclass
class RankedItem:
    """One place of a ranked list; the other fields are those of [`ItemShare`]."""

    item_id: str | None
    title: str
    probability: float
    logit: float
    text_share: float
    cf_share: float
    known: bool


def item_shares(model: Any, processor: Any, items: Sequence[Any]) -> list[ItemShare]:
    """Where each item's slot takes its content from; items as the processor takes them."""
    resolved = [processor.resolve_item(item) for item in items]
    known = model.model.cf.item_known[-1]
    return [
        ItemShare(
            item_id=None if row is None else processor.item_ids[row],
            title=title,
            text_share=share,
            cf_share=1.0 - share,
            known=row is not None and bool(known[row]),
        )
        for (row, title), share in zip(
            resolved, _text_shares(model, processor, resolved), strict=True
        )
    ]


@torch.inference_mode()
def _text_shares(
    model: Any, processor: Any, resolved: Sequence[tuple[int | None, str]]
) -> list[float]:
    """Mean over dimensions of each item's gate, new items by the words of their titles."""
    past = len(processor.item_ids)
    new = list(dict.fromkeys(title for row, title in resolved if row is None))
    rows = [past + new.index(title) if row is None else row for row, title in resolved]
    index = torch.tensor(rows, dtype=torch.long, device=model.device)
    words = [processor.prompt.tokens(title) if title else [] for title in new]
    new_titles = (
        torch.tensor([token for ids in words for token in ids], device=model.device).long(),
        torch.tensor([len(ids) for ids in words], device=model.device).long(),
    )
    return model.item_gates(index, new_titles=new_titles).mean(dim=-1).tolist()


@torch.inference_mode()
def cf_logits(
    model: Any, processor: Any, user: Any, history: Sequence[Any], rows: Tensor
) -> Tensor:
    """The CF model's own logits `(n,)` of catalog rows `(n,)` for a user, by the last snapshot.

    An unknown user, or a row past the catalog, stands at the CF model's default vector. A model
    that folds users in takes the user's vector from the history's window instead.
    """
    table = model.model.cf
    last = torch.full_like(rows, len(table.offset) - 1)
    if not model.config.cf_fold_in:
        return table.logits(torch.full_like(rows, processor.resolve_user(user)), rows, last)
    start = window_start(len(history), processor.history_window)
    shown = list(history)[max(0, start - processor.fold_in_items) :]
    found = [processor.resolve_item(item)[0] for item in shown]
    items = torch.tensor([[-1 if row is None else row for row in found]], device=rows.device).long()
    targets = torch.tensor([[processor.target(item) for item in shown]], device=rows.device)
    depth = torch.tensor([len(shown)], device=rows.device)
    return table.folded_logits(
        table.folded_users(items, targets.float(), depth, last[:1]), rows, last
    )


@torch.inference_mode()
def preselect_items(
    model: Any, processor: Any, user: Any, history: Sequence[Any], count: int
) -> list[dict[str, str]]:
    """The `count` catalog items that the CF model scores highest, without the history's.

    Raises:
        ValueError: the model has no CF vectors, nothing tells items apart for a new user, or none
            is left.
    """
    if not bool(model.model.cf.item_known[-1].any()):
        raise ValueError("this model has no CF vectors to choose items by: give candidates")
    rows = torch.arange(len(processor.item_ids), device=model.device)
    logits = cf_logits(model, processor, user, history, rows)
    if logits.max() == logits.min():
        raise ValueError(
            "this CF model has no item biases to choose by for a new user: give candidates"
        )
    seen = {processor.resolve_item(item)[0] for item in history}
    order = logits.argsort(descending=True, stable=True)[: count + len(seen)].tolist()
    chosen = [row for row in order if row not in seen][:count]
    if not chosen:
        raise ValueError("the history holds every item of the catalog: give candidates")
    return [{"id": processor.item_ids[row]} for row in chosen]


def rank_items(
    model: Any, processor: Any, candidates: Sequence[Any], logits: Tensor, top_k: int
) -> list[RankedItem]:
    """The `top_k` candidates of the highest logits `(n,)`, best first; equal ones keep order."""
    best = logits.argsort(descending=True, stable=True)[:top_k]
    probabilities = model.probabilities(logits[best]).tolist()
    shares = item_shares(model, processor, [candidates[index] for index in best.tolist()])
    return [
        RankedItem(logit=logit, probability=probability, **vars(share))
        for logit, probability, share in zip(
            logits[best].tolist(), probabilities, shares, strict=True
        )
    ]


def score_long_row(model: Any, batch: Mapping[str, Tensor], max_tokens: int) -> Tensor:
    """Logits `(num_candidates,)` of one user's candidates, at most `max_tokens` at a time.

    The instruction, prefix and history go through the backbone once, and their keys and values are
    kept for all candidates. `batch` is the processor's for one user.
    """
    context = int((batch["block_ids"][0] == 0).sum())
    answers = batch["answer_positions"][0]
    extra = {name: batch[name] for name in NEW_TITLES if name in batch}
    histories = {name: batch[name] for name in HISTORIES if name in batch}
    cache = DynamicCache()
    row = {name: batch[name] for name in CONTENT + LAYOUT}
    if context:  # a template of one's own may leave nothing to share
        model.model(**{k: v[:, :context] for k, v in row.items()}, **extra, past_key_values=cache)
    logits = []
    first, start = 0, context
    while first < len(answers):
        within = torch.searchsorted(answers, start + max_tokens - 1, right=True)
        last = max(first + 1, int(within))  # a block longer than the budget goes alone
        end = int(answers[last - 1]) + 1
        some = slice(first, last)
        output = model(
            **{name: row[name][:, start:end] for name in CONTENT},
            **{n: torch.cat([row[n][:, :context], row[n][:, start:end]], 1) for n in LAYOUT},
            **extra,
            **histories,
            answer_positions=(answers[some] - start)[None],
            candidate_items=batch["candidate_items"][:, some],
            candidate_mask=batch["candidate_mask"][:, some],
            candidate_users=batch["candidate_users"],
            past_key_values=cache,
        )
        logits.append(output.logits[0])
        cache.crop(start - end)
        first, start = last, end
    return torch.cat(logits)


@dataclass
class Request:
    """One checked input: candidates to score for one user with one history, oldest first."""

    user: Any
    history: list[Any]
    candidates: list[Any]
    top_k: int


class CTRRankingPipeline(Publishable, Pipeline):
    """Ranks candidates for users by the probability that they will like them.

        ranker = pipeline("ctr-ranking", model=repo, trust_remote_code=True)
        ranker({"user": "42", "history": ["Heat (1995)"], "candidates": ["Alien (1979)", "Se7en"]})

    A call takes one dict, or a list, data set or generator of dicts; `batch_size` of them share a
    forward pass. Keys:

    - `user`: raw id; without it, or with one that the model has not seen, the history alone speaks.
    - `history`: liked items, oldest first.
    - `candidates`: items to rank, each a raw id, a title, or `{"id": ..., "title": ...}`; a title
      outside the catalog is a new item. Default: the `preselect` catalog items that the CF model
      scores highest for this user and that are not in the history.
    - `top_k`: length of the list.

    Each dict becomes a list of dicts, best first: `item_id` (None for a new item), `title`,
    `probability`, `logit`, `text_share` and `cf_share` (how much of the item's slot comes from its
    title and from its CF vector), `known` (whether the CF model was fitted on the item).

    Args (of the pipeline, and of every call):
        top_k: length of the lists whose input names none (default 10).
        preselect: catalog items to score where no candidates are given (default 100).
    """

    processor: Any
    _load_processor: Any = True
    _load_tokenizer: Any = False
    _load_image_processor: Any = False
    _load_video_processor: Any = False
    _load_feature_extractor: Any = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model.eval()
        # While loading, transformers puts classes in here, which no config can be printed with.
        self.model.config.custom_pipelines = copy.deepcopy(CUSTOM_PIPELINES)

    def _sanitize_parameters(
        self, top_k: int | None = None, preselect: int | None = None, **unknown: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        if unknown:
            raise ValueError(
                f"{TASK} has no parameter {min(unknown)!r}: use top_k, preselect or batch_size."
            )
        given = {"top_k": top_k, "preselect": preselect}
        return {name: value for name, value in given.items() if value is not None}, {}, {}

    def __call__(self, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        # transformers looks at the first of a list, and an empty one has none.
        if isinstance(inputs, list) and not inputs:
            return []
        return super().__call__(inputs, *args, **kwargs)

    def get_iterator(
        self,
        inputs: Any,
        num_workers: int,
        batch_size: int,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> Iterator[list[dict[str, Any]]]:
        """Ranked lists, `batch_size` users a forward pass.

        The processor packs a whole batch; transformers' own way, to pad tensors that were made one
        input at a time, does not fit prompts whose tensors number rows and new titles.
        """
        requests = self._requests(inputs, preprocess_params)
        while batch := list(islice(requests, batch_size)):
            for scored in self.forward(batch, **forward_params):
                yield self.postprocess(scored, **postprocess_params)

    def run_single(
        self,
        inputs: Any,
        preprocess_params: dict[str, Any],
        forward_params: dict[str, Any],
        postprocess_params: dict[str, Any],
    ) -> list[dict[str, Any]]:
        request = self.preprocess(inputs, **preprocess_params)
        (scored,) = self.forward([request], **forward_params)
        return self.postprocess(scored, **postprocess_params)

    def _requests(self, inputs: Any, preprocess_params: dict[str, Any]) -> Iterator[Request]:
        sized = hasattr(inputs, "__len__") and hasattr(inputs, "__getitem__")
        several = (inputs[place] for place in range(len(inputs))) if sized else inputs
        for place, one in enumerate(several):
            try:
                request = self.preprocess(one, **preprocess_params)
            except ValueError as error:
                raise ValueError(f"input {place}: {error}") from error
            yield request

    def preprocess(  # type: ignore[override]
        self, input_: Any, top_k: int = 10, preselect: int = 100
    ) -> Request:
        """Check one input and choose its candidates if it names none.

        Raises:
            ValueError: naming the key that is wrong, and the mend.
        """
        if not isinstance(input_, Mapping) or set(input_) - set(INPUT_KEYS):
            found = sorted(map(str, input_)) if isinstance(input_, Mapping) else type(input_)
            raise ValueError(
                f"{TASK} takes a dict with the keys {', '.join(INPUT_KEYS)}, or a list of such "
                f"dicts, not {found}."
            )
        user, wanted = input_.get("user"), input_.get("top_k")
        if not (user is None or isinstance(user, ID_TYPES)):
            raise ValueError(f"user {user!r} is no id: give one string or integer.")
        top_k = top_k if wanted is None else wanted
        for name, value in (("top_k", top_k), ("preselect", preselect)):
            if not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name}={value!r} must be an integer of at least 1.")
        history = _item_list(input_.get("history") or [], "history")
        candidates = input_.get("candidates")
        if candidates is None:
            candidates = preselect_items(self.model, self.processor, user, history, int(preselect))
        candidates = _item_list(candidates, "candidates")
        if not candidates:
            raise ValueError("candidates is empty: give at least one item, or leave it out.")
        return Request(user, history, candidates, int(top_k))

    def _forward(  # type: ignore[override]
        self, input_tensors: list[Request]
    ) -> list[tuple[Request, Tensor]]:
        """Each request with the logits of its candidates; a long list goes through by itself."""
        short = [one for one in input_tensors if len(one.candidates) <= MAX_CANDIDATES]
        scores = iter(self._score(short) if short else [])
        return [
            (one, next(scores) if len(one.candidates) <= MAX_CANDIDATES else self._score_long(one))
            for one in input_tensors
        ]

    def _score(self, requests: list[Request]) -> list[Tensor]:
        """Logits of each request's candidates, all in one forward pass."""
        logits = self.model(**self._inputs(requests)).logits.float()
        return [row[: len(one.candidates)] for row, one in zip(logits, requests, strict=True)]

    def _score_long(self, request: Request) -> Tensor:
        return score_long_row(self.model, self._inputs([request]), MAX_TOKENS).float()

    def _inputs(self, requests: list[Request]) -> dict[str, Tensor]:
        batch = self.processor(
            user=[one.user for one in requests],
            history=[one.history for one in requests],
            candidates=[one.candidates for one in requests],
            return_tensors="pt",
        )
        return self.ensure_tensor_on_device(**batch)

    def postprocess(  # type: ignore[override]
        self, model_outputs: tuple[Request, Tensor]
    ) -> list[dict[str, Any]]:
        """The ranked list of one request."""
        request, logits = model_outputs
        ranked = rank_items(self.model, self.processor, request.candidates, logits, request.top_k)
        return [vars(item) for item in ranked]

    def save_pretrained(self, save_directory: str | PathLike[Any], **kwargs: Any) -> None:
        """Save the model and the processor: a checkpoint that this pipeline loads again."""
        self.model.save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)


def _item_list(values: Any, name: str) -> list[Any]:
    """A list of items, none of them blank."""
    if not isinstance(values, (list, tuple)):
        raise ValueError(f"{name} is {values!r}: give a list of items.")
    for place, item in enumerate(values):
        if isinstance(item, dict):
            usable = item.get("id") is not None or bool(item.get("title"))
        else:
            usable = isinstance(item, ID_TYPES) and bool(str(item).strip())
        if not usable:
            raise ValueError(
                f"{name}: item {place} is {item!r}: give an id, a title, or a dict with either."
            )
    return list(values)


__all__ = ["CTRRankingPipeline"]
