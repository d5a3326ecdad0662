"""What the table says in words: differences outside their intervals, and targets met or missed."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

Rows = Sequence[dict[str, Any]]

# The highest published AUC and UAUC of 7B models on the protocol track; the open track's are ours.
TARGETS = {"protocol": (0.7606, 0.7146), "open": (0.82, 0.76)}
METRICS = ("auc", "uauc")


def differences_table(rows: Rows) -> list[str]:
    """The paired difference of every row from every control that most rows were compared with, bold
    where its interval leaves zero out, as a Markdown table; empty where no row was compared.

    Args:
        rows: of one track and budget, as `table.write_table` returns them.
    """
    controls = [name for name, compared in _controls(rows).items() if 2 * compared > len(rows)]
    if not controls:
        return []
    pairs = [(control, metric) for control in controls for metric in METRICS]
    heads = [f"{metric.upper()} against {control}" for control, metric in pairs]
    lines = [f"| row | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for row in rows:
        if row["differences"]:
            cells = (_difference(row, *pair) for pair in pairs)
            lines.append(f"| {name_of(row)} | {' | '.join(cells)} |")
    return lines


def _controls(rows: Rows) -> Counter[str]:
    """How many rows were compared with each control."""
    return Counter(name for row in rows for name in row["differences"])


def _difference(row: dict[str, Any], control: str, metric: str) -> str:
    found = row["differences"].get(control)
    if not found:
        return ""
    low, high = found[f"{metric}_ci"]
    value = f"{found[metric]:+.4f}"
    return f"{f'**{value}**' if low > 0 or high < 0 else value} [{low:+.4f}, {high:+.4f}]"


def differences_in_words(rows: Rows) -> list[str]:
    """A sentence for every control of a track and each metric: who is above it and who below by
    more than the interval, and how many cannot be told apart. Of a control that few rows were
    compared with, their differences. Paired over users; bounds are means over seeds.

    Args:
        rows: of one track and budget, as `table.write_table` returns them.
    """
    lines = []
    for control, compared in _controls(rows).items():
        if 2 * compared > len(rows):
            lines += [
                f"- **{metric.upper()} against {control}**: {_against(control, metric, rows)}."
                for metric in METRICS
            ]
        else:
            lines += [
                f"- **{name_of(row)} against {control}**: "
                + ", ".join(f"{m.upper()} {_difference(row, control, m)}" for m in METRICS)
                + "."
                for row in rows
                if control in row["differences"]
            ]
    return lines


def _against(control: str, metric: str, rows: Rows) -> str:
    above, below, apart = [], [], 0
    for row in rows:
        if found := row["differences"].get(control):
            low, high = found[f"{metric}_ci"]
            if low > 0:
                above.append(f"*{name_of(row)}*")
            elif high < 0:
                below.append(f"*{name_of(row)}*")
            else:
                apart += 1
    return (
        f"above it: {', '.join(above) or 'none'}; below it: {', '.join(below) or 'none'}; "
        f"not told apart: {apart or 'none'}"
    )


def targets_in_words(rows: Rows) -> list[str]:
    """Of each track, what the row of the highest validation AUC reaches of the targets.

    Args:
        rows: of the full budget.
    """
    lines = []
    for track, wanted in TARGETS.items():
        best = max(
            (row for row in rows if row["track"] == track),
            key=lambda row: row["validation_auc"],
            default=None,
        )
        if best is None:
            continue
        said = [
            f"{metric.upper()} {best[metric]:.4f}, target {target:.4f}: "
            + ("**met**" if best[metric] >= target else "**missed**")
            for metric, target in zip(METRICS, wanted, strict=True)
        ]
        seeds = f"{best['seeds']} seed" + "s" * (best["seeds"] > 1)
        lines.append(
            f"- **{track}**, row chosen on validation: {name_of(best)}, {seeds}. {'; '.join(said)}."
        )
    return lines


def name_of(row: dict[str, Any]) -> str:
    """A row in words: `gate (mf, joint)`; the usual backbone goes without saying."""
    details = [row[key] for key in ("cf", "training") if row[key]]
    details += [row["backbone"]] if not row["backbone"].startswith("smollm2") else []
    details = [detail for detail in details if detail]
    return f"{row['arm']} ({', '.join(details)})" if details else row["arm"]
