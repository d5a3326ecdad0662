"""`ccf-llm reproduce`: train and score every cell of the results table that has no result yet."""

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ccf_llm_hf.cf.scoring import load_scores
from ccf_llm_hf.configs import ReproduceConfig
from ccf_llm_hf.data.assets import load_backbone_path
from ccf_llm_hf.data.prepared import interactions, load_prepared
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation import evaluate_scores, fit_temperature
from ccf_llm_hf.evaluation.controls import item_mean, item_user_mean, score_average
from ccf_llm_hf.evaluation.metrics import auc, uauc
from ccf_llm_hf.evaluation.rows import read_rows
from ccf_llm_hf.evaluation.scores import read_scores
from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.inference.score_table import score_table, write_scores
from ccf_llm_hf.reproduce.cells import QUICK_LABELS, QUICK_TITLE_LABELS, Cell, plan
from ccf_llm_hf.reproduce.folded import folded_scores
from ccf_llm_hf.reproduce.table import write_table
from ccf_llm_hf.reproduce.workspace import Workspace
from ccf_llm_hf.training.run import run_recipe
from ccf_llm_hf.training.stage import write_json

MEANS = {"item mean": item_mean, "item + user mean": item_user_mean}
# Every cell is compared with these rows of its track, as far as they are there.
COMPARED = {
    "means of the track": "item_and_user_mean",
    "MF": "CF-mf",
    "MF, folded in": "CF_folded_in-mf",
}


@dataclass
class Reproduction:
    """The cells of one data set, where they are computed, and where their results go."""

    config: ReproduceConfig
    workspace: Workspace
    results: Path

    def result_file(self, cell: Cell) -> Path:
        """Where a finished cell's figures are."""
        return self.results / "cells" / f"{self.label(cell)}.json"

    def label(self, cell: Cell) -> str:
        """Name of the cell's files; a quick cell is another one than a full one."""
        return cell.name + "-quick" * (self.config.budget == "quick" and cell.seeded)

    def folder(self, cell: Cell) -> Path:
        """The cell's folder in the work folder: recipe, checkpoints, scores."""
        return self.workspace.folder / "cells" / self.label(cell)

    def run(self, cell: Cell) -> dict[str, Any]:
        """Compute a cell, write its result and return it."""
        started = time.monotonic()
        folder = self.folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        trained = self.train(cell) if cell.stage is not None else {}
        scores = {split: self.scores(cell, split) for split in ("validation", "test")}
        for split, table in scores.items():
            write_scores(table, folder / f"{split}.parquet")
        result = {
            **{key: getattr(cell, key) for key in ("track", "arm", "cf", "training", "backbone")},
            "seed": cell.seed if cell.seeded else None,
            "budget": self.config.budget if cell.seeded else "full",
            **self.figures(cell, scores),
            **trained,
            "minutes": round((time.monotonic() - started) / 60, 2),
        }
        self.result_file(cell).parent.mkdir(parents=True, exist_ok=True)
        write_json(self.result_file(cell), result)
        return result

    def train(self, cell: Cell) -> dict[str, Any]:
        """Run the cell's recipe; what was trained, on what, and how fast."""
        folder = self.folder(cell)
        recipe = folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(self.recipe(cell), sort_keys=False))
        run_recipe(["--config", str(recipe)])
        record = json.loads((folder / "training.json").read_text())
        stage = record["stages"]["main"]
        kept = ("train_labels", "labels_per_second", "trainable_parameters", "best_step", "steps")
        return {
            "trained": {key: stage[key] for key in kept} | {"minutes": record["minutes"]},
            "recipe": cell.stage,
            **{key: record[key] for key in ("versions", "hardware")},
        }

    def recipe(self, cell: Cell) -> dict[str, Any]:
        """The recipe file of a cell, one stage."""
        assert cell.stage is not None
        stage: dict[str, Any] = {"name": "main", "epochs": 1} | cell.stage
        if self.config.budget == "quick":
            stage["max_train_labels"] = QUICK_TITLE_LABELS if cell.titles else QUICK_LABELS
            stage["eval_max_labels"] = 1_500 if cell.titles else 3_000
        if cell.starts_from:
            start = self.folder(self.other(cell, cell.starts_from)) / "checkpoint-slim"
            if not start.is_dir():
                raise InputError(
                    f"{cell.name} starts from {cell.starts_from}, whose checkpoint is not in "
                    f"{start}: delete that row's result and run it again here"
                )
            stage["init_from"] = str(start)
        return {
            "data_dir": str(self.workspace.data(cell.track)),
            "cf_dir": str(self.workspace.cf(cell.track, cell.cf)) if cell.cf else "",
            "output_dir": str(self.folder(cell)),
            "backbone": cell.backbone,
            "seed": cell.seed,
            "precision": "auto",
            "offline": self.config.offline,
            "full_checkpoint": False,
            "use_cf_snapshots": cell.use_cf_snapshots,
            "stages": [stage],
        }

    def other(self, cell: Cell, row: str) -> Cell:
        """The cell of another row with this one's seed."""
        (found,) = [
            other
            for other in plan([cell.track], "full", cell.seed + 1, "ml-1m")
            if other.row == row
            and other.seed in (cell.seed, 0)
            and other.name != cell.name
            and (not other.seeded or other.seed == cell.seed)
        ]
        return found

    def scores(self, cell: Cell, split: str) -> pd.DataFrame:
        """A split's scores by the cell's method: user_id, item_id, label, score, prob."""
        data = self.workspace.data(cell.track)
        rows = read_rows(data, split)
        keys = rows[["user_id", "item_id", "label"]].reset_index(drop=True)
        if cell.stage is not None:
            return self.model_scores(cell, split)
        if cell.arm in MEANS:
            return keys.join(MEANS[cell.arm](self.known_rows(cell.track), rows))
        if cell.average_of:
            pair = [
                read_scores(self.folder(self.other(cell, row)) / f"{split}.parquet")
                for row in cell.average_of
            ]
            return keys.join(score_average(*pair))
        folder = self.workspace.cf(cell.track, cell.cf)
        if cell.arm == "CF, folded in":
            return keys.join(folded_scores(folder, load_prepared(data).splits[split]))
        return load_scores(folder, data, split)

    def model_scores(self, cell: Cell, split: str) -> pd.DataFrame:
        """A split's scores by the cell's checkpoint, in full precision."""
        backbone, _ = load_backbone_path(cell.backbone, offline=self.config.offline)
        model, processor = load_checkpoint(
            str(self.folder(cell) / "checkpoint-slim"), backbone=backbone
        )
        prepared = load_prepared(self.workspace.data(cell.track))
        return score_table(model, processor, prepared.splits[split])

    def known_rows(self, track: str) -> pd.DataFrame:
        """The labels that a track's means are taken over."""
        data = self.workspace.data(track)
        if track == "protocol":
            return read_rows(data, "train")
        start = read_rows(data, "validation")["timestamp"].min()
        rows = interactions(data)
        return rows[rows["timestamp"] < start]

    def figures(self, cell: Cell, scores: dict[str, pd.DataFrame]) -> dict[str, Any]:
        """Validation and test figures; probabilities are calibrated on validation."""
        validation, test = scores["validation"], scores["test"]
        temperature = float(fit_temperature(validation["score"], validation["label"]))
        test = test.assign(prob=1 / (1 + np.exp(-test["score"] / temperature)))
        report = evaluate_scores(
            test, self.workspace.data(cell.track), "test", self.comparisons(cell), name=cell.name
        )
        return {
            "validation": {
                "auc": float(auc(validation["label"], validation["score"])),
                "uauc": float(uauc(*(validation[key] for key in ("label", "score", "user_id")))),
            },
            "temperature": temperature,
            "test": report["methods"][cell.name],
            "slices": {
                name: {"definition": part["definition"], "rows": part["rows"]}
                | part["methods"][cell.name]
                for name, part in report["slices"].items()
            },
            "differences": {name: report["differences"][name] for name in self.comparisons(cell)},
            "reliability": report["reliability"],
        }

    def comparisons(self, cell: Cell) -> dict[str, pd.DataFrame]:
        """Test scores of the track's controls, by name, as far as they are here."""
        files = {
            name: self.workspace.folder / "cells" / f"{cell.track}-{row}" / "test.parquet"
            for name, row in COMPARED.items()
        }
        return {
            name: read_scores(file)
            for name, file in files.items()
            if file.is_file() and file.parent.name != cell.name
        }


def reproduce(config: ReproduceConfig) -> list[dict[str, Any]]:
    """Compute the cells of a data set that have no result yet, then write the table.

    Args:
        config: see `ReproduceConfig`.

    Returns:
        The rows of `table.json`.

    Raises:
        InputError: an unknown budget, track or cell, or what preparing and training raise.
    """
    results = Path(config.out or f"results/{config.dataset}")
    work = Path(config.work or f"runs/reproduce/{config.dataset}")
    here = Reproduction(config, Workspace(work, config.dataset, config.offline), results)
    cells = chosen(plan(config.tracks, config.budget, config.seeds, config.dataset), config.only)
    left = [cell for cell in cells if not here.result_file(cell).is_file()]
    say(f"{len(cells)} cells, {len(cells) - len(left)} of them done")
    for number, cell in enumerate(left, 1):
        say(f"cell {number}/{len(left)}: {here.label(cell)}")
        result = here.run(cell)
        test = result["test"]
        say(f"  test AUC {test['auc']:.4f} UAUC {test['uauc']:.4f}, {result['minutes']:.1f} min")
        write_table(results)
    return write_table(results)


def chosen(cells: Sequence[Cell], only: Sequence[str]) -> list[Cell]:
    """The cells whose name contains one of `only`; all if that is empty.

    Raises:
        InputError: one of them is in no cell's name.
    """
    for text in only:
        if not any(text in cell.name for cell in cells):
            raise InputError(
                f"--only {text!r} is in no cell's name; names are like {cells[-1].name}"
            )
    return [cell for cell in cells if not only or any(text in cell.name for text in only)]


def say(line: str) -> None:
    """Progress goes to stderr: stdout is for the table."""
    print(line, file=sys.stderr, flush=True)


__all__ = ["reproduce"]
