"""An evaluation report as a card shows it: metadata for the Hub, Markdown tables for readers."""

from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult

Report = Mapping[str, Any]
METRIC_NAMES = {"auc": "AUC", "uauc": "UAUC", "wuauc": "WUAUC", "logloss": "log loss", "ece": "ECE"}
METRIC_IDS = {"auc": "roc_auc"}  # as the Hub lists it; the others are known by our names


def eval_results(report: Report, protocol: Mapping[str, Any], dataset_id: str) -> list[EvalResult]:
    """Metadata entries (`model-index`) of the evaluated method, each with the protocol it was
    measured by and, where there is one, its interval; undefined metrics are left out."""
    values = report["methods"][report["name"]]
    measured_on = {
        "label": protocol.get("label_rule"),
        "split": protocol.get("split_rule"),
        "rows": values["rows"],
        "users": values["users"],
    }
    return [
        EvalResult(
            task_type="text-ranking",
            task_name="CTR prediction",
            dataset_type=dataset_id,
            dataset_name=str(protocol.get("name", "unnamed")),
            dataset_split=report["split"],
            dataset_args={name: fact for name, fact in measured_on.items() if fact is not None},
            metric_type=METRIC_IDS.get(key, key),
            metric_name=name,
            metric_value=round(values[key], 4),
            metric_args=_interval_args(report, values.get(f"{key}_ci")),
        )
        for key, name in METRIC_NAMES.items()
        if values.get(key) is not None
    ]


def _interval_args(report: Report, bounds: list[float | None] | None) -> dict[str, Any] | None:
    if bounds is None or None in bounds:
        return None
    interval = [round(float(bound), 4) for bound in bounds if bound is not None]
    return {"interval": interval, **report["intervals"]}


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


def gate_markdown(gate: Mapping[str, Any]) -> str:
    """The gate over the catalog, by popularity (see `inference.gate.gate_report`)."""
    lines = [
        f"Share of text over {gate['items']:,} of {gate['catalog']:,} items and all dimensions: "
        f"mean {gate['mean']:.3f}, std {gate['std']:.3f}. The items' means differ by a std of "
        f"{gate['item_std']:.3f}, the dimensions' by {gate['dimension_std']:.3f}.",
        "",
        "| training rows of the item | items | mean | std |",
        "| --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {part['train_rows']} | {part['items']:,} | {part['mean']:.3f} | {part['std']:.3f} |"
        for part in gate["by_popularity"]
    ]
    return "\n".join(lines)


def _counts(part: Mapping[str, Any]) -> str:
    return f"{part['rows']:,} rows, {part['users']:,} users"


def _number(value: float | None, sign: str = "", digits: int = 4) -> str:
    return "-" if value is None else f"{value:{sign}.{digits}f}"


def _with_interval(value: float | None, bounds: list[float | None], sign: str = "") -> str:
    if value is None or None in bounds:
        return _number(value, sign)
    low, high = (_number(bound, sign, 3) for bound in bounds)
    return f"{_number(value, sign)} ({low} to {high})"
