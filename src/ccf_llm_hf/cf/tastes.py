"""A user's own taste for the values of items' fields, such as an author, beyond what vectors say.

A vector of a few dimensions cannot hold that somebody likes one author among thousands. So a user
who is folded in has, beside the vector, an effect of each value, drawn to zero by a Gaussian prior
whose variance is the field's (our choice): see `CFTable.folded_users`. Here the variances are
chosen, and the values are numbered as a `CFVectors` holds them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ccf_llm_hf.cf.solver import ItemFields, Parameters, Penalties, Rows
from ccf_llm_hf.cf.training_data import TrainingData, mark_seen
from ccf_llm_hf.evaluation.metrics import auc

TASTE_GRID = (0.0, 0.25, 0.5, 1.0, 2.0, 4.0)


def choose_tastes(
    data: TrainingData, fit: Parameters, num_fields: int, given: Sequence[float] | None
) -> list[float]:
    """The variance of each field's tastes: the given ones, or field after field the best AUC on
    validation. A fit's own users are at their modes, where folding in would put them."""
    if given is not None:
        return list(given)
    tastes = [0.0] * num_fields
    labels, base = data.validation.labels.numpy(), fit.logits(data.validation)
    expected = fit.logits(data.train).sigmoid()
    for place in range(len(tastes)):
        sums = _sum_by_value(data, place, expected)
        tried = [_add_tastes(base, *sums, prior) for prior in TASTE_GRID]
        best = int(np.argmax([auc(labels, logits.numpy()) for logits in tried]))
        tastes[place], base = TASTE_GRID[best], tried[best]
    return tastes


def _add_tastes(
    logits: Tensor, rows: Tensor, residuals: Tensor, curvatures: Tensor, prior: float
) -> Tensor:
    """Logits `(n,)` with the tastes that their rows meet, given by `(m,)` entries."""
    return logits.index_add(0, rows, prior * residuals / (1 + prior * curvatures))


def _sum_by_value(
    data: TrainingData, place: int, expected: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """For each value that a validation row's item has in a field: the row, and what the user's
    training rows of that value sum up to, residuals and curvatures."""
    fields = data.fields
    train_rows, train_codes = _codes(data.train, fields, place)
    rows, codes = _codes(data.validation, fields, place)
    known, where = torch.unique(train_codes, return_inverse=True)
    p = expected[train_rows]
    sums = torch.zeros(2, len(known) + 1)
    sums[0].index_add_(0, where, data.train.labels[train_rows] - p)
    sums[1].index_add_(0, where, p * (1 - p))
    # What no training row has stands at the end, where the sums are zero.
    found = torch.searchsorted(known, codes)
    there = F.pad(known, (0, 1), value=-1)[found] == codes
    found = torch.where(there, found, len(known))
    return rows, sums[0, found], sums[1, found]


def _codes(rows: Rows, fields: ItemFields, place: int) -> tuple[Tensor, Tensor]:
    """One number for the user and the value of every value in a field: `(m,)` the rows that have
    it, and the numbers. Unknown users and items have none."""
    entries = (fields.of_field[fields.values] == place).nonzero().flatten()
    entries = entries[fields.items[entries].argsort(stable=True)]
    items = fields.items[entries].contiguous()
    first = torch.searchsorted(items, rows.items.contiguous())
    counts = torch.searchsorted(items, rows.items.contiguous(), right=True) - first
    counts = counts * (rows.users >= 0)
    owner = torch.repeat_interleave(torch.arange(len(rows)), counts)
    within = torch.arange(len(owner)) - (counts.cumsum(0) - counts)[owner]
    values = fields.values[entries[first[owner] + within]]
    return owner, rows.users[owner] * fields.num_values + values


def mark_values(fields: ItemFields, seen: Tensor) -> Tensor:
    """Values `(num_values,)` of the items `(num_items,)` that are marked."""
    return mark_seen(fields.values[seen[fields.items]], fields.num_values)


def list_values(
    data: TrainingData, fit: Parameters, penalties: Penalties, tastes: Sequence[float]
) -> dict[str, Any]:
    """What `CFVectors` has of the values that occur in the training rows: their names, their
    vectors, as much as a value moves an item, and where there are tastes these and who has them."""
    fields = data.fields
    scales = torch.tensor(penalties.field_scales, dtype=torch.float32)
    priors = torch.tensor(tastes, dtype=torch.float32)
    matters = ((scales > 0) | (priors > 0))[fields.of_field]
    kept = mark_values(fields, mark_seen(data.train.items, len(data.items))) & matters
    columns = [fit.value_factors]
    if penalties.use_biases:
        columns += [torch.zeros_like(fit.value_bias)[:, None], fit.value_bias[:, None]]
    vectors = torch.cat(columns, dim=1) * scales[fields.of_field][:, None]
    pairs = zip(data.field_values, kept.tolist(), strict=True)
    found: dict[str, Any] = {
        "field_values": [value for value, is_kept in pairs if is_kept],
        "field_vectors": vectors[kept],
    }
    if not any(tastes) or not found["field_values"]:
        return found
    places = torch.where(kept, kept.cumsum(0) - 1, -1)
    tasted = (places >= 0) & (priors > 0)[fields.of_field]
    entries = tasted[fields.values].nonzero().flatten()
    entries = entries[fields.items[entries].argsort(stable=True)]
    counts = torch.bincount(fields.items[entries], minlength=len(data.items))
    table = torch.full((len(data.items), int(counts.max())), -1, dtype=torch.int32)
    within = torch.arange(len(entries)) - (counts.cumsum(0) - counts)[fields.items[entries]]
    table[fields.items[entries], within] = places[fields.values[entries]].int()
    return found | {"item_values": table, "field_tastes": priors[fields.of_field][kept]}
