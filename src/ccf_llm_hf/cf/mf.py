"""Matrix factorization with and without biases, tuned on validation, cross-fit."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from ccf_llm_hf.cf.tastes import choose_tastes, list_values, mark_values
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
# With fields an item's own bias is what its values leave over.
OWN_BIAS_GRID = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
VALUE_BIAS_GRID = (0.5, 1.0, 2.0, 4.0, 8.0)
VALUE_FACTOR_GRID = (3.0, 4.0, 5.0, 6.0, 8.0)
# Of each field beside the first, at whose strengths the values of all stand.
SCALE_GRID = (0.0, 0.15, 0.3, 0.6)
# Beyond so many rows more than 30 iterations no longer move AUC, and a part of the users is enough
# to tell the strengths.
MANY_ROWS = 300_000
ITERATIONS, ITERATIONS_MANY_ROWS = 100, 30


def fit_mf(data_dir: str | Path, config: MFConfig | None = None) -> CFVectors:
    """Fit MF on the training rows of a prepared folder, or with `rows="earlier"` on all rows before
    the validation split.

    The L2 strengths are chosen on the whole validation split (biases first, then factors). With
    `cross_fit="folds"` or `"users"` each fit is solved for the rows of all folds but one, and
    rotated onto the fit on all rows, which is the last. With `"snapshots"` each is solved for the
    rows before its time, warm-started from the one before; snapshot 0 is fitted on what precedes
    the train split (nothing, of the training rows), the last on all rows.

    Args:
        data_dir: folder written by `ccf-llm prepare`.
        config: default `MFConfig()`.

    Returns:
        The vectors: dim + 2 with biases (user `[p, b_u, 1]`, item `[q, 1, b_i]`), else dim. With
        `item_fields` an item's holds what its values add, an item without rows is known by any
        value that occurs in the rows, and `field_vectors` has the values' own.
        `metadata` records the chosen strengths, validation AUC and UAUC, and
        `cross_fit_train_auc`: training rows scored by the snapshots that they see, which is near
        a held-out AUC unless labels leak.

    Raises:
        InputError: the folder is no prepared one, its items lack a field, train is empty, or a
            split has one class only.
    """
    config = config or MFConfig()
    data = load_training_data(Path(data_dir), config.rows, config.targets, config.item_fields)
    grid = sum(len(choices) for _, choices in _rounds(config) if len(choices) > 1)
    if config.field_scales is None:
        grid += len(SCALE_GRID) * len(config.item_fields[1:])
    plan = _plan(data, config)
    with tqdm(total=grid + len(plan.rows), desc="fit mf", unit=" fits") as bar:
        penalties = _choose_penalties(data, config, bar)
        scaled = replace(data, fields=data.fields.scale(penalties.field_scales))
        fits = _fit_tables(scaled, config, penalties, plan, bar)
    vectors = _to_vectors(scaled, fits, plan, penalties)
    vectors.metadata |= _describe(scaled, config, penalties, fits, plan)
    if not config.item_fields:
        return vectors
    tastes = choose_tastes(data, fits[-1], len(config.item_fields), config.tastes)
    vectors.metadata["tastes"] = json.dumps(tastes)
    return replace(vectors, **list_values(data, fits[-1], penalties, tastes))


def _plan(data: TrainingData, config: MFConfig) -> Plan:
    width = config.dim + 2 * config.use_biases
    if config.cross_fit != "snapshots":
        return plan_folds(data, config.folds, width, config.cross_fit)
    return plan_snapshots(data, config.snapshots, width)


def _rounds(config: MFConfig) -> list[tuple[int, list[dict[str, Any]]]]:
    """The strengths to choose, one round after the other: the dimensions of its fits, and what to
    choose from. Biases without factors come first (convex), then the factors on top. Values' are
    as strong as items' until a round of their own (our choice, which spares fits)."""

    def grid(name: str, default: tuple[float, ...]) -> tuple[float, ...]:
        given = getattr(config, f"l2_{name}")
        return default if given is None else (given,)

    def tie(name: str, value: float) -> float:
        given = getattr(config, f"l2_{name}")
        return value if given is None else given

    users = grid("user_bias", USER_BIAS_GRID)
    items = grid("item_bias", OWN_BIAS_GRID if config.item_fields else ITEM_BIAS_GRID)
    biases: list[dict[str, Any]] = [
        {"user_bias": user, "item_bias": item, "value_bias": tie("value_bias", item)}
        for user in users
        for item in items
    ]
    factors: list[dict[str, Any]] = [
        {"factors": value, "value_factors": tie("value_factors", value)}
        for value in grid("factors", FACTOR_GRID)
    ]
    rounds = [(0, biases)] * config.use_biases
    if config.item_fields and config.use_biases and config.l2_value_bias is None:
        pairs = [{"item_bias": i, "value_bias": v} for i in items for v in VALUE_BIAS_GRID]
        rounds.append((0, pairs))
    rounds.append((config.dim, factors))
    if config.item_fields and config.l2_value_factors is None:
        rounds.append((config.dim, [{"value_factors": value} for value in VALUE_FACTOR_GRID]))
    return rounds


def _choose_penalties(data: TrainingData, config: MFConfig, bar: tqdm) -> Penalties:
    """Best validation AUC wins, round by round."""
    data = _sample(data, config.seed)
    count = len(config.item_fields)
    scales = config.field_scales or [1.0, *[0.0] * (count - 1)][:count]
    best = Penalties(1.0, 1.0, 1.0, config.use_biases, field_scales=tuple(scales))
    for dim, choices in _rounds(config):
        best = _best(data, config, [replace(best, **choice) for choice in choices], dim, bar)
    for place in range(1, count if config.field_scales is None else 1):
        before, after = best.field_scales[:place], best.field_scales[place + 1 :]
        tried = [replace(best, field_scales=(*before, scale, *after)) for scale in SCALE_GRID]
        best = _best(data, config, tried, config.dim, bar)
    return best


def _best(
    data: TrainingData, config: MFConfig, candidates: list[Penalties], dim: int, bar: tqdm
) -> Penalties:
    if len(candidates) == 1:
        return candidates[0]
    start = draw_parameters(len(data.users), len(data.items), dim, config.seed, data.fields)
    labels, found = data.validation.labels.numpy(), []
    for penalties in candidates:
        scaled = replace(start, fields=data.fields.scale(penalties.field_scales))
        fit = _solve(data.train, penalties, scaled, config)
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
    if data.field_values:  # an item without rows can be known by its values
        items[data.validation.items[kept & (data.validation.items >= 0)]] = True
    return replace(
        data,
        train=_renumber(train, users, items),
        validation=_renumber(data.validation[kept], users, items),
        users=data.users[users.numpy()],
        items=data.items[items.numpy()],
        fields=data.fields.restrict(items),
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
    start = draw_parameters(len(data.users), len(data.items), config.dim, config.seed, data.fields)

    def fit(rows: slice | Tensor, warm: Parameters) -> Parameters:
        part = data.train[rows]
        found = _solve(part, penalties, warm, config) if len(part) else start.zeros()
        bar.update()
        return found

    if config.cross_fit != "snapshots":
        whole = fit(plan.rows[-1], start)
        return [*(_rotate_fit(fit(rows, start), whole) for rows in plan.rows[:-1]), whole]
    fits: list[Parameters] = []
    for rows in plan.rows:
        warm = refresh(fits[-1], start) if fits else start
        fits.append(fit(rows, warm))
    return fits


def _rotate_fit(fit: Parameters, onto: Parameters) -> Parameters:
    """The same model without fields, its factors rotated onto another fit's."""
    fit, onto = fit.whole(), onto.whole()
    users, items = rotate_onto(
        (fit.user_factors, fit.item_factors), (onto.user_factors, onto.item_factors)
    )
    return replace(fit, user_factors=users, item_factors=items)


def _to_vectors(
    data: TrainingData,
    fits: list[Parameters],
    plan: Plan,
    penalties: Penalties,
) -> CFVectors:
    """Vectors of every fit; the unknown get the defaults, MF's own answer for them."""
    biases = penalties.use_biases
    dim = fits[0].user_factors.shape[1]
    default_user = torch.tensor([0.0] * dim + [0.0, 1.0] * biases)
    default_item = torch.tensor([0.0] * dim + [1.0, 0.0] * biases)
    user_vectors = default_user.repeat(len(fits), len(data.users), 1)
    item_vectors = default_item.repeat(len(fits), len(data.items), 1)
    for snapshot, fit in enumerate(fit.whole() for fit in fits):
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
        item_known=torch.stack([_mark_known(data, n) for n in plan.rows]),
        default_user=default_user.repeat(len(fits), 1),
        default_item=default_item.repeat(len(fits), 1),
        offset=torch.cat([fit.offset for fit in fits]),
        snapshot_times=torch.as_tensor(plan.times, dtype=torch.int64),
        model_name="mf" if biases else "mf_nobias",
        cross_fit=plan.cross_fit,
    )


def _mark_known(data: TrainingData, rows: slice | Tensor) -> Tensor:
    """Items `(num_items,)` that rows tell something about: they, or a value of theirs, occur."""
    seen = mark_seen(data.train.items[rows], len(data.items))
    values = mark_values(data.fields, seen)
    return seen.index_fill(0, data.fields.items[values[data.fields.values]], True)


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
    if config.item_fields:
        facts["item_fields"] = json.dumps(config.item_fields)
        facts["field_scales"] = json.dumps(penalties.field_scales)
        facts["l2_value_factors"] = f"{penalties.value_factors:g}"
        if penalties.use_biases:
            facts["l2_value_bias"] = f"{penalties.value_bias:g}"
    precision = penalties.factors * factor_weights(last.item_factors.shape[1])
    prior = precision.tolist() + [penalties.user_bias, 0.0] * penalties.use_biases
    facts["user_precision"] = json.dumps([round(value, 6) for value in prior])
    if data.rating_scale:
        facts["rating_scale"] = json.dumps(data.rating_scale)
    live = last.user_factors.abs().amax(0) > 0
    return facts | {"live_factors": str(int(live.sum())), "seed": str(config.seed)}
