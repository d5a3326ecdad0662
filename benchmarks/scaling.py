"""Does it grow linearly? Preparing, fitting CF and packing on synthetic tables of up to 10 million
interactions and 1 million items.

    python benchmarks/scaling.py

Each step runs in a process of its own. CF is one fit of matrix factorization with given penalties
(no grid, one snapshot), as each fit of a grid is alike; packing is grouping the training rows and
writing batches for 20,000 of their labels. Writes `benchmarks/results/scaling.json` and
`scaling.png`.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from around import run
from workload import line, write_results

SIZES = {1_000_000: 100_000, 3_000_000: 300_000, 10_000_000: 1_000_000}  # rows -> items
PACKED_LABELS = 20_000
STEPS = ("prepare", "fit-cf", "pack")


def write_tables(rows: int, items: int, folder: Path) -> None:
    """A rating table with popular items and busy users, and its titles."""
    random = np.random.default_rng(0)
    users = rows // 100
    activity, popularity = random.lognormal(0, 1, users), 1 / (np.arange(items) + 20) ** 0.8
    user = random.choice(users, rows, p=activity / activity.sum())
    item = random.permutation(items)[random.choice(items, rows, p=popularity / popularity.sum())]
    taste = random.normal(0, 0.8, users)[user] + random.normal(0, 0.8, items)[item]
    liked = random.random(rows) < 1 / (1 + np.exp(-taste))
    table = {
        "user_id": user,
        "item_id": item,
        "label": liked.astype(np.int64),
        "timestamp": np.sort(random.integers(0, 86400 * 720, rows)),
    }
    pd.DataFrame(table).to_parquet(folder / "interactions.parquet")
    titles = [f"Item {number} ({1950 + number % 70})" for number in range(items)]
    pd.DataFrame({"item_id": range(items), "title": titles}).to_parquet(folder / "items.parquet")


def pack(folder: str, backbone: str) -> None:
    """Group the training rows and write batches for some of them; run in its own process."""
    from transformers import AutoTokenizer

    from ccf_llm_hf.data.grouping import group_rows
    from ccf_llm_hf.data.prepared import load_prepared
    from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor
    from ccf_llm_hf.modeling.ranking_ccf_llm import cut_by_budget
    from ccf_llm_hf.training.collator import PackingCollator

    data = load_prepared(folder)
    groups = group_rows(data.splits["train"], (20, 16))
    processor = CCFLLMProcessor(
        AutoTokenizer.from_pretrained(backbone),
        list(data.items["item_id"]),
        list(data.items["title"]),
        sorted({group.user for group in groups}),
    )
    collate, labels, some = PackingCollator(processor), 0, []
    for group in groups:
        some.append(group)
        labels += len(group.labels)
        if labels >= PACKED_LABELS:
            break
    lengths = [processor.count_tokens(group) for group in some]
    for batch in cut_by_budget(lengths, 1024):
        collate([some[index] for index in batch])


def measure(rows: int, items: int) -> dict[str, Any]:
    """Seconds and peak MB of every step at one size."""
    from ccf_llm_hf.data.assets import load_backbone_path

    command = (sys.executable, "-m", "ccf_llm_hf.cli")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tables(rows, items, folder)
        tables = ("--interactions", str(folder / "interactions.parquet"))
        tables += ("--items", str(folder / "items.parquet"), "--label-column", "label")
        tables += ("--max-history", "35")
        penalties = ("--l2-factors", "8", "--l2-user-bias", "2", "--l2-item-bias", "2")
        one_fit = ("--cross-fit", "snapshots", "--snapshots", "1")
        figures = {
            "prepare": run(*command, "prepare", "table", *tables, "--out", str(folder / "data")),
            "fit-cf": run(
                *(*command, "fit-cf", "mf", "--data", str(folder / "data")),
                *("--out", str(folder / "cf"), *one_fit, *penalties),
            ),
            "pack": run(
                *(sys.executable, __file__, "--pack", str(folder / "data")),
                load_backbone_path("smollm2-135m-instruct")[0],
            ),
        }
    return {
        step: {"seconds": round(seconds, 2), "peak_mb": round(megabytes)}
        for step, (seconds, megabytes) in figures.items()
    }


def exponent(sizes: list[int], values: list[float]) -> float:
    """Slope of log value over log size: 1 is linear."""
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def plot(points: dict[int, dict[str, Any]], path: str) -> None:
    """Seconds and memory against interactions."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for axes, key, label in zip(
        panels, ("seconds", "peak_mb"), ("seconds", "peak memory, MB"), strict=True
    ):
        for step in STEPS:
            axes.plot(list(points), [p[step][key] for p in points.values()], "o-", label=step)
        axes.set(xscale="log", yscale="log", xlabel="interactions", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(description="Growth with the size of the data.")
    parser.add_argument("--out", default="benchmarks/results/scaling.json", help="results file")
    parser.add_argument("--largest", type=int, default=max(SIZES), help="skip larger sizes")
    parser.add_argument("--pack", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.pack:
        pack(*options.pack)
        return
    points = {}
    for rows, items in SIZES.items():
        if rows <= options.largest:
            points[rows] = {"items": items} | measure(rows, items)
            print(json.dumps(points[rows]), flush=True)
    sizes = list(points)
    exponents = {
        step: {
            key: round(exponent(sizes, [p[step][key] for p in points.values()]), 3)
            for key in ("seconds", "peak_mb")
        }
        for step in STEPS
    }
    plot(points, options.out.replace(".json", ".png"))
    summary = [
        line(
            f"{step}: growth of seconds with the data, up to {sizes[-1]:,} interactions",
            "exponent at most 1.1",
            exponents[step]["seconds"],
            "",
            exponents[step]["seconds"] <= 1.1,
        )
        for step in STEPS
    ]
    write_results(options.out, {"points": points, "exponents": exponents, "summary": summary})


if __name__ == "__main__":
    main()
