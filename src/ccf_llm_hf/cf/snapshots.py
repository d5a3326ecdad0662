"""A fitted model's vectors at one moment, several as `CFVectors`, and what they score."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ccf_llm_hf.cf.rotation import rotate_onto
from ccf_llm_hf.cf.solver import Rows
from ccf_llm_hf.cf.training_data import Plan, TrainingData, mark_seen
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.evaluation.metrics import auc, uauc


@dataclass
class Snapshot:
    """Vectors that stand for a model at one moment; its logit is `(u * v).sum(-1) + offset`.

    Attributes:
        user_vectors: `(num_users, dim)` float32.
        item_vectors: `(num_items, dim)` float32.
        user_known: `(num_users,)` bool, True where at least one row was fitted on.
        item_known: `(num_items,)` bool.
        default_user: `(dim,)` float32, stands for an unknown user.
        default_item: `(dim,)` float32.
        offset: `(1,)` float32.
    """

    user_vectors: Tensor
    item_vectors: Tensor
    user_known: Tensor
    item_known: Tensor
    default_user: Tensor
    default_item: Tensor
    offset: Tensor

    @classmethod
    def of_rows(
        cls,
        rows: Rows,
        user_vectors: Tensor,
        item_vectors: Tensor,
        default_user: Tensor | None = None,
        offset: Tensor | None = None,
    ) -> "Snapshot":
        """Vectors fitted on `rows`. Whom they do not mention is unknown, and stands at the mean of
        the known where no default is given (our choice); without any rows at zero."""
        user_known = mark_seen(rows.users, len(user_vectors))
        item_known = mark_seen(rows.items, len(item_vectors))
        if default_user is None:
            default_user = mean_of(user_vectors, user_known)
        default_item = mean_of(item_vectors, item_known)
        return cls(
            torch.where(user_known[:, None], user_vectors, default_user),
            torch.where(item_known[:, None], item_vectors, default_item),
            user_known,
            item_known,
            default_user,
            default_item,
            torch.zeros(1) if offset is None else offset,
        )

    def logits(self, rows: Rows) -> Tensor:
        """`(n,)` logits; an index below zero is an unknown user or item."""
        return torch.cat([self._logits(piece) for piece in rows.pieces()])

    def _logits(self, rows: Rows) -> Tensor:
        users = look_up(self.user_vectors, rows.users, self.default_user)
        items = look_up(self.item_vectors, rows.items, self.default_item)
        return (users * items).sum(-1) + self.offset

    def rotate_onto(self, other: "Snapshot") -> "Snapshot":
        """The same logits in the other's space, see `rotation.rotate_onto`."""
        users, items, user, item = rotate_onto(self._tables(), other._tables())
        return replace(
            self,
            user_vectors=users,
            item_vectors=items,
            default_user=user[0],
            default_item=item[0],
        )

    def _tables(self) -> list[Tensor]:
        defaults = self.default_user[None], self.default_item[None]
        return [self.user_vectors, self.item_vectors, *defaults]


def look_up(vectors: Tensor, index: Tensor, default: Tensor) -> Tensor:
    """The vectors `(n, dim)` at an index `(n,)`; `default` `(dim,)` where it is below zero."""
    return torch.where(index[:, None] >= 0, vectors[index.clamp(min=0)], default)


def mean_of(vectors: Tensor, known: Tensor) -> Tensor:
    """Mean of the known vectors, `(dim,)`; zero where none is known."""
    return vectors[known].sum(0) / known.sum().clamp(min=1)


def stack_snapshots(
    snapshots: Sequence[Snapshot], plan: Plan, data: TrainingData, model_name: str
) -> CFVectors:
    """Snapshots as the table that a fusion is trained on."""
    tensors: dict[str, Any] = {
        name: torch.stack([getattr(snapshot, name) for snapshot in snapshots])  # (snapshots, ...)
        for name in vars(snapshots[0])
    }
    tensors["offset"] = tensors["offset"].flatten()  # (snapshots, 1) -> (snapshots,)
    return CFVectors(
        user_ids=data.users.tolist(),
        item_ids=data.items["item_id"].tolist(),
        item_titles=data.items["title"].tolist(),
        **tensors,
        snapshot_times=torch.as_tensor(plan.times, dtype=torch.int64),
        model_name=model_name,
        cross_fit=plan.cross_fit,
    )


class Model(Protocol):
    """What scores rows of table places: a `Snapshot`, or MF's parameters."""

    def logits(self, rows: Rows) -> Tensor:
        """`(n,)` logits."""


def score_cross_fit(train: Rows, plan: Plan, models: Sequence[Model]) -> Tensor:
    """`(n,)` logits of the training rows, each by the snapshot that it sees, which was not fitted
    on it; NaN if by none."""
    logits = torch.full((len(train),), torch.nan)
    for table, model in enumerate(models):
        rows = (plan.sees == table).nonzero().flatten()
        logits[rows] = model.logits(train[rows])
    return logits


def describe_fit(
    data: TrainingData, held_out: Tensor, not_fitted_on: Tensor, in_sample: Tensor, cross_fit: str
) -> dict[str, str]:
    """What every fit reports.

    Args:
        data: the rows.
        held_out: `(validation rows,)` logits.
        not_fitted_on: `(training rows,)` logits by the tables that the rows see.
        in_sample: `(training rows,)` logits by the last table.
        cross_fit: of the tables.

    Returns:
        AUC and UAUC on validation, AUC on train both ways, and the number of training rows. Of
        folds of users there is one way only: a row's user is a stranger to the table it sees.
    """
    labels, train_labels = data.validation.labels.numpy(), data.train.labels.numpy() > 0.5
    validation, unseen = held_out.numpy(), not_fitted_on.numpy()
    later = ~np.isnan(unseen)
    facts = {
        "validation_auc": f"{auc(labels, validation):.4f}",
        "validation_uauc": f"{uauc(labels, validation, data.validation_users):.4f}",
        "in_sample_train_auc": f"{auc(train_labels, in_sample.numpy()):.4f}",
        "train_rows": str(len(data.train)),
    }
    if cross_fit != "users":
        facts["cross_fit_train_auc"] = f"{auc(train_labels[later], unseen[later]):.4f}"
    return facts
