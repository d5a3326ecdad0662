"""Does it grow linearly, and in bounded memory? A whole run on synthetic tables of up to 10 million
interactions and 1 million items.

    python benchmarks/scale.py

Items are popular by Zipf's law, users busy by a lognormal one. Each step runs in a process of its
own: `prepare table`, `fit-cf mf` with given strengths (those that it would choose itself it tries
on 300,000 rows at most), planning (every training row is grouped and packed, without a model), 200
steps of training, scoring a tenth as many pairs as there are interactions, ranking against the
whole catalog. The backbone is a tiny random one, with the tokenizer of a real one: what
is measured is everything around it, on one thread, so that seconds, which are the processor's, are
those of an idle core. Writes `results/speed/scale.json`, an entry a size, and `scale.png`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import yaml
from workload import BACKBONE, circumstances

SIZES = (100_000, 1_000_000, 10_000_000)  # interactions
ROWS_PER_USER, ROWS_PER_ITEM, ROWS_PER_PAIR = 50, 10, 10
STEPS = ("prepare", "fit_cf", "plan", "train", "score", "rank")
STAGE: dict[str, Any] = {
    "name": "whole",
    "model": {"cf_logit": True, "cf_fold_in": True},
    "prompt": {
        "wording": "answered",
        "histories": "signed",
        "history_window": [32, 1],
        "fold_in_items": 16,
        "history_format": "title_slot",
        "candidate_format": "title_slot",
    },
    "lora": {},
    "training": {
        "labels_per_step": 128,
        "max_steps": 200,
        "max_eval_labels": 2000,
        "learning_rate": 1e-3,
        "eval_strategy": "steps",
        "eval_steps": 200,
    },
}


def write_tables(rows: int, folder: Path) -> None:
    """Ratings by users with tastes of popular items with appeal, the items' titles, and pairs to
    score."""
    random = np.random.default_rng(0)
    users, items = rows // ROWS_PER_USER, rows // ROWS_PER_ITEM
    activity, popularity = random.lognormal(0, 1, users), 1 / (np.arange(items) + 20) ** 0.8
    user = random.choice(users, rows, p=activity / activity.sum())
    item = random.permutation(items)[random.choice(items, rows, p=popularity / popularity.sum())]
    taste = random.normal(0, 0.8, users)[user] + random.normal(0, 0.8, items)[item]
    table = {
        "user_id": user,
        "item_id": item,
        "rating": np.clip(np.round(3.5 + taste + random.normal(0, 0.8, rows)), 1, 5),
        "timestamp": np.sort(random.integers(1_500_000_000, 1_600_000_000, rows)),
    }
    pd.DataFrame(table).to_parquet(folder / "interactions.parquet")
    words = ["night", "house", "river", "garden", "secret", "winter", "glass", "city", "king"]
    titles = [f"The {words[n % 7]} {words[n % 8]} {words[n % 9]} {n}" for n in range(items)]
    pd.DataFrame({"item_id": range(items), "title": titles}).to_parquet(folder / "items.parquet")
    pairs = rows // ROWS_PER_PAIR
    asked = np.sort(random.integers(0, users, pairs)), random.integers(0, items, pairs)
    pd.DataFrame({"user_id": asked[0], "item_id": asked[1]}).to_parquet(folder / "pairs.parquet")


def write_backbone(folder: Path) -> None:
    """A tiny random language model with the tokenizer of a real one."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    from ccf_llm_hf.data.assets import load_backbone_path

    tokenizer = AutoTokenizer.from_pretrained(load_backbone_path(BACKBONE)[0])
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=2, max_position_embeddings=8192, **shape
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_recipe(folder: Path) -> Path:
    """The recipe of the planning and the training step."""
    recipe = {
        "data_dir": str(folder / "data"),
        "cf_dir": str(folder / "cf"),
        "output_dir": str(folder / "run"),
        "backbone": str(folder / "backbone"),
        "precision": "fp32",
        "full_checkpoint": False,
        "stages": [STAGE],
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def plan(recipe_file: str) -> None:
    """Group every training row, plan the steps and write all batches; run in its own process."""
    from ccf_llm_hf.training.collator import GroupDataset, PackingCollator
    from ccf_llm_hf.training.recipe import parse_recipe
    from ccf_llm_hf.training.stage import RunInputs, StageRun
    from ccf_llm_hf.training.trainer import group_training, plan_batches

    recipe = parse_recipe(["--config", recipe_file])
    inputs = RunInputs.load(recipe)
    stage = StageRun(recipe, recipe.stages[0], inputs, Path(recipe.output_dir), None)
    processor, args = stage.build_processor(), stage.training_arguments()
    groups = group_training(inputs.data.rows("train"), processor, args, inputs.cf)
    sampler = plan_batches(groups, processor, args)
    dataset, collate = GroupDataset(groups), PackingCollator(processor)
    for batch in sampler:
        collate([dataset[index] for index in batch])


def run(*command: str) -> dict[str, float]:
    """Processor seconds and peak memory of a Python command in a process of its own."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, *command], **silent)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{' '.join(command)} failed: run it by hand to see why")
    seconds, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024 / 1e9
    print(f"  {' '.join(command)[:60]}: {seconds:.1f} s, {peak:.2f} GB", flush=True)
    return {"seconds": round(seconds, 2), "peak_gb": round(peak, 3)}


def cli(*words: str) -> dict[str, float]:
    """`run` for a `ccf-llm` command."""
    return run("-m", "ccf_llm_hf.cli", *words)


def measure(rows: int, folder: Path) -> dict[str, Any]:
    """Seconds and peak memory of every step at one size."""
    run(__file__, "--write", str(rows), str(folder))
    os.environ |= {"CCF_LLM_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    data, cf, checkpoint = (str(folder / name) for name in ("data", "cf", "run/checkpoint-slim"))
    recipe = str(write_recipe(folder))
    tables = ("--interactions", str(folder / "interactions.parquet"))
    tables += ("--items", str(folder / "items.parquet"), "--rating-column", "rating")
    histories = ("--histories", "signed", "--max-history", "48")
    strengths = ("--l2-factors", "7", "--l2-user-bias", "0.5", "--l2-item-bias", "0.25")
    cross_fit = ("--cross-fit", "users", *strengths)
    pairs = ("--pairs", str(folder / "pairs.parquet"), "--out", str(folder / "scores"))
    steps = {
        "prepare": lambda: cli("prepare", "table", *tables, *histories, "--out", data),
        "fit_cf": lambda: cli("fit-cf", "mf", "--data", data, *cross_fit, "--out", cf),
        "plan": lambda: run(__file__, "--plan", recipe),
        "train": lambda: cli("train", recipe),
        "score": lambda: cli("score", checkpoint, *pairs, "--data", data),
        "rank": lambda: cli("rank", checkpoint, "--user", "7", "--data", data),
    }
    figures: dict[str, Any] = {"rows": rows}
    figures |= {"items": rows // ROWS_PER_ITEM, "users": rows // ROWS_PER_USER}
    return figures | {name: step() for name, step in steps.items()}


def plot(points: list[dict[str, Any]], path: Path) -> None:
    """Seconds and memory against interactions."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    sizes = [point["rows"] for point in points]
    for axes, key, label in zip(
        panels, ("seconds", "peak_gb"), ("seconds", "peak memory, GB"), strict=True
    ):
        for step in STEPS:
            axes.plot(sizes, [point[step][key] for point in points], "o-", label=step)
        axes.set(xscale="log", yscale="log", xlabel="interactions", ylabel=label)
        axes.grid(alpha=0.3)
    panels[0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Measure, print and write; sizes that were measured before and are not asked for stay."""
    parser = argparse.ArgumentParser(description="Growth with the size of the data.")
    parser.add_argument("--out", default="results/speed/scale.json", help="results file")
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="interactions")
    parser.add_argument("--write", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--plan", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.write:
        write_tables(int(options.write[0]), Path(options.write[1]))
        write_backbone(Path(options.write[1]) / "backbone")
        return
    if options.plan:
        plan(options.plan)
        return
    out = Path(options.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    before = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else []
    points = {point["rows"]: point for point in before}
    for rows in options.sizes:
        with tempfile.TemporaryDirectory() as name:
            points[rows] = measure(rows, Path(name)) | circumstances()
        found = [points[rows] for rows in sorted(points)]
        out.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        plot(found, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
