"""What the table says in words: differences outside their intervals, and targets met or missed."""

from collections.abc import Sequence
from typing import Any

from cells import name_of

Rows = Sequence[dict[str, Any]]

# The highest published AUC and UAUC of 7B models on the protocol track; the open track's are ours.
TARGETS = {"protocol": (0.7606, 0.7146), "open": (0.82, 0.76)}
METRICS = ("auc", "uauc")
# What every row is compared with, by the names in `table.json` and those that are shown; other
# comparisons are of a few rows only.
CONTROLS = {
    "means of the track": "item + user mean",
    "MF": "MF",
    "MF, folded in": "MF, folded in",
    "gate": "gate",
}
# A difference that no reader of four digits can see is not called one, whatever its interval.
SMALLEST = 0.0005


def differences_table(rows: Rows) -> list[str]:
    """The paired difference of every row from every control of `CONTROLS` with its standard
    deviation over seeds and its interval over users, bold where the interval over both leaves zero
    out, as a Markdown table; empty where no row was compared.

    Args:
        rows: of one track and budget, as `table.write_table` returns them.
    """
    controls = [name for name in _controls(rows) if name in CONTROLS]
    if not controls:
        return []
    pairs = [(control, metric) for control in controls for metric in METRICS]
    heads = [f"{metric.upper()} against {CONTROLS[control]}" for control, metric in pairs]
    lines = [f"| row | {' | '.join(heads)} |", f"| --- |{' --- |' * len(heads)}"]
    for row in rows:
        if row["differences"]:
            cells = (_difference(row, *pair) for pair in pairs)
            lines.append(f"| {name_of(row)} | {' | '.join(cells)} |")
    return lines


def _controls(rows: Rows) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["differences"]))


def _difference(row: dict[str, Any], control: str, metric: str) -> str:
    found = row["differences"].get(control)
    if not found:
        return ""
    low, high = found[f"{metric}_ci"]
    value = f"{found[metric]:+.4f}"
    spread = f" ± {found[f'{metric}_sd']:.4f}" if row["seeds"] > 1 else ""
    shown = f"**{value}**" if _side(found, metric) else value
    return f"{shown}{spread} [{low:+.4f}, {high:+.4f}]"


def _side(found: dict[str, Any], metric: str) -> int:
    """1 above, -1 below, 0 where zero is in the interval over users and trainings or the difference
    is too small to see."""
    low, high = found[f"{metric}_wide"]
    if abs(found[metric]) < SMALLEST:
        return 0
    return int(low > 0) - int(high < 0)


def differences_in_words(rows: Rows) -> list[str]:
    """A sentence for every control of a track and each metric: who is above it by more than the
    interval, how many are below, and how many cannot be told apart. Of what few rows are
    compared with, their differences. Paired over users, with what trainings differ by.

    Args:
        rows: of one track and budget, as `table.write_table` returns them.
    """
    lines = []
    for control in _controls(rows):
        mine = [row for row in rows if control in row["differences"]]
        if control in CONTROLS:
            lines += [
                f"- **{metric.upper()} against {CONTROLS[control]}**: "
                f"{_against(control, metric, mine)}."
                for metric in METRICS
            ]
        else:
            lines += [
                f"- **{name_of(row)} against {control}**: "
                + ", ".join(f"{m.upper()} {_difference(row, control, m)}" for m in METRICS)
                + "."
                for row in mine
            ]
    return lines


def _against(control: str, metric: str, rows: Rows) -> str:
    sides = {name_of(row): _side(row["differences"][control], metric) for row in rows}
    above = [f"*{name}*" for name, side in sides.items() if side > 0]
    below = sum(side < 0 for side in sides.values())
    return (
        f"above it: {', '.join(above) or 'none'}; below it: {below} of {len(sides)}; "
        f"not told apart: {len(sides) - len(above) - below}"
    )


def headline(rows: Rows) -> list[str]:
    """A line on how the rows with a language model of a track stand to its controls; none where no
    row has one.

    Args:
        rows: of one track and budget, as `table.write_table` returns them.
    """
    models = [row for row in rows if row["backbone"]]
    said = [
        f"against {CONTROLS[control]} {_counted(models, control, 'auc')} in AUC and "
        f"{_counted(models, control, 'uauc')} in UAUC"
        for control in CONTROLS
        if control != "gate" and any(control in row["differences"] for row in models)
    ]
    if not said:
        return []
    return [
        f"- **{models[0]['track']}**, {len(models)} rows with a language model, above / not told "
        f"apart / below by the intervals over users and trainings: {'; '.join(said)}."
    ]


def _counted(rows: Rows, control: str, metric: str) -> str:
    sides = [
        _side(row["differences"][control], metric) for row in rows if control in row["differences"]
    ]
    return " / ".join(str(sides.count(side)) for side in (1, 0, -1))


def targets_in_words(rows: Rows) -> list[str]:
    """Of each track, what the row with a language model of the highest validation AUC reaches of
    the targets, and which rows without one have more.

    Args:
        rows: of the full budget.
    """
    lines = []
    for track, wanted in TARGETS.items():
        mine = [row for row in rows if row["track"] == track]
        models = [row for row in mine if row["backbone"]]
        if not models:
            continue
        best = max(models, key=lambda row: row["validation_auc"])
        said = [
            _reached(best, metric, target) for metric, target in zip(METRICS, wanted, strict=True)
        ]
        seeds = f"{best['seeds']} seed" + "s" * (best["seeds"] > 1)
        lines.append(
            f"- **{track}**, row with a language model chosen on validation: {name_of(best)}, "
            f"{seeds}. {'; '.join(said)}.{_ties(best, models)}{_simpler(best, mine)}"
        )
    return lines


def _ties(best: dict[str, Any], models: Rows) -> str:
    """The other rows with a language model that validation hardly tells from the best."""
    ties = [
        row
        for row in models
        if row is not best and best["validation_auc"] - row["validation_auc"] < SMALLEST
    ]
    if not ties:
        return ""
    return f" Less than {SMALLEST:.4f} of validation AUC behind it: {_with_test(ties)}."


def _simpler(best: dict[str, Any], rows: Rows) -> str:
    """The rows without a language model that validation puts above the chosen one."""
    above = [
        row
        for row in rows
        if not row["backbone"] and row["validation_auc"] > best["validation_auc"]
    ]
    if not above:
        return ""
    return f" Without a language model, validation puts above it: {_with_test(above)}."


def _with_test(rows: Rows) -> str:
    return ", ".join(
        f"*{name_of(row)}* (test {row['auc']:.4f} / {row['uauc']:.4f})" for row in rows
    )


def _reached(row: dict[str, Any], metric: str, target: float) -> str:
    """Whether a row's mean reaches a target, and where its interval over users lies."""
    (low, high), figure = row[f"{metric}_ci"], row[metric]
    said = f"{metric.upper()} {figure:.4f} [{low:.3f}, {high:.3f}], target {target:.4f}: "
    if figure >= target:
        where = "begins below it" if low < target else "lies above it"
        return said + f"**met**, the interval over users {where}"
    where = "holds it" if high >= target else "ends below it"
    return said + f"**missed**, the interval over users {where}"
