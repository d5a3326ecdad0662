"""The one scoring path: requests in, logits, chosen candidates, ranked lists and reasons out.

The ranker, the pipeline, the evaluation of a split, the scoring of a table, the trainer's
validation and the Space all go through `score`.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from itertools import islice
from numbers import Integral
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.utils import logging

from .adapter_ccf_llm import is_injected
from .attention_ccf_llm import GROUP, SHARED
from .modeling_ccf_llm import CF_INPUTS, CCFLLMForCTR, FoldedUsers, NewFields
from .processing_ccf_llm import CCFLLMProcessor, Request, Values, pad_values

TOKENS_PER_BATCH = 2048  # of one forward pass
PREFIX_BYTES = 2**29  # that a ranker keeps: 11,000 tokens of histories of SmolLM2-135M in fp32
SPARE = 4  # candidates of a topic for each of its places in a list that is to vary (our choice)
AVERAGE_OVER = 32  # titles, evenly spread over the catalog, that stand for any title
CONTENT = ("input_ids", "item_slots", "user_slots")
LAYOUT = ("position_ids", "sequence_ids", "block_ids", "history_depths")
NEW_ITEMS = ("new_title_ids", "new_title_lengths", "new_field_values", "new_field_weights")
HISTORIES = ("history_items", "history_targets", "history_unshown")
States = list[tuple[Tensor, Tensor]]  # a layer's keys and values, `(1, heads, tokens, head_dim)`


class PrefixCache:
    """Keys and values of users' prefixes and histories, kept from one request to the next.

    A history that was read before costs a request nothing, and one that has grown costs its new
    lines. What is kept is found by its content, the tokens and what stands in their slots. All of
    it is dropped when the model's weights or CF table are others, and what was longest unused where
    there is too much. (Weights changed through `.data` do not tell: call `clear`.) Threads may
    share one.

    Args:
        max_bytes: of keys and values, at most.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes, self.used_bytes = max_bytes, 0
        self._lock = threading.RLock()
        self._kept: dict[bytes, States] = {}  # by the name of the whole, the longest unused first
        self._parts: dict[bytes, tuple[bytes, int]] = {}  # name of its start -> whole, tokens
        self._seen: list[tuple[Any, ...]] = []
        self._tensors: list[weakref.ref[Tensor]] = []

    def __reduce__(self) -> tuple[type[PrefixCache], tuple[int]]:
        return type(self), (self.max_bytes,)  # a copy, in another process too, begins empty

    def clear(self) -> None:
        """Drop everything."""
        with self._lock:
            self._kept, self._parts, self.used_bytes = {}, {}, 0

    def renew(self, model: CCFLLMForCTR) -> None:
        """Drop everything if it is not what these weights make."""
        tensors = [*model.parameters(), *model.buffers()]
        seen: list[tuple[Any, ...]] = [
            (id(one), one.data_ptr(), 0 if one.is_inference() else one._version) for one in tensors
        ]
        seen += [
            (name, module.disable_adapters, *module.active_adapters, *module.merged_adapters)
            for name, module in model.named_modules()
            if is_injected(module)
        ]
        with self._lock:
            gone = any(one() is None for one in self._tensors)  # another may have its id now
            if gone or seen != self._seen:
                self.clear()
                self._seen, self._tensors = seen, [weakref.ref(one) for one in tensors]

    def find(self, names: Sequence[tuple[bytes, int]]) -> tuple[States, int]:
        """The longest start that is kept, and its tokens; `names` of starts, shortest first."""
        with self._lock:
            for name, tokens in reversed(names):
                if name in self._parts:
                    whole, tokens = self._parts[name]
                    states = self._kept[whole] = self._kept.pop(whole)  # the latest used
                    return [(k[:, :, :tokens], v[:, :, :tokens]) for k, v in states], tokens
        return [], 0

    def keep(self, names: Sequence[tuple[bytes, int]], states: States) -> None:
        """Keep the states of a whole, in place of those of its starts; `names` as in `find`."""
        size = _count_bytes(states)
        if size > self.max_bytes:
            return
        with self._lock:
            for name, _ in names:
                if name in self._kept:
                    self._drop(name)
            whole, _ = names[-1]
            self._kept[whole] = states
            self.used_bytes += size
            self._parts |= {name: (whole, tokens) for name, tokens in names}
            while self.used_bytes > self.max_bytes:
                self._drop(next(iter(self._kept)))

    def _drop(self, whole: bytes) -> None:
        self.used_bytes -= _count_bytes(self._kept.pop(whole))
        self._parts = {name: part for name, part in self._parts.items() if part[0] != whole}


def _count_bytes(states: States) -> int:
    return sum(one.numel() * one.element_size() for both in states for one in both)


def score(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    requests: Sequence[Request],
    *,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = False,
    prefixes: PrefixCache | None = None,
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
        prefixes: what earlier calls have read of histories, and where this one keeps what it reads.

    Returns:
        One float32 CPU tensor `(len(request.scored),)` a request, in the order of `requests`.
    """
    requests = [processor.cut(request) for request in requests]
    scores: dict[int, Tensor] = {}
    was_training = model.training
    model.eval()
    if prefixes is not None:
        prefixes.renew(model)
    total = sum(len(request.scored) for request in requests)
    try:
        with logging.tqdm(total=total, desc="scoring", unit=" pairs", disable=not progress) as bar:
            lengths = [processor.count_tokens(request) for request in requests]
            for indices in cut_by_budget(lengths, tokens_per_batch):
                batch = [requests[index] for index in indices]
                found = _score_batch(model, processor, batch, tokens_per_batch, prefixes)
                scores |= dict(zip(indices, found, strict=True))
                bar.update(sum(len(request.scored) for request in batch))
    finally:
        model.train(was_training)
    return [scores[index] for index in range(len(requests))]


@torch.no_grad()
def score_cf_logit(
    model: CCFLLMForCTR, processor: CCFLLMProcessor, requests: Sequence[Request]
) -> list[Tensor]:
    """As `score`, of the CF logit alone: what the model would say without its language model.

    The model's own CF logit, with users folded in where it does so, whether or not `cf_logit` adds
    it to the score.
    """
    requests = [processor.cut(request) for request in requests]
    scores: dict[int, Tensor] = {}
    lengths = [processor.count_tokens(request) for request in requests]
    for indices in cut_by_budget(lengths, TOKENS_PER_BATCH):
        batch = processor.pack([requests[index] for index in indices])
        given = {name: batch[name].to(model.device) for name in CF_INPUTS if name in batch}
        logits = model.cf_logits(**given).float().cpu()
        for index, row in zip(indices, logits, strict=True):
            scores[index] = row[: len(requests[index].scored)]
    return [scores[index] for index in range(len(requests))]


@torch.no_grad()
def _score_batch(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    requests: Sequence[Request],
    tokens_per_batch: int,
    prefixes: PrefixCache | None,
) -> list[Tensor]:
    packed = processor.pack(requests)
    check_positions(model, packed)
    batch = {name: value.to(model.device) for name, value in packed.items()}
    too_long = len(requests) == 1 and batch["input_ids"].shape[1] > tokens_per_batch
    if (too_long or prefixes is not None) and not any(request.stream for request in requests):
        contexts = _find_contexts(packed, len(processor.item_ids))
        logits = _score_after(model, batch, contexts, prefixes, tokens_per_batch)
    else:
        logits = model(**batch).logits
    return [row[: len(one.scored)] for row, one in zip(logits.float().cpu(), requests, strict=True)]


def check_counts(least: int = 1, **counts: Any) -> None:
    """Raise a `ValueError` naming the first of some numbers that is no integer from `least` on."""
    for name, value in counts.items():
        if not isinstance(value, Integral) or value < least:
            raise ValueError(f"{name}={value!r} must be at least {least}, and an integer.")


def check_positions(model: CCFLLMForCTR, batch: Mapping[str, Tensor]) -> None:
    """Raise a `ValueError` where a prompt of a batch is longer than the backbone has positions."""
    most = getattr(model.config.text_config, "max_position_embeddings", None)
    needed = int(batch["position_ids"].max()) + 1
    if most is not None and needed > most:
        raise ValueError(
            f"a prompt has {needed} tokens, and the backbone {most} positions: give a shorter "
            "history or title, or train with a smaller history_window"
        )


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


@dataclass
class _Context:
    """What the candidates of a sequence share, or all sequences: its columns in the row, and of
    each start that ends with a line the name, made of its content, and the tokens."""

    columns: Tensor
    names: list[tuple[bytes, int]]


def _find_contexts(packed: Mapping[str, Tensor], num_items: int) -> list[_Context]:
    """Those of the instruction, and of each sequence that has one, in their order."""
    sequences, blocks, depths = (
        packed[name][0] for name in ("sequence_ids", "block_ids", "history_depths")
    )
    ids, items, users = (packed[name][0] for name in CONTENT)
    new_items = _describe_new(packed)
    contexts = []
    instruction = b""
    for sequence in range(SHARED, len(packed["candidate_users"])):
        columns = ((sequences == sequence) & (blocks == 0)).nonzero()[:, 0]
        digest = blake2b(instruction, digest_size=16)
        names: list[tuple[bytes, int]] = []
        tokens = 0
        lines = depths[columns].unique_consecutive(return_counts=True)[1].tolist()
        for line in columns.split(lines) if lines else []:
            slots = items[line]
            told = torch.stack([ids[line], slots.clamp(max=num_items), users[line]])
            digest.update(told.numpy().tobytes())
            for slot in slots[slots >= num_items].tolist():
                digest.update(new_items[slot - num_items])
            tokens += len(line)
            names.append((digest.digest(), tokens))
        if sequence == SHARED:
            instruction = digest.digest()
        if names:
            contexts.append(_Context(columns, names))
    return contexts


def _describe_new(packed: Mapping[str, Tensor]) -> list[bytes]:
    """What fills the slots of items outside the catalog: their words and field values."""
    if "new_title_ids" not in packed:
        return []
    words = packed["new_title_ids"].split(packed["new_title_lengths"].tolist())
    told: list[Any] = [[ids.tolist()] for ids in words]
    if "new_field_values" in packed:
        for item, values, weights in zip(
            told, packed["new_field_values"], packed["new_field_weights"], strict=True
        ):
            there = values >= 0  # how far they are padded is the batch's matter
            item += [values[there].tolist(), weights[there].tolist()]
    return [repr(item).encode() for item in told]


def _score_after(
    model: CCFLLMForCTR,
    batch: Mapping[str, Tensor],
    contexts: Sequence[_Context],
    prefixes: PrefixCache | None,
    tokens_per_batch: int,
) -> Tensor:
    """Logits `(batch, num_candidates)` of a batch whose contexts may have been read before.

    The row is put in another order: what `prefixes` has of the contexts, which does not go through
    the backbone again, the rest of them, what groups of blocks begin with, and the candidates. Of
    one user, at most `tokens_per_batch` tokens go through at a time, the first part with the
    context.
    """
    found = [prefixes.find(context.names) if prefixes else ([], 0) for context in contexts]
    cache = DynamicCache()
    for layer, both in enumerate(zip(*(states for states, tokens in found if tokens), strict=True)):
        keys, values = (torch.cat(side, dim=2) for side in zip(*both, strict=True))
        cache.update(keys, values, layer)
    pairs = list(zip(contexts, found, strict=True))
    order = [context.columns[:tokens] for context, (_, tokens) in pairs]
    order += [context.columns[tokens:] for context, (_, tokens) in pairs]
    blocks = batch["block_ids"][0].cpu()
    order += [((blocks > 0) & (blocks % GROUP == 0)).nonzero()[:, 0]]
    start = sum(tokens for _, tokens in found)
    read = sum(map(len, order))
    device = batch["block_ids"].device
    columns = torch.cat([*order, (blocks % GROUP).nonzero()[:, 0]]).to(device)
    place = torch.empty_like(columns).scatter_(
        0, columns, torch.arange(len(columns), device=device)
    )
    row = {name: batch[name][:, columns] for name in CONTENT + LAYOUT}
    answers = place[batch["answer_positions"]]
    turns = torch.arange(answers.shape[1], device=device)
    if len(answers) == 1:
        turns = answers[0].argsort()  # groups bring candidates out of their order
    answers = answers[:, turns]
    candidates = {name: batch[name][:, turns] for name in ("candidate_items", "candidate_mask")}
    given = {name: batch[name] for name in NEW_ITEMS + HISTORIES if name in batch}
    logits = []
    first, known = 0, start
    while first < answers.shape[1]:
        last, end = answers.shape[1], len(columns)
        if len(answers) == 1:
            within = torch.searchsorted(answers[0], start + tokens_per_batch - 1, right=True)
            last = max(first + 1, int(within))  # a block longer than the budget goes alone
            end = int(answers[0, last - 1]) + 1
        some = slice(first, last)
        output = model(
            **{name: row[name][:, start:end] for name in CONTENT},
            **{n: torch.cat([row[n][:, :known], row[n][:, start:end]], 1) for n in LAYOUT},
            **given,
            answer_positions=(answers[:, some] - start).clamp(min=0),  # padding's are anywhere
            **{name: value[:, some] for name, value in candidates.items()},
            candidate_users=batch["candidate_users"],
            cache=cache,
        )
        logits.append(output.logits)
        if prefixes is not None and first == 0:
            _keep(prefixes, cache, contexts, found, place)
        cache.crop(read - known - (end - start))
        first, start, known = last, end, read
    return torch.cat(logits, dim=1)[:, turns.argsort()]


def _keep(
    prefixes: PrefixCache,
    cache: DynamicCache,
    contexts: Sequence[_Context],
    found: Sequence[tuple[States, int]],
    place: Tensor,
) -> None:
    """Keep the contexts of a row that were read anew; `place` is that of its columns in `cache`."""
    layers: list[Any] = cache.layers
    for context, (_, tokens) in zip(contexts, found, strict=True):
        if tokens == len(context.columns):
            continue
        own = place[context.columns.to(place.device)]
        states = [
            (layer.keys.index_select(2, own), layer.values.index_select(2, own)) for layer in layers
        ]
        prefixes.keep(context.names, states)


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
    return _folded_logits(model, processor, [*earlier, *shown], rows, new)


def _folded_logits(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    history: Sequence[Any],
    rows: Tensor,
    new: NewFields | None = None,
) -> Tensor:
    """CF logits `(n,)` of rows `(n,)` for a user who is solved for from a history."""
    items, of_history = number_items(processor, history, rows.device)
    targets = torch.tensor([[processor.target(item) for item in history]], device=rows.device)
    depth = torch.tensor([len(history)], device=rows.device)
    users = model.cf.folded_users(items[None], targets.float(), depth, of_history)
    return model.cf.folded_logits(users, rows[None], new)[0]


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
    max_per_topic: int | None = None,
) -> list[dict[str, str]]:
    """`count` catalog items to score, none of them in the history (our choice).

    In turn, the item that the CF model scores highest above an unknown user's score, which brings
    what is this user's rather than what everybody likes (without a difference: the item that it
    scores highest), one that shares a value of the processor's `evidence_fields`, such as its
    author, with what was liked, and the one whose words, where a model has contextual text vectors,
    are nearest to those of a liked item. The latter two may be items that nobody has rated. A new
    user is folded in from the history if the CF model allows it. With `max_per_topic` of the list,
    see `rank`, a topic has `SPARE` times as many candidates at most, so that others have some too.

    Raises:
        ValueError: nothing tells items apart for this user, or none is left.
    """
    rows = torch.arange(len(processor.item_ids), device=model.device)
    count = min(count, len(rows))
    logits = _retrieval_logits(model, processor, user, history, rows)
    known = model.cf.item_known
    seen = {processor.resolve_item(item)[0] for item in history}
    sources = []
    own = logits - model.cf.logits(torch.full_like(rows, len(processor.user_ids)), rows)
    personal = own if bool((own.abs() > 1e-6).any()) else logits
    if bool(known.any()) and bool(personal[known].max() > personal[known].min()):
        # Those of no vector stand last: that all are at one place says nothing of them.
        order = personal.masked_fill(~known, -torch.inf).argsort(descending=True, stable=True)
        best = (order if max_per_topic else order[: count + len(seen)]).tolist()
        sources.append([row for row in best if row not in seen])
    if by_topic := _by_topic(processor, history, logits.tolist(), seen):
        sources.append(by_topic)
    if model.config.item_text == "contextual":
        liked = [processor.resolve_item(item)[0] for item in history if processor.likes(item)]
        vectors = model.text_vectors(rows)
        nearest = _by_text(vectors, [row for row in liked if row is not None], count + len(seen))
        if nearest:
            sources.append([row for row in nearest if row not in seen])
    if not sources:
        lack = "item biases" if known.any() else "CF vectors"
        raise ValueError(
            f"this model has no {lack} to choose items by for this user, and no liked item shares "
            "one of its evidence_fields with another: give candidates"
        )
    turns = _take_turns(sources)
    if max_per_topic:
        ids = processor.item_ids
        turns = _vary(turns, lambda row: processor.topics({"id": ids[row]}), SPARE * max_per_topic)
    chosen = list(islice(turns, count))
    if not chosen:
        raise ValueError("the history holds every item of the catalog: give candidates")
    return [{"id": processor.item_ids[row]} for row in chosen]


def _take_turns(sources: Sequence[Sequence[int]]) -> Iterator[int]:
    """Rows, in turn the next of each source that no other has given."""
    given: set[int] = set()
    left = [iter(source) for source in sources]
    while left:
        for source in list(left):
            row = next((row for row in source if row not in given), None)
            if row is None:
                left.remove(source)
            else:
                given.add(row)
                yield row


@torch.no_grad()
def _retrieval_logits(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    user: Any,
    history: Sequence[Any],
    rows: Tensor,
) -> Tensor:
    """CF logits `(n,)` that choose candidates: those of a user that the CF model was fitted on are
    its own, unless the score takes folded-in ones; a new user is folded in from all of the history.
    """
    row = rows.new_tensor([processor.resolve_user(user)])
    vectors, fitted = model.cf.lookup("user", row)
    can_fold_in = bool(history) and model.config.cf_user_precision is not None
    if can_fold_in and (model.config.cf_fold_in or not bool(fitted)):
        return _folded_logits(model, processor, history, rows)
    return model.cf.folded_logits(FoldedUsers(vectors), rows[None])[0]


def _by_topic(
    processor: CCFLLMProcessor,
    history: Sequence[Any],
    logits: Sequence[float],
    seen: set[int | None],
) -> list[int]:
    """Catalog rows that share a topic with items of the history, best first.

    A topic counts how much more often it was liked than disliked, and gets places in proportion,
    its items in the order of their CF logits. Topics that were disliked as often get none.
    """
    counts = _count_topics(processor, history)
    places: dict[int, float] = {}
    for topic, count in counts.items():
        rows = [row for row in processor.topic_rows.get(topic, ()) if row not in seen]
        rows = sorted(rows, key=lambda row: -logits[row]) if count > 0 else []
        for place, row in enumerate(rows, start=1):
            places[row] = min(place / count, places.get(row, place / count))
    return sorted(places, key=lambda row: places[row])


def _count_topics(processor: CCFLLMProcessor, history: Sequence[Any]) -> Counter[tuple[str, str]]:
    """How much more often each topic of a history was liked than disliked."""
    counts: Counter[tuple[str, str]] = Counter()
    for item in history:
        for topic in processor.topics(item):
            counts[topic] += 1 if processor.likes(item) else -1
    return counts


def shortlist(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    request: Request,
    count: int,
    max_per_topic: int | None = None,
) -> list[Any]:
    """The `count` candidates of a request, of a whole history, that may well be the best, found
    without the language model; best first (our choice).

    Of a model with a CF logit those of the highest, which is the part of the score that is known
    beforehand. Of another in turn, as in [`preselect`], by the CF model, by values of
    `evidence_fields` that were liked more often than disliked, and by contextual text vectors.
    With `max_per_topic` of the list, see `rank`, a topic has `SPARE` times as many places at most.
    """
    candidates, history = request.candidates, request.history
    rows, new = number_items(processor, candidates, model.device)
    logits = cf_logits(model, processor, request.user, history, rows, new)
    by_cf = logits.argsort(descending=True, stable=True).tolist()
    sources = [by_cf]
    if not model.config.cf_logit:
        counts = _count_topics(processor, history)
        gains = [
            max((counts[topic] for topic in processor.topics(item)), default=0)
            for item in candidates
        ]
        sharing = [place for place in by_cf if gains[place] > 0]
        told_apart = bool(len(rows)) and bool(logits.max() > logits.min())
        sources = [by_cf] if told_apart else []
        sources.append(sorted(sharing, key=lambda place: -gains[place]))
        places = [place for place, row in enumerate(rows.tolist()) if row < len(processor.item_ids)]
        if model.config.item_text == "contextual":
            liked = [processor.resolve_item(item)[0] for item in history if processor.likes(item)]
            known = [row for row in liked if row is not None]
            vectors = model.text_vectors(torch.cat([rows[places], rows.new_tensor(known)]))
            last = range(len(places), len(vectors))
            nearest = _by_text(vectors, last, len(vectors))
            sources.append([places[place] for place in nearest if place < len(places)])
        sources.append(by_cf)  # what no other brings
    turns = _take_turns(sources)
    if max_per_topic:
        turns = _vary(turns, lambda one: processor.topics(candidates[one]), SPARE * max_per_topic)
    return [candidates[place] for place in islice(turns, count)]


def _by_text(vectors: Tensor, liked: Sequence[int], count: int) -> list[int]:
    """The `count` rows of text vectors `(n, dim)` that are nearest to one of the liked rows, by
    cosine, best first; none where nothing was liked."""
    if not liked:
        return []
    unit = F.normalize(vectors.float(), dim=-1)
    nearness = (unit @ unit[list(liked)].T).amax(dim=1)
    return nearness.topk(min(count, len(nearness))).indices.tolist()


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
    words = [processor.text_ids(text) for text in texts]
    new_titles = (
        torch.tensor([token for ids in words for token in ids], device=model.device).long(),
        torch.tensor([len(ids) for ids in words], device=model.device).long(),
    )
    return model.item_gates(rows, new_titles if texts else None, new_fields).mean(dim=-1).tolist()


def rank(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    requests: Sequence[Request],
    top_k: int = 10,
    *,
    max_per_topic: int | None = None,
    shortlisted: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    prefixes: PrefixCache | None = None,
) -> list[list[RankedItem]]:
    """Each request's `top_k` candidates of the highest logits, best first; ties keep order.

    With `shortlisted`, only so many go through the language model, see [`shortlist`].

    With `max_per_topic`, an item is passed over whose author, say, has that many places already:
    whose value of one of the processor's `evidence_fields`. A list is then shorter where the
    candidates do not vary enough.

    Raises:
        ValueError: `max_per_topic` where the processor has no `evidence_fields`.
    """
    if max_per_topic is not None and not processor.evidence_fields:
        raise ValueError(
            f"max_per_topic={max_per_topic} counts by evidence_fields, and this model's processor "
            "names none: leave it out."
        )
    if shortlisted is not None:
        requests = [
            replace(one, candidates=shortlist(model, processor, one, shortlisted, max_per_topic))
            for one in requests
        ]
    scores = score(model, processor, requests, tokens_per_batch=tokens_per_batch, prefixes=prefixes)
    return [
        rank_scored(model, processor, request.candidates, logits, top_k, max_per_topic)
        for request, logits in zip(requests, scores, strict=True)
    ]


def rank_scored(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    candidates: Sequence[Any],
    logits: Tensor,
    top_k: int,
    max_per_topic: int | None = None,
) -> list[RankedItem]:
    """As `rank`, for candidates whose logits `(n,)` are known."""
    best = logits.argsort(descending=True, stable=True)
    if max_per_topic is not None:
        places = iter(best.tolist())
        kept = _vary(places, lambda place: processor.topics(candidates[place]), max_per_topic)
        best = torch.tensor(list(islice(kept, top_k)), dtype=torch.long)
    best = best[: min(top_k, len(best))]
    probabilities = model.probabilities(logits[best]).tolist()
    shares = item_shares(model, processor, [candidates[index] for index in best.tolist()])
    return [
        RankedItem(logit=logit, probability=probability, **vars(share))
        for logit, probability, share in zip(
            logits[best].tolist(), probabilities, shares, strict=True
        )
    ]


def _vary(
    places: Iterable[int], topics: Callable[[int], frozenset[tuple[str, str]]], most: int
) -> Iterator[int]:
    """Those that are left when none may hold a topic that `most` before it hold."""
    taken: Counter[tuple[str, str]] = Counter()
    for place in places:
        held = topics(place)
        if all(taken[topic] < most for topic in held):
            taken.update(held)
            yield place


@dataclass
class LineEffect:
    """What a line of the history did to a candidate's logit: the logit minus that without the line.

    `item_id` is None for an item outside the catalog.
    """

    item_id: str | None
    title: str
    liked: bool
    effect: float


@dataclass
class TopicEffect:
    """As [`LineEffect`], of the lines that share a value with the candidate, left out together:
    each of several alike can be missed, all of them not."""

    field: str
    value: str
    lines: int
    effect: float


@dataclass
class Reasons:
    """What a candidate's logit is made of, and what of the history moved it (our choice).

    `logit = start + words + behavior + cf`, all in logits:

    - `start`: of any title that nobody has rated, for this user and history, the mean over
      `AVERAGE_OVER` titles of the catalog.
    - `words`: how much more the candidate has as an item that nobody has rated.
    - `behavior`: how much more it has with its CF vector in its slot, before the CF logit.
    - `cf`: the CF logit times its scale, minus that of an item that nobody has rated.

    What a model lacks is exactly 0: words where items are slots of CF alone, behavior where
    candidates have no slot, `cf` without a CF logit, both for items that CF does not know.

    `history` is the logit minus that without any history; `lines`, of what the prompt shows or of
    the candidate's topics, and `topics` are in the order of their effects, highest first.
    """

    logit: float
    start: float
    words: float
    behavior: float
    cf: float
    history: float
    lines: list[LineEffect]
    topics: list[TopicEffect]


def explain(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    request: Request,
    *,
    max_lines: int | None = None,
    tokens_per_batch: int = TOKENS_PER_BATCH,
    progress: bool = False,
) -> list[Reasons]:
    """Why each candidate has its logit; the candidates share the scoring.

    Args:
        request: its whole history, which every candidate sees, as in `rank`.
        max_lines: of the lines that the prompt shows, or that share a topic with a candidate,
            leave out so many, each in turn: the latter first, then the latest. A line costs a
            scoring of the whole request. None: all.
        tokens_per_batch, progress: as in `score`.
    """
    cut = processor.cut(request)
    history, candidates = request.history, request.candidates
    every = set(range(len(history)))
    topics = _shared_topics(processor, request)
    sharing = set().union(*topics.values())
    read = sharing | set(range(len(history) - len(cut.history), len(history)))
    single = sorted(sorted(read, key=lambda place: (place not in sharing, -place))[:max_lines])
    together = {topic: places for topic, places in topics.items() if len(places) > 1}
    left_out = [every, *({place} for place in single), *together.values()]
    requests = [_without(processor, request, cut, places) for places in left_out]
    options: Any = {"tokens_per_batch": tokens_per_batch, "progress": progress}
    logits, blank, *rest = score(model, processor, [cut, *requests], **options)
    effects = (logits - torch.stack(rest)).T.tolist() if rest else [[]] * len(candidates)
    parts = _parts(model, processor, request, cut, logits, tokens_per_batch)
    lines = [
        (row if row is None else processor.item_ids[row], title, processor.likes(item))
        for item in (history[place] for place in single)
        for row, title in [processor.item_text(item)]
    ]
    reasons = []
    for candidate, (item, values) in enumerate(zip(candidates, effects, strict=True)):
        own = processor.topics(item)
        found = [
            TopicEffect(*topic, len(places), effect)
            for (topic, places), effect in zip(together.items(), values[len(lines) :], strict=True)
            if topic in own
        ]
        moved = [LineEffect(*line, effect) for line, effect in zip(lines, values, strict=False)]
        reasons.append(
            Reasons(
                logit=float(logits[candidate]),
                **parts[candidate],
                history=float(logits[candidate] - blank[candidate]),
                lines=sorted(moved, key=lambda line: -line.effect),
                topics=sorted(found, key=lambda topic: -topic.effect),
            )
        )
    return reasons


def _shared_topics(processor: CCFLLMProcessor, request: Request) -> dict[tuple[str, str], set[int]]:
    """Places in the history of what shares a topic with a candidate."""
    wanted = frozenset().union(*(processor.topics(item) for item in request.candidates))
    places: dict[tuple[str, str], set[int]] = {}
    for place, item in enumerate(request.history):
        for topic in sorted(processor.topics(item) & wanted):
            places.setdefault(topic, set()).add(place)
    return places


def _without(
    processor: CCFLLMProcessor, request: Request, cut: Request, places: set[int]
) -> Request:
    """What was cut from a request, as if these lines of its whole history had never been, but with
    no others in their place."""
    shown = len(request.history) - len(cut.history)
    folded_in = shown - len(cut.earlier)
    left = [(place, item) for place, item in enumerate(request.history) if place not in places]
    history = [item for place, item in left if place >= shown]
    return replace(
        cut,
        history=history,
        history_lengths=[len(history)] * len(cut.candidates),
        earlier=[item for place, item in left if folded_in <= place < shown],
        evidence=processor.evidence(
            [item for place, item in left if place < shown], cut.candidates
        ),
    )


def _parts(
    model: CCFLLMForCTR,
    processor: CCFLLMProcessor,
    request: Request,
    cut: Request,
    logits: Tensor,
    tokens_per_batch: int,
) -> list[dict[str, float]]:
    """`start`, `words`, `behavior` and `cf` of each candidate, whose logits `(n,)` are known."""
    rows = [processor.resolve_item(item)[0] for item in cut.candidates]
    past = {processor.resolve_item(item)[0] for item in request.history}
    catalog = [row for row, title in enumerate(processor.item_titles) if title and row not in past]
    others = catalog[:: max(1, len(catalog) // AVERAGE_OVER)][:AVERAGE_OVER]
    items = [*cut.candidates, *({"id": processor.item_ids[row]} for row in others)]
    unrated = _with_unrated(model, [row for row in (*rows, *others) if row is not None])
    asked = processor.cut(replace(request, candidates=items))
    (scores,) = score(unrated, processor, [asked], tokens_per_batch=tokens_per_batch)
    numbers, new = number_items(processor, cut.candidates, model.device)
    known = model.cf.lookup("item", numbers, new)[1].tolist()
    cf = torch.zeros(len(rows))
    if model.config.cf_logit:
        asker = (model, processor, request.user, request.history)
        nobodys = torch.full_like(numbers[:1], len(processor.item_ids))
        own = cf_logits(*asker, numbers, new) - cf_logits(*asker, nobodys)
        cf = (model.cf_logit_scale.float() * own).detach().cpu()
    has_words = processor.candidate_format != "slot" or model.config.fusion != "cf_only"
    has_slot = processor.candidate_format != "title"
    parts = []
    for place in range(len(rows)):
        rest = logits[place] - cf[place]
        alone = (
            scores[place] if has_slot and known[place] else rest
        )  # as an item that nobody has rated
        start = scores[len(rows) :].mean() if has_words and others else alone
        parts.append(
            {
                "start": float(start),
                "words": float(alone - start),
                "behavior": float(rest - alone),
                "cf": float(cf[place]),
            }
        )
    return parts


def _with_unrated(model: CCFLLMForCTR, rows: Sequence[int]) -> CCFLLMForCTR:
    """A model that shares all weights, but whose CF table does not know these catalog rows, nor
    new items by their fields."""
    other: Any = _shallow_copy(model)
    other.model = _shallow_copy(model.model)
    other.model.cf = table = _shallow_copy(model.cf)
    index = torch.tensor(rows, device=table.item_known.device).long()
    table.item_known = table.item_known.index_fill(0, index, False)
    table.field_vectors = table.item_values = None
    return other


def _shallow_copy(module: nn.Module) -> Any:
    """A module whose submodules and buffers can be replaced without changing the given one's."""
    other = copy.copy(module)
    other._modules, other._buffers = dict(module._modules), dict(module._buffers)
    return other


__all__ = [
    "ItemShare",
    "LineEffect",
    "PrefixCache",
    "RankedItem",
    "Reasons",
    "TopicEffect",
    "cf_logits",
    "explain",
    "item_shares",
    "preselect",
    "rank",
    "score",
    "score_cf_logit",
    "shortlist",
]
