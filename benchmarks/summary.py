"""Collect the results files into `benchmarks/results/summary.json` and print the table.

python benchmarks/summary.py
"""

import json
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
FILES = (
    "training",
    "same_labels",
    "same_labels_cf_logit",
    "ranking",
    "around",
    "packing",
    "tokens",
)


def collect() -> list[dict]:
    """Every target with its measured value, from all results files that are there."""
    entries: list[dict] = []
    for name in FILES:
        file = RESULTS / f"{name}.json"
        if file.is_file():
            found = json.loads(file.read_text(encoding="utf-8"))
            entries += found if isinstance(found, list) else found.get("summary", [])
    return entries


def table(entries: list[dict]) -> list[str]:
    """The targets as Markdown."""
    lines = ["| figure | target | measured | |", "| --- | --- | ---: | --- |"]
    for entry in entries:
        verdict = "holds" if entry["holds"] else "**missed**"
        lines.append(
            f"| {entry['name']} | {entry['target']} | {entry['measured']} {entry['unit']} "
            f"| {verdict} |"
        )
    return lines


def main() -> None:
    """Write and print."""
    entries = collect()
    (RESULTS / "summary.json").write_text(json.dumps(entries, indent=2) + "\n", encoding="utf-8")
    print("\n".join(table(entries)))


if __name__ == "__main__":
    main()
