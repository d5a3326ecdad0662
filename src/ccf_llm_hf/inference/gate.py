"""The gate over the whole catalog: how much comes from text, for which items."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import rankdata

from ccf_llm_hf.data.prepared import read_rows
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor

CHUNK = 1024
RESAMPLES = 200
ITEMS = 8192  # of a larger catalog, this many, evenly spread: means over them are exact enough
# Edges of the popularity classes, in training rows of an item.
EDGES = (0, 1, 10, 100, 1000)


@torch.inference_mode()
def gate_report(
    model: CCFLLMForCTR, processor: CCFLLMProcessor, data_dir: str | Path
) -> dict[str, Any] | None:
    """Share of text in the item slots, over the catalog and by popularity in train.

    Of a catalog of more than `ITEMS` items, as many evenly spread ones are looked at.

    Args:
        model: a `CCFLLMForCTR`.
        processor: its `CCFLLMProcessor`.
        data_dir: folder written by `ccf-llm prepare`.

    Returns:
        `catalog` and `items` (looked at), `mean` and `std` over items and dimensions, `item_std` of
        the items' means, `dimension_std` of the dimensions' means, `spearman` of the items' means
        with their training rows and its 95 % interval `spearman_ci` over items (None where one of
        the two is the same for all), and `by_popularity`, a list of {train_rows, items, mean, std},
        in which items without rows are apart by whether the CF model knows their fields. None for
        models without a gate.

    Raises:
        InputError: the prepared folder is missing or damaged.
    """
    if model.model.gate is None or not processor.uses_slots or not processor.item_ids:
        return None
    catalog = len(processor.item_ids)
    rows = torch.linspace(0, catalog - 1, min(catalog, ITEMS), dtype=torch.float64).round().long()
    parts = [model.item_gates(part.to(model.device)) for part in rows.split(CHUNK)]
    values = torch.cat([part.float().cpu() for part in parts]).numpy()
    seen = read_rows(data_dir, "train")["item_id"].value_counts()
    counts = seen.reindex([processor.item_ids[row] for row in rows.tolist()], fill_value=0)
    known = model.cf.item_known.cpu().numpy()[rows.numpy()]
    return {
        "catalog": catalog,
        "items": len(values),
        **_moments(values),
        "item_std": float(values.mean(axis=1).std()),
        "dimension_std": float(values.mean(axis=0).std()),
        **_correlation(values.mean(axis=1), counts.to_numpy()),
        "by_popularity": _by_popularity(values, counts.to_numpy(), known),
    }


def _correlation(shares: np.ndarray, counts: np.ndarray) -> dict[str, Any]:
    """Spearman's, of ranks once taken, with the bootstrap's interval over items."""
    if np.ptp(shares) == 0 or np.ptp(counts) == 0:
        return {"spearman": None, "spearman_ci": None}
    ranks = np.stack([rankdata(shares), rankdata(counts)])
    draw = np.random.default_rng(0).integers(0, len(shares), (RESAMPLES, len(shares)))
    with np.errstate(invalid="ignore"):  # a resample of one value says nothing
        drawn = [np.corrcoef(ranks[:, rows])[0, 1] for rows in draw]
    return {
        "spearman": float(np.corrcoef(ranks)[0, 1]),
        "spearman_ci": np.nanquantile(drawn, [0.025, 0.975]).tolist(),
    }


def _by_popularity(
    gates: np.ndarray, counts: np.ndarray, known: np.ndarray
) -> list[dict[str, Any]]:
    classes = []
    by_fields = known & (counts == 0)
    if by_fields.any() and (counts[~by_fields] == 0).any():
        part = {"train_rows": "0, known by fields", "items": int(by_fields.sum())}
        classes.append(part | _moments(gates[by_fields]))
        gates, counts = gates[~by_fields], counts[~by_fields]
    for low, high in zip(EDGES, (*EDGES[1:], None), strict=True):
        inside = (counts >= low) & (counts < (np.inf if high is None else high))
        if not inside.any():
            continue
        name = f"{low:,} or more" if high is None else f"{low} to {high - 1}"
        name = str(low) if high is not None and high - 1 == low else name
        classes.append({"train_rows": name, "items": int(inside.sum()), **_moments(gates[inside])})
    return classes


def _moments(gates: np.ndarray) -> dict[str, float]:
    return {"mean": float(gates.mean()), "std": float(gates.std())}
