"""How long `ccf-llm reproduce ml-1m --budget quick` takes, from empty folders.

    python benchmarks/quick.py --workers 2

The assets (ratings, backbone) are those of the cache, fetched if they are not there. Writes
`benchmarks/results/quick.json`: the minutes of the command, and what each cell took and gave.
"""

import argparse
import json
import tempfile
from pathlib import Path

from around import cli
from workload import limit, write_results

ASKED_MINUTES = 45.0
KEPT = ("track", "arm", "cf", "training", "trained", "minutes", "auc", "uauc")


def main() -> None:
    """Run the command and write what it took."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workers", type=int, default=1, help="cells at a time")
    parser.add_argument("--out", default="benchmarks/results/quick.json", help="results file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        seconds, _ = cli(
            *("reproduce", "ml-1m", "--budget", "quick", "--workers", str(options.workers)),
            *("--work", f"{folder}/work", "--out", f"{folder}/results"),
        )
        table = json.loads((Path(folder) / "results" / "table.json").read_text(encoding="utf-8"))
    minutes = seconds / 60
    measured = {
        "workers": options.workers,
        "minutes": round(minutes, 1),
        "cells": [{key: row[key] for key in KEPT} for row in table],
        "summary": [
            limit(
                f"reproduce --budget quick --workers {options.workers}",
                ASKED_MINUTES,
                minutes,
                "min",
            )
        ],
    }
    write_results(options.out, measured)


if __name__ == "__main__":
    main()
