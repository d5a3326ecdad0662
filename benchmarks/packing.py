"""Packed rows against one row a sample, on real ratings with a trained checkpoint.

    python benchmarks/packing.py runs/demo/checkpoint-slim --data runs/demo/data

Two figures: the largest difference between a packed score and the score of the sample alone over
real test rows, and labels per second of training (forward and backward; LoRA and fusion trainable)
both ways on the same rows, alternating, in one process. Writes `benchmarks/results/packing.json`.
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import peft
import torch
import transformers
from datasets import Dataset
from tqdm.auto import tqdm

from ccf_llm_hf.data.grouping import Group, cut_by_budget, group_rows
from ccf_llm_hf.data.prepared import load_prepared
from ccf_llm_hf.inference.checkpoint import load_checkpoint
from ccf_llm_hf.inference.scoring import score_split
from ccf_llm_hf.training.collator import PackingCollator


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
    window = processor.history_window
    packed = score_split(model, processor, part, history_window=window)
    alone = score_split(model, processor, part, history_window=window, max_candidates=1)
    difference = np.abs(packed - alone)
    return {
        "rows": len(part),
        "largest": float(difference.max()),
        "mean": float(difference.mean()),
        "logit_std": float(packed.std()),
    }


def labels_per_second(model: Any, processor: Any, groups: list[Group], budget: int) -> float:
    """One pass of forward and backward over the groups in batches of `budget` padded tokens."""
    collate = PackingCollator(processor)
    lengths = [processor.count_tokens(group) for group in groups]
    started = time.perf_counter()
    for batch in cut_by_budget(range(len(groups)), lengths, budget):
        model(**collate([groups[index] for index in batch])).loss.backward()
    model.zero_grad()
    return sum(len(group.labels) for group in groups) / (time.perf_counter() - started)


def training_speed(
    model: Any, processor: Any, split: Dataset, rows: int, repeats: int
) -> dict[str, Any]:
    """Labels per second packed and alone, alternating on the same rows."""
    model.config.lora = {"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "v_proj"]}
    peft.inject_adapter_in_model(peft.LoraConfig(**model.config.lora), model.language_model)
    model.requires_grad_(False).train()
    for _, parameter in model.fusion_parameters() + model.lora_parameters():
        parameter.requires_grad_(True)
    part = split.select(range(rows))
    window = processor.history_window
    ways = {"packed": group_rows(part, window), "alone": group_rows(part, window, max_candidates=1)}
    rates: dict[str, list[float]] = {name: [] for name in ways}
    with tqdm(total=repeats * len(ways), desc="training speed", unit=" runs") as bar:
        for _ in range(repeats):
            for name, groups in ways.items():
                rates[name].append(labels_per_second(model, processor, groups, 1024))
                bar.update()
    tokens = {
        name: sum(processor.count_tokens(group) for group in groups) / rows
        for name, groups in ways.items()
    }
    return {
        "rows": rows,
        "labels_per_second": {name: round(median(values), 2) for name, values in rates.items()},
        "runs": {name: [round(v, 2) for v in values] for name, values in rates.items()},
        "tokens_per_label": {name: round(value, 2) for name, value in tokens.items()},
        "speedup": round(median(rates["packed"]) / median(rates["alone"]), 2),
    }


def main() -> None:
    """Measure, print and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", help="checkpoint folder, full or slim")
    parser.add_argument("--data", required=True, help="prepared data folder")
    parser.add_argument("--rows", type=int, default=500, help="test rows to compare")
    parser.add_argument("--train-rows", type=int, default=96, help="training rows to time")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each way")
    parser.add_argument("--out", default="benchmarks/results/packing.json", help="results file")
    options = parser.parse_args()
    data = load_prepared(options.data)
    model, processor = load_checkpoint(options.checkpoint)
    report = {
        "equality": equality(model, processor, data.splits["test"], options.rows, seed=0),
        "training": training_speed(
            model, processor, data.splits["train"], options.train_rows, options.repeats
        ),
        "hardware": {"cpu_cores": os.cpu_count(), "machine": platform.machine()},
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "prompt": {"history": processor.history_format, "candidate": processor.candidate_format},
        "history_window": list(processor.history_window),
        "seed": 0,
    }
    Path(options.out).parent.mkdir(parents=True, exist_ok=True)
    Path(options.out).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
