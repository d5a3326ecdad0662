"""An evaluation report as a card shows it: metadata for the Hub, Markdown tables for readers."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult

Report = Mapping[str, Any]
METRIC_NAMES = {"auc": "AUC", "uauc": "UAUC", "wuauc": "WUAUC", "logloss": "log loss", "ece": "ECE"}


def eval_results(report: Report, protocol: Mapping[str, Any]) -> list[EvalResult]:
    """Metadata entries (`model-index`) of the evaluated method; undefined metrics are left out."""
    dataset = str(protocol.get("name", "unnamed"))
    values = report["methods"][report["name"]]
    return [
        EvalResult(
            task_type="text-ranking",
            task_name="CTR prediction",
            dataset_type=dataset,
            dataset_name=dataset,
            dataset_split=report["split"],
            metric_type=key,
            metric_name=name,
            metric_value=round(values[key], 4),
        )
        for key, name in METRIC_NAMES.items()
        if values.get(key) is not None
    ]


def results_markdown(report: Report) -> str:
    """All methods with their intervals, paired differences, slices and definitions."""
    level = f"{report['intervals']['level']:.0%}".replace("%", " %")
    resamples = report["intervals"]["resamples"]
    rate = _number(report["positive_rate"])
    lines = [
        f"Split `{report['split']}`: {_counts(report)}, {rate} positive. "
        f"Intervals are {level}, from {resamples:,} resamples of users.",
        "",
        *methods_table(report["methods"]),
        "",
        f"`{report['name']}` minus the other method, paired over the same resamples:",
        "",
        *differences_table(report["differences"]),
    ]
    for name, part in report["slices"].items():
        lines += ["", f"**{name}**: {part['definition']} ({_counts(part)})"]
        lines += ["", *methods_table(part["methods"])] if part["methods"] else []
    lines += ["", "Definitions:", ""]
    lines += [f"- {name}: {text}" for name, text in report["definitions"].items()]
    return "\n".join(lines)


def methods_table(methods: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Lines of a Markdown table: every method with its metrics and intervals."""
    lines = [
        "| method | AUC | UAUC | WUAUC | log loss | ECE |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for name, values in methods.items():
        ranking = [_with_interval(values[key], values[f"{key}_ci"]) for key in ("auc", "uauc")]
        rest = [_number(values[key]) for key in ("wuauc", "logloss", "ece")]
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


def _counts(part: Mapping[str, Any]) -> str:
    return f"{part['rows']:,} rows, {part['users']:,} users"


def _number(value: float | None, sign: str = "", digits: int = 4) -> str:
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def _with_interval(value: float | None, bounds: list[float | None], sign: str = "") -> str:
    if value is None or None in bounds:
        return _number(value, sign)
    low, high = (_number(bound, sign, 3) for bound in bounds)
    return f"{_number(value, sign)} ({low} to {high})"
