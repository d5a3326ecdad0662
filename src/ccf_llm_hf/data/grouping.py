"""Groups of samples that share one packed sequence: one user, one window start, one CF snapshot."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import datasets

from ccf_llm_hf.modeling.layout_ccf_llm import window_start


@dataclass
class Group:
    """Samples of one user that share a history window and a CF snapshot.

    Attributes:
        user_id: raw user id.
        history: raw item ids of the longest window among the samples, oldest first.
        candidates: raw item ids, one a sample.
        history_lengths: how many of `history` precede each candidate in time.
        labels: 0/1 a sample.
        rows: row of each sample in its split.
        snapshot: CF snapshot of all samples; -1 is the last.
    """

    user_id: str
    history: list[str] = field(default_factory=list)
    candidates: list[str] = field(default_factory=list)
    history_lengths: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    snapshot: int = -1


def group_rows(
    split: datasets.Dataset,
    history_window: tuple[int, int],
    cf_snapshots: Sequence[int] | None = None,
    max_candidates: int = 64,
) -> list[Group]:
    """Cut a split into groups; every row is in exactly one.

    Args:
        split: rows with user_id, item_id, label and history.
        history_window: `(H, S)`, see `layout_ccf_llm.window_start`.
        cf_snapshots: CF snapshot per row; default the last for all.
        max_candidates: samples a group holds at most; 1 gives one row a sample.

    Returns:
        Groups in order of their first row.
    """
    columns = split.select_columns(["user_id", "item_id", "label", "history"]).to_dict()
    keys = zip(columns["user_id"], columns["history"], strict=True)
    members: dict[tuple[str, int, int], list[int]] = defaultdict(list)
    for row, (user, history) in enumerate(keys):
        snapshot = -1 if cf_snapshots is None else int(cf_snapshots[row])
        members[user, window_start(len(history), history_window), snapshot].append(row)
    groups = []
    for (user, start, snapshot), rows in members.items():
        rows.sort(key=lambda row: len(columns["history"][row]))
        for first in range(0, len(rows), max_candidates):
            part = rows[first : first + max_candidates]
            longest = columns["history"][part[-1]]
            groups.append(
                Group(
                    user_id=user,
                    history=longest[start:],
                    candidates=[columns["item_id"][row] for row in part],
                    history_lengths=[len(columns["history"][row]) - start for row in part],
                    labels=[columns["label"][row] for row in part],
                    rows=part,
                    snapshot=snapshot,
                )
            )
    return sorted(groups, key=lambda group: group.rows[0])


def sample_group(groups: list[Group], max_labels: int, order: Sequence[int]) -> list[Group]:
    """Whole groups in `order` until `max_labels` labels are reached; 0 keeps all."""
    if not max_labels:
        return groups
    chosen, labels = [], 0
    for index in order:
        if labels >= max_labels:
            break
        chosen.append(groups[index])
        labels += len(groups[index].rows)
    return chosen


def cut_by_budget(
    indices: Sequence[int], lengths: Sequence[int], max_tokens: int
) -> list[list[int]]:
    """Cut groups into batches of at most `max_tokens` tokens.

    Longest groups come first, so that neighbors are alike in length, which makes attention cheap,
    and memory peaks at once. A group longer than the budget is a batch by itself.

    Args:
        indices: which groups.
        lengths: tokens of every group; `indices` point into it.
        max_tokens: the budget.
    """
    batches: list[list[int]] = []
    used = 0
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        if batches and used + lengths[index] <= max_tokens:
            batches[-1].append(index)
            used += lengths[index]
        else:
            batches.append([index])
            used = lengths[index]
    return batches
