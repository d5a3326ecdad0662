"""A tiny table: a synthetic prepared folder, a fast MF, and a model that scores by chance."""

import functools
from pathlib import Path
from typing import Any

import measure
import numpy as np
import pandas as pd
import pytest
import rows
import run
from prepared_folder import make_rows, write_prepared

from ccf_llm_hf.cf.config import MFConfig
from ccf_llm_hf.data.prepared import read_rows
from ccf_llm_hf.io import write_text

STRENGTHS: dict[str, Any] = {"l2_factors": 2.0, "l2_user_bias": 1.0, "l2_item_bias": 1.0}
FAST = MFConfig(dim=2, cross_fit="snapshots", snapshots=1, **STRENGTHS)


def rated_once() -> pd.DataFrame:
    """Rows in which a user rates an item once, as in real ratings."""
    return make_rows(1200).drop_duplicates(["user_id", "item_id"])


class World:
    """Where a table is computed, and the cells that were trained there."""

    def __init__(self, folder: Path) -> None:
        self.work, self.results = folder / "work", folder / "results"
        self.trained: list[str] = []
        write_prepared(self.work / "data-protocol", rated_once())

    def run(self, *flags: str) -> int:
        """The command on the protocol track; `trained` then tells what it did."""
        self.trained.clear()
        folders = ("--out", str(self.results), "--work", str(self.work))
        return run.main(["synthetic", "--tracks", "protocol", *folders, *flags])

    def bench(self, seeds: int = 1, quick: bool = False) -> measure.Bench:
        """As the command makes it."""
        cells = rows.plan("synthetic", ["protocol"], seeds, quick)
        return measure.Bench("synthetic", cells, self.work, self.results)

    def cells(self) -> dict[str, dict[str, Any]]:
        """The results, by cell."""
        return {cell["cell"]: cell for cell in rows.read_cells(self.results)}

    def train(self, bench: measure.Bench, cell: rows.Cell) -> dict[str, Any]:
        """In place of `Bench.train`: leaves an empty checkpoint."""
        self.trained.append(cell.name)
        write_text(bench.checkpoint(cell) / "config.json", "{}")
        made = {"versions": {"torch": "2"}, "hardware": {"cpus": 2}, "minutes": 2.0}
        return {"backbone": "tiny", "settings": cell.stage, "train_labels": 9} | made


def scores_by_chance(bench: measure.Bench, cell: rows.Cell, split: str) -> pd.DataFrame:
    """In place of `Bench.model_scores`: labels under noise, another of each cell."""
    keys = read_rows(bench.data(cell.track), split)[["user_id", "item_id", "label"]]
    draw = np.random.default_rng(list(cell.name.encode()))
    logits = keys["label"] + draw.normal(size=len(keys))
    return keys.assign(score=logits, prob=1 / (1 + np.exp(-logits)))


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A data set of the main rows, whose cells take no time."""
    here = World(tmp_path)
    tables = {
        "mf": ("mf", FAST),
        "mf_nobias": (
            "mf",
            MFConfig(dim=2, use_biases=False, l2_factors=2.0, cross_fit="snapshots", snapshots=1),
        ),
    }
    monkeypatch.setattr(measure, "TABLES", {"protocol": tables})
    monkeypatch.setitem(rows.DATASETS, "synthetic", ("protocol",))
    monkeypatch.setattr(measure.Bench, "train", lambda bench, cell: here.train(bench, cell))
    monkeypatch.setattr(measure.Bench, "model_scores", scores_by_chance)
    few = functools.partial(measure.evaluate_scores, resamples=50)
    monkeypatch.setattr(measure, "evaluate_scores", few)
    return here
