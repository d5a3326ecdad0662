"""`CFVectors`: the vectors of any CF model, per raw id, cross-fit for training."""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from safetensors.torch import save_file
from torch import Tensor

from ccf_llm_hf.cf.files import (
    FIELD_FILE,
    FORMAT_VERSION,
    ITEM_FILE,
    RESERVED,
    TENSOR_FILE,
    USER_FILE,
    read_lines,
    read_tensors,
    write_lines,
)
from ccf_llm_hf.cf.folds import fold_of, fold_of_users
from ccf_llm_hf.data.validation import as_ids, require_ids
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.io import write_files
from ccf_llm_hf.modeling.checkpoint_ccf_llm import FIELD_TENSORS
from ccf_llm_hf.modeling.configuration_ccf_llm import ids_fingerprint

# Keeps the gathered vectors below 100 MB when millions of pairs are scored.
PAIRS_AT_ONCE = 1 << 18
NUMBERS_AT_ONCE = 1 << 24


@dataclass
class CFVectors:
    """User and item vectors of a CF model; its logit is `(u * v).sum(-1) + offset`.

    Biases are dimensions of the vectors: a user is `[p, b_u, 1]`, an item `[q, 1, b_i]`. There are
    several fits of them: the last was fitted on all training rows, and evaluation and
    serving take it. The others are cross-fit: [`training_fits`] gives a training row the one
    that was not fitted on its label. With `cross_fit="snapshots"`, fit s was fitted on
    interactions earlier than `snapshot_times[s]` only; with `"folds"`, on all folds of the (user,
    item) pairs but fold s; with `"users"`, on the rows of all folds of the users but fold s (see
    `cf.folds`; all our choice). Where there is one fit only, training rows see it too, in-sample.

    The values of items' fields, such as an author, may have vectors. What they give to the items of
    the catalog is in `item_vectors` already; an item outside it stands at `default_item` plus, for
    each field, the mean of its values' vectors, a value without one counting as zero.

    Args:
        user_ids: raw ids in table order.
        item_ids: raw ids in table order; the table covers the whole catalog.
        item_titles: one title per item.
        user_vectors: `(fits, num_users, dim)` float32.
        item_vectors: `(fits, num_items, dim)` float32.
        user_known: `(fits, num_users)` bool, True where at least one row was fitted on.
        item_known: `(fits, num_items)` bool, True where at least one row was fitted on, of the item
            or of one with the same value in a field. The gate is told no more: how far a vector
            lies from the default says how much evidence is behind it.
        default_user: `(fits, dim)` float32, stands for an unknown user in the model's logit.
        default_item: `(fits, dim)` float32.
        offset: `(fits,)` float32, global bias.
        snapshot_times: `(fits,)` int64, Unix seconds, ascending; with folds all the same.
        model_name: which CF model, for example `mf`.
        metadata: further facts of the fit, strings only.
        cross_fit: `snapshots`, `folds` or `users`; a file without it is of `snapshots`.
        field_values: (field, value) pairs that have vectors, values as `field_values` of the
            prompt's code gives them, without case.
        field_vectors: `(len(field_values), dim)` float32, of the last fit; None without fields.
        item_values: `(num_items, most)` int32, which of the values with tastes each item has, as
            places in field_values; -1 where there are no more. None without tastes.
        field_tastes: `(len(field_values),)` float32, the variance of users' tastes for each value,
            see `CFTable.folded_users`; None without.

    Raises:
        InputError: the shapes contradict each other, ids repeat, a vector is not finite, the times
            do not ascend, or the cross_fit is unknown.
    """

    user_ids: list[str]
    item_ids: list[str]
    item_titles: list[str]
    user_vectors: Tensor
    item_vectors: Tensor
    user_known: Tensor
    item_known: Tensor
    default_user: Tensor
    default_item: Tensor
    offset: Tensor
    snapshot_times: Tensor
    model_name: str
    metadata: dict[str, str] = field(default_factory=dict)
    cross_fit: str = "snapshots"
    field_values: list[tuple[str, str]] = field(default_factory=list)
    field_vectors: Tensor | None = None
    item_values: Tensor | None = None
    field_tastes: Tensor | None = None

    def __post_init__(self) -> None:
        self._check_ids()
        self._check_shapes()
        finite = ("user_vectors", "item_vectors", "default_user", "default_item", "offset")
        for name in (*finite, "field_vectors", "field_tastes"):
            tensor = getattr(self, name)
            parts = () if tensor is None else tensor.flatten().split(NUMBERS_AT_ONCE)
            if not all(torch.isfinite(part).all() for part in parts):
                raise InputError(f"CF vectors: {name} holds NaN or infinity; refit or clean it")
        self._check_cross_fit()

    def _check_cross_fit(self) -> None:
        if self.cross_fit in ("folds", "users"):
            if self.num_fits < 3:
                raise InputError(
                    f"CF vectors: {self.num_fits} fits by fold; there must be one for "
                    "each of two folds or more, and one fitted on all rows"
                )
        elif self.cross_fit != "snapshots":
            raise InputError(
                f"CF vectors: cross_fit {self.cross_fit!r} is none of snapshots, folds and users"
            )
        elif (self.snapshot_times.diff() <= 0).any():
            raise InputError("CF vectors: snapshot_times must ascend strictly; sort the snapshots")

    def _check_ids(self) -> None:
        for name in ("user_ids", "item_ids", "field_values"):
            ids = getattr(self, name)
            index = pd.Index(ids)
            if not index.is_unique:
                twice = index[index.duplicated()][0]
                raise InputError(f"CF vectors: {name} holds {twice!r} twice; ids must be unique")
        if len(self.item_titles) != len(self.item_ids):
            raise InputError(
                f"CF vectors: {len(self.item_titles)} item_titles for {len(self.item_ids)} "
                "item_ids; give one title per item"
            )

    def _check_shapes(self) -> None:
        if self.user_vectors.dim() != 3 or not self.user_vectors.shape[0]:
            raise InputError(
                "CF vectors: user_vectors must have shape (fits, users, dim), not "
                f"{tuple(self.user_vectors.shape)}"
            )
        fits, _, dim = self.user_vectors.shape
        users, items = len(self.user_ids), len(self.item_ids)
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "user_vectors": ((fits, users, dim), torch.float32),
            "item_vectors": ((fits, items, dim), torch.float32),
            "user_known": ((fits, users), torch.bool),
            "item_known": ((fits, items), torch.bool),
            "default_user": ((fits, dim), torch.float32),
            "default_item": ((fits, dim), torch.float32),
            "offset": ((fits,), torch.float32),
            "snapshot_times": ((fits,), torch.int64),
        }
        for name, (shape, dtype) in expected.items():
            tensor = getattr(self, name)
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise InputError(
                    f"CF vectors: {name} is {tensor.dtype} of shape {tuple(tensor.shape)}, but "
                    f"the ids and the other tensors ask for {dtype} of shape {shape}"
                )
        of_values = (0, dim) if self.field_vectors is None else tuple(self.field_vectors.shape)
        if of_values != (len(self.field_values), dim):
            raise InputError(
                f"CF vectors: field_vectors has shape {of_values}, but the field_values and the "
                f"other tensors ask for {(len(self.field_values), dim)}"
            )
        self._check_tastes()

    def _check_tastes(self) -> None:
        if self.item_values is None and self.field_tastes is None:
            return
        if self.item_values is None or self.field_tastes is None:
            raise InputError("CF vectors: item_values and field_tastes come together or not at all")
        count, values = len(self.field_values), self.item_values
        if values.dim() != 2 or len(values) != len(self.item_ids) or values.dtype != torch.int32:
            raise InputError(
                f"CF vectors: item_values is {values.dtype} of shape {tuple(values.shape)}, but "
                f"there are {len(self.item_ids)} items, of which it holds a row of int32 each"
            )
        if values.numel() and not -1 <= int(values.min()) <= int(values.max()) < count:
            raise InputError(f"CF vectors: item_values must be from -1 to {count - 1}")
        if self.field_tastes.shape != (count,) or (self.field_tastes < 0).any():
            raise InputError(
                f"CF vectors: field_tastes must be {count} numbers from 0, one for each field value"
            )

    @property
    def dim(self) -> int:
        """Width of a vector, bias dimensions included."""
        return self.user_vectors.shape[-1]

    @property
    def num_fits(self) -> int:
        """Number of fits: the cross-fit ones and the fit on all rows."""
        return self.user_vectors.shape[0]

    @property
    def fingerprint(self) -> str:
        """Sha256 over the ids in table order; a checkpoint's catalog must have the same."""
        return ids_fingerprint(self.user_ids, self.item_ids, self.field_values)

    @cached_property
    def _user_index(self) -> pd.Index:
        return pd.Index(self.user_ids)

    @cached_property
    def _item_index(self) -> pd.Index:
        return pd.Index(self.item_ids)

    def logits(
        self,
        user_ids: Sequence[str] | np.ndarray,
        item_ids: Sequence[str] | np.ndarray,
        fit: int | Tensor | np.ndarray = -1,
    ) -> Tensor:
        """The CF model's own logit of each pair.

        Args:
            user_ids: n raw ids; unknown ones stand at `default_user`.
            item_ids: n raw ids; unknown ones stand at `default_item`.
            fit: one fit for all, or `(n,)` integers; default the last.

        Returns:
            `(n,)` float32.

        Raises:
            InputError: the two id lists differ in length.
        """
        if len(user_ids) != len(item_ids):
            raise InputError(
                f"CF logits: {len(user_ids)} user_ids but {len(item_ids)} item_ids; give pairs"
            )
        users, items = (
            torch.as_tensor(index.get_indexer(pd.Index(as_ids(pd.Series(ids)))))
            for index, ids in ((self._user_index, user_ids), (self._item_index, item_ids))
        )
        when = torch.as_tensor(fit).long().expand(len(users)) % self.num_fits
        logits = torch.empty(len(users))
        for piece in torch.arange(len(users)).split(PAIRS_AT_ONCE):
            user = self._vectors("user", users[piece], when[piece])  # (piece, dim)
            item = self._vectors("item", items[piece], when[piece])
            logits[piece] = (user * item).sum(-1) + self.offset[when[piece]]
        return logits

    def _vectors(self, side: str, rows: Tensor, when: Tensor) -> Tensor:
        vectors, known = getattr(self, f"{side}_vectors"), getattr(self, f"{side}_known")
        default = getattr(self, f"default_{side}")[when]
        if not vectors.shape[1]:
            return default
        inside = rows.clamp(min=0)
        seen = known[when, inside] & (rows >= 0)
        # `vectors[when, inside]` and `default` are (n, dim)
        return torch.where(seen.unsqueeze(-1), vectors[when, inside], default)

    def score(self, rows: pd.DataFrame, fit: int | Tensor | np.ndarray = -1) -> pd.DataFrame:
        """`logits` of a table of rows.

        Args:
            rows: `user_id`, `item_id` and, if known, `label`.
            fit: as in `logits`.

        Returns:
            These columns in the order of `rows`, `score` (logit) and `prob` (sigmoid), float64.
        """
        logits = self.logits(rows["user_id"].to_numpy(), rows["item_id"].to_numpy(), fit)
        columns = [name for name in ("user_id", "item_id", "label") if name in rows]
        return (
            rows[columns]
            .reset_index(drop=True)
            .assign(score=logits.double().numpy(), prob=logits.double().sigmoid().numpy())
        )

    @property
    def user_precision(self) -> list[float] | None:
        """`(dim,)` precision of the model's Gaussian prior over user vectors about the default one,
        0 for a dimension that is fixed there; None where the model's fit recorded none."""
        recorded = self.metadata.get("user_precision")
        return json.loads(recorded) if recorded else None

    @property
    def rating_scale(self) -> tuple[float, float] | None:
        """`(midpoint, slope)` of the graded targets that were fitted; None if labels were."""
        recorded = self.metadata.get("rating_scale")
        return tuple(json.loads(recorded)) if recorded else None

    def snapshot_for(self, timestamps: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """The last snapshot that was fitted on strictly earlier rows only.

        Args:
            timestamps: `(n,)` int64, Unix seconds.

        Returns:
            `(n,)` int64; 0 before every snapshot (snapshot 0 of our own fits knows nothing).

        Raises:
            InputError: the fits are of folds.
        """
        if self.cross_fit != "snapshots":
            raise InputError(
                "CF vectors: these fits are folds, which no time tells apart; "
                "ask training_fits for those of rows"
            )
        times = torch.from_numpy(np.array(timestamps, dtype=np.int64))
        return (torch.searchsorted(self.snapshot_times, times, right=True) - 1).clamp(min=0)

    def training_fits(
        self,
        user_ids: Sequence[str] | np.ndarray,
        item_ids: Sequence[str] | np.ndarray,
        timestamps: Sequence[int] | np.ndarray | Tensor,
    ) -> Tensor:
        """The fit that each training row shall see: one that was not fitted on it. With
        `cross_fit="users"` that is one fit a user.

        Args:
            user_ids: n raw ids.
            item_ids: n raw ids.
            timestamps: `(n,)` int64, Unix seconds.

        Returns:
            `(n,)` int64.
        """
        if self.cross_fit == "snapshots":
            return self.snapshot_for(timestamps)
        folds = self.num_fits - 1
        if self.cross_fit == "users":
            return torch.from_numpy(fold_of_users(user_ids, folds))
        return torch.from_numpy(fold_of(user_ids, item_ids, folds))

    def last(self) -> "CFVectors":
        """The same with the last fit only, which is what a checkpoint carries."""
        last = {name: getattr(self, name)[-1:].clone() for name in _names_of_fits()}
        return replace(self, **last, cross_fit="snapshots")

    def save(self, folder: str | Path) -> None:
        """Write `cf_embeddings.safetensors`, `user_ids.jsonl`, `item_catalog.jsonl` and, with
        fields, `field_values.jsonl`.

        Other files of the folder stay. All are complete before the first is put in place, and the
        ids' fingerprint gives away a mixture of two saves.
        """
        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {k: v.contiguous() for k, v in tensors.items() if isinstance(v, Tensor)}
        values = [{"field": field, "value": value} for field, value in self.field_values]
        catalog = zip(self.item_ids, self.item_titles, strict=True)

        def write(new: Path) -> None:
            save_file(tensors, new / TENSOR_FILE, metadata=self._file_metadata())
            write_lines(new / USER_FILE, [{"id": user} for user in self.user_ids])
            write_lines(new / ITEM_FILE, [{"id": i, "title": title} for i, title in catalog])
            if values:
                write_lines(new / FIELD_FILE, values)

        try:
            write_files(folder, write)
        except OSError as error:
            raise InputError(
                f"{folder} cannot be written to ({error.strerror or error})"
            ) from error

    def _file_metadata(self) -> dict[str, str]:
        cross_fit = {} if self.cross_fit == "snapshots" else {"cross_fit": self.cross_fit}
        return (
            self.metadata
            | cross_fit
            | {
                "format_version": FORMAT_VERSION,
                "cf_model": self.model_name,
                "dim": str(self.dim),
                "num_users": str(len(self.user_ids)),
                "num_items": str(len(self.item_ids)),
                "num_fits": str(self.num_fits),
                "ids_fingerprint": self.fingerprint,
            }
        )

    @classmethod
    def load(cls, folder: str | Path) -> "CFVectors":
        """Read what [`save`] wrote.

        Raises:
            InputError: a file is missing, damaged, of another format version, or does not fit the
                others; the message names it.
        """
        folder = Path(folder)
        tensors, metadata = read_tensors(folder / TENSOR_FILE, _names_of_fits())
        values: list[tuple[str, str]] = []
        if FIELD_TENSORS[0] in tensors:
            lines = read_lines(folder / FIELD_FILE, ("field", "value"))
            values = [(line["field"], line["value"]) for line in lines]
        users = read_lines(folder / USER_FILE, ("id",))
        items = read_lines(folder / ITEM_FILE, ("id", "title"))
        user_ids, item_ids = [u["id"] for u in users], [i["id"] for i in items]
        if metadata["ids_fingerprint"] != ids_fingerprint(user_ids, item_ids, values):
            raise InputError(
                f"{folder / TENSOR_FILE} was not written with the ids in {USER_FILE}, {ITEM_FILE}"
                f"{f' and {FIELD_FILE}' if values else ''} beside it; restore the files of one fit"
            )
        with _naming(folder / TENSOR_FILE):
            return cls(
                user_ids,
                item_ids,
                [i["title"] for i in items],
                **tensors,
                model_name=metadata["cf_model"],
                metadata={k: v for k, v in metadata.items() if k not in (*RESERVED, "cross_fit")},
                cross_fit=metadata.get("cross_fit", "snapshots"),
                field_values=values,
            )

    @classmethod
    def from_tables(
        cls,
        user: Mapping[Any, Any],
        item: Mapping[Any, Any],
        titles: Mapping[Any, str] | None = None,
        *,
        offset: float = 0.0,
        fitted_before: int | None = None,
        model_name: str = "imported",
        metadata: dict[str, str] | None = None,
    ) -> "CFVectors":
        """Import any CF model whose logit (or score) is `u . v + offset`.

        Biases go in as two more dimensions, `[p, b_u, 1]` and `[q, 1, b_i]`. An unknown user or
        item stands at the mean of the known ones (our choice).

        Args:
            user: raw id (see `read_id`) to vector, all of one width.
            item: the same for items.
            titles: raw id to title for the whole catalog; ids without a vector become unknown
                items. Default: every item's title is its id.
            offset: global bias.
            fitted_before: Unix seconds; the model was fitted on rows earlier than this only. Rows
                before it then get an empty snapshot. Without it every row gets these vectors, and
                training on rows that they were fitted on leaks their labels.
            model_name: which CF model.
            metadata: further facts, strings only.

        Raises:
            InputError: no vectors, different widths, NaN, or ids that are equal as strings.
        """
        user_ids, user_vectors = _table("user", user)
        item_ids, item_vectors = _table("item", item)
        if user_vectors.shape[1] != item_vectors.shape[1]:
            raise InputError(
                f"CF import: user vectors have {user_vectors.shape[1]} dimensions but item vectors "
                f"{item_vectors.shape[1]}; both sides need the same"
            )
        given = titles or {}
        names = dict(zip(require_ids(given, "title ids"), map(str, given.values()), strict=True))
        listed = set(item_ids)
        without = [key for key in names if key not in listed]
        vectors = cls(
            user_ids,
            item_ids + without,
            [names.get(key, key) for key in item_ids + without],
            user_vectors=user_vectors[None],
            item_vectors=torch.cat([item_vectors, item_vectors.mean(0).repeat(len(without), 1)])[
                None
            ],
            user_known=torch.ones(1, len(user_ids), dtype=torch.bool),
            item_known=(torch.arange(len(item_ids) + len(without)) < len(item_ids))[None],
            default_user=user_vectors.mean(0, keepdim=True),
            default_item=item_vectors.mean(0, keepdim=True),
            offset=torch.tensor([offset], dtype=torch.float32),
            snapshot_times=torch.tensor([fitted_before or 0]),
            model_name=model_name,
            metadata=dict(metadata or {}),
        )
        return vectors if fitted_before is None else vectors._after_nothing(fitted_before)

    def _after_nothing(self, fitted_before: int) -> "CFVectors":
        """Put a snapshot that knows nobody in front, for rows before `fitted_before`."""
        doubled: dict[str, Any] = {
            name: torch.cat([torch.zeros_like(getattr(self, name)), getattr(self, name)])
            for name in _names_of_fits()
        }
        doubled["snapshot_times"] = torch.tensor([0, fitted_before])
        return replace(self, **doubled)


def _names_of_fits() -> list[str]:
    """The tensors that have a row a fit."""
    return [f.name for f in fields(CFVectors) if f.type is Tensor]


def _table(side: str, vectors: Mapping[Any, Any]) -> tuple[list[str], Tensor]:
    if not vectors:
        raise InputError(f"CF import: the {side} table is empty; give at least one vector")
    named = zip(require_ids(vectors, f"{side} ids"), vectors.values(), strict=True)
    arrays = {key: np.asarray(value, dtype=np.float32) for key, value in named}
    if len(arrays) < len(vectors):
        raise InputError(f"CF import: {side} ids repeat once they are strings; make them unique")
    width = next(iter(arrays.values())).shape
    for key, array in arrays.items():
        if array.ndim != 1 or array.shape != width or not array.size:
            raise InputError(
                f"CF import: the vector of {side} {key!r} has shape {array.shape}, the first has "
                f"{width}; give one flat vector of the same width per id"
            )
        if not np.isfinite(array).all():
            raise InputError(f"CF import: the vector of {side} {key!r} holds NaN or infinity")
    return list(arrays), torch.from_numpy(np.stack(list(arrays.values())))


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
