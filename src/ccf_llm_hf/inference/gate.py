"""The gate over the whole catalog: how much comes from text, for which items."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ccf_llm_hf.data.prepared import read_rows
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor

CHUNK = 1024
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
        the items' means, `dimension_std` of the dimensions' means, and `by_popularity`, a list of
        {train_rows, items, mean, std}. None for models without a gate.

    Raises:
        InputError: the prepared folder is missing or damaged.
    """
    if model.model.gate is None or not processor.uses_slots or not processor.item_ids:
        return None
    catalog = len(processor.item_ids)
    rows = torch.linspace(0, catalog - 1, min(catalog, ITEMS), dtype=torch.float64).round().long()
    parts = [model.item_gates(part.to(model.device)) for part in rows.split(CHUNK)]
    values = torch.cat([part.float().cpu() for part in parts]).numpy()
    item_ids = [processor.item_ids[row] for row in rows.tolist()]
    return {
        "catalog": catalog,
        "items": len(values),
        **_moments(values),
        "item_std": float(values.mean(axis=1).std()),
        "dimension_std": float(values.mean(axis=0).std()),
        "by_popularity": _by_popularity(values, item_ids, data_dir),
    }


def _by_popularity(
    gates: np.ndarray, item_ids: list[str], data_dir: str | Path
) -> list[dict[str, Any]]:
    seen = read_rows(data_dir, "train")["item_id"].value_counts()
    counts = seen.reindex(item_ids, fill_value=0).to_numpy()
    classes = []
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
