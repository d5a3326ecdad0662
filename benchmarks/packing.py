"""Packed rows against every sample alone, on real ratings with a trained checkpoint.

    python benchmarks/packing.py

The largest difference between a packed score and the score of the sample alone over real test rows.
Writes `benchmarks/results/packing.json`.
"""

from typing import Any

import numpy as np
from datasets import Dataset
from workload import arguments, line, write_results

from ccf_llm_hf.data.prepared import load_prepared
from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.inference.score_table import score_table


def equality(model: Any, processor: Any, split: Dataset, rows: int, seed: int) -> dict[str, Any]:
    """Largest and mean absolute logit difference, packed against alone, over whole users."""
    users = np.random.default_rng(seed).permutation(sorted(set(split["user_id"])))
    chosen: list[int] = []
    owner = np.array(split["user_id"])
    for user in users:
        if len(chosen) >= rows:
            break
        chosen += np.flatnonzero(owner == user).tolist()
    part = split.select(chosen)
    packed = score_table(model, processor, part)["score"]
    alone = score_table(model, processor, part, max_candidates=1)["score"]
    difference = np.abs(packed - alone)
    return {
        "rows": len(part),
        "largest": float(difference.max()),
        "mean": float(difference.mean()),
        "logit_std": float(packed.std()),
    }


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "packing.json")
    parser.add_argument("--checkpoint", default="runs/bench/checkpoint-slim", help="a checkpoint")
    parser.add_argument("--rows", type=int, default=500, help="test rows to compare")
    options = parser.parse_args()
    data = load_prepared(options.data)
    model, processor = load_checkpoint(options.checkpoint)
    equal = equality(model, processor, data.splits["test"], options.rows, seed=0)
    largest = equal["largest"]
    name = "packed equals alone, largest difference over real rows"
    results = {
        "equality": equal,
        "prompt": {"history": processor.history_format, "candidate": processor.candidate_format},
        "history_window": list(processor.history_window),
        "summary": [line(name, "at most 1e-4", largest, "logit", largest <= 1e-4)],
    }
    write_results(options.out, results)


if __name__ == "__main__":
    main()
