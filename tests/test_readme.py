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


# Trainings that the page tells of whose result files were not kept.
WITHOUT_A_FILE = {".6265", ".6450", ".6759", ".6767", ".7106"}


def test_figures_in_the_prose_of_the_results_are_those_of_a_results_file() -> None:
    prose = re.sub(
        r"<!-- (\w+): begin.*?<!-- \1: end[^>]*>",
        "",
        (ROOT / "docs" / "results.md").read_text(),
        flags=re.DOTALL,
    )
    figures = set(re.findall(r"(?<!\d)0?(\.\d{4})", prose))
    assert len(figures) > 10
    files = [ROOT / "results/ml-1m/table.json", ROOT / "results/ml-1m/analyses.json"]
    files += (ROOT / "results/ml-1m/repeats/cells").glob("*.json")
    measured = {
        f"{abs(number):.4f}".removeprefix("0")
        for file in files
        for number in numbers_in(json.loads(file.read_text()))
    }
    assert figures - measured - WITHOUT_A_FILE == set()


def numbers_in(data: object) -> Iterator[float]:
    """Every float of a JSON document, however deep."""
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, list):
        for part in data:
            yield from numbers_in(part)
    elif isinstance(data, float):
        yield data
