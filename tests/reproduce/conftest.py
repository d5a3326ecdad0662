"""A tiny world in which whole tables are reproduced: prepared folders, fast CF, a random Llama."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ccf_llm_hf.cf.config import MFConfig
from ccf_llm_hf.configs import ReproduceConfig
from ccf_llm_hf.data.config import PrepareConfig
from ccf_llm_hf.data.prepare import prepare
from ccf_llm_hf.reproduce import cells, reproduction, run, workspace
from ccf_llm_hf.reproduce.cells import Cell

STRENGTHS = {"l2_factors": 2.0, "l2_user_bias": 1.0, "l2_item_bias": 1.0}
TABLES = {
    "protocol": {"mf": ("mf", MFConfig(dim=4, cross_fit="snapshots", snapshots=3, **STRENGTHS))},
    "open": {
        "mf": (
            "mf",
            MFConfig(
                dim=4,
                cross_fit="snapshots",
                snapshots=2,
                rows="earlier",
                targets="graded",
                **STRENGTHS,
            ),
        )
    },
}
# Of the real rows, one of every kind.
PROTOCOL = (
    ("item mean", ""),
    ("CF", ""),
    ("CF, recent likes", ""),
    ("text_only", "LoRA"),
    ("gate", "joint"),
    ("gate", "two-stage"),
    ("average of CF and text_only", "LoRA"),
)
SMALL = {"labels_per_step": 32, "history_window": [4, 3]}


def write_ratings(file: Path) -> Path:
    """16 users rate 20 of 24 films each, by hidden tastes; the last user and film come late."""
    draw = np.random.default_rng(0)
    users, items = draw.normal(size=(16, 3)), draw.normal(size=(24, 3))
    lines = ["user_id,item_id,title,rating,timestamp"]
    for user in range(16):
        for item in draw.permutation(24)[:20]:
            liked = users[user] @ items[item] + 0.5 * items[item, 0] + 0.1 > 0
            time = draw.integers(800_000 if user == 15 or item == 23 else 0, 1_000_000)
            lines.append(f"u{user},i{item},Film {item},{4 if liked else 2},{time}")
    file.write_text("\n".join(lines) + "\n")
    return file


def of_every_kind() -> list[Cell]:
    """The rows of `PROTOCOL`, and of the open track those without a language model."""
    rows = [row for row in cells.protocol_rows() if row.cf in ("", "mf")]
    rows = [row for row in rows if row.backbone != cells.GEMMA]
    rows = [row for row in rows if (row.arm, row.training) in PROTOCOL]
    rows += [row for row in cells.open_rows() if not row.seeded]
    return [cells.replace(row, stage=row.stage and row.stage | SMALL) for row in rows]


@dataclass
class World:
    """Where a table is reproduced, and what was trained and scored there, by cell."""

    folder: Path
    trained: list[str] = field(default_factory=list)
    scored: list[str] = field(default_factory=list)

    @property
    def work(self) -> Path:
        return self.folder / "work"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def config(self, **changes: Any) -> ReproduceConfig:
        out, work = str(self.results), str(self.work)
        return ReproduceConfig(**{"dataset": "ml-100k", "out": out, "work": work, **changes})

    def reproduce(self, **changes: Any) -> list[dict[str, Any]]:
        """Run the command; `trained` and `scored` then tell what it did."""
        self.trained, self.scored = [], []
        return run.reproduce(self.config(**changes))

    def result(self, cell: str) -> dict[str, Any]:
        """What the result file of a cell holds."""
        return json.loads((self.results / "cells" / f"{cell}.json").read_text())


@pytest.fixture(scope="module")
def rows(world: "World") -> list[dict[str, Any]]:
    """The whole tiny table."""
    return world.reproduce(budget="quick")


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory, backbone_folder: Callable[[str], Path]
) -> Iterator[World]:
    """A world in which every planned cell is tiny; the current folder is in it."""
    here = World(tmp_path_factory.mktemp("world"))
    ratings = write_ratings(here.folder / "ratings.csv")
    for track, kept in (("protocol", "likes"), ("open", "signed")):
        options = {
            "histories": kept,
            "out": str(here.work / f"data-{track}"),
            "name": "ml-100k",
        }
        source = {"source": "table", "interactions": str(ratings), "rating_column": "rating"}
        prepare(PrepareConfig(**source, ratios=[0.5, 0.25, 0.25], **options), summary=False)
    shutil.copytree(backbone_folder("llama"), here.folder / "tiny")
    before = Path.cwd()
    os.chdir(here.folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "SMOLLM", "tiny")
        patch.setattr(reproduction, "SMOLLM", "tiny")
        patch.setattr(workspace, "TABLES", TABLES)
        patch.setattr(reproduction, "QUICK_LABELS", 96)
        patch.setattr(reproduction, "QUICK_TITLE_LABELS", 64)
        patch.setattr(run, "QUICK_ANALYZED_ROWS", 60)
        patch.setattr(reproduction, "plan", plan_of_every_kind)
        _record(patch, here)
        yield here
    os.chdir(before)


def plan_of_every_kind(tracks: list[str], budget: str, seeds: int, dataset: str) -> list[Cell]:
    """As `cells.plan`, of the rows above."""
    cells.plan(tracks, budget, seeds, dataset)  # refuses what it would refuse
    real = cells.plan(tracks, "full", seeds, "ml-1m")
    small = {row.row: row for row in of_every_kind()}
    return [cells.replace(cell, stage=small[cell.row].stage) for cell in real if cell.row in small]


def _record(patch: pytest.MonkeyPatch, here: World) -> None:
    train, scores = reproduction.Reproduction.train, reproduction.Reproduction.scores

    def recorded_train(self: reproduction.Reproduction, cell: Cell) -> dict[str, Any]:
        here.trained.append(cell.name)
        return train(self, cell)

    def recorded_scores(self: reproduction.Reproduction, cell: Cell, split: str) -> Any:
        here.scored.append(cell.name)
        return scores(self, cell, split)

    patch.setattr(reproduction.Reproduction, "train", recorded_train)
    patch.setattr(reproduction.Reproduction, "scores", recorded_scores)
