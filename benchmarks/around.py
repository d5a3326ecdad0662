"""Everything around the model: preparing, fitting CF, importing, checkpoint size, loading, memory.

    python benchmarks/around.py

Every figure comes from a fresh process. Writes `benchmarks/results/around.json`.
"""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from workload import BACKBONE, arguments, limit, write_results

from ccf_llm_hf.data.assets import load_backbone_path

LOAD = """
import sys, time
import torch, transformers
from transformers import AutoModelForCausalLM
from ccf_llm_hf.modeling.modeling_ccf_llm import CCFLLMForCTR
def best(work):
    seconds = []
    for _ in range(3):
        started = time.perf_counter(); work(); seconds.append(time.perf_counter() - started)
    return sorted(seconds)[1]
plain = best(lambda: AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32))
ours = best(lambda: CCFLLMForCTR.from_pretrained(sys.argv[1], backbone=sys.argv[2]))
print(ours - plain)
"""


def run(*command: str) -> tuple[float, float]:
    """Seconds and peak memory in MB of a command in a process of its own."""
    code = (
        "import os, subprocess, sys, time; started = time.perf_counter(); "
        "p = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL); "
        "_, status, usage = os.wait4(p.pid, 0); "
        "print(time.perf_counter() - started, usage.ru_maxrss / 1024, status)"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
    )
    seconds, megabytes, status = map(float, shown.stdout.split())
    if status:
        sys.exit(f"{' '.join(command)} failed: run it by hand to see why")
    print(f"  {' '.join(command)[:70]}: {seconds:.1f} s, {megabytes:.0f} MB", flush=True)
    return seconds, megabytes


def cli(*words: str) -> tuple[float, float]:
    """`run` for a `ccf-llm` command."""
    return run(sys.executable, "-m", "ccf_llm_hf.cli", *words)


def import_seconds(repeats: int = 5) -> tuple[float, float]:
    """Median seconds to import torch and transformers, and the package, in turns."""
    ways = {"base": "import torch, transformers", "ours": "import ccf_llm_hf"}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, code in ways.items():
            seconds[name].append(run(sys.executable, "-c", code)[0])
    return statistics.median(seconds["base"]), statistics.median(seconds["ours"])


def load_seconds(checkpoint: str, backbone: str) -> float:
    """Seconds to load the slim checkpoint beyond its backbone's own."""
    shown = subprocess.run(
        [sys.executable, "-c", LOAD, checkpoint, backbone],
        capture_output=True,
        text=True,
        check=True,
    )
    return float(shown.stdout.split()[-1])


def training_memory(data: str, cf: str, folder: Path) -> float:
    """Peak MB of training LoRA and fusion in fp32 on title candidates, validation included."""
    stage = {
        "name": "joint",
        "prompt": {"candidate_format": "title_slot"},
        "lora": {},
        "training": {"max_train_labels": 400, "labels_per_step": 128, "max_eval_labels": 200},
    }
    recipe = {
        "data_dir": str(Path(data).resolve()),
        "cf_dir": str(Path(cf).resolve()),
        "output_dir": str(folder / "run"),
        "backbone": BACKBONE,
        "precision": "fp32",
        "stages": [stage],
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return cli("train", str(file))[1]


def main() -> None:
    """Measure, print and write."""
    parser = arguments(__doc__, "around.json")
    parser.add_argument(
        "--checkpoint", default="runs/bench/checkpoint-slim", help="slim checkpoint"
    )
    options = parser.parse_args()
    backbone, _ = load_backbone_path(BACKBONE)
    figures: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        figures["prepare"] = cli("prepare", "ml-1m", "--out", str(folder / "data"))
        figures["fit_cf"] = cli("fit-cf", "mf", "--data", options.data, "--out", str(folder / "cf"))
        base, ours = import_seconds()
        figures["help"] = cli("--help")
        figures["training_mb"] = training_memory(options.data, options.cf, folder)
    size = sum(f.stat().st_size for f in Path(options.checkpoint).rglob("*") if f.is_file()) / 1e6
    figures |= {"import": ours, "import_torch_transformers": base, "slim_mb": size}
    figures["load"] = load_seconds(options.checkpoint, backbone)
    summary = [
        limit("prepare ml-1m from its files", 15, figures["prepare"][0], "s"),
        limit("prepare ml-1m, peak memory", 1500, figures["prepare"][1], "MB"),
        limit("fit-cf mf on ml-1m", 20, figures["fit_cf"][0], "s"),
        limit("import ccf_llm_hf over torch and transformers", 3, ours - base, "s"),
        limit("slim checkpoint", 25, size, "MB"),
        limit("loading it beyond its backbone", 3, figures["load"], "s"),
        limit("training, peak memory, 1,024 tokens a pass", 4096, figures["training_mb"], "MB"),
    ]
    write_results(options.out, {"figures": figures, "summary": summary})


if __name__ == "__main__":
    main()
