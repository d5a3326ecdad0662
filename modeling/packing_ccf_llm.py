"""Runs of tokens, and the flat row that they make: the bookkeeping behind the processor."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .layout_ccf_llm import SHARED

NO_SLOT = -1
IGNORED_LABEL = -100.0


class Span:
    """A run of tokens with the slots among them."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.items: list[int] = []
        self.users: list[int] = []

    def add(self, ids: list[int], item: int = NO_SLOT, user: int = NO_SLOT) -> "Span":
        self.ids += ids
        self.items += [item] * len(ids)
        self.users += [user] * len(ids)
        return self


class NewTitles:
    """Titles outside the catalog that one batch mentions; their slots count on past the table."""

    def __init__(self, num_items: int) -> None:
        self.num_items = num_items
        self.rows: dict[str, int] = {}

    def add(self, title: str) -> int:
        return self.rows.setdefault(title, self.num_items + len(self.rows))


TOKEN_FIELDS = (
    "input_ids",
    "item_slots",
    "user_slots",
    "position_ids",
    "sequence_ids",
    "block_ids",
    "history_depths",
)


class Pack:
    """One flat row of tokens and, per sample, where its candidates' answers are read."""

    def __init__(
        self, shared: list[int], num_items: int, snapshots: bool, signed: bool = False
    ) -> None:
        self.new = NewTitles(num_items)
        self.row: dict[str, list[int]] = {name: [] for name in TOKEN_FIELDS}
        self.num_shared, self.num_sequences = len(shared), 0
        self._extend(Span().add(shared), SHARED, start=0, block=0, depth=0)
        self.answers: list[list[tuple[int, int]]] = []  # per sample: (position, item)
        self.users: list[int] = []
        self.labels: list[list[float]] = []
        self.snapshots: list[int] | None = [] if snapshots else None
        # Per sequence, its signed history as (table row, target), and how many of these items come
        # before what the prompt shows; None where histories hold likes only.
        self.histories: list[list[tuple[int, float]]] | None = [] if signed else None
        self.unshown: list[int] = []

    def start_sample(
        self, user: int, snapshot: int | None, earlier: list[tuple[int, float]]
    ) -> None:
        self.answers.append([])
        self.users.append(user)
        self.snapshot = -1 if snapshot is None else int(snapshot)
        self.earlier = earlier

    def end_sample(self, labels: list[Any] | None) -> None:
        if labels is not None:
            self.labels.append([float(label) for label in labels])

    def add_sequence(
        self,
        prefix: Span,
        history: list[Span],
        blocks: list[tuple[int, Span]],
        lengths: list[int],
        signs: list[tuple[int, float]],
    ) -> None:
        """Prefix and history once, then a block per candidate, which sees `lengths` items."""
        sequence = self.num_sequences
        self._extend(prefix, sequence, start=self.num_shared, block=0, depth=0)
        ends = [self.num_shared + len(prefix.ids)]  # ends[i]: position after i history items
        for depth, span in enumerate(history, start=1):
            self._extend(span, sequence, start=ends[-1], block=0, depth=depth)
            ends.append(ends[-1] + len(span.ids))
        for block, ((item, span), length) in enumerate(zip(blocks, lengths, strict=True), start=1):
            self._extend(span, sequence, start=ends[length], block=block, depth=length)
            self.answers[-1].append((len(self.row["input_ids"]) - 1, item))
        self.num_sequences += 1
        if self.snapshots is not None:
            self.snapshots.append(self.snapshot)
        if self.histories is not None:
            self.histories.append(self.earlier + signs)
            self.unshown.append(len(self.earlier))

    def _extend(self, span: Span, sequence: int, start: int, block: int, depth: int) -> None:
        count, row = len(span.ids), self.row
        row["input_ids"] += span.ids
        row["item_slots"] += span.items
        row["user_slots"] += span.users
        row["position_ids"] += range(start, start + count)
        row["sequence_ids"] += [sequence] * count
        row["block_ids"] += [block] * count
        row["history_depths"] += [depth] * count

    def tensors(self, tokenize: Callable[[str], list[int]]) -> dict[str, Tensor]:
        """The batch; `tokenize` writes the titles of new items."""
        batch = {name: torch.tensor([values]) for name, values in self.row.items()}
        width = max(len(answers) for answers in self.answers)
        for field, name in enumerate(("answer_positions", "candidate_items")):
            batch[name] = torch.tensor(
                [
                    [answer[field] for answer in answers] + [0] * (width - len(answers))
                    for answers in self.answers
                ]
            )
        counts = torch.tensor([len(answers) for answers in self.answers])
        batch["candidate_mask"] = torch.arange(width)[None, :] < counts[:, None]
        batch["candidate_users"] = torch.tensor(self.users)
        if self.labels:
            batch["labels"] = torch.tensor(
                [labels + [IGNORED_LABEL] * (width - len(labels)) for labels in self.labels]
            )
        if self.snapshots is not None:
            batch["snapshots"] = torch.tensor(self.snapshots)
        if self.histories is not None:
            longest = max(1, *map(len, self.histories))
            table = torch.tensor(
                [
                    history + [(NO_SLOT, 0.0)] * (longest - len(history))
                    for history in self.histories
                ],
                dtype=torch.float64,
            )
            batch["history_items"] = table[..., 0].long()
            batch["history_targets"] = table[..., 1].float()
            batch["history_unshown"] = torch.tensor(self.unshown)
        if self.new.rows:
            titles = [tokenize(title) if title else [] for title in self.new.rows]
            batch["new_title_ids"] = torch.tensor(
                [i for ids in titles for i in ids], dtype=torch.long
            )
            batch["new_title_lengths"] = torch.tensor([len(ids) for ids in titles])
        return batch


__all__ = ["NewTitles", "Pack", "Span"]
