"""The figures of README and docs are those of the committed results files."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_readme_figures_come_from_the_results_files() -> None:
    run = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "readme.py", "--check"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr


def test_figures_in_the_prose_of_the_results_are_those_of_a_results_file() -> None:
    prose = re.sub(
        r"<!-- (\w+): begin.*?<!-- \1: end[^>]*>",
        "",
        (ROOT / "docs" / "results.md").read_text(),
        flags=re.DOTALL,
    )
    figures = set(re.findall(r"(?<!\d)0?(\.\d{4})", prose))
    assert len(figures) > 5
    table = json.loads((ROOT / "results/ml-1m/table.json").read_text())
    measured = {f"{abs(number):.4f}".removeprefix("0") for number in numbers_in(table)}
    measured |= set(re.findall(r"\.\d{4}", (ROOT / "results/ml-1m/experiments.md").read_text()))
    assert figures - measured == set()


def numbers_in(data: object) -> Iterator[float]:
    """Every float of a JSON document, however deep."""
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, list):
        for part in data:
            yield from numbers_in(part)
    elif isinstance(data, float):
        yield data
