"""The README's figures are those of the committed results files."""

import subprocess
import sys
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
