"""The rows of the results table: which method, on which track, over which CF model, trained how.

A cell is one row and one seed. What a stage does not say here is the recipe's default.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ccf_llm_hf.errors import InputError

# By data set, its tracks.
DATASETS = {
    "ml-1m": ("protocol", "open"),
    "ml-100k": ("protocol", "open"),
    "ml-latest-small": ("protocol", "open"),
    "book-crossing": ("frozen",),
}
TRACKS = {
    "protocol": "CF fitted on the train split only, histories of earlier likes (CoLLM's protocol)",
    "open": "CF fitted on every rating before the validation split, signed histories (ours)",
    "frozen": "a random split; CF fitted on its train rows, and nothing else in histories (ours)",
}
BACKBONE = "smollm2-135m-instruct"
CF_NAMES = {"mf": "MF", "mf_nobias": "MF without biases", "mf_fields": "MF + fields"}
CF_NAMES |= {"lightgcn": "LightGCN", "sasrec": "SASRec"}
# Labels that `--quick` trains on: what carries titles costs ten times as much.
QUICK_LABELS, QUICK_TITLE_LABELS = 12_000, 2_500
# Rows validated on at the end of training, by whether they carry titles. With one epoch nothing is
# chosen by them; all of validation is scored afterwards, with `--quick` these in its place.
VALIDATION_SAMPLE = {False: 3_000, True: 1_500}
# All of the frozen track takes hours to score in words: by split, so many users, with at most so
# many rows each, stand for it, drawn by a hash and the same for every row.
SAMPLED_USERS = {"validation": 1_000, "test": 3_000}
SAMPLED_ROWS = 20

# What the cells of a track are compared with, in this order, by the names of rows.
IN_TIME = {
    "item + user mean": "item_and_user_mean",
    "MF": "CF-mf",
    "MF, folded in": "CF_folded_in-mf",
    "gate": "gate-mf-joint",
}
COMPARED = {
    "protocol": IN_TIME,
    "open": IN_TIME,
    "frozen": {
        "MF + fields": "CF-mf_fields",
        "MF + fields, folded in": "CF_folded_in-mf_fields",
        "linear hybrid": "linear_hybrid",
        "cf_only": "cf_only-mf_fields-joint",
        "text_only": "text_only-LoRA",
    },
}
CELLS_FILE = "cells.jsonl"

LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
ONCE = {"num_train_epochs": 1, "weight_decay": 0.0}
TITLES: dict[str, Any] = {
    "preset": "text_only",
    "prompt": {"history_window": [5, 16]},
    "lora": LORA,
    "training": {
        "learning_rate": 2e-3,
        "learning_rate_mapping": {"lora_": 1e-3},
        "labels_per_step": 128,
        **ONCE,
    },
}
# The answer's scale has a rate of its own: at the fusion's it can fall to 0, where the language
# model learns nothing. The gate sums over twice the hidden size and would saturate at that rate.
RATES = {r"\.gate\.": 2e-4, "answer_scale": 1e-3, "lora_": 1e-3}
# The open track was trained before that was seen, and the slow rate gains it nothing
# (results/ml-1m/experiments.md).
FAST = RATES | {"answer_scale": 1e-2}
# How slots read words when these rows were trained.
STATIC = {"item_text": "static"}
SLOTS = {"history_format": "slot", "candidate_format": "slot", "history_window": [20, 16]}
# Without " (1995)" a title is half as many tokens.
TITLED = SLOTS | {"candidate_format": "title_slot", "title_years": False}
# Answered lines of words, as examples/configs/bookcrossing.yaml has them.
LINES: dict[str, Any] = {
    "wording": "answered",
    "histories": "signed",
    "history_window": [48, 1],
    "item_template": "{title} by {author}",
    "evidence_fields": ["author"],
}
# A user's vector and tastes are solved for from more lines than words are read of.
FOLDED_LINES = {"fold_in_items": 976}
STREAMS: dict[str, Any] = {
    "labels_per_step": 128,
    "tokens_per_batch": 1024,
    "max_train_labels": 51_200,
    "likes_only_share": 0.2,
    "learning_rate": 2e-3,
    "weight_decay": 0.0,
    "learning_rate_mapping": {"lora_": 8e-4},
    "max_eval_labels": 300,
    "eval_strategy": "steps",
    "eval_steps": 200,
}
WIDE_LORA = {
    "r": 16,
    "lora_alpha": 32,
    "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
}


@dataclass(frozen=True)
class Cell:
    """One row of the table and one seed.

    Attributes:
        track: of `TRACKS`.
        arm: the method's name.
        cf: a CF table of the track, or empty.
        training: `joint`, `two-stage` or `LoRA`; empty where no language model is in it.
        stage: the recipe's only stage; None where the row trains none of its own.
        starts_from: the row whose LoRA a two-stage cell takes and freezes.
        average_of: the rows whose standardized scores are averaged, a trained one last.
        titles: whether a label costs the tokens of titles.
        main: whether `--quick`, and data sets other than ml-1m, have the row too.
        quick: whether it is trained on a sample of the labels.
        seed: None where nothing depends on one.
    """

    track: str
    arm: str
    cf: str = ""
    training: str = ""
    stage: dict[str, Any] | None = None
    starts_from: str = ""
    average_of: tuple[str, ...] = ()
    titles: bool = False
    main: bool = True
    quick: bool = False
    seed: int | None = None

    @property
    def row(self) -> str:
        """Name of the row that the seeds share."""
        name = "-".join(part for part in (self.track, self.arm, self.cf, self.training) if part)
        return re.sub(r"[^\w.-]+", "_", name.replace("+", "and"))

    @property
    def name(self) -> str:
        """Name of the cell: for `--only`, in the data file and of its folder."""
        seed = "" if self.seed is None else f"-seed{self.seed}"
        return self.row + seed + "-quick" * self.quick


def plan(dataset: str, tracks: Sequence[str], seeds: int, quick: bool) -> list[Cell]:
    """All cells in the order in which they are computed: controls, then seed after seed.

    Args:
        dataset: of `DATASETS`; `ml-1m` has all rows, the others the main ones.
        tracks: which of the data set's.
        seeds: 0 to `seeds` - 1.
        quick: the main rows only, trained on a sample of the labels.

    Raises:
        InputError: a track that the data set has not, or no seeds.
    """
    if seeds < 1:
        raise InputError(f"--seeds must be at least 1, not {seeds}")
    there = DATASETS[dataset]
    if unknown := [track for track in tracks if track not in there]:
        raise InputError(f"--tracks must be of {', '.join(there)}, not {unknown[0]!r}")
    rows_of = {"protocol": protocol_rows, "open": open_rows, "frozen": frozen_rows}
    rows = [row for track in tracks for row in rows_of[track]()]
    if quick or dataset != "ml-1m":
        rows = [row for row in rows if row.main]
    fixed = [row for row in rows if not row.training]
    trained = [row for row in rows if row.training]
    return fixed + [
        replace(row, seed=seed, quick=quick) for seed in range(seeds) for row in trained
    ]


def protocol_rows() -> list[Cell]:
    """Rows comparable with the literature."""
    text_only = Cell("protocol", "text_only", training="LoRA", stage=TITLES, titles=True)
    average = "average of MF and text_only"
    return [
        Cell("protocol", "item mean"),
        Cell("protocol", "item + user mean"),
        Cell("protocol", "CF", "mf"),
        Cell("protocol", "CF", "mf_nobias"),
        Cell("protocol", "CF", "lightgcn", main=False),
        Cell("protocol", "CF", "sasrec", main=False),
        _joint("gate", {"fusion": "gate"} | STATIC),
        text_only,
        _joint("scalar_gate", {"fusion": "scalar_gate"} | STATIC),
        _joint("sum", {"fusion": "sum"} | STATIC),
        _joint("cf_only", {"fusion": "cf_only"}),
        _joint("gate and CF logit", {"fusion": "gate", **STATIC, "cf_logit": True}),
        replace(text_only, arm=average, stage=None, average_of=("protocol-CF-mf", text_only.row)),
        # CoLLM's fusion in our prompt: the candidate's title, then its slot.
        replace(
            _joint("concat", {"fusion": "cf_only"}, prompt=TITLED),
            titles=True,
            main=False,
        ),
        _staged(text_only, "gate", {"fusion": "gate"} | STATIC),
    ]


def open_rows() -> list[Cell]:
    """Rows of what a practitioner would do with the same data."""
    folded = {"cf_logit": True, "cf_fold_in": True}
    window = SLOTS | {"fold_in_items": 220}
    shared: dict[str, Any] = {"track": "open", "rates": FAST}
    gate = _joint("gate", {"fusion": "gate"} | STATIC, **shared)
    cf_only = {"fusion": "cf_only"} | folded
    return [
        Cell("open", "item mean"),
        Cell("open", "item + user mean"),
        Cell("open", "CF", "mf"),
        Cell("open", "CF, folded in", "mf"),
        _joint(
            "gate and folded CF logit",
            {"fusion": "gate"} | STATIC | folded,
            prompt=window,
            **shared,
        ),
        replace(
            _joint("cf_only and folded CF logit", cf_only, prompt=window, **shared), main=False
        ),
        replace(gate, main=False),
    ]


def frozen_rows() -> list[Cell]:
    """Rows of data whose items have fields, in streams of answered lines."""
    text_only = Cell(
        "frozen",
        "text_only",
        training="LoRA",
        stage={
            "preset": "text_only",
            "prompt": LINES,
            "lora": WIDE_LORA,
            "training": STREAMS,
        },
        titles=True,
    )
    # Words have been learned when the whole model begins.
    slow = {"lora_": 4e-4, r"\.gate\.linear": 2e-4, "answer_scale": 1e-3}
    rates = {"learning_rate": 1e-2, "learning_rate_mapping": slow}
    shorter = STREAMS | rates | {"max_train_labels": 25_600, "eval_steps": 100}
    cf_only = {
        "model": {"fusion": "cf_only", "cf_logit": True, "cf_fold_in": True},
        "prompt": {key: LINES[key] for key in ("wording", "histories", "history_window")}
        | FOLDED_LINES,
        "lora": WIDE_LORA,
        "training": shorter,
    }
    whole = {
        "model": {"fusion": "gate", "cf_logit": True, "cf_fold_in": True},
        "prompt": LINES
        | FOLDED_LINES
        | {"history_format": "title_slot", "candidate_format": "title_slot"},
        "lora": WIDE_LORA,
        "training": shorter,
    }
    joint = Cell("frozen", "cf_only", "mf_fields", "joint", cf_only)
    folded = Cell("frozen", "CF, folded in", "mf_fields")
    average = "average of MF + fields, folded in, and text_only"
    return [
        Cell("frozen", "item mean"),
        Cell("frozen", "item + user mean"),
        Cell("frozen", "CF", "mf_nobias"),
        Cell("frozen", "CF", "mf"),
        Cell("frozen", "CF", "mf_fields"),
        folded,
        Cell("frozen", "linear hybrid"),
        text_only,
        replace(text_only, arm=average, stage=None, average_of=(folded.row, text_only.row)),
        joint,
        replace(
            joint, arm="gate and CF logit", stage=whole, starts_from=text_only.row, titles=True
        ),
    ]


def name_of(row: Mapping[str, Any]) -> str:
    """A row in words: `gate (MF, joint)`."""
    details = [part for part in (CF_NAMES.get(row["cf"], ""), row["training"]) if part]
    if row["arm"].startswith("CF"):  # the CF model by itself
        return details[0] + row["arm"].removeprefix("CF")
    return f"{row['arm']} ({', '.join(details)})" if details else row["arm"]


def row_of(cell: Cell) -> dict[str, Any]:
    """What the seeds of a row share, and the table groups by."""
    return {key: getattr(cell, key) for key in ("track", "arm", "cf", "training", "quick")}


def read_cells(results: Path) -> list[dict[str, Any]]:
    """The results in a folder's data file, in its order; none where there is no file.

    Raises:
        InputError: a line holds no cell's result.
    """
    file = results / CELLS_FILE
    if not file.is_file():
        return []
    cells = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            cell = json.loads(line)
            _ = [cell[key] for key in ("cell", "dataset", "arm", "seed", "test", "minutes")]
        except (ValueError, TypeError, KeyError) as problem:
            raise InputError(
                f"{file}, line {number}: no cell's result; delete the line to compute it again"
            ) from problem
        cells.append(cell)
    return cells


def _joint(
    arm: str,
    model: dict[str, Any],
    *,
    prompt: dict[str, Any] = SLOTS,
    track: str = "protocol",
    rates: dict[str, float] = RATES,
) -> Cell:
    """One stage over MF that trains fusion and LoRA together."""
    training = {"learning_rate": 1e-2, "learning_rate_mapping": rates, "labels_per_step": 64}
    training |= ONCE
    stage = {"model": model, "prompt": prompt, "lora": LORA, "training": training}
    return Cell(track, arm, "mf", "joint", stage)


def _staged(first: Cell, arm: str, model: dict[str, Any]) -> Cell:
    """The paper's second stage: the LoRA of the `first` row, frozen, and a fresh fusion."""
    cell = _joint(arm, model)
    assert cell.stage is not None
    stage = {key: part for key, part in cell.stage.items() if key != "lora"}
    return replace(cell, training="two-stage", stage=stage, starts_from=first.row, main=False)
