"""Matrix factorization with and without biases, tuned on validation, in snapshots in time."""

import json
import logging
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ccf_llm_hf.cf.embeddings import CFEmbeddings
from ccf_llm_hf.cf.solver import (
    Parameters,
    Penalties,
    Rows,
    factor_weights,
    initial_parameters,
    refreshed,
    solve,
)
from ccf_llm_hf.configs import MFConfig
from ccf_llm_hf.data.prepared import interactions, rating_midpoint
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation.metrics import auc, uauc
from ccf_llm_hf.evaluation.rows import read_items, read_rows

logger = logging.getLogger(__name__)

USER_BIAS_GRID = (0.5, 1.0, 2.0, 4.0, 8.0)
ITEM_BIAS_GRID = (0.125, 0.25, 0.5, 1.0, 2.0)
FACTOR_GRID = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
TABLE_BYTES = 1 << 30
GRADED_SLOPE = 1.5  # best of 1.5, 2 and 2.5 on ML-1M's validation split
MANY_ROWS = 300_000
ITERATIONS, ITERATIONS_MANY_ROWS = 100, 30


@dataclass
class _Data:
    """Rows to fit in order of time, with their times `(n,)`, and of validation, with the users'
    codes `(n,)`; user and item ids in table order. In `validation` an index below zero is unknown.
    `split_times` are those of the train split alone, which snapshots are cut by.
    """

    train: Rows
    times: np.ndarray
    split_times: np.ndarray
    validation: Rows
    validation_users: np.ndarray
    users: pd.Index
    items: pd.DataFrame


def fit_mf(data_dir: str | Path, config: MFConfig | None = None) -> CFEmbeddings:
    """Fit MF on the training rows of a prepared folder, or with `rows="earlier"` on all rows before
    the validation split.

    The L2 strengths are chosen on the whole validation split (biases first, then factors), then
    each snapshot is solved for the rows before its time, warm-started from the one before. Snapshot
    0 is fitted on what precedes the train split (nothing, of the training rows); the last on all.

    Args:
        data_dir: folder written by `ccf-llm prepare`.
        config: default `MFConfig()`.

    Returns:
        The vectors: dim + 2 with biases (user `[p, b_u, 1]`, item `[q, 1, b_i]`), else dim.
        `metadata` records the chosen strengths, validation AUC and UAUC, and
        `out_of_time_train_auc`: training rows scored by the snapshots that they get, which is near
        a held-out AUC unless labels leak.

    Raises:
        InputError: the folder is no prepared one, train is empty, or a split has one class only.
    """
    config = config or MFConfig()
    data = _load(Path(data_dir), config)
    grid = _fits_to_choose(config)
    times, sizes = _slices(data, config)
    with tqdm(total=grid + len(times), desc="fit mf", unit=" fits") as bar:
        penalties = _choose_penalties(data, config, bar)
        fits = _fit_snapshots(data, config, penalties, sizes, bar)
    embeddings = _embeddings(data, fits, times, sizes, penalties)
    embeddings.metadata |= _facts(data, config, penalties, fits, sizes)
    return embeddings


def fit_cf(
    kind: str, data_dir: str | Path, out: str | Path, config: MFConfig | None = None
) -> CFEmbeddings:
    """Fit a CF model, save it in `out` and print what was chosen (`ccf-llm fit-cf`).

    Args:
        kind: `mf`.
        data_dir: folder written by `ccf-llm prepare`.
        out: folder to write.
        config: of the model.

    Raises:
        InputError: unknown kind, or as `fit_mf`.
    """
    if kind != "mf":
        raise InputError(f"CF model {kind!r} is unknown: choose mf, or import its vectors")
    embeddings = fit_mf(data_dir, config)
    embeddings.save(out)
    facts = {key: value for key, value in embeddings.metadata.items() if key != "user_precision"}
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    return embeddings


def _load(folder: Path, config: MFConfig) -> _Data:
    train = read_rows(folder, "train").sort_values("timestamp", kind="stable", ignore_index=True)
    validation, items = read_rows(folder, "validation"), read_items(folder)
    split_times = train["timestamp"].to_numpy()
    scale = None
    if config.rows == "earlier":
        train = interactions(folder)
        train = train[train["timestamp"] < validation["timestamp"].min()].reset_index(drop=True)
    targets = train["label"].to_numpy(dtype=np.float32)
    if config.targets == "graded":
        scale = (rating_midpoint(train), GRADED_SLOPE)
        targets = 1 / (1 + np.exp(-scale[1] * (train["rating"].to_numpy() - scale[0])))
    for name, split in (("train", train), ("validation", validation)):
        if split["label"].nunique() < 2:
            raise InputError(
                f"{folder}: the {name} split needs rows of both labels to fit MF; prepare it with "
                "another period or label rule"
            )
    users, catalog = pd.Index(train["user_id"].unique()), pd.Index(items["item_id"])
    rows = _rows(train, users, catalog)
    if (lost := rows.items < 0).any():
        raise InputError(
            f"{folder}: item {train['item_id'][int(lost.nonzero()[0])]!r} of train is not in the "
            "catalog; prepare it again"
        )
    return _Data(
        rows,
        train["timestamp"].to_numpy(),
        split_times,
        _rows(validation, users, catalog),
        pd.factorize(validation["user_id"])[0],
        users,
        items,
    )


def _rows(table: pd.DataFrame, users: pd.Index, items: pd.Index) -> Rows:
    return Rows(
        torch.from_numpy(_places(table["user_id"], users)),
        torch.from_numpy(_places(table["item_id"], items)),
        torch.tensor(table["label"].to_numpy(), dtype=torch.float32),
    )


def _places(ids: pd.Series, index: pd.Index) -> np.ndarray:
    # Each id is looked up once, however many rows it has.
    codes, names = pd.factorize(ids)
    return index.get_indexer(names)[codes]


def _slices(data: _Data, config: MFConfig) -> tuple[np.ndarray, list[int]]:
    """Snapshot times, ascending, and how many of the time-ordered rows lie before each."""
    times = data.split_times
    width = config.dim + 2 * config.use_biases
    most = TABLE_BYTES // (4 * width * (len(data.users) + len(data.items)))
    count = min(config.snapshots, max(1, most - 1))
    if count < config.snapshots:
        logger.warning("%d snapshots instead of %d, to keep within 1 GB", count, config.snapshots)
    starts = times[np.arange(count) * len(times) // count]
    found = np.append(np.unique(starts), times[-1] + 1)
    return found, np.searchsorted(data.times, found, side="left").tolist()


def _fits_to_choose(config: MFConfig) -> int:
    users, items, factors = _grids(config)
    return sum(size for size in (len(users) * len(items), len(factors)) if size > 1)


def _grids(config: MFConfig) -> tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]:
    def grid(value: float | None, default: tuple[float, ...]) -> tuple[float, ...]:
        return default if value is None else (value,)

    if not config.use_biases:
        return (1.0,), (1.0,), grid(config.l2_factors, FACTOR_GRID)
    return (
        grid(config.l2_user_bias, USER_BIAS_GRID),
        grid(config.l2_item_bias, ITEM_BIAS_GRID),
        grid(config.l2_factors, FACTOR_GRID),
    )


def _choose_penalties(data: _Data, config: MFConfig, bar: Any) -> Penalties:
    """Biases without factors first (convex), then the factors on top; best validation AUC wins."""
    users, items, factors = _grids(config)
    data = _sample(data, config.seed)
    pairs = [Penalties(1.0, user, item, config.use_biases) for user in users for item in items]
    best = _best(data, config, pairs, 0, bar)
    return _best(data, config, [replace(best, factors=value) for value in factors], config.dim, bar)


def _best(
    data: _Data, config: MFConfig, candidates: list[Penalties], dim: int, bar: Any
) -> Penalties:
    if len(candidates) == 1:
        return candidates[0]
    start = initial_parameters(len(data.users), len(data.items), dim, config.seed)
    labels, found = data.validation.labels.numpy(), []
    for penalties in candidates:
        fit = _solve(data.train, penalties, start, config)
        found.append(auc(labels, fit.logits(data.validation).numpy()))
        bar.update()
    return candidates[int(np.argmax(found))]


def _sample(data: _Data, seed: int) -> _Data:
    """All rows of as many random users as MANY_ROWS allows, in tables of what occurs in them.

    The strengths are inverse prior variances, which part of the users tell as well as all. Of
    validation the rows of users that were left out are left out too.
    """
    if len(data.train) <= MANY_ROWS:
        return data
    order = torch.randperm(len(data.users), generator=torch.Generator().manual_seed(seed))
    counts = torch.bincount(data.train.users, minlength=len(data.users))
    users = torch.zeros(len(data.users), dtype=torch.bool)
    users[order[counts[order].cumsum(0) <= MANY_ROWS]] = True
    train = data.train[users[data.train.users]]
    items = torch.bincount(train.items, minlength=len(data.items)) > 0
    kept = users[data.validation.users] | (data.validation.users < 0)
    return replace(
        data,
        train=_renumbered(train, users, items),
        validation=_renumbered(data.validation[kept], users, items),
        users=data.users[users.numpy()],
        items=data.items[items.numpy()],
    )


def _renumbered(rows: Rows, users: Tensor, items: Tensor) -> Rows:
    """Rows of smaller tables that hold only what is marked; the rest, and -1, become -1."""

    def places(ids: Tensor, marked: Tensor) -> Tensor:
        place = torch.where(marked, marked.cumsum(0) - 1, -1)
        return torch.where(ids < 0, -1, place[ids])

    return Rows(places(rows.users, users), places(rows.items, items), rows.labels)


def _solve(rows: Rows, penalties: Penalties, start: Parameters, config: MFConfig) -> Parameters:
    usual = ITERATIONS if len(rows) <= MANY_ROWS else ITERATIONS_MANY_ROWS
    return solve(rows, penalties, start, iterations=config.iterations or usual)


def _fit_snapshots(
    data: _Data, config: MFConfig, penalties: Penalties, sizes: list[int], bar: Any
) -> list[Parameters]:
    start = initial_parameters(len(data.users), len(data.items), config.dim, config.seed)
    fits: list[Parameters] = []
    for size in sizes:
        warm = refreshed(fits[-1], start) if fits else start
        nothing = Parameters(*(torch.zeros_like(tensor) for tensor in start.tensors()))
        fits.append(_solve(data.train[:size], penalties, warm, config) if size else nothing)
        bar.update()
    return fits


def _embeddings(
    data: _Data,
    fits: list[Parameters],
    times: np.ndarray,
    sizes: list[int],
    penalties: Penalties,
) -> CFEmbeddings:
    """Vectors of every snapshot; the unknown get the defaults, MF's own answer for them."""
    biases = penalties.use_biases
    dim = fits[0].user_factors.shape[1]
    default_user = torch.tensor([0.0] * dim + [0.0, 1.0] * biases)
    default_item = torch.tensor([0.0] * dim + [1.0, 0.0] * biases)
    user_vectors = default_user.repeat(len(fits), len(data.users), 1)
    item_vectors = default_item.repeat(len(fits), len(data.items), 1)
    for snapshot, fit in enumerate(fits):
        user_vectors[snapshot, :, :dim] = fit.user_factors
        item_vectors[snapshot, :, :dim] = fit.item_factors
        if biases:
            user_vectors[snapshot, :, dim] = fit.user_bias
            item_vectors[snapshot, :, dim + 1] = fit.item_bias
    return CFEmbeddings(
        user_ids=data.users.tolist(),
        item_ids=data.items["item_id"].tolist(),
        item_titles=data.items["title"].tolist(),
        user_vectors=user_vectors,
        item_vectors=item_vectors,
        user_known=torch.stack([_seen(data.train.users[:n], len(data.users)) for n in sizes]),
        item_known=torch.stack([_seen(data.train.items[:n], len(data.items)) for n in sizes]),
        default_user=default_user.repeat(len(fits), 1),
        default_item=default_item.repeat(len(fits), 1),
        offset=torch.cat([fit.offset for fit in fits]),
        snapshot_times=torch.as_tensor(times, dtype=torch.int64),
        model_name="mf" if biases else "mf_nobias",
    )


def _seen(ids: Tensor, size: int) -> Tensor:
    return torch.bincount(ids, minlength=size) > 0


def _facts(
    data: _Data, config: MFConfig, penalties: Penalties, fits: list[Parameters], sizes: list[int]
) -> dict[str, str]:
    last = fits[-1]
    held_out = last.logits(data.validation).numpy()
    # A training row is scored by the snapshot before it: rows are in order of time.
    bounds = zip(fits, sizes, [*sizes[1:], len(data.train)], strict=True)
    out_of_time = [fit.logits(data.train[start:stop]) for fit, start, stop in bounds]
    labels, train_labels = data.validation.labels.numpy(), data.train.labels.numpy()
    later = train_labels[sizes[0] :]
    facts = {
        "validation_auc": f"{auc(labels, held_out):.4f}",
        "validation_uauc": f"{uauc(labels, held_out, data.validation_users):.4f}",
        "out_of_time_train_auc": f"{auc(later, torch.cat(out_of_time).numpy()):.4f}",
        "in_sample_train_auc": f"{auc(train_labels, last.logits(data.train).numpy()):.4f}",
        "l2_factors": f"{penalties.factors:g}",
    }
    if penalties.use_biases:
        facts |= {
            "l2_user_bias": f"{penalties.user_bias:g}",
            "l2_item_bias": f"{penalties.item_bias:g}",
        }
    precision = penalties.factors * factor_weights(last.item_factors.shape[1])
    prior = precision.tolist() + [penalties.user_bias, 0.0] * penalties.use_biases
    live = last.item_factors.abs().amax(0) > 0
    return facts | {
        "live_factors": str(int(live.sum())),
        "train_rows": str(len(data.train)),
        "user_precision": json.dumps([round(value, 6) for value in prior]),
        "seed": str(config.seed),
    }
