"""Matrix factorization with and without biases, tuned on validation, cross-fit."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ccf_llm_hf.cf.config import MFConfig
from ccf_llm_hf.cf.rotation import rotate_onto
from ccf_llm_hf.cf.snapshots import describe_fit, score_cross_fit
from ccf_llm_hf.cf.solver import (
    Parameters,
    Penalties,
    Rows,
    draw_parameters,
    factor_weights,
    refresh,
    solve,
)
from ccf_llm_hf.cf.training_data import (
    Plan,
    TrainingData,
    load_training_data,
    mark_seen,
    plan_folds,
    plan_snapshots,
)
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.evaluation.metrics import auc

logger = logging.getLogger(__name__)

# Strengths to choose from (our choice): inverse prior variances, of biases in steps of two.
USER_BIAS_GRID = (0.5, 1.0, 2.0, 4.0, 8.0)
ITEM_BIAS_GRID = (0.125, 0.25, 0.5, 1.0, 2.0)
FACTOR_GRID = (2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0)
# Beyond so many rows more than 30 iterations no longer move AUC, and a part of the users is enough
# to tell the strengths.
MANY_ROWS = 300_000
ITERATIONS, ITERATIONS_MANY_ROWS = 100, 30


def fit_mf(data_dir: str | Path, config: MFConfig | None = None) -> CFVectors:
    """Fit MF on the training rows of a prepared folder, or with `rows="earlier"` on all rows before
    the validation split.

    The L2 strengths are chosen on the whole validation split (biases first, then factors). With
    `cross_fit="folds"` each snapshot is solved for the rows of all folds but one, and rotated onto
    the fit on all rows, which is the last. With `"snapshots"` each is solved for the rows before
    its time, warm-started from the one before; snapshot 0 is fitted on what precedes the train
    split (nothing, of the training rows), the last on all rows.

    Args:
        data_dir: folder written by `ccf-llm prepare`.
        config: default `MFConfig()`.

    Returns:
        The vectors: dim + 2 with biases (user `[p, b_u, 1]`, item `[q, 1, b_i]`), else dim.
        `metadata` records the chosen strengths, validation AUC and UAUC, and
        `cross_fit_train_auc`: training rows scored by the snapshots that they see, which is near
        a held-out AUC unless labels leak.

    Raises:
        InputError: the folder is no prepared one, train is empty, or a split has one class only.
    """
    config = config or MFConfig()
    data = load_training_data(Path(data_dir), config.rows, config.targets)
    grid = _fits_to_choose(config)
    plan = _plan(data, config)
    with tqdm(total=grid + len(plan.rows), desc="fit mf", unit=" fits") as bar:
        penalties = _choose_penalties(data, config, bar)
        fits = _fit_tables(data, config, penalties, plan, bar)
    vectors = _to_vectors(data, fits, plan, penalties, config.cross_fit)
    vectors.metadata |= _describe(data, config, penalties, fits, plan)
    return vectors


def _plan(data: TrainingData, config: MFConfig) -> Plan:
    width = config.dim + 2 * config.use_biases
    if config.cross_fit == "folds":
        return plan_folds(data, config.folds, width)
    return plan_snapshots(data, config.snapshots, width)


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


def _choose_penalties(data: TrainingData, config: MFConfig, bar: tqdm) -> Penalties:
    """Biases without factors first (convex), then the factors on top; best validation AUC wins."""
    users, items, factors = _grids(config)
    data = _sample(data, config.seed)
    pairs = [Penalties(1.0, user, item, config.use_biases) for user in users for item in items]
    best = _best(data, config, pairs, 0, bar)
    return _best(data, config, [replace(best, factors=value) for value in factors], config.dim, bar)


def _best(
    data: TrainingData, config: MFConfig, candidates: list[Penalties], dim: int, bar: tqdm
) -> Penalties:
    if len(candidates) == 1:
        return candidates[0]
    start = draw_parameters(len(data.users), len(data.items), dim, config.seed)
    labels, found = data.validation.labels.numpy(), []
    for penalties in candidates:
        fit = _solve(data.train, penalties, start, config)
        found.append(auc(labels, fit.logits(data.validation).numpy()))
        bar.update()
    return candidates[int(np.argmax(found))]


def _sample(data: TrainingData, seed: int) -> TrainingData:
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
        train=_renumber(train, users, items),
        validation=_renumber(data.validation[kept], users, items),
        users=data.users[users.numpy()],
        items=data.items[items.numpy()],
    )


def _renumber(rows: Rows, users: Tensor, items: Tensor) -> Rows:
    """Rows of smaller tables that hold only what is marked; the rest, and -1, become -1."""

    def places(ids: Tensor, marked: Tensor) -> Tensor:
        place = torch.where(marked, marked.cumsum(0) - 1, -1)
        return torch.where(ids < 0, -1, place[ids])

    return Rows(places(rows.users, users), places(rows.items, items), rows.labels)


def _solve(rows: Rows, penalties: Penalties, start: Parameters, config: MFConfig) -> Parameters:
    usual = ITERATIONS if len(rows) <= MANY_ROWS else ITERATIONS_MANY_ROWS
    return solve(rows, penalties, start, iterations=config.iterations or usual)


def _fit_tables(
    data: TrainingData, config: MFConfig, penalties: Penalties, plan: Plan, bar: tqdm
) -> list[Parameters]:
    """In time each table starts from the one before it. A fold starts where the fit on all rows
    started, not where it ended: that knows its labels, and one of many optima would keep them.
    """
    start = draw_parameters(len(data.users), len(data.items), config.dim, config.seed)

    def fit(rows: slice | Tensor, warm: Parameters) -> Parameters:
        part = data.train[rows]
        if len(part):
            found = _solve(part, penalties, warm, config)
        else:
            found = Parameters(*(torch.zeros_like(tensor) for tensor in start.tensors()))
        bar.update()
        return found

    if config.cross_fit == "folds":
        whole = fit(plan.rows[-1], start)
        return [*(_rotate_fit(fit(rows, start), whole) for rows in plan.rows[:-1]), whole]
    fits: list[Parameters] = []
    for rows in plan.rows:
        warm = refresh(fits[-1], start) if fits else start
        fits.append(fit(rows, warm))
    return fits


def _rotate_fit(fit: Parameters, onto: Parameters) -> Parameters:
    """The same model, its factors rotated onto another fit's."""
    users, items = rotate_onto(
        (fit.user_factors, fit.item_factors), (onto.user_factors, onto.item_factors)
    )
    return replace(fit, user_factors=users, item_factors=items)


def _to_vectors(
    data: TrainingData,
    fits: list[Parameters],
    plan: Plan,
    penalties: Penalties,
    cross_fit: str,
) -> CFVectors:
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
    return CFVectors(
        user_ids=data.users.tolist(),
        item_ids=data.items["item_id"].tolist(),
        item_titles=data.items["title"].tolist(),
        user_vectors=user_vectors,
        item_vectors=item_vectors,
        user_known=torch.stack(
            [mark_seen(data.train.users[n], len(data.users)) for n in plan.rows]
        ),
        item_known=torch.stack(
            [mark_seen(data.train.items[n], len(data.items)) for n in plan.rows]
        ),
        default_user=default_user.repeat(len(fits), 1),
        default_item=default_item.repeat(len(fits), 1),
        offset=torch.cat([fit.offset for fit in fits]),
        snapshot_times=torch.as_tensor(plan.times, dtype=torch.int64),
        model_name="mf" if biases else "mf_nobias",
        cross_fit=cross_fit,
    )


def _describe(
    data: TrainingData,
    config: MFConfig,
    penalties: Penalties,
    fits: list[Parameters],
    plan: Plan,
) -> dict[str, str]:
    last = fits[-1]
    facts = describe_fit(
        data,
        last.logits(data.validation),
        score_cross_fit(data.train, plan, fits),
        last.logits(data.train),
        plan.cross_fit,
    )
    facts["l2_factors"] = f"{penalties.factors:g}"
    if penalties.use_biases:
        facts |= {
            "l2_user_bias": f"{penalties.user_bias:g}",
            "l2_item_bias": f"{penalties.item_bias:g}",
        }
    precision = penalties.factors * factor_weights(last.item_factors.shape[1])
    prior = precision.tolist() + [penalties.user_bias, 0.0] * penalties.use_biases
    facts["user_precision"] = json.dumps([round(value, 6) for value in prior])
    if data.rating_scale:
        facts["rating_scale"] = json.dumps(data.rating_scale)
    live = last.item_factors.abs().amax(0) > 0
    return facts | {"live_factors": str(int(live.sum())), "seed": str(config.seed)}
