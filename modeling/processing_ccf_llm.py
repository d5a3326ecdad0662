"""The hybrid prompt: raw users, items and titles in, token ids, slots and layout tensors out."""

import json
import math
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import (
    BatchFeature,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.utils import logging

from .checkpoint_ccf_llm import (
    CATALOG_FILE,
    HUB_ARGUMENTS,
    USERS_FILE,
    Publishable,
    check_catalog,
    copy_code,
    find_file,
    load_tokenizer,
    read_ids,
    write_ids,
    write_json,
)
from .configuration_ccf_llm import AUTO_MAP, ids_fingerprint
from .layout_ccf_llm import window_start
from .packing_ccf_llm import TOKEN_FIELDS, NewTitles, Pack, Span
from .prompt_ccf_llm import HybridPrompt, check_choice

logger = logging.get_logger(__name__)

HISTORIES = ("likes", "signed")
PROCESSOR_FILE = "processor_config.json"

PROMPT_SETTINGS = (
    *("wording", "history_format", "candidate_format"),
    *("history_window", "histories", "fold_in_items", "rating_scale"),
    *("title_years", "templates"),
)

Item = str | int | dict[str, Any]


class CCFLLMProcessor(Publishable, ProcessorMixin):
    """Writes hybrid prompts and packs them.

    Args:
        tokenizer: the backbone's; two slot tokens are added past its vocabulary.
        item_ids, item_titles, user_ids: the catalog in CF table order (raw ids as strings).
        wording: the prompt's words: `shared_prefix` (ours, default) or `question_last` (the
            papers'), which asks after every candidate. Both are packed alike.
        history_format, candidate_format: how an item is rendered: `slot`, `title_slot`, or `title`
            (text only). With `title` for both, the user slot is left out too.
        history_window: `(H, S)`, see [`layout_ccf_llm.window_start`].
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
        templates: replaces entries of `TEMPLATES[wording]`.

    Raises:
        ValueError: on an unknown wording, format, `histories` or template, or duplicate ids.
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
        templates: dict[str, str] | None = None,
    ) -> None:
        check_choice("histories", histories, HISTORIES)
        if history_window[0] < 0 or history_window[1] < 1:
            raise ValueError(f"history_window={history_window} needs H >= 0 and S >= 1.")
        self.chat_template = None
        self.tokenizer = tokenizer
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
        self.templates = self.prompt.templates
        self._set_catalog(item_ids or [], item_titles or [], user_ids or [])
        self._warned: set[str] = set()

    @classmethod
    def from_catalog(
        cls,
        tokenizer: PreTrainedTokenizerBase,
        item_ids: list[str],
        item_titles: list[str],
        user_ids: list[str],
        **prompt: Any,
    ) -> "CCFLLMProcessor":
        """A processor for a catalog; `prompt` are the other arguments of the class."""
        return cls(tokenizer, item_ids, item_titles, user_ids, **prompt)

    def with_catalog(
        self, item_ids: list[str], item_titles: list[str], user_ids: list[str]
    ) -> "CCFLLMProcessor":
        """The same tokenizer and prompt over another catalog, for `model.replace_catalog`."""
        prompt = {name: getattr(self, name) for name in PROMPT_SETTINGS}
        return type(self)(self.tokenizer, item_ids, item_titles, user_ids, **prompt)

    def _set_catalog(
        self, item_ids: list[str], item_titles: list[str], user_ids: list[str]
    ) -> None:
        if len(item_ids) != len(item_titles):
            raise ValueError(
                f"{len(item_ids)} item ids but {len(item_titles)} titles: give one each."
            )
        self.item_ids, self.item_titles, self.user_ids = item_ids, item_titles, user_ids
        self.item_index = {item: row for row, item in enumerate(item_ids)}
        self.user_index = {user: row for row, user in enumerate(user_ids)}
        if len(self.item_index) < len(item_ids) or len(self.user_index) < len(user_ids):
            raise ValueError("The catalog names an id twice: give each user and item one row.")
        self.title_index: dict[str, int] = {}
        for row, title in enumerate(item_titles):
            self.title_index.setdefault(title, row)

    @property
    def ids_fingerprint(self) -> str:
        """Ties this catalog to the CF tables of a model."""
        return ids_fingerprint(self.user_ids, self.item_ids)

    @property
    def uses_slots(self) -> bool:
        """Whether any slot is written, that is, whether the prompt is hybrid."""
        return self.prompt.uses_slots

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

    def item_title_ids(self) -> list[list[int]]:
        """Token ids of every catalog title, in table order; the text that a gate sees."""
        return [self.prompt.tokens(title) for title in self.item_titles]

    def answer_token_ids(self) -> tuple[int, int]:
        """Ids of " Yes" and " No".

        Raises:
            ValueError: when the tokenizer splits them.
        """
        yes, no = (self.prompt.tokens(word) for word in (" Yes", " No"))
        if len(yes) != 1 or len(no) != 1:
            raise ValueError(
                "This tokenizer splits ' Yes' or ' No' into pieces: use another backbone."
            )
        return yes[0], no[0]

    def resolve_item(self, item: Item) -> tuple[int | None, str]:
        """Catalog row (None when new) and title of an item given by id, title, or both.

        A dict may hold `id`, `title`, and in a history `liked` or `rating` (see `likes`). A bare
        value is looked up as id, then as title, else taken as the title of a new item, which has
        text but no CF vector.
        """
        if isinstance(item, dict):
            raw, title = item.get("id"), item.get("title")
            if raw is None and title is None:
                raise ValueError(f"Item {item!r} has neither id nor title: give at least one.")
            row = self.item_index.get(str(raw)) if raw is not None else None
            row = self.title_index.get(title) if row is None and title else row
            return row, (title or "") if row is None else self.item_titles[row]
        key = str(item)
        row = self.item_index.get(key, self.title_index.get(key))
        if row is not None:
            return row, self.item_titles[row]
        if key not in self._warned:
            self._warned.add(key)
            example = (
                f" (ids of this catalog look like {self.item_ids[0]!r})" if self.item_ids else ""
            )
            logger.warning(
                "Item %r is no id or title of the catalog: taken as a new title%s.", key, example
            )
        return None, key

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
            return float(bool(item.get("liked", True)))
        if self.rating_scale is None:
            raise ValueError(
                f"The history holds {item!r}, but this model takes no ratings: give liked instead."
            )
        midpoint, slope = self.rating_scale
        return 1.0 / (1.0 + math.exp(-slope * (float(rating) - midpoint)))

    def resolve_user(self, user: str | int | None) -> int:
        """CF table row of a user; `len(user_ids)`, the cold row, for an unknown one."""
        return self.user_index.get(str(user), len(self.user_ids))

    def instruction(self) -> list[int]:
        """Tokens that all prompts begin with, see `HybridPrompt.instruction`."""
        return self.prompt.instruction()

    def count_tokens(self, group: Any) -> int:
        """Tokens that a group (`history`, `candidates`) adds to a batch, that is, without the
        instruction, which a batch has once."""
        new = NewTitles(len(self.item_ids))
        spans = [self.prompt.prefix(0)]
        spans += [self._history_item(item, *self._slot(item, new)) for item in group.history]
        spans += [
            self.prompt.item("candidate", *self._slot(item, new)) for item in group.candidates
        ]
        return sum(len(span.ids) for span in spans)

    def _history_item(self, item: Item, row: int, title: str) -> Span:
        return self.prompt.item("history" if self.likes(item) else "disliked", row, title)

    def _slot(self, item: Item, new: NewTitles) -> tuple[int, str]:
        row, title = self.resolve_item(item)
        return (row if row is not None else new.add(title)), title

    def __call__(
        self,
        user: Any = None,
        history: list[Any] | None = None,
        candidates: list[Any] | None = None,
        history_lengths: list[Any] | None = None,
        labels: list[Any] | None = None,
        snapshot: Any = None,
        earlier: list[Any] | None = None,
        return_tensors: str = "pt",
        **kwargs: Any,
    ) -> BatchFeature:
        """Hybrid prompts for one user, or for a batch when `candidates` is a list of lists.

        Args:
            user: raw id(s); unknown or None goes to the cold-user vector.
            history: earlier items, oldest first; `{"id": ..., "liked": False}` for one that the
                user disliked, with `histories="signed"`. Without `history_lengths` the
                anchored window is cut here; with them the history is taken as it stands.
            candidates: items to score (id, title, or `{"id", "title"}`).
            history_lengths: how many of `history` each candidate may see; default all.
            labels: 0/1 per candidate.
            snapshot: CF snapshot(s); default the model's last.
            earlier: with `history_lengths` and signed histories, items before `history`, which no
                prompt shows and every candidate's user vector is folded in from.

        Returns:
            Tensors `(1, length)` per token, all users in one row, and `answer_positions`,
            `candidate_items`, `candidate_mask`, `labels` `(batch, num_candidates)`; with signed
            histories also `history_items` and `history_targets` `(num_sequences, longest)`.

        Raises:
            ValueError: on missing candidates or lists whose lengths differ.
        """
        if return_tensors != "pt" or kwargs:
            raise ValueError(
                f"return_tensors must be 'pt' and {sorted(kwargs)} are unknown arguments."
            )
        if not candidates:
            raise ValueError("candidates is empty: give at least one item to score.")
        batched = isinstance(candidates[0], (list, tuple))
        size = len(candidates) if batched else 1
        fields = {
            "user": user,
            "history": history,
            "candidates": candidates,
            "history_lengths": history_lengths,
            "labels": labels,
            "snapshot": snapshot,
            "earlier": earlier,
        }
        columns = {
            name: (value if batched else [value]) if value is not None else [None] * size
            for name, value in fields.items()
        }
        for name, values in columns.items():
            if not isinstance(values, (list, tuple, Tensor)):
                raise ValueError(f"{name} must be a list with one entry for each of {size} users.")
            if len(values) != size:
                raise ValueError(f"{name} has {len(values)} entries but candidates has {size}.")
        if labels is not None and any(value is None for value in columns["labels"]):
            raise ValueError("labels must be given for every user of the batch or for none.")
        pack = Pack(
            self.instruction(),
            len(self.item_ids),
            snapshots=snapshot is not None,
            signed=self.histories == "signed",
        )
        for index in range(size):
            self._write_sample(pack, {name: values[index] for name, values in columns.items()})
        return BatchFeature(pack.tensors(self.prompt.tokens))

    def _write_sample(self, pack: Pack, sample: dict[str, Any]) -> None:
        for name in ("history", "candidates"):
            if isinstance(sample[name], (str, dict)):
                raise ValueError(f"{name} must be a list of items, not the item {sample[name]!r}.")
        history, candidates = list(sample["history"] or []), list(sample["candidates"])
        lengths, labels = sample["history_lengths"], sample["labels"]
        earlier = list(sample["earlier"] or [])
        if lengths is None:
            start = window_start(len(history), self.history_window)
            earlier = history[max(0, start - self.fold_in_items) : start]
            history = history[start:]
            lengths = [len(history)] * len(candidates)
        for name, values in (("history_lengths", lengths), ("labels", labels)):
            if values is not None and len(values) != len(candidates):
                raise ValueError(
                    f"{name} has {len(values)} values for {len(candidates)} candidates."
                )
        if max(lengths, default=0) > len(history):
            raise ValueError(f"history_lengths exceeds the history's {len(history)} items.")
        user = self.resolve_user(sample["user"])
        prefix = self.prompt.prefix(user)
        slots = [self._slot(item, pack.new) for item in history]
        shown = [self._history_item(item, *slot) for item, slot in zip(history, slots, strict=True)]
        signs = self._signs(history, pack.new)
        blocks = []
        for item in candidates:
            slot = self._slot(item, pack.new)
            blocks.append((slot[0], self.prompt.item("candidate", *slot)))
        pack.start_sample(user, sample["snapshot"], self._signs(earlier, pack.new))
        pack.add_sequence(prefix, shown, blocks, lengths, signs)
        pack.end_sample(labels)

    def _signs(self, items: list[Any], new: NewTitles) -> list[tuple[int, float]]:
        if self.histories != "signed":
            return []
        return [(self._slot(item, new)[0], self.target(item)) for item in items]

    def save_pretrained(  # type: ignore[override]
        self, save_directory: str | Path, **kwargs: Any
    ) -> list[str]:
        """Write tokenizer, settings, catalog and the code; returns the files written."""
        if kwargs.pop("push_to_hub", False):
            raise ValueError("save_pretrained does not upload: call push_to_hub(repo_id).")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        files = list(self.tokenizer.save_pretrained(folder))
        items = zip(self.item_ids, self.item_titles, strict=True)
        write_ids(folder / CATALOG_FILE, [{"id": item, "title": title} for item, title in items])
        write_ids(folder / USERS_FILE, [{"id": user} for user in self.user_ids])
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
        settings_file = find_file(path, PROCESSOR_FILE, hub)
        catalog_file, users_file = (
            find_file(path, CATALOG_FILE, hub),
            find_file(path, USERS_FILE, hub),
        )
        settings = json.loads(Path(str(settings_file)).read_text(encoding="utf-8"))
        catalog = read_ids(str(catalog_file))
        processor = cls(
            load_tokenizer(path, hub, bool(kwargs.get("trust_remote_code"))),
            [row["id"] for row in catalog],
            [str(row.get("title") or "") for row in catalog],
            [row["id"] for row in read_ids(str(users_file))],
            **{name: settings[name] for name in PROMPT_SETTINGS if name in settings},
        )
        check_catalog(path, hub, settings["ids_fingerprint"])
        return processor


__all__ = ["CCFLLMProcessor"]
