"""Numbers and tables of an evaluation report, in Markdown."""

from collections.abc import Mapping
from typing import Any


def format_number(value: float | None, digits: int = 4, sign: str = "") -> str:
    """The number with its thousands separated; a dash for one that is not defined."""
    return "-" if value is None else f"{value:{sign},.{digits}f}"


def methods_table(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table: every method with its metrics and intervals."""
    lines = [
        "| method | AUC | UAUC | WUAUC | log loss | ECE |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for name, values in methods.items():
        ranking = [_with_interval(values[key], values[f"{key}_ci"]) for key in ("auc", "uauc")]
        rest = [format_number(values[key]) for key in ("wuauc", "logloss", "ece")]
        whole = values["rows"] == max(other["rows"] for other in methods.values())
        label = name if whole else f"{name} (on {values['rows']:,} of the rows)"
        lines.append(f"| {' | '.join([label, *ranking, *rest])} |")
    return lines


def differences_table(differences: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table: paired differences with their intervals."""
    lines = ["| against | AUC | UAUC |", "| --- | --- | --- |"]
    for name, values in differences.items():
        cells = [_with_interval(values[key], values[f"{key}_ci"], "+") for key in ("auc", "uauc")]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return lines


def _with_interval(value: float | None, bounds: list[float | None], sign: str = "") -> str:
    text = format_number(value, sign=sign)
    if value is None or None in bounds:
        return text
    low, high = (format_number(bound, 3, sign) for bound in bounds)
    return f"{text} ({low} to {high})"
