"""What every measurement needs: real ratings, the real backbone, models of each prompt form."""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import peft
import torch
from transformers import AutoTokenizer

from ccf_llm_hf.cf.vectors import CFVectors
from ccf_llm_hf.data.assets import load_backbone_path
from ccf_llm_hf.data.grouping import Group, group_rows
from ccf_llm_hf.data.prepared import PreparedData, load_prepared
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
from ccf_llm_hf.modeling.processing_ccf_llm import CCFLLMProcessor
from ccf_llm_hf.training.cross_fit import choose_fits, install_cross_fit
from ccf_llm_hf.training.lora import inject_lora
from ccf_llm_hf.training.trainer import choose_trained

BACKBONE = "smollm2-135m-instruct"
WINDOW = (20, 16)
LORA = {
    "r": 8,
    "lora_alpha": 16,
    "target_modules": ["q_proj", "v_proj"],
    "use_rslora": False,
    "lora_dropout": 0.0,
}
SEED = 0
AT_LEAST = 10.0
FORMATS = {
    "slot": "slot-only candidates",
    "title_slot": "title candidates",
    "bare_title": "title candidates without years",
}
PROMPTS: dict[str, dict[str, Any]] = {
    "slot": {"candidate_format": "slot"},
    "title_slot": {"candidate_format": "title_slot"},
    "bare_title": {"candidate_format": "title_slot", "title_years": False},
}


@dataclass
class Workload:
    """Data, CF table and backbone folder."""

    data: PreparedData
    cf: CFVectors
    backbone: str

    @classmethod
    def load(cls, data_dir: str, cf_dir: str) -> "Workload":
        """Read a prepared folder and its CF table; fetch the backbone if need be."""
        return cls(load_prepared(data_dir), CFVectors.load(cf_dir), load_backbone_path(BACKBONE)[0])

    def processor(self, **prompt: Any) -> CCFLLMProcessor:
        """A processor over the catalog."""
        cf = self.cf
        return CCFLLMProcessor(
            AutoTokenizer.from_pretrained(self.backbone),
            *(cf.item_ids, cf.item_titles, cf.user_ids),
            **prompt,
        )

    def model(
        self, processor: CCFLLMProcessor, lora: bool = False, cf_logit: bool = False
    ) -> CCFLLMForCTR:
        """A fresh gate model; with `lora` it and the fusion learn, as in workload.yaml."""
        torch.manual_seed(SEED)
        model = CCFLLMForCTR.from_backbone(
            self.backbone,
            processor,
            cf=self.cf,
            fusion="gate",
            cf_logit=cf_logit,
        )
        if lora:
            inject_lora(model, peft.LoraConfig(**LORA))
        choose_trained(model, fusion=True, lora=lora)
        install_cross_fit(model, self.cf)
        return model

    def train_groups(self, window: tuple[int, int] = WINDOW, alone: bool = False) -> list[Group]:
        """Training groups with their CF snapshots, as a recipe packs them."""
        split = self.data.splits["train"]
        fits = choose_fits(split, self.cf)
        return group_rows(split, window, fits, **({"max_candidates": 1} if alone else {}))


def whole_groups(groups: list[Group], labels: int) -> list[Group]:
    """Whole groups in seeded order until `labels` labels are reached."""
    order = np.random.default_rng(SEED).permutation(len(groups))
    chosen, seen = [], 0
    for index in order:
        if seen >= labels:
            break
        chosen.append(groups[index])
        seen += len(groups[index].labels)
    return chosen


def timed(work: Callable[[], Any]) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def alternate(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every way, run in turns so that a slow spell of the machine hits all alike. What
    takes less than `AT_LEAST` seconds is run again in its turn, and counts as the mean."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(1, repeats + 1):
        for name, work in ways.items():
            taken = [timed(work)]
            while sum(taken) < AT_LEAST:
                taken.append(timed(work))
            seconds[name].append(sum(taken) / len(taken))
            print(f"  turn {turn}, {name}: {seconds[name][-1]:.2f} s", flush=True)
    return seconds


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest and largest."""
    rounded = [round(value, 4) for value in values]
    return {"median": median(rounded), "min": min(rounded), "max": max(rounded)}


def target(name: str, at_least: float, measured: float, unit: str = "times") -> dict[str, Any]:
    """One line of the summary: a target that is reached from below."""
    return line(name, f"at least {at_least:g}", measured, unit, measured >= at_least)


def limit(name: str, at_most: float, measured: float, unit: str) -> dict[str, Any]:
    """One line of the summary: a target that must not be exceeded."""
    return line(name, f"at most {at_most:g}", measured, unit, measured <= at_most)


def line(name: str, wanted: str, measured: float, unit: str, holds: bool) -> dict[str, Any]:
    """One line of the summary."""
    measured = float(f"{measured:.4g}")
    return {
        "name": name,
        "target": wanted,
        "measured": measured,
        "unit": unit,
        "holds": bool(holds),
    }


def write_results(path: str, results: dict[str, Any]) -> None:
    """Write results beside the circumstances they were measured in."""
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(file.name + ".partial")
    partial.write_text(json.dumps(circumstances() | results, indent=2) + "\n", encoding="utf-8")
    partial.replace(file)
    for entry in results["summary"]:
        mark = "holds" if entry["holds"] else "MISSED"
        print(f"{entry['name']}: {entry['measured']} {entry['unit']} ({entry['target']}) {mark}")


def arguments(description: str | None, out: str) -> argparse.ArgumentParser:
    """The options that all measurements share."""
    parser = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    parser.add_argument("--data", default="runs/bench/data", help="prepared data folder")
    parser.add_argument("--cf", default="runs/bench/cf", help="CF table")
    parser.add_argument("--out", default=f"benchmarks/results/{out}", help="results file")
    return parser


def gemm_gflops(rows: int = 1024, width: int = 576, out: int = 1536) -> float:
    """GFLOP/s of the fp32 matrix product that the backbone spends its time in."""
    left, weight = torch.randn(rows, width), torch.randn(out, width)
    best = min(
        timed(lambda: [torch.nn.functional.linear(left, weight) for _ in range(20)])
        for _ in range(8)
    )
    return 20 * 2 * rows * width * out / best / 1e9


def circumstances() -> dict[str, Any]:
    """Hardware, versions and seed, for every results file."""
    packages = ("torch", "transformers", "peft", "numpy")
    return {
        "hardware": {
            "cpu_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "instructions": sorted(
                name for name, has in torch.cpu.get_capabilities().items() if has is True
            ),
        },
        "versions": {name: version(name) for name in packages}
        | {"python": platform.python_version()},
        "seed": SEED,
    }
