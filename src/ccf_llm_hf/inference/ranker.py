"""`CTRRanker`: probabilities, ranked lists and explanations from a checkpoint."""

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.inference.explanation import Explanation, render_prompt
from ccf_llm_hf.modeling.configuration_ccf_llm import read_id
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.processing_ccf_llm import (
    CCFLLMProcessor,
    Item,
    Request,
    User,
    is_container,
    read_items,
)
from ccf_llm_hf.modeling.ranking_ccf_llm import (
    PREFIX_BYTES,
    TOKENS_PER_BATCH,
    PrefixCache,
    RankedItem,
    cf_logits,
    check_counts,
    explain,
    number_items,
    preselect,
    rank,
    score,
)

logger = logging.getLogger(__name__)
Pair = Mapping[str, Any] | tuple[User, Item]


class CTRRanker:
    """Predict, rank and explain with a trained model.

    Items are given as raw ids, as titles, or as `{"id": ..., "title": ...}`; a title outside the
    catalog is a new item, scored by its text, and by the CF vectors of its fields where it is given
    with them (`{"title": ..., "author": ...}`) and the CF model knows them. A user the model has
    not seen is a new user, scored by the history. Histories hold liked items, oldest first; a model
    trained on signed ones takes disliked items too, as `{"id": ..., "liked": False}`, or with a
    `rating`. Threads may share a ranker; one of them at a time goes through the model.

    Args:
        model: a `CCFLLMForCTR`.
        processor: its `CCFLLMProcessor`.
        tokens_per_batch: tokens of one forward pass. Users share a pass as long as they fit;
            a longer candidate list is scored in parts on the history's cached keys and values.
        prefix_bytes: of memory for the keys and values of histories, which `rank` keeps for the
            users' next requests; 0: none are kept.
    """

    def __init__(
        self,
        model: CCFLLMForCTR,
        processor: CCFLLMProcessor,
        *,
        tokens_per_batch: int = TOKENS_PER_BATCH,
        prefix_bytes: int = PREFIX_BYTES,
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.tokens_per_batch = tokens_per_batch
        self.prefixes = PrefixCache(prefix_bytes)
        # What reads the words of items outside the catalog hangs on the backbone meanwhile, where
        # another thread's prompt would run into it.
        self._turn = threading.RLock()

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str,
        *,
        backbone: str | None = None,
        device: str | torch.device | None = None,
        **kwargs: Any,
    ) -> "CTRRanker":
        """Load a checkpoint folder or Hub repository.

        Args:
            path_or_repo: folder or repository of a full or slim checkpoint.
            backbone: folder or name to attach instead of the recorded one (slim checkpoints).
            device: where to run; default: a GPU if there is one, else the CPU.
            kwargs: passed on to both `from_pretrained`, for example `revision` or `token`.

        Raises:
            InputError: the checkpoint is missing, damaged, or does not fit its backbone.
        """
        model, processor = load_checkpoint(path_or_repo, backbone=backbone, **kwargs)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(model.to(device), processor)

    def save_pretrained(self, folder: str | Path, form: str | None = None) -> None:
        """Write model and processor into one checkpoint folder.

        Args:
            folder: where to.
            form: `slim` or `full`; default the form that the model was loaded in.
        """
        self.model.save_pretrained(folder, form=form)
        self.processor.save_pretrained(folder)

    def predict(self, pairs: Sequence[Pair], *, progress: bool = False) -> np.ndarray:
        """Probability that the user likes the item, for each pair.

        Args:
            pairs: `(user, item)` tuples, or dicts with `item` and optionally `user` and `history`;
                any container of them. Pairs that share user and history share one forward pass.
            progress: show a bar on stderr.

        Returns:
            Float32 array of shape (number of pairs,).

        Raises:
            InputError: a pair of another form, naming its place.
        """
        pairs = _pair_list(pairs)
        logits = self.pair_logits(pairs, progress=progress)
        read = [_read_pair(pair, place) for place, pair in enumerate(pairs)]
        self._tell_unknown([user for user, _, _ in read], [item for _, _, item in read])
        return self.probabilities(logits)

    def pair_logits(self, pairs: Sequence[Pair], *, progress: bool = False) -> np.ndarray:
        """As `predict`, before the temperature and the sigmoid."""
        pairs = _pair_list(pairs)
        requests: dict[Any, Request] = {}
        places: dict[Any, list[int]] = {}
        read, seen_of = self.processor, dict[int, tuple[Any, ...]]()
        for place, pair in enumerate(pairs):
            given = pair.get("history") if isinstance(pair, Mapping) else None
            user, history, item = _read_pair(pair, place)
            # Many pairs share one list: it is looked up once.
            if id(given) not in seen_of:
                with refusing(f"pair {place}: "):
                    seen_of[id(given)] = tuple(
                        (read.item_text(past), read.new_values(past), read.target(past))
                        for past in history
                    )
            key = (user, seen_of[id(given)])
            requests.setdefault(key, Request(user, history)).candidates.append(item)
            places.setdefault(key, []).append(place)
        logits = np.empty(len(pairs), dtype=np.float32)
        scores = self._score(list(requests.values()), progress)
        for indices, values in zip(places.values(), scores, strict=True):
            logits[indices] = values.numpy()
        return logits

    def unknown(self, users: Iterable[User], items: Iterable[Item]) -> tuple[list[Any], list[Any]]:
        """Of distinct users and items those that the model does not know; users that are None, or
        of a model that knows none at all, do not count."""
        read = self.processor
        strangers = [u for u in dict.fromkeys(map(read_id, users)) if u is not None]
        strangers = [u for u in strangers if read.user_ids and u not in read.user_index]
        by_text = {read.item_text(item): item for item in items}
        return strangers, [item for (row, _), item in by_text.items() if row is None]

    def _tell_unknown(self, users: Iterable[User], items: Iterable[Item]) -> None:
        if said := describe_unknown(self.processor, *self.unknown(users, items)):
            logger.warning(said)

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated probabilities of logits."""
        return self.model.probabilities(torch.as_tensor(logits)).numpy()

    def rank(
        self,
        user: User = None,
        history: Sequence[Item] | None = None,
        candidates: Sequence[Item] | None = None,
        top_k: int = 10,
        preselect: int = 100,
        max_per_topic: int | None = None,
        shortlist: int | None = None,
    ) -> list[RankedItem]:
        """The `top_k` best candidates for one user, best first.

        Args:
            user: raw id, or None for a new user.
            history: earlier items, oldest first; likes alone will do.
            candidates: items to choose from. Default: `preselect` catalog items that are not in the
                history: those that the CF model scores highest above an unknown user's score (a new
                user is folded in from the history; without one, highest), in turn with those that
                share a value of the processor's `evidence_fields`, such as an author, with what was
                liked, and those of the nearest text vectors, where a model has them.
            top_k: length of the list; fewer when there are fewer candidates.
            preselect: catalog items that the language model scores.
            max_per_topic: most items of the list that may share a value of one of the processor's
                `evidence_fields`. None: no limit.
            shortlist: so many of the candidates, or of the preselected, go through the language
                model, those that promise most by the CF logit, fields and text vectors: 20 of 100
                take a quarter of the time, and the list may lack an item of the whole one. None:
                all.

        Raises:
            InputError: several users (see `rank_many`), no candidates, or a shortlist shorter than
                the list.
        """
        past: Any = history
        past = list(past) if is_container(past) else past
        if is_container(user) or (isinstance(past, list) and past and is_container(past[0])):
            raise InputError("rank is for one user: give several to rank_many")
        past = _items(past, "history")
        given = None if candidates is None else [candidates]
        counts = (top_k, preselect, max_per_topic, shortlist)
        return self.rank_many([user], [past], given, *counts)[0]

    def rank_many(
        self,
        users: Sequence[User] | None = None,
        histories: Sequence[Sequence[Item]] | None = None,
        candidates: Sequence[Sequence[Item]] | None = None,
        top_k: int = 10,
        preselect: int = 100,
        max_per_topic: int | None = None,
        shortlist: int | None = None,
    ) -> list[list[RankedItem]]:
        """As `rank`, for several users, who share forward passes.

        Args:
            users: raw ids; None: all are new users.
            histories: one list a user; None: nobody has a history.
            candidates: one list a user; None: chosen from the catalog for each.
            top_k: length of each list.
            preselect: catalog items that the language model scores for each.
            max_per_topic, shortlist: as in `rank`, for each list.

        Returns:
            One ranked list a user.

        Raises:
            InputError: neither users nor histories, or lists whose lengths differ.
        """
        counts = {"max_per_topic": max_per_topic, "shortlist": shortlist}
        with refusing():
            check_counts(top_k=top_k, preselect=preselect)
            check_counts(**{name: value for name, value in counts.items() if value is not None})
        if shortlist is not None and top_k > shortlist:
            raise InputError(f"top_k={top_k} of shortlist={shortlist} items: raise the shortlist")
        given = {"users": users, "histories": histories, "candidates": candidates}
        for name, values in given.items():
            if not (values is None or is_container(values)):
                raise InputError(f"{name} is {values!r}: give a list with one entry a user")
        users, histories, candidates = (
            None if values is None else list(values) for values in given.values()
        )
        sizes = {
            name: len(values)
            for name, values in zip(given, (users, histories, candidates), strict=True)
            if values is not None
        }
        if len(set(sizes.values())) != 1:
            found = ", ".join(f"{size} {name}" for name, size in sizes.items()) or "nothing"
            raise InputError(f"rank_many got {found}: give one entry a user in each list")
        size = next(iter(sizes.values()))
        requests = []
        for place in range(size):
            try:
                user = None if users is None else read_id(users[place])
            except ValueError as error:
                raise InputError(
                    f"user {place} is {users and users[place]!r}: give ids in users, and histories "
                    "beside them"
                ) from error
            past = _items(None if histories is None else histories[place], f"history {place}")
            items = None if candidates is None else candidates[place]
            if items is None:
                chosen = self._preselect(user, past, preselect, max_per_topic)
            else:
                chosen = _given(items)
            requests.append(Request(user, past, chosen))
        self._tell_unknown([one.user for one in requests], [])
        with refusing(), self._turn:
            return rank(
                self.model,
                self.processor,
                requests,
                top_k,
                max_per_topic=max_per_topic,
                shortlisted=shortlist,
                tokens_per_batch=self.tokens_per_batch,
                prefixes=self.prefixes,
            )

    def explain(
        self,
        user: User = None,
        history: Sequence[Item] | None = None,
        *,
        item: Item,
        max_lines: int | None = 16,
        progress: bool = False,
    ) -> Explanation:
        """Why an item has its logit: what that is made of, and which lines of the history moved it.

        Args:
            user: raw id, or None for a new user.
            history: earlier items, oldest first.
            item: the candidate.
            max_lines: leave out so many lines, each in turn, which costs a scoring of the whole
                prompt each: first those that share evidence fields with the item, then the latest.
                None: all that the prompt shows, and those.
            progress: show a bar on stderr.
        """
        if max_lines is not None:
            with refusing():
                check_counts(0, max_lines=max_lines)
        request = Request(user, _items(history, "history"), _items([item], "item"))
        with refusing(), self._turn:
            (reasons,) = explain(
                self.model,
                self.processor,
                request,
                max_lines=max_lines,
                tokens_per_batch=self.tokens_per_batch,
                progress=progress,
            )
        row, title = self.processor.resolve_item(item)
        number, new = number_items(self.processor, [item], self.model.device)
        return Explanation(
            **vars(reasons),
            prompt=render_prompt(self.processor, request),
            user=read_id(user),
            user_known=self._user_known(user),
            item_id=None if row is None else self.processor.item_ids[row],
            title=title,
            known=bool(self.model.cf.lookup("item", number, new)[1]),
            cf_logit=self._cf_logit(user, request.history, item),
            probability=float(self.probabilities(np.array([reasons.logit]))[0]),
            temperature=self.model.config.logit_temperature,
        )

    def _score(self, requests: Sequence[Request], progress: bool) -> list[torch.Tensor]:
        """Logits per request, in the order of its candidates."""
        with refusing(), self._turn:
            return score(
                self.model,
                self.processor,
                requests,
                tokens_per_batch=self.tokens_per_batch,
                progress=progress,
            )

    def _cf_logit(self, user: User, history: Sequence[Item], item: Item) -> float | None:
        """The CF model's own logit, see `cf_logits`; None without CF vectors."""
        if not self.model.cf.item_known.any():
            return None
        rows, new = number_items(self.processor, [item], self.model.device)
        return cf_logits(self.model, self.processor, user, history, rows, new).item()

    def _preselect(
        self, user: User, history: Sequence[Item], count: int, max_per_topic: int | None
    ) -> list[Item]:
        """As `preselect` of the modeling code."""
        with refusing():
            return list(preselect(self.model, self.processor, user, history, count, max_per_topic))

    def _user_known(self, user: User) -> bool:
        row = self.processor.resolve_user(user)
        return row < len(self.processor.user_ids) and bool(self.model.cf.user_known[row])


@contextmanager
def refusing(place: str = "") -> Iterator[None]:
    """Have what the modeling code refuses, or finds missing such as a sentence encoder, end as an
    `InputError` that begins with `place`."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, OSError) as error:
        raise InputError(f"{place}{error}") from error


def describe_unknown(processor: CCFLLMProcessor, users: Sequence[Any], items: Sequence[Any]) -> str:
    """How many users and items a model does not know, with the spelling of one and of its own; ""
    where it knows all."""
    said = [
        f"{len(ids):,} {side}{'s' * (len(ids) > 1)} unknown to the model, such as {ids[0]!r} (its "
        f"own look like {own[0]!r})"
        for side, ids, own in (
            ("user", users, processor.user_ids),
            ("item", items, processor.item_ids),
        )
        if ids and own
    ]
    return " and ".join(said)


def _pair_list(pairs: Any) -> list[Any]:
    """Pairs of any container."""
    if not is_container(pairs):
        raise InputError(f"pairs is {pairs!r}: give a list of (user, item)")
    return list(pairs)


def _read_pair(pair: Pair, place: int) -> tuple[str | None, list[Item], Item]:
    name = f"pair {place}"
    history: Any = None
    if isinstance(pair, Mapping):
        if "item" not in pair or set(pair) - {"user", "history", "item"}:
            raise InputError(
                f"{name} has the keys {sorted(map(str, pair))}: give item, and user or history if "
                "known"
            )
        user, history, item = pair.get("user"), pair.get("history"), pair["item"]
    elif is_container(pair) and isinstance(pair, Iterable) and len(both := list(pair)) == 2:
        user, item = both
    else:
        raise InputError(f"{name} is {pair!r}: give (user, item) or a dict with item")
    with refusing(f"{name}: "):
        return read_id(user), _items(history, f"history of {name}"), _items([item], name)[0]


def _items(values: Any, name: str) -> list[Item]:
    """As `read_items`."""
    with refusing():
        return read_items(values, name)


def _given(values: Any) -> list[Item]:
    """Given candidates, at least one."""
    if items := _items(values, "candidates"):
        return items
    raise InputError("candidates is empty: give at least one item, or leave it out")
