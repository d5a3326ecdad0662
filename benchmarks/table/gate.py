"""Does the gate weigh words by what CF knows? Its curve over popularity, and what it costs when CF
vectors are taken away.

    python benchmarks/table/gate.py

Of Book-Crossing's first seed, on the validation rows of the table. Half of the items, drawn by
chance, lose their CF vectors, in slots, histories and CF logits alike: the model with the gate is
to lose less AUC by it than `cf_only`, which has nothing else. Writes gate.json and gate.png beside
the table.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import Bench, sampled_rows
from rows import BACKBONE, DATASETS, Cell, plan

from ccf_llm_hf.data.assets import load_backbone_path
from ccf_llm_hf.data.prepared import load_prepared
from ccf_llm_hf.errors import InputError
from ccf_llm_hf.evaluation import UserBootstrap, auc, interval
from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.inference.gate import gate_report
from ccf_llm_hf.inference.score_table import score_table
from ccf_llm_hf.io import save_figure, write_json
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR

DATASET, SHARE = "book-crossing", 0.5
COMPARED = ("gate and CF logit", "cf_only")


def blank(model: CCFLLMForCTR, share: float, seed: int = 0) -> None:
    """Take the CF vectors of a share of the items away, and what users may like in their fields."""
    table = model.model.cf
    draw = torch.rand(len(table.item_known), generator=torch.Generator().manual_seed(seed)) < share
    table.item_known &= ~draw
    if table.item_values is not None:
        table.item_values[draw] = -1


def measure(bench: Bench, cells: list[Cell]) -> dict[str, Any]:
    """The gate of the first cell, and what blanking costs each of them, with 95 % intervals over
    users."""
    backbone, _ = load_backbone_path(BACKBONE, offline=bench.offline)
    report: dict[str, Any] = {"share": SHARE}
    costs = []
    for cell in cells:
        model, processor = load_checkpoint(str(bench.checkpoint(cell)), backbone=backbone)
        folder = bench.data(cell.track)
        report.setdefault("gate", gate_report(model, processor, folder))
        prepared = load_prepared(folder)
        rows = prepared.splits["validation"]
        pairs = rows.select_columns(["user_id", "item_id"]).to_pandas()
        whole = bench.scored(cell, "validation")
        blank(model, SHARE)
        rows = rows.select(sampled_rows(pairs, "validation"))
        blanked = score_table(model, processor, rows, lines=prepared.lines())
        labels, bootstrap = whole["label"], UserBootstrap(whole["user_id"])
        drawn = [bootstrap.auc(labels, scores["score"]) for scores in (whole, blanked)]
        values = [auc(labels, scores["score"]) for scores in (whole, blanked)]
        costs.append(drawn[0] - drawn[1])
        report["rows"], report["users"] = len(whole), whole["user_id"].nunique()
        report[cell.arm] = {
            "auc": values[0],
            "auc_blanked": values[1],
            "cost": values[0] - values[1],
            "cost_ci": interval(costs[-1]),
        }
    first, second = (report[cell.arm]["cost"] for cell in cells)
    report["difference"] = {"cost": first - second, "cost_ci": interval(costs[0] - costs[1])}
    return report


def plot(report: dict[str, Any], path: Path) -> None:
    """Draw the gate's curve, and what blanking costs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.2), layout="constrained")
    curve, bars = figure.subplots(1, 2, width_ratios=(2, 1))
    classes = report["gate"]["by_popularity"]
    curve.plot([part["train_rows"] for part in classes], [part["mean"] for part in classes], "o-")
    curve.set(xlabel="training rows of an item", ylabel="share of words", ylim=(0, 1))
    names = [name for name in COMPARED if name in report]
    costs = np.array([report[name]["cost"] for name in names])
    bounds = np.array([report[name]["cost_ci"] for name in names]).T
    bars.bar(names, costs, yerr=np.abs(bounds - costs), capsize=4)
    bars.set(ylabel=f"AUC lost, {report['share']:.0%} of items blanked")
    save_figure(figure, path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", default=f"runs/table/{DATASET}", help="of the table's command")
    parser.add_argument("--offline", action="store_true", help="use no network")
    options = parser.parse_args()
    cells = plan(DATASET, DATASETS[DATASET], 1, False)
    bench = Bench(DATASET, cells, Path(options.work), Path("results") / DATASET, options.offline)
    chosen = [next(cell for cell in cells if cell.arm == arm) for arm in COMPARED]
    try:
        for cell in chosen:
            if not bench.checkpoint(cell).exists():
                raise InputError(
                    f"{bench.checkpoint(cell)} is missing: train it with `python "
                    f"benchmarks/table/run.py {DATASET} --only {cell.name}`"
                )
        report = measure(bench, chosen)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(bench.results / "gate.json", report)
    plot(report, bench.results / "gate.png")
    print((bench.results / "gate.json").read_text(encoding="utf-8"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
