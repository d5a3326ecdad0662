"""How a cell is trained, scored and measured, and where what it leaves is kept."""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
import yaml
from rows import (
    BACKBONE,
    CELLS_FILE,
    COMPARED,
    QUICK_LABELS,
    QUICK_TITLE_LABELS,
    SAMPLED_ROWS,
    SAMPLED_USERS,
    VALIDATION_SAMPLE,
    Cell,
    read_cells,
    row_of,
)

from ccf_llm_hf.cf.config import CFConfig, LightGCNConfig, MFConfig, SASRecConfig
from ccf_llm_hf.cf.fit import fit_cf, score_cf
from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.data.assets import load_backbone_path
from ccf_llm_hf.data.config import PrepareConfig
from ccf_llm_hf.data.hashing import hash_ids, hash_pairs
from ccf_llm_hf.data.prepare import prepare
from ccf_llm_hf.data.prepared import (
    PROTOCOL_FILE,
    earlier_interactions,
    load_prepared,
    load_protocol,
    read_rows,
)
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation import (
    evaluate_scores,
    fit_temperature,
    item_mean,
    item_user_mean,
    linear_hybrid,
)
from ccf_llm_hf.evaluation.controls import as_logits, score_average
from ccf_llm_hf.evaluation.metrics import auc, uauc
from ccf_llm_hf.evaluation.scores import read_scores
from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.inference.score_table import sample_users, score_table, write_scores
from ccf_llm_hf.io import write_text
from ccf_llm_hf.modeling.configuration_ccf_llm import CCFLLMConfig
from ccf_llm_hf.modeling.modeling_ccf_llm import CFTable
from ccf_llm_hf.training.run import run_recipe

# Of a signed history the table needs what the prompt shows and what is folded in besides.
PREPARED: dict[str, dict[str, Any]] = {
    "protocol": {},
    "open": {"histories": "signed", "max_history": 256},
    "frozen": {"histories": "signed", "max_history": 64},
}
# By track and name: which CF model, fitted how. Where there are times training rows see snapshots,
# as they did for the committed figures. The open track's strengths are the best of those tried for
# users folded in, on validation (results/ml-1m/experiments.md); the grid of `fit-cf` looks at users
# of the table. Most ratings lie before its first snapshot: few snapshots will do. On Book-Crossing
# fewer than 16 factors are other than zero.
TABLES: dict[str, dict[str, tuple[str, CFConfig]]] = {
    "protocol": {
        "mf": ("mf", MFConfig(cross_fit="snapshots")),
        "mf_nobias": ("mf", MFConfig(use_biases=False, cross_fit="snapshots", snapshots=1)),
        "lightgcn": ("lightgcn", LightGCNConfig(cross_fit="snapshots")),
        "sasrec": ("sasrec", SASRecConfig()),
    },
    "open": {
        "mf": (
            "mf",
            MFConfig(
                rows="earlier",
                targets="graded",
                cross_fit="snapshots",
                snapshots=8,
                l2_factors=5.0,
                l2_user_bias=5.0,
                l2_item_bias=0.3,
            ),
        ),
    },
    "frozen": {
        "mf": ("mf", MFConfig(dim=16)),
        "mf_nobias": ("mf", MFConfig(dim=16, use_biases=False)),
        "mf_fields": (
            "mf",
            MFConfig(dim=16, item_fields=["author", "publisher"], cross_fit="users"),
        ),
    },
}
MEANS = {"item mean": item_mean, "item + user mean": item_user_mean}
MEASURED = ("auc", "auc_ci", "uauc", "uauc_ci", "logloss", "ece", "rows", "users")
FOLDED_AT_ONCE = 256  # rows whose users are folded in together: memory, not results


@dataclass
class Bench:
    """Where the cells of one data set are computed.

    Attributes:
        dataset: source of `ccf-llm prepare`.
        cells: the whole plan.
        work: prepared data (`data-*`), CF tables (`cf-*`), checkpoints and scores (`cells/*`); none
            of it belongs into git.
        results: where the figures go.
        offline: use no network.
    """

    dataset: str
    cells: list[Cell]
    work: Path
    results: Path
    offline: bool = False

    def folder(self, cell: Cell) -> Path:
        """The cell's folder in the work folder: recipe, checkpoints, scores."""
        return self.work / "cells" / cell.name

    def checkpoint(self, cell: Cell) -> Path:
        """The slim checkpoint that the cell's training leaves."""
        return self.folder(cell) / "checkpoint-slim"

    def data(self, track: str) -> Path:
        """The prepared folder of a track, made where it is missing.

        Raises:
            InputError: it is of another data set.
        """
        folder = self.work / f"data-{track}"
        if not (folder / PROTOCOL_FILE).is_file():
            source = {"source": self.dataset, "offline": self.offline}
            prepare(PrepareConfig(out=str(folder), **source, **PREPARED[track]))
        if (found := load_protocol(folder).get("name")) != self.dataset:
            raise InputError(
                f"{folder} holds {found}, not {self.dataset}: name another work folder (--work)"
            )
        return folder

    def cf(self, track: str, name: str) -> Path:
        """The folder of a CF table of `TABLES`, fitted where it is missing."""
        folder = self.work / f"cf-{track}-{name}"
        if not (folder / "cf_embeddings.safetensors").is_file():
            kind, config = TABLES[track][name]
            fit_cf(kind, self.data(track), folder, config)
        return folder

    def run(self, cell: Cell) -> dict[str, Any]:
        """Compute a cell, put its result into the data file, and return it."""
        trained = self.train(cell) if cell.stage is not None else {}
        started = time.monotonic()
        scores = {split: self.scored(cell, split) for split in ("validation", "test")}
        figures = self.figures(cell, scores)
        # Training counts every sitting of it, which the clock of this one would miss.
        minutes = trained.pop("minutes", 0.0) + (time.monotonic() - started) / 60
        result = _rounded(
            {"cell": cell.name, "dataset": self.dataset, **row_of(cell), "seed": cell.seed}
            | figures
            | trained
            | {"minutes": round(minutes, 2)}
        )
        self.record(result)
        return result

    def scored(self, cell: Cell, split: str) -> pd.DataFrame:
        """A split's scores, written when they are there: a model's take hours, and are not computed
        again unless it was trained again since."""
        file = self.folder(cell) / f"{split}.parquet"
        trained = self.folder(cell) / "stages" / "main" / "stage.json"
        there = trained.is_file() and file.is_file()
        if there and file.stat().st_mtime > trained.stat().st_mtime:
            return read_scores(file)
        table = self.scores(cell, split)
        write_scores(table, file)
        return table

    def record(self, result: dict[str, Any]) -> None:
        """Add a result to the data file, in place of an older one of the same cell."""
        kept = {line["cell"]: line for line in read_cells(self.results)} | {result["cell"]: result}
        lines = (json.dumps(line, ensure_ascii=False) for line in kept.values())
        write_text(self.results / CELLS_FILE, "".join(f"{line}\n" for line in lines))

    def train(self, cell: Cell) -> dict[str, Any]:
        """Run the cell's recipe; what was trained, on how much, with what, in how many minutes."""
        recipe = self.folder(cell) / "recipe.yaml"
        write_text(recipe, yaml.safe_dump(self.recipe(cell), sort_keys=False))
        run_recipe(["--config", str(recipe)])
        record = json.loads((self.folder(cell) / "training.json").read_text(encoding="utf-8"))
        (stage,) = record["stages"].values()
        kept = ("train_labels", "trainable_parameters", "steps")
        return {
            "backbone": BACKBONE,
            "settings": cell.stage,
            **{key: stage[key] for key in kept},
            **{key: record[key] for key in ("versions", "hardware", "minutes")},
        }

    def recipe(self, cell: Cell) -> dict[str, Any]:
        """The recipe file of a cell: one stage, cut to a sample of the labels where asked for."""
        assert cell.stage is not None
        training = {"max_eval_labels": VALIDATION_SAMPLE[cell.titles]} | cell.stage["training"]
        if cell.quick:
            training["max_train_labels"] = QUICK_TITLE_LABELS if cell.titles else QUICK_LABELS
        stage: dict[str, Any] = {"name": "main", **cell.stage, "training": training}
        if cell.starts_from:
            first = self.same_seed(cell, cell.starts_from)
            stage["init_from"] = str(self.checkpoint(first))
        return {
            "data_dir": str(self.data(cell.track)),
            "cf_dir": str(self.cf(cell.track, cell.cf)) if cell.cf else "",
            "output_dir": str(self.folder(cell)),
            "backbone": BACKBONE,
            "seed": cell.seed,
            "precision": "auto",
            "offline": self.offline,
            "full_checkpoint": False,
            "stages": [stage],
        }

    def scores(self, cell: Cell, split: str) -> pd.DataFrame:
        """A split's scores by the cell's method: user_id, item_id, label, score, prob."""
        if cell.stage is not None:
            return self.model_scores(cell, split)
        if cell.average_of:
            return self.average_scores(cell, split)
        data = self.data(cell.track)
        rows = read_rows(data, split)
        keys = rows[["user_id", "item_id", "label"]].reset_index(drop=True)
        if cell.arm in MEANS:
            return keys.join(MEANS[cell.arm](self.known_rows(cell.track), rows))
        if cell.arm == "linear hybrid":
            return keys.join(linear_hybrid(data, split))
        table = self.cf(cell.track, cell.cf)
        if cell.arm == "CF, folded in":
            prepared = load_prepared(data)
            return keys.join(folded_scores(table, prepared.splits[split], prepared.lines()))
        return score_cf(table, data, split)

    def model_scores(self, cell: Cell, split: str) -> pd.DataFrame:
        """A split's scores by the cell's checkpoint, in full precision; of the frozen track its
        sample, and of validation a quick cell scores a sample of users."""
        backbone, _ = load_backbone_path(BACKBONE, offline=self.offline)
        model, processor = load_checkpoint(str(self.checkpoint(cell)), backbone=backbone)
        prepared = load_prepared(self.data(cell.track))
        rows = prepared.splits[split]
        if cell.track == "frozen":
            pairs = rows.select_columns(["user_id", "item_id"]).to_pandas()
            rows = rows.select(sampled_rows(pairs, split))
        elif split == "validation" and cell.quick:
            rows = sample_users(rows, VALIDATION_SAMPLE[cell.titles])
        return score_table(model, processor, rows, lines=prepared.lines())

    def average_scores(self, cell: Cell, split: str) -> pd.DataFrame:
        """The average of other rows' standardized scores, at the level of their probabilities."""
        *others, model = (
            self.kept_scores(self.same_seed(cell, row), split) for row in cell.average_of
        )
        pair = ["user_id", "item_id"]
        shared = model[[*pair, "label"]]  # the language model may have scored a sample
        matched = [
            shared.merge(other.drop(columns="label"), on=pair, how="left", validate="1:1")
            for other in others
        ]
        return shared.join(as_logits(score_average(*matched, model)))

    def kept_scores(self, cell: Cell, split: str) -> pd.DataFrame:
        """What a cell has scored; of a control, computed where it is not in the work folder."""
        file = self.folder(cell) / f"{split}.parquet"
        if not file.is_file() and cell.seed is None:
            write_scores(self.scores(cell, split), file)
        return read_scores(file)

    def known_rows(self, track: str) -> pd.DataFrame:
        """The labels that a track's means are taken over."""
        data = self.data(track)
        if track != "open":
            return read_rows(data, "train")
        return earlier_interactions(data)

    def figures(self, cell: Cell, scores: dict[str, pd.DataFrame]) -> dict[str, Any]:
        """Validation and test figures; probabilities are calibrated on validation.

        The frozen track's are of its sample; what was scored whole has `whole_test` too.
        """
        validation, test = scores["validation"], scores["test"]
        sample = cell.track == "frozen"
        whole = {}
        if sample and cell.seed is None:
            whole["whole_test"] = self.whole_figures(cell, test)
            validation, test = (
                table.iloc[sampled_rows(table, split)].reset_index(drop=True)
                for split, table in scores.items()
            )
        temperature = float(fit_temperature(validation["score"], validation["label"]))
        test = test.assign(prob=1 / (1 + np.exp(-test["score"] / temperature)))
        compared = {f"row {name}": table for name, table in self.comparisons(cell).items()}
        report = evaluate_scores(
            test, self.data(cell.track), "test", compared, name=cell.name, sample=sample
        )
        return {
            "validation": {
                "auc": float(auc(validation["label"], validation["score"])),
                "uauc": float(uauc(*(validation[key] for key in ("label", "score", "user_id")))),
            },
            "temperature": temperature,
            "test": {key: report["methods"][cell.name][key] for key in MEASURED},
            **_unseen_items(report, cell.name),
            **whole,
            "differences": {
                name.removeprefix("row "): {
                    key: report["differences"][name][key] for key in MEASURED[:4]
                }
                for name in compared
            },
        }

    def whole_figures(self, cell: Cell, test: pd.DataFrame) -> dict[str, Any]:
        """AUC and UAUC of a control on all of test."""
        report = evaluate_scores(test, self.data(cell.track), "test", name=cell.name)
        measured = {key: report["methods"][cell.name][key] for key in MEASURED if key != "ece"}
        return {**measured, **_unseen_items(report, cell.name)}

    def comparisons(self, cell: Cell) -> dict[str, pd.DataFrame]:
        """Test scores of the other rows that a cell is compared with, by name: the track's controls
        and, of the trained ones, those of the same seed that have been scored here."""
        found = {}
        for name, row in COMPARED[cell.track].items():
            for other in self.cells:
                if other.row != f"{cell.track}-{row}" or other.row == cell.row:
                    continue
                if other.seed is None or (other.seed == cell.seed and self.is_here(other)):
                    found[name] = self.kept_scores(other, "test")
        return found

    def same_seed(self, cell: Cell, row: str) -> Cell:
        """The planned cell of another row with the seed of `cell`, or the only one of a row whose
        cells do not depend on a seed."""
        return next(
            other for other in self.cells if other.row == row and other.seed in (None, cell.seed)
        )

    def builds_on(self, cell: Cell) -> list[Cell]:
        """The trained cells whose checkpoint or scores this one is made of."""
        rows = (cell.starts_from, *cell.average_of)
        others = [self.same_seed(cell, row) for row in rows if row]
        return [other for other in others if other.seed is not None]

    def is_here(self, cell: Cell) -> bool:
        """Whether what a trained cell leaves is in the work folder."""
        left = [self.folder(cell) / "test.parquet"]
        left += [self.checkpoint(cell)] if cell.stage is not None else []
        return all(path.exists() for path in left)


def sampled_rows(rows: pd.DataFrame, split: str) -> np.ndarray:
    """Which rows stand for a split of the frozen track, in their order: those of the users whose
    hash is lowest, and of each the ones whose hash is lowest."""
    hashed = pd.DataFrame(
        {
            "user": hash_ids(rows["user_id"], "sample"),
            "pair": hash_pairs(rows["user_id"], rows["item_id"], "sample"),
        }
    )
    hashed = hashed.sort_values(["user", "pair"])
    users = (hashed["user"] != hashed["user"].shift()).cumsum() <= SAMPLED_USERS[split]
    some = hashed.groupby("user").cumcount() < SAMPLED_ROWS
    return np.sort(hashed.index[users & some].to_numpy())


def _unseen_items(report: dict[str, Any], name: str) -> dict[str, Any]:
    """Figures among the rows of items without a training row, where these have a UAUC."""
    found = report["slices"]["cold_item"]["methods"].get(name, {})
    if found.get("uauc") is None:
        return {}
    return {"unseen_items": {key: found[key] for key in MEASURED[:4]}}


def folded_scores(
    cf_folder: str | Path,
    split: datasets.Dataset,
    lines: dict[str, list[dict[str, Any]]] | None = None,
) -> pd.DataFrame:
    """The CF model alone: logits of a split's rows by the last snapshot, each user's vector solved
    for from the signed history that is stored with the row.

    Args:
        cf_folder: a table fitted by `fit-cf mf`.
        split: rows of a folder prepared with signed histories.
        lines: whole histories by user, where they are frozen, in place of the stored ones.

    Returns:
        `score` and `prob`, float64, in row order.

    Raises:
        InputError: the histories are not signed, or the table has no prior over users.
    """
    cf = CFVectors.load(cf_folder).last()
    if "history_labels" not in split.column_names or cf.user_precision is None:
        raise InputError(
            "folding users in needs signed histories (ccf-llm prepare --histories signed) "
            f"and a CF table by ccf-llm fit-cf mf; {cf_folder} or the data is another"
        )
    table = CFTable(
        CCFLLMConfig(
            num_users=len(cf.user_ids),
            num_items=len(cf.item_ids),
            cf_dim=cf.dim,
            cf_user_precision=cf.user_precision,
            num_field_values=len(cf.field_values),
            num_item_values=0 if cf.item_values is None else cf.item_values.shape[1],
        )
    )
    table.fill(cf)
    index = {item: row for row, item in enumerate(cf.item_ids)}
    parts = []
    for start in range(0, len(split), FOLDED_AT_ONCE):
        rows = split[start : start + FOLDED_AT_ONCE]
        if lines is not None:
            histories = [lines.get(user, []) for user in rows["user_id"]]
            rows["history"] = [[line["id"] for line in history] for history in histories]
            rows["history_labels"] = [[line["liked"] for line in history] for history in histories]
        items, targets, depths = _signed(rows, index, cf.rating_scale)
        users = table.folded_users(items, targets, depths)
        candidates = torch.tensor([index[item] for item in rows["item_id"]])
        parts.append(table.folded_logits(users, candidates[:, None])[:, 0])
    logits = torch.cat(parts).double()
    return pd.DataFrame({"score": logits.numpy(), "prob": logits.sigmoid().numpy()})


def _signed(
    rows: dict[str, list], index: dict[str, int], scale: tuple[float, float] | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Histories as (n, longest) table rows, -1 where padded, and targets, and their lengths (n,);
    graded targets, `sigmoid(slope (rating - midpoint))`, where the table was fitted to them."""
    depths = torch.tensor([len(history) for history in rows["history"]])
    shape = (len(depths), max(1, int(depths.max())))
    items, targets = np.full(shape, -1), np.zeros(shape, dtype=np.float32)
    values = rows["history_labels" if scale is None else "history_ratings"]
    for row, (history, given) in enumerate(zip(rows["history"], values, strict=True)):
        items[row, : len(history)] = [index[item] for item in history]
        targets[row, : len(history)] = (
            given if scale is None else 1 / (1 + np.exp(-scale[1] * (np.array(given) - scale[0])))
        )
    return torch.from_numpy(items), torch.from_numpy(targets), depths


def _rounded(value: Any) -> Any:
    """Floats of a result with six significant digits: more than any table shows."""
    if isinstance(value, dict):
        return {key: _rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(part) for part in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value
