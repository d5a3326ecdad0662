"""What the finished cells say: the table as data and as Markdown, and the pages' sections."""

import json
from collections import defaultdict
from collections.abc import Sequence
from math import hypot, sqrt
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from rows import COMPARED, TRACKS, name_of, read_cells

from ccf_llm_hf.io import write_text

Rows = Sequence[dict[str, Any]]

NORMAL = 1.96  # 95 % of a normal distribution
# A difference that no reader of four digits can see is not called one, whatever its interval.
SMALLEST = 0.0005
METRICS = ("auc", "uauc")
# The rows that docs/results.md has; the others are in the `table.md` of their data set.
SHOWN = {
    "protocol": (
        "text_only (LoRA)",
        "concat (MF, joint)",
        "gate (MF, joint)",
        "cf_only (MF, joint)",
        "item + user mean",
        "MF",
        "gate and CF logit (MF, joint)",
    ),
    "open": ("gate (MF, joint)", "MF, folded in", "gate and folded CF logit (MF, joint)"),
    "frozen": ("MF", "MF + fields, folded in", "linear hybrid"),
}
# The highest published AUC and UAUC of 7B models on the protocol track; the others' are ours.
TARGETS = {"protocol": (0.7606, 0.7146), "open": (0.82, 0.76), "frozen": (0.795, 0.66)}
# On the same ML-1M split, by who reports it: method, AUC, UAUC (of SeLLa-Rec defined otherwise).
PUBLISHED = {
    "CoLLM (arXiv 2310.19488)": (
        ("MF", ".648", ".636"),
        ("LightGCN", ".596", ".650"),
        ("SASRec", ".708", ".688"),
        ("DIN", ".717", ".646"),
        ("TALLRec, 7B", ".710", ".682"),
        ("CoLLM-MF, 7B", ".730", ".688"),
        ("CoLLM-DIN, 7B", ".735", ".692"),
    ),
    "a reproduction": (("CoLLM-MF, Qwen2-1.5B", ".735", ".695"),),
    "their papers": (
        ("BinLLM, 7B", ".743", ".696"),
        ("CoRA, 7B", ".741", ".706"),
        ("ARROW, 7B", ".758", ".715"),
        ("SAILRec, 7B", ".757", ""),
        ("SeLLa-Rec, 7B", ".761", ""),
    ),
}


def write_table(results: Path) -> list[dict[str, Any]]:
    """Gather the cells of a folder of results into its `table.json` and `table.md`.

    Returns:
        A dict a row: track, arm, cf, training, quick, seeds, auc, auc_ci, auc_sd (the sample
        standard deviation over seeds, 0 of a single one), the same of uauc, logloss, ece, minutes
        (means over seeds, as the bounds of intervals are), validation_auc, validation_uauc and
        `differences`: {other row: {auc, auc_ci (over users), auc_wide (over users and trainings),
        the same of uauc}}, paired over users. Where cells say so, backbone, unseen_item_uauc (and
        _ci, _sd), of rows of items without a training row, and whole_test.

    Raises:
        InputError: a line of the data file holds no cell's result.
    """
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    keys = ("track", "arm", "cf", "training", "quick")
    for cell in read_cells(results):
        groups[tuple(cell[key] for key in keys)].append(cell)
    rows = [dict(zip(keys, key, strict=True)) | _row(cells) for key, cells in groups.items()]
    rows.sort(key=lambda row: (list(TRACKS).index(row["track"]), row["auc"]))
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    write_text(results / "table.json", f"[\n{lines}\n]\n")
    write_text(results / "table.md", table_markdown(rows) + "\n")
    return rows


def read_table(results: Path) -> list[dict[str, Any]]:
    """Rows of `table.json`, as `write_table` returns them."""
    return json.loads((results / "table.json").read_text(encoding="utf-8"))


def _row(cells: Rows) -> dict[str, Any]:
    tests = [cell["test"] for cell in cells]
    row: dict[str, Any] = {"seeds": len(cells)}
    for metric in METRICS:
        row |= _over_seeds(metric, tests)
    row |= {f"validation_{m}": _mean(cell["validation"][m] for cell in cells) for m in METRICS}
    row |= {metric: _mean(test[metric] for test in tests) for metric in ("logloss", "ece")}
    row["minutes"] = _mean(cell["minutes"] for cell in cells)
    if cells[0]["track"] == "frozen":
        row["backbone"] = cells[0].get("backbone", "")
    if all("unseen_items" in cell for cell in cells):
        unseen = _over_seeds("uauc", [cell["unseen_items"] for cell in cells])
        row |= {f"unseen_item_{key}": value for key, value in unseen.items()}
    if "whole_test" in cells[0]:
        row["whole_test"] = cells[0]["whole_test"]
    others = [cell["differences"] for cell in cells]
    row["differences"] = {
        name: _difference([other[name] for other in others])
        for name in others[0]
        if all(name in other for other in others)
    }
    return row


def _over_seeds(metric: str, figures: Rows) -> dict[str, Any]:
    values = [figure[metric] for figure in figures]
    bounds = zip(*(figure[f"{metric}_ci"] for figure in figures), strict=True)
    return {
        metric: _mean(values),
        f"{metric}_ci": [_mean(side) for side in bounds],
        f"{metric}_sd": round(stdev(values), 6) if len(values) > 1 else 0.0,
    }


def _difference(seeds: Rows) -> dict[str, Any]:
    """Means over seeds, and beside the interval over users one over users and trainings: wider by
    1.96 standard errors of the mean over seeds, the two taken as independent (our choice)."""
    found: dict[str, Any] = {}
    for metric in METRICS:
        part = _over_seeds(metric, seeds)
        value, (low, high) = part[metric], part[f"{metric}_ci"]
        extra = NORMAL * part.pop(f"{metric}_sd") / sqrt(len(seeds))
        wide = [value - hypot(value - low, extra), value + hypot(high - value, extra)]
        found |= part | {f"{metric}_wide": [round(bound, 6) for bound in wide]}
    return found


def _mean(values: Any) -> float:
    return round(mean(values), 6)


def table_markdown(rows: Rows) -> str:
    """The tracks as two tables each: figures, sorted by test AUC, and paired differences."""
    lines = []
    for track in dict.fromkeys(row["track"] for row in rows):
        mine = [row for row in rows if row["track"] == track]
        lines += [f"### {track.capitalize()} track", "", f"{TRACKS[track]}.", ""]
        lines += [*figures_table(mine), "", *differences_table(mine), ""]
        lines += whole_table([row for row in mine if "whole_test" in row])
    return "\n".join(lines).rstrip()


def figures_table(rows: Rows) -> list[str]:
    """Test and validation figures of rows, as a Markdown table."""
    unseen = any("unseen_item_uauc" in row for row in rows)
    heads = ["seeds", "AUC", "UAUC", *["UAUC, unseen items"] * unseen, "log loss", "ECE"]
    heads += ["validation AUC / UAUC", "min"]
    lines = [
        f"| row | {' | '.join(heads)} |",
        f"| --- | --: | --- | --- |{' --- |' * unseen} --: | --: | --- | --: |",
    ]
    for row in rows:
        validation = " / ".join(bare(row[f"validation_{metric}"], 4) for metric in METRICS)
        shown = [_value(row, metric) for metric in METRICS]
        shown += [_value(row, "unseen_item_uauc") if "unseen_item_uauc" in row else ""] * unseen
        lines.append(
            f"| {name_of(row)}{', quick' * row['quick']} | {row['seeds']} | {' | '.join(shown)} "
            f"| {bare(row['logloss'], 4)} | {bare(row['ece'], 3)} "
            f"| {validation} | {row['minutes']:.1f} |"
        )
    return lines


def whole_table(rows: Rows) -> list[str]:
    """What rows reach on all of test, where the other figures are of a sample."""
    if not rows:
        return []
    lines = [
        f"On all {rows[0]['whole_test']['rows']:,} test rows:",
        "",
        "| row | AUC | UAUC | UAUC, unseen items |",
        "| --- | --- | --- | --- |",
    ]
    for row in rows:
        whole, unseen = row["whole_test"], row["whole_test"].get("unseen_items")
        shown = [_bracketed(whole, metric) for metric in METRICS]
        shown.append(_bracketed(unseen, "uauc") if unseen else "")
        lines.append(f"| {name_of(row)} | {' | '.join(shown)} |")
    return [*lines, ""]


def differences_table(rows: Rows) -> list[str]:
    """The paired differences of rows from those that they are compared with, with the interval over
    users and trainings, bold where that leaves zero out, as a Markdown table."""
    compared = COMPARED[rows[0]["track"]]
    others = [name for name in compared if any(name in row["differences"] for row in rows)]
    pairs = [(other, metric) for other in others for metric in METRICS]
    heads = [f"{metric.upper()} - {other}" for other, metric in pairs]
    lines = [f"| row minus | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for row in rows:
        cells = (_shown_difference(row, *pair) for pair in pairs)
        lines.append(f"| {name_of(row)}{', quick' * row['quick']} | {' | '.join(cells)} |")
    return lines if others else []


def _value(row: dict[str, Any], metric: str) -> str:
    spread = f" ± {bare(row[f'{metric}_sd'], 4)}" if row["seeds"] > 1 else ""
    return _bracketed(row, metric, spread)


def _bracketed(figures: dict[str, Any], metric: str, spread: str = "") -> str:
    low, high = (bare(bound, 3) for bound in figures[f"{metric}_ci"])
    return f"{bare(figures[metric], 4)}{spread} [{low}, {high}]"


def _shown_difference(row: dict[str, Any], other: str, metric: str) -> str:
    found = row["differences"].get(other)
    if not found:
        return ""
    mark = "**" if side(found, metric) else ""
    low, high = (bare(bound, 3, "+") for bound in found[f"{metric}_wide"])
    return f"{mark}{bare(found[metric], 3, '+')}{mark} [{low}, {high}]"


def bare(value: float, digits: int, sign: str = "") -> str:
    """A figure below 1 without its leading zero."""
    return f"{value:{sign}.{digits}f}".replace("0.", ".", 1)


def side(found: dict[str, Any], metric: str) -> int:
    """1 above, -1 below, 0 where zero is in the interval over users and trainings or the difference
    is too small to see."""
    low, high = found[f"{metric}_wide"]
    if abs(found[metric]) < SMALLEST:
        return 0
    return int(low > 0) - int(high < 0)


def headline(rows: Rows) -> list[str]:
    """A line a track on how its rows with a language model stand to the controls."""
    lines = []
    for track in TRACKS:
        models = [row for row in rows if row["track"] == track and row["training"]]
        said = [
            f"against {name} {_counted(models, name, 'auc')} in AUC and "
            f"{_counted(models, name, 'uauc')} in UAUC"
            for name in COMPARED[track]
            if name != "gate" and any(name in row["differences"] for row in models)
        ]
        if said:
            lines.append(
                f"- **{track}**, {len(models)} rows with a language model, above / not told apart "
                f"/ below by the intervals over users and trainings: {'; '.join(said)}."
            )
    return lines


def _counted(rows: Rows, other: str, metric: str) -> str:
    sides = [side(row["differences"][other], metric) for row in rows if other in row["differences"]]
    return " / ".join(str(sides.count(place)) for place in (1, 0, -1))


def targets(rows: Rows) -> list[str]:
    """Of each track, what its row with a language model of the highest validation AUC reaches of
    the targets, and which rows without one validation puts above it."""
    lines = []
    for track, wanted in TARGETS.items():
        mine = [row for row in rows if row["track"] == track]
        best = best_on_validation([row for row in mine if row["training"]])
        if best is None:
            continue
        said = [
            _reached(best, metric, target) for metric, target in zip(METRICS, wanted, strict=True)
        ]
        line = f"- **{track}**: *{name_of(best)}*, seeds: {best['seeds']}. {'; '.join(said)}."
        above = [
            f"*{name_of(row)}* (test {row['auc']:.4f} / {row['uauc']:.4f})"
            for row in mine
            if not row["training"] and row["validation_auc"] > best["validation_auc"]
        ]
        if above:
            line += f" Validation puts above it, without a language model: {', '.join(above)}."
        lines.append(line)
    return lines


def best_on_validation(rows: Rows) -> dict[str, Any] | None:
    """The row of the highest validation AUC."""
    return max(rows, key=lambda row: row["validation_auc"], default=None)


def _reached(row: dict[str, Any], metric: str, target: float) -> str:
    (low, high), figure = row[f"{metric}_ci"], row[metric]
    said = f"{metric.upper()} {figure:.4f} [{low:.3f}, {high:.3f}], target {target:.4f}: "
    if figure >= target:
        where = "begins below it" if low < target else "lies above it"
        return said + f"**met**, the interval over users {where}"
    where = "holds it" if high >= target else "ends below it"
    return said + f"**missed**, the interval over users {where}"


def published_lines() -> list[str]:
    """What others report on the same split, AUC / UAUC, a line a source."""
    return [
        f"- {source}: "
        + "; ".join(f"{name} {auc}" + f" / {uauc}" * bool(uauc) for name, auc, uauc in methods)
        for source, methods in PUBLISHED.items()
    ]


def page_sections(results: Path, books: Path) -> dict[str, list[str]]:
    """Of docs/results.md, by the name of their markers: from the results on MovieLens-1M and
    Book-Crossing."""
    rows, more = read_table(results), read_table(books)
    return {
        "rows": [*shown_table([*rows, *more]), "", *headline([*rows, *more])],
        "targets": targets([*rows, *more]),
        "published": published_lines(),
        "frozen": frozen_lines(results),
    }


def shown_table(rows: Rows) -> list[str]:
    """The rows of `SHOWN`, and all of Book-Crossing with a language model, as a Markdown table."""
    lines = ["| track | row | seeds | AUC | UAUC |", "| --- | --- | --: | --- | --- |"]
    for row in rows:
        track, name = row["track"], name_of(row)
        if name in SHOWN[track] or (track == "frozen" and row["training"]):
            shown = " | ".join(
                _bracketed(row, m, f" ± {bare(row[f'{m}_sd'], 3)}" * (row["seeds"] > 1))
                for m in METRICS
            )
            lines.append(f"| {track} | {name} | {row['seeds']} | {shown} |")
    return lines


def frozen_lines(results: Path) -> list[str]:
    """What `frozen.py` has measured, as a Markdown table."""
    found = json.loads((results / "frozen.json").read_text(encoding="utf-8"))
    lines = ["| histories of test rows | AUC | UAUC |", "| --- | --- | --- |"]
    for name in ("growing", "frozen"):
        shown = (_bracketed(found[name], metric) for metric in METRICS)
        lines.append(f"| {name} | {' | '.join(shown)} |")
    away = (
        f"{bare(found['difference'][metric], 4, '+')} "
        f"[{', '.join(bare(bound, 4, '+') for bound in found['difference'][f'{metric}_ci'])}]"
        for metric in METRICS
    )
    return [*lines, f"| frozen minus growing, paired | {' | '.join(away)} |"]
