"""The CF model alone, with users folded in from their signed histories: a control of its own."""

from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.modeling.catalog_ccf_llm import cf_settings
from ccf_llm_hf.modeling.cf_table_ccf_llm import CFTable
from ccf_llm_hf.modeling.configuration_ccf_llm import CCFLLMConfig

ROWS_AT_ONCE = 256


def folded_scores(
    cf_folder: str | Path, split: datasets.Dataset, decay: float = 1.0
) -> pd.DataFrame:
    """Logits of a split's rows by the last snapshot, each user's vector solved for from the signed
    history that is stored with the row.

    Args:
        cf_folder: a table fitted by `fit-cf mf`.
        split: rows of a folder prepared with signed histories.
        decay: weight of a history item over that of the next later one.

    Returns:
        `score` and `prob`, in row order.

    Raises:
        InputError: the histories are not signed, or the table has no prior over users.
    """
    cf = CFVectors.load(cf_folder).last()
    if "history_labels" not in split.column_names or cf.user_precision is None:
        raise InputError(
            "folding users in needs signed histories (ccf-llm prepare --histories signed) "
            f"and a CF table by ccf-llm fit-cf mf; {cf_folder} or the data is another"
        )
    table = CFTable(CCFLLMConfig(**cf_settings(cf), fold_in_decay=decay))
    table.fill(cf)
    index = {item: row for row, item in enumerate(cf.item_ids)}
    parts = [
        _logits(table, index, cf.rating_scale, split[start : start + ROWS_AT_ONCE])
        for start in range(0, len(split), ROWS_AT_ONCE)
    ]
    logits = torch.cat(parts).double()
    return pd.DataFrame({"score": logits.numpy(), "prob": logits.sigmoid().numpy()})


def _logits(
    table: CFTable,
    index: dict[str, int],
    scale: tuple[float, float] | None,
    rows: dict[str, list],
) -> Tensor:
    lengths = torch.tensor([len(history) for history in rows["history"]])
    shape = (len(lengths), max(1, int(lengths.max())))
    items, targets = np.full(shape, -1), np.zeros(shape, dtype=np.float32)
    values = rows["history_labels" if scale is None else "history_ratings"]
    for row, (history, given) in enumerate(zip(rows["history"], values, strict=True)):
        items[row, : len(history)] = [index[item] for item in history]
        targets[row, : len(history)] = (
            given if scale is None else 1 / (1 + np.exp(-scale[1] * (np.array(given) - scale[0])))
        )
    last = torch.zeros(len(lengths), dtype=torch.long)
    users = table.folded_users(torch.from_numpy(items), torch.from_numpy(targets), lengths, last)
    candidates = torch.tensor([index[item] for item in rows["item_id"]])
    return table.folded_logits(users, candidates, last)
