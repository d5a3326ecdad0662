"""What the table says in words: differences outside their intervals, and targets met or missed."""

from collections.abc import Sequence
from typing import Any

Rows = Sequence[dict[str, Any]]

# The highest published AUC and UAUC of 7B models on the protocol track; the open track's are ours.
TARGETS = {"protocol": (0.7606, 0.7146), "open": (0.82, 0.76)}
METRICS = ("auc", "uauc")


def differences_in_words(rows: Rows) -> list[str]:
    """A sentence for every control of a track and each metric: who is above it, who below, who
    cannot be told apart. Paired over users; bounds are means over seeds.

    Args:
        rows: of one track and budget, as `table.write_table` returns them.
    """
    lines = []
    controls = dict.fromkeys(name for row in rows for name in row["differences"])
    for control in controls:
        for metric in METRICS:
            said = _against(control, metric, rows)
            lines.append(f"- **{metric.upper()} against {control}**: {said}.")
    return lines


def _against(control: str, metric: str, rows: Rows) -> str:
    groups: dict[str, list[str]] = {"above": [], "below": [], "not told apart": []}
    for row in rows:
        found = row["differences"].get(control)
        if found:
            low, high = found[f"{metric}_ci"]
            where = "above" if low > 0 else "below" if high < 0 else "not told apart"
            groups[where].append(f"{name_of(row)} ({found[metric]:+.4f})")
    return "; ".join(f"{where}: {', '.join(names) or 'none'}" for where, names in groups.items())


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
