"""Finished cells' result files, made up, for the tests of tables, plots and docs."""

import json
from pathlib import Path
from typing import Any


def cell_result(arm: str, auc: float, **changes: Any) -> dict[str, Any]:
    """What `ccf-llm reproduce` writes of a cell, as far as the table reads it."""
    test = {"auc": auc, "uauc": auc - 0.05, "logloss": 0.6, "ece": 0.02}
    test |= {"auc_ci": [auc - 0.02, auc + 0.02], "uauc_ci": [auc - 0.08, auc - 0.01]}
    result = {"dataset": "ml-1m", "track": "protocol", "arm": arm, "cf": "mf"}
    result |= {"training": "joint", "backbone": "tiny"}
    result |= {"seed": 0, "budget": "full", "minutes": 3.0, "temperature": 1.0, "test": test}
    result |= {"trained": {"minutes": 2.0}} if changes.get("backbone") != "" else {}
    away = {"auc": auc - 0.739, "auc_ci": [auc - 0.749, auc - 0.729]}
    away |= {"uauc": 0.0, "uauc_ci": [-0.01, 0.01]}
    result["differences"] = {"MF": away}
    return result | {"validation": {"auc": auc + 0.01, "uauc": auc - 0.04}} | changes


def write_cells(results: Path, cells: list[dict[str, Any]]) -> None:
    """As result files, numbered."""
    (results / "cells").mkdir(parents=True, exist_ok=True)
    for number, cell in enumerate(cells):
        (results / "cells" / f"{number}.json").write_text(json.dumps(cell))


CONTROL = {"cf": "", "training": "", "backbone": "", "seed": None}
CELLS = [
    cell_result("item + user mean", 0.733, **CONTROL),
    cell_result("gate", 0.74),
    cell_result("gate", 0.76, seed=1, minutes=5.0),
    cell_result("gate", 0.71, budget="quick"),
    cell_result("gate and folded CF logit", 0.81, track="open"),
]
