"""A report as a fixed-width table for the terminal."""

from typing import Any

COLUMNS = ("AUC", "95% interval", "UAUC", "95% interval", "WUAUC", "log loss", "ECE")
WIDTHS = (6, 14, 6, 14, 6, 8, 6)


def format_report(report: dict[str, Any]) -> str:
    """The report of `evaluate_scores` as text: all rows, slices, paired differences, definitions.

    Args:
        report: as returned by `evaluate_scores`, or read back from JSON.

    Returns:
        Lines of a fixed-width table, joined; undefined values are shown as "-".
    """
    width = max(map(len, report["methods"])) + 2
    lines = [
        f"{report['split']}: {_counts(report)}, {_number(report['positive_rate'])} positive",
        "",
    ]
    lines += _table("all rows", report["methods"], width)
    for name, part in report["slices"].items():
        lines += ["", f"{name}: {part['definition']} ({_counts(part)})"]
        lines += _table(name, part["methods"], width) if part["methods"] else []
    lines += ["", *_differences(report, width), "", "Definitions"]
    lines += [f"  {name:<{width}}{text}" for name, text in report["definitions"].items()]
    return "\n".join(line.rstrip() for line in lines)


def _counts(part: dict[str, Any]) -> str:
    return f"{part['rows']:,} rows, {part['users']:,} users"


def _table(title: str, methods: dict[str, dict[str, Any]], width: int) -> list[str]:
    lines = [_line(title, COLUMNS, width)]
    for name, values in methods.items():
        cells = [
            _number(values["auc"]),
            _interval(values["auc_ci"]),
            _number(values["uauc"]),
            _interval(values["uauc_ci"]),
            _number(values["wuauc"]),
            _number(values["logloss"]),
            _number(values["ece"]),
        ]
        whole = values["rows"] == max(other["rows"] for other in methods.values())
        note = "" if whole else f"  on {values['rows']:,} of these rows"
        lines.append(_line(name, cells, width) + note)
    users = next(iter(methods.values()))["uauc_users"]
    return [*lines, f"  UAUC over {users:,} users with both classes"]


def _differences(report: dict[str, Any], width: int) -> list[str]:
    settings = report["intervals"]
    lines = [
        f"{report['name']} minus the other, paired over {settings['resamples']:,} draws of users",
        _line("", ("AUC", "95% interval", "UAUC", "95% interval"), width),
    ]
    for name, values in report["differences"].items():
        cells = [
            _number(values["auc"], "+.4f"),
            _interval(values["auc_ci"], "+.3f"),
            _number(values["uauc"], "+.4f"),
            _interval(values["uauc_ci"], "+.3f"),
        ]
        lines.append(_line(name, cells, width))
    return lines


def _line(name: str, cells: Any, width: int) -> str:
    padded = (f"{cell:>{size + 2}}" for cell, size in zip(cells, WIDTHS, strict=False))
    return f"  {name:<{width}}" + "".join(padded)


def _number(value: float | None, form: str = ".4f") -> str:
    return "-" if value is None else format(value, form)


def _interval(bounds: list[float | None], form: str = ".3f") -> str:
    return "-" if None in bounds else " ".join(_number(bound, form) for bound in bounds)
