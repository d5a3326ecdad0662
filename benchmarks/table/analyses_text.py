"""The analyses in plain sentences, each made from its figures: no conclusion is written here."""

from collections.abc import Mapping, Sequence
from typing import Any

Entry = Mapping[str, Any]
SIDES = {"item": "item", "user": "user", "both": "item and user"}
SLICES = {"warm_pair": "warm pair", "cold_user": "cold user", "cold_item": "cold item"}
ECE_TARGET = 0.02


def analyses_markdown(content: Mapping[str, Any], images: str = "") -> str:
    """Tables, sentences and plots as Markdown.

    Args:
        content: of `analyses.json`.
        images: what to write before the names of the plots' files, such as `../results/ml-1m/`.
    """
    rows = content["blanked"][0]["rows"]
    sampled = f", {rows:,} rows of whole users drawn by seed" if content["max_rows"] else ""
    sections = [
        ("Warm and cold", _slices(content["slices"]), ""),
        (
            f"CF vectors taken away (on {content['split']}{sampled})",
            _blanked(content["blanked"]),
            "cold_start.png",
        ),
        (
            f"A new user, by the number of likes ({content['new_user'][0]['rows']:,} rows)",
            _new_user(content["new_user"]),
            "new_user.png",
        ),
        (
            "Does the gate turn to text for cold items?",
            _gate(content["gate"]),
            "gate.png" * bool(content["gate"]),
        ),
        ("Calibration", _calibration(content["calibration"]), "reliability.png"),
    ]
    lines = []
    for title, body, image in sections:
        lines += [f"### {title}", "", *body, ""]
        if image:
            lines += [f"![{title}]({images}{image})", ""]
    return "\n".join(lines)


def _slices(slices: Mapping[str, Any]) -> list[str]:
    """AUC and UAUC of each slice, a row a method."""
    first = next(iter(slices.values()))
    names = [name for name in SLICES if first.get(name, {}).get("rows")]
    heads = [f"{SLICES[name]} ({first[name]['rows']:,} rows)" for name in names]
    lines = [
        "AUC / UAUC. " + "; ".join(f"{SLICES[n]}: {first[n]['definition']}" for n in names) + ".",
        "",
        f"| method | {' | '.join(heads)} |",
        "| --- |" + " --: |" * len(names),
    ]
    for method, parts in slices.items():
        cells = [f"{_plain(parts[n]['auc'])} / {_plain(parts[n]['uauc'])}" for n in names]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return lines


def _blanked(entries: Sequence[Entry]) -> list[str]:
    lines = []
    for side in dict.fromkeys(entry["side"] for entry in entries):
        mine = [entry for entry in entries if entry["side"] == side]
        most = max(entry["share"] for entry in mine)
        ends = [entry for entry in mine if entry["share"] == most]
        lines.append(
            f"- With {most:.0%} of the known {SIDES[side]} vectors blanked: "
            + "; ".join(f"{entry['method']} {_moved(entry)}" for entry in ends)
            + f". {_extremes(ends)}"
        )
    return lines


def _new_user(entries: Sequence[Entry]) -> list[str]:
    lines = []
    for method in dict.fromkeys(entry["method"] for entry in entries):
        mine = sorted((e for e in entries if e["method"] == method), key=lambda e: e["likes"])
        fewest, most = mine[0]["likes"], mine[-1]["likes"]
        helped = [e["likes"] for e in mine if _direction(e["auc_change_ci"]) > 0]
        clear = (
            f"AUC is clearly above that of {fewest} likes with {_listed(helped)}"
            if helped
            else f"with no number of likes is AUC clearly above that of {fewest}"
        )
        lines.append(f"- From {fewest} likes to {most}, {method} {_moved(mine[-1])}; {clear}.")
    return [*lines, "", _extremes([e for e in entries if e["likes"] == most])]


def _gate(gates: Mapping[str, Any]) -> list[str]:
    if not gates:
        return ["None of the analyzed methods has a gate."]
    return [
        "By the interval of the difference between items without a CF vector and popular ones:",
        "",
        *(f"- {method}: {gate['verdict']}." for method, gate in gates.items()),
    ]


def _calibration(methods: Mapping[str, Any]) -> list[str]:
    lines = []
    for method, result in methods.items():
        before, after = (result["measured"][key]["ece"] for key in ("none", "temperature"))
        moved = round(after, 3) - round(before, 3)
        change = f"{'falls' if moved < 0 else 'rises'} from {before:.3f} to {after:.3f}"
        change = change if moved else f"stays at {after:.3f}"
        target = "within" if after <= ECE_TARGET else "above"
        fitted = result["temperature"]["temperature"]
        lines.append(
            f"- {method}: ECE on {result['measured']['split']} {change} with the temperature "
            f"{fitted:.2f} that validation asks for, {target} the target of {ECE_TARGET}; "
            f"{_against_chance(after, result['measured']['temperature']['calibrated_ece'])}. On "
            f"validation, {result['verdict']}."
        )
    return lines


def _against_chance(value: float, perfect: Mapping[str, Any]) -> str:
    low, high = perfect["ci"]
    relation = "more" if value > high else "no more"
    return (
        f"{relation} than perfectly calibrated probabilities would show on as many independent "
        f"rows ({perfect['mean']:.3f} [{low:.3f}, {high:.3f}])"
    )


def _moved(entry: Entry) -> str:
    """What AUC and UAUC did, said to have fallen or risen only where the interval says so."""
    parts = []
    for metric in ("auc", "uauc"):
        value, change, bounds = (entry[f"{metric}{end}"] for end in ("", "_change", "_change_ci"))
        name = metric.upper()
        if value is None or change is None or None in bounds:
            parts.append(f"has no defined {name}")
        elif change == 0 and bounds == [0, 0]:
            parts.append(f"stays at {name} {value:.4f}")
        else:
            verb = {-1: "falls", 0: "does not clearly move", 1: "rises"}[_direction(bounds)]
            low, high = bounds
            parts.append(
                f"{verb} in {name} from {value - change:.4f} to {value:.4f} "
                f"({change:+.4f} [{low:+.4f}, {high:+.4f}])"
            )
    return " and ".join(parts)


def _direction(bounds: Sequence[float | None]) -> int:
    """1 or -1 where an interval lies above or below zero, else 0."""
    low, high = bounds
    if low is None or high is None:
        return 0
    return 1 if low > 0 else -1 if high < 0 else 0


def _extremes(entries: Sequence[Entry]) -> str:
    ranked = sorted((e for e in entries if e["auc"] is not None), key=lambda e: e["auc"])
    if len(ranked) < 2:
        return ""
    return f"Highest AUC there: {_with_bounds(ranked[-1])}; lowest: {_with_bounds(ranked[0])}."


def _with_bounds(entry: Entry) -> str:
    low, high = (_plain(bound) for bound in entry["auc_ci"])
    return f"{entry['method']}, {entry['auc']:.4f} [{low}, {high}]"


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _plain(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"
