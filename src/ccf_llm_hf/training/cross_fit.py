"""CF vectors that were not fitted on a training row: one table of all fits, for training alone.

A model holds the last fit, two-dimensional. While it trains, each row sees the fit that left it out
(a fold) or came before it (a snapshot): the collator adds a multiple of `STRIDE` to the row's CF
table rows, and the modules below take it apart again. Rows without it, as evaluation has them, mean
the last fit.
"""

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import BatchFeature

from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.data.grouping import Group
from ccf_llm_hf.data.rows import Rows
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.checkpoint_ccf_llm import CF_TENSORS
from ccf_llm_hf.modeling.configuration_ccf_llm import CCFLLMConfig
from ccf_llm_hf.modeling.modeling_ccf_llm import (
    CCFLLMForCTR,
    CFTable,
    NewFields,
    rms_of_known,
)

MOSTLY = 0.95  # share of unknown ids from which on they are another spelling, not cold
STRIDE = 1 << 32  # past every table, and past the rows of titles outside the catalog


def encode_rows(rows: Tensor, fits: Tensor) -> Tensor:
    """CF table rows that carry their fit, of shapes that broadcast; where padded, -1 - fit."""
    return torch.where(rows >= 0, rows + fits * STRIDE, rows - fits)


def decode_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Fits and plain rows behind `encode_rows`; the fit of padding too, which stays -1."""
    padded = rows < 0
    fits = torch.where(padded, -1 - rows, rows // STRIDE)
    return fits, torch.where(padded, -1, rows % STRIDE)


class CrossFitTable(CFTable):
    """The last fit as a [`CFTable`], which is what is saved, and all fits behind it.

    `fits_*` are buffers with the fits as their first dimension: the tensors of the `CFVectors`
    themselves, which lie in its file, so that processes share them.
    """

    fits_offset: Tensor
    fits_default_user: Tensor
    fits_user_known: Tensor

    def __init__(self, config: CCFLLMConfig, cf: CFVectors) -> None:
        super().__init__(config)
        self.fill(cf)
        for name in CF_TENSORS:
            self._keep(name, getattr(cf, name))
        for side in ("user", "item"):
            every = zip(
                getattr(self, f"fits_{side}_vectors"),
                getattr(self, f"fits_{side}_known"),
                strict=True,
            )
            scales = [rms_of_known(vectors, known) for vectors, known in every]
            self._keep(f"{side}_scale", torch.stack(scales))
        if cf.cross_fit == "users":  # as in the last fit, which is what is saved
            self._keep("user_known", torch.zeros_like(cf.user_known))

    def _keep(self, name: str, fits: Tensor) -> None:
        self.register_buffer(f"fits_{name}", fits, persistent=False)

    def lookup(
        self, side: str, rows: Tensor, new: NewFields | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `CFTable.lookup`, each row by its own fit, new items by the last."""
        fits, rows = _decode_fits(rows)
        vectors = getattr(self, f"fits_{side}_vectors")  # (fits, rows, cf_dim)
        known = getattr(self, f"fits_{side}_known")
        default = getattr(self, f"fits_default_{side}")[fits]
        count = vectors.shape[1]
        if count == 0:
            found, seen = default, torch.zeros_like(rows, dtype=torch.bool)
        else:
            inside = rows.clamp(min=0, max=count - 1)
            seen = known[fits, inside] & (rows >= 0) & (rows < count)
            found = torch.where(seen.unsqueeze(-1), vectors[fits, inside], default)
        return self.add_new(rows, found, seen, new) if side == "item" else (found, seen)

    def scaled(
        self, side: str, rows: Tensor, new: NewFields | None = None
    ) -> tuple[Tensor, Tensor]:
        """As `lookup`, at the scale that ALG takes, which differs from fit to fit."""
        vectors, seen = self.lookup(side, rows, new)
        fits, _ = _decode_fits(rows)
        return vectors / getattr(self, f"fits_{side}_scale")[fits], seen

    def fit_of(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """As `CFTable.fit_of`. Padding carries its fit too: a history may be empty."""
        fits, _ = _decode_fits(items)
        return self.fits_default_user[fits], self.fits_offset[fits]

    def values_of(self, items: Tensor, new: NewFields | None = None) -> Tensor:
        """As `CFTable.values_of`: all fits have the same values."""
        return super().values_of(decode_rows(items)[1], new)


def _decode_fits(rows: Tensor) -> tuple[Tensor, Tensor]:
    """As `decode_rows`, with fits as places in the `fits_*`: 0, of rows without one, is the last,
    as -1 is in an index."""
    fits, rows = decode_rows(rows)
    return fits - 1, rows


def check_folded(model: CCFLLMForCTR, cf: CFVectors, reads_logit: bool) -> None:
    """Refuse a CF logit without folded-in users where no fit knows a training row's user.

    Raises:
        InputError: naming the mend.
    """
    if cf.cross_fit == "users" and reads_logit and not model.config.cf_fold_in:
        raise InputError(
            "the CF vectors are cross-fit by users, so no training row's user has one, which the "
            "CF logit needs: set cf_fold_in: true, or fit with cross_fit=folds"
        )


def check_known(model: CCFLLMForCTR, cf: CFVectors, rows: Rows) -> None:
    """Tell how many users and items of the training rows the CF vectors do not know. Folded-in
    users have no vector of their own to be known by.

    Raises:
        InputError: they know (nearly) none: they have the same ones by other names.
    """
    for side, own in (("user", cf.user_ids), ("item", cf.item_ids)):
        if not own or (side == "user" and model.config.cf_fold_in):
            continue
        ids = pd.Index(getattr(rows, f"{side}_names"))
        unknown = ids[~ids.isin(own)]
        if not len(unknown):
            continue
        said = (
            f"the CF vectors do not know {len(unknown)} of the {len(ids)} {side}s of the training "
            f"rows, such as {unknown[0]!r}; theirs look like {own[0]!r}"
        )
        if len(unknown) > MOSTLY * len(ids):
            raise InputError(f"{said}: import them by the ids of the data, or fit them on it")
        warnings.warn(said, stacklevel=3)


def install_cross_fit(model: CCFLLMForCTR, cf: CFVectors) -> None:
    """Let a model read rows that carry their fit. Its plain rows, and what it saves, stay the same.

    Raises:
        InputError: the vectors are not those of the model's catalog.
    """
    if model.config.ids_fingerprint != cf.fingerprint:
        raise InputError(
            "the CF vectors are of other users or items than the model: build it with "
            "from_backbone(cf=...) from the same ones"
        )
    model.model.cf = CrossFitTable(model.config, cf).to(model.device)
    model.model.item_text.register_forward_pre_hook(_leave_out_fits)


def _leave_out_fits(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    # Of the fits that rows carry, an item's words know nothing.
    return (decode_rows(args[0])[1], *args[1:])


def choose_fits(split: Dataset | Rows, cf: CFVectors) -> np.ndarray:
    """For each training row of a split, the fit `(n,)` that left it out; -1 is the last."""
    rows = Rows.of(split)
    users, items = rows.user_names[rows.users], rows.item_names[rows.items]
    fits = cf.training_fits(users, items, rows.timestamps()).numpy()
    return np.where(fits == cf.num_fits - 1, -1, fits)


def encode_fits(batch: BatchFeature, groups: Sequence[Group]) -> BatchFeature:
    """Let every row of a packed batch carry the group's `fit`; -1 is the last.

    Sequence i of the batch is that of group i. Fit s is written as s + 1, the last one as 0.
    """
    fits = torch.tensor([group.fit + 1 for group in groups])
    # Tokens of the shared instruction belong to no sequence, and have no slots.
    of_tokens = fits[batch["sequence_ids"].clamp(min=0, max=len(groups) - 1)]
    for name in ("item_slots", "user_slots"):
        slots = batch[name]
        batch[name] = torch.where(slots >= 0, encode_rows(slots, of_tokens), slots)
    batch["candidate_users"] = encode_rows(batch["candidate_users"], fits)
    for name in ("candidate_items", "history_items"):
        if name in batch:
            batch[name] = encode_rows(batch[name], fits[:, None])
    return batch
