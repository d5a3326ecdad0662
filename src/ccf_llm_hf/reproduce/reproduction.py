"""How each cell of the results table is trained, scored and measured, and where that is kept."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from ccf_llm_hf.cf.fit import score_cf
from ccf_llm_hf.configs import ReproduceConfig
from ccf_llm_hf.data.assets import load_backbone_path
from ccf_llm_hf.data.prepared import interactions, load_prepared, read_rows
from ccf_llm_hf.evaluation import evaluate_scores, fit_temperature
from ccf_llm_hf.evaluation.controls import as_logits, item_mean, item_user_mean, score_average
from ccf_llm_hf.evaluation.metrics import auc, uauc
from ccf_llm_hf.evaluation.scores import read_scores
from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.inference.score_table import sample_users, score_table, write_scores
from ccf_llm_hf.reproduce.analyses import Subject
from ccf_llm_hf.reproduce.cells import (
    FUSED_CF,
    QUICK_LABELS,
    QUICK_TITLE_LABELS,
    SMOLLM,
    VALIDATION_SAMPLE,
    Cell,
    plan,
)
from ccf_llm_hf.reproduce.folded import folded_scores
from ccf_llm_hf.reproduce.kept_scores import keep_scores, kept_scores
from ccf_llm_hf.reproduce.recent_likes import recent_likes_term, with_term
from ccf_llm_hf.reproduce.table import ROW
from ccf_llm_hf.reproduce.workspace import Workspace
from ccf_llm_hf.training.run import run_recipe
from ccf_llm_hf.training.stage import write_json

MEANS = {"item mean": item_mean, "item + user mean": item_user_mean}
# Every cell is compared with these rows of its track.
COMPARED = {
    "means of the track": "item_and_user_mean",
    "MF": "CF-mf",
    "MF, folded in": "CF_folded_in-mf",
}


@dataclass
class Reproduction:
    """One run of the command.

    Attributes:
        config: what was asked for.
        cells: the whole plan, before `config.only` chose from it.
        workspace: where data, tables, checkpoints and scores are.
        results: where the figures go.
    """

    config: ReproduceConfig
    cells: list[Cell]
    workspace: Workspace
    results: Path

    @classmethod
    def of(cls, config: ReproduceConfig) -> "Reproduction":
        """With the default folders where the configuration names none.

        Raises:
            InputError: an unknown budget or track, or no seeds.
        """
        work = Path(config.work or f"runs/reproduce/{config.dataset}")
        return cls(
            config,
            plan(config.tracks, config.budget, config.seeds, config.dataset),
            Workspace(work, config.dataset, config.offline),
            Path(config.out or f"results/{config.dataset}"),
        )

    def result_file(self, cell: Cell) -> Path:
        """Where a finished cell's figures are."""
        return self.results / "cells" / f"{self.label(cell)}.json"

    def kept_file(self, cell: Cell) -> Path:
        """Where the test scores of a trained cell are that others are compared with."""
        return self.results / "scores" / f"{self.label(cell)}.parquet"

    def label(self, cell: Cell) -> str:
        """Name of the cell's files; a quick cell is another one than a full one."""
        return cell.name + "-quick" * (self.config.budget == "quick" and cell.seeded)

    def row(self, cell: Cell) -> dict[str, str]:
        """What the table groups cells by (`table.ROW`)."""
        budget = {"budget": self.config.budget if cell.seeded else "full"}
        return {key: getattr(cell, key) for key in ROW if key not in budget} | budget

    def folder(self, cell: Cell) -> Path:
        """The cell's folder in the work folder: recipe, checkpoints, scores."""
        return self.workspace.folder / "cells" / self.label(cell)

    def checkpoint(self, cell: Cell) -> Path:
        """The slim checkpoint that the cell's training leaves."""
        return self.folder(cell) / "checkpoint-slim"

    def run(self, cell: Cell) -> dict[str, Any]:
        """Compute a cell, write its result and return it."""
        folder = self.folder(cell)
        folder.mkdir(parents=True, exist_ok=True)
        trained = self.train(cell) if cell.stage is not None else {}
        started = time.monotonic()
        scores = {split: self.scores(cell, split) for split in ("validation", "test")}
        for split, table in scores.items():
            write_scores(table, folder / f"{split}.parquet")
        if cell.seeded and any(cell in self.beside(other).values() for other in self.cells):
            keep_scores(scores["test"], self.kept_file(cell))
        result = {
            "dataset": self.config.dataset,
            **self.row(cell),
            "seed": cell.seed if cell.seeded else None,
            **self.figures(cell, scores),
            **trained,
            # Training counts every sitting of it, which the clock of this one would miss.
            "minutes": round(
                trained.get("trained", {}).get("minutes", 0) + (time.monotonic() - started) / 60,
                2,
            ),
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
            "stages": [self.stage(cell)],
        }

    def stage(self, cell: Cell) -> dict[str, Any]:
        """Settings of the cell's only stage, cut to the budget."""
        assert cell.stage is not None
        sample = {"eval_max_labels": VALIDATION_SAMPLE[cell.titles]}
        stage: dict[str, Any] = {"name": "main", "epochs": 1} | sample | cell.stage
        if self.config.budget == "quick":
            stage["max_train_labels"] = QUICK_TITLE_LABELS if cell.titles else QUICK_LABELS
        if cell.starts_from:
            first = self.same_seed(cell, cell.starts_from)
            stage["init_from"] = str(self.checkpoint(first))
        return stage

    def same_seed(self, cell: Cell, row: str) -> Cell:
        """The planned cell of another row with the seed of `cell`, or the only one of a row whose
        cells do not depend on a seed."""
        wanted = (row, f"{row}-seed{cell.seed}")
        return next(other for other in self.cells if other.name in wanted)

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
            *others, model = (self.scores_of(cell, row, split) for row in cell.average_of)
            pair = ["user_id", "item_id"]
            shared = model[[*pair, "label"]]  # the language model may have scored a sample
            others = [
                shared.merge(other.drop(columns="label"), on=pair, how="left", validate="1:1")
                for other in others
            ]
            return shared.join(as_logits(score_average(*others, model)))
        if cell.recent_likes_of:
            term = recent_likes_term(self.workspace.cf(cell.track, "mf"), data, split)
            return with_term(self.scores_of(cell, cell.recent_likes_of, split), term)
        folder = self.workspace.cf(cell.track, cell.cf)
        if cell.arm == "CF, folded in":
            return keys.join(folded_scores(folder, load_prepared(data).splits[split]))
        return score_cf(folder, data, split)

    def scores_of(self, cell: Cell, row: str, split: str) -> pd.DataFrame:
        """What the cell of another row, which `cell` is made of, has scored."""
        other = self.same_seed(cell, row)
        if not other.seeded:
            return self.control_scores(other, split)
        return read_scores(self.folder(other) / f"{split}.parquet")

    def control_scores(self, cell: Cell, split: str) -> pd.DataFrame:
        """The scores of a cell without a language model, which may have been computed elsewhere:
        computed again where they are not in the work folder."""
        file = self.folder(cell) / f"{split}.parquet"
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            write_scores(self.scores(cell, split), file)
        return read_scores(file)

    def builds_on(self, cell: Cell) -> list[Cell]:
        """The trained cells whose checkpoint or scores this one is made of."""
        rows = (cell.starts_from, cell.recent_likes_of, *cell.average_of)
        others = (self.same_seed(cell, row) for row in rows if row)
        return [other for other in others if other.seeded]

    def beside(self, cell: Cell) -> dict[str, Cell]:
        """The cells that this one is compared with besides the controls, by name: the gate over MF
        with the same seed, and the row that it stands beside."""
        method = next((other for other in self.cells if other.is_the_method_for(cell)), None)
        row = self.same_seed(cell, cell.beside) if cell.beside else None
        return ({"gate": method} if method else {}) | ({row.arm: row} if row else {})

    def needs(self, cell: Cell) -> list[str]:
        """Names of the cells that are to be finished before this one, where they are computed."""
        return [other.name for other in (*self.builds_on(cell), *self.beside(cell).values())]

    def make_inputs(self, cells: Sequence[Cell]) -> None:
        """Prepare the data, the tables and the controls' scores that cells share, so that those
        computed at the same time find them."""
        for cell in cells:
            self.workspace.data(cell.track)
            if cell.cf:
                self.workspace.cf(cell.track, cell.cf)
            self.comparisons(cell)

    def model_scores(self, cell: Cell, split: str) -> pd.DataFrame:
        """A split's scores by the cell's checkpoint, in full precision; of validation the quick
        budget scores a sample of users."""
        backbone, _ = load_backbone_path(cell.backbone, offline=self.config.offline)
        model, processor = load_checkpoint(str(self.checkpoint(cell)), backbone=backbone)
        rows = load_prepared(self.workspace.data(cell.track)).splits[split]
        if split == "validation" and self.config.budget == "quick":
            rows = sample_users(rows, VALIDATION_SAMPLE[cell.titles])
        return score_table(model, processor, rows)

    def known_rows(self, track: str) -> pd.DataFrame:
        """The labels that a track's means are taken over."""
        data = self.workspace.data(track)
        if track == "protocol":
            return read_rows(data, "train")
        start = read_rows(data, "validation")["timestamp"].min()
        rows = interactions(data)
        return rows[rows["timestamp"] < start]

    def is_here(self, cell: Cell) -> bool:
        """Whether the cell is finished and what it left is in the work folder; the scores of a
        control can be computed again."""
        left = [self.result_file(cell)]
        left += [self.folder(cell) / "test.parquet"] if cell.seeded else []
        left += [self.checkpoint(cell)] if cell.stage is not None else []
        return all(path.exists() for path in left)

    def made_otherwise(self, cell: Cell) -> list[str]:
        """Settings of the planned stage that a finished cell was not trained with."""
        if cell.stage is None or not self.result_file(cell).is_file():
            return []
        recipe = json.loads(self.result_file(cell).read_text(encoding="utf-8")).get("recipe", {})
        keys = recipe.keys() | cell.stage.keys()
        return sorted(key for key in keys if recipe.get(key) != cell.stage.get(key))

    def subject(self, cell: Cell) -> Subject:
        """A finished cell, as the analyses take it."""
        if cell.stage is None:
            table = self.workspace.cf(cell.track, cell.cf)
            for split in ("validation", "test"):
                self.control_scores(cell, split)
            return Subject("MF", self.folder(cell), self.result_file(cell), cf=table)
        backbone, _ = load_backbone_path(cell.backbone, offline=self.config.offline)
        usual = ("", "mf", SMOLLM)
        details = [part for part in (cell.training, cell.cf, cell.backbone) if part not in usual]
        return Subject(
            f"{cell.arm} ({', '.join(details)})",
            self.folder(cell),
            self.result_file(cell),
            self.checkpoint(cell),
            backbone,
        )

    def figures(self, cell: Cell, scores: dict[str, pd.DataFrame]) -> dict[str, Any]:
        """Validation and test figures; probabilities are calibrated on validation."""
        validation, test = scores["validation"], scores["test"]
        temperature = float(fit_temperature(validation["score"], validation["label"]))
        test = test.assign(prob=1 / (1 + np.exp(-test["score"] / temperature)))
        compared = self.comparisons(cell)
        report = evaluate_scores(
            test, self.workspace.data(cell.track), "test", compared, name=cell.name
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
                | part["methods"].get(cell.name, {})  # a slice without rows has none
                for name, part in report["slices"].items()
            },
            "differences": {name: report["differences"][name] for name in compared},
            "reliability": report["reliability"],
        }

    def comparisons(self, cell: Cell) -> dict[str, pd.DataFrame]:
        """Test scores of the track's controls, by name, of the CF model that a cell fuses where
        that is another than MF, and of the rows `beside` it, trained ones where they have been
        computed here; a control is compared with the other controls."""
        rows = {f"{cell.track}-{row}": name for name, row in COMPARED.items()}
        if cell.stage is not None and cell.cf in FUSED_CF[1:]:
            rows[f"{cell.track}-CF-{cell.cf}"] = "its CF alone"
        found = {
            rows[other.name]: self.control_scores(other, "test")
            for other in self.cells
            if other.name in rows and other.name != cell.name
        }
        for name, row in self.beside(cell).items():
            if not row.seeded:
                found[name] = self.control_scores(row, "test")
            elif self.is_here(row):
                found[name] = read_scores(self.folder(row) / "test.parquet")
            elif self.result_file(row).is_file() and self.kept_file(row).is_file():
                result = json.loads(self.result_file(row).read_text(encoding="utf-8"))
                rows_of_test = read_rows(self.workspace.data(cell.track), "test")
                found[name] = kept_scores(self.kept_file(row), rows_of_test, result["test"]["auc"])
        return found
