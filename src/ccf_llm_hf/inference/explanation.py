"""What a prediction is made of: the prompt as the model reads it, and shares of text and CF."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ccf_llm_hf.data.grouping import Group


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
class Explanation:
    """One prediction. `cf_logit` is the CF model's own view of the pair, not a part of `logit`."""

    prompt: str
    user: str | None
    user_known: bool
    item: ItemShare
    history: list[ItemShare]
    cf_logit: float
    logit: float
    probability: float

    def as_text(self) -> str:
        """The explanation for a terminal."""
        user = self.user if self.user is not None else "(none given)"
        lines = [
            f"probability {self.probability:.3f}   logit {self.logit:+.3f}   "
            f"CF model alone {self.cf_logit:+.3f}",
            f"user        {user}{'' if self.user_known else '   not in the CF model'}",
            "",
            "text   CF    item",
        ]
        for share, role in [(self.item, "candidate"), *((past, "") for past in self.history)]:
            notes = [role] * bool(role) + ["not in the CF model"] * (not share.known)
            note = f"   ({', '.join(notes)})" if notes else ""
            lines.append(f"{share.text_share:4.0%}  {share.cf_share:4.0%}   {share.title}{note}")
        return "\n".join([*lines, "", "prompt", self.prompt])


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
    words = [processor._tokens(title) if title else [] for title in new]
    new_titles = (
        torch.tensor([token for ids in words for token in ids], device=model.device).long(),
        torch.tensor([len(ids) for ids in words], device=model.device).long(),
    )
    return model.item_gates(index, new_titles=new_titles).mean(dim=-1).tolist()


def render_prompt(processor: Any, group: Group) -> str:
    """The hybrid prompt of a group with one candidate; slots read `[item: title]`, `[user: id]`."""
    batch = processor(
        user=group.user_id,
        history=group.history,
        candidates=group.candidates,
        history_lengths=group.history_lengths,
        return_tensors="pt",
    )
    titles = list(processor.item_titles)
    resolved = [processor.resolve_item(item) for item in [*group.history, *group.candidates]]
    # Slots of new titles count on past the catalog, in order of first mention.
    titles += dict.fromkeys(title for row, title in resolved if row is None)
    pieces: list[str] = []
    words: list[int] = []
    columns = (batch[name][0].tolist() for name in ("input_ids", "item_slots", "user_slots"))
    for token, item, user in zip(*columns, strict=True):
        if item < 0 and user < 0:
            words.append(token)
            continue
        name = f"item: {titles[item]}" if item >= 0 else f"user: {group.user_id or 'new'}"
        pieces += [processor.tokenizer.decode(words), f"[{name}]"]
        words = []
    return "".join([*pieces, processor.tokenizer.decode(words)])
