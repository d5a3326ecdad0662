"""The histories of a split's rows, as SASRec reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from ccf_llm_hf.cf.sasrec_encoder import SASRecEncoder
from ccf_llm_hf.data.prepared import read_history_column


@dataclass
class Histories:
    """Histories of n rows, each distinct one once.

    Attributes:
        distinct: places of the liked items in the catalog, oldest first; -1 is none of its items.
        row: `(n,)` int64, which of them each row has.
    """

    distinct: list[np.ndarray]
    row: Tensor

    def states(self, encoder: SASRecEncoder) -> Tensor:
        """The state `(n, dim)` of each row."""
        return encoder.states(self.distinct)[self.row]


def read_histories(
    data_dir: str | Path, split: str, item_ids: Sequence[str] | pd.Series, max_history: int
) -> Histories:
    """The last `max_history` likes before each row of a split of a prepared folder.

    Raises:
        InputError: no such folder or split, or the file holds no histories.
    """
    catalog = {item: place for place, item in enumerate(item_ids)}
    places: dict[tuple[str, ...], int] = {}
    rows = [
        places.setdefault(tuple(history[-max_history:]), len(places))
        for history in read_history_column(data_dir, split)
    ]
    distinct = [
        np.array([catalog.get(item, -1) for item in history], dtype=np.int64) for history in places
    ]
    return Histories(distinct, torch.tensor(rows, dtype=torch.int64))
