"""`CTRRanker`: probabilities, ranked lists and explanations from a checkpoint."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ccf_llm_hf.data.grouping import Group
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.inference.explanation import Explanation, render_prompt
from ccf_llm_hf.inference.scoring import score_groups
from ccf_llm_hf.modeling.checkpoint_ccf_llm import Publishable
from ccf_llm_hf.modeling.layout_ccf_llm import window_start
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.pipeline_ccf_llm import (
    RankedItem,
    cf_logits,
    item_shares,
    preselect_items,
    rank_items,
)
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor

Item = str | int | dict[str, Any]
User = str | int | None
Pair = Mapping[str, Any] | tuple[User, Item]


@dataclass
class _Request:
    """Candidates to score for one user with one history (unwindowed); items are `Item`."""

    user: User
    history: list[Any]
    candidates: list[Any]


class CTRRanker(Publishable):
    """Predict, rank and explain with a trained model.

    Items are given as raw ids, as titles, or as `{"id": ..., "title": ...}`; a title outside the
    catalog is a new item, scored by its text. A user the model has not seen is a new user, scored
    by the history. Histories hold liked items, oldest first; a model trained on signed ones takes
    disliked items too, as `{"id": ..., "liked": False}`, or with a `rating`.

    Args:
        model: a `CCFLLMForCTR`.
        processor: its `CCFLLMProcessor`.
        max_tokens_per_batch: tokens of one forward pass. Users share a pass as long as they fit;
            a longer candidate list is scored in parts on the history's cached keys and values.
    """

    def __init__(
        self,
        model: CCFLLMForCTR,
        processor: CCFLLMProcessor,
        *,
        max_tokens_per_batch: int = 2048,
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.max_tokens_per_batch = max_tokens_per_batch

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
            pairs: `(user, item)` tuples, or dicts with `item` and optionally `user` and `history`.
                Pairs that share user and history share one forward pass.
            progress: show a bar on stderr.

        Returns:
            Float32 array of shape (number of pairs,).

        Raises:
            InputError: a pair of another form, naming its place.
        """
        return self.probabilities(self.pair_logits(pairs, progress=progress))

    def pair_logits(self, pairs: Sequence[Pair], *, progress: bool = False) -> np.ndarray:
        """As `predict`, before the temperature and the sigmoid."""
        requests: dict[Any, _Request] = {}
        places: dict[Any, list[int]] = {}
        for place, pair in enumerate(pairs):
            user, history, item = _read_pair(pair, place)
            read = self.processor
            key = (user, tuple((*read.resolve_item(past), read.target(past)) for past in history))
            requests.setdefault(key, _Request(user, history, [])).candidates.append(item)
            places.setdefault(key, []).append(place)
        logits = np.empty(len(pairs), dtype=np.float32)
        scores = self._score(list(requests.values()), progress)
        for indices, values in zip(places.values(), scores, strict=True):
            logits[indices] = values
        return logits

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Calibrated probabilities of logits."""
        return self.model.probabilities(torch.as_tensor(logits)).numpy()

    def rank(
        self,
        user: User | Sequence[User] = None,
        history: Sequence[Any] | None = None,
        candidates: Sequence[Any] | None = None,
        top_k: int = 10,
        preselect: int = 100,
    ) -> Any:
        """The `top_k` best candidates, best first.

        Args:
            user: raw id, or None for a new user. A list of users makes a batch.
            history: liked items, oldest first; in a batch one list per user.
            candidates: items to choose from (in a batch: for all, or one list per user). Default:
                those `preselect` catalog items that the CF model scores highest for this user (for
                a new user: by the CF model's item bias) and that are not in the history.
            top_k: length of the list; fewer when there are fewer candidates.
            preselect: catalog items that the language model scores.

        Returns:
            A list of `RankedItem`, or in a batch a list of such lists.

        Raises:
            InputError: no candidates, or batch lists whose lengths differ.
        """
        if top_k < 1 or preselect < 1:
            raise InputError(f"top_k={top_k} and preselect={preselect} must both be at least 1")
        users, histories, lists, batched = _as_batch(user, history, candidates)
        requests = [
            _Request(who, past, self._preselect(who, past, preselect) if items is None else items)
            for who, past, items in zip(users, histories, lists, strict=True)
        ]
        scores = self._score(requests, progress=False)
        ranked: list[list[RankedItem]] = [
            rank_items(
                self.model, self.processor, request.candidates, torch.as_tensor(logits), top_k
            )
            for request, logits in zip(requests, scores, strict=True)
        ]
        return ranked if batched else ranked[0]

    def explain(
        self, user: User = None, history: Sequence[Item] | None = None, *, item: Item
    ) -> Explanation:
        """One prediction taken apart: the prompt, what text and CF contribute, the CF model's view.

        Args:
            user: raw id, or None for a new user.
            history: liked items, oldest first.
            item: the candidate.
        """
        request = _Request(user, _items(history, "history"), _items([item], "item"))
        (group,) = self._groups([request])
        logit = float(self._score([request], progress=False)[0][0])
        shares = item_shares(self.model, self.processor, [*group.history, item])
        return Explanation(
            prompt=render_prompt(self.processor, group),
            user=None if user is None else str(user),
            user_known=self._user_known(user),
            item=shares[-1],
            history=shares[:-1],
            cf_logit=self._cf_logit(user, request.history, item),
            logit=logit,
            probability=float(self.probabilities(np.array([logit]))[0]),
            temperature=self.model.config.logit_temperature,
        )

    def _groups(self, requests: Sequence[_Request]) -> list[Group]:
        """Requests as groups, with the window of their history that the model reads."""
        groups = []
        for request in requests:
            start = window_start(len(request.history), self.processor.history_window)
            unshown = max(0, start - self.processor.fold_in_items)
            history = request.history[start:]
            groups.append(
                Group(
                    user_id="" if request.user is None else str(request.user),
                    history=history,
                    candidates=request.candidates,
                    history_lengths=[len(history)] * len(request.candidates),
                    earlier=request.history[unshown:start],
                )
            )
        return groups

    def _score(self, requests: Sequence[_Request], progress: bool) -> list[np.ndarray]:
        """Logits per request, in the order of its candidates."""
        return score_groups(
            self.model,
            self.processor,
            self._groups(requests),
            max_tokens_per_batch=self.max_tokens_per_batch,
            progress=progress,
        )

    def _cf_logit(self, user: User, history: Sequence[Item], item: Item) -> float:
        """The CF model's own logit; a new user or item stands at the CF model's default vector."""
        row = self.processor.resolve_item(item)[0]
        rows = torch.tensor([len(self.processor.item_ids) if row is None else row])
        rows = rows.to(self.model.device)
        return cf_logits(self.model, self.processor, user, history, rows).item()

    def _preselect(self, user: User, history: Sequence[Item], count: int) -> list[Item]:
        """Ids of the catalog items that the CF model scores highest, without the history's."""
        try:
            return list(preselect_items(self.model, self.processor, user, history, count))
        except ValueError as error:
            raise InputError(str(error)) from error

    def _user_known(self, user: User) -> bool:
        row = self.processor.user_index.get(str(user))
        return row is not None and bool(self.model.model.cf.user_known[-1, row])


def _read_pair(pair: Pair, place: int) -> tuple[User, list[Item], Item]:
    if isinstance(pair, Mapping):
        if "item" not in pair or set(pair) - {"user", "history", "item"}:
            raise InputError(
                f"pair {place} has the keys {sorted(pair)}: give item, and user or history if known"
            )
        history = _items(pair.get("history"), f"history of pair {place}")
        return pair.get("user"), history, _items([pair["item"]], f"pair {place}")[0]
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        return pair[0], [], _items([pair[1]], f"pair {place}")[0]
    raise InputError(f"pair {place} is {pair!r}: give (user, item) or a dict with item")


def _items(values: Sequence[Item] | None, name: str) -> list[Item]:
    """A list of items, none of them blank."""
    if isinstance(values, (str, dict)):
        raise InputError(f"{name} is the single item {values!r}: give a list of items")
    items = list(values if values is not None else [])
    for place, item in enumerate(items):
        if item is None or (isinstance(item, str) and not item.strip()):
            raise InputError(f"{name}: item {place} is empty: give an id or a title")
    return items


def _candidates(values: Sequence[Item] | None) -> list[Item] | None:
    """Given candidates, at least one; None stands for the catalog."""
    if values is not None and len(values) == 0:
        raise InputError("candidates is empty: give at least one item, or leave it out")
    return None if values is None else _items(values, "candidates")


def _as_batch(
    user: Any, history: Sequence[Any] | None, candidates: Sequence[Any] | None
) -> tuple[list[User], list[list[Item]], list[list[Item] | None], bool]:
    """Users, histories and candidates of `rank`, one entry a user; whether it was a batch."""
    nested = bool(history) and isinstance(history[0], (list, tuple))  # type: ignore[index]
    batched = isinstance(user, (list, tuple)) or nested
    if not batched:
        return [user], [_items(history, "history")], [_candidates(candidates)], False
    size = len(user) if isinstance(user, (list, tuple)) else len(history or [])
    users = list(user) if isinstance(user, (list, tuple)) else [user] * size
    histories: list[list[Item]] = [[] for _ in range(size)]
    if history:
        histories = [_items(past, f"history {place}") for place, past in enumerate(history)]
    if candidates is not None and candidates and isinstance(candidates[0], (list, tuple)):
        lists = [_candidates(items) for items in candidates]
    else:
        lists = [_candidates(candidates) for _ in range(size)]
    if not (len(users) == len(histories) == len(lists)):
        raise InputError(
            f"the batch has {len(users)} users, {len(histories)} histories and {len(lists)} "
            "candidate lists: give one of each per user"
        )
    return users, histories, lists, True
