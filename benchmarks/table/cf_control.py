"""The CF model alone under the cold-start analyses, on the rows and draws of the language model."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from cold_start import LIKES, SHARES, SIDES, Measure, draw_rows

from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.data.prepared import load_prepared
from ccf_llm_hf.inference.score_table import sample_users


def blanked_cf(
    method: str,
    cf_folder: str | Path,
    data_dir: str | Path,
    split: str = "test",
    shares: Sequence[float] = SHARES,
    seed: int = 0,
    max_rows: int | None = None,
    *,
    resamples: int = 1000,
) -> list[dict[str, Any]]:
    """As `cold_start.blanked`, for the last snapshot of a CF table: a control (our choice).

    The same ids are drawn as of a checkpoint over this table. SASRec's table holds its users as
    they were at the last snapshot.

    Args:
        method: name of the entries.
        cf_folder: folder of `CFVectors`.
        data_dir: prepared folder.
        split: train, validation or test.
        shares: in [0, 1], of the known items or users.
        seed: of the draw, of the sample of rows and of the bootstrap.
        max_rows: score whole users until this many rows are reached; default all rows.
        resamples: of the user-level bootstrap.

    Raises:
        InputError: a bad folder.
    """
    cf, rows = CFVectors.load(cf_folder).last(), load_prepared(data_dir).splits[split]
    rows = rows if max_rows is None else sample_users(rows, max_rows, seed)
    measure = Measure(rows, resamples, seed)
    whole = measure.metrics(_scores(cf, rows))
    entries = []
    for side, share in itertools.product(SIDES, shares):
        draw = {
            kind: draw_rows(
                kind,
                getattr(cf, f"{kind}_ids"),
                getattr(cf, f"{kind}_known")[-1].numpy(),
                share if kind in SIDES[side] else 0.0,
                seed,
            )
            for kind in ("item", "user")
        }
        scores = _scores(_without(cf, draw), rows)
        entries.append(
            {"method": method, "side": side, "share": float(share)}
            | measure.entry(measure.metrics(scores), against=whole)
            | {f"blanked_{kind}s": len(drawn) for kind, drawn in draw.items()}
            | {"blanked_rows": _count(cf, rows, draw)}
        )
    return entries


def new_user_cf(
    method: str,
    cf_folder: str | Path,
    data_dir: str | Path,
    split: str = "test",
    likes: Sequence[int] = LIKES,
    seed: int = 0,
    max_rows: int | None = None,
    *,
    resamples: int = 1000,
) -> list[dict[str, Any]]:
    """As `cold_start.new_user_curve`, for a CF table, which learns nothing of the likes.

    Every number of likes gets the scores of the default user, on the same rows: what knowing the
    candidate alone is worth. Arguments as of `blanked_cf`.

    Raises:
        InputError: a bad folder.
    """
    cf, rows = CFVectors.load(cf_folder).last(), load_prepared(data_dir).splits[split]
    rows = rows.select([row for row, past in enumerate(rows["history"]) if len(past) >= max(likes)])
    rows = rows if max_rows is None else sample_users(rows, max_rows, seed)
    measure = Measure(rows, resamples, seed)
    nobody = replace(cf, user_known=torch.zeros_like(cf.user_known))
    metrics = measure.metrics(_scores(nobody, rows))
    entry = measure.entry(metrics, against=metrics)
    return [{"method": method, "likes": int(number), **entry} for number in likes]


def _without(cf: CFVectors, draw: dict[str, np.ndarray]) -> CFVectors:
    """A copy of the table in which the drawn rows are unknown."""
    flags = {}
    for kind, drawn in draw.items():
        flags[f"{kind}_known"] = getattr(cf, f"{kind}_known").clone()
        flags[f"{kind}_known"][:, torch.from_numpy(drawn)] = False
    return replace(cf, **flags)


def _scores(cf: CFVectors, rows: datasets.Dataset) -> np.ndarray:
    return cf.logits(np.asarray(rows["user_id"]), np.asarray(rows["item_id"])).numpy()


def _count(cf: CFVectors, rows: datasets.Dataset, draw: dict[str, np.ndarray]) -> int:
    items = {cf.item_ids[row] for row in draw["item"].tolist()}
    users = {cf.user_ids[row] for row in draw["user"].tolist()}
    pairs = zip(rows["item_id"], rows["user_id"], strict=True)
    return sum(item in items or user in users for item, user in pairs)
