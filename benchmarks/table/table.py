"""The results table: `table.json` from the cells' results, and the same as Markdown."""

import json
from collections import defaultdict
from math import hypot, sqrt
from pathlib import Path
from statistics import fmean, mean, stdev
from typing import Any

from cells import CF_NAMES
from plots import plot_table

from ccf_llm_hf.errors import InputError
from ccf_llm_hf.training.stage import write_json, write_text

NORMAL = 1.96  # 95 % of a normal distribution
# With fewer seeds a row's own spread says little, that of the other rows stands in (our choice).
ENOUGH_SEEDS = 3
ROW = ("track", "arm", "cf", "training", "backbone", "budget")
PUBLISHED = (  # method, AUC, UAUC on the same ML-1M split, as their papers report them
    ("MF", ".648", ".636", "CoLLM (arXiv 2310.19488)"),
    ("LightGCN", ".596", ".650", "CoLLM"),
    ("SASRec", ".708", ".688", "CoLLM"),
    ("DIN", ".717", ".646", "CoLLM"),
    ("TALLRec, 7B", ".710", ".682", "CoLLM"),
    ("CoLLM-MF, 7B", ".730", ".688", "CoLLM"),
    ("CoLLM-DIN, 7B", ".735", ".692", "CoLLM"),
    ("CoLLM-MF, Qwen2-1.5B", ".735", ".695", "a reproduction"),
    ("BinLLM, 7B", ".743", ".696", "BinLLM (ACL 2024)"),
    ("CoRA, 7B", ".741", ".706", "CoRA"),
    ("ARROW, 7B", ".758", ".715", "ARROW"),
    ("SAILRec, 7B", ".757", "", "SAILRec"),
    ("SeLLa-Rec, 7B", ".761", "", "SeLLa-Rec; its UAUC is defined otherwise"),
)


def write_table(results: Path) -> list[dict[str, Any]]:
    """Gather `cells/*.json` into `table.json`, `table.md` and, where there are rows, `table.png`.

    Returns:
        A dict a row: track, arm, cf, training, backbone, budget, seeds, auc, auc_ci, uauc, uauc_ci,
        logloss, ece, minutes, auc_sd and uauc_sd (the sample standard deviations over seeds, 0 of a
        single one), temperature, `trained` (whether a cell trains a model: an average does not),
        validation figures, and paired `differences` by the control's name. Means are
        over seeds; an interval's bounds are the means of the seeds' bounds. Of a difference,
        `auc_ci` is over users, `auc_sd` over seeds, and `auc_wide` an interval over both.

    Raises:
        InputError: a file holds no cell's result, or the same cell's as another file.
    """
    rows = [_row(key, cells) for key, cells in read_cells(results).items()]
    rows.sort(key=lambda row: (row["track"] != "protocol", row["budget"], row["auc"]))
    for place in {(row["track"], row["budget"]) for row in rows}:
        _widen([row for row in rows if (row["track"], row["budget"]) == place])
    results.mkdir(parents=True, exist_ok=True)
    write_json(results / "table.json", rows)
    write_text(results / "table.md", markdown(rows))
    if rows:
        plot_table(rows, results / "table.png", PUBLISHED)
    return rows


def read_cells(results: Path) -> dict[tuple[str, ...], list[dict[str, Any]]]:
    """The results in `cells/*.json`, by row of the table.

    Raises:
        InputError: a file holds no cell's result, or the same cell's as another file.
    """
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    files: dict[tuple[Any, ...], Path] = {}
    for file in sorted((results / "cells").glob("*.json")):
        try:
            cell = json.loads(file.read_text(encoding="utf-8"))
            key, seed = tuple(cell[name] for name in ROW), cell["seed"]
            _ = cell["dataset"], _row((), [cell])  # all that a result has to hold
        except (ValueError, TypeError, KeyError) as problem:
            raise InputError(
                f"{file} holds no cell's result: delete it to have the cell computed again"
            ) from problem
        other = files.setdefault((*key, seed), file)
        if other != file:
            raise InputError(f"{file} and {other} hold the same cell: delete one of them")
        groups[key].append(cell)
    return groups


def _row(key: tuple[str, ...], cells: list[dict[str, Any]]) -> dict[str, Any]:
    tests = [cell["test"] for cell in cells]
    row: dict[str, Any] = dict(zip(ROW, key, strict=False))
    row["seeds"] = len(cells)
    for metric in ("auc", "uauc"):
        row[metric] = mean(test[metric] for test in tests)
        bounds = zip(*(test[f"{metric}_ci"] for test in tests), strict=True)
        row[f"{metric}_ci"] = [mean(side) for side in bounds]
        row[f"{metric}_sd"] = stdev([test[metric] for test in tests]) if len(tests) > 1 else 0.0
        row[f"validation_{metric}"] = mean(cell["validation"][metric] for cell in cells)
    for metric in ("logloss", "ece"):
        row[metric] = mean(test[metric] for test in tests)
    for name in ("minutes", "temperature"):
        row[name] = mean(cell[name] for cell in cells)
    row["trained"] = any("trained" in cell for cell in cells)
    row["differences"] = _differences([cell["differences"] for cell in cells])
    return row


def _differences(seeds: list[dict[str, dict[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Means over seeds of the differences from each control that all seeds were compared with."""
    found: dict[str, dict[str, Any]] = {}
    for control in seeds[0]:
        if not all(control in seed for seed in seeds):
            continue
        found[control] = {}
        for metric in ("auc", "uauc"):
            bounds = zip(*(seed[control][f"{metric}_ci"] for seed in seeds), strict=True)
            found[control][metric] = mean(seed[control][metric] for seed in seeds)
            found[control][f"{metric}_ci"] = [mean(side) for side in bounds]
            values = [seed[control][metric] for seed in seeds]
            found[control][f"{metric}_sd"] = stdev(values) if len(values) > 1 else 0.0
    return found


def _widen(rows: list[dict[str, Any]]) -> None:
    """Beside the interval of each difference over users, set one over users and trainings: wider by
    1.96 standard errors of the mean over seeds, the two taken as independent (our choice)."""
    for row in rows:
        for control, found in row["differences"].items():
            for metric in ("auc", "uauc"):
                spread = _seed_spread(row, control, metric, rows) if row["backbone"] else 0.0
                extra = NORMAL * spread / sqrt(row["seeds"])
                value, (low, high) = found[metric], found[f"{metric}_ci"]
                found[f"{metric}_wide"] = [
                    value - hypot(value - low, extra),
                    value + hypot(high - value, extra),
                ]


def _seed_spread(row: dict[str, Any], control: str, metric: str, rows: list[dict]) -> float:
    """Standard deviation over seeds of a row's difference; of a row of few seeds the root mean
    square of those of the rows that have enough, 0 where none has."""
    if row["seeds"] >= ENOUGH_SEEDS:
        return row["differences"][control][f"{metric}_sd"]
    known = [
        other["differences"][control][f"{metric}_sd"] ** 2
        for other in rows
        if other["seeds"] >= ENOUGH_SEEDS and control in other["differences"]
    ]
    return sqrt(fmean(known)) if known else 0.0


def markdown(rows: list[dict[str, Any]]) -> str:
    """The tracks as tables, each sorted by test AUC, and what others published."""
    lines = []
    for track, budget in dict.fromkeys((row["track"], row["budget"]) for row in rows):
        name = f"{track.capitalize()} track" + ", quick budget" * (budget == "quick")
        lines += [
            f"### {name}",
            "",
            *_track([r for r in rows if (r["track"], r["budget"]) == (track, budget)]),
            "",
        ]
    return "\n".join(lines)


def _track(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "| arm | CF | trained | backbone | seeds | AUC | UAUC | log loss | ECE "
        "| validation AUC / UAUC | min |",
        "| --- | --- | --- | --- | --: | --- | --- | --: | --: | --- | --: |",
    ]
    for row in rows:
        lines.append(
            f"| {row['arm']} | {CF_NAMES.get(row['cf'], row['cf'])} | {row['training']} "
            f"| {row['backbone']} | {row['seeds']} | {_value(row, 'auc')} | {_value(row, 'uauc')} "
            f"| {row['logloss']:.4f} | {row['ece']:.3f} "
            f"| {row['validation_auc']:.4f} / {row['validation_uauc']:.4f} | {row['minutes']:.1f} |"
        )
    return lines


def _value(row: dict[str, Any], metric: str) -> str:
    low, high = row[f"{metric}_ci"]
    spread = f" ± {row[f'{metric}_sd']:.4f}" if row["seeds"] > 1 else ""
    return f"{row[metric]:.4f}{spread} [{low:.3f}, {high:.3f}]"


def outlook_text(cells: list[dict[str, Any]]) -> str:
    """The list that `--dry-run` prints: a line a cell, and the hours that are left."""
    left = [cell for cell in cells if not cell["done"]]
    known = [cell["minutes"] for cell in left if cell["minutes"] is not None]
    lines = [
        f"{'done ' if cell['done'] else 'again' if cell['again'] else 'to do'} "
        f"{'    ?' if cell['minutes'] is None else format(cell['minutes'], '5.1f')} min  "
        f"{cell['cell']}"
        for cell in cells
    ]
    if any(cell["again"] for cell in cells):
        lines.append("again: has a result; others are made of it, and it is not in the work folder")
    total = f"{len(left)} cell{'s' * (len(left) != 1)} to do"
    if known:
        total += f": {sum(known) / 60:.1f} hours by the minutes of finished seeds"
    if unknown := len(left) - len(known):
        total += f"; no estimate for {unknown} of them, of whose rows no seed is finished"
    return "\n".join([*lines, total])


def published() -> str:
    """What others report on the same split, as Markdown."""
    lines = ["| method | AUC | UAUC | source |", "| --- | --: | --: | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in PUBLISHED)]) + "\n"
