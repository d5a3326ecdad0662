"""The one scoring path: requests in, logits, chosen candidates and ranked lists out.

The ranker, the pipeline, the evaluation of a split, the scoring of a table, the trainer's
validation and the Space all go through `score`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.utils import logging

from .modeling_ccf_llm import CCFLLMForCTR, NewFields
from .processing_ccf_llm import CCFLLMProcessor, Request, Values, pad_values

TOKENS_PER_BATCH = 2048  # of one forward pass
CONTENT = ("input_ids", "item_slots", "user_slots")
LAYOUT = ("position_ids", "sequence_ids", "block_ids", "history_depths")
NEW_ITEMS = ("new_title_ids", "new_title_lengths", "new_field_values", "new_field_weights")
HISTORIES = ("history_items", "history_targets", "history_unshown")


def score(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    requests: Sequence[Request],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = False,
) -> list[Tensor]:
    """Logits of what each request asks for, requests packed together under a token budget.

    Args:
        model: switched to evaluation mode for the call, then back.
        processor: the model's own.
        requests: a whole history is cut to the processor's window.
        tokens_per_batch: tokens of a forward pass, at most. A longer request goes through in parts:
            its history once, then its candidates on the history's cached keys and values. A stream
            is not cut.
        progress: show a bar that counts candidates on stderr.

    Returns:
        One float32 CPU tensor `(len(request.scored),)` a request, in the order of `requests`.
    """
    requests = [processor.cut(request) for request in requests]
    scores: dict[int, Tensor] = {}
    was_training = model.training
    model.eval()
    total = sum(len(request.scored) for request in requests)
    try:
        with logging.tqdm(total=total, desc="scoring", unit=" pairs", disable=not progress) as bar:
            lengths = [processor.count_tokens(request) for request in requests]
            for indices in cut_by_budget(lengths, tokens_per_batch):
                batch = [requests[index] for index in indices]
                for index, logits in zip(
                    indices, _score_batch(model, processor, batch, tokens_per_batch), strict=True
                ):
                    scores[index] = logits
                bar.update(sum(len(request.scored) for request in batch))
    finally:
        model.train(was_training)
    return [scores[index] for index in range(len(requests))]


@torch.no_grad()
def _score_batch(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    requests: Sequence[Request],
    tokens_per_batch: int,
) -> list[Tensor]:
    batch = {name: value.to(model.device) for name, value in processor.pack(requests).items()}
    too_long = batch["input_ids"].shape[1] > tokens_per_batch
    if too_long and len(requests) == 1 and not requests[0].stream:
        return [_score_long_row(model, batch, tokens_per_batch).float().cpu()]
    logits = model(**batch).logits.float().cpu()
    return [row[: len(one.scored)] for row, one in zip(logits, requests, strict=True)]


def cut_by_budget(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """Cut requests of these lengths into batches of at most `tokens_per_batch` tokens, by index.

    Longest ones come first, so that neighbors are alike in length, which makes attention cheap,
    and memory peaks at once. One longer than the budget is a batch by itself.
    """
    batches: list[list[int]] = []
    used = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and used + lengths[index] <= tokens_per_batch:
            batches[-1].append(index)
            used += lengths[index]
        else:
            batches.append([index])
            used = lengths[index]
    return batches


def _score_long_row(
    model: CCFLLMForCTR, batch: Mapping[str, Tensor], tokens_per_batch: int
) -> Tensor:
    """Logits `(num_candidates,)` of one user's candidates, at most `tokens_per_batch` at a time.

    The instruction, prefix and history go through the backbone once, and their keys and values are
    kept for all candidates. `batch` is the processor's for one user.
    """
    context = int((batch["block_ids"][0] == 0).sum())
    answers = batch["answer_positions"][0]
    extra = {name: batch[name] for name in NEW_ITEMS if name in batch}
    histories = {name: batch[name] for name in HISTORIES if name in batch}
    cache = DynamicCache()
    row = {name: batch[name] for name in CONTENT + LAYOUT}
    if context:  # a template of one's own may leave nothing to share
        model.model(**{n: v[:, :context] for n, v in row.items()}, **extra, past_key_values=cache)
    logits = []
    first, start = 0, context
    while first < len(answers):
        within = torch.searchsorted(answers, start + tokens_per_batch - 1, right=True)
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


@torch.no_grad()
def cf_logits(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    user: Any,
    history: Sequence[Any],
    rows: Tensor,
    new: NewFields | None = None,
) -> Tensor:
    """The CF model's own logits `(n,)` of catalog rows `(n,)` for a user.

    Rows past the catalog are new items, of which `new` has the fields. An unknown user, or a new
    item of which it has none, stands at the CF model's default vector. A model that folds users in
    takes the user's vector from the history's window instead.
    """
    if not model.config.cf_fold_in:
        return model.cf.logits(torch.full_like(rows, processor.resolve_user(user)), rows, new)
    earlier, shown = processor.window(history)
    known = [*earlier, *shown]
    items, of_history = number_items(processor, known, rows.device)
    targets = torch.tensor([[processor.target(item) for item in known]], device=rows.device)
    depth = torch.tensor([len(known)], device=rows.device)
    users = model.cf.folded_users(items[None], targets.float(), depth, of_history)
    return model.cf.folded_logits(users, rows, new)


def number_items(
    processor: CCFLLMProcessor, items: Sequence[Any], device: torch.device
) -> tuple[Tensor, NewFields]:
    """Rows `(n,)` of items, those of new ones past the catalog, and the fields of these."""
    rows: list[int] = []
    new: list[Values] = []
    past = len(processor.item_ids)
    for item in items:
        row, _ = processor.resolve_item(item)
        rows.append(past + len(new) if row is None else row)
        if row is None:
            new.append(processor.new_values(item))
    values, weights = pad_values(new)
    numbers = torch.tensor(rows, dtype=torch.long, device=device)
    return numbers, (values.to(device), weights.to(device))


def preselect(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    user: Any,
    history: Sequence[Any],
    count: int = 100,
) -> list[dict[str, str]]:
    """The `count` catalog items that the CF model scores highest, without the history's.

    Raises:
        ValueError: the model has no CF vectors, nothing tells items apart for a new user, or none
            is left.
    """
    if not bool(model.cf.item_known.any()):
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


@dataclass
class ItemShare:
    """Where an item's slot takes its content from.

    `item_id` is None for an item outside the catalog. `text_share` is the mean of the gate over
    dimensions, in (0, 1), and `cf_share` the rest; the gate depends on the item alone. `known`
    tells whether the CF model has a vector of the item, by its own rows or by a value of its fields
    such as the author; if not, the CF share is that of the learned cold-item vector.
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


def item_shares(
    model: CCFLLMForCTR, processor: CCFLLMProcessor, items: Sequence[Any]
) -> list[ItemShare]:
    """Where each item's slot takes its content from; items as the processor takes them."""
    resolved = [processor.resolve_item(item) for item in items]
    rows, new = number_items(processor, items, model.device)
    known = model.cf.lookup("item", rows, new)[1].tolist()
    shares = _text_shares(model, processor, items, rows, new)
    return [
        ItemShare(
            item_id=None if row is None else processor.item_ids[row],
            title=title,
            text_share=share,
            cf_share=1.0 - share,
            known=is_known,
        )
        for (row, title), share, is_known in zip(resolved, shares, known, strict=True)
    ]


@torch.no_grad()
def _text_shares(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    items: Sequence[Any],
    rows: Tensor,
    new_fields: NewFields,
) -> list[float]:
    """Mean over dimensions of each item's gate, new items by their words; a prompt without slots is
    all words."""
    if not processor.uses_slots:
        return [1.0] * len(items)
    texts = [text for row, text in map(processor.item_text, items) if row is None]
    words = [processor.prompt.tokens(text) if text else [] for text in texts]
    new_titles = (
        torch.tensor([token for ids in words for token in ids], device=model.device).long(),
        torch.tensor([len(ids) for ids in words], device=model.device).long(),
    )
    return model.item_gates(rows, new_titles, new_fields).mean(dim=-1).tolist()


def rank(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    requests: Sequence[Request],
    top_k: int = 10,
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
) -> list[list[RankedItem]]:
    """Each request's `top_k` candidates of the highest logits, best first; ties keep order."""
    scores = score(model, processor, requests, tokens_per_batch=tokens_per_batch)
    return [
        rank_scored(model, processor, request.candidates, logits, top_k)
        for request, logits in zip(requests, scores, strict=True)
    ]


def rank_scored(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    candidates: Sequence[Any],
    logits: Tensor,
    top_k: int,
) -> list[RankedItem]:
    """As `rank`, for candidates whose logits `(n,)` are known."""
    best = logits.argsort(descending=True, stable=True)[:top_k]
    probabilities = model.probabilities(logits[best]).tolist()
    shares = item_shares(model, processor, [candidates[index] for index in best.tolist()])
    return [
        RankedItem(logit=logit, probability=probability, **vars(share))
        for logit, probability, share in zip(
            logits[best].tolist(), probabilities, shares, strict=True
        )
    ]


__all__ = ["ItemShare", "RankedItem", "cf_logits", "item_shares", "preselect", "rank", "score"]
