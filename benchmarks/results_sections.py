"""What docs/results.md and the README show of a reproduced table, from its committed files."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from analyses_text import analyses_markdown
from cells import CF_NAMES, SMOLLM, TRACKS, name_of, plan
from table import PUBLISHED, markdown, published, read_cells
from words import (
    differences_in_words,
    differences_table,
    headline,
    targets_in_words,
)

RESULTS = Path(__file__).resolve().parent.parent / "results" / "ml-1m"
QUICK = Path(__file__).resolve().parent / "results" / "quick.json"
SEEDS, WORKERS = 3, 2
LONGEST = 45  # minutes that a cell may take on 2 cores
COMMAND = f"ccf-llm reproduce ml-1m --budget full --seeds {SEEDS}"
# The rows of the README's table: what is compared with, and the method.
MAIN_ARMS = (
    "item + user mean",
    "CF",
    "CF, folded in",
    "CF, recent likes",
    "text_only",
    "average of CF and text_only",
    "average of MF and LightGCN",
    "cf_only",
    "gate",
    "gate, CF target",
    "gate, CF target, k-fold CF",
    "gate, CF target, k-fold CF, recent likes",
    "gate and CF logit",
    "gate and folded CF logit",
    "gate and folded CF logit, ranking loss",
    "average of CF and gate",
    "average of CF and gate, both with recent likes, and LightGCN",
    "average of folded CF and gate",
)
SCHEMES = {  # arms of the table by what their training rows see
    "gate": "snapshots in time",
    "gate, in-sample CF": "the vectors fitted on it (in-sample)",
    "gate, in-sample CF, slot dropout": "the same, three in ten taken away (slot dropout)",
    "gate, k-fold CF": "vectors of the folds without it (k-fold)",
}
OTHERS = {"ml-100k": "MovieLens-100K", "ml-latest-small": "MovieLens latest-small"}


def load_table() -> list[dict[str, Any]]:
    """Rows of `table.json`; none where it is missing."""
    file = RESULTS / "table.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def track_section(track: str) -> list[str]:
    """One track's tables, or that there is none yet."""
    rows = [row for row in load_table() if row["track"] == track]
    if not rows:
        return missing("table.json", f"rows of the {track} track", COMMAND)
    lines = [f"{TRACKS[track]}.", "", *markdown(rows).rstrip().splitlines()]
    full = _fullest(rows)
    table, said = differences_table(full), differences_in_words(full)
    if not said:
        return lines
    about = (
        "Differences, paired over users, ± over seeds; brackets are intervals over users, bold: "
        "zero is outside of the interval over users and trainings ([definitions](#definitions))."
    )
    lines += ["", about, "", *table]
    return [*lines, "", "In words:", "", *said]


def target_section() -> list[str]:
    """What the best rows reach of the targets."""
    rows = load_table()
    said = targets_in_words([row for row in rows if row["budget"] == "full"])
    return said or missing("table.json", "rows of the full budget", COMMAND)


def other_section() -> list[str]:
    """The tables of the other data sets, made by the same command."""
    lines = []
    for name in OTHERS:
        file = RESULTS.parent / name / "table.json"
        if not file.is_file():
            return [f"*`results/{name}` holds no results yet: run `ccf-llm reproduce {name}`.*"]
        text = markdown(json.loads(file.read_text(encoding="utf-8")))
        text = text.replace("### ", f"### {OTHERS[name]}: ")
        lines += [*text.rstrip().splitlines(), ""]
    return lines[:-1]


def leak_section() -> list[str]:
    """The gate trained on CF vectors that know its labels, and on others, side by side."""
    rows = [
        row
        for row in load_table()
        if row["arm"] in SCHEMES
        and (row["track"], row["budget"], row["training"]) == ("protocol", "full", "joint")
        and row["cf"] in ("mf", "mf_folds")
        and row["backbone"] == SMOLLM
    ]
    if not rows:
        return missing("table.json", "rows of the gate", COMMAND)
    heads = ("a training row sees", "seeds", "temperature", "validation AUC / UAUC")
    lines = [f"| {' | '.join(heads)} | test AUC | test UAUC |"]
    lines += ["| --- | --: | --: | --- | --- | --- |"]
    for row in sorted(rows, key=lambda row: list(SCHEMES).index(row["arm"])):
        lines.append(
            f"| {SCHEMES[row['arm']]} | {row['seeds']} | {row['temperature']:.2f} "
            f"| {row['validation_auc']:.4f} / {row['validation_uauc']:.4f} "
            f"| {_against_gate(row, 'auc')} | {_against_gate(row, 'uauc')} |"
        )
    return lines


def _against_gate(row: dict[str, Any], metric: str) -> str:
    difference = row["differences"].get("gate")
    if difference is None:
        return f"{row[metric]:.4f}"
    low, high = difference[f"{metric}_ci"]
    return f"{row[metric]:.4f} ({difference[metric]:+.4f} [{low:+.4f}, {high:+.4f}])"


def repeat_section() -> list[str]:
    """Cells that were trained twice with the same settings and seeds, side by side."""
    again = read_cells(RESULTS / "repeats")
    lines = ["| row | CF | seed | validation AUC, and again | test AUC, and again | test UAUC |"]
    lines += ["| --- | --- | --: | --- | --- | --- |"]
    for key, cells in read_cells(RESULTS).items():
        for cell in cells:
            twins = [twin for twin in again.get(key, []) if twin["seed"] == cell["seed"]]
            if not twins:
                continue
            pair = (*twins, cell)
            cf = CF_NAMES.get(cell["cf"], cell["cf"])
            lines.append(
                f"| {cell['arm']} | {cf} | {cell['seed']} | {_twice(pair, 'validation', 'auc')} "
                f"| {_twice(pair, 'test', 'auc')} | {_twice(pair, 'test', 'uauc')} |"
            )
    command = f"{COMMAND} --out results/ml-1m/repeats --work runs/repeats"
    return lines if len(lines) > 2 else missing("repeats/cells", "repeated cells", command)


def _twice(pair: Sequence[dict[str, Any]], split: str, metric: str) -> str:
    return ", ".join(f"{cell[split][metric]:.4f}" for cell in pair)


def time_section() -> list[str]:
    """How long the cells of the table took, by track and budget."""
    rows = [row for row in load_table() if row["trained"]]
    if not rows:
        return missing("table.json", "trained rows", COMMAND)
    lines = ["| track | budget | trained cells | hours in all | longest row, minutes a cell |"]
    lines += ["| --- | --- | --: | --: | --: |"]
    for track, budget in dict.fromkeys((row["track"], row["budget"]) for row in rows):
        mine = [row for row in rows if (row["track"], row["budget"]) == (track, budget)]
        hours = sum(row["minutes"] * row["seeds"] for row in mine) / 60
        cells, longest = sum(row["seeds"] for row in mine), max(row["minutes"] for row in mine)
        lines.append(f"| {track} | {budget} | {cells} | {hours:.1f} | {longest:.0f} |")
    return [*lines, *whole_budget_lines(), *slow_lines(), *quick_lines()]


def whole_budget_lines() -> list[str]:
    """How long every planned row of the full budget would take, by the cells that are there."""
    keys = ("track", "arm", "cf", "training", "backbone")
    minutes = {
        tuple(cells[0][key] for key in keys): [cell["minutes"] for cell in cells]
        for cells in read_cells(RESULTS).values()
        if cells[0]["budget"] == "full"
    }
    lines = []
    for track in TRACKS:
        planned = [cell for cell in plan([track], "full", 1, "ml-1m") if cell.seeded]
        names = [tuple(getattr(cell, key) for key in keys) for cell in planned]
        known = [minutes[name] for name in names if name in minutes]
        if not known:
            continue
        usual, fastest = (SEEDS * sum(map(of_row, known)) / WORKERS / 60 for of_row in (mean, min))
        lines.append(
            f"{track} {usual:.1f} hours, {fastest:.1f} if all seeds were as fast as their row's "
            f"fastest ({len(known)} of {len(planned)} rows have cells)"
        )
    if not lines:
        return []
    return [
        "",
        f"By these minutes, most of them beside another cell, {SEEDS} seeds of every row take, "
        f"{WORKERS} cells at a time: {'; '.join(lines)}; as a sum, not as one run.",
    ]


def slow_lines() -> list[str]:
    """Which cells took longer than one is meant to take, and on how many cores."""
    named = []
    for cells in read_cells(RESULTS).values():
        slow = [cell for cell in cells if cell["minutes"] > LONGEST and cell["backbone"]]
        slow.sort(key=lambda cell: cell["seed"])
        took = [_minutes_of(cell) for cell in slow]
        if took:
            named.append(f"*{name_of(slow[0])}* ({slow[0]['track']} track): {', '.join(took)}")
    if not named:
        return []
    return [
        "",
        f"A cell is meant to take {LONGEST} minutes at most on 2 cores. These took longer: "
        f"{'; '.join(sorted(named))}.",
    ]


def _minutes_of(cell: dict[str, Any]) -> str:
    hardware = cell["hardware"]
    cores = "one core" if hardware["torch_threads"] == 1 else f"{hardware['torch_threads']} cores"
    bf16 = "" if hardware["bf16_backbone"] else ", no bf16"
    return f"{cell['minutes']:.0f} (seed {cell['seed']}, {cores}{bf16})"


def quick_lines() -> list[str]:
    """What the whole quick budget took as one command."""
    if not QUICK.is_file():
        return []
    quick = json.loads(QUICK.read_text(encoding="utf-8"))
    hardware = quick["hardware"]
    trained = sum(cell["trained"] for cell in quick["cells"])
    return [
        "",
        f"The whole of `--budget quick --workers {quick['workers']}`, from empty folders but with "
        f"the assets fetched, took {quick['minutes']:.0f} minutes on {hardware['cpu_cores']} cores "
        f"({len(quick['cells'])} cells, {trained} of them trained; `python benchmarks/quick.py`).",
    ]


def picture_section(folder: str) -> list[str]:
    """The picture of the table, if there is one."""
    if not (RESULTS / "table.png").is_file():
        return missing("table.png", "picture", COMMAND)
    return [f"![AUC and UAUC of every row]({folder}results/ml-1m/table.png)"]


def analyses_section() -> list[str]:
    """The analyses' tables, sentences and plots."""
    file = RESULTS / "analyses.json"
    if not file.is_file():
        return missing("analyses.json", "analyses", f"{COMMAND} --analyses")
    content = json.loads(file.read_text(encoding="utf-8"))
    return analyses_markdown(content, "../results/ml-1m/").rstrip().splitlines()


def main_section() -> list[str]:
    """The README's rows: controls and the method with MF, by track; the best row on validation."""
    rows = load_table()
    if not rows:
        return missing("table.json", "results", COMMAND)
    lines = ["| track | arm | CF | trained | seeds | AUC | UAUC |"]
    lines += ["| --- | --- | --- | --- | --: | --- | --- |"]
    for track in TRACKS:
        mine = _fullest([row for row in rows if row["track"] == track])
        best = max(mine, key=lambda row: row["validation_auc"], default=None)
        shown = [row for row in mine if row is best or _is_main(row)]
        lines += [_main_row(row, row is best) for row in shown]
    method, auc, *_ = max(PUBLISHED, key=lambda row: float(row[1]))
    return [
        *lines,
        "",
        "In brackets: 95 % intervals over users. **Bold**: the row of the highest validation AUC "
        f"of its track. Highest AUC that others publish on the protocol track: {auc} "
        f"({method}).",
        "",
        *headline_section(),
    ]


def headline_section() -> list[str]:
    """How the rows with a language model stand to the controls, a line a track."""
    tracks = [[row for row in load_table() if row["track"] == track] for track in TRACKS]
    said = [line for rows in tracks for line in headline(_fullest(rows))]
    return said or missing("table.json", "rows with a language model", COMMAND)


def _is_main(row: dict[str, Any]) -> bool:
    usual = row["cf"] in ("", "mf") and row["backbone"] in ("", SMOLLM)
    return usual and row["arm"] in MAIN_ARMS


def _fullest(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without the quick budget's rows, where there are trained ones of the full budget."""
    full = [row for row in rows if row["budget"] == "full"]
    return full if any(row["backbone"] for row in full) else rows


def _main_row(row: dict[str, Any], best: bool) -> str:
    mark = "**" if best else ""
    values = []
    for metric in ("auc", "uauc"):
        low, high = row[f"{metric}_ci"]
        values.append(f"{mark}{row[metric]:.4f}{mark} ({low:.3f} to {high:.3f})")
    trained = row["training"] + ", quick budget" * (row["budget"] == "quick")
    return (
        f"| {row['track']} | {row['arm']} | {CF_NAMES.get(row['cf'], row['cf'])} | {trained} "
        f"| {row['seeds']} | {' | '.join(values)} |"
    )


def missing(file: str, what: str, command: str) -> list[str]:
    """What a section says while its file is not there."""
    return [f"*`results/ml-1m/{file}` holds no {what} yet: run `{command}`.*"]


def sections() -> dict[str, list[str]]:
    """Of docs/results.md, by the name of their markers."""
    return {
        "picture": picture_section("../"),
        "headline": headline_section(),
        "protocol": track_section("protocol"),
        "open": track_section("open"),
        "published": published().rstrip().splitlines(),
        "times": time_section(),
        "targets": target_section(),
        "others": other_section(),
        "leak": leak_section(),
        "repeats": repeat_section(),
        "analyses": analyses_section(),
    }
